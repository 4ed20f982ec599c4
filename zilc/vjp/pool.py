"""MaxPool, AveragePool and LpPool, and their global forms.

A sum of windows is a convolution with ones, one channel at a time, so spreading a cotangent back over the windows is
Conv's image cotangent with a kernel of ones.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.errors import ModelError
from zilc.lowerings import Lowering, assumed
from zilc.vjp.conv import image_cotangent
from zilc.vjp.conv_lowerings import image_part, with_gaps
from zilc.vjp.table import defvjp
from zilc.vjp.window import Window, conv_window, int64s, spatial_shape, static_sizes, zero_pad


def _window(
    op: Emitter,
    x: gs.Tensor,
    y: gs.Tensor,
    *,
    auto_pad: str,
    ceil_mode: int | None = 0,
    dilations: Any = None,
    kernel_shape: Any,
    pads: Any,
    strides: Any,
    **_: Any,
) -> Window:
    """The window of a pool.  With ceil_mode the end pads grow by what the last position reaches over."""
    window = conv_window(
        op,
        x,
        x,
        auto_pad=auto_pad,
        dilations=dilations,
        group=1,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
    )
    if not ceil_mode or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        return window
    known = window.image
    if known is None:
        return replace(window, map=None)
    assert isinstance(window.begin, list)
    assert isinstance(window.end, list)
    positions, end = [], []
    for x_, a, b, s, e in zip(known, window.begin, window.end, window.strides, window.extent, strict=True):
        n = -(-(x_ + a + b - e) // s) + 1
        n -= (n - 1) * s >= x_ + a  # the last position starts inside the image or its begin pad
        positions.append(n)
        end.append(max(b, (n - 1) * s + e - x_ - a))
    return replace(window, map=positions, end=end)


def _disjoint(window: Window) -> bool:
    return all(s >= e for s, e in zip(window.strides, window.extent, strict=True))


# --- MaxPool ----------------------------------------------------------------------------------------------------


def max_by_indices(
    op: Emitter, g: gs.Tensor, indices: gs.Tensor, x: gs.Tensor, window: Window, columns: int
) -> gs.Tensor:
    """Add each cotangent to the element its index points at; ``columns``: indices count down columns first."""
    order = [0, 1, *(reversed(window.spatial) if columns else window.spatial)]
    shape: Any = op.shape_of(x)
    turned = op.Gather(shape, order) if order != sorted(order) else shape
    known = op.static(x)
    if known is not None:
        turned = int64s(op, [known[axis] for axis in order])
        total = int64s(op, [int(np.prod(known))])
    else:
        total = op.size_of(x)
    where, updates = op.Reshape(indices, [-1]), op.Reshape(g, [-1])
    # Zeros of a run, no constant: that a runtime would make once, keep, and copy in each run.
    first = op.Slice(where, [0], [1], [0])
    zero = op.Expand(op.cast(op.Less(first, first), op.dtype(x)), total)
    # Where windows do not overlap an element is pointed at once, and overwriting is enough.
    put = op.ScatterElements if _disjoint(window) else op.add_at
    flat = put(zero, where, updates, axis=0)
    d = op.Reshape(flat, turned)
    return op.Transpose(d, perm=order) if order != sorted(order) else d


def max_by_taps(op: Emitter, g: gs.Tensor, y: gs.Tensor, x: gs.Tensor, window: Window) -> gs.Tensor:
    """Compare the output with the image at each tap of the window; the first that is equal takes the cotangent.

    Needs no indices.
    """
    kernel = window.kernel
    assert kernel is not None
    # Every tap must find an element: extend by one stride, which ceil_mode needs at most.
    reach = [e + s - 1 for e, s in zip(window.extent, window.strides, strict=True)]
    begin = int64s(op, window.begin) if isinstance(window.begin, list) else window.begin
    back = int64s(op, reach)
    low = op.constant(np.asarray(-np.inf, op.dtype(x)))
    wide = op.Pad(x, op.Concat(begin, back, axis=0), low, window.spatial)
    positions = int64s(op, window.map) if window.map is not None else op.Shape(y, start=2)
    strides = int64s(op, window.strides)
    span = op.Add(op.Mul(op.Sub(positions, int64s(op, [1])), strides), int64s(op, [1]))
    free: gs.Tensor | None = None
    total: gs.Tensor | None = None
    for tap in product(*(range(k) for k in kernel)):
        start = [k * d for k, d in zip(tap, window.dilations, strict=True)]
        part = op.Slice(wide, start, op.Add(int64s(op, start), span), window.spatial, strides)
        hit = op.Equal(part, y)
        first = hit if free is None else op.And(hit, free)
        free = op.Not(hit) if free is None else op.And(free, op.Not(hit))
        share = op.Where(first, g, op.scalar_like(0, g))
        spread = with_gaps(op, share, window)
        after = [r - 1 - a + s for r, a, s in zip(reach, start, window.strides, strict=True)]
        placed = zero_pad(op, spread, start, after, window.spatial)
        total = placed if total is None else op.Add(total, placed)
    assert total is not None
    return image_part(op, total, x, window)


def _max_pool(op: Emitter, g: gs.Tensor, outputs: tuple[Any, ...], x: gs.Tensor, **attrs: Any) -> gs.Tensor:
    y, indices = outputs[0], outputs[1]
    window = _window(op, x, y, **attrs)
    plain = all(s == 1 for s in window.strides) and all(d == 1 for d in window.dilations)
    if plain and op.dtype(x) == np.float64:
        # The reference evaluator, where float64 graphs run, gives wrong indices here.
        return max_by_taps(op, g, y, x, window)
    columns = attrs["storage_order"] or 0

    def by_indices(op: Emitter, g: gs.Tensor, y: gs.Tensor, x: gs.Tensor, indices: gs.Tensor) -> gs.Tensor:
        return max_by_indices(op, g, indices, x, window, columns)

    def by_taps(op: Emitter, g: gs.Tensor, y: gs.Tensor, x: gs.Tensor, _indices: gs.Tensor) -> gs.Tensor:
        return max_by_taps(op, g, y, x, window)

    candidates = {"indices": Lowering(by_indices, {})}
    sizes, positions = assumed(op, x), assumed(op, y)
    known = sizes is not None and positions is not None and window.kernel is not None
    if known and not columns and op.lowerings.target != "cuda":  # where comparing taps takes much longer
        assert sizes is not None
        assert positions is not None
        assert window.kernel is not None
        # Of equal elements the first in memory takes the cotangent either way, unless columns come first.
        image, map_, taps = (math.prod(n) for n in (sizes, positions, window.kernel))
        candidates["indices"] = Lowering(by_indices, {"image": image, "map": map_})
        candidates["taps"] = Lowering(by_taps, {"image": image * taps, "columns": map_ * taps})
    site = f"kernel {window.kernel} {window.site}"
    return op.lowerings.emit(op, "MaxPool.x", site, [g, y, x, indices], candidates)


# --- sums of windows --------------------------------------------------------------------------------------------


def spread_by_conv(op: Emitter, g: gs.Tensor, x: gs.Tensor, window: Window) -> gs.Tensor:
    """Each cotangent added to all elements of its window: Conv's image cotangent with ones, channels as batch."""
    assert window.kernel is not None
    ones = op.constant(np.ones([1, 1, *window.kernel], op.dtype(x)))
    if window.map is not None:
        alone = op.Reshape(g, [-1, 1, *window.map])
    else:
        alone = op.Reshape(g, op.Concat(int64s(op, [-1, 1]), op.Shape(g, start=2), axis=0))
    d = image_cotangent(op, alone, ones, x, window)
    return op.Reshape(d, op.shape_of(x))


