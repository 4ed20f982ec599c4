"""Operators that sample images at places: at computed ones (GridSample, RoiAlign, DeformConv), at windows
(Col2Im, MaxRoiPool) or at given indices (MaxUnpool).

An image is seen as [N, C, points]; a sample is a gather of points by their numbers, and its VJP adds at these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes
from zilc.emit import Emitter
from zilc.vjp.shape import rank_of, reshape_like
from zilc.vjp.table import defvjp
from zilc.vjp.trace import traced

# -- shared --


def _ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def _numbers(op: Emitter, count: gs.Tensor) -> gs.Tensor:
    """0, 1, … ``count`` - 1, of an int64 [1]."""
    value = op.value(count)
    if value is not None:
        return op.constant(np.arange(int(value[0]), dtype=np.int64))
    return op.Range(op.constant(np.asarray(0)), op.Squeeze(count, [0]), op.constant(np.asarray(1)))


def _shape(op: Emitter, *parts: gs.Tensor | int) -> gs.Tensor:
    """An int64 shape of numbers and int64 [1] tensors; a constant where all are known."""
    given = [op.constant(_ints(p)) if isinstance(p, int) else p for p in parts]
    values = [op.value(p) for p in given]
    if all(v is not None for v in values):
        return op.constant(np.concatenate([np.asarray(v, np.int64).reshape(-1) for v in values]))
    return op.Concat(*given, axis=0)


def _product(op: Emitter, parts: Sequence[gs.Tensor]) -> gs.Tensor:
    values = [op.value(p) for p in parts]
    if all(v is not None for v in values):
        return op.constant(np.prod(np.asarray(values, np.int64), axis=0))
    result = parts[0]
    for part in parts[1:]:
        result = op.Mul(result, part)
    return result


def _pick(op: Emitter, points: gs.Tensor, index: gs.Tensor) -> gs.Tensor:
    """``points`` [N, C, S] at ``index`` [N, Q], the same for all channels: [N, C, Q]."""
    shape = _shape(op, op.dim_of(points, 0), op.dim_of(points, 1), op.dim_of(index, 1))
    return op.GatherElements(points, op.Expand(op.Unsqueeze(index, [1]), shape), axis=2)


def _axis_taps(
    op: Emitter, place: gs.Tensor, taps: Sequence[int], weights: Sequence[gs.Tensor]
) -> tuple[gs.Tensor, gs.Tensor]:
    """Along one axis: the indices ``place`` + taps [..., T] in floating point, and their weights [..., T]."""
    offsets = op.constant(np.asarray(taps, op.dtype(place)))
    index = op.Add(op.Unsqueeze(place, [-1]), offsets)
    return index, op.Concat(*(op.Unsqueeze(w, [-1]) for w in weights), axis=-1)


def _sample(
    op: Emitter, points: gs.Tensor, axes: Sequence[tuple[gs.Tensor, gs.Tensor]], sizes: Sequence[gs.Tensor]
) -> gs.Tensor:
    """Sum over the taps of all axes: points [N, C, S], per axis (index, weight) [N, P, T]; the result is [N, C, P].

    Indices are whole numbers within the image, as int64; a tap outside has weight 0.
    """
    count = len(axes)
    flat: gs.Tensor | None = None
    weight: gs.Tensor | None = None
    for k, (index, w) in enumerate(axes):
        open_axes = [2 + j for j in range(count) if j != k]
        index = op.Unsqueeze(index, open_axes) if open_axes else index
        w = op.Unsqueeze(w, open_axes) if open_axes else w
        flat = index if flat is None else op.Add(op.Mul(flat, sizes[k]), index)
        weight = w if weight is None else op.Mul(weight, w)
    assert flat is not None
    assert weight is not None
    n, p = op.dim_of(axes[0][0], 0), op.dim_of(axes[0][0], 1)
    taps = _product(op, [op.dim_of(index, 2) for index, _ in axes])
    values = _pick(op, points, op.Reshape(flat, _shape(op, n, -1)))  # [N, C, P T]
    values = op.Reshape(values, _shape(op, n, op.dim_of(points, 1), p, taps), allowzero=1)
    weights = op.Reshape(weight, _shape(op, n, 1, p, taps), allowzero=1)
    return op.ReduceSum(op.Mul(values, weights), [3], keepdims=0)


def _inside(op: Emitter, index: gs.Tensor, weight: gs.Tensor, size: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
    """Taps outside the image get weight 0 and the nearest index inside."""
    whole = op.cast(index, np.int64)
    last = op.Sub(size, 1)
    held = op.Max(op.Min(whole, last), 0)
    return held, op.Where(op.Equal(held, whole), weight, 0.0)


def _points(op: Emitter, x: gs.Tensor) -> gs.Tensor:
    """An image [N, C, ...] as [N, C, points]."""
    return op.Reshape(x, _ints(0, 0, -1)) if rank_of(op, x) != 3 else x


# -- GridSample --


def _cubic(op: Emitter, t: gs.Tensor) -> list[gs.Tensor]:
    """Keys' weights at distances 1 + t, t, 1 - t, 2 - t, with a = -3/4."""
    a = -0.75

    def near(d: gs.Tensor) -> gs.Tensor:
        """((a + 2) d - (a + 3)) d^2 + 1"""
        return op.Add(op.Mul(op.Sub(op.Mul(d, a + 2), a + 3), op.Mul(d, d)), 1.0)

    def far(d: gs.Tensor) -> gs.Tensor:
        """((a d - 5 a) d + 8 a) d - 4 a"""
        return op.Sub(op.Mul(op.Add(op.Mul(op.Sub(op.Mul(d, a), 5 * a), d), 8 * a), d), 4 * a)

    rest = op.Sub(1.0, t)
    return [far(op.Add(t, 1.0)), near(t), near(rest), far(op.Add(rest, 1.0))]


