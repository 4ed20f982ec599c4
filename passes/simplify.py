"""Clean-up after emission, the same for Z-IL and for reverse mode.

Repeated work is never emitted (the emitter reuses what it made).  Left to do here: what no output reads is dropped, and
a plain SGD update is folded into the product that makes the gradient.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from zilc.graph import captured

#: A matrix of more elements than this (4 MiB in float32) no longer stays in the cache between passes.
IN_CACHE = 1 << 20


def simplify(graph: gs.Graph) -> gs.Graph:
    """Run the clean-up (in place).

    Ensures: outputs keep their names and meaning; every node lies on a path to an output.
    """
    fold_updates(graph)
    return drop_dead(graph)


def drop_dead(graph: gs.Graph) -> gs.Graph:
    """Drop nodes that no output depends on (in place)."""
    live = {t.name for t in graph.outputs}
    kept = []
    for node in reversed(graph.nodes):
        if not any(t.name in live for t in node.outputs if t.name):
            continue
        kept.append(node)
        live.update(t.name for t in node.inputs if t.name)
        if node.attrs:
            live.update(t.name for t in captured(node))
    kept.reverse()
    graph.nodes = kept
    return graph


def fold_updates(graph: gs.Graph) -> None:
    """Plain SGD on a matrix: the learning rate goes into the smaller factor of the gradient's product (in place).

    Before:  g = Gemm(A', B'),  W.next = Sub(W, Mul(g, lr))
    After:   W.next = Sub(W, Gemm(A', Mul(B', lr)))              for a matrix that stays in the cache
             W.next = Gemm(A', Mul(B', Neg(lr)), W)              for a larger one

    Both save a pass over a tensor of the weight's size; the second writes no gradient at all, which is most of the
    memory traffic of a wide layer, while on small ones onnxruntime's copy of the addend costs more than it saves.
    Only where nothing else reads the gradient.
    """
    readers: dict[str, int] = {}
    maker: dict[str, gs.Node] = {}
    for node in graph.nodes:
        for tensor in node.inputs:
            readers[tensor.name] = readers.get(tensor.name, 0) + 1
        for tensor in node.outputs:
            maker[tensor.name] = node
    for tensor in graph.outputs:
        readers[tensor.name] = readers.get(tensor.name, 0) + 1
    inputs = {t.name for t in graph.inputs}
    negated: dict[str, gs.Variable] = {}
    replaced: dict[int, list[gs.Node]] = {}
    for sub in graph.nodes:
        if sub.op != "Sub" or sub.inputs[0].name not in inputs or readers[sub.inputs[1].name] != 1:
            continue
        mul = maker.get(sub.inputs[1].name)
        if mul is None or mul.op != "Mul" or readers[mul.inputs[0].name] != 1 or mul.inputs[1].shape != []:
            continue
        gemm = maker.get(mul.inputs[0].name)
        if gemm is None or gemm.op != "Gemm" or len(gemm.inputs) != 2 or gemm.attrs.get("alpha", 1.0) != 1.0:
            continue
        weight, rate = sub.inputs[0], mul.inputs[1]
        made = []
        factor = int(_size(gemm.inputs[1]) <= _size(gemm.inputs[0]))
        large = _size(weight) > IN_CACHE
        if large and rate.name not in negated:
            negated[rate.name] = gs.Variable(f"{rate.name}/negated", dtype=rate.dtype, shape=[])
            made.append(_node("Neg", [rate], [negated[rate.name]], mul))
        scaled = gs.Variable(f"{sub.outputs[0].name}/scaled", dtype=weight.dtype, shape=gemm.inputs[factor].shape)
        made.append(_node("Mul", [gemm.inputs[factor], negated[rate.name] if large else rate], [scaled], mul))
        operands = [gemm.inputs[0], scaled] if factor else [scaled, gemm.inputs[1]]
        if large:
            made.append(_node("Gemm", [*operands, weight], [sub.outputs[0]], sub))
        else:
            change = gs.Variable(f"{sub.outputs[0].name}/change", dtype=weight.dtype, shape=weight.shape)
            made.append(_node("Gemm", operands, [change], gemm))
            made.append(_node("Sub", [weight, change], [sub.outputs[0]], sub))
        next(n for n in made if n.op == "Gemm").attrs = dict(gemm.attrs)
        replaced[id(sub)] = made
    if replaced:
        graph.nodes = [new for node in graph.nodes for new in replaced.get(id(node), [node])]


def _node(op: str, inputs: list[gs.Tensor], outputs: list[gs.Tensor], like: gs.Node) -> gs.Node:
    """A node that takes the place of ``like``; its output stops being made by anything else."""
    for tensor in outputs:
        tensor.inputs.clear()
    node = gs.Node(op, name=f"{outputs[0].name}/{op}", inputs=inputs, outputs=outputs)
    node.metadata = dict(like.metadata)
    return node


def _size(tensor: gs.Tensor) -> float:
    """Elements, symbolic dimensions counted as one; infinite where the shape is unknown."""
    if tensor.shape is None:
        return float("inf")
    return float(np.prod([int(n) for n in tensor.shape if isinstance(n, (int, np.integer))], dtype=np.float64))
