"""Reductions over axes, softmax, cumulative sums and products, and the classification losses built on them.

Axes are an operand, constant or known only at run time.  Without axes, or with an empty list, everything is
reduced, or nothing where ``noop_with_empty_axes`` is set: then each element is a group of its own and the formulas
hold as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes
from zilc.emit import Emitter
from zilc.vjp.table import defvjp, no_gradient

# -- reductions --


def _kept(op: Emitter, t: Any, axes: Any, keepdims: int) -> gs.Tensor:
    """``t``, of the output's shape, with the reduced axes put back as size 1 so that it broadcasts over x.

    A full reduction gives a scalar, which broadcasts as it is; Unsqueeze by an empty list changes nothing.
    """
    if keepdims or axes is None:
        return t
    known = op.value(axes)
    if known is not None and known.size == 0:
        return t
    return op.Unsqueeze(t, axes)


def _group_size(op: Emitter, x: Any, y: Any, axes: Any, noop: int) -> float | gs.Tensor:
    """Number of elements behind one output: a Python number where it is known."""
    dims, known = op.dims(x), None if axes is None else op.value(axes)
    if dims is not None and (axes is None or known is not None):
        listed = [] if known is None else [int(a) for a in known.reshape(-1)]
        if not listed:
            listed = [] if noop else list(range(len(dims)))
        sizes = [int(n) for n in (dims[a] for a in listed) if isinstance(n, (int, np.integer))]
        if len(sizes) == len(listed):
            return float(math.prod(sizes))
    # The division is one of floats: an empty output must not divide integers by zero.
    return op.Div(op.count(x, op.dtype(x)), op.count(y, op.dtype(x)))


Reduction = Callable[[Emitter, Any, Callable[[], Any], Any, Any, dict[str, int]], gs.Tensor]


def _reduction(name: str, formula: Reduction, note: str = "") -> None:
    """Table entry; ``formula`` gets g with the reduced axes in place, and ``y()`` makes y so."""

    def rule(
        op: Emitter, g: Any, y: Any, x: Any, axes: Any, *, keepdims: int, noop_with_empty_axes: int
    ) -> gs.Tensor:
        again = {"keepdims": 1, "noop_with_empty_axes": noop_with_empty_axes}
        return formula(op, _kept(op, g, axes, keepdims), lambda: _kept(op, y, axes, keepdims), x, axes, again)

    defvjp(name, rule, None, note=note)


def _reduce_sum(
    op: Emitter, g: Any, y: Callable[[], Any], x: Any, axes: Any, again: dict[str, int]
) -> gs.Tensor:
    return op.Expand(g, op.shape_of(x))


def _reduce_mean(
    op: Emitter, g: Any, y: Callable[[], Any], x: Any, axes: Any, again: dict[str, int]
) -> gs.Tensor:
    size = _group_size(op, x, y(), axes, again["noop_with_empty_axes"])
    if isinstance(size, float):
        scaled = g if size in (0.0, 1.0) else op.Mul(g, 1.0 / size)
    else:
        scaled = op.Div(g, size)
    return op.Expand(scaled, op.shape_of(x))


def _reduce_extremum(
    op: Emitter, g: Any, y: Callable[[], Any], x: Any, axes: Any, again: dict[str, int]
) -> gs.Tensor:
    """The elements equal to the extremum share its cotangent evenly."""
    held = op.cast(op.Equal(x, y()), op.dtype(x))
    return op.Mul(held, op.Div(g, op.ReduceSum(held, axes, **again)))


def _reduce_prod(
    op: Emitter, g: Any, y: Callable[[], Any], x: Any, axes: Any, again: dict[str, int]
) -> gs.Tensor:
    """The product of the others: y/x away from zeros; a zero that is alone sees the product of the rest."""
    zero = op.Equal(x, 0.0)
    filled = op.Where(zero, 1.0, x)
    zeros = op.ReduceSum(op.cast(zero, op.dtype(x)), axes, **again)
    alone = op.Where(op.Equal(zeros, 1.0), op.ReduceProd(filled, axes, **again), 0.0)
    return op.Where(zero, op.Mul(g, alone), op.Div(op.Mul(g, y()), filled))


def _reduce_l2(
    op: Emitter, g: Any, y: Callable[[], Any], x: Any, axes: Any, again: dict[str, int]
) -> gs.Tensor:
    """x/|x|; the subgradient 0 where the norm is 0."""
    norm = y()
    return op.Mul(x, op.Where(op.Equal(norm, 0.0), 0.0, op.Div(g, norm)))


def _reduce_log_sum_exp(
    op: Emitter, g: Any, y: Callable[[], Any], x: Any, axes: Any, again: dict[str, int]
) -> gs.Tensor:
    """softmax(x) g.  Where all of x is -inf, so is y; a finite stand-in gives 0 instead of -inf - -inf."""
    lowest = dtypes.lowest(op.dtype(x))
    return op.Mul(g, op.Exp(op.Sub(x, op.Max(y(), lowest))))


_reduction("ReduceSum", _reduce_sum)
_reduction("ReduceMean", _reduce_mean)
_reduction("ReduceMax", _reduce_extremum, "equal elements share evenly")
_reduction("ReduceMin", _reduce_extremum, "equal elements share evenly")
_reduction("ReduceProd", _reduce_prod, "exact at zeros")
_reduction("ReduceL1", lambda op, g, y, x, axes, again: op.Mul(g, op.Sign(x)), "0 at 0")
_reduction("ReduceL2", _reduce_l2, "0 where the norm is 0")
_reduction("ReduceSumSquare", lambda op, g, y, x, axes, again: op.Mul(x, op.Mul(g, 2.0)))
_reduction(
    "ReduceLogSum",
    # y = log s;  1/s = e^-y
    lambda op, g, y, x, axes, again: op.Expand(op.Mul(g, op.Exp(op.Neg(y()))), op.shape_of(x)),
)
_reduction("ReduceLogSumExp", _reduce_log_sum_exp, "0 where all elements are -inf")

# -- softmax --


def _softmax(op: Emitter, g: Any, y: Any, x: Any, *, axis: int) -> gs.Tensor:
    """y (g - sum(g y)).

    A row of -inf (every key masked) makes y NaN.  Exporters of attention then write Where(IsNaN(y), 0, y), or ask
    the mask itself, and the rule of Where gives such a row g = 0; y has to be the guarded one here too, or 0 times
    NaN would come back.  Without that guard in the model NaN stays NaN.
    """
    if _guarded(y):
        y = op.Where(op.IsNaN(y), 0.0, y)
    return op.Mul(y, op.Sub(g, op.ReduceSum(op.Mul(g, y), [axis], keepdims=1)))


def _guarded(y: gs.Tensor) -> bool:
    """Whether a Where chooses between ``y`` and something else, or asks whether it is NaN."""
    stack = [y]
    while stack:
        tensor = stack.pop()
        for node in tensor.outputs:
            if node.op == "IsNaN" or (node.op == "Where" and node.inputs[0] is not tensor):
                return True
            if node.op in ("Cast", "CastLike", "Identity"):
                stack.extend(node.outputs)
    return False


def _log_softmax(op: Emitter, g: Any, y: Any, x: Any, *, axis: int) -> gs.Tensor:
    """g - softmax(x) sum(g), and softmax(x) = e^y."""
    return op.Sub(g, op.Mul(op.Exp(y), op.ReduceSum(g, [axis], keepdims=1)))


defvjp("Softmax", _softmax, note="a masked row that the model guards with Where gets 0")
defvjp("LogSoftmax", _log_softmax)
no_gradient("Hardmax", note="piecewise constant")

# -- cumulative --


def _cum_sum(op: Emitter, g: Any, y: Any, x: Any, axis: Any, *, exclusive: int, reverse: int) -> gs.Tensor:
    """The transposed sum runs the other way."""
    return op.CumSum(g, axis, exclusive=exclusive, reverse=1 - reverse)


def _cum_prod(op: Emitter, g: Any, y: Any, x: Any, axis: Any, *, exclusive: int, reverse: int) -> gs.Tensor:
    """Before the first zero sum_i g_i y_i / x_k; at it the same sum without that factor; behind it 0."""

    def back(t: gs.Tensor) -> gs.Tensor:
        return op.CumSum(t, axis, exclusive=exclusive, reverse=1 - reverse)

    zero = op.Equal(x, 0.0)
    seen = op.CumSum(op.cast(zero, op.dtype(x)), axis, reverse=reverse)
    first = op.And(zero, op.Equal(seen, 1.0))
    without = op.CumProd(op.Where(first, 1.0, x), axis, exclusive=exclusive, reverse=reverse)
    before = op.Where(op.Equal(seen, 0.0), op.Div(back(op.Mul(g, y)), op.Where(zero, 1.0, x)), 0.0)
    return op.Where(first, back(op.Mul(g, without)), before)


defvjp("CumSum", _cum_sum, None)
defvjp("CumProd", _cum_prod, None, note="exact at zeros")

# -- losses: L = sum_n c_n (-log p_n[label_n]), c_n = w[label_n], 0 where the label is ignored --


def _picked(op: Emitter, labels: Any, weights: Any, like: Any, ignore_index: int | None) -> tuple[Any, Any]:
    """Labels as int64 that index a class everywhere, and the coefficients c (None where all are 1)."""
    labels = op.cast(labels, np.int64)
    ignored = None
    if ignore_index is not None:
        ignored = op.Equal(labels, ignore_index)
        labels = op.Where(ignored, 0, labels)
    c = None
    if weights is not None:
        c = op.Gather(weights, labels)
    if ignored is not None:
        ones = op.scalar_like(1.0, like)
        c = op.Where(ignored, op.scalar_like(0.0, like), ones if c is None else c)
    return labels, c


def _spread(op: Emitter, g: Any, c: Any, labels: Any, reduction: str) -> gs.Tensor:
    """dL / d(-log p_n[label_n]): g c_n, over the sum of c for the mean; of the labels' shape, or a scalar."""
    if reduction == "mean":
        total = op.count(labels, op.dtype(g)) if c is None else op.ReduceSum(c, keepdims=0)
        g = op.Div(g, total)
    return g if c is None else op.Mul(g, c)


