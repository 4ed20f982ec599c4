"""Reverse mode inside one vertex: through the nodes of a subgraph, or through a formula's own operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes
from zilc.emit import Emitter
from zilc.graph import captured, copy_node
from zilc.vjp import table


def instantiate(
    op: Emitter, body: gs.Graph, inputs: Mapping[str, gs.Tensor]
) -> tuple[list[gs.Tensor], list[gs.Node]]:
    """Copy a subgraph's nodes into the emitter's graph, under names of their own.

    Args:
        inputs: what takes the place of the body's inputs, by name; outer tensors are read as they are.

    Returns:
        what the body's outputs are now, and the new nodes in order.
    """
    known: dict[str, gs.Tensor] = dict(inputs)
    nodes = [_copy(op, node, known) for node in body.nodes]
    op.graph.nodes.extend(nodes)
    return [known.get(t.name, t) for t in body.outputs], nodes


def again(op: Emitter, node: gs.Node) -> gs.Node:
    """A second instance of a vertex on the same operands."""
    made = _copy(op, node, {})
    op.graph.nodes.append(made)
    return made


def _copy(op: Emitter, node: gs.Node, known: dict[str, gs.Tensor]) -> gs.Node:
    """A copy of a node of a subgraph; ``known`` learns its outputs."""
    operands = [known.get(t.name, t) if t.name else gs.Variable.empty() for t in node.inputs]
    attrs = {k: _copy_graph(op, v, known) if isinstance(v, gs.Graph) else v for k, v in node.attrs.items()}
    # Inference tells the shapes anew, but not those of a control-flow node.
    outputs = [_fresh(op, t, ranked=any(True for _ in node.subgraphs())) for t in node.outputs]
    known.update((old.name, new) for old, new in zip(node.outputs, outputs, strict=True) if old.name)
    made = copy_node(node, operands, outputs)
    made.attrs.update(attrs)
    made.name = op.fresh(f"{op.prefix}/{node.name or node.op}")
    made.metadata = op.metadata
    return made


def _copy_graph(op: Emitter, graph: gs.Graph, known: Mapping[str, gs.Tensor]) -> gs.Graph:
    inside = dict(known)
    inputs = [_fresh(op, t, ranked=True) for t in graph.inputs]
    inside.update((old.name, new) for old, new in zip(graph.inputs, inputs, strict=True))
    nodes = [_copy(op, node, inside) for node in graph.nodes]
    return gs.Graph(
        nodes, inputs, [inside.get(t.name, t) for t in graph.outputs], name=graph.name, opset=op.graph.opset
    )


def _fresh(op: Emitter, tensor: gs.Tensor, *, ranked: bool) -> gs.Variable:
    """A tensor like ``tensor``, of static shape or of none: sizes may differ from one iteration to the next.

    Args:
        ranked: keep the rank, at least.
    """
    if not tensor.name:
        return gs.Variable.empty()
    shape = None
    if tensor.shape is not None:
        shape = [n if isinstance(n, (int, np.integer)) else None for n in tensor.shape]
        shape = shape if ranked or None not in shape else None
    kind = getattr(tensor, "type", "tensor_type")
    return gs.Variable(op.fresh(f"{op.prefix}/{tensor.name}"), tensor.dtype, shape, kind)


def finish(
    op: Emitter,
    inputs: Sequence[gs.Variable],
    outputs: Iterable[gs.Tensor],
    name: str,
    likes: Sequence[gs.Tensor] | None = None,
) -> gs.Graph:
    """The emitter's graph as a subgraph: every output is a tensor of its own, and what none reads is dropped.

    Args:
        likes: tensors of the outputs' shapes.  onnxruntime's Scan wants the rank of each.
    """
    local = {t.name for node in op.graph.nodes for t in node.outputs if t.name}
    results: list[gs.Variable] = []
    taken: set[str] = set()
    for tensor in outputs:
        if tensor.name in local and tensor.name not in taken:
            result = tensor
        else:
            result = gs.Variable(op.fresh(f"{op.prefix}/out"), op.dtype(tensor), op.dims(tensor))
            node = gs.Node("Identity", op.fresh(f"{op.prefix}/Identity"), inputs=[tensor], outputs=[result])
            op.graph.nodes.append(node)
        op.dtype(result)
        taken.add(result.name)
        results.append(result)
    for result, like in zip(results, likes or results, strict=True):
        dims = op.dims(result)
        if dims is None or None in dims:
            result.shape = op.dims(like)
    live, kept = set(taken), []
    for node in reversed(op.graph.nodes):
        if any(t.name in live for t in node.outputs if t.name):
            kept.append(node)
            live.update(t.name for t in (*node.inputs, *captured(node)) if t.name)
    return gs.Graph(kept[::-1], list(inputs), results, name=name, opset=op.graph.opset)


def between(outputs: Iterable[gs.Tensor], boundary: Iterable[str]) -> list[gs.Node]:
    """The nodes that ``outputs`` are made by, up to the tensors named in ``boundary``, producers first."""
    stop = set(boundary)
    ordered: list[gs.Node] = []
    seen: set[int] = set()
    stack: list[tuple[gs.Tensor, bool]] = [(t, False) for t in outputs]
    while stack:
        tensor, ready = stack.pop()
        node = tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None
        if node is None or tensor.name in stop:
            continue
        if ready:
            ordered.append(node)
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        stack.append((tensor, True))
        stack.extend((t, False) for t in operands(node) if t.name)
    return ordered


def operands(node: gs.Node) -> list[gs.Tensor]:
    """A node's operands, those that its subgraphs capture after the listed ones."""
    return [*node.inputs, *captured(node)]


def passes(node: gs.Node, operand: int, opset: int) -> bool:
    """Whether a derivative can flow to an operand, captured ones included."""
    if operand < len(node.inputs):
        return table.is_differentiable_operand(node, operand, opset)
    return dtypes.is_float(operands(node)[operand])


def reverse(
    op: Emitter, nodes: Sequence[gs.Node], cotangents: Mapping[str, gs.Tensor], wanted: Iterable[str]
) -> dict[str, gs.Tensor]:
    """Reverse mode through ``nodes``, which are in order.

    Args:
        cotangents: of some of the tensors, by name.
        wanted: names of tensors that nodes read; their cotangents are returned, where one arrives.
    """
    found = dict(cotangents)
    carrying = set(wanted)
    targets = frozenset(carrying)
    paths: list[tuple[gs.Node, list[tuple[int, str]]]] = []
    for node in nodes:
        given = operands(node)
        if not any(t.name in carrying for t in given):
            continue
        for tensor in (*given, *node.outputs):
            if tensor.name and tensor.dtype is None:
                op.dtype(tensor)
        edges = [(k, t.name) for k, t in enumerate(given) if t.name in carrying and passes(node, k, op.graph.opset)]
        if edges:
            carrying.update(t.name for t in node.outputs if t.name and dtypes.is_float(t))
            paths.append((node, edges))
    needed = set(found)
    for node, edges in reversed(paths):
        if any(t.name in needed for t in node.outputs):
            needed.update(name for _, name in edges)
            rule = table.lookup(node, op.graph.opset)
            if rule is not None:
                table.ensure_outputs(op, node, rule)
    for node, edges in reversed(paths):
        arriving = [found.get(t.name) for t in node.outputs]
        if all(g is None for g in arriving):
            continue
        for k, name in edges:
            passed = table.vjp(op, node, k, arriving)
            if passed is not None:
                found[name] = op.Add(found[name], passed) if name in found else passed
    return {name: found[name] for name in targets if name in found}
