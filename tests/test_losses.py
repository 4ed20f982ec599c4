"""Each loss and its derivative against PyTorch's, in float64 and on awkward shapes."""

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from torch.nn import functional

import zilc
from zilc.errors import OptionError
from zilc.executors import executor

CASES = [
    ("energy", [3, 4], -1), ("mse", [2, 3, 4], -1), ("bce-with-logits", [5], -1),
    ("cross-entropy", [3, 4], -1), ("cross-entropy", [2, 5, 3], -1), ("cross-entropy", [2, 5, 3, 2], 1),
    ("none", [], -1), ("none", [1, 1], -1),
]  # fmt: skip


def torch_loss(kind, mu, y, axis):
    if kind == "energy":
        return 0.5 * ((mu - y) ** 2).sum()
    if kind == "mse":
        return functional.mse_loss(mu, y)
    if kind == "bce-with-logits":
        return functional.binary_cross_entropy_with_logits(mu, y)
    if kind == "cross-entropy":
        return functional.cross_entropy(mu.movedim(axis, 1) if mu.ndim > 2 else mu, y)
    return mu.reshape(())


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(("kind", "shape", "axis"), CASES)
def test_against_torch(kind, shape, axis, symbolic):
    rng = np.random.default_rng(1)
    dims = ",".join("abcd"[i] if symbolic and n > 1 else str(n) for i, n in enumerate(shape))
    dims = f"[{dims}]" if shape else ""  # the text syntax writes a scalar without brackets
    text = f'<ir_version: 10, opset_import: ["" : 18]> g (double{dims} x) => (double{dims} y) {{ y = Neg(x) }}'
    proto = onnx.parser.parse_model(text)
    step = zilc.emit_training(proto, wrt="x", loss=kind, class_axis=axis, outputs="grad")
    x = 3 * rng.standard_normal(shape)
    feeds = {"x": x}
    mu = torch.tensor(-x, requires_grad=True)
    y = None
    if kind == "cross-entropy":
        k = axis % len(shape)
        y = rng.integers(0, shape[k], shape[:k] + shape[k + 1 :])
    elif kind != "none":
        y = rng.integers(0, 2, shape).astype(float) if kind.startswith("bce") else rng.standard_normal(shape)
    if y is not None:
        feeds["target"] = y
    expected = torch_loss(kind, mu, None if y is None else torch.tensor(y), axis)
    expected.backward()
    got = executor(step.model, prefer="reference")(feeds)
    assert got["loss"].shape == ()
    assert np.allclose(got["loss"], expected.detach(), rtol=1e-13)
    assert np.allclose(got["x.grad"], -mu.grad, rtol=1e-12, atol=1e-16)


def test_extreme_logits_stay_finite():
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2,3] x) => (float[2,3] y) { y = Neg(x) }'
    )
    x = np.float32([[1e4, -1e4, 0], [3e38, 0, -3e38]])
    for kind, y in (("cross-entropy", np.int64([0, 1])), ("bce-with-logits", np.float32([[0, 1, 0], [1, 0, 1]]))):
        step = zilc.emit_training(proto, wrt="x", loss=kind, outputs="grad")
        got = executor(step.model)({"x": x, "target": y})
        assert np.isfinite(got["x.grad"]).all()


def test_several_outputs_add_up():
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (double[N,3] x) => (double[N,3] a, double[N,3] b) { a = Tanh(x)  b = Exp(x) }"""
    proto = onnx.parser.parse_model(text)
    step = zilc.emit_training(
        proto, output=["a", "b"], wrt="x", outputs="grad", loss=["mse", "b=cross-entropy"]
    )
    targets = [(t["name"], t["loss"]) for t in step.signature["targets"]]
    assert targets == [("target.a", "mse"), ("target.b", "cross-entropy")]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3))
    ya, yb = rng.standard_normal((4, 3)), rng.integers(0, 3, 4)
    t = torch.tensor(x, requires_grad=True)
    loss = functional.mse_loss(t.tanh(), torch.tensor(ya)) + functional.cross_entropy(t.exp(), torch.tensor(yb))
    loss.backward()
    got = executor(step.model)({"x": x, "target.a": ya, "target.b": yb})
    assert np.allclose(got["loss"], loss.detach(), rtol=1e-13)
    assert np.allclose(got["x.grad"], t.grad, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss": "hinge"}, "--loss: no loss 'hinge'. Choose one of energy"),
        ({"loss": "z=mse"}, "--loss: 'z' is not a trained output. They are: y"),
        ({"loss": "cross-entropy", "class_axis": 2}, "--class-axis: output 'y' has 2 dimensions, no axis 2"),
        ({"loss": "none"}, r"--loss none: output 'y' has shape \[2, 3\], expected a scalar loss"),
    ],
)
def test_refusals(options, text):
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2,3] x) => (float[2,3] y) { y = Neg(x) }'
    )
    with pytest.raises(OptionError, match=text):
        zilc.emit_training(proto, wrt="x", **options)
