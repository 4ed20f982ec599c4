"""Products of gradients and errors, and what stands around them (the same for Z-IL and for reverse mode).

All of this moves work between a product's operands and its result, by the rules of linear algebra: the same numbers but
for rounding.  So it is for updates alone: gradients that are looked at keep the operations that the dynamics define.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.graph import Users, hand_over, is_forward, is_standard, known_axes, name_anew, size

#: On a CPU, matrices of more elements than the first and up to the second are updated behind their gradient's product.
#: onnxruntime's Gemm copies its addend with one thread, out of whose cache the others then fetch it: up to a third more
#: (docs/PROFILE.md).  Smaller ones are done before that tells; of larger ones the gradient costs more memory than time.
APART = (1 << 16, 1 << 20)
#: Errors of fewer elements than this are multiplied as they are.
FACTORED = 1 << 16
#: Of fewer probabilities than this softmax's derivative takes what it has at hand.
ATTENDED = 1 << 18
#: A head of an attention has at most so many elements, as a rule fewer than half of the keys that there may be.
HEAD = 128


def turn_products(graph: gs.Graph) -> None:
    """A product that is transposed is the product of the transposed factors, the other way round (in place).

    Before:  Transpose(Gemm(A, B))
    After:   Gemm(B, A, transA=1, transB=1)

    So it is with the gradient of a weight that is read transposed, as a table of embeddings is in the last layer.
    """
    transposes = [k for k, node in enumerate(graph.nodes) if node.op == "Transpose" and not is_forward(node)]
    if not transposes:
        return
    users, op = Users(graph), Emitter.among(graph)
    for k in transposes:
        node = graph.nodes[k]
        gemm = users.maker.get(node.inputs[0].name)
        if gemm is None or is_forward(gemm) or users.count(node.inputs[0]) != 1:
            continue
        if gemm.op != "Gemm" or len(gemm.inputs) != 2 or list(node.attrs.get("perm", (1, 0))) != [1, 0]:
            continue
        a, b = gemm.inputs
        turned = {"transA": 1 - gemm.attrs.get("transB", 0), "transB": 1 - gemm.attrs.get("transA", 0)}
        graph.nodes[k] = _made_instead(node, "Gemm", [b, a], {**gemm.attrs, **turned}, op)


def fold_updates(graph: gs.Graph, target: str = "cpu") -> None:
    """The update of a matrix joins the product that makes its gradient, or a part of it (in place).

    Before:  W.next = Sub(W, Gemm(A, B))
    After:   W.next = Gemm(A, B, W, alpha=-1)

    Before:  W.next = Sub(W, Add(Gemm(A, B), G))
    After:   W.next = Sub(Gemm(A, B, W, alpha=-1), G), or another Gemm if G is a product too

    No gradient is written, which is most of the memory traffic of a wide layer, and a node less to start on a small
    one.  Only where nothing else reads the gradient.  On a CPU not for matrices in ``APART``.
    """
    users = Users(graph)
    given, op = {t.name for t in graph.inputs}, Emitter.among(graph)

    def foldable(product: gs.Node | None) -> bool:
        if product is None or product.op != "Gemm" or len(product.inputs) != 2:
            return False
        return users.count(product.outputs[0]) == 1 and product.attrs.get("alpha", 1.0) == 1.0

    place = {id(node): k for k, node in enumerate(graph.nodes)}
    instead: dict[int, gs.Node] = {}
    kept = []
    for node in graph.nodes:
        # The role, for the model's own Sub may broadcast.
        if (
            node.op != "Sub"
            or node.metadata.get("zilc.role") != "optimizer"
            or node.inputs[0].name not in given
            or (target == "cpu" and APART[0] < size(node.inputs[0]) <= APART[1])
        ):
            kept.append(node)
            continue
        weight, gradient = node.inputs
        total = users.maker.get(gradient.name)
        terms = [gradient]
        if total is not None and total.op == "Add" and users.count(gradient) == 1:
            terms = list(total.inputs)
        if any(op.dims(t) != op.dims(weight) for t in terms):  # what is added may broadcast
            terms = []
        products = [users.maker[t.name] for t in terms if foldable(users.maker.get(t.name))]
        products.sort(key=lambda product: place[id(product)])
        if not products:
            kept.append(node)
            continue
        steps: list[tuple[str, list[gs.Tensor], dict[str, Any]]] = []
        for product in products:
            attrs = {**product.attrs, "alpha": -1.0}
            attrs.pop("beta", None)  # of an addend that was not there
            steps.append(("Gemm", list(product.inputs), attrs))
        made = {product.outputs[0].name for product in products}
        steps += [("Sub", [term], {}) for term in terms if term.name not in made]
        # A part is made where its product was: what that reads need not be kept until the rest is there.
        for product, (kind, operands, attrs) in zip(products, steps[:-1], strict=False):
            name = f"{node.name.rpartition('/')[0]}/part"
            part = gs.Variable(op.fresh(name), weight.dtype, weight.shape)
            made_there = gs.Node(kind, op.fresh(f"{name}/{kind}"), attrs, [*operands, weight], [part])
            made_there.metadata, weight = dict(node.metadata), part
            instead[id(product)] = made_there
        kind, operands, attrs = steps[-1]
        inputs = [*operands, weight] if kind == "Gemm" else [weight, *operands]
        kept.append(_made_instead(node, kind, inputs, attrs, op))
    kept = [instead.get(id(node), node) for node in kept]
    graph.nodes = kept


def _made_instead(node: gs.Node, kind: str, inputs: list[gs.Tensor], attrs: dict[str, Any], op: Emitter) -> gs.Node:
    """Another node that makes what ``node`` makes, in its place and with its metadata; ``node`` makes it no more."""
    made = gs.Node(kind, name=op.fresh(f"{node.name.rpartition('/')[0]}/{kind}"), attrs=attrs, inputs=inputs)
    made.metadata, result = dict(node.metadata), node.outputs[0]
    result.inputs.clear()
    made.outputs = [result]
    return made


def move_factors(graph: gs.Graph) -> None:
    """A number that a large error is multiplied with goes to the small sides of its products (in place).

    Before:  e = Mul(d, s), Gemm(x, e), MatMul(e, W), ReduceSum(e)        s a number
    After:   Gemm(Mul(x, s), d), Mul(MatMul(d, W), s), Mul(ReduceSum(d), s)

    The error of a model with a large vocabulary is by far its largest tensor, and the rate over the number of targets
    is such a number.  Half precisions keep it where it is: there it keeps errors within range.
    """
    scalings = [n for n in graph.nodes if n.op == "Mul" and not is_forward(n) and not n.inputs[1].shape]
    if not scalings:
        return
    op = Emitter.among(graph)
    users = Users(graph)
    place = {id(node): k for k, node in enumerate(graph.nodes)}
    around: dict[int, tuple[list[gs.Node], list[gs.Node]]] = {}  # nodes to put before one, and behind it
    for node in scalings:
        direction, factor = node.inputs
        if op.dims(factor) != [] or op.dtype(direction) != np.float32:
            continue
        if not FACTORED <= _elements(op, direction) < float("inf"):
            continue
        readers = sorted(_linear_readers(node.outputs[0], users), key=lambda reader: place[id(reader[0])])
        if any(id(reader) in around for reader, _ in readers):
            continue  # another error's factor is at it
        sides = [_small_side(op, *reader) for reader in readers]
        if not sides or sum(_elements(op, side) for side in sides) > _elements(op, direction) / 4:
            continue
        for reader in users.readers(node.outputs[0]):
            assert reader is not None
            reader.inputs = [direction if t.name == node.outputs[0].name else t for t in reader.inputs]
        scaled: dict[str, gs.Tensor] = {}
        for (reader, k), small in zip(readers, sides, strict=True):
            first, behind = around.setdefault(id(reader), ([], []))
            op.graph.nodes = []
            op.forget()
            with op.in_place_of(reader):
                if small is reader.outputs[0]:
                    reader.outputs[0] = gs.Variable(op.fresh(f"{small.name}/direction"), small.dtype, small.shape)
                    name_anew(op.Mul(reader.outputs[0], factor), small)
                    behind += op.graph.nodes
                    continue
                if small.name not in scaled:
                    scaled[small.name] = op.Mul(small, factor)
                    first += op.graph.nodes
            reader.inputs[1 - k] = scaled[small.name]
    graph.nodes = [
        new for node in graph.nodes for first, behind in [around.get(id(node), ((), ()))]
        for new in (*first, node, *behind)
    ]  # fmt: skip


def _linear_readers(error: gs.Tensor, users: Users) -> list[tuple[gs.Node, int]]:
    """The products and sums that read an error or a view of it, and as which operand; none if anything else does."""
    found: list[tuple[gs.Node, int]] = []
    views = [error]
    while views:
        view = views.pop()
        for node in users.readers(view):
            if node is None or not is_standard(node) or is_forward(node):
                return []
            places = [k for k, t in enumerate(node.inputs) if t.name == view.name]
            if any(node is known for known, _ in found):
                return []  # it reads the error twice, under two names
            if node.op in ("Flatten", "Reshape") and places == [0]:
                views += node.outputs
            elif (node.op in ("Gemm", "MatMul") and len(node.inputs) == 2 and len(places) == 1) or (
                node.op == "ReduceSum" and places == [0]
            ):
                found.append((node, places[0]))
            else:
                return []
    return found


def _small_side(op: Emitter, node: gs.Node, k: int) -> gs.Tensor:
    """Of a node that is linear in operand ``k``, what to multiply instead of that: the other factor or the result."""
    result, other = node.outputs[0], node.inputs[1 - k]
    return other if node.op != "ReduceSum" and _elements(op, other) <= _elements(op, result) else result


def _elements(op: Emitter, tensor: gs.Tensor) -> float:
    """As :func:`zilc.graph.size`, of a shape that is inferred where it was not needed before."""
    op.dims(tensor)
    return size(tensor)


def sum_over_values(graph: gs.Graph) -> None:
    """What softmax's derivative needs of an attention, summed over the elements of a head instead of over keys.

    Before:  ReduceSum(Mul(P, MatMul(dY, V^T)), -1)         P [.., S, L], V [.., L, D], Y = P V
    After:   ReduceSum(Mul(dY, Y), -1)

    sum_l P_sl sum_d dY_sd V_ld = sum_d dY_sd Y_sd, as in FlashAttention's backward pass (Dao et al., 2022).  Only where
    there are many keys and a head has half as many elements at most (docs/PROFILE.md).
    """
    if not any(node.op == "ReduceSum" for node in graph.nodes):
        return
    op = Emitter.among(graph)
    users = Users(graph)
    values: dict[tuple[str, ...], gs.Node] = {}  # products of the forward part, by what they read
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        if node.op == "MatMul" and is_forward(node):
            values[tuple(t.name for t in node.inputs)] = node
        operands = _attended(op, node, users, values)
        if operands is None or not _is_narrow(*(op.dims(t) for t in operands)):
            nodes.append(node)
            continue
        y, dy = operands[0], operands[1]
        op.graph.nodes = []
        op.forget()
        with op.in_place_of(node):
            made = op.ReduceSum(op.Mul(dy, y), node.inputs[1], **node.attrs)
            if op.static(dy) is None:
                # onnxruntime gives a reduction of an empty batch the shape of its operand, which has other columns.
                made = op.Slice(made, [0], [1], [-1])
        nodes += op.graph.nodes
        hand_over(node, made)
    graph.nodes = nodes


def _attended(
    op: Emitter, node: gs.Node, users: Users, values: dict[tuple[str, ...], gs.Node]
) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor] | None:
    """Of a sum over keys: Y, dY and P."""
    if node.op != "ReduceSum" or not is_standard(node) or is_forward(node) or len(node.inputs) < 2:
        return None
    product = users.maker.get(node.inputs[0].name)
    if product is None or product.op != "Mul" or is_forward(product) or users.count(node.inputs[0]) != 1:
        return None
    rank = op.rank(node.inputs[0])
    if rank is None or rank < 2 or node.attrs.get("keepdims", 1) != 1:
        return None
    if known_axes(node.inputs[1], rank) != [rank - 1]:
        return None
    for p, d in (product.inputs, reversed(product.inputs)):
        back = users.maker.get(d.name)
        turned = users.maker.get(back.inputs[1].name) if back is not None and back.op == "MatMul" else None
        if back is None or turned is None or turned.op != "Transpose":
            continue
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        forward = values.get((p.name, turned.inputs[0].name))
        if forward is not None and list(turned.attrs.get("perm", ())) == swapped:
            return forward.outputs[0], back.inputs[0], p
    return None


def _is_narrow(y: list[Any] | None, dy: list[Any] | None, p: list[Any] | None) -> bool:
    """Whether all have one shape but for the last dimension, where Y's is much smaller; open sizes count as large."""
    if y is None or dy is None or p is None or y != dy or y[:-1] != p[:-1] or not isinstance(y[-1], int):
        return False
    if not all(isinstance(n, int) for n in p):
        return y[-1] <= HEAD
    return 2 * y[-1] <= p[-1] and math.prod(p) >= ATTENDED
