"""Clean-up after emission, the same for Z-IL and for reverse mode.

Repeated work is never emitted (the emitter reuses what it made).  Left to do here: what stands around products of
gradients and errors (:mod:`zilc.passes.products`) and sums of them (:mod:`zilc.passes.sums`), Relu's derivative, which
is taken behind a pool instead of in front of it, and what no output reads is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes, ir
from zilc.emit import Emitter
from zilc.graph import Users, captured, hand_over, is_forward, size
from zilc.passes.parameters import READ_LIMIT
from zilc.passes.products import fold_updates, move_factors, sum_over_values, turn_products
from zilc.passes.sums import join_sums


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
        turn_products(graph)
        drop_dead(graph)
        move_factors(graph)
        sum_over_values(graph)
        fold_updates(graph, target)
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


def mask_pooled(graph: gs.Graph) -> None:
    """Relu's derivative behind a MaxPool acts on the pool's cotangent, before that is spread (in place).

    Before:  d = Where(y > 0, spread(e), 0)     p, indices = MaxPool(y), spread(e) = e added at its indices
    After:   d = spread(Where(p > 0, e, 0))

    The same bits: where p > 0 is where the element that it came from is, and zeros add up to zero.  A mask of the
    pool's size, and no tensor of the image's besides the one that is spread.
    """
    users = Users(graph)
    op = Emitter.among(graph)
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
    op = Emitter.among(graph)
    users = Users(graph)
    finite = {t.name for t in graph.inputs if t.name not in data} | set(bounded)
    looked_at: dict[str, bool] = {}
    nodes: list[gs.Node] = []

    def known(tensor: gs.Tensor) -> bool:
        if not isinstance(tensor, gs.Constant):
            return tensor.name in finite or not tensor.name
        if tensor.name not in looked_at:
            # Larger ones are never read: they are weights.
            looked_at[tensor.name] = size(tensor) >= READ_LIMIT or bool(np.isfinite(ir.values(tensor)).all())
        return looked_at[tensor.name]

    for node in graph.nodes:
        places = _PLACES.get(node.op, ())
        masked = node.op == "Where" and _is_zero(node.inputs[2]) and known(node.inputs[1])
        passed = node.op in _FINITE and all(known(t) for k, t in enumerate(node.inputs) if k not in places)
        if passed or masked or _is_cast_mask(node) or _is_inverse_deviation(node, users, known):
            finite.update(t.name for t in node.outputs if t.name)
        if masked and not is_forward(node) and _is_single(node.inputs[1]):
            e, kind = node.inputs[1], dtypes.onnx_dtype(dtypes.np_dtype(node.inputs[1].dtype))
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
    return isinstance(epsilon, gs.Constant) and size(epsilon) == 1 and bool((ir.values(epsilon) > 0).all())


def _is_cast_mask(node: gs.Node) -> bool:
    """Whether a node makes numbers of a comparison."""
    makers = list(node.inputs[0].inputs) if node.op == "Cast" else []
    return bool(makers) and makers[0].op in _COMPARISONS


def _is_single(tensor: gs.Tensor) -> bool:
    """Whether the runtime computes with a tensor's type itself: half precisions are widened for products."""
    kind = dtypes.np_dtype(tensor.dtype)
    return kind is not None and kind in (np.float32, np.float64)


def _masked_spread(node: gs.Node, users: Users) -> tuple[gs.Node, gs.Node, gs.Tensor] | None:
    """Of Where(y > 0, spread(e), 0): the node that gives spread(e), the one that reads e, and what was pooled of y."""
    if node.op != "Where" or is_forward(node) or not _is_zero(node.inputs[2]):
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
    return isinstance(tensor, gs.Constant) and size(tensor) == 1 and not ir.values(tensor).any()
