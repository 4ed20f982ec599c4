"""Who runs a model on arrays: ONNX Runtime's CPU provider, or ONNX's reference evaluator where that has no kernel.

ONNX Runtime's CPU provider has no float64 Conv, ConvTranspose, AveragePool or Erf (among others); the reference
evaluator has all of them, some as loops over every output element.  Those are replaced here by the same sums over
kernel taps in whole-array form, and
operators that it computes wrongly are mended (:mod:`zilc.reference`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_average_pool import AveragePool_19 as SlowAveragePool
from onnx.reference.ops.op_conv import Conv as SlowConv
from onnx.reference.ops.op_conv_transpose import ConvTranspose as SlowConvTranspose
from onnx.reference.ops.op_max_pool import MaxPool as SlowMaxPool

from zilc import foreign, onnx_io
from zilc.reference import REPAIRED

Feeds = Mapping[str, np.ndarray]


@dataclass
class Executor:
    """A loaded model.

    Attributes:
        name: which runtime runs it, for reports.
        inputs, outputs: names in order.
    """

    name: str
    inputs: list[str]
    outputs: list[str]
    _run: Any

    def __call__(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Outputs by name."""
        names = list(outputs) if outputs is not None else self.outputs
        given = {name: np.asarray(feeds[name]) for name in self.inputs}
        return dict(zip(names, self._run(names, given), strict=True))


