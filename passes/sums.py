"""Sums of gradients as products (the same for Z-IL and for reverse mode, where updates are the outputs).

A leaf that is read at many places gets a sum of products, which is one product over a longer contraction; a row that
was added to many (a bias, a scale) gets the sum of their errors, which is a product with ones.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from zilc import ir
from zilc.emit import Emitter
from zilc.graph import Users, hand_over, is_forward, is_standard, known_axes, size
from zilc.lowerings import BATCH

#: Up to so many elements in all, adding tensors up before they are reduced costs less than the operators it saves.
SMALL = 1 << 18
#: Sums over more rows than this get their ones in each run: as constants they would fill the file.
STORED = 1 << 14
#: Of an open number of rows, sums of fewer elements are left alone: their ones take as long as they save.
OPEN = 1 << 13


def multiply_row_sums(graph: gs.Graph) -> gs.Graph:
    """A float32 sum over all axes but the last is a product with ones (in place).

    Before:  ReduceSum(x, [0, 1])           x [4, 128, 256]
    After:   MatMul(ones, Flatten(x, 2))    ones [512]

    onnxruntime's ReduceSum takes up to three times as long on a CPU (docs/PROFILE.md), its product of a vector and a
    matrix reads the matrix once.

    Requires: no output is the gradient itself, whose sums are those of the dynamics to the bit.
    """
    if not any(node.op == "ReduceSum" for node in graph.nodes):
        return graph
    op = Emitter.among(graph)
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        if not _is_row_sum(node, op):
            nodes.append(node)
            continue
        x = node.inputs[0]
        op.graph.nodes = []
        op.forget()
        with op.in_place_of(node):
            matrix = x if op.rank(x) == 2 else op.as_matrix(x, op.rank(x) - 1)  # type: ignore[operator]
            made = op.MatMul(_ones(op, x, matrix), matrix)
        nodes += op.graph.nodes
        hand_over(node, made)
    graph.nodes = nodes
    return graph


def _is_row_sum(node: gs.Node, op: Emitter) -> bool:
    """Whether a node of the backward part sums what :func:`multiply_row_sums` takes."""
    if node.op != "ReduceSum" or not is_standard(node) or is_forward(node):
        return False
    if len(node.inputs) < 2 or node.attrs.get("keepdims", 1):
        return False
    x, axes = node.inputs[:2]
    dims = op.dims(x)
    if dims is None or len(dims) < 2 or op.dtype(x) != np.float32:
        return False
    if set(known_axes(axes, len(dims)) or ()) != set(range(len(dims) - 1)):
        return False
    sizes = [int(n) if isinstance(n, (int, np.integer)) else BATCH for n in dims]
    return sizes == dims or math.prod(sizes) >= OPEN


def _ones(op: Emitter, x: gs.Tensor, matrix: gs.Tensor) -> gs.Tensor:
    """As many as ``matrix`` has rows, which is ``x`` [..., columns]."""
    rows = op.dims(x)[:-1]  # type: ignore[index]
    if all(isinstance(n, (int, np.integer)) for n in rows):
        count = math.prod(rows)
        if count <= STORED:
            return op.constant(np.ones(count, np.float32))
    return op.Expand(op.scalar_like(1, x), op.dim_of(matrix, 0))


def join_sums(graph: gs.Graph) -> None:
    """A sum of products is one product over a longer contraction, which a leaf shared over time needs (in place).

    Before:  Add(Add(Gemm(A1, B1), Gemm(A2, B2)), Gemm(A3, B3))
    After:   Gemm(Concat(A1, A2, A3), Concat(B1, B2, B3)), along the axes that are summed over

    Before:  Add(Add(ReduceSum(x1), ReduceSum(x2)), ReduceSum(x3))
    After:   ReduceSum(Sum(x1, x2, x3))

    Only where copying the factors moves less memory than the sums that vanish: a weight read at 28 time steps by a
    batch of 20 costs 28 passes over a gradient of its size.  Not where gradients are outputs: those keep the order of
    sums that the dynamics define.  What is joined is left behind, for the clean-up to drop.
    """
    users = Users(graph)
    inner = {id(node) for node in graph.nodes if node.op == "Add" and _is_inner(node, users)}
    op = Emitter.among(graph)
    replaced: dict[int, list[gs.Node]] = {}
    for root in graph.nodes:
        if root.op != "Add" or id(root) in inner:
            continue
        terms = _terms(root, users, inner)
        groups: dict[tuple, list[gs.Node]] = {}
        for place, term in enumerate(terms):
            maker = users.maker.get(term.name) if users.count(term) == 1 else None
            groups.setdefault(_kind(maker, op) or ("alone", place), []).extend([maker] if maker else [])
        if not any(len(group) > 1 and _pays(group, op) for group in groups.values()):
            continue
        op.graph.nodes = []
        where = {k.removeprefix("zilc."): v for k, v in root.metadata.items()}
        with op.place(root.name.rpartition("/")[0], **where):
            parts = []
            for key, group in groups.items():
                if len(group) > 1 and _pays(group, op):
                    parts.append(_joined(group, op))
                else:
                    parts += [g.outputs[0] for g in group] or [terms[key[1]]]
            total = parts[0]
            for part in parts[1:]:
                total = op.Add(total, part)
        hand_over(root, total)
        replaced[id(root)] = list(op.graph.nodes)
    if replaced:
        graph.nodes = [new for node in graph.nodes for new in replaced.get(id(node), [node])]


def _is_inner(node: gs.Node, users: Users) -> bool:
    """An Add that only another Add reads, as its first operand."""
    reader = users.only(node.outputs[0])
    return reader is not None and reader.op == "Add" and reader.inputs[0] is node.outputs[0]


def _terms(root: gs.Node, users: Users, inner: set[int]) -> list[gs.Tensor]:
    """The summands of ((a + b) + c) + d, from left to right."""
    terms = []
    node: gs.Node | None = root
    while node is not None:
        terms.append(node.inputs[1])
        first = users.maker.get(node.inputs[0].name)
        if first is None or id(first) not in inner:
            terms.append(node.inputs[0])
            break
        node = first
    return terms[::-1]


def _kind(node: gs.Node | None, op: Emitter) -> tuple | None:
    """What terms must have in common to be joined: the operator, its attributes and the sizes that stay."""
    if node is None:
        return None
    if node.op == "Gemm" and len(node.inputs) == 2 and node.attrs.get("alpha", 1.0) == 1.0:
        a, b = (op.dims(t) for t in node.inputs)
        if a is None or b is None:
            return None
        left, right = _contracted(node)
        sizes = (a[1 - left], b[1 - right])
        return ("Gemm", left, right, *sizes) if all(isinstance(n, int) for n in sizes) else None
    if node.op == "ReduceSum" and len(node.inputs) == 2 and isinstance(node.inputs[1], gs.Constant):
        dims, axes = op.dims(node.inputs[0]), ir.values(node.inputs[1]).reshape(-1).tolist()
        if dims is not None and None not in dims:
            return ("ReduceSum", node.attrs.get("keepdims", 1), tuple(axes), *dims)
    return None


def _contracted(gemm: gs.Node) -> tuple[int, int]:
    """The axes of a Gemm's two factors that are summed over."""
    return (0 if gemm.attrs.get("transA") else 1), (1 if gemm.attrs.get("transB") else 0)


def _pays(group: list[gs.Node], op: Emitter) -> bool:
    """Whether less is copied than is added up; a symbolic size (the batch) counts as small."""
    copied = sum(size(t) for node in group for t in node.inputs if not isinstance(t, gs.Constant))
    if group[0].op == "Gemm":
        a, b = group[0].inputs
        left, right = _contracted(group[0])
        return copied <= len(group) * op.dims(a)[1 - left] * op.dims(b)[1 - right]  # type: ignore[index, operator]
    return copied <= SMALL


def _joined(group: list[gs.Node], op: Emitter) -> gs.Tensor:
    first = group[0]
    if first.op == "Gemm":
        left, right = (
            op.Concat(*(node.inputs[k] for node in group), axis=axis) for k, axis in enumerate(_contracted(first))
        )
        return op.Gemm(left, right, **first.attrs)
    return op.ReduceSum(op.Sum(*(node.inputs[0] for node in group)), first.inputs[1], **first.attrs)
