"""Types of numbers as numpy, ONNX and GraphSurgeon name them, and which tensors hold floating ones."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx_graphsurgeon as gs

FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


def np_dtype(dtype: Any) -> np.dtype | None:
    """A GraphSurgeon dtype (numpy's, or ONNX's number) as numpy's; None if there is none."""
    if dtype is None:
        return None
    if isinstance(dtype, np.dtype):
        return dtype
    if isinstance(dtype, int):
        try:
            return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype))
        except (KeyError, TypeError):
            return None
    return np.dtype(dtype)


def lowest(dtype: np.dtype) -> float:
    """The lowest finite number of a floating dtype."""
    if dtype.kind == "f":
        return float(np.finfo(dtype).min)
    import ml_dtypes  # bfloat16 is no dtype of numpy's own

    return float(ml_dtypes.finfo(dtype).min)


def onnx_dtype(dtype: Any) -> int:
    return dtype if isinstance(dtype, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def is_float(tensor: gs.Tensor) -> bool:
    """Whether the tensor holds floating-point numbers (float16, bfloat16, float32 or float64)."""
    if getattr(tensor, "type", "tensor_type") not in ("tensor_type", None):
        return False
    return bool(_is_float_dtype(tensor.dtype))


@functools.cache
def _is_float_dtype(dtype: Any) -> bool | None:
    """Whether a GraphSurgeon dtype is floating; None if there is none.

    numpy works a dtype's name out each time, and large graphs ask often.
    """
    known = np_dtype(dtype)
    return None if known is None else known.name in FLOATS


#: Set on quantised tensors through which the gradient passes as if they were not.
STRAIGHT = "_zilc_straight"


def is_straight(tensor: gs.Tensor) -> bool:
    """Whether a quantised tensor carries the gradient (``--straight-through``)."""
    return bool(getattr(tensor, STRAIGHT, False))


def carry_straight(tensor: gs.Tensor, made: gs.Tensor) -> None:
    """Make ``made`` carry the gradient if ``tensor``, which it stands for, does."""
    if is_straight(tensor):
        setattr(made, STRAIGHT, True)


def may_hold_floats(tensor: gs.Tensor) -> bool:
    """Whether floating-point numbers may pass through: a floating tensor, one of unknown type, a sequence or optional.

    What a foreign operator makes has no type unless the file says so.
    """
    if getattr(tensor, "type", "tensor_type") not in ("tensor_type", None) or is_straight(tensor):
        return True
    return _is_float_dtype(tensor.dtype) is not False