def executor(model: onnx.ModelProto, *, prefer: str = "onnxruntime") -> Executor:
    """Load a model in onnxruntime on CPU; in ONNX's reference evaluator if a kernel is missing there.

    Args:
        prefer: ``onnxruntime`` or ``reference``.
    """
    inputs = [i.name for i in model.graph.input]
    outputs = [o.name for o in model.graph.output]
    if prefer == "onnxruntime" and not (onnx_io.holds_float64(model) and _single_constants(model.graph)):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if onnx_io.holds_float64(model):
            # Its further optimizations put scalar factors of float64 products into attributes, which are float32.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own exception types are not exported
            missing = any(word in str(error) for word in ("NOT_IMPLEMENTED", "Could not find an implementation"))
            # So are the operators of an opset that it does not know yet.
            own = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
            missing = missing or max(own, default=0) > onnx_io.MAX_OPSET
            # A custom operator whose schema leaves float64 out makes the graph invalid, not just unimplemented.
            if not missing and not any((n.domain, n.op_type) in foreign.OPERATORS for n in model.graph.node):
                raise
        else:
            return Executor(f"onnxruntime {onnxruntime.__version__}", inputs, outputs, session.run)
    evaluator = ReferenceEvaluator(model, new_ops=[*_FASTER, *REPAIRED, *foreign.evaluated(model)])

    def run(names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [np.asarray(y) for y in evaluator.run(names, feeds)]

    return Executor(f"onnx {onnx.__version__} reference evaluator", inputs, outputs, run)


def _single_constants(graph: onnx.GraphProto) -> bool:
    """Whether onnxruntime would take float64 through float32: Gelu's tanh form, by a body of float32 constants.

    And the inverse DFT of a length that is no power of two: 3e-8 off for seven elements (onnxruntime 1.31).
    """
    for node in graph.node:
        if node.op_type == "DFT" and any(a.name == "inverse" and a.i for a in node.attribute):
            return True
        if node.op_type == "Gelu" and any(a.name == "approximate" and a.s == b"tanh" for a in node.attribute):
            return True
        if any(a.type == onnx.AttributeProto.GRAPH and _single_constants(a.g) for a in node.attribute):
            return True
    return False


class ConvTranspose(SlowConvTranspose):
    """ConvTranspose with explicit padding as one product and a scatter of kernel taps."""

    op_domain = ""

    def _run(
        self, X, W, B=None, auto_pad=None, dilations=None, group=None, kernel_shape=None, output_padding=None,
        output_shape=None, pads=None, strides=None,
    ):  # fmt: skip
        spatial = X.ndim - 2
        if auto_pad not in (None, "NOTSET", b"NOTSET") or output_shape is not None:
            return SlowConvTranspose._run(
                self, X, W, B, auto_pad=auto_pad, dilations=dilations, group=group, kernel_shape=kernel_shape,
                output_padding=output_padding, output_shape=output_shape, pads=pads, strides=strides,
            )  # fmt: skip
        strides = strides or [1] * spatial
        dilations = dilations or [1] * spatial
        pads = pads or [0] * (2 * spatial)
        output_padding = output_padding or [0] * spatial
        group = group or 1
        kernel, size = W.shape[2:], X.shape[2:]
        full = [
            s * (n - 1) + d * (k - 1) + 1 + p
            for s, n, d, k, p in zip(strides, size, dilations, kernel, output_padding, strict=True)
        ]
        per_group, out_per_group = X.shape[1] // group, W.shape[1]
        y = np.zeros((X.shape[0], group * out_per_group, *full), X.dtype)
        for g in range(group):
            part = X[:, g * per_group : (g + 1) * per_group]
            weight = W[g * per_group : (g + 1) * per_group]
            target = y[:, g * out_per_group : (g + 1) * out_per_group]
            for tap in np.ndindex(*kernel):
                moved = np.moveaxis(np.tensordot(part, weight[(slice(None), slice(None), *tap)], axes=(1, 0)), -1, 1)
                window = tuple(
                    slice(t * d, t * d + s * (n - 1) + 1, s)
                    for t, d, s, n in zip(tap, dilations, strides, size, strict=True)
                )
                target[(slice(None), slice(None), *window)] += moved
        crop = tuple(slice(pads[i], full[i] - pads[spatial + i]) for i in range(spatial))
        y = y[(slice(None), slice(None), *crop)]
        if B is not None:
            y = y + B.reshape(1, -1, *[1] * spatial)
        return (np.ascontiguousarray(y),)


def _explicit(auto_pad: Any, ceil_mode: Any) -> bool:
    """Padding is given in numbers and windows are counted downwards."""
    return auto_pad in (None, "NOTSET", b"NOTSET") and not ceil_mode


def _windows(size: Sequence[int], kernel: Sequence[int], strides: Any, pads: Any, dilations: Any, ceil: bool = False):
    """Pads by axis, the output size, and for each kernel tap the slices of the padded input that it reads.

    With ``ceil`` a last window may reach beyond the end padding; one that begins there is left out.
    """
    spatial = len(kernel)
    strides = list(strides or [1] * spatial)
    pads = list(pads or [0] * (2 * spatial))
    dilations = list(dilations or [1] * spatial)
    out = [
        (size[i] + pads[i] + pads[spatial + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1
        for i in range(spatial)
    ]
    if ceil:
        rooms = [size[i] + pads[i] + pads[spatial + i] - dilations[i] * (kernel[i] - 1) - 1 for i in range(spatial)]
        out = [-(-room // s) + 1 for room, s in zip(rooms, strides, strict=True)]
        out = [n - ((n - 1) * s >= size[i] + pads[i]) for i, (n, s) in enumerate(zip(out, strides, strict=True))]
    taps = [
        tuple(slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in zip(tap, dilations, strides, out, strict=True))
        for tap in np.ndindex(*kernel)
    ]
    return [(pads[i], pads[spatial + i]) for i in range(spatial)], out, taps


#: Bytes that one block of unrolled windows may take.
_BLOCK = 1 << 24


def _blocks(column: int, places: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Cuts (samples, rows, ...) of places so that the columns of a cut, ``column`` bytes each, fit in a block."""
    samples, height = places[0], places[1]
    row = max(column * int(np.prod(places[2:])), 1)
    many = max(_BLOCK // (row * max(height, 1)), 1)
    high = max(min(_BLOCK // row, height), 1)
    for n in range(0, samples, many):
        for r in range(0, height, height if many > 1 else high):
            yield slice(n, n + many), slice(r, r + (height if many > 1 else high)), *[slice(None)] * (len(places) - 2)


class Conv(SlowConv):
    """Conv with explicit padding as products with unrolled windows, a block of them at a time."""

    op_domain = ""

    def _run(
        self, X, W, B=None, auto_pad=None, dilations=None, group=None, kernel_shape=None, pads=None, strides=None,
    ):  # fmt: skip
        if not _explicit(auto_pad, 0) or X.ndim < 3:
            return SlowConv._run(
                self, X, W, B, auto_pad=auto_pad, dilations=dilations, group=group, kernel_shape=kernel_shape,
                pads=pads, strides=strides,
            )  # fmt: skip
        group, kernel, spatial = group or 1, W.shape[2:], X.ndim - 2
        widths, out, _ = _windows(X.shape[2:], kernel, strides, pads, dilations)
        x = np.pad(X, [(0, 0), (0, 0), *widths])
        x = np.moveaxis(x.reshape(X.shape[0], group, X.shape[1] // group, *x.shape[2:]), 0, 2)  # (G, C, N, size)
        steps = x.strides[3:]
        taps = [n * d for n, d in zip(steps, dilations or [1] * spatial, strict=True)]
        places = [n * s for n, s in zip(steps, strides or [1] * spatial, strict=True)]
        # (G, C, taps, N, places): what each place reads, without a copy
        shape = (*x.shape[:2], *kernel, x.shape[2], *out)
        reads = np.lib.stride_tricks.as_strided(
            x, shape, (*x.strides[:2], *taps, x.strides[2], *places), writeable=False
        )
        rows = W.reshape(group, W.shape[0] // group, -1)
        y = np.empty((group, rows.shape[1], X.shape[0], *out), X.dtype)
        for g in range(group):
            for block in _blocks(rows.shape[2] * X.itemsize, (X.shape[0], *out)):
                part = reads[g][(..., *block)]
                made = rows[g] @ part.reshape(rows.shape[2], -1)
                y[g][(slice(None), *block)] = made.reshape(-1, *part.shape[1 + spatial :])
        y = np.moveaxis(y, 2, 0).reshape(X.shape[0], W.shape[0], *out)
        return (y if B is None else y + B.reshape(1, -1, *[1] * spatial),)


class AveragePool(SlowAveragePool):
    """AveragePool with explicit padding as a sum of shifted slices.

    With ``ceil_mode`` ONNX's own takes the mean of nothing where the window is larger than the image.
    """

    op_domain = ""

    def _run(  # type: ignore[override]
        self, x, auto_pad=None, ceil_mode=None, dilations=None, kernel_shape=None, pads=None, strides=None,
        count_include_pad=None,
    ):  # fmt: skip
        if not _explicit(auto_pad, None):
            return SlowAveragePool._run(
                self, x, auto_pad=auto_pad, ceil_mode=ceil_mode, dilations=dilations, kernel_shape=kernel_shape,
                pads=pads, strides=strides, count_include_pad=count_include_pad,
            )  # fmt: skip
        widths, out, taps = _windows(x.shape[2:], kernel_shape, strides, pads, dilations, ceil=bool(ceil_mode))
        inside = np.pad(np.ones(x.shape[2:], x.dtype), widths, constant_values=1.0 if count_include_pad else 0.0)
        # Windows that ceil_mode lets reach beyond the padding count nothing there.
        reach = [max(tap[axis].stop for tap in taps) for axis in range(len(out))]
        beyond = [(0, max(0, end - n)) for end, n in zip(reach, inside.shape, strict=True)]
        padded = np.pad(np.pad(x, [(0, 0), (0, 0), *widths]), [(0, 0), (0, 0), *beyond])
        inside = np.pad(inside, beyond)
        total, count = np.zeros((*x.shape[:2], *out), x.dtype), np.zeros(out, x.dtype)
        for tap in taps:
            total += padded[(slice(None), slice(None), *tap)]
            count += inside[tap]
        return (total / count,)


class MaxPool(SlowMaxPool):
    """MaxPool with explicit padding as a running maximum over kernel taps; the first maximum wins."""

    op_domain = ""

    def _run(  # type: ignore[override]
        self, x, auto_pad=None, ceil_mode=None, dilations=None, kernel_shape=None, pads=None, storage_order=None,
        strides=None,
    ):  # fmt: skip
        if not _explicit(auto_pad, ceil_mode) or storage_order or x.dtype.kind != "f":
            return SlowMaxPool._run(
                self, x, auto_pad=auto_pad, ceil_mode=ceil_mode, dilations=dilations, kernel_shape=kernel_shape,
                pads=pads, storage_order=storage_order, strides=strides,
            )  # fmt: skip
        widths, out, taps = _windows(x.shape[2:], kernel_shape, strides, pads, dilations)
        padded = np.pad(x, [(0, 0), (0, 0), *widths], constant_values=-np.inf)
        place = np.pad(np.arange(np.prod(x.shape[2:]), dtype=np.int64).reshape(x.shape[2:]), widths)
        best = np.full((*x.shape[:2], *out), -np.inf, x.dtype)
        index = np.zeros(best.shape, np.int64)
        for tap in taps:
            value = padded[(slice(None), slice(None), *tap)]
            better = value > best
            best = np.where(better, value, best)
            index = np.where(better, place[tap], index)
        planes = np.arange(x.shape[0] * x.shape[1], dtype=np.int64).reshape(*x.shape[:2], *[1] * len(out))
        index += planes * int(np.prod(x.shape[2:]))
        return (best,) if len(self.onnx_node.output) == 1 else (best, index)


_FASTER: list[type[OpRun]] = [Conv, ConvTranspose, AveragePool, MaxPool]
