"""Operators in the forms that suit onnxruntime's CUDA provider: the same numbers but for rounding, by other kernels.

Which kernels there are is in docs/CUDA.md, how rules fare with them in docs/CUDA_CHECK.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from zilc.emit import Emitter

#: The last opset whose operators, as far as rules emit them, have kernels in the version that it has them.
OPSET = 18
#: More operands' addresses than this do not travel with a launch: they are copied to the device, which cannot be
#: recorded as part of a CUDA graph.
OPERANDS = 32


def newer_opset(opset: int) -> str:
    """What to know of a graph in a later opset."""
    return (
        f"opset {opset}: ONNX Runtime's CUDA provider lacks kernels for some operators of versions after {OPSET}; what "
        f"has none runs on the CPU, and updates are then not recorded as CUDA graphs. Try --opset {OPSET}."
    )


def concat(op: Emitter, *parts: Any, axis: int, **attrs: Any) -> Any:
    """Many operands by way of groups of them."""
    while len(parts) > OPERANDS:
        groups = [parts[k : k + OPERANDS] for k in range(0, len(parts), OPERANDS)]
        parts = tuple(op.plain("Concat", *g, axis=axis, **attrs) if len(g) > 1 else g[0] for g in groups)
    return op.plain("Concat", *parts, axis=axis, **attrs)


def reduce_sum(op: Emitter, x: Any, axes: Any = None, keepdims: int | None = None, **attrs: Any) -> Any:
    """A sum over leading and trailing axes as two sums.

    onnxruntime has kernels of its own for sums over leading or over trailing axes; anything else goes to cuDNN, which
    takes several times as long.
    """
    rank = op.rank(x)
    if axes is None and rank is not None and not attrs:
        axes = list(range(rank))
    if not axes or rank is None or not isinstance(axes, list):
        return op.plain("ReduceSum", x, axes, keepdims=keepdims, **attrs)
    dims = op.dims(x) or [None] * rank
    summed = sorted({axis % rank for axis in axes})
    if keepdims == 0 and not all(isinstance(dims[axis], (int, np.integer)) and dims[axis] for axis in summed):
        # Over nothing there is a kernel for sums that keep the axis alone.
        return op.Squeeze(reduce_sum(op, x, summed, 1, **attrs), summed)
    kept = [axis for axis in range(rank) if axis not in summed]
    if not kept or kept[0] == 0 or kept[-1] == rank - 1 or len(kept) <= kept[-1] - kept[0]:
        return op.plain("ReduceSum", x, axes, keepdims=keepdims, **attrs)
    trailing = op.plain("ReduceSum", x, list(range(kept[-1] + 1, rank)), keepdims=keepdims, **attrs)
    return op.plain("ReduceSum", trailing, list(range(kept[0])), keepdims=keepdims, **attrs)


def count(op: Emitter, x: Any, dtype: Any) -> Any:
    """How many elements ``x`` of known rank holds, as a number that was computed on the device.

    onnxruntime computes what comes from a Shape or Size on the CPU.  Where it is not a shape but a number that enters
    a product, it would be copied to the device in each run, and no run with a copy in it can be recorded.
    """
    sizes = {axis: int(n) for axis, n in enumerate(op.dims(x) or ()) if isinstance(n, (int, np.integer))}
    known, size = list(sizes), math.prod(sizes.values())
    if size == 0:
        return op.constant(np.asarray(0, dtype))
    if known:  # along the other axes alone
        x = op.Slice(x, [0] * len(known), [1] * len(known), known)
    some = op.cast(x, np.bool_)
    ones = op.cast(op.Or(some, op.Not(some)), np.float64 if dtype == np.float64 else np.float32)
    return op.cast(op.Mul(op.ReduceSum(ones, keepdims=0), float(size)), dtype)


def _compared(name: str) -> Callable[..., Any]:
    def compare(op: Emitter, a: Any, b: Any) -> Any:
        """bfloat16, which has no such kernel, as float32; every bfloat16 is one."""
        tensors = [x for x in (a, b) if hasattr(x, "dtype")]
        if any(op.dtype(x).name == "bfloat16" for x in tensors):
            a, b = (op.widened(x) if hasattr(x, "dtype") else x for x in (a, b))
        return op.plain(name, a, b)

    return compare


#: By operator.  Each takes the emitter and what the operator takes.
FORMS: Mapping[str, Callable[..., Any]] = {
    "Concat": concat,
    "ReduceSum": reduce_sum,
    **{name: _compared(name) for name in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")},
}
