"""Conv and ConvTranspose: weight and input cotangents, each as several lowerings and one choice among them.

Conv is Y[m,p] = sum_{c,k} W[m,c,k] X[c, s p + d k - a] + B[m] (a = begin pads), summed over the channels c of the
group of m, and ConvTranspose is its adjoint in X.  So two sums serve both operators, where the *image* is Conv's
operand (ConvTranspose's output) and the *map* is Conv's output (ConvTranspose's operand):

    weight:  dW[m,c,k] = sum_{n,p} map[n,m,p] image[n,c, s p + d k - a]
    image:   dX[n,c,q] = sum_{m,p,k: s p + d k - a = q} map[n,m,p] W[m,c,k]

float64 graphs have no convolution in ONNX Runtime's CPU provider and run in ONNX's reference evaluator, where
ConvTranspose loops in Python and mixes up its groups; nothing emitted for float64 relies on it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.errors import ModelError
from zilc.lowerings import Lowering, assumed
from zilc.vjp.table import defvjp

_INT64_MIN = int(np.iinfo(np.int64).min)


@dataclass(frozen=True)
class Window:
    """How the kernel slides over the image; lists have one entry a spatial axis.

    Attributes:
        begin, end: pads of the image; int64 tensors where they depend on a symbolic size.
        kernel: kernel sizes, or None where the weight's shape is symbolic.
        image, map: spatial sizes, or None where one is symbolic.
    """

    rank: int
    group: int
    strides: list[int]
    dilations: list[int]
    begin: list[int] | gs.Tensor
    end: list[int] | gs.Tensor
    kernel: list[int] | None
    image: list[int] | None
    map: list[int] | None

    @property
    def spatial(self) -> list[int]:
        return list(range(2, 2 + self.rank))

    @property
    def site(self) -> str:
        """The window as text, without the sizes that the operands have."""
        pads = "" if isinstance(self.begin, gs.Tensor) else f" pads {self.begin}{self.end}"
        return f"strides {self.strides} dilations {self.dilations}{pads} group {self.group}"

    @property
    def extent(self) -> list[int]:
        """Image elements that the kernel spans, d (k - 1) + 1."""
        assert self.kernel is not None
        return [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]


# --- the window of a node ---------------------------------------------------------------------------------------


def _sizes(op: Emitter, x: gs.Tensor) -> list[int] | None:
    """Static spatial sizes, or None."""
    dims = op.dims(x)
    if dims is None or not all(isinstance(n, (int, np.integer)) for n in dims[2:]):
        return None
    return [int(n) for n in dims[2:]]  # type: ignore[arg-type]


def _spatial_shape(op: Emitter, x: gs.Tensor) -> gs.Tensor:
    """int64 tensor of the spatial sizes."""
    known = _sizes(op, x)
    return op.constant(np.asarray(known, np.int64)) if known is not None else op.Shape(x, start=2)


def _rank(op: Emitter, x: gs.Tensor, w: gs.Tensor, *lists: Sequence[int] | None) -> int:
    for tensor in (w, x):
        rank = op.rank(tensor)
        if rank is not None:
            return rank - 2
    for known in lists:
        if known is not None:
            return len(known)
    raise ModelError("a convolution's number of spatial axes is unknown, expected a weight of known rank", where=w.name)


def _halves(op: Emitter, total: Any, larger_begin: bool) -> tuple[Any, Any]:
    """Pads at both ends; an odd one goes to the begin (SAME_LOWER) or to the end (SAME_UPPER)."""
    if isinstance(total, list):
        small = [t // 2 for t in total]
        large = [t - s for t, s in zip(total, small, strict=True)]
    else:
        small = op.Div(total, op.constant(np.asarray(2, np.int64)))
        large = op.Sub(total, small)
    return (large, small) if larger_begin else (small, large)


def _kernel(op: Emitter, w: gs.Tensor, kernel_shape: Sequence[int] | None) -> list[int] | None:
    return list(kernel_shape) if kernel_shape else _sizes(op, w)


def _conv_window(
    op: Emitter,
    x: gs.Tensor,
    w: gs.Tensor,
    *,
    auto_pad: str,
    dilations: Any,
    group: int,
    kernel_shape: Any,
    pads: Any,
    strides: Any,
) -> Window:
    rank = _rank(op, x, w, kernel_shape, strides, dilations)
    strides, dilations = list(strides or [1] * rank), list(dilations or [1] * rank)
    kernel, image = _kernel(op, w, kernel_shape), _sizes(op, x)
    begin: Any = list(pads[:rank]) if pads else [0] * rank
    end: Any = list(pads[rank:]) if pads else [0] * rank
    if auto_pad == "VALID":
        begin, end = [0] * rank, [0] * rank
    elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        # total = max((ceil(x / s) - 1) s + extent - x, 0)
        total: Any
        if kernel is not None and all(s == 1 for s in strides):
            total = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        elif kernel is not None and image is not None:
            total = [
                max((-(-x_ // s) - 1) * s + d * (k - 1) + 1 - x_, 0)
                for x_, s, d, k in zip(image, strides, dilations, kernel, strict=True)
            ]
        else:
            size, s = _spatial_shape(op, x), _int64(op, strides)
            steps = op.Div(op.Sub(size, _int64(op, [1])), s)  # ceil(x / s) - 1
            total = op.Max(op.Sub(op.Add(op.Mul(steps, s), _extent(op, w, kernel, dilations)), size), _int64(op, [0]))
        begin, end = _halves(op, total, larger_begin=auto_pad == "SAME_LOWER")
    out = None
    if image is not None and kernel is not None and isinstance(begin, list):
        out = [
            (x_ + a + b - d * (k - 1) - 1) // s + 1
            for x_, a, b, d, k, s in zip(image, begin, end, dilations, kernel, strides, strict=True)
        ]
    return Window(rank, group, strides, dilations, begin, end, kernel, image, out)


def _transpose_window(
    op: Emitter,
    x: gs.Tensor,
    w: gs.Tensor,
    y: gs.Tensor,
    *,
    auto_pad: str,
    dilations: Any,
    group: int,
    kernel_shape: Any,
    output_padding: Any,
    output_shape: Any,
    pads: Any,
    strides: Any,
) -> Window:
    rank = _rank(op, x, w, kernel_shape, strides, dilations)
    strides, dilations = list(strides or [1] * rank), list(dilations or [1] * rank)
    kernel, small = _kernel(op, w, kernel_shape), _sizes(op, x)
    extra = list(output_padding or [0] * rank)
    begin: Any = list(pads[:rank]) if pads else [0] * rank
    end: Any = list(pads[rank:]) if pads else [0] * rank
    same = auto_pad in ("SAME_UPPER", "SAME_LOWER")
    if output_shape or same:
        # total = max(s (x - 1) + output_padding + extent - output, 0); without output_shape the output is s x.
        total: Any
        if kernel is not None and (small is not None or not output_shape):
            sizes = small if small is not None else [0] * rank  # cancels where the output is s x
            wanted = list(output_shape) if output_shape else [s * n for s, n in zip(strides, sizes, strict=True)]
            total = [
                max(s * (n - 1) + e + d * (k - 1) + 1 - o, 0)
                for s, n, e, d, k, o in zip(strides, sizes, extra, dilations, kernel, wanted[-rank:], strict=True)
            ]
        else:
            s = _int64(op, strides)
            size = _spatial_shape(op, x)
            full = op.Add(
                op.Add(op.Mul(op.Sub(size, _int64(op, [1])), s), _int64(op, extra)), _extent(op, w, kernel, dilations)
            )
            wanted = _int64(op, list(output_shape)[-rank:]) if output_shape else op.Mul(size, s)
            total = op.Max(op.Sub(full, wanted), _int64(op, [0]))
        begin, end = _halves(op, total, larger_begin=auto_pad != "SAME_UPPER")
    elif auto_pad == "VALID":
        begin, end = [0] * rank, [0] * rank
    image = _sizes(op, y)
    if image is None and small is not None and kernel is not None and isinstance(begin, list):
        image = [
            s * (n - 1) + e + d * (k - 1) + 1 - a - b
            for s, n, e, d, k, a, b in zip(strides, small, extra, dilations, kernel, begin, end, strict=True)
        ]
    return Window(rank, group, strides, dilations, begin, end, kernel, image, small)


def _int64(op: Emitter, values: Sequence[int]) -> gs.Constant:
    return op.constant(np.asarray(values, np.int64))


def _extent(op: Emitter, w: gs.Tensor, kernel: list[int] | None, dilations: list[int]) -> gs.Tensor:
    """d (k - 1) + 1 as an int64 tensor."""
    sizes = _int64(op, kernel) if kernel is not None else op.Shape(w, start=2)
    return op.Add(op.Mul(op.Sub(sizes, _int64(op, [1])), _int64(op, dilations)), _int64(op, [1]))


def _pad(op: Emitter, x: gs.Tensor, begin: Any, end: Any, axes: list[int]) -> gs.Tensor:
    """Zeros around the given axes; pads are lists or int64 tensors."""
    if isinstance(begin, list) and isinstance(end, list):
        keep = [i for i, (a, b) in enumerate(zip(begin, end, strict=True)) if a or b]
        if not keep:
            return x
        rank = op.rank(x)
        if rank is None:
            return op.Pad(x, [begin[i] for i in keep] + [end[i] for i in keep], None, [axes[i] for i in keep])
        front, back = [0] * rank, [0] * rank
        for i in keep:
            front[axes[i]], back[axes[i]] = begin[i], end[i]
        return op.Pad(x, front + back)
    front_, back_ = (_int64(op, v) if isinstance(v, list) else v for v in (begin, end))
    return op.Pad(x, op.Concat(front_, back_, axis=0), None, axes)


def _slice(
    op: Emitter, x: gs.Tensor, start: list[int], stop: list[int], axes: list[int], sizes: list[int]
) -> gs.Tensor:
    """A block of ``x``, whose sizes along ``axes`` are known; whole axes are left alone."""
    keep = [i for i in range(len(axes)) if start[i] != 0 or stop[i] != sizes[i]]
    if not keep:
        return x
    return op.Slice(x, [start[i] for i in keep], [stop[i] for i in keep], [axes[i] for i in keep])


# --- weight cotangent -------------------------------------------------------------------------------------------


def weight_by_swapped_conv(op: Emitter, image: gs.Tensor, map_: gs.Tensor, w: gs.Tensor, window: Window) -> gs.Tensor:
    """Convolve the image with the map, strides and dilations exchanged: batch as channels, channels as batch.

    Any shape may be symbolic.  A group is one block of channels (group, batch) on both sides.
    """
    back = [1, 0, *window.spatial]
    x, pads = _conv_pads(op, image, window, [])
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
    x, pads = _conv_pads(op, image, window, [0])
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


def _conv_pads(op: Emitter, image: gs.Tensor, window: Window, front: list[int]) -> tuple[gs.Tensor, list[int] | None]:
    """The image and the pads a convolution over it takes, ``front`` for axes before its own."""
    if isinstance(window.begin, list) and isinstance(window.end, list):
        return image, [*front, *window.begin, *front, *window.end]
    return _pad(op, image, window.begin, window.end, window.spatial), None


def _grouped(op: Emitter, x: gs.Tensor, window: Window) -> gs.Tensor:
    """[N, G C, X] -> [C, G N, X]."""
    r, group = window.rank, window.group
    dims = op.dims(x)
    if dims is not None and all(isinstance(n, (int, np.integer)) for n in dims[1:]):
        c, sizes = int(dims[1]) // group, [int(n) for n in dims[2:]]  # type: ignore[arg-type]
        x = op.Reshape(x, [0, group, c, *sizes])
        return op.Reshape(op.Transpose(x, perm=[2, 1, 0, *range(3, 3 + r)]), [c, -1, *sizes])
    shape = op.Shape(x, start=2)
    x = op.Reshape(x, op.Concat(op.dim_of(x, 0), _int64(op, [group, -1]), shape, axis=0))
    x = op.Transpose(x, perm=[2, 1, 0, *range(3, 3 + r)])
    return op.Reshape(x, op.Concat(op.Shape(x, start=0, end=1), _int64(op, [-1]), shape, axis=0))


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
        return _slice(op, taps, [0] * window.rank, kernel, window.spatial, got)
    end = _int64(op, kernel) if kernel is not None else op.Shape(w, start=2)
    return op.Slice(taps, _int64(op, [0] * window.rank), end, window.spatial)


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
    x = _slice(op, image, [0] * r, cut, window.spatial, sizes)
    x = _pad(op, x, window.begin, [u - a - q for u, a, q in zip(used, window.begin, cut, strict=True)], window.spatial)
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
        copies.append(_slice(op, x, start, stop, axes, full))
    joined = copies if apart or len(copies) == 1 else [op.Concat(*copies, axis=len(lead))]
    width = len(copies) * c // len(joined)
    columns = [op.Reshape(part, [*lead, width, -1]) for part in joined]

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
        rows_.append(_pad(op, y, before, after, [first + axis for axis in on_map]))
    rows = rows_[0] if len(rows_) == 1 else op.Concat(*rows_, axis=len(lead))
    rows = op.Reshape(rows, [*lead, len(rows_) * m, -1])

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


def weight_cotangent(op: Emitter, image: gs.Tensor, map_: gs.Tensor, w: gs.Tensor, window: Window) -> gs.Tensor:
    """dW[m,c,k] = sum_{n,p} map[n,m,p] image[n,c, s p + d k - a], by the lowering that suits the shapes."""
    candidates = {
        name: Lowering(functools.partial(_bind_weight, lowering, window), work)
        for name, (lowering, work) in weight_lowerings(op, image, w, window).items()
    }
    kind = f"Conv.weight{_class(op, w, window)}"
    return op.lowerings.emit(op, kind, window.site, [image, map_, w], candidates)


def _class(op: Emitter, w: gs.Tensor, window: Window) -> str:
    """What sets convolutions apart whose costs are fitted apart."""
    dims = op.dims(w)
    depthwise = window.group > 1 and dims is not None and dims[1] == 1
    pointwise = window.kernel is not None and all(k == 1 for k in window.kernel)
    strided = any(s > 1 for s in window.strides)
    return "".join(
        f", {word}" for word, so in (("depthwise", depthwise), ("pointwise", pointwise), ("strided", strided)) if so
    )


def _bind_weight(
    lowering: Callable[..., gs.Tensor], window: Window, op: Emitter, image: gs.Tensor, map_: gs.Tensor, w: gs.Tensor
) -> gs.Tensor:
    return lowering(op, image, map_, w, window)


def weight_lowerings(
    op: Emitter, image: gs.Tensor, w: gs.Tensor, window: Window
) -> dict[str, tuple[Callable[..., gs.Tensor], dict[str, float]]]:
    """The lowerings of the weight cotangent that these shapes allow, each with its work."""
    dims = op.dims(w)
    depthwise = window.group > 1 and dims is not None and dims[1] == 1
    # ONNX Runtime's fast convolutions have at most three spatial axes.
    convs: dict[str, Callable[..., gs.Tensor]] = {"volume": weight_by_volume_conv, "swapped": weight_by_swapped_conv}
    if window.rank == 3:
        del convs["volume"]
    shape, example = op.static(w), assumed(op, image)
    known = window.image is not None and window.map is not None and window.kernel is not None
    empty = 0 in (*(shape or ()), *(example or ()), *(window.map or ()), *(window.image or ()))
    if shape is None or example is None or not known or empty:
        # Nothing to go by: one product a channel where each has its own, else one product for all.
        name = "swapped" if depthwise or window.rank == 3 else "volume"
        return {name: (convs[name], {})}
    assert window.kernel is not None
    assert window.image is not None
    assert window.map is not None
    n, channels = example[:2]
    taps, positions, elements = (math.prod(x) for x in (window.kernel, window.map, window.image))
    weight = math.prod(shape)
    work: dict[str, float] = {
        "multiply-adds": n * weight * positions, "columns": n * channels * taps * positions,
        "image": n * channels * elements, "map": n * shape[0] * positions, "weight": weight, "groups": window.group,
    }  # fmt: skip
    found: dict[str, tuple[Callable[..., gs.Tensor], dict[str, float]]] = {
        name: (lowering, work) for name, lowering in convs.items()
    }
    by_example: dict[str, float] = {**work, "partial results": n * weight, "products": n * window.group}
    found["columns"] = (weight_by_columns, work)
    found["columns by example"] = (functools.partial(weight_by_columns, batched=True), by_example)
    if taps > 1:
        apart: dict[str, float] = {"taps": taps, "kernels": taps * n * window.group}
        found["taps"] = (functools.partial(weight_by_columns, apart=True), {**work, **apart})
        found["taps by example"] = (
            functools.partial(weight_by_columns, apart=True, batched=True), {**by_example, **apart}
        )  # fmt: skip
    if window.rank > 1 and window.kernel[0] > 1 and window.strides[0] == 1:
        # The first axis' taps on the map: k0 copies of the map and K / k0 of the image, instead of K of the image.
        k = window.kernel[0]
        split: dict[str, float] = {
            **work, "columns": (work["columns"] / k + work["map"] * k) * (window.extent[0] - 1 + window.map[0])
            / window.map[0], "multiply-adds": work["multiply-adds"] * (window.extent[0] - 1 + window.map[0])
            / window.map[0],
        }  # fmt: skip
        found["columns, rows on the map"] = (functools.partial(weight_by_columns, on_map=[0]), split)
        found["columns by example, rows on the map"] = (
            functools.partial(weight_by_columns, on_map=[0], batched=True),
            {**split, "partial results": n * weight, "products": n * window.group},
        )
    return found


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
        return op.ConvTranspose(map_, w, pads=[*begin, *end], output_padding=left if any(left) else None, **attrs)
    full = op.ConvTranspose(map_, w, **attrs)
    # The image may reach up to s - 1 elements beyond the last position of the kernel.
    full = _pad(op, full, [0] * window.rank, [s - 1 for s in window.strides], window.spatial)
    return _window_of(op, full, image, window)


def image_by_conv(op: Emitter, map_: gs.Tensor, w: gs.Tensor, image: gs.Tensor, window: Window) -> gs.Tensor:
    """Convolve the map, with s - 1 zeros after each element, with the mirrored weight."""
    s, d = window.strides, window.dilations
    g = _spread(op, map_, window)
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
        return _slice(op, full, start, stop, window.spatial, got)
    if kernel is not None:
        reach = [e - 1 for e in window.extent]
        full = op.Conv(g, mirrored, pads=[*reach, *reach], **attrs)
    else:
        around = op.Sub(_extent(op, w, None, d), _int64(op, [1]))
        full = op.Conv(_pad(op, g, around, around, window.spatial), mirrored, **attrs)
    return _window_of(op, full, image, window)


def _window_of(op: Emitter, full: gs.Tensor, image: gs.Tensor, window: Window) -> gs.Tensor:
    """The image's part of the padded image."""
    begin = _int64(op, window.begin) if isinstance(window.begin, list) else window.begin
    return op.Slice(full, begin, op.Add(begin, _spatial_shape(op, image)), window.spatial)


