"""Normalizations.

All that subtract a mean and divide by a deviation share one formula: with x^ = (x - m) r,
r = 1/sqrt(var + epsilon), and g already multiplied by the scale,

    dx = r (g - mean(g) - x^ mean(g x^)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.vjp.table import defvjp, unbroadcast

# -- shared --


def _standardize(op: Emitter, x: Any, axes: list[int], epsilon: float) -> tuple[gs.Tensor, gs.Tensor]:
    """x^ and r over ``axes`` (negative, the last ones of x).

    In single precision LayerNormalization with a scale of 1 makes both in one pass.  Its statistics are
    single precision whatever x is, so double precision spells them out.
    """
    if op.dtype(x) == np.float64:
        centred = op.Sub(x, op.ReduceMean(x, axes, keepdims=1))
        variance = op.ReduceMean(op.Mul(centred, centred), axes, keepdims=1)
        r = inverse_root(op, variance, epsilon)
        return op.Mul(centred, r), r
    ones = _ones(op, x, len(axes))
    normalized, _, r = op.LayerNormalization(x, ones, axis=-len(axes), epsilon=epsilon, outputs=3)
    return normalized, op.cast(r, op.dtype(x))


def _ones(op: Emitter, x: Any, last: int) -> gs.Tensor:
    """Ones of the shape of the last dimensions of x."""
    dims = op.dims(x)
    known = [int(n) for n in (dims or ())[-last:] if isinstance(n, (int, np.integer))]
    if len(known) == last:
        return op.constant(np.ones(known, op.dtype(x)))
    shape = op.Shape(x, start=-last)
    return op.Expand(op.constant(np.ones((), op.dtype(x))), shape)


def inverse_root(op: Emitter, variance: Any, epsilon: float) -> gs.Tensor:
    """1/sqrt(variance + epsilon)."""
    return op.Reciprocal(op.Sqrt(op.Add(variance, epsilon)))


def _project(op: Emitter, g: Any, normalized: Any, r: Any, axes: list[int]) -> gs.Tensor:
    """r (g - mean(g) - x^ mean(g x^)) over ``axes``."""
    along = op.ReduceMean(op.Mul(g, normalized), axes, keepdims=1)
    centred = op.Sub(g, op.ReduceMean(g, axes, keepdims=1))
    return op.Mul(op.Sub(centred, op.Mul(normalized, along)), r)


def _rank(op: Emitter, x: Any) -> int:
    rank = op.rank(x)
    assert rank is not None, f"the rank of '{x.name}' is unknown"
    return rank


def _channels(op: Emitter, c: Any, rank: int) -> gs.Tensor:
    """A tensor [C] so that it broadcasts along axis 1 of a tensor of this rank."""
    return op.Unsqueeze(c, list(range(1, rank - 1))) if rank > 2 else c


def _other_axes(rank: int) -> list[int]:
    """All axes but the channels'; a vector is one channel."""
    return [0, *range(2, rank)] if rank > 1 else [0]


def sum_to_channels(op: Emitter, t: Any, rank: int) -> gs.Tensor:
    """Sum over all axes but the channels'; [C]."""
    return op.ReduceSum(t, _other_axes(rank), keepdims=0 if rank > 1 else 1)


# -- BatchNormalization --


@dataclass(frozen=True)
class BatchStatistics:
    """What training mode takes from the batch, each [1, C, 1, ...], half precisions in float32.

    Attributes:
        mean, variance: of each channel, the variance by a second pass over x - mean, divided by n (biased).
        centred: x - mean.
        r: 1/sqrt(variance + epsilon).
    """

    mean: gs.Tensor
    centred: gs.Tensor
    variance: gs.Tensor
    r: gs.Tensor


def batch_statistics(op: Emitter, x: Any, epsilon: float) -> BatchStatistics:
    """Mean and variance of each channel of a batch x [N, C, ...]; a vector is one channel."""
    axes = _other_axes(_rank(op, x))
    x = op.cast(x, statistics_dtype(op.dtype(x)))
    mean = op.ReduceMean(x, axes, keepdims=1)
    centred = op.Sub(x, mean)
    variance = op.ReduceMean(op.Mul(centred, centred), axes, keepdims=1)
    return BatchStatistics(mean, centred, variance, inverse_root(op, variance, epsilon))


def statistics_dtype(dtype: np.dtype) -> np.dtype:
    """Sums over a batch overflow half precisions, so those take float32, as ONNX asks."""
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


def batch_normalized(op: Emitter, x: Any, scale: Any, b: Any, centred: Any, r: Any) -> gs.Tensor:
    """y = (x - m) (r scale) + b, in two passes over x - m."""
    rank = _rank(op, x)
    scale, b = (_channels(op, op.cast(t, op.dtype(centred)), rank) for t in (scale, b))
    return op.cast(op.Add(op.Mul(centred, op.Mul(r, scale)), b), op.dtype(x))


