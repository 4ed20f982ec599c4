"""The two sums that Conv and ConvTranspose are made of (:mod:`zilc.vjp.conv`), each in several forms.

All forms of one sum take the same operands, of any shape unless they say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.vjp.window import Window, block, extent_of, int64s, spatial_first, spatial_shape, zero_pad

_INT64_MIN = int(np.iinfo(np.int64).min)


# --- weight cotangent -------------------------------------------------------------------------------------------


def weight_by_swapped_conv(op: Emitter, image: gs.Tensor, map_: gs.Tensor, w: gs.Tensor, window: Window) -> gs.Tensor:
    """Convolve the image with the map, strides and dilations exchanged: batch as channels, channels as batch.

    Any shape may be symbolic.  A group is one block of channels (group, batch) on both sides.
    """
    back = [1, 0, *window.spatial]
    x, pads = conv_pads(op, image, window, [])
    batch = _grouped(op, x, window) if window.group > 1 else op.Transpose(x, perm=back)  # [C/G, G N, X]
    taps = op.Conv(
        batch,
        op.Transpose(map_, perm=back),  # [M, N, P]
        strides=window.dilations,
        dilations=window.strides,
        pads=pads,
        group=window.group,
    )
    return _cut_taps(op, op.Transpose(taps, perm=back), w, window)


def weight_by_volume_conv(op: Emitter, image: gs.Tensor, map_: gs.Tensor, w: gs.Tensor, window: Window) -> gs.Tensor:
    """The swapped convolution with the image's channels as one more spatial axis instead of as the batch.

    One convolution of [1, G N, C/G, X] with [M, N, 1, P] gives [1, M, C/G, K]: one matrix product with C/G K columns,
    where the swapped form has C/G products with K columns each.  Any shape may be symbolic.
    """
    x, pads = conv_pads(op, image, window, [0])
    if window.group > 1:
        x = op.Transpose(_grouped(op, x, window), perm=[1, 0, *window.spatial])
    taps = op.Conv(
        op.Unsqueeze(x, [0]),
        op.Unsqueeze(op.Transpose(map_, perm=[1, 0, *window.spatial]), [2]),
        strides=[1, *window.dilations],
        dilations=[1, *window.strides],
        pads=pads,
        group=window.group,
    )
    return _cut_taps(op, op.Squeeze(taps, [0]), w, window)


def conv_pads(op: Emitter, image: gs.Tensor, window: Window, front: list[int]) -> tuple[gs.Tensor, list[int] | None]:
    """The image and the pads a convolution over it takes, ``front`` for axes before its own."""
    if isinstance(window.begin, list) and isinstance(window.end, list):
        return image, [*front, *window.begin, *front, *window.end]
    return zero_pad(op, image, window.begin, window.end, window.spatial), None


def _grouped(op: Emitter, x: gs.Tensor, window: Window) -> gs.Tensor:
    """[N, G C, X] -> [C, G N, X]."""
    r, group = window.rank, window.group
    dims = op.dims(x)
    if dims is not None and all(isinstance(n, (int, np.integer)) for n in dims[1:]):
        c, sizes = int(dims[1]) // group, [int(n) for n in dims[2:]]  # type: ignore[arg-type]
        x = op.Reshape(x, [0, group, c, *sizes])
        return op.Reshape(op.Transpose(x, perm=[2, 1, 0, *range(3, 3 + r)]), [c, -1, *sizes])
    shape = op.Shape(x, start=2)
    x = op.Reshape(x, op.Concat(op.dim_of(x, 0), int64s(op, [group, -1]), shape, axis=0))
    x = op.Transpose(x, perm=[2, 1, 0, *range(3, 3 + r)])
    return op.Reshape(x, op.Concat(op.Shape(x, start=0, end=1), int64s(op, [-1]), shape, axis=0))


def _cut_taps(op: Emitter, taps: gs.Tensor, w: gs.Tensor, window: Window) -> gs.Tensor:
    """Drop what lies beyond the kernel, where a stride leaves the last image elements unused."""
    kernel, image, map_ = window.kernel, window.image, window.map
    if kernel is not None and image is not None and map_ is not None and isinstance(window.begin, list):
        assert isinstance(window.end, list)
        got = [
            (x + a + b - (p - 1) * s - 1) // d + 1
            for x, a, b, p, s, d in zip(
                image, window.begin, window.end, map_, window.strides, window.dilations, strict=True
            )
        ]
        return block(op, taps, [0] * window.rank, kernel, window.spatial, got)
    end = int64s(op, kernel) if kernel is not None else op.Shape(w, start=2)
    return op.Slice(taps, int64s(op, [0] * window.rank), end, window.spatial)


def weight_by_columns(
    op: Emitter,
    image: gs.Tensor,
    map_: gs.Tensor,
    w: gs.Tensor,
    window: Window,
    *,
    on_map: Sequence[int] = (),
    batched: bool = False,
    apart: bool = False,
) -> gs.Tensor:
    """Matrix products over positions, of shifted copies of the image and of the map.

    The taps k of a kernel axis can be laid out on either factor, because only s p + d k matters: shifted
    copies of the image (im2col), or, on a stride-1 axis in ``on_map``, shifted copies of the map over all image
    positions.  A strided axis is first split into its s phases, so that every copy is of contiguous elements.
    The weight's and all spatial sizes must be static; the batch may be symbolic.

    ``batched``: a product an example, added up; nothing is transposed, but there are as many partial results as
    examples.  Otherwise one product over batch and positions, for which both factors are moved to [channels, batch].

    ``apart``: a product for each copy of the image, instead of one for all copies, put together first.
    """
    r, group = window.rank, window.group
    kernel, sizes, positions = window.kernel, window.image, window.map
    shape = op.static(w)
    assert kernel is not None, "static sizes"
    assert sizes is not None, "static sizes"
    assert positions is not None, "static sizes"
    assert shape is not None, "static sizes"
    assert isinstance(window.begin, list), "static sizes"
    m, c = shape[0] // group, shape[1]
    d, s = window.dilations, window.strides
    assert all(s[axis] == 1 for axis in on_map)
    grouped = [group] if group > 1 else []
    # [(N,) (G,) channels, (N,) positions]: what comes before the channels, and where the spatial axes begin.
    lead = [0, *grouped] if batched else grouped
    first = len(grouped) + 2

    # Used part of the padded image, in whole strides.
    need = [(p - 1) * s_ + e for p, s_, e in zip(positions, s, window.extent, strict=True)]
    used = [-(-n // s_) * s_ for n, s_ in zip(need, s, strict=True)]
    cut = [min(x, u - a) for x, u, a in zip(sizes, used, window.begin, strict=True)]
    x = block(op, image, [0] * r, cut, window.spatial, sizes)
    behind = [u - a - q for u, a, q in zip(used, window.begin, cut, strict=True)]
    x = zero_pad(op, x, window.begin, behind, window.spatial)
    single = [axis for axis in range(r) if s[axis] > 1 and kernel[axis] == 1]
    if single:
        x = op.Slice(x, [0] * len(single), [need[a] for a in single], [2 + a for a in single], [s[a] for a in single])
        s = [1 if axis in single else s[axis] for axis in range(r)]
        used = [positions[axis] if axis in single else used[axis] for axis in range(r)]
    # Phases of the strided axes become channels: [N, (G,) C, X] -> [(G,) phases C, N, X / s], N first if batched.
    # The Reshape also keeps ONNX Runtime from moving the Transpose behind the copies, where it costs more.
    split: list[int] = []
    inner, phases = [], []
    for axis in range(r):
        inner.append(2 + len(grouped) + len(split))
        if s[axis] > 1:
            split += [used[axis] // s[axis], s[axis]]
            phases.append(inner[-1] + 1)
        else:
            split.append(used[axis])
    now = [u // s_ for u, s_ in zip(used, s, strict=True)]
    # For the commonest case there is an operator, several times as fast in onnxruntime as the Transpose.
    if not grouped and len(phases) == r == 2 and s[0] == s[1] and op.dtype(x) in (np.float32, np.float64):
        x, phases, inner = op.SpaceToDepth(x, blocksize=s[0]), [], [2, 3]
    if grouped or phases:
        x = op.Reshape(x, [0, *grouped, c, *split])
    channel = 1 + len(grouped)
    if not batched:
        x = op.Transpose(x, perm=[*([1] if grouped else []), *phases, channel, 0, *inner])
    elif phases:
        x = op.Transpose(x, perm=[0, *([1] if grouped else []), *phases, channel, *inner])
    channels = c * math.prod(s)
    if phases:
        x = op.Reshape(x, [*lead, channels, *now] if batched else [*lead, channels, -1, *now])

    # Copies of the image, one a tap on the axes that are not in on_map.
    on_image = [axis for axis in range(r) if axis not in on_map]
    copies = []
    for tap in product(*(range(kernel[axis]) for axis in on_image)):
        phase = 0
        for axis in range(r):
            phase = phase * s[axis] + (tap[on_image.index(axis)] * d[axis] % s[axis] if axis in on_image else 0)
        shift = [k * d[axis] // s[axis] for axis, k in zip(on_image, tap, strict=True)]
        axes = [len(lead), *(first + axis for axis in on_image)]
        start = [phase * c, *shift]
        stop = [(phase + 1) * c, *(a + positions[axis] for axis, a in zip(on_image, shift, strict=True))]
        full = [channels, *(now[axis] for axis in on_image)]
        copies.append(block(op, x, start, stop, axes, full))
    # A batch may be empty, of which -1 could not tell how many an example has.
    places = math.prod(positions[a] if a in on_image else need[a] for a in range(r)) if batched else -1
    joined = copies if apart or len(copies) == 1 else [op.Concat(*copies, axis=len(lead))]
    width = len(copies) * c // len(joined)
    columns = [op.Reshape(part, [*lead, width, places]) for part in joined]

    # Copies of the map, one a tap on the axes in on_map, over all image positions of these axes.
    y = map_
    if grouped:
        y = op.Reshape(y, [0, group, m, *positions])
    if not batched:
        y = op.Transpose(y, perm=[1, 2, 0, *range(3, 3 + r)] if grouped else [1, 0, *window.spatial])
    rows_ = []
    for tap in product(*(range(kernel[axis]) for axis in on_map)):
        before = [k * d[axis] for axis, k in zip(on_map, tap, strict=True)]
        after = [need[axis] - positions[axis] - b for axis, b in zip(on_map, before, strict=True)]
        rows_.append(zero_pad(op, y, before, after, [first + axis for axis in on_map]))
    rows = rows_[0] if len(rows_) == 1 else op.Concat(*rows_, axis=len(lead))
    rows = op.Reshape(rows, [*lead, len(rows_) * m, places])

    last = len(lead)
    products = []
    for part in columns:
        if lead:
            products.append(op.MatMul(rows, op.Transpose(part, perm=[*range(last), last + 1, last])))
        else:
            products.append(op.Gemm(rows, part, transB=1))
        if batched:
            products[-1] = op.ReduceSum(products[-1], [0], keepdims=0)
    product_ = products[0] if len(products) == 1 else op.Concat(*products, axis=1 + len(grouped))
    # [(G,) K on map, M, K on image, C] -> [(G,) M, C, K]
    if len(copies) * len(rows_) == 1:
        return op.Reshape(product_, list(shape))
    parts = [*grouped, *(kernel[a] for a in on_map), m, *(kernel[a] for a in on_image), c]
    where = {axis: len(grouped) + i for i, axis in enumerate(on_map)}
    where |= {axis: len(grouped) + len(on_map) + 1 + i for i, axis in enumerate(on_image)}
    order = [*range(len(grouped)), len(grouped) + len(on_map), len(parts) - 1, *(where[axis] for axis in range(r))]
    taps = op.Transpose(op.Reshape(product_, parts), perm=order)
    return op.Reshape(taps, list(shape)) if grouped else taps


def weight_by_rows(op: Emitter, image: gs.Tensor, map_: gs.Tensor, w: gs.Tensor, window: Window) -> gs.Tensor:
    """A pointwise weight's cotangent: one product over rows of channels, spatial axes first.

    The weight's and all spatial sizes must be static; the batch may be symbolic.
    """
    shape, sizes, positions = op.static(w), window.image, window.map
    assert shape is not None, "static sizes"
    assert sizes is not None, "static sizes"
    assert positions is not None, "static sizes"
    assert isinstance(window.begin, list), "static sizes"
    need = [(p - 1) * s + 1 for p, s in zip(positions, window.strides, strict=True)]
    cut = [min(x, n - a) for x, n, a in zip(sizes, need, window.begin, strict=True)]
    x = block(op, image, [0] * window.rank, cut, window.spatial, sizes)
    behind = [n - a - q for n, a, q in zip(need, window.begin, cut, strict=True)]
    x = zero_pad(op, x, window.begin, behind, window.spatial)
    if max(window.strides) > 1:
        x = op.Slice(x, [0] * window.rank, need, window.spatial, window.strides)
    rows = [op.Reshape(spatial_first(op, t), [-1, n]) for t, n in ((map_, shape[0]), (x, shape[1]))]
    return op.Reshape(op.Gemm(*rows, transA=1), list(shape))


def weight_by_gather(
    op: Emitter, image: gs.Tensor, map_: gs.Tensor, w: gs.Tensor, window: Window, *, batched: bool = False
) -> gs.Tensor:
    """The same product of columns, which one Gather lays out: of all taps and positions from the padded image.

    A Gather writes each element once, where shifted copies are written, read and written again when put together.
    Elements are taken one by one, which a GPU does as fast as copying.  The weight's and all spatial sizes must be
    static, and the batch too unless ``batched``, which makes a product an example.
    """
    group, kernel, positions = window.group, window.kernel, window.map
    shape, dims = op.static(w), op.dims(image)
    assert kernel is not None, "static sizes"
    assert positions is not None, "static sizes"
    assert window.image is not None, "static sizes"
    assert shape is not None, "static sizes"
    assert dims is not None, "static sizes"
    assert isinstance(window.begin, list), "static sizes"
    m, c = shape[0] // group, shape[1]
    need = [(p - 1) * s + e for p, s, e in zip(positions, window.strides, window.extent, strict=True)]
    behind = [max(n - a - x, 0) for n, a, x in zip(need, window.begin, window.image, strict=True)]
    x = zero_pad(op, image, window.begin, behind, window.spatial)
    sizes = [a + x_ + b for a, x_, b in zip(window.begin, window.image, behind, strict=True)]
    # Where each tap finds the element of each position: [K] taps, (N,) [P] positions.
    rank, lead = window.rank, 0 if batched else 1
    where: gs.Tensor | None = None
    count = 1 if batched else int(dims[0])  # type: ignore[arg-type]
    dtype = np.int32 if count * math.prod(sizes) < 2**31 else np.int64  # half the size, where it reaches
    if not batched:
        examples = np.arange(count) * math.prod(sizes)
        where = op.constant(examples.astype(dtype).reshape([1] * rank + [-1] + [1] * rank))
    for axis in range(rank):
        at = np.arange(kernel[axis])[:, None] * window.dilations[axis]
        at = (at + np.arange(positions[axis]) * window.strides[axis]) * math.prod(sizes[axis + 1 :])
        placed = [1] * (2 * rank + lead)
        placed[axis], placed[rank + lead + axis] = kernel[axis], positions[axis]
        index = op.constant(at.astype(dtype).reshape(placed))
        where = index if where is None else op.Add(where, index)
    index = op.Reshape(where, [-1])
    taps, width = math.prod(kernel), math.prod(positions)
    grouped = [group] if group > 1 else []
    if batched:
        columns = op.Gather(op.Reshape(x, [0, shape[1] * group, math.prod(sizes)]), index, axis=2)
        columns = op.Reshape(columns, [0, *grouped, c * taps, width])
        rows = op.Reshape(map_, [0, *grouped, m, width])
        last = 1 + len(grouped)
        product_ = op.MatMul(rows, op.Transpose(columns, perm=[*range(last), last + 1, last]))
        return op.Reshape(op.ReduceSum(product_, [0], keepdims=0), list(shape))
    back = [1, 0, *window.spatial]
    columns = op.Gather(op.Reshape(op.Transpose(x, perm=back), [shape[1] * group, -1]), index, axis=1)
    columns = op.Reshape(columns, [*grouped, c * taps, -1])
    rows = op.Reshape(op.Transpose(map_, perm=back), [*grouped, m, -1])
    if not grouped:
        return op.Reshape(op.Gemm(rows, columns, transB=1), list(shape))
    return op.Reshape(op.MatMul(rows, op.Transpose(columns, perm=[0, 2, 1])), list(shape))


# --- image cotangent --------------------------------------------------------------------------------------------


def image_by_transpose(op: Emitter, map_: gs.Tensor, w: gs.Tensor, image: gs.Tensor, window: Window) -> gs.Tensor:
    """ConvTranspose, the adjoint by name."""
    begin, end = window.begin, window.end
    attrs: dict[str, Any] = {"strides": window.strides, "dilations": window.dilations, "group": window.group}
    if window.image is not None and window.map is not None and window.kernel is not None:
        assert isinstance(begin, list)
        assert isinstance(end, list)
        left = [
            x + a + b - (p - 1) * s - e
            for x, a, b, p, s, e in zip(
                window.image, begin, end, window.map, window.strides, window.extent, strict=True
            )
        ]
        if op.lowerings.target != "cuda" or begin == end:
            return op.ConvTranspose(map_, w, pads=[*begin, *end], output_padding=left if any(left) else None, **attrs)
        # The CUDA provider has no kernel for pads that differ: the lesser on both sides, and what is left is cut.
        least = [min(a, b) for a, b in zip(begin, end, strict=True)]
        full = op.ConvTranspose(map_, w, pads=[*least, *least], output_padding=left if any(left) else None, **attrs)
        start = [a - p for a, p in zip(begin, least, strict=True)]
        stop = [a + x for a, x in zip(start, window.image, strict=True)]
        got = [x + a + b - 2 * p for x, a, b, p in zip(window.image, begin, end, least, strict=True)]
        return block(op, full, start, stop, window.spatial, got)
    full = op.ConvTranspose(map_, w, **attrs)
    # The image may reach up to s - 1 elements beyond the last position of the kernel.
    full = zero_pad(op, full, [0] * window.rank, [s - 1 for s in window.strides], window.spatial)
    return image_part(op, full, image, window)


def image_by_conv(op: Emitter, map_: gs.Tensor, w: gs.Tensor, image: gs.Tensor, window: Window) -> gs.Tensor:
    """Convolve the map, with s - 1 zeros after each element, with the mirrored weight."""
    s, d = window.strides, window.dilations
    g = with_gaps(op, map_, window)
    mirrored = _mirrored(op, w, window)
    begin, kernel = window.begin, window.kernel
    attrs: dict[str, Any] = {"dilations": d, "group": window.group}
    if window.image is not None and window.map is not None and kernel is not None and isinstance(begin, list):
        reach = [e - 1 for e in window.extent]
        front = [e - a for e, a in zip(reach, begin, strict=True)]
        back = [x + a - p * s_ for x, a, p, s_ in zip(window.image, begin, window.map, s, strict=True)]
        pads = [max(p, 0) for p in front + back]
        full = op.Conv(g, mirrored, pads=pads, **attrs)
        start = [max(-p, 0) for p in front]
        stop = [a + x for a, x in zip(start, window.image, strict=True)]
        got = [a + x + max(-p, 0) for a, x, p in zip(start, window.image, back, strict=True)]
        return block(op, full, start, stop, window.spatial, got)
    if kernel is not None:
        reach = [e - 1 for e in window.extent]
        full = op.Conv(g, mirrored, pads=[*reach, *reach], **attrs)
    else:
        around = op.Sub(extent_of(op, w, None, d), int64s(op, [1]))
        full = op.Conv(zero_pad(op, g, around, around, window.spatial), mirrored, **attrs)
    return image_part(op, full, image, window)


def image_part(op: Emitter, full: gs.Tensor, image: gs.Tensor, window: Window) -> gs.Tensor:
    """The image's part of the padded image."""
    begin = int64s(op, window.begin) if isinstance(window.begin, list) else window.begin
    return op.Slice(full, begin, op.Add(begin, spatial_shape(op, image)), window.spatial)


