"""Dequantisation: the scale is a floating operand; rounded numbers and zero points are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.vjp.shape import rank_of, reshape_like
from zilc.vjp.table import defvjp


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
