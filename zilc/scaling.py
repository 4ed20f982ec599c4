"""Dynamic loss scaling as nodes, with the rule and the defaults of torch.amp.GradScaler (PyTorch's documentation).

In float16 small errors become zero.  The errors of the clamped outputs are therefore multiplied by a scale, and
gradients, in float32, divided by it.  The scale is halved where a gradient is not finite (that update is skipped), and
doubled after ``INTERVAL`` updates in a row without one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter

INITIAL, GROWTH, BACKOFF, INTERVAL = 65536.0, 2.0, 0.5, 2000

_LARGEST = float(np.finfo(np.float32).max)


def all_finite(op: Emitter, gradients: Sequence[gs.Tensor]) -> gs.Tensor:
    """Whether every entry of every gradient is finite: bool, shape [].

    Args:
        gradients: float32, of any shapes.
    """
    held = []
    for g in gradients:
        if op.static(g) is not None and 0 in op.static(g):  # type: ignore[operator]
            continue  # there is no least of nothing
        # A comparison with NaN is false, so one covers both; what a runtime makes of a NaN's maximum is left open.
        inside = op.LessOrEqual(op.Abs(g), _LARGEST)
        held.append(op.ReduceMin(op.cast(inside, np.int32), keepdims=0))
    if not held:
        return op.constant(np.asarray(True))
    return op.cast(held[0] if len(held) == 1 else op.Min(*held), np.bool_)


def following_scale(
    op: Emitter, scale: gs.Tensor, good: gs.Tensor, finite: gs.Tensor
) -> tuple[gs.Tensor, gs.Tensor]:
    """The scale of the next update, and how many in a row were finite.

    Args:
        scale: float32, shape [].
        good: updates in a row whose gradients were finite, int64, shape [].
        finite: those of this one are, bool, shape [].
    """
    zero = op.constant(np.asarray(0, np.int64))
    count = op.Add(good, op.constant(np.asarray(1, np.int64)))
    grows = op.GreaterOrEqual(count, op.constant(np.asarray(INTERVAL, np.int64)))
    larger = op.Mul(scale, GROWTH)
    larger = op.Where(op.LessOrEqual(larger, _LARGEST), larger, scale)
    following = op.Where(finite, op.Where(grows, larger, scale), op.Mul(scale, BACKOFF))
    return following, op.Where(op.And(finite, op.Not(grows)), count, zero)
