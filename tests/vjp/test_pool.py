"""Pools: every attribute, overlapping and disjoint windows, ties, static and symbolic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.vjp.cases import Case, both, check, label
from zilc.errors import ModelError
from zilc.testing import op_model, run, vjp_model
from zilc.vjp import pool


def _r(*shape: int) -> np.ndarray:
    """Distinct values at least 0.05 apart and from 0, so that no step crosses a tie or a kink."""
    n = int(np.prod(shape))
    values = (np.arange(n) + 1) * 0.05 * np.where(np.arange(n) % 2, -1, 1)
    return np.random.default_rng([7, *shape]).permutation(values).reshape(shape)


def _case(op: str, shape: tuple, label: str = "", opset: int = 18, **attrs: Any) -> Case:
    return Case(op, [_r(*shape)], attrs, opset=opset, label=label)


# Where strides and dilations are 1, ONNX's reference evaluator takes 2-D pads in the order top, bottom, left,
# right, so these pads are symmetric; on one axis or three it takes no pads at all.
MAX = [
    _case("MaxPool", (2, 3, 8), kernel_shape=[3], strides=[2]),
    _case("MaxPool", (2, 2, 8, 7), kernel_shape=[2, 2], strides=[2, 2], label="disjoint"),
    _case("MaxPool", (2, 2, 8, 7), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], label="overlapping"),
    _case("MaxPool", (1, 2, 8, 7), kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 0, 1], label="asymmetric"),
    _case("MaxPool", (1, 2, 7, 7), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, label="ceil"),
    _case(
        "MaxPool", (1, 2, 8, 6), kernel_shape=[3, 2], strides=[2, 3], ceil_mode=1, pads=[1, 1, 1, 1], label="ceil pads"
    ),
    _case("MaxPool", (1, 2, 8, 9), kernel_shape=[2, 3], dilations=[2, 3], strides=[1, 2], label="dilations"),
    _case("MaxPool", (1, 2, 6, 7), kernel_shape=[2, 3], dilations=[2, 2], label="dilations stride 1"),
    _case("MaxPool", (2, 2, 5, 6), kernel_shape=[3, 2], label="stride 1"),
    _case("MaxPool", (1, 2, 5, 6), kernel_shape=[3, 3], pads=[1, 1, 1, 1], label="stride 1 pads"),
    _case("MaxPool", (2, 2, 6, 5), kernel_shape=[3, 2], strides=[2, 2], storage_order=1, label="column major"),
    _case("MaxPool", (1, 2, 8, 6), kernel_shape=[2, 2], strides=[2, 2], auto_pad="VALID", label="valid"),
    _case("MaxPool", (1, 2, 8, 7), kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER", label="same upper"),
    _case("MaxPool", (1, 2, 4, 4, 5), kernel_shape=[2, 3, 2], strides=[2, 1, 2], label="3d"),
]
AVERAGE = [
    _case("AveragePool", (2, 3, 8), kernel_shape=[3], strides=[2]),
    _case("AveragePool", (2, 3, 9), kernel_shape=[3], strides=[2], pads=[1, 1], count_include_pad=1),
    _case("AveragePool", (2, 2, 8, 6), kernel_shape=[2, 3], strides=[2, 3], label="tiles"),
    _case("AveragePool", (2, 2, 9, 7), kernel_shape=[2, 3], strides=[2, 3], label="tiles leave a rest"),
    _case("AveragePool", (1, 2, 7, 6), kernel_shape=[2, 2], strides=[2, 2], pads=[1, 0, 0, 1], label="padded tiles"),
    _case("AveragePool", (1, 2, 7, 6), kernel_shape=[3, 3], strides=[2, 1], pads=[1, 1, 1, 1], label="pads"),
    _case("AveragePool", (1, 2, 7, 6), kernel_shape=[3, 2], pads=[1, 0, 2, 1], count_include_pad=1, label="include"),
    _case("AveragePool", (1, 2, 8, 7), kernel_shape=[1, 2], strides=[3, 3], label="gaps"),
    _case(
        "AveragePool", (1, 2, 7, 8), kernel_shape=[2, 2], strides=[1, 2], dilations=[2, 3], opset=19, label="dilations"
    ),
    _case("AveragePool", (1, 2, 6, 8), kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER", label="same upper"),
    _case("AveragePool", (1, 2, 6, 8), kernel_shape=[3, 3], strides=[2, 1], auto_pad="SAME_LOWER", label="same lower"),
    _case("AveragePool", (1, 2, 6, 8), kernel_shape=[3, 3], strides=[2, 1], auto_pad="VALID", label="valid"),
    _case("AveragePool", (1, 2, 4, 5, 4), kernel_shape=[2, 2, 3], strides=[1, 2, 1], label="3d"),
]
LP = [
    _case("LpPool", (2, 2, 6, 7), kernel_shape=[3, 2], strides=[1, 2]),
    _case("LpPool", (1, 2, 6, 7), kernel_shape=[3, 2], strides=[3, 2], p=1, label="p1"),
    _case("LpPool", (1, 2, 6, 7), kernel_shape=[2, 2], strides=[2, 2], p=3, label="p3"),
    _case("LpPool", (1, 2, 6), kernel_shape=[2], p=4, label="p4"),
    _case("LpPool", (1, 2, 6, 7), kernel_shape=[2, 2], dilations=[2, 1], label="dilations"),
]
GLOBAL = [
    _case("GlobalAveragePool", (2, 3, 4, 5)),
    _case("GlobalAveragePool", (2, 3, 4)),
    _case("GlobalAveragePool", (2, 2, 2, 3, 2)),
    _case("GlobalMaxPool", (2, 3, 4, 5)),
]


# Not in the reference evaluator, and float32 alone in ONNX Runtime: small operands keep the rounding of the difference
# small beside its step.  Other powers and ranks are checked against PyTorch below.
RUNTIME = [
    Case(
        "GlobalLpPool",
        [(_r(1, 2, 3) * 0.1).astype(np.float32)],
        {"p": p},
        executor="onnxruntime",
        rtol=2e-3,
        label=f"p{p}",
    )
    for p in (1, 2)
]
CASES: list[Case] = MAX + AVERAGE + LP + GLOBAL + RUNTIME


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_against_central_differences(case: Case, symbolic: bool) -> None:
    check(case, symbolic)


def _opset(attrs: Any) -> int:
    """Before opset 22 shape inference is one too large for some outputs with ceil_mode."""
    return 22 if attrs.get("ceil_mode") else 18


def _gradient(op: str, x: np.ndarray, g: np.ndarray, executor: str, symbolic: bool, **attrs: Any) -> np.ndarray:
    model = vjp_model(op_model(op, [x], attrs, symbolic=symbolic, opset=_opset(attrs)))
    feeds = {"x0": x, "g0": g}
    names = [o.name for o in model.graph.output]
    return run(model, feeds, executor)[names.index("d0")]


def _expected(y: torch.Tensor, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    g = torch.tensor(np.random.default_rng(3).standard_normal(y.shape), dtype=y.dtype)
    (d,) = torch.autograd.grad(y, x, g)
    return g.numpy(), d.numpy()


F = torch.nn.functional
#: label, operator, shape, attributes, the same in PyTorch; for ONNX Runtime in float32.
TORCH = [
    ("1d padded", "MaxPool", (2, 3, 8), {"kernel_shape": [3], "pads": [1, 1]}, lambda x: F.max_pool1d(x, 3, 1, 1)),
    ("3d", "MaxPool", (1, 2, 4, 5, 4), {"kernel_shape": [2, 3, 2]}, lambda x: F.max_pool3d(x, (2, 3, 2), 1)),
    (
        "3d column major",
        "MaxPool",
        (2, 2, 4, 5, 6),
        {"kernel_shape": [2, 3, 2], "strides": [2, 1, 2], "storage_order": 1},
        lambda x: F.max_pool3d(x, (2, 3, 2), (2, 1, 2)),
    ),
    (
        "column major",
        "MaxPool",
        (2, 3, 6, 5),
        {"kernel_shape": [3, 2], "strides": [2, 1], "storage_order": 1},
        lambda x: F.max_pool2d(x, (3, 2), (2, 1)),
    ),
    (
        "same lower",
        "MaxPool",
        (1, 2, 7, 8),
        {"kernel_shape": [2, 4], "strides": [2, 3], "auto_pad": "SAME_LOWER"},
        lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 0), value=-1e9), (2, 4), (2, 3)),
    ),
    (
        "ceil",
        "AveragePool",
        (1, 2, 7, 8),
        {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1},
        lambda x: F.avg_pool2d(x, (3, 2), (2, 3), (1, 1), ceil_mode=True, count_include_pad=False),
    ),
    (
        "ceil include",
        "AveragePool",
        (1, 2, 8, 8),
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1, "count_include_pad": 1},
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=True),
    ),
    (
        "ceil tiles",
        "AveragePool",
        (1, 2, 7, 8),
        {"kernel_shape": [2, 3], "strides": [2, 3], "ceil_mode": 1},
        lambda x: F.avg_pool2d(x, (2, 3), ceil_mode=True),
    ),
    (
        "overlapping",
        "AveragePool",
        (2, 3, 7, 8),
        {"kernel_shape": [3, 3], "strides": [2, 2]},
        lambda x: F.avg_pool2d(x, 3, 2),
    ),
    ("1d", "GlobalMaxPool", (2, 3, 5), {}, lambda x: F.adaptive_max_pool1d(x, 1)),
    ("3d", "GlobalMaxPool", (2, 3, 2, 3, 4), {}, lambda x: F.adaptive_max_pool3d(x, 1)),
    ("p1", "GlobalLpPool", (2, 3, 4, 5), {"p": 1}, lambda x: x.abs().sum((2, 3), keepdim=True)),
    ("p2", "GlobalLpPool", (2, 3, 4), {"p": 2}, lambda x: x.norm(dim=2, keepdim=True)),
    ("p3", "GlobalLpPool", (1, 2, 2, 3, 2), {"p": 3}, lambda x: (x.abs() ** 3).sum((2, 3, 4), keepdim=True) ** (1 / 3)),
]


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize(("name", "op", "shape", "attrs", "function"), TORCH, ids=[f"{c[1]} {c[0]}" for c in TORCH])
def test_against_torch(name: str, op: str, shape: tuple, attrs: dict, function: Any, symbolic: bool) -> None:
    """ONNX Runtime in float32, where the reference evaluator lacks the case or computes another one."""
    x = torch.tensor(_r(*shape), dtype=torch.float32, requires_grad=True)
    y = function(x)
    got_y = run(
        op_model(op, [x.detach().numpy()], attrs, opset=_opset(attrs)), {"x0": x.detach().numpy()}, "onnxruntime"
    )[0]
    np.testing.assert_allclose(got_y, y.detach().numpy(), rtol=1e-5, atol=1e-6)
    g, expected = _expected(y, x)
    got = _gradient(op, x.detach().numpy(), g, "onnxruntime", symbolic, **attrs)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize(("executor", "dtype"), [("reference", torch.float64), ("onnxruntime", torch.float32)])
@pytest.mark.parametrize("stride", [1, 2])
def test_first_of_equal_maxima(executor: str, dtype: torch.dtype, stride: int, symbolic: bool) -> None:
    x = torch.tensor(np.random.default_rng(0).integers(0, 3, (2, 3, 7, 7)), dtype=dtype, requires_grad=True)
    g, expected = _expected(F.max_pool2d(x, 3, stride, 1), x)
    attrs = {"kernel_shape": [3, 3], "strides": [stride, stride], "pads": [1, 1, 1, 1]}
    got = _gradient("MaxPool", x.detach().numpy(), g, executor, symbolic, **attrs)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    g, expected = _expected(F.adaptive_max_pool2d(x, 1), x)
    got = _gradient("GlobalMaxPool", x.detach().numpy(), g, executor, symbolic)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("case", [c for c in MAX if c.attrs.get("auto_pad", "NOTSET") == "NOTSET"], ids=str)
def test_maxima_by_taps_and_by_indices(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both lowerings of every MaxPool, whichever the rule would choose, in ONNX Runtime."""
    x = case.inputs[0].astype(np.float32)  # type: ignore[union-attr]
    y = run(op_model("MaxPool", [x], case.attrs), {"x0": x}, "onnxruntime")[0]
    g = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    by_indices = _gradient("MaxPool", x, g, "onnxruntime", False, **case.attrs)

    def taps(op: Any, g: Any, indices: Any, x: Any, window: Any, columns: int) -> Any:
        return pool.max_by_taps(op, g, indices.inputs[0].outputs[0], x, window)

    monkeypatch.setattr(pool, "max_by_indices", taps)
    for symbolic in (False, True):
        by_taps = _gradient("MaxPool", x, g, "onnxruntime", symbolic, **case.attrs)
        np.testing.assert_allclose(by_taps, by_indices, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in AVERAGE if "tiles" in c.label], ids=str)
def test_tiles_by_convolution(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiling windows take the shorter way; the general one must agree."""
    monkeypatch.setattr(pool, "spread_by_repeat", pool.spread_by_conv)
    for symbolic in (False, True):
        check(case, symbolic)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_norm_of_zeros(p: int) -> None:
    x, g = np.zeros((1, 2, 4, 4), np.float32), np.ones((1, 2, 2, 2), np.float32)
    got = _gradient("LpPool", x, g, "onnxruntime", False, p=p, kernel_shape=[2, 2], strides=[2, 2])
    np.testing.assert_array_equal(got, np.zeros_like(x))


def test_ceil_mode_that_shape_inference_gets_wrong() -> None:
    attrs = {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1}
    with pytest.raises(ModelError, match=r"output sizes \[4, 3\], but \[4, 4\].*opset 22"):
        vjp_model(op_model("AveragePool", [_r(1, 2, 7, 8)], attrs, opset=21))