def _batch_sums(op: Emitter, g: Any, x: Any, epsilon: float) -> tuple[BatchStatistics, gs.Tensor, gs.Tensor, gs.Tensor]:
    """The statistics, g, sum(g) and sum(g (x - m)); the sums [1, C, 1, ...] are shared by all three operands."""
    axes = _other_axes(_rank(op, x))
    own = batch_statistics(op, x, epsilon)
    g = op.cast(g, op.dtype(own.centred))
    whole = op.ReduceSum(g, axes, keepdims=1)
    return own, g, whole, op.ReduceSum(op.Mul(g, own.centred), axes, keepdims=1)


def _batch_x(
    op: Emitter, g: Any, y: Any, x: Any, scale: Any, b: Any, mean: Any, variance: Any, *, epsilon: float,
    training_mode: int, **_: Any,
) -> gs.Tensor:  # fmt: skip
    """g scale r;  in training mode  scale r (g - sum(g)/n - (x - m) r^2 sum(g (x - m))/n)."""
    rank = _rank(op, x)
    if training_mode:
        own, g, whole, along = _batch_sums(op, g, x, epsilon)
        n = op.Div(op.count(x, op.dtype(g)), op.count(own.mean, op.dtype(g)))
        slope = op.Div(op.Mul(along, op.Mul(own.r, own.r)), n)
        inner = op.Sub(op.Sub(g, op.Div(whole, n)), op.Mul(own.centred, slope))
        # one scale for a whole channel, so it goes to the small factor
        factor = op.Mul(own.r, _channels(op, op.cast(scale, op.dtype(g)), rank))
        return op.cast(op.Mul(inner, factor), op.dtype(x))
    scale = op.cast(scale, op.dtype(x))
    r = inverse_root(op, op.cast(variance, op.dtype(x)), epsilon)
    return op.Mul(g, _channels(op, op.Mul(scale, r), rank))


def _batch_scale(
    op: Emitter, g: Any, y: Any, x: Any, scale: Any, b: Any, mean: Any, variance: Any, *, epsilon: float,
    training_mode: int, **_: Any,
) -> gs.Tensor:  # fmt: skip
    """sum g (x - m) r."""
    rank = _rank(op, x)
    if training_mode:
        own, _g, _whole, along = _batch_sums(op, g, x, epsilon)
        summed = _to_channels(op, op.Mul(along, own.r), rank)
    else:
        mean, variance = (op.cast(t, op.dtype(x)) for t in (mean, variance))
        centred = op.Sub(x, _channels(op, mean, rank))
        summed = sum_to_channels(op, op.Mul(g, centred), rank)
        summed = op.Mul(summed, inverse_root(op, variance, epsilon))
    return op.cast(summed, op.dtype(scale))


def _batch_bias(
    op: Emitter, g: Any, y: Any, x: Any, scale: Any, b: Any, mean: Any, variance: Any, *, epsilon: float,
    training_mode: int, **_: Any,
) -> gs.Tensor:  # fmt: skip
    rank = _rank(op, x)
    if training_mode:
        _own, _g, whole, _along = _batch_sums(op, g, x, epsilon)
        return op.cast(_to_channels(op, whole, rank), op.dtype(b))
    return op.cast(sum_to_channels(op, g, rank), op.dtype(b))


def _to_channels(op: Emitter, t: Any, rank: int) -> gs.Tensor:
    """[1, C, 1, ...] as [C]."""
    return op.Squeeze(t, _other_axes(rank)) if rank > 1 else t


defvjp(
    "BatchNormalization",
    _batch_x,
    _batch_scale,
    _batch_bias,
    None,
    None,
    note="running statistics are constants; the batch's own are differentiated through",
)

# -- LayerNormalization, RMSNormalization --


def _last_axes(op: Emitter, x: Any, axis: int) -> list[int]:
    """The axes from ``axis`` on, counted from the end."""
    return list(range(axis if axis < 0 else axis - _rank(op, x), 0))


