"""The reference evaluator's replaced operators, held against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.parser
import pytest
import torch

from zilc import executors
from zilc.executors import executor


def model(op: str, feeds: dict[str, np.ndarray], opset: int, **attrs: Any) -> onnx.ModelProto:
    """One node."""
    node = onnx.helper.make_node(op, list(feeds), ["y"], **attrs)
    entries = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in feeds.items()
    ]
    made = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([node], "one", entries, [made])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


def check(op: str, feeds: dict[str, np.ndarray], opset: int = 18, atol: float = 1e-6, **attrs: Any) -> None:
    """Both executors agree in float32."""
    made = model(op, feeds, opset, **attrs)
    expected, got = (executor(made, prefer=who)(feeds)["y"] for who in ("onnxruntime", "reference"))
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("seed", range(24))
def test_convolution(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any rank, group, stride, dilation and padding; blocks small enough that most of them need several."""
    monkeypatch.setattr(executors, "_BLOCK", 1 << (seed % 3 * 4 + 6))
    rng = np.random.default_rng(seed)
    spatial, group = seed % 3 + 1, int(rng.integers(1, 4))
    kernel, strides, dilations = (rng.integers(1, 4, spatial).tolist() for _ in range(3))
    pads = rng.integers(0, 3, 2 * spatial).tolist()
    size = [d * (k - 1) + 1 + int(rng.integers(0, 6)) for d, k in zip(dilations, kernel, strict=True)]
    channels, maps = (group * int(rng.integers(1, 4)) for _ in range(2))
    x, w, b = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((2, channels, *size), (maps, channels // group, *kernel), (maps,))
    )
    feeds = {"x": x, "w": w} | ({"b": b} if seed % 2 else {})
    check("Conv", feeds, atol=1e-5, strides=strides, dilations=dilations, pads=pads, group=group)


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
def test_batch_normalization_by_running_statistics(opset: int) -> None:
    rng = np.random.default_rng(0)
    feeds = {"x": 3 * rng.standard_normal((2, 3, 4, 4)) + 1}
    feeds.update({n: rng.uniform(0.5, 1.5, 3) for n in ("scale", "bias", "mean", "variance")})
    check("BatchNormalization", {n: v.astype(np.float32) for n, v in feeds.items()}, opset, epsilon=1e-3)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather_elements_along_a_long_axis(axis: int) -> None:
    rng = np.random.default_rng(0)
    shape = [3, 2, 4]
    shape[axis] = 100
    index = rng.integers(-100, 100, [2 if k == axis % 3 else n for k, n in enumerate(shape)])
    check("GatherElements", {"x": rng.standard_normal(shape).astype(np.float32), "i": index}, axis=axis)


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pad"),
    [(1, 3, 3, 0), (2, 7, 7, 0), (7, 3, 2, 0), (8, 3, 2, 1), (6, 3, 4, 1), (5, 2, 3, 1), (9, 4, 3, 2)],
)
def test_average_pool_counts_nothing_beyond_its_padding(
    size: int, kernel: int, stride: int, pad: int, include: int
) -> None:
    """With ceil_mode, as PyTorch counts."""
    x = np.random.default_rng(size).standard_normal((2, 3, size, size + 1)).astype(np.float32)
    made = model(
        "AveragePool", {"x": x}, 19, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4, ceil_mode=1,
        count_include_pad=include,
    )  # fmt: skip
    expected = torch.nn.functional.avg_pool2d(torch.from_numpy(x), kernel, stride, pad, True, bool(include))
    got = executor(made, prefer="reference")({"x": x})["y"]
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_an_opset_that_onnxruntime_does_not_know_yet() -> None:
    x = np.asarray([[1.0, -2.0]], np.float32)
    made = executor(model("Relu", {"x": x}, onnx.defs.onnx_opset_version()))
    assert "reference evaluator" in made.name
    np.testing.assert_array_equal(made({"x": x})["y"], [[1.0, 0.0]])


@pytest.mark.parametrize("scale", [1.0, 0.6, 0.5])
def test_max_roi_pool(scale: float) -> None:
    """Regions inside, of one pixel, and beyond the image."""
    rng = np.random.default_rng(0)
    rois = [[0, 0, 0, 4, 3], [1, 2, 1, 6, 5], [0, 3, 3, 3, 3], [1, 1, 4, 9, 8], [0, 9, 9, 12, 12]]
    feeds = {"x": rng.standard_normal((2, 3, 6, 7)).astype(np.float32), "rois": np.asarray(rois, np.float32)}
    check("MaxRoiPool", feeds, pooled_shape=[2, 3], spatial_scale=scale)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_global_lp_pool(p: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    check("GlobalLpPool", {"x": x}, p=p)


def test_gelu_by_tanh_keeps_float64() -> None:
    """onnxruntime's body for it holds sqrt(2 / pi) and 0.044715 in float32."""
    x = np.linspace(-3, 3, 7)
    made = model("Gelu", {"x": x}, 20, approximate="tanh")
    made.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(executor(made)({"x": x})["y"], expected, rtol=1e-14)


def _double(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')


def test_inverse_dft_keeps_float64() -> None:
    """onnxruntime's is 3e-8 off where the length is no power of two."""
    x = np.random.default_rng(0).standard_normal((2, 7, 2))
    made = _double("g (double[2,7,2] x) => (double[2,7,2] y) { y = DFT <axis = 1, inverse = 1> (x) }")
    expected = np.fft.ifft(x[..., 0] + 1j * x[..., 1], axis=1)
    got = executor(made)({"x": x})["y"]
    np.testing.assert_allclose(got[..., 0] + 1j * got[..., 1], expected, rtol=1e-14, atol=1e-15)


def test_log_softmax_of_logits_far_apart() -> None:
    """onnx's own takes the logarithm of a softmax, which is 0 there."""
    x = np.asarray([[0.0, -900.0, 20.0]])
    made = _double("g (double[1,3] x) => (double[1,3] y) { y = LogSoftmax(x) }")
    got = executor(made, prefer="reference")({"x": x})["y"]
    np.testing.assert_allclose(got, [[-20.0, -920.0, 0.0]], rtol=1e-9, atol=3e-9)
