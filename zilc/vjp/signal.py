"""Fourier transforms: the transpose of a discrete Fourier transform is its inverse, but for the factor N."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.vjp.shape import known, rank_of
from zilc.vjp.table import defvjp
from zilc.vjp.trace import traced

#: From this opset on the axis of DFT is an operand.
_AXIS_IS_OPERAND = 20

Axis: TypeAlias = int | gs.Tensor


def _length(op: Emitter, x: gs.Tensor, axis: Axis) -> gs.Tensor:
    """The size of an axis, int64 [1]."""
    if isinstance(axis, int):
        return op.dim_of(x, axis)
    return op.Gather(op.shape_of(x), op.Reshape(axis, [1]))


def _axes(op: Emitter, axis: Axis) -> Any:
    return [axis] if isinstance(axis, int) else op.Reshape(axis, [1])


def _dft_of(op: Emitter, x: gs.Tensor, axis: Axis, *, inverse: int = 0, onesided: int = 0) -> gs.Tensor:
    if op.graph.opset < _AXIS_IS_OPERAND:
        return op.DFT(x, axis=axis, inverse=inverse, onesided=onesided)
    place = op.constant(np.asarray(axis, np.int64)) if isinstance(axis, int) else axis
    return op.DFT(x, None, place, inverse=inverse, onesided=onesided)


def _fit(op: Emitter, g: gs.Tensor, axis: Axis, size: gs.Tensor) -> gs.Tensor:
    """``g`` cut, or filled up with zeros, to ``size`` along ``axis``."""
    have, want = op.value(_length(op, g, axis)), op.value(size)
    if have is not None and want is not None:
        missing = int(want[0]) - int(have[0])
        if missing < 0:
            return op.Slice(g, [0], [int(want[0])], _axes(op, axis))
        return op.Pad(g, [0, missing], None, _axes(op, axis)) if missing else g
    cut = op.Slice(g, [0], size, _axes(op, axis))
    missing_t = op.Sub(size, _length(op, cut, axis))
    return op.Pad(cut, op.Concat(op.constant(np.zeros(1, np.int64)), missing_t, axis=0), None, _axes(op, axis))


def _dft(
    op: Emitter, g: Any, y: Any, x: Any, dft_length: Any, axis: Any = None, *, inverse: int, onesided: int
) -> gs.Tensor:
    """y = F x and dx = F^H g = N F^-1 g; inverse: y = F^-1 x and dx = F g / N.

    One side of F x: the other half of g is zero.  One side of x, inverse: every frequency but 0 and N/2 counts twice.
    A real operand gets the real part.
    """
    rank = rank_of(op, x)
    where: Axis
    if op.graph.opset < _AXIS_IS_OPERAND:
        where = int(axis)  # an attribute
    elif axis is None:
        where = -2
    else:
        value = op.value(axis)
        where = axis if value is None else int(value.reshape(-1)[0])
    if isinstance(where, int):
        where %= rank
    n = _length(op, x, where)
    if onesided and not inverse:
        size = n if dft_length is None else op.Reshape(op.cast(dft_length, np.int64), [1])
        dx = _scaled(op, _dft_of(op, _fit(op, g, where, size), where, inverse=1), size, times=True)
    elif not inverse:
        dx = _scaled(op, _dft_of(op, g, where, inverse=1), _length(op, g, where), times=True)
    else:
        size = _length(op, g, where)
        dx = _scaled(op, _dft_of(op, g, where, onesided=onesided), size, times=False)
        if onesided:
            dx = op.Mul(dx, _twice(op, dx, size, where, rank))
    dx = _fit(op, dx, where, n)
    last = op.dims(x)[-1]  # type: ignore[index]
    if known(last) and int(last) == 2:  # type: ignore[arg-type]
        return dx
    return op.Slice(dx, [0], op.dim_of(x, rank - 1), [rank - 1])


def _scaled(op: Emitter, g: gs.Tensor, n: gs.Tensor, *, times: bool) -> gs.Tensor:
    value = op.value(n)
    count: Any = float(value[0]) if value is not None else op.cast(n, op.dtype(g))
    return op.Mul(g, count) if times else op.Div(g, count)


def _twice(op: Emitter, dx: gs.Tensor, n: gs.Tensor, axis: Axis, rank: int) -> gs.Tensor:
    """1 for the frequencies 0 and N/2, 2 for the others, along ``axis``."""
    m = op.Squeeze(_length(op, dx, axis), [0])
    frequency = op.Range(op.constant(np.asarray(0)), m, op.constant(np.asarray(1)))
    once = op.Or(op.Equal(frequency, 0), op.Equal(op.Mul(frequency, 2), n))
    weights = op.Where(once, op.scalar_like(1, dx), op.scalar_like(2, dx))
    place = op.constant(np.asarray([axis], np.int64)) if isinstance(axis, int) else op.Reshape(axis, [1])
    place = op.Where(op.Less(place, 0), op.Add(place, rank), place)
    ones = op.constant(np.ones(rank, np.int64))
    return op.Reshape(weights, op.ScatterElements(ones, place, op.constant(np.asarray([-1], np.int64)), axis=0))


defvjp("DFT", _dft, None)
defvjp("DFT", _dft, None, None, since=_AXIS_IS_OPERAND)


def _stft(op: Emitter, signal: Any, frame_step: Any, window: Any, frame_length: Any, *, onesided: int) -> gs.Tensor:
    """Frames of the signal, [batch, frames, length, 1 or 2], times the window, transformed."""
    if rank_of(op, signal) == 2:
        signal = op.Unsqueeze(signal, [2])
    if frame_length is not None:
        length = op.Reshape(op.cast(frame_length, np.int64), [1])
    elif window is not None:
        length = op.dim_of(window, 0)
    else:
        length = op.dim_of(signal, 1)
    step = op.Reshape(op.cast(frame_step, np.int64), [1])
    frames = op.Add(op.Div(op.Sub(op.dim_of(signal, 1), length), step), 1)
    zero, one = op.constant(np.asarray(0)), op.constant(np.asarray(1))
    starts = op.Mul(op.Range(zero, op.Squeeze(frames, [0]), one), step)
    index = op.Add(op.Unsqueeze(starts, [1]), op.Range(zero, op.Squeeze(length, [0]), one))
    framed = op.Gather(signal, index, axis=1)
    if window is not None:
        framed = op.Mul(framed, op.Unsqueeze(window, [1]))
    return _dft_of(op, framed, 2, onesided=onesided)


traced("STFT", _stft, (0, 2), count=4, note="to the window too")
