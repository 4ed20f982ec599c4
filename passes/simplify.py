"""Clean-up after emission, the same for Z-IL and for reverse mode.

Repeated work is never emitted (the emitter reuses what it made).  Left to do here: sums of products become one product,
the update of a matrix joins the product that makes its gradient, Relu's derivative is taken behind a pool instead of
in front of it, and what no output reads is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_graphsurgeon as gs

from zilc import onnx_io
from zilc.emit import Emitter, names_of
from zilc.graph import captured, fresh_name, hand_over
from zilc.passes.parameters import READ_LIMIT

#: Up to so many elements in all, adding tensors up before they are reduced costs less than the operators it saves.
SMALL = 1 << 18


def simplify(
    graph: gs.Graph, *, updates: bool = True, target: str = "cpu", data: Collection[str] = (),
    bounded: Collection[str] = (),
) -> gs.Graph:  # fmt: skip
    """Run the clean-up (in place).

    Args:
        updates: the outputs are updates, no gradients.
        target: where it will run fastest, ``cpu`` or ``cuda``.
        data, bounded: as for :func:`multiply_masks`.

    Ensures: outputs keep their names and meaning; every node lies on a path to an output.
    """
    mask_pooled(graph)
    if updates:
        join_sums(graph)
        fold_updates(graph)
        if target == "cpu":
            multiply_masks(graph, data, bounded)
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


def join_sums(graph: gs.Graph) -> None:
    """A sum of products is one product over a longer contraction, which a leaf shared over time needs (in place).

    Before:  Add(Add(Gemm(A1, B1), Gemm(A2, B2)), Gemm(A3, B3))
    After:   Gemm(Concat(A1, A2, A3), Concat(B1, B2, B3)), along the axes that are summed over

    Before:  Add(Add(ReduceSum(x1), ReduceSum(x2)), ReduceSum(x3))
    After:   ReduceSum(Sum(x1, x2, x3))

    Only where copying the factors moves less memory than the sums that vanish: a weight read at 28 time steps by a
    batch of 20 costs 28 passes over a gradient of its size.  Not where gradients are outputs: those keep the order of
    sums that the dynamics define.
    """
    users = Users(graph)
    inner = {id(node) for node in graph.nodes if node.op == "Add" and _is_inner(node, users)}
    op = Emitter(gs.Graph(opset=graph.opset), names_of(graph))
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
        drop_dead(graph)


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
        dims, axes = op.dims(node.inputs[0]), onnx_io.values(node.inputs[1]).reshape(-1).tolist()
        if dims is not None and None not in dims:
            return ("ReduceSum", node.attrs.get("keepdims", 1), tuple(axes), *dims)
    return None


def _contracted(gemm: gs.Node) -> tuple[int, int]:
    """The axes of a Gemm's two factors that are summed over."""
    return (0 if gemm.attrs.get("transA") else 1), (1 if gemm.attrs.get("transB") else 0)


def _pays(group: list[gs.Node], op: Emitter) -> bool:
    """Whether less is copied than is added up; a symbolic size (the batch) counts as small."""
    copied = sum(_size(t) for node in group for t in node.inputs if not isinstance(t, gs.Constant))
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


def fold_updates(graph: gs.Graph) -> None:
    """The update of a matrix joins the product that makes its gradient (in place).

    Before:  W.next = Sub(W, Gemm(A, B))
    After:   W.next = Gemm(A, B, W, alpha=-1)

    No gradient is written, which is most of the memory traffic of a wide layer, and a node less to start on a small
    one.  Only where nothing else reads the gradient.
    """
    users = Users(graph)
    inputs, names = {t.name for t in graph.inputs}, names_of(graph)
    kept = []
    for node in graph.nodes:
        gemm = users.maker.get(node.inputs[1].name) if node.op == "Sub" else None
        if (
            gemm is not None
            and node.metadata.get("zilc.role") == "optimizer"  # the model's own Sub may broadcast
            and node.inputs[0].name in inputs
            and gemm.op == "Gemm"
            and len(gemm.inputs) == 2
            and users.count(node.inputs[1]) == 1
            and gemm.attrs.get("alpha", 1.0) == 1.0
        ):
            name = fresh_name(f"{node.name.rpartition('/')[0]}/Gemm", names)
            attrs = {**gemm.attrs, "alpha": -1.0}
            attrs.pop("beta", None)  # of an addend that was not there
            made = gs.Node("Gemm", name=name, attrs=attrs, inputs=[*gemm.inputs])
            made.inputs.append(node.inputs[0])
            made.metadata, result = dict(node.metadata), node.outputs[0]
            result.inputs.clear()  # node makes it no more
            made.outputs = [result]
            kept.append(made)
        else:
            kept.append(node)
    graph.nodes = kept


