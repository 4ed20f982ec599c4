"""Dequantisation: the scale is a floating operand; rounded numbers and zero points are not."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.vjp.shape import rank_of, reshape_like
from zilc.vjp.table import STRAIGHT, Rule, defvjp


def _scale(
    op: Emitter, g: Any, y: Any, x: Any, scale: Any, zero: Any, *, axis: int, block_size: int | None = 0, **_: Any
) -> gs.Tensor:
    """y = (x - zero) scale, so d scale adds g (x - zero) over what the scale was shared by.

    (x - zero) is what a scale of 1 makes, in the kernel that knows the types.
    """
    ones = op.Expand(op.scalar_like(1, scale), op.shape_of(scale))
    attrs = {} if op.graph.opset < 21 else {"block_size": block_size or None}
    plain = op.DequantizeLinear(x, ones, zero, axis=axis, **attrs)
    slope = op.Mul(op.cast(g, op.dtype(scale)), plain)
    rank, scale_rank = rank_of(op, x), rank_of(op, scale)
    if scale_rank == 0 or op.static(scale) == (1,):
        return reshape_like(op, op.ReduceSum(slope, keepdims=0), scale)
    axis %= rank
    if not block_size:
        return op.ReduceSum(slope, [k for k in range(rank) if k != axis], keepdims=0) if rank > 1 else slope
    blocks = op.dim_of(scale, axis)
    missing = op.Sub(op.Mul(blocks, block_size), op.dim_of(x, axis))
    slope = op.Pad(slope, op.Concat(op.constant(np.zeros(1, np.int64)), missing, axis=0), None, [axis])
    parts = [op.dim_of(x, k) for k in range(rank)]
    parts[axis : axis + 1] = [blocks, op.constant(np.asarray([block_size], np.int64))]
    return op.ReduceSum(op.Reshape(slope, op.Concat(*parts, axis=0), allowzero=1), [axis + 1], keepdims=0)


defvjp("DequantizeLinear", None, _scale, None, note="to the scale")


# -- straight through: what --straight-through puts in place of rounding --


def _blocks_of(op: Emitter, scale: Any, x: Any, axis: int, block_size: int) -> Any:
    """One entry of ``scale`` for each element of ``x`` along the axis, by blocks."""
    rank = rank_of(op, x)
    wide = op.Unsqueeze(scale, [axis + 1])
    parts = [op.dim_of(scale, k) for k in range(rank)]
    parts.insert(axis + 1, op.constant(np.asarray([block_size], np.int64)))
    wide = op.Expand(wide, op.Concat(*parts, axis=0))
    parts[axis : axis + 2] = [op.Mul(parts[axis], block_size)]
    flat = op.Reshape(wide, op.Concat(*parts, axis=0), allowzero=1)
    return op.Slice(flat, [0], op.dim_of(x, axis), [axis])


def _beside(op: Emitter, value: Any, x: Any, axis: int, block_size: int) -> Any:
    """A scale or zero point in a shape that broadcasts to that of ``x``."""
    rank = rank_of(op, x)
    if op.rank(value) == 0 or op.static(value) == (1,):
        return op.Reshape(value, op.constant(np.zeros(0, np.int64))) if op.rank(value) else value
    axis %= rank
    if block_size:
        return _blocks_of(op, value, x, axis, block_size)
    return op.Unsqueeze(value, [k for k in range(rank) if k != axis]) if rank > 1 else value


def _limits(dtype: Any) -> tuple[float, float]:
    """The least and the greatest number of a quantised type."""
    if dtype.name.startswith("float"):
        info: Any = ml_dtypes.finfo(dtype)
    else:
        info = np.iinfo(dtype) if dtype.kind in "iu" else ml_dtypes.iinfo(dtype)
    return float(info.min), float(info.max)


def _quantize(
    op: Emitter, g: Any, y: Any, x: Any, scale: Any, zero: Any, *, axis: int = 1, block_size: int | None = 0, **_: Any
) -> gs.Tensor:
    """q = saturate(round(x / scale) + zero):  dx = g where round(x / scale) + zero was within the type, else 0.

    At the bounds themselves g passes: PyTorch's fake_quantize compares after rounding, too.  The cotangent of q is
    kept in units of x, as if q were dequantised already.
    """
    dtype = op.dtype(y)
    low, high = _limits(dtype)
    s = op.cast(scale, np.float32)
    r = op.Div(op.cast(x, np.float32), _beside(op, s, x, axis, block_size or 0))
    if not dtype.name.startswith("float"):
        r = op.Round(r)
        held = op.value(zero) if zero is not None else np.zeros(())
        if held is None or np.asarray(held, np.float32).any():
            z = op.Cast(zero, to=1) if held is None else op.constant(np.asarray(held, np.float32))
            r = op.Add(r, _beside(op, z, x, axis, block_size or 0))
    inside = op.And(op.GreaterOrEqual(r, low), op.LessOrEqual(r, high))
    g = op.cast(g, op.dtype(x))
    return op.Where(inside, g, op.scalar_like(0, g))


# Scales are held: half of their gradient would lie at QuantizeLinear, and fake quantisation with given scales has none.
STRAIGHT["QuantizeLinear"] = Rule("QuantizeLinear", "", 1, (_quantize, None, None))
STRAIGHT["DequantizeLinear"] = Rule("DequantizeLinear", "", 1, (lambda op, g, y, *_, **__: g, None, None))