def _layer_x(
    op: Emitter, g: Any, y: Any, x: Any, scale: Any, b: Any, *, axis: int, epsilon: float, **_: Any
) -> gs.Tensor | None:
    """Through Y as projected; through Mean, 1/n; through InvStdDev, -r^2 x^ / n."""
    axes = _last_axes(op, x, axis)
    g_y, g_mean, g_r = (*g, None, None)[:3]
    normalized, r = _standardize(op, x, axes, epsilon)
    result = None if g_y is None else _project(op, op.Mul(g_y, scale), normalized, r, axes)
    spread = None if g_mean is None else op.cast(g_mean, op.dtype(x))
    if g_r is not None:
        slope = op.Mul(op.Mul(normalized, op.Neg(op.Mul(r, r))), op.cast(g_r, op.dtype(x)))
        spread = slope if spread is None else op.Add(slope, spread)
    if spread is None:
        return result
    if g_r is None:
        spread = op.Expand(spread, op.shape_of(x))
    counts = [op.dim_of(x, k) for k in axes]
    n = op.ReduceProd(op.Concat(*counts, axis=0) if len(counts) > 1 else counts[0], keepdims=0)
    share = op.Div(spread, op.cast(n, op.dtype(x)))
    return share if result is None else op.Add(result, share)


def _layer_scale(
    op: Emitter, g: Any, y: Any, x: Any, scale: Any, b: Any, *, axis: int, epsilon: float, **_: Any
) -> gs.Tensor | None:
    if g[0] is None:
        return None
    normalized, _r = _standardize(op, x, _last_axes(op, x, axis), epsilon)
    return unbroadcast(op, op.Mul(g[0], normalized), scale, y[0])


def _layer_bias(op: Emitter, g: Any, y: Any, x: Any, scale: Any, b: Any, **_: Any) -> gs.Tensor | None:
    return None if g[0] is None else unbroadcast(op, g[0], b, y[0])


defvjp("LayerNormalization", _layer_x, _layer_scale, _layer_bias, multi=True)


def _root_mean_square(op: Emitter, x: Any, axes: list[int], epsilon: float) -> tuple[gs.Tensor, gs.Tensor]:
    """x^ = x r and r = 1/sqrt(mean(x^2) + epsilon)."""
    r = inverse_root(op, op.ReduceMean(op.Mul(x, x), axes, keepdims=1), epsilon)
    return op.Mul(x, r), r


def _rms_x(
    op: Emitter, g: Any, y: Any, x: Any, scale: Any, *, axis: int, epsilon: float, **_: Any
) -> gs.Tensor:
    """r (g - x^ mean(g x^)): the projection without the mean."""
    axes = _last_axes(op, x, axis)
    normalized, r = _root_mean_square(op, x, axes, epsilon)
    g = op.Mul(g, scale)
    along = op.ReduceMean(op.Mul(g, normalized), axes, keepdims=1)
    return op.Mul(op.Sub(g, op.Mul(normalized, along)), r)


def _rms_scale(
    op: Emitter, g: Any, y: Any, x: Any, scale: Any, *, axis: int, epsilon: float, **_: Any
) -> gs.Tensor:
    normalized, _r = _root_mean_square(op, x, _last_axes(op, x, axis), epsilon)
    return unbroadcast(op, op.Mul(g, normalized), scale, y)


defvjp("RMSNormalization", _rms_x, _rms_scale)

# -- InstanceNormalization, GroupNormalization: groups of channels of one sample, seen as rows --


def _rows(op: Emitter, t: Any, groups: int) -> gs.Tensor:
    """[N, C, ...] as [N, groups, the rest]; 0 groups: one a channel."""
    return op.Reshape(t, [0, groups, -1])


def _grouped(op: Emitter, x: Any, groups: int, epsilon: float) -> tuple[gs.Tensor, gs.Tensor]:
    """x^ and r of each group, as rows."""
    return _standardize(op, _rows(op, x, groups), [-1], epsilon)


def _instance_x(op: Emitter, g: Any, y: Any, x: Any, scale: Any, b: Any, *, epsilon: float) -> gs.Tensor:
    normalized, r = _grouped(op, x, 0, epsilon)
    r_scaled = op.Mul(r, op.Unsqueeze(scale, [1]))
    return op.Reshape(_project(op, _rows(op, g, 0), normalized, r_scaled, [-1]), op.shape_of(x))


def _instance_scale(op: Emitter, g: Any, y: Any, x: Any, scale: Any, b: Any, *, epsilon: float) -> gs.Tensor:
    normalized, _r = _grouped(op, x, 0, epsilon)
    return op.ReduceSum(op.Mul(_rows(op, g, 0), normalized), [0, 2], keepdims=0)


def _instance_bias(op: Emitter, g: Any, y: Any, x: Any, scale: Any, b: Any, *, epsilon: float) -> gs.Tensor:
    return sum_to_channels(op, g, _rank(op, x))


defvjp("InstanceNormalization", _instance_x, _instance_scale, _instance_bias)