def _spread(op: Emitter, map_: gs.Tensor, window: Window) -> gs.Tensor:
    """s - 1 zeros after each element of a spatial axis."""
    strided = [axis for axis in range(window.rank) if window.strides[axis] > 1]
    if not strided:
        return map_
    axes = [3 + axis + i for i, axis in enumerate(strided)]
    g = op.Unsqueeze(map_, axes)
    g = op.Pad(g, [0] * len(axes) + [window.strides[axis] - 1 for axis in strided], None, axes)
    if window.map is not None:
        return op.Reshape(g, [0, 0, *(p * s for p, s in zip(window.map, window.strides, strict=True))])
    sizes = op.Mul(op.Shape(map_, start=2), _int64(op, window.strides))
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
    split = op.Reshape(w, op.Concat(_int64(op, [group, -1]), sizes, axis=0))
    moved = op.Transpose(split, perm=[0, 2, 1, *range(3, 3 + r)])
    return op.Reshape(moved, op.Concat(_int64(op, [-1]), op.Shape(moved, start=2), axis=0))


def image_cotangent(op: Emitter, map_: gs.Tensor, w: gs.Tensor, image: gs.Tensor, window: Window) -> gs.Tensor:
    """dX[n,c,q] = sum_{m,p,k: s p + d k - a = q} map[n,m,p] W[m,c,k], by the lowering that suits the shapes."""
    candidates = {
        name: Lowering(functools.partial(_bind_image, lowering, window), work)
        for name, (lowering, work) in image_lowerings(op, map_, w, image, window).items()
    }
    kind = f"Conv.image{_class(op, w, window)}"
    return op.lowerings.emit(op, kind, window.site, [map_, w, image], candidates)