def _reflected(op: Emitter, x: gs.Tensor, low: gs.Tensor, high: gs.Tensor) -> gs.Tensor:
    """x mirrored at ``low`` and ``high`` until it lies between."""
    width = op.Sub(high, low)
    safe = op.Where(op.Equal(width, 0.0), 1.0, width)  # an image of one point
    distance = op.Abs(op.Sub(x, low))
    turns = op.Floor(op.Div(distance, safe))
    rest = op.Sub(distance, op.Mul(turns, width))
    even = op.Equal(op.Mod(turns, op.scalar_like(2, turns), fmod=1), 0.0)
    mirrored = op.Add(low, op.Where(even, rest, op.Sub(width, rest)))
    outside = op.Or(op.Less(x, low), op.Greater(x, high))
    return op.Where(outside, mirrored, x)


def _grid_sample(
    op: Emitter, x: Any, grid: Any, *, mode: str, padding_mode: str, align_corners: int
) -> gs.Tensor:
    """The grid's last axis names the coordinates from the last image axis to the first, in [-1, 1]."""
    rank = rank_of(op, x) - 2
    dtype = op.dtype(x)
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    places = op.Reshape(op.cast(grid, dtype), _shape(op, op.dim_of(grid, 0), -1, rank))  # [N, P, r]
    sizes = [op.dim_of(x, 2 + k) for k in range(rank)]
    axes = []
    for k in range(rank):
        n = op.Squeeze(op.Slice(places, [rank - 1 - k], [rank - k], [2]), [2])  # [N, P]
        size = op.cast(sizes[k], dtype)
        if align_corners:
            at = op.Mul(op.Mul(op.Add(n, 1.0), 0.5), op.Sub(size, 1.0))
            low, high = op.scalar_like(0, x), op.Sub(size, 1.0)
        else:
            at = op.Mul(op.Sub(op.Mul(op.Add(n, 1.0), size), 1.0), 0.5)
            low, high = op.scalar_like(-0.5, x), op.Sub(size, 0.5)
        if mode == "nearest":
            at = op.Round(at)
        # Border and reflection move the place, and then, where weights reach further, each tap.
        at = (_moved if mode == "cubic" else _padded)(op, at, low, high, size, padding_mode)
        whole = at if mode == "nearest" else op.Floor(at)
        t = op.Sub(at, whole)
        if mode == "nearest":
            index, weight = _axis_taps(op, whole, [0], [op.Expand(op.scalar_like(1, whole), op.shape_of(whole))])
        elif mode == "linear":
            index, weight = _axis_taps(op, whole, [0, 1], [op.Sub(1.0, t), t])
        else:
            index, weight = _axis_taps(op, whole, [-1, 0, 1, 2], _cubic(op, t))
            index = _padded(op, index, low, high, size, padding_mode)
        axes.append(_inside(op, index, weight, sizes[k]))
    sampled = _sample(op, _points(op, x), axes, sizes)
    spread = [op.dim_of(grid, 1 + k) for k in range(rank_of(op, grid) - 2)]
    return op.Reshape(sampled, _shape(op, op.dim_of(x, 0), op.dim_of(x, 1), *spread), allowzero=1)