def _group_x(
    op: Emitter, g: Any, y: Any, x: Any, scale: Any, b: Any, *, num_groups: int, epsilon: float, **_: Any
) -> gs.Tensor:
    normalized, r = _grouped(op, x, num_groups, epsilon)
    rows = _rows(op, op.Mul(g, _channels(op, scale, _rank(op, x))), num_groups)
    return op.Reshape(_project(op, rows, normalized, r, [-1]), op.shape_of(x))


def _group_scale(
    op: Emitter, g: Any, y: Any, x: Any, scale: Any, b: Any, *, num_groups: int, epsilon: float, **_: Any
) -> gs.Tensor:
    normalized, _r = _grouped(op, x, num_groups, epsilon)
    return sum_to_channels(op, op.Mul(g, op.Reshape(normalized, op.shape_of(x))), _rank(op, x))


def _group_bias(op: Emitter, g: Any, y: Any, x: Any, scale: Any, b: Any, **_: Any) -> gs.Tensor:
    return sum_to_channels(op, g, _rank(op, x))


# Opset 18's form (scale and bias by group) is deprecated: onnx's checker refuses models that hold it.
defvjp("GroupNormalization", _group_x, _group_scale, _group_bias, since=21)

# -- without parameters --


def _lp(op: Emitter, g: Any, y: Any, x: Any, *, axis: int, p: int) -> gs.Tensor:
    """y = x/|x|_p;  (g - d|x|/dx sum(g y)) / |x|, and 0 where the norm is 0."""
    norm = op.ReduceL2(x, [axis], keepdims=1) if p == 2 else op.ReduceL1(x, [axis], keepdims=1)
    inverse = op.Where(op.Equal(norm, 0.0), 0.0, op.Reciprocal(norm))
    slope = y if p == 2 else op.Sign(x)
    along = op.ReduceSum(op.Mul(g, y), [axis], keepdims=1)
    return op.Mul(op.Sub(g, op.Mul(slope, along)), inverse)


defvjp("LpNormalization", _lp, note="0 where the norm is 0")


def _mean_variance(op: Emitter, g: Any, y: Any, x: Any, *, axes: list[int]) -> gs.Tensor:
    """y = (x - m) / (s + 1e-9), s the deviation;  (g - mean(g)) / (s + 1e-9) - y mean(g y) / s."""
    axes = list(axes)
    centred = op.Sub(x, op.ReduceMean(x, axes, keepdims=1))
    s = op.Sqrt(op.ReduceMean(op.Mul(centred, centred), axes, keepdims=1))
    along = op.ReduceMean(op.Mul(g, y), axes, keepdims=1)
    inner = op.Div(op.Sub(g, op.ReduceMean(g, axes, keepdims=1)), op.Add(s, 1e-9))
    # in a constant group s and y are 0: the second term is left out
    weight = op.Where(op.Equal(s, 0.0), 0.0, op.Div(along, s))
    return op.Sub(inner, op.Mul(y, weight))


defvjp("MeanVarianceNormalization", _mean_variance)


def _lrn(
    op: Emitter, g: Any, y: Any, x: Any, *, size: int, alpha: float, beta: float, bias: float
) -> gs.Tensor:
    """y = x S^-beta, S = bias + alpha/size sum x^2 over a window of channels;

    dx = g S^-beta - 2 alpha beta / size x sum(g y / S), over the windows that hold this channel.
    """
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    s = op.Add(op.Mul(_window_mean(op, op.Mul(x, x), size, before, after), alpha), bias)
    # the window of the windows that hold a channel is mirrored
    spread = _window_mean(op, op.Div(op.Mul(g, y), s), size, after, before)
    return op.Sub(op.Mul(g, _power(op, s, beta)), op.Mul(op.Mul(x, 2.0 * alpha * beta), spread))


def _window_mean(op: Emitter, t: Any, size: int, before: int, after: int) -> gs.Tensor:
    """Sum over channels c - before .. c + after, divided by ``size``; outside there are zeros."""
    # Before opset 22 no AveragePool takes bfloat16, which a sum of squares is ill served by anyway.
    image = op.Unsqueeze(op.Reshape(op.widened(t), [0, 0, -1]), [1])  # [N, 1, C, the rest]
    pooled = op.AveragePool(image, kernel_shape=[size, 1], pads=[before, 0, after, 0], count_include_pad=1)
    return op.cast(op.Reshape(pooled, op.shape_of(t)), op.dtype(t))


def _power(op: Emitter, s: Any, beta: float) -> gs.Tensor:
    """s^-beta; the usual exponents need square roots alone."""
    if beta == 0.75:
        root = op.Sqrt(s)
        return op.Reciprocal(op.Mul(root, op.Sqrt(root)))
    if beta == 0.5:
        return op.Reciprocal(op.Sqrt(s))
    return op.Pow(s, -beta)


defvjp("LRN", _lrn)
