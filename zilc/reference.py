"""ONNX's reference evaluator, for float64, with the operators repaired that lose precision or are wrong there.

``Erf`` computes in float32 whatever its operand is, and ``Gelu`` is built on it; ``Mean`` takes only operands of
one shape; ``LRN`` fills as many channels as there are samples; ``LpNormalization`` with p = 1 sums x, not |x|;
``GatherElements`` along an axis of more than 64 elements stops with an error; ``BatchNormalization`` of opsets
before 14 mixes the batch's statistics into the running ones, with one output too, which means inference.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


class Erf(OpRun):
    """Exact to double precision."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype),)


class Gelu(OpRun):
    """x/2 (1 + erf(x / sqrt 2)), or its approximation by tanh."""

    op_domain = ""

    def _run(self, x: np.ndarray, approximate: str = "none") -> tuple[np.ndarray]:
        if approximate == "tanh":
            inner = np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))
        else:
            inner = np.vectorize(math.erf, otypes=[np.float64])(x * math.sqrt(0.5))
        return ((0.5 * x * (1.0 + inner)).astype(x.dtype),)


class Mean(OpRun):
    """Operands broadcast, as the operator's definition has it."""

    op_domain = ""

    def _run(self, *operands: np.ndarray) -> tuple[np.ndarray]:
        total = np.asarray(reduce(np.add, operands))
        return ((total / len(operands)).astype(operands[0].dtype),)


class LRN(OpRun):
    """Every channel by the window around it."""

    op_domain = ""

    def _run(
        self, x: np.ndarray, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int = 1
    ) -> tuple[np.ndarray]:
        before, channels = (size - 1) // 2, x.shape[1]
        square = np.stack(
            [(x[:, max(0, c - before) : c - before + size] ** 2).sum(axis=1) for c in range(channels)], axis=1
        )
        return ((x / (bias + alpha / size * square) ** beta).astype(x.dtype),)


class LpNormalization(OpRun):
    """x over its p-norm; 0 where that is 0."""

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int = -1, p: int = 2) -> tuple[np.ndarray]:
        norm = (np.abs(x) ** p).sum(axis=axis, keepdims=True) ** (1.0 / p)
        return (np.where(norm == 0, 0, x / np.where(norm == 0, 1, norm)).astype(x.dtype),)


class BatchNormalization(OpRun):
    """By the running statistics unless it asks for training, which only opset 14 and later can."""

    op_domain = ""

    def _run(
        self, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, mean: np.ndarray, var: np.ndarray,
        epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0, spatial: int = 1,
    ) -> tuple[np.ndarray, ...]:  # fmt: skip
        moved: tuple[np.ndarray, ...] = ()
        if training_mode:
            axes = tuple(k for k in range(x.ndim) if k != 1)
            now, spread = x.mean(axes), x.var(axes)
            moved = mean * momentum + now * (1 - momentum), var * momentum + spread * (1 - momentum)
            mean, var = now, spread
        along = (-1, *[1] * (x.ndim - 2))
        scale, bias, mean, var = (v.reshape(along) for v in (scale, bias, mean, var))
        y = scale * (x - mean) / np.sqrt(var + epsilon) + bias
        return y.astype(x.dtype), *(v.astype(x.dtype) for v in moved)


class GatherElements(OpRun):
    """Along an axis of any length."""

    op_domain = ""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
        # NumPy broadcasts the other axes; the operator reads the front of each.
        front = tuple(slice(None) if k == axis % data.ndim else slice(n) for k, n in enumerate(indices.shape))
        return (np.take_along_axis(data[front], indices, axis),)


#: For ``ReferenceEvaluator(model, new_ops=REPAIRED)``.
REPAIRED: list[type[OpRun]] = [BatchNormalization, Erf, GatherElements, Gelu, LRN, LpNormalization, Mean]


def evaluator(model: onnx.ModelProto, **options: Any) -> ReferenceEvaluator:
    """An evaluator of ``model`` that takes the repaired operators."""
    return ReferenceEvaluator(model, new_ops=REPAIRED, **options)