def mask_pooled(graph: gs.Graph) -> None:
    """Relu's derivative behind a MaxPool acts on the pool's cotangent, before that is spread (in place).

    Before:  d = Where(y > 0, spread(e), 0)     p, indices = MaxPool(y), spread(e) = e added at its indices
    After:   d = spread(Where(p > 0, e, 0))

    The same bits: where p > 0 is where the element that it came from is, and zeros add up to zero.  A mask of the
    pool's size, and no tensor of the image's besides the one that is spread.
    """
    users = Users(graph)
    op = Emitter(gs.Graph(opset=graph.opset), names_of(graph))
    before: dict[int, list[gs.Node]] = {}  # nodes to put in front of one
    for node in graph.nodes:
        found = _masked_spread(node, users)
        if found is None:
            continue
        spread, updates, pooled = found
        op.graph.nodes = []
        op.forget()
        with op.in_place_of(node):
            zero = node.inputs[2]
            masked = op.Where(op.Greater(pooled, zero), updates.inputs[0], zero)
        masked.shape = updates.inputs[0].shape
        before[id(updates)] = list(op.graph.nodes)
        updates.inputs[0] = masked
        hand_over(node, spread.outputs[0])
    if before:
        graph.nodes = [new for node in graph.nodes for new in (*before.get(id(node), ()), node) if new.outputs]


#: What is finite where all operands are, unless it is too large for its type.
_FINITE = frozenset(
    {"Add", "Concat", "Conv", "ConvTranspose", "DepthToSpace", "Expand", "Flatten", "Gemm", "MatMul", "Mul", "Neg",
     "Pad", "ReduceSum", "Reshape", "ScatterElements", "Slice", "SpaceToDepth", "Squeeze", "Sub", "Sum", "Transpose",
     "Unsqueeze"}
)  # fmt: skip
_COMPARISONS = frozenset({"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or"})
#: Of these operators the operands that hold places and sizes.
_PLACES = {"Expand": (1,), "Pad": (1, 3), "ReduceSum": (1,), "Reshape": (1,), "ScatterElements": (1,),
           "Slice": (1, 2, 3, 4), "Squeeze": (1,), "Unsqueeze": (1,)}  # fmt: skip


def multiply_masks(graph: gs.Graph, data: Collection[str], bounded: Collection[str]) -> None:
    """A mask on an error that is finite by rights is a factor of 0 or 1 (in place).

    Before:  Where(mask, e, 0)
    After:   Mul(e, Cast(mask))

    onnxruntime's Where takes three passes on a CPU, and several times as long as both of these.  An infinite e would
    become NaN instead of 0.  So it stays where e can be infinite by rights, as a derivative at a point that is masked
    is (of Sqrt(Relu(x)) at x < 0), or was made of such a one.  What comes of bounded errors by sums and products with
    parameters is infinite only where it overflows, and then everything is lost.

    Args:
        data: inputs that hold a batch.
        bounded: errors of clamped outputs that are finite whatever the batch is.
    """
    op = Emitter(gs.Graph(opset=graph.opset), names_of(graph))
    users = Users(graph)
    finite = {t.name for t in graph.inputs if t.name not in data} | set(bounded)
    looked_at: dict[str, bool] = {}
    nodes: list[gs.Node] = []

    def known(tensor: gs.Tensor) -> bool:
        if not isinstance(tensor, gs.Constant):
            return tensor.name in finite or not tensor.name
        if tensor.name not in looked_at:
            # Larger ones are never read: they are weights.
            looked_at[tensor.name] = _size(tensor) >= READ_LIMIT or bool(np.isfinite(onnx_io.values(tensor)).all())
        return looked_at[tensor.name]

    for node in graph.nodes:
        places = _PLACES.get(node.op, ())
        masked = node.op == "Where" and _is_zero(node.inputs[2]) and known(node.inputs[1])
        passed = node.op in _FINITE and all(known(t) for k, t in enumerate(node.inputs) if k not in places)
        if passed or masked or _is_cast_mask(node) or _is_inverse_deviation(node, users, known):
            finite.update(t.name for t in node.outputs if t.name)
        if masked and node.metadata.get("zilc.role") != "forward" and _is_single(node.inputs[1]):
            e, kind = node.inputs[1], onnx_io.onnx_dtype(onnx_io.np_dtype(node.inputs[1].dtype))
            op.graph.nodes = []
            op.forget()
            with op.in_place_of(node):
                factor = op.Mul(e, op.Cast(node.inputs[0], to=kind))
            nodes += op.graph.nodes
            hand_over(node, factor)
        else:
            nodes.append(node)
    graph.nodes = nodes