def spread_by_repeat(op: Emitter, g: gs.Tensor, x: gs.Tensor, window: Window) -> gs.Tensor:
    """The same where windows tile the image (stride = kernel, no dilation): each cotangent repeated over its tile."""
    axes = [3 + 2 * axis for axis in range(window.rank)]
    shape = [1] * (2 + 2 * window.rank)
    for axis, s in zip(axes, window.strides, strict=True):
        shape[axis] = s
    tiles = op.Expand(op.Unsqueeze(g, axes), shape)
    sizes = window.map
    if sizes is not None and window.image is not None and isinstance(window.begin, list):
        full = [p * s for p, s in zip(sizes, window.strides, strict=True)]
        d = op.Reshape(tiles, [0, 0, *full])
        begin, image = window.begin, window.image
        missing = [max(x_ + a - f, 0) for x_, a, f in zip(image, begin, full, strict=True)]
        d = zero_pad(op, d, [0] * window.rank, missing, window.spatial)
        if begin == [0] * window.rank and all(f + m == x_ for f, m, x_ in zip(full, missing, image, strict=True)):
            return d
        return image_part(op, d, x, window)
    end = op.Mul(op.Shape(g, start=2), int64s(op, window.strides))
    d = op.Reshape(tiles, op.Concat(op.Shape(g, start=0, end=2), end, axis=0))
    d = zero_pad(op, d, [0] * window.rank, [s - 1 for s in window.strides], window.spatial)
    return image_part(op, d, x, window)


