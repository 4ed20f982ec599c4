"""Resize, transposed.

Every mode of Resize is linear in the image and separable: along each axis, y = x M.  M is what Resize makes of the
identity matrix, so that the weights of all modes come from the runtime's own kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.vjp.shape import const_ints, known, rank_of
from zilc.vjp.table import defvjp

_ROUND = ("round_prefer_floor", "round_prefer_ceil")
_HALF_PIXEL = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric")


def _resize(op: Emitter, g: Any, y: Any, x: Any, roi: Any, scales: Any, sizes: Any, **attrs: Any) -> Any:
    """dx = g M^T along each resized axis; a sum over blocks where pixels are repeated."""
    rank = rank_of(op, x)
    axes = [k % rank for k in attrs["axes"]] if attrs["axes"] else list(range(rank))
    if sizes is not None and attrs["keep_aspect_ratio_policy"] != "stretch":
        return _keeping_aspect(op, g, x, sizes, axes, attrs)
    factors = [_factor(op, x, y, axis, k, scales) for k, axis in enumerate(axes)]
    crop = attrs["coordinate_transformation_mode"] == "tf_crop_and_resize"
    todo = [k for k, f in enumerate(factors) if f != 1.0 or crop]
    repeats = {axes[k]: int(factors[k]) for k in todo if _is_repeat(factors[k], attrs)}  # type: ignore[arg-type]
    if len(repeats) == len(todo):
        return _block_sums(op, g, x, rank, repeats)
    for k in todo:
        g = _along(op, g, x, y, axes[k], k, len(axes), roi if crop else None, scales, sizes, attrs)
    return g


def _factor(op: Emitter, x: gs.Tensor, y: gs.Tensor, axis: int, k: int, scales: gs.Tensor | None) -> float | None:
    """The scale of an axis where it is known."""
    if scales is not None:
        value = op.value(scales)
        return None if value is None else float(value[k])
    n, m = op.dims(x)[axis], op.dims(y)[axis]  # type: ignore[index]
    if n is not None and n == m:
        return 1.0
    return int(m) / int(n) if known(n) and known(m) and n != 0 else None  # type: ignore[arg-type]


def _is_repeat(factor: float | None, attrs: dict[str, Any]) -> bool:
    """Whether y[j] = x[j // factor]."""
    if attrs["mode"] != "nearest" or factor is None or factor < 1 or factor != int(factor):
        return False
    where, nearest = attrs["coordinate_transformation_mode"], attrs["nearest_mode"]
    return (where == "asymmetric" and nearest == "floor") or (where in _HALF_PIXEL and nearest in _ROUND)


def _block_sums(op: Emitter, g: gs.Tensor, x: gs.Tensor, rank: int, repeats: dict[int, int]) -> gs.Tensor:
    parts: list[gs.Tensor] = []
    inner = []
    for axis in range(rank):
        parts.append(op.dim_of(x, axis))
        if axis in repeats:
            inner.append(len(parts))
            parts.append(op.constant(np.asarray([repeats[axis]], np.int64)))
    if not inner:
        return g
    static = [const_ints(op, p) for p in parts]
    shape: Any = [p[0] for p in static if p is not None]
    if len(shape) < len(parts):
        shape = op.Concat(*parts, axis=0)
    return op.ReduceSum(op.Reshape(g, shape, allowzero=1), inner, keepdims=0)


def _along(
    op: Emitter,
    g: gs.Tensor,
    x: gs.Tensor,
    y: gs.Tensor,
    axis: int,
    k: int,
    count: int,
    roi: gs.Tensor | None,
    scales: gs.Tensor | None,
    sizes: gs.Tensor | None,
    attrs: dict[str, Any],
) -> gs.Tensor:
    """g M^T along one axis; M [n, m] is the identity resized along its last axis."""
    n = op.dim_of(x, axis)
    scalar = op.constant(np.asarray([], np.int64))
    numbers = op.Range(op.constant(np.asarray(0)), op.Reshape(n, scalar), op.constant(np.asarray(1)))
    same = op.Equal(op.Unsqueeze(numbers, [1]), op.Unsqueeze(numbers, [0]))
    identity = op.Unsqueeze(op.cast(same, op.dtype(x)), [0, 1])  # [1, 1, n, n]: kernels take images
    own_scales = own_sizes = own_roi = None
    if scales is not None:
        own_scales = op.Concat(np.ones(3, np.float32), op.Slice(scales, [k], [k + 1], [0]), axis=0)
    else:
        ones = op.constant(np.asarray([1, 1], np.int64))
        own_sizes = op.Concat(ones, n, op.dim_of(y, axis), axis=0)
    if roi is not None:
        start, end = op.Slice(roi, [k], [k + 1], [0]), op.Slice(roi, [count + k], [count + k + 1], [0])
        dtype = op.dtype(roi)
        own_roi = op.Concat(np.zeros(3, dtype), start, np.ones(3, dtype), end, axis=0)
    kept = {name: value for name, value in attrs.items() if name not in ("axes", "extrapolation_value")}
    kept["keep_aspect_ratio_policy"] = None
    if not kept["antialias"]:
        kept["antialias"] = None
    m = op.Squeeze(op.Resize(identity, own_roi, own_scales, own_sizes, extrapolation_value=0.0, **kept), [0, 1])
    rank = rank_of(op, x)
    if axis == rank - 1:
        return op.MatMul(g, op.Transpose(m, perm=[1, 0]))
    if axis == rank - 2:
        return op.MatMul(m, g)
    order = [j for j in range(rank) if j != axis] + [axis]
    back = [int(j) for j in np.argsort(order)]
    return op.Transpose(op.MatMul(op.Transpose(g, perm=order), op.Transpose(m, perm=[1, 0])), perm=back)


def _keeping_aspect(
    op: Emitter, g: gs.Tensor, x: gs.Tensor, sizes: gs.Tensor, axes: list[int], attrs: dict[str, Any]
) -> gs.Tensor:
    """One scale for all axes, known to the kernel alone: each M is read off an image that varies along its axis only.

    The image number i, one along its axis at i and 0 elsewhere, is resized like x; row i of M is one of its lines.
    """
    rank = rank_of(op, x)
    kept = {name: value for name, value in attrs.items() if name not in ("axes", "extrapolation_value", "antialias")}
    if attrs["antialias"]:
        kept["antialias"] = attrs["antialias"]
    one = op.constant(np.asarray([1], np.int64))
    inner = list(range(2, 2 + len(axes)))  # kernels take images
    for k, axis in enumerate(axes):
        n = op.dim_of(x, axis)
        numbers = op.Range(op.constant(np.asarray(0)), op.Squeeze(n, [0]), op.constant(np.asarray(1)))
        same = op.cast(op.Equal(op.Unsqueeze(numbers, [1]), op.Unsqueeze(numbers, [0])), op.dtype(x))
        others = [j for j in inner if j != 2 + k]
        image = op.Unsqueeze(same, [1, *others])  # [n, 1, 1 ..., n, ... 1]
        image = op.Expand(image, op.Concat(n, one, *(op.dim_of(x, j) for j in axes), axis=0))
        resized = op.Resize(image, None, None, sizes, axes=inner, extrapolation_value=0.0, **kept)
        line = op.Slice(resized, [0] * len(others), [1] * len(others), others) if others else resized
        m = op.Squeeze(line, [1, *others])  # [n, m]
        order = [j for j in range(rank) if j != axis] + [axis]
        back = [int(j) for j in np.argsort(order)]
        moved = g if axis == rank - 1 else op.Transpose(g, perm=order)
        product = op.MatMul(moved, op.Transpose(m, perm=[1, 0]))
        g = product if axis == rank - 1 else op.Transpose(product, perm=back)
    return g


defvjp("Resize", _resize, None, None, None, note="no gradient to roi and scales")
