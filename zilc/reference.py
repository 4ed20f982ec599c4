"""ONNX's reference evaluator, for float64, with the operators repaired that lose precision or are wrong there.

``Erf`` computes in float32 whatever its operand is, and ``Gelu`` is built on it; ``Mean`` takes only operands of
one shape; ``LRN`` fills as many channels as there are samples; ``LpNormalization`` with p = 1 sums x, not |x|;
``GatherElements`` along an axis of more than 64 elements stops with an error; ``BatchNormalization`` of opsets
before 14 mixes the batch's statistics into the running ones, with one output too, which means inference;
``GridSample`` rounds its places to float32, and ``DeformConv`` is built on it; ``Adam`` of several
tensors rounds its results to float32; ``Det`` gives float64 for types that are not NumPy's own; ``Optional`` makes
a list that not every operator takes apart; ``LogSoftmax`` is the logarithm of a softmax, which is 0 for logits some
hundreds apart; ``GlobalLpPool`` and ``MaxRoiPool`` are missing.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.aionnx_preview_training.op_adam import Adam as SinglePrecisionAdam
from onnx.reference.ops.op_grid_sample import GridSample as SinglePrecisionGridSample

from zilc import foreign
from zilc.reference_recurrent import RECURRENT


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


class LogSoftmax(OpRun):
    """x - max x - log sum exp(x - max x)."""

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int | None = None) -> tuple[np.ndarray]:
        shifted = x - x.max(axis=axis, keepdims=True)
        return ((shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))).astype(x.dtype),)


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


class Det(OpRun):
    """Of the operand's type."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        wide = x if x.dtype.kind == "f" and x.dtype.itemsize > 2 else x.astype(np.float32)
        return (np.asarray(np.linalg.det(wide), x.dtype),)


class GlobalLpPool(OpRun):
    """The p-norm of each channel."""

    op_domain = ""

    def _run(self, x: np.ndarray, p: int = 2) -> tuple[np.ndarray]:
        axes = tuple(range(2, x.ndim))
        return (((np.abs(x) ** p).sum(axis=axes, keepdims=True) ** (1.0 / p)).astype(x.dtype),)


class MaxRoiPool(OpRun):
    """The maximum of each bin of each region; 0 where a bin lies outside the image.

    A region's corners are rounded to pixels, half away from 0, and both are inside it; a bin reaches over every pixel
    that it touches.
    """

    op_domain = ""

    def _run(
        self, x: np.ndarray, rois: np.ndarray, pooled_shape: Any = None, spatial_scale: float = 1.0
    ) -> tuple[np.ndarray]:
        y = np.zeros((len(rois), x.shape[1], *pooled_shape), x.dtype)
        for k, (image, *corners) in enumerate(rois):
            left, top, right, bottom = (int(np.floor(c * spatial_scale + 0.5)) for c in corners)
            for at in np.ndindex(*pooled_shape):
                window = []
                for axis, (first, last) in enumerate(((top, bottom), (left, right))):
                    size = max(last - first + 1, 1) / pooled_shape[axis]
                    ends = first + math.floor(at[axis] * size), first + math.ceil((at[axis] + 1) * size)
                    window.append(slice(*np.clip(ends, 0, x.shape[2 + axis])))
                part = x[int(image)][:, *window]
                if part.size:
                    y[(k, slice(None), *at)] = part.max(axis=(1, 2))
        return (y,)


class Optional(OpRun):
    """An optional is what it holds: the evaluator's own wraps it in a list, which only some operators take off."""

    op_domain = ""

    def _run(self, x: Any = None, type: Any = None) -> tuple[Any]:
        return (x,)


class OptionalGetElement(OpRun):
    """What the optional holds."""

    op_domain = ""

    def _run(self, x: Any) -> tuple[Any]:
        return (x,)


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


class GridSample(SinglePrecisionGridSample):
    """Places are computed in double precision, and the modes' older names are known."""

    op_domain = ""

    def _run(self, X: Any, grid: Any, mode: Any = None, padding_mode: Any = None, align_corners: Any = None) -> Any:
        mode = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
        return (super()._run(X, grid, mode=mode, padding_mode=padding_mode, align_corners=align_corners)[0],)

    def _gs_denormalize_coordinates(self, n: Any, dims: Any, align_corners: bool) -> np.ndarray:
        pairs = zip(n, dims, strict=True)
        return np.asarray([self._gs_denormalize(n=v, length=d, align_corners=align_corners) for v, d in pairs])


class Adam(SinglePrecisionAdam):
    """Several tensors keep their precision, too."""

    op_domain = "ai.onnx.preview.training"

    def _run(self, r: Any, t: Any, *data: Any, **attrs: Any) -> tuple[Any, ...]:  # type: ignore[override]
        count = len(data) // 4
        results = [self._run1(r, t, *data[k::count], **attrs) for k in range(count)]
        return tuple(result[slot] for slot in range(3) for result in results)


class DeformConv(OpRun):
    """Taps of the kernel one by one: bilinear samples of the image at the moved places, 0 outside."""

    op_domain = ""

    def _run(
        self, X: Any, W: Any, offset: Any, B: Any = None, mask: Any = None, dilations: Any = None, group: Any = None,
        kernel_shape: Any = None, offset_group: Any = None, pads: Any = None, strides: Any = None,
    ) -> tuple[np.ndarray]:  # fmt: skip
        (n, channels, height, width), (m, per_group, kh, kw) = X.shape, W.shape
        oh, ow = offset.shape[2:]
        moves = offset.reshape(n, offset_group, kh, kw, 2, oh, ow)
        weights = np.ones((n, offset_group, kh, kw, oh, ow)) if mask is None else mask
        weights = weights.reshape(n, offset_group, kh, kw, oh, ow)
        (sh, sw), (dh, dw), (top, left) = strides or (1, 1), dilations or (1, 1), (pads or (0, 0, 0, 0))[:2]
        y = np.zeros((n, m, oh, ow), X.dtype)
        for b, i, j in np.ndindex(n, kh, kw):
            for c in range(channels):
                og = c // (channels // offset_group)
                at_y = np.arange(oh)[:, None] * sh - top + i * dh + moves[b, og, i, j, 0]
                at_x = np.arange(ow)[None, :] * sw - left + j * dw + moves[b, og, i, j, 1]
                value = np.zeros((oh, ow), X.dtype)
                for py, px in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    iy, ix = np.floor(at_y).astype(int) + py, np.floor(at_x).astype(int) + px
                    weight = (1 - abs(at_y - iy)) * (1 - abs(at_x - ix))
                    inside = (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
                    value += np.where(inside, X[b, c, iy.clip(0, height - 1), ix.clip(0, width - 1)] * weight, 0)
                value *= weights[b, og, i, j]
                g = c // per_group
                for k in range(g * (m // group), (g + 1) * (m // group)):
                    y[b, k] += W[k, c % per_group, i, j] * value
        return (y if B is None else y + B.reshape(1, -1, 1, 1),)


#: For ``ReferenceEvaluator(model, new_ops=REPAIRED)``.
REPAIRED: list[type[OpRun]] = [
    *RECURRENT, Adam, BatchNormalization, DeformConv, Det, Erf, GatherElements, Gelu, GlobalLpPool, GridSample, LRN,
    LogSoftmax, LpNormalization, MaxRoiPool, Mean, Optional, OptionalGetElement,
]  # fmt: skip


def evaluator(model: onnx.ModelProto, **options: Any) -> ReferenceEvaluator:
    """An evaluator of ``model`` that takes the repaired operators."""
    return ReferenceEvaluator(model, new_ops=[*REPAIRED, *foreign.evaluated(model)], **options)