def spread(op: Emitter, g: gs.Tensor, x: gs.Tensor, window: Window) -> gs.Tensor:
    """Each cotangent added to all elements of its window."""
    if window.kernel == window.strides and all(d == 1 for d in window.dilations):
        return spread_by_repeat(op, g, x, window)
    return spread_by_conv(op, g, x, window)


def _counts(op: Emitter, x: gs.Tensor, y: gs.Tensor, window: Window, end: Any, include: bool) -> gs.Tensor:
    """How many elements each position averages over, shaped to broadcast over the output.

    The count is a product over axes of #{j : 0 <= s p + d j - a < x}, or with the pads of #{j : s p + d j < x + a + b}.
    """
    rank, kernel = window.rank, window.kernel
    assert kernel is not None
    dtype = op.dtype(x)
    begin, image, positions = window.begin, window.image, window.map
    total: Any = None
    if image is not None and positions is not None:
        counts = np.ones([1] * (2 + rank))
        for axis in range(rank):
            at = np.arange(positions[axis])[:, None] * window.strides[axis] - begin[axis]
            at = at + np.arange(kernel[axis]) * window.dilations[axis]
            inside = at < image[axis] + end[axis] if include else (at >= 0) & (at < image[axis])
            shape = [1] * (2 + rank)
            shape[2 + axis] = -1
            counts = counts * inside.sum(1).reshape(shape)
        if np.all(counts == counts.flat[0]):
            counts = counts.flat[:1].reshape([])
        return op.constant(np.asarray(counts, dtype))
    a = int64s(op, begin) if isinstance(begin, list) else begin
    b = int64s(op, end) if isinstance(end, list) else end
    zero = op.constant(np.asarray(0, np.int64))
    one = op.constant(np.asarray(1, np.int64))
    for axis in range(rank):
        here = op.constant(np.asarray(axis, np.int64))
        pad = op.Gather(a, here)
        size = op.Gather(spatial_shape(op, x), here)
        p = op.Range(zero, op.Gather(op.Shape(y, start=2), here), one)
        start = op.Sub(op.Mul(p, op.constant(np.asarray(window.strides[axis], np.int64))), pad)
        taps = np.arange(kernel[axis], dtype=np.int64) * window.dilations[axis]
        at = op.Add(op.Unsqueeze(start, [1]), op.constant(taps))  # [P, K]
        if include:
            inside = op.Less(at, op.Add(size, op.Gather(b, here)))
        else:
            inside = op.And(op.GreaterOrEqual(at, zero), op.Less(at, size))
        count = op.ReduceSum(op.cast(inside, dtype), [1], keepdims=0)
        count = op.Reshape(count, [-1] + [1] * (rank - 1 - axis))
        total = count if total is None else op.Mul(total, count)
    return total


def _sum_window(op: Emitter, x: gs.Tensor, y: gs.Tensor, **attrs: Any) -> Window:
    """The window of a pool whose cotangent needs the output's sizes."""
    window = _window(op, x, y, **attrs)
    inferred = static_sizes(op, y)
    if window.map is not None and inferred not in (None, window.map):
        # A last position that starts in the end pad is dropped by executors, and counted by ONNX's shape
        # inference before opset 22; a graph that holds both shapes cannot be loaded.
        raise ModelError(
            f"a pool with ceil_mode has output sizes {window.map}, but {inferred} by the shape inference of its opset",
            where=y.name,
            hint="Convert the model to opset 22 (--opset 22), or make its sizes symbolic.",
        )
    return window


