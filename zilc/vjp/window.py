"""How a kernel slides over an image: what convolutions and pools share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.errors import ModelError
from zilc.graph import SPATIAL_FIRST


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


def static_sizes(op: Emitter, x: gs.Tensor) -> list[int] | None:
    """Static spatial sizes, or None."""
    dims = op.dims(x)
    if dims is None or not all(isinstance(n, (int, np.integer)) for n in dims[2:]):
        return None
    return [int(n) for n in dims[2:]]  # type: ignore[arg-type]


def spatial_shape(op: Emitter, x: gs.Tensor) -> gs.Tensor:
    """int64 tensor of the spatial sizes."""
    known = static_sizes(op, x)
    return op.constant(np.asarray(known, np.int64)) if known is not None else op.Shape(x, start=2)


def spatial_rank(op: Emitter, x: gs.Tensor, w: gs.Tensor, *lists: Sequence[int] | None) -> int:
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
    return list(kernel_shape) if kernel_shape else static_sizes(op, w)


def conv_window(
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
    rank = spatial_rank(op, x, w, kernel_shape, strides, dilations)
    strides, dilations = list(strides or [1] * rank), list(dilations or [1] * rank)
    kernel, image = _kernel(op, w, kernel_shape), static_sizes(op, x)
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
            size, s = spatial_shape(op, x), int64s(op, strides)
            steps = op.Div(op.Sub(size, int64s(op, [1])), s)  # ceil(x / s) - 1
            total = op.Max(op.Sub(op.Add(op.Mul(steps, s), extent_of(op, w, kernel, dilations)), size), int64s(op, [0]))
        begin, end = _halves(op, total, larger_begin=auto_pad == "SAME_LOWER")
    out = None
    if image is not None and kernel is not None and isinstance(begin, list):
        out = [
            (x_ + a + b - d * (k - 1) - 1) // s + 1
            for x_, a, b, d, k, s in zip(image, begin, end, dilations, kernel, strides, strict=True)
        ]
    return Window(rank, group, strides, dilations, begin, end, kernel, image, out)


def transpose_window(
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
    rank = spatial_rank(op, x, w, kernel_shape, strides, dilations)
    strides, dilations = list(strides or [1] * rank), list(dilations or [1] * rank)
    kernel, small = _kernel(op, w, kernel_shape), static_sizes(op, x)
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
            s = int64s(op, strides)
            size = spatial_shape(op, x)
            full = op.Add(
                op.Add(op.Mul(op.Sub(size, int64s(op, [1])), s), int64s(op, extra)), extent_of(op, w, kernel, dilations)
            )
            wanted = int64s(op, list(output_shape)[-rank:]) if output_shape else op.Mul(size, s)
            total = op.Max(op.Sub(full, wanted), int64s(op, [0]))
        begin, end = _halves(op, total, larger_begin=auto_pad != "SAME_UPPER")
    elif auto_pad == "VALID":
        begin, end = [0] * rank, [0] * rank
    image = static_sizes(op, y)
    if image is None and small is not None and kernel is not None and isinstance(begin, list):
        image = [
            s * (n - 1) + e + d * (k - 1) + 1 - a - b
            for s, n, e, d, k, a, b in zip(strides, small, extra, dilations, kernel, begin, end, strict=True)
        ]
    return Window(rank, group, strides, dilations, begin, end, kernel, image, small)


def int64s(op: Emitter, values: Sequence[int]) -> gs.Constant:
    return op.constant(np.asarray(values, np.int64))


def extent_of(op: Emitter, w: gs.Tensor, kernel: list[int] | None, dilations: list[int]) -> gs.Tensor:
    """d (k - 1) + 1 as an int64 tensor."""
    sizes = int64s(op, kernel) if kernel is not None else op.Shape(w, start=2)
    return op.Add(op.Mul(op.Sub(sizes, int64s(op, [1])), int64s(op, dilations)), int64s(op, [1]))


def zero_pad(op: Emitter, x: gs.Tensor, begin: Any, end: Any, axes: list[int]) -> gs.Tensor:
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
    front_, back_ = (int64s(op, v) if isinstance(v, list) else v for v in (begin, end))
    return op.Pad(x, op.Concat(front_, back_, axis=0), None, axes)


def block(
    op: Emitter, x: gs.Tensor, start: list[int], stop: list[int], axes: list[int], sizes: list[int]
) -> gs.Tensor:
    """A block of ``x``, whose sizes along ``axes`` are known; whole axes are left alone."""
    keep = [i for i in range(len(axes)) if start[i] != 0 or stop[i] != sizes[i]]
    if not keep:
        return x
    return op.Slice(x, [start[i] for i in keep], [stop[i] for i in keep], [axes[i] for i in keep])


# --- spatial axes first -----------------------------------------------------------------------------------------


def spatial_first_order(rank: int) -> list[int]:
    """Of the axes, [N, C, ...] -> [..., N, C]."""
    return [*range(2, rank), 0, 1]


def channels_first_order(rank: int) -> list[int]:
    """Of the axes, [..., N, C] -> [N, C, ...]."""
    return [rank - 2, rank - 1, *range(rank - 2)]


def spatial_first(op: Emitter, x: gs.Tensor) -> gs.Tensor:
    """[N, C, ...] -> [..., N, C], where most is copied in long runs; see :mod:`zilc.passes.layouts`."""
    rank = op.rank(x)
    assert rank is not None, "an image of known rank"
    return _movable(op.Transpose(x, perm=spatial_first_order(rank)), begins=True)


def channels_first(op: Emitter, x: gs.Tensor) -> gs.Tensor:
    """[..., N, C] -> [N, C, ...]."""
    rank = op.rank(x)
    assert rank is not None, "an image of known rank"
    return _movable(op.Transpose(x, perm=channels_first_order(rank)), begins=False)


def _movable(made: gs.Tensor, *, begins: bool) -> gs.Tensor:
    maker = made.inputs[0]
    assert getattr(maker, SPATIAL_FIRST, begins) == begins, "one Transpose, which does not both begin and end it"
    setattr(maker, SPATIAL_FIRST, begins)
    return made
