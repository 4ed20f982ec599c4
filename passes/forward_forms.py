"""Convolutions and products of the forward part in another form, where that is expected to be faster."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.graph import hand_over, is_forward, is_standard
from zilc.vjp import table
from zilc.vjp.conv import value_lowerings
from zilc.vjp.linear import gemm_lowerings
from zilc.vjp.window import conv_window


def take_forms(op: Emitter, graph: gs.Graph) -> gs.Graph:
    """Each Conv and Gemm of the forward part whose second factor is no constant, as chosen (in place).

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
    taken = node.op in ("Conv", "Gemm") and is_standard(node) and is_forward(node)
    return taken and isinstance(node.inputs[1], gs.Variable)


def _other_form(op: Emitter, graph: gs.Graph, node: gs.Node) -> list[gs.Node]:
    """Nodes to put in the node's place; none where it stays."""
    operands, attributes = [t for t in node.inputs if t.name], table.attributes(node, graph.opset)
    x, w = operands[:2]
    inner = op.inside()
    with inner.in_place_of(node):
        if node.op == "Conv":
            window = conv_window(inner, x, w, **attributes)
            candidates, site = value_lowerings(inner, x, w, window), window.site
        else:
            candidates, site = gemm_lowerings(inner, x, w, **attributes), ""
        if not candidates:
            return []
        name = op.lowerings.take(inner, node.op, site, operands, candidates)
        note = f"{node.op}: {name}"
        if name == next(iter(candidates)):
            node.metadata = {**node.metadata, "zilc.lowering": note}
            return []
        with inner.noting(lowering=note):
            made = candidates[name].emit(inner, *operands)
    hand_over(node, made)
    return list(inner.graph.nodes)