def _moved(op: Emitter, at: gs.Tensor, low: gs.Tensor, high: gs.Tensor, size: gs.Tensor, mode: str) -> gs.Tensor:
    """A place beyond the bounds, for cubic weights: between the outermost point and its bound it stays."""
    if mode == "reflection":
        return _reflected(op, at, low, high)
    if mode == "zeros":
        return at
    first, last = op.scalar_like(0, at), op.Sub(size, 1.0)
    return op.Where(op.Less(at, low), first, op.Where(op.Greater(at, high), last, at))


def _padded(op: Emitter, at: gs.Tensor, low: gs.Tensor, high: gs.Tensor, size: gs.Tensor, mode: str) -> gs.Tensor:
    """Where a place outside the image is looked up; zeros are seen to later."""
    if mode == "zeros":
        return at
    if mode == "reflection":
        at = _reflected(op, at, low, high)
    first, last = op.scalar_like(0, at), op.Sub(size, 1.0)
    return op.Where(op.Less(at, first), first, op.Where(op.Greater(at, last), last, at))


traced("GridSample", _grid_sample, (0, 1), count=2, note="to the grid too; 0 where a place lies beyond the border")

# -- RoiAlign, MaxRoiPool --


def _roi_align(
    op: Emitter,
    x: Any,
    rois: Any,
    batch: Any,
    *,
    coordinate_transformation_mode: str,
    mode: str,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    spatial_scale: float,
) -> gs.Tensor:
    """Each bin is the mean (or the maximum of the weighted corners) of samples on a regular grid.

    Without a sampling ratio the grid of a box has ceil(size of a bin) lines; every box gets the finest of them, and
    lines it does not have weigh nothing.
    """
    half = coordinate_transformation_mode == "half_pixel"
    dtype = op.dtype(x)
    bins = (output_height, output_width)
    sizes = [op.dim_of(x, 2), op.dim_of(x, 3)]
    axes, counts = [], []
    for k in range(2):
        column = [op.Slice(rois, [c], [c + 1], [1]) for c in (1 - k, 3 - k)]  # [R, 1]: x1, y1, x2, y2
        start, end = (op.Sub(op.Mul(op.cast(c, dtype), spatial_scale), 0.5 if half else 0.0) for c in column)
        extent = op.Sub(end, start)
        if not half:
            extent = op.Where(op.Less(extent, 1.0), op.scalar_like(1, extent), extent)
        size = op.Div(extent, float(bins[k]))  # of a bin
        if sampling_ratio > 0:
            lines: Any = op.constant(np.arange(sampling_ratio, dtype=np.int64))
            count = op.scalar_like(sampling_ratio, x)
        else:
            count = op.Max(op.Ceil(size), 0.0)  # [R, 1]
            most = op.Max(op.cast(op.ReduceMax(count, keepdims=0), np.int64), 1)
            lines = op.Range(op.constant(np.asarray(0)), most, op.constant(np.asarray(1)))
        counts.append(count)
        lines = op.cast(lines, dtype)  # [L]
        divisor = op.Where(op.Equal(count, 0.0), op.scalar_like(1, x), count)
        step = op.Mul(op.Div(op.Add(op.Unsqueeze(lines, [0]), 0.5), divisor), size)  # [R, L] or [1, L] times [R, 1]
        bin_starts = op.Add(start, op.Mul(size, op.constant(np.arange(bins[k], dtype=dtype)[None])))  # [R, B]
        at = op.Add(op.Unsqueeze(bin_starts, [2]), op.Unsqueeze(step, [1]))  # [R, B, L]
        absent = None
        if sampling_ratio <= 0:
            absent = op.Unsqueeze(op.GreaterOrEqual(op.Unsqueeze(lines, [0]), count), [1])  # [R, 1, L]
        axes.append((*_roi_axis(op, at, sizes[k], absent), absent))
    return _roi_bins(op, x, batch, axes, counts, sizes, bins, mode)


