"""Quantised models: what cuts the gradient is named; --straight-through passes it, as PyTorch's fake_quantize does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime
import pytest

import zilc
from tests.command import Command, write
from tests.test_errors import refused
from zilc.signature import read as signature_of

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(5)
BATCH = 6


def qdq_mlp(opset: int = 18) -> onnx.ModelProto:
    """Two layers as a quantisation-aware export has them: weights and activations quantised and dequantised.

    Weights are per channel and symmetric, activations per tensor with a zero point.  Scales are small enough that some
    entries of every quantised tensor saturate, on both sides.
    """
    helper = onnx.helper
    arrays = {
        "w1": RNG.normal(size=(4, 5)).astype(np.float32),
        "b1": RNG.normal(size=5).astype(np.float32),
        "w2": RNG.normal(size=(5, 3)).astype(np.float32),
        "s1": np.asarray([0.005, 0.01, 0.004, 0.02, 0.008], np.float32),
        "z1": np.zeros(5, np.int8),
        "s2": np.asarray([0.006, 0.012, 0.004], np.float32),
        "z2": np.zeros(3, np.int8),
        "sx": np.asarray(0.01, np.float32),
        "zx": np.asarray(130, np.uint8),
        "sa": np.asarray(0.015, np.float32),
        "za": np.asarray(3, np.int8),
    }
    nodes = []

    def fake(name: str, scale: str, zero: str, **attrs: int) -> str:
        made = helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}.q"], name=f"quantise_{name}", **attrs)
        back = helper.make_node("DequantizeLinear", [f"{name}.q", scale, zero], [f"{name}.d"], **attrs)
        nodes.extend([made, back])
        return f"{name}.d"

    x = fake("x", "sx", "zx")
    w1 = fake("w1", "s1", "z1", axis=1)
    nodes.append(helper.make_node("MatMul", [x, w1], ["m"]))
    nodes.append(helper.make_node("Add", ["m", "b1"], ["h"]))
    nodes.append(helper.make_node("Tanh", ["h"], ["a"]))
    a = fake("a", "sa", "za")
    w2 = fake("w2", "s2", "z2", axis=1)
    nodes.append(helper.make_node("MatMul", [a, w2], ["y"]))
    graph = helper.make_graph(
        nodes, "qdq",
        [helper.make_tensor_value_info("x", 1, ["N", 4])],
        [helper.make_tensor_value_info("y", 1, ["N", 3])],
        [onnx.numpy_helper.from_array(v, n) for n, v in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def twin(model: onnx.ModelProto, x: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of ½‖y − target‖² by torch.autograd through torch.fake_quantize."""
    held = {t.name: torch.tensor(onnx.numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    leaves = {n: held[n].clone().requires_grad_() for n in ("w1", "b1", "w2")}
    leaves["x"] = torch.tensor(x, requires_grad=True)

    def tensorwise(t: torch.Tensor, scale: str, zero: str, low: int, high: int) -> torch.Tensor:
        return torch.fake_quantize_per_tensor_affine(t, float(held[scale]), int(held[zero]), low, high)

    def channelwise(t: torch.Tensor, scale: str, zero: str) -> torch.Tensor:
        return torch.fake_quantize_per_channel_affine(t, held[scale], held[zero].int(), 1, -128, 127)

    xq = tensorwise(leaves["x"], "sx", "zx", 0, 255)
    h = xq @ channelwise(leaves["w1"], "s1", "z1") + leaves["b1"]
    a = tensorwise(torch.tanh(h), "sa", "za", -128, 127)
    y = a @ channelwise(leaves["w2"], "s2", "z2")
    (0.5 * ((y - torch.tensor(target)) ** 2).sum()).backward()
    saturated = [float((leaves[n].grad == 0).float().mean()) for n in ("w1", "w2", "x")]
    assert all(0 < s < 0.9 for s in saturated), saturated
    return {n: t.grad.numpy() for n, t in leaves.items()}


@pytest.fixture(name="zilc")
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    return {n: rng.normal(size=(BATCH, k)).astype(np.float32) for n, k in (("x", 4), ("target", 3))}


def gradients(step: onnx.ModelProto, model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By leaf, run in onnxruntime."""
    signature = signature_of(step)
    leaves = {t["name"]: t["grad"] for t in (*signature["parameters"], *signature["input_grads"])}
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    session = onnxruntime.InferenceSession(step.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    values = session.run(list(leaves.values()), {n: v for n, v in {**held, **feeds}.items() if n in wanted})
    return dict(zip(leaves, values, strict=True))


@pytest.mark.parametrize("opset", [13, 18, 21])
@pytest.mark.parametrize("algorithm", ["zil", "bp"])
def test_as_fake_quantize_in_pytorch(
    zilc: Command, tmp_path: Path, feeds: dict[str, np.ndarray], opset: int, algorithm: str
) -> None:
    model = qdq_mlp(opset)
    path, out = tmp_path / "qdq.onnx", tmp_path / "step.onnx"
    onnx.save(model, path)
    made = zilc(
        "emit-training", path, "-o", out, "--outputs", "grad", "--straight-through", "--algorithm", algorithm,
        *("--wrt", "w*", "--wrt", "b1", "--wrt", "x"),
    )  # fmt: skip
    assert made.status == 0, made.err
    step = onnx.load(out)
    assert signature_of(step)["straight_through"] is True
    got = gradients(step, model, feeds)
    truth = twin(model, feeds["x"], feeds["target"])
    assert sorted(got) == sorted(truth)
    for name, expected in truth.items():
        np.testing.assert_allclose(got[name], expected, rtol=2e-5, atol=2e-6, err_msg=name)
        np.testing.assert_array_equal(got[name] == 0, expected == 0, err_msg=f"{name}: what saturates")


def test_weights_behind_fake_quantisation_are_trained_and_scales_are_not() -> None:
    step = zilc.emit_training(qdq_mlp(), straight_through=True)
    assert sorted(p["name"] for p in step.signature["parameters"]) == ["b1", "w1", "w2"]
    assert step.report["straight_through"] == ["quantise_x", "quantise_w1", "quantise_a", "quantise_w2"]
    with pytest.raises(zilc.OptionError, match="no gradient reaches 's1'"):
        zilc.emit_training(qdq_mlp(), straight_through=True, wrt="s1")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int4", "uint4", "float8e4m3fn"])
def test_bounds_of_every_type(dtype: str) -> None:
    """At the bounds the gradient passes, beyond them it does not.  Rounding comes first, as in PyTorch."""
    kind = getattr(onnx.TensorProto, dtype.upper())
    low, high = {
        "int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535), "int4": (-8, 7),
        "uint4": (0, 15), "float8e4m3fn": (-448, 448),
    }[dtype]  # fmt: skip
    margin = 0.0 if dtype.startswith("float") else 0.4
    x = np.asarray([low - 1, low - margin, low, (low + high) / 2, high, high + margin, high + 1], np.float32)
    if not margin:
        x = np.asarray([low * 2, low, low / 2, 1.0, high / 2, high, high * 2], np.float32)
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[7] x) => (float l) <float s = {{0.5}}>
        {{ q = QuantizeLinear<output_dtype = {kind}>(x, s) y = DequantizeLinear(q, s)
           l = ReduceSum<keepdims = 0>(y) }}""")
    step = zilc.emit_training(model, outputs="grad", wrt="x", straight_through=True, loss="none")
    name = step.signature["input_grads"][0]["grad"]
    from onnx.reference import ReferenceEvaluator

    got = dict(zip(
        [o.name for o in step.model.graph.output],
        ReferenceEvaluator(step.model).run(None, {"x": x / 2}), strict=True,
    ))[name]  # fmt: skip
    np.testing.assert_array_equal(np.abs(got), [0, 1, 1, 1, 1, 1, 0])


def test_verify_holds_it_against_the_line(zilc: Command, tmp_path: Path) -> None:
    path = tmp_path / "qdq.onnx"
    onnx.save(qdq_mlp(), path)
    done = zilc("verify", path, "--straight-through", "--json")
    assert done.status == 0, done.err
    assert done.json["straight_through"] is True
    assert done.json["zil_equals_bp"] is True
    assert sorted(r["name"] for r in done.json["parameters"]) == ["b1", "w1", "w2"]


def test_training_lowers_the_loss(zilc: Command, tmp_path: Path) -> None:
    """Fake quantisation stays in the model, the weights under it move."""
    model = qdq_mlp()
    path = tmp_path / "qdq.onnx"
    onnx.save(model, path)
    rng = np.random.default_rng(1)
    x = rng.normal(scale=0.5, size=(64, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, target=np.tanh(x @ rng.normal(size=(4, 3))).astype(np.float32) * 0.5)
    done = zilc(
        "train", path, "--data", tmp_path / "data.npz", "--straight-through", "--loss", "mse", "--lr", "0.05",
        "--epochs", "20", "--batch-size", "16", "-o", tmp_path / "trained.onnx", "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    losses = [entry["loss"] for entry in done.json["history"]]
    assert losses[-1] < 0.7 * losses[0]
    after = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "trained.onnx").graph.initializer}
    before = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    moved = sorted(n for n, v in before.items() if not np.array_equal(v, after[n]))
    assert moved == ["b1", "w1", "w2"]


# --- errors -------------------------------------------------------------------------------------------------------

CUT = (
    "The model is quantised: vertex 'quantise_x' (QuantizeLinear) cuts the gradient. "
    "Train the floating-point model it was made from, or, if it is of QDQ format, add --straight-through."
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(qdq_mlp(), tmp_path / "qdq.onnx")
    return tmp_path / "qdq.onnx"


def test_what_cuts_every_path_is_named(zilc: Command, tmp_path: Path, path: Path) -> None:
    text = refused(zilc, tmp_path, "emit-training", path)
    assert text == f"{path}: no parameter to train and no input gradient asked for. {CUT}"


def test_what_cuts_the_path_of_a_leaf_is_named(zilc: Command, tmp_path: Path, path: Path) -> None:
    text = refused(zilc, tmp_path, "emit-training", path, "--wrt", "w1")
    assert text == (
        f"--wrt: no gradient reaches 'w1': vertex 'quantise_w1' (QuantizeLinear) cuts the gradient. {CUT}"
    )
    text = refused(zilc, tmp_path, "emit-training", path, "--wrt", "x")
    assert text == f"--wrt: no gradient path from input 'x' to a trained output. {CUT}"


def test_integer_operators_have_no_line_to_pass(zilc: Command, tmp_path: Path) -> None:
    path = write(
        tmp_path / "int8.onnx",
        """
        <ir_version: 10, opset_import: ["" : 18]>
        int8 (float[N, 3] x) => (float[N, 2] y)
        <float s = {0.1}, uint8 z = {128}, int8[3, 2] w = {1, 2, 3, 4, 5, 6}, float ws = {0.05}, int8 wz = {0}>
        {
            q = QuantizeLinear (x, s, z)
            [product] m = QLinearMatMul (q, s, z, w, ws, wz, s, z)
            y = DequantizeLinear (m, s, z)
        }
        """,
    )
    text = refused(zilc, tmp_path, "emit-training", path, "--straight-through")
    assert text.startswith(f"{path}: vertex 'product' (QLinearMatMul")
    assert "compute with integers" in text
    assert text.endswith("quant_format=QuantFormat.QDQ).")


def test_nothing_to_pass(zilc: Command, tmp_path: Path) -> None:
    path = write(
        tmp_path / "plain.onnx",
        """<ir_version: 8, opset_import: ["" : 18]>
        g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }""",
    )
    assert refused(zilc, tmp_path, "emit-training", path, "--straight-through") == (
        f"{path}: no QuantizeLinear whose output a DequantizeLinear reads. Leave out --straight-through."
    )


def test_quantised_value_nodes_do_not_move(zilc: Command, tmp_path: Path, path: Path) -> None:
    text = refused(zilc, tmp_path, "emit-training", path, "--straight-through", "--schedule", "literal")
    assert text == "--straight-through: quantised value nodes cannot move by fractions. Use the wavefront."