def _average_pool(op: Emitter, g: gs.Tensor, y: gs.Tensor, x: gs.Tensor, **attrs: Any) -> gs.Tensor:
    """Y[p] = sum over the window / count[p]."""
    window = _sum_window(op, x, y, **attrs)
    end = _window(op, x, y, **{**attrs, "ceil_mode": 0}).end  # the end pads that count
    assert window.kernel is not None
    full = int(np.prod(window.kernel))
    begin = window.begin
    trivial = isinstance(begin, list) and not any(begin) and not any(window.end) and not attrs["ceil_mode"]
    if trivial or (attrs["count_include_pad"] and not attrs["ceil_mode"]):
        share = op.Mul(g, 1.0 / full)
    else:
        share = op.Div(g, _counts(op, x, y, window, end, bool(attrs["count_include_pad"])))
    return spread(op, share, x, window)


def _lp_share(op: Emitter, g: gs.Tensor, y: gs.Tensor, p: int) -> gs.Tensor:
    """g y^(1 - p), 0 where y is 0."""
    if p == 1:
        return g
    safe = op.Where(op.Greater(y, 0.0), y, 1.0)
    scaled = op.Div(g, safe if p == 2 else op.Pow(safe, float(p - 1)))
    return op.Where(op.Greater(y, 0.0), scaled, 0.0)


def _lp_slope(op: Emitter, x: gs.Tensor, p: int) -> gs.Tensor:
    """sign(x) |x|^(p - 1)."""
    if p == 1:
        return op.Sign(x)
    return x if p == 2 else op.Mul(x, op.Pow(op.Abs(x), float(p - 2)))


def _lp_pool(op: Emitter, g: gs.Tensor, y: gs.Tensor, x: gs.Tensor, *, p: int, **attrs: Any) -> gs.Tensor:
    """Y = (sum |x|^p)^(1/p):  dX = sign(x) |x|^(p-1) sum over windows of g Y^(1-p)."""
    return op.Mul(_lp_slope(op, x, p), spread(op, _lp_share(op, g, y, p), x, _sum_window(op, x, y, **attrs)))


# --- global pools -----------------------------------------------------------------------------------------------


def _global_average_pool(op: Emitter, g: gs.Tensor, y: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    sizes = static_sizes(op, x)
    if sizes is not None:
        share = op.Mul(g, 1.0 / int(np.prod(sizes)))
    else:
        share = op.Div(g, op.cast(op.ReduceProd(op.Shape(x, start=2), keepdims=0), op.dtype(x)))
    return op.Expand(share, op.shape_of(x))


def _global_max_pool(op: Emitter, g: gs.Tensor, y: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    flat = op.Reshape(x, [0, 0, -1])
    where = op.ArgMax(flat, axis=2, keepdims=1)  # [N, C, 1]
    end = op.Reshape(op.Shape(flat, start=2), op.constant(np.zeros(0, np.int64)))
    sizes = static_sizes(op, x)
    positions: Any = (
        op.constant(np.arange(int(np.prod(sizes)), dtype=np.int64))
        if sizes is not None
        else op.Range(op.constant(np.asarray(0, np.int64)), end, op.constant(np.asarray(1, np.int64)))
    )
    d = op.Where(op.Equal(where, positions), op.Reshape(g, [0, 0, 1]), op.scalar_like(0, g))
    return op.Reshape(d, op.shape_of(x))


def _global_lp_pool(op: Emitter, g: gs.Tensor, y: gs.Tensor, x: gs.Tensor, *, p: int) -> gs.Tensor:
    return op.Mul(_lp_slope(op, x, p), _lp_share(op, g, y, p))


defvjp("MaxPool", _max_pool, extra_outputs=(1,), note="the first of equal maxima takes the cotangent")
defvjp("AveragePool", _average_pool)
defvjp("LpPool", _lp_pool, note="0 where the norm is 0")
defvjp("GlobalAveragePool", _global_average_pool)
defvjp("GlobalMaxPool", _global_max_pool, note="the first of equal maxima takes the cotangent")
defvjp("GlobalLpPool", _global_lp_pool, note="0 where the norm is 0")