def _bind_image(
    lowering: Callable[..., gs.Tensor], window: Window, op: Emitter, map_: gs.Tensor, w: gs.Tensor, image: gs.Tensor
) -> gs.Tensor:
    return lowering(op, map_, w, image, window)


def image_lowerings(
    op: Emitter, map_: gs.Tensor, w: gs.Tensor, image: gs.Tensor, window: Window
) -> dict[str, tuple[Callable[..., gs.Tensor], dict[str, float]]]:
    """The lowerings of the image cotangent that these shapes allow, each with its work."""
    both: dict[str, Callable[..., gs.Tensor]] = {"transpose": image_by_transpose, "conv": image_by_conv}
    if op.dtype(image) == np.float64:
        del both["transpose"]
    elif all(s == 1 for s in window.strides):
        both = {"conv": image_by_conv, "transpose": image_by_transpose}
    shape, example = op.static(w), assumed(op, map_)
    known = window.image is not None and window.map is not None and window.kernel is not None
    empty = 0 in (*(shape or ()), *(example or ()), *(window.map or ()), *(window.image or ()))
    if shape is None or example is None or not known or empty:
        name = next(iter(both))
        return {name: (both[name], {})}
    assert window.kernel is not None
    assert window.image is not None
    assert window.map is not None
    n = example[0]
    taps, positions, elements = (math.prod(x) for x in (window.kernel, window.map, window.image))
    weight, channels = math.prod(shape), shape[1] * window.group
    spread = positions * math.prod(window.strides)
    transposed: dict[str, float] = {
        "multiply-adds": n * weight * positions, "columns": n * channels * taps * positions,
        "image": n * channels * elements, "map": n * shape[0] * positions, "weight": weight,
        "products": n * window.group,
    }  # fmt: skip
    convolved: dict[str, float] = {
        "multiply-adds": n * weight * elements, "columns": n * shape[0] * taps * elements,
        "image": n * channels * elements, "map": n * shape[0] * spread, "weight": weight,
        "products": n * window.group,
    }  # fmt: skip
    works = {"transpose": transposed, "conv": convolved}
    return {name: (lowering, works[name]) for name, lowering in both.items()}