def _is_inverse_deviation(node: gs.Node, users: Users, known: Callable[[gs.Tensor], bool]) -> bool:
    """1 / sqrt(variance + epsilon) of a finite variance, which is never negative, and a positive constant."""
    if node.op != "Reciprocal":
        return False
    root = users.maker.get(node.inputs[0].name)
    total = users.maker.get(root.inputs[0].name) if root is not None and root.op == "Sqrt" else None
    if total is None or total.op != "Add" or total.inputs[0].inputs or not known(total.inputs[0]):
        return False
    epsilon = total.inputs[1]
    return isinstance(epsilon, gs.Constant) and _size(epsilon) == 1 and bool((onnx_io.values(epsilon) > 0).all())


def _is_cast_mask(node: gs.Node) -> bool:
    """Whether a node makes numbers of a comparison."""
    makers = list(node.inputs[0].inputs) if node.op == "Cast" else []
    return bool(makers) and makers[0].op in _COMPARISONS


def _is_single(tensor: gs.Tensor) -> bool:
    """Whether the runtime computes with a tensor's type itself: half precisions are widened for products."""
    kind = onnx_io.np_dtype(tensor.dtype)
    return kind is not None and kind in (np.float32, np.float64)


def _masked_spread(node: gs.Node, users: Users) -> tuple[gs.Node, gs.Node, gs.Tensor] | None:
    """Of Where(y > 0, spread(e), 0): the node that gives spread(e), the one that reads e, and what was pooled of y."""
    if node.op != "Where" or node.metadata.get("zilc.role") == "forward" or not _is_zero(node.inputs[2]):
        return None
    greater, spread = (users.maker.get(node.inputs[k].name) for k in (0, 1))
    if greater is None or greater.op != "Greater" or not _is_zero(greater.inputs[1]):
        return None
    # Reshape(ScatterElements(zeros, Reshape(indices), Reshape(e))), read here alone
    if spread is None or spread.op != "Reshape" or users.count(spread.outputs[0]) != 1:
        return None
    scatter = users.maker.get(spread.inputs[0].name)
    if scatter is None or scatter.op != "ScatterElements" or users.count(scatter.outputs[0]) != 1:
        return None
    zeros, indices, updates = (users.maker.get(t.name) for t in scatter.inputs)
    if zeros is None or zeros.op != "Expand" or not _is_less_than_itself(zeros.inputs[0], users):
        return None
    if indices is None or indices.op != "Reshape" or updates is None or updates.op != "Reshape":
        return None
    pool = users.maker.get(indices.inputs[0].name)
    if pool is None or pool.op != "MaxPool" or pool.inputs[0].name != greater.inputs[0].name:
        return None
    if indices.inputs[0].name != pool.outputs[1].name or users.count(updates.outputs[0]) != 1:
        return None
    return spread, updates, pool.outputs[0]


def _is_less_than_itself(tensor: gs.Tensor, users: Users) -> bool:
    """Whether a tensor is zero for the reason that pools give."""
    cast = users.maker.get(tensor.name)
    less = None if cast is None or cast.op != "Cast" else users.maker.get(cast.inputs[0].name)
    return less is not None and less.op == "Less" and less.inputs[0].name == less.inputs[1].name


def _is_zero(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and _size(tensor) == 1 and not onnx_io.values(tensor).any()


class Users:
    """Who makes and who reads each tensor, by name; an output of the graph counts as read, a capture too."""

    def __init__(self, graph: gs.Graph) -> None:
        self.maker: dict[str, gs.Node] = {}
        self._readers: dict[str, list[gs.Node | None]] = {}
        for node in graph.nodes:
            for tensor in (*node.inputs, *(captured(node) if node.attrs else ())):
                self._readers.setdefault(tensor.name, []).append(node)
            for tensor in node.outputs:
                self.maker[tensor.name] = node
        for tensor in graph.outputs:
            self._readers.setdefault(tensor.name, []).append(None)

    def count(self, tensor: gs.Tensor) -> int:
        """How often a tensor is read."""
        return len(self._readers.get(tensor.name, ()))

    def only(self, tensor: gs.Tensor) -> gs.Node | None:
        """The one node that reads a tensor, if there is just one reader."""
        readers = self._readers.get(tensor.name, ())
        return readers[0] if len(readers) == 1 else None


def _size(tensor: gs.Tensor) -> float:
    """Elements, symbolic dimensions counted as one; infinite where the shape is unknown."""
    if tensor.shape is None:
        return float("inf")
    return float(np.prod([int(n) for n in tensor.shape if isinstance(n, (int, np.integer))], dtype=np.float64))