def _roi_axis(
    op: Emitter, at: gs.Tensor, size: gs.Tensor, absent: gs.Tensor | None
) -> tuple[gs.Tensor, gs.Tensor]:
    """Two neighbours of each place: index and weight [R, B, L, 2]; 0 beyond the image, and for lines not there."""
    n = op.cast(size, op.dtype(at))
    beyond = op.Or(op.Less(at, -1.0), op.Greater(at, n))
    if absent is not None:
        beyond = op.Or(beyond, absent)
    last = op.Sub(n, 1.0)
    held = op.Where(op.Less(at, 0.0), op.scalar_like(0, at), op.Where(op.Greater(at, last), last, at))
    below = op.Floor(held)
    t = op.Sub(held, below)
    weights = op.Concat(op.Unsqueeze(op.Sub(1.0, t), [-1]), op.Unsqueeze(t, [-1]), axis=-1)
    weights = op.Where(op.Unsqueeze(beyond, [-1]), 0.0, weights)
    index = op.Add(op.Unsqueeze(op.cast(below, np.int64), [-1]), op.constant(_ints(0, 1)))
    return op.Min(index, op.Sub(size, 1)), weights


def _roi_bins(
    op: Emitter, x: Any, batch: Any, axes: Any, counts: Any, sizes: Any, bins: tuple[int, int], mode: str
) -> gs.Tensor:
    """Gather the corners of all samples, [R, C, BH, LH, 2, BW, LW, 2], and take the mean or the maximum."""
    r = op.dim_of(batch, 0)
    channels = op.dim_of(x, 1)
    (iy, wy, no_y), (ix, wx, no_x) = axes
    up, left = [4, 5, 6], [1, 2, 3]
    index = op.Add(op.Mul(op.Unsqueeze(iy, up), sizes[1]), op.Unsqueeze(ix, left))
    weight = op.Mul(op.Unsqueeze(wy, up), op.Unsqueeze(wx, left))
    lines = [op.dim_of(iy, 2), op.dim_of(ix, 2)]
    # The image of each box: rows of x seen as [N, C S], so that boxes of one image share a gather.
    points = op.Gather(_points(op, x), op.cast(batch, np.int64), axis=0)  # [R, C, S]
    values = _pick(op, points, op.Reshape(index, _shape(op, r, -1)))
    values = op.Reshape(values, _shape(op, r, channels, bins[0], lines[0], 2, bins[1], lines[1], 2), allowzero=1)
    weighted = op.Mul(values, op.Unsqueeze(weight, [1]))
    if mode == "max":
        if no_y is not None:
            nowhere = op.Or(op.Unsqueeze(no_y, [1, 4, 5, 6, 7]), op.Unsqueeze(no_x, [1, 2, 3, 4, 7]))
            weighted = op.Where(nowhere, dtypes.lowest(op.dtype(x)), weighted)
        return op.ReduceMax(weighted, [3, 4, 6, 7], keepdims=0)
    total = op.ReduceSum(weighted, [3, 4, 6, 7], keepdims=0)
    samples = op.Max(op.Mul(counts[0], counts[1]), 1.0)  # [R, 1] or []
    return op.Div(total, samples if op.rank(samples) == 0 else op.Unsqueeze(samples, [2, 3]))


traced(
    "RoiAlign", _roi_align, (0, 1), count=3, note="to the boxes too; max: the largest weighted corner, as ONNX has it"
)


