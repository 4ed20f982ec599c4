"""Dynamic loss scaling as nodes, with the rule and the defaults of torch.amp.GradScaler.

They are documented at https://docs.pytorch.org/docs/stable/amp.html, "Gradient Scaling".

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

    It is the sum of all magnitudes that must be finite: one pass over each gradient, and whatever is not finite stays
    in a sum, whereas ONNX does not say what becomes of a NaN in a maximum.  Gradients whose sum alone is too large,
    1e31 in a hundred million entries, count as an overflow, which they are about to be.

    Args:
        gradients: float32, of any shapes.
    """
    sizes = [op.ReduceL1(g, keepdims=0) for g in gradients if 0 not in (op.static(g) or ())]
    total = op.Sum(*sizes) if len(sizes) > 1 else sizes[0] if sizes else op.constant(np.asarray(0, np.float32))
    return op.LessOrEqual(total, _LARGEST)


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