def _put(op: Emitter, base: Any, labels: Any, values: Any) -> gs.Tensor:
    """``base`` [N, C, ...] with ``values`` [N, ...] at each target's class."""
    return op.ScatterElements(base, op.Unsqueeze(labels, [1]), op.Unsqueeze(values, [1]), axis=1)


def _taken(op: Emitter, base: Any, labels: Any) -> gs.Tensor:
    """The entries of ``base`` [N, C, ...] at each target's class; [N, ...]."""
    return op.Squeeze(op.GatherElements(base, op.Unsqueeze(labels, [1]), axis=1), [1])


def _weights_cotangent(
    op: Emitter,
    g: Any,
    loss: Any,
    log_p: Any,
    labels: Any,
    weights: Any,
    ignore_index: int | None,
    reduction: str,
) -> gs.Tensor:
    """dL/dw: a class gathers its targets' -log p, less L for the mean, whose divisor holds w too."""
    index, c = _picked(op, labels, weights, weights, ignore_index)
    taken = op.Neg(_taken(op, log_p, index))
    share = op.Mul(g, taken)
    if reduction == "mean":
        share = op.Div(op.Mul(g, op.Sub(taken, loss)), op.ReduceSum(c, keepdims=0))
    if ignore_index is not None:
        share = op.Where(op.Equal(op.cast(labels, np.int64), ignore_index), 0.0, share)
    flat = op.constant(np.asarray([-1], np.int64))
    return op.add_at(op.zeros_like(weights), op.Reshape(index, flat), op.Reshape(share, flat), axis=0)