def _max_roi_pool(
    op: Emitter, g: Any, y: Any, x: Any, rois: Any, *, pooled_shape: list[int], spatial_scale: float
) -> gs.Tensor:
    """g goes to the first point of each bin that holds the maximum, which is the output itself.

    Bins are whole points from floor to ceil, as in the forward operator.
    """
    of, (x, rois, g) = x, (op.widened(t) for t in (x, rois, g))  # places are told apart in float32 alone
    dtype = op.dtype(x)
    sizes = [op.dim_of(x, 2), op.dim_of(x, 3)]
    images = op.cast(op.Squeeze(op.Slice(rois, [0], [1], [1]), [1]), np.int64)
    masks = []
    for k in range(2):
        first, last = (
            # Halves are rounded away from 0.
            op.Floor(op.Add(op.Mul(op.Slice(rois, [c], [c + 1], [1]), spatial_scale), 0.5)) for c in (2 - k, 4 - k)
        )  # [R, 1]
        extent = op.Max(op.Add(op.Sub(last, first), 1.0), 1.0)
        size = op.Div(extent, float(pooled_shape[k]))
        places = op.constant(np.arange(pooled_shape[k], dtype=dtype)[None])
        low = op.Add(op.Floor(op.Mul(size, places)), first)  # [R, B]
        high = op.Add(op.Ceil(op.Mul(size, op.Add(places, 1.0))), first)
        lines = op.cast(_numbers(op, sizes[k]), dtype)
        masks.append(op.And(op.GreaterOrEqual(lines, op.Unsqueeze(low, [2])), op.Less(lines, op.Unsqueeze(high, [2]))))
    values = op.Unsqueeze(op.Gather(x, images, axis=0), [2, 3])  # [R, C, 1, 1, H, W]
    here = op.And(op.Unsqueeze(masks[0], [1, 3, 5]), op.Unsqueeze(masks[1], [1, 2, 4]))
    lowest = op.scalar_like(dtypes.lowest(dtype), x)
    r, c = op.dim_of(rois, 0), op.dim_of(x, 1)
    inner = op.Reshape(op.Where(here, values, lowest), _shape(op, r, c, *pooled_shape, -1))
    where = op.ArgMax(inner, axis=4, keepdims=1)  # [R, C, PH, PW, 1]
    empty = op.Not(op.Unsqueeze(op.cast(op.ReduceMax(op.cast(here, np.int32), [4, 5], keepdims=0), bool), [4]))
    cotangent = op.Where(empty, 0.0, op.Unsqueeze(g, [4]))
    spread = op.ScatterElements(op.zeros_like(inner), where, cotangent, axis=4)
    summed = op.ReduceSum(spread, [2, 3], keepdims=0)  # [R, C, H W]
    n = op.dim_of(x, 0)
    chosen = op.cast(op.Equal(op.Unsqueeze(_numbers(op, n), [1]), op.Unsqueeze(images, [0])), dtype)  # [N, R]
    made = op.MatMul(chosen, op.Reshape(summed, _shape(op, r, -1)))
    return op.cast(reshape_like(op, made, x), op.dtype(of))


defvjp("MaxRoiPool", _max_roi_pool, None, note="the first maximum of a bin")

# -- DeformConv --


def _deform_conv(
    op: Emitter,
    x: Any,
    w: Any,
    offset: Any,
    b: Any,
    mask: Any,
    *,
    dilations: list[int] | None,
    group: int,
    kernel_shape: list[int] | None,
    offset_group: int,
    pads: list[int] | None,
    strides: list[int] | None,
) -> gs.Tensor:
    """Samples under each tap of the kernel, [N, C, taps, places], then a grouped product with the kernel."""
    rank = rank_of(op, x) - 2
    dtype = op.dtype(x)
    kernel = [op.constant(_ints(kernel_shape[k])) if kernel_shape else op.dim_of(w, 2 + k) for k in range(rank)]
    stride, dilation = strides or [1] * rank, dilations or [1] * rank
    before = (pads or [0] * (2 * rank))[:rank]
    taps = _product(op, kernel)
    n, channels = op.dim_of(x, 0), op.dim_of(x, 1)
    sizes = [op.dim_of(x, 2 + k) for k in range(rank)]
    out = [op.dim_of(offset, 2 + k) for k in range(rank)]
    places = _product(op, out)
    # Groups of channels that share offsets stand beside the samples of the batch.
    batches = op.Mul(n, offset_group) if offset_group > 1 else n
    moves = op.Reshape(offset, _shape(op, batches, taps, rank, places))
    axes = []
    for k in range(rank):
        steps = op.cast(_numbers(op, out[k]), dtype)
        steps = op.Sub(op.Mul(steps, float(stride[k])), float(before[k]))
        across = _ints(*(-1 if j == k else 1 for j in range(rank)))
        base = op.Reshape(op.Expand(op.Reshape(steps, across), _shape(op, *out)), _ints(1, 1, -1))  # [1, 1, P]
        reach = op.Mul(op.cast(_numbers(op, kernel[k]), dtype), float(dilation[k]))
        tap = op.Reshape(op.Expand(op.Reshape(reach, across), _shape(op, *kernel)), _ints(1, -1, 1))  # [1, K, 1]
        move = op.Squeeze(op.Slice(moves, [k], [k + 1], [2]), [2])  # [N, K, P]
        at = op.Reshape(op.Add(op.Add(base, tap), move), _shape(op, batches, -1))  # [N, K P]
        whole = op.Floor(at)
        t = op.Sub(at, whole)
        index, weight = _axis_taps(op, whole, [0, 1], [op.Sub(1.0, t), t])
        axes.append(_inside(op, index, weight, sizes[k]))
    share = op.Div(channels, offset_group) if offset_group > 1 else channels
    points = op.Reshape(x, _shape(op, batches, share, -1))
    columns = op.Reshape(_sample(op, points, axes, sizes), _shape(op, batches, share, taps, places))
    if mask is not None:
        columns = op.Mul(columns, op.Reshape(mask, _shape(op, batches, 1, taps, places)))
    rows = op.Reshape(columns, _shape(op, n, group, -1, places))  # [N, G, C/G K, P]
    weights = op.Reshape(w, _shape(op, 1, group, op.Div(op.dim_of(w, 0), group), -1))  # [1, G, M/G, C/G K]
    y = op.Reshape(op.MatMul(weights, rows), _shape(op, n, op.dim_of(w, 0), *out))
    return y if b is None else op.Add(y, op.Reshape(b, _ints(1, -1, *([1] * rank))))


