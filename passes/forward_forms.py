"""Convolutions of the forward part in another form, where that is expected to be faster."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.graph import hand_over
from zilc.vjp import table
from zilc.vjp.conv import value_lowerings
from zilc.vjp.window import conv_window


def take_forms(op: Emitter, graph: gs.Graph) -> gs.Graph:
    """Each Conv of the forward part whose weight changes from step to step, as ``op.lowerings`` chooses (in place).

    A runtime that is made for inference prepares a weight once, which it cannot where the weight is an input; where it
    is a constant it is left alone.  Value and name of the result stay, but for rounding, and for how far a NaN reaches.

    Requires: ``op`` knows the names of ``graph``.
    Ensures:  same outputs; what replaces a node has its vertex, level and role.
    """
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        made = _other_form(op, graph, node) if _is_candidate(node) else []
        nodes += made or [node]
    graph.nodes = nodes
    return graph


def _is_candidate(node: gs.Node) -> bool:
    forward = getattr(node, "metadata", {}).get("zilc.role") == "forward"
    return forward and node.op == "Conv" and not node.domain and isinstance(node.inputs[1], gs.Variable)


def _other_form(op: Emitter, graph: gs.Graph, node: gs.Node) -> list[gs.Node]:
    """Nodes to put in the node's place; none where it stays."""
    operands = [t for t in node.inputs if t.name]
    x, w = operands[:2]
    inner = op.inside()
    with inner.in_place_of(node):
        window = conv_window(inner, x, w, **table.attributes(node, graph.opset))
        candidates = value_lowerings(inner, x, w, window)
        if not candidates:
            return []
        name = op.lowerings.take(inner, "Conv", window.site, operands, candidates)
        note = f"Conv: {name}"
        if name == "conv":
            node.metadata = {**node.metadata, "zilc.lowering": note}
            return []
        with inner.noting(lowering=note):
            made = candidates[name].emit(inner, *operands)
    hand_over(node, made)
    return list(inner.graph.nodes)