def with_gaps(op: Emitter, map_: gs.Tensor, window: Window) -> gs.Tensor:
    """s - 1 zeros after each element of a spatial axis."""
    strided = [axis for axis in range(window.rank) if window.strides[axis] > 1]
    if not strided:
        return map_
    axes = [3 + axis + i for i, axis in enumerate(strided)]
    g = op.Unsqueeze(map_, axes)
    g = op.Pad(g, [0] * len(axes) + [window.strides[axis] - 1 for axis in strided], None, axes)
    if window.map is not None:
        return op.Reshape(g, [0, 0, *(p * s for p, s in zip(window.map, window.strides, strict=True))])
    sizes = op.Mul(op.Shape(map_, start=2), int64s(op, window.strides))
    return op.Reshape(g, op.Concat(op.Shape(map_, start=0, end=2), sizes, axis=0))


def _mirrored(op: Emitter, w: gs.Tensor, window: Window) -> gs.Tensor:
    """[M, C/G, K] -> [C, M/G, K], each kernel axis reversed."""
    r, group, kernel = window.rank, window.group, window.kernel
    axes = [2 + axis for axis in range(r) if kernel is None or kernel[axis] > 1]
    if axes:
        n = len(axes)
        w = op.Slice(w, [-1] * n, [_INT64_MIN] * n, axes, [-1] * n)
    if group == 1:
        return op.Transpose(w, perm=[1, 0, *window.spatial])
    dims = op.dims(w)
    sizes = op.Shape(w, start=1)  # [C/G, K]
    if dims is not None and all(isinstance(n, (int, np.integer)) for n in dims):
        m, c, *k = (int(n) for n in dims)  # type: ignore[arg-type]
        split = op.Reshape(w, [group, m // group, c, *k])
        return op.Reshape(op.Transpose(split, perm=[0, 2, 1, *range(3, 3 + r)]), [group * c, m // group, *k])
    split = op.Reshape(w, op.Concat(int64s(op, [group, -1]), sizes, axis=0))
    moved = op.Transpose(split, perm=[0, 2, 1, *range(3, 3 + r)])
    return op.Reshape(moved, op.Concat(int64s(op, [-1]), op.Shape(moved, start=2), axis=0))