traced("DeformConv", _deform_conv, (0, 1, 2, 3, 4), count=5)

# -- Col2Im, MaxUnpool --


def _col2im(
    op: Emitter,
    g: Any,
    y: Any,
    x: Any,
    image: Any,
    block: Any,
    *,
    dilations: list[int] | None,
    pads: list[int] | None,
    strides: list[int] | None,
) -> gs.Tensor:
    """x [N, C k1 k2 ..., L1 L2 ...] is added up into the image; back, each block reads its points."""
    rank = rank_of(op, g) - 2
    stride, dilation = strides or [1] * rank, dilations or [1] * rank
    pad = pads or [0] * (2 * rank)
    values = op.value(block)
    kernel = [
        op.constant(_ints(int(values[k]))) if values is not None else op.Slice(block, [k], [k + 1], [0])
        for k in range(rank)
    ]
    padded = g
    if any(pad):
        padded = op.Pad(g, [0, 0, *pad[:rank], 0, 0, *pad[rank:]])
    perm_k, perm_l = [], []
    counts = []
    for k in range(rank):
        axis = 2 + 2 * k  # the axes before are split in two already
        size = op.dim_of(padded, axis)
        reach = op.Add(op.Mul(op.Sub(kernel[k], 1), dilation[k]), 1)
        steps = op.Add(op.Div(op.Sub(size, reach), stride[k]), 1)
        counts.append(steps)
        rows = op.Mul(_numbers(op, kernel[k]), dilation[k])
        columns = op.Mul(_numbers(op, steps), stride[k])
        padded = op.Gather(padded, op.Add(op.Unsqueeze(rows, [1]), op.Unsqueeze(columns, [0])), axis=axis)
        perm_k.append(axis)
        perm_l.append(axis + 1)
    blocks = op.Transpose(padded, perm=[0, 1, *perm_k, *perm_l])
    return reshape_like(op, blocks, x)


defvjp("Col2Im", _col2im, None, None)


def _max_unpool(
    op: Emitter,
    g: Any,
    y: Any,
    x: Any,
    index: Any,
    output_shape: Any,
    *,
    kernel_shape: list[int],
    pads: list[int] | None,
    strides: list[int] | None,
) -> gs.Tensor:
    """Each element is read where it was put.

    Indices count the elements of the output that kernel, strides and pads give; ``output_shape`` pads that with
    zeros at the ends.
    """
    rank = len(kernel_shape)
    stride, pad = strides or [1] * rank, pads or [0] * (2 * rank)
    if output_shape is not None:
        ends = [
            op.Add(op.Mul(op.Sub(op.dim_of(x, 2 + k), 1), stride[k]), kernel_shape[k] - pad[k] - pad[rank + k])
            for k in range(rank)
        ]
        g = op.Slice(g, _ints(*([0] * rank)), _shape(op, *ends), _ints(*range(2, 2 + rank)))
    flat = op.GatherElements(op.Reshape(g, _ints(-1)), op.Reshape(index, _ints(-1)), axis=0)
    return reshape_like(op, flat, x)


defvjp("MaxUnpool", _max_unpool, None, None, note="indices must differ, as those of MaxPool do")