# --- rules ------------------------------------------------------------------------------------------------------


def _conv_x(op: Emitter, g: gs.Tensor, y: Any, x: gs.Tensor, w: gs.Tensor, b: Any, **attrs: Any) -> gs.Tensor:
    return image_cotangent(op, g, w, x, _conv_window(op, x, w, **attrs))


def _conv_w(op: Emitter, g: gs.Tensor, y: Any, x: gs.Tensor, w: gs.Tensor, b: Any, **attrs: Any) -> gs.Tensor:
    return weight_cotangent(op, x, g, w, _conv_window(op, x, w, **attrs))


def _bias(op: Emitter, g: gs.Tensor, y: Any, x: gs.Tensor, w: gs.Tensor, b: gs.Tensor, **attrs: Any) -> gs.Tensor:
    """dB[m] = sum_{n,p} g[n,m,p]."""
    rank = _rank(op, x, w, attrs["kernel_shape"], attrs["strides"], attrs["dilations"])
    return op.ReduceSum(g, [0, *range(2, 2 + rank)], keepdims=0)


def _transpose_x(
    op: Emitter, g: gs.Tensor, y: gs.Tensor, x: gs.Tensor, w: gs.Tensor, b: Any, **attrs: Any
) -> gs.Tensor:
    """The adjoint of the adjoint: the convolution of g with W."""
    window = _transpose_window(op, x, w, y, **attrs)
    image, pads = _conv_pads(op, g, window, [])
    d = op.Conv(image, w, strides=window.strides, dilations=window.dilations, pads=pads, group=window.group)
    # Output padding of a whole stride would make room for one more position of the kernel.
    extra = attrs["output_padding"]
    if extra and any(e >= s for e, s in zip(extra, window.strides, strict=True)):
        return op.Slice(d, _int64(op, [0] * window.rank), _spatial_shape(op, x), window.spatial)
    return d


def _transpose_w(
    op: Emitter, g: gs.Tensor, y: gs.Tensor, x: gs.Tensor, w: gs.Tensor, b: Any, **attrs: Any
) -> gs.Tensor:
    return weight_cotangent(op, g, x, w, _transpose_window(op, x, w, y, **attrs))


defvjp("Conv", _conv_x, _conv_w, _bias)
defvjp("ConvTranspose", _transpose_x, _transpose_w, _bias)