def _cross_entropy_scores(
    op: Emitter,
    g: Any,
    y: Any,
    scores: Any,
    labels: Any,
    weights: Any,
    *,
    ignore_index: int | None,
    reduction: str,
) -> gs.Tensor | None:
    """c (softmax(scores) - onehot(label)), and the rule of LogSoftmax for the second output."""
    result = None
    p = op.Exp(y[1])
    if g[0] is not None:
        labels, c = _picked(op, labels, weights, scores, ignore_index)
        share = _spread(op, g[0], c, labels, reduction)
        across = op.Unsqueeze(share, [1]) if c is not None or reduction == "none" else share
        result = op.Mul(_put(op, p, labels, op.Sub(_taken(op, p, labels), 1.0)), across)
    if len(g) > 1 and g[1] is not None:
        second = op.Sub(g[1], op.Mul(p, op.ReduceSum(g[1], [1], keepdims=1)))
        result = second if result is None else op.Add(result, second)
    return result


def _cross_entropy_weights(
    op: Emitter,
    g: Any,
    y: Any,
    scores: Any,
    labels: Any,
    weights: Any,
    *,
    ignore_index: int | None,
    reduction: str,
) -> gs.Tensor | None:
    if g[0] is None:
        return None
    return _weights_cotangent(op, g[0], y[0], y[1], labels, weights, ignore_index, reduction)


def _nll_scores(
    op: Emitter,
    g: Any,
    y: Any,
    log_p: Any,
    labels: Any,
    weights: Any,
    *,
    ignore_index: int | None,
    reduction: str,
) -> gs.Tensor:
    index, c = _picked(op, labels, weights, log_p, ignore_index)
    share = op.Neg(_spread(op, g, c, labels, reduction))
    return _put(op, op.zeros_like(log_p), index, op.Expand(share, op.shape_of(labels)))


def _nll_weights(
    op: Emitter,
    g: Any,
    y: Any,
    log_p: Any,
    labels: Any,
    weights: Any,
    *,
    ignore_index: int | None,
    reduction: str,
) -> gs.Tensor:
    return _weights_cotangent(op, g, y, log_p, labels, weights, ignore_index, reduction)


defvjp(
    "SoftmaxCrossEntropyLoss",
    _cross_entropy_scores,
    None,
    _cross_entropy_weights,
    multi=True,
    extra_outputs=(1,),
)
defvjp("NegativeLogLikelihoodLoss", _nll_scores, None, _nll_weights)
