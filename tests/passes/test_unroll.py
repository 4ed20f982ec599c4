"""Recurrent operators written out over time: the same function, the same gradients, levels that show the time steps."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import zilc
from tests import twins
from tests.recurrent import CASES, GATES, Recurrent
from zilc import ir, models, onnx_io
from zilc.executors import executor
from zilc.passes import unroll
from zilc.passes.prepare import prepare
from zilc.reference import evaluator


def unrolled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The prepared model; no recurrent operator is left."""
    prepared = prepare(onnx_io.load(model))
    made = ir.to_proto(prepared.graph, ir_version=10, infer=True)
    onnx_io.check_full(made)
    assert not {n.op_type for n in made.graph.node} & set(GATES)
    return made


def cast(feeds: dict[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    return {name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in feeds.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_equal_the_operators_in_float64(case: Recurrent) -> None:
    """A few units in the last place of float64 over the time steps."""
    feeds = case.operands()
    expected = evaluator(case.model()).run(None, feeds)
    got = executor(unrolled(case.model()))(feeds)
    for a, b in zip(got.values(), expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-15 * max(1.0, np.abs(b).max()))


#: Kernels of onnxruntime know no layout, and other defaults of alpha than the specification's.
FUSED = [c for c in CASES if not c.attrs.get("layout")]


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_outputs_equal_onnxruntimes_kernel_in_float32(case: Recurrent) -> None:
    feeds = cast(case.operands(), np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    fused = onnxruntime.InferenceSession(case.model(np.float32).SerializeToString(), options)
    got = executor(unrolled(case.model(np.float32)))(feeds)
    for a, b in zip(got.values(), fused.run(None, feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1.0, np.abs(b).max()))


def energy(outputs: list[np.ndarray], targets: list[np.ndarray]) -> float:
    return sum(0.5 * float(np.sum((y - t) ** 2)) for y, t in zip(outputs, targets, strict=True))


def gradients(
    model: onnx.ModelProto, feeds: dict[str, np.ndarray], targets: list[np.ndarray], algorithm: str = "zil"
) -> dict[str, np.ndarray]:
    """Of every floating operand, all outputs trained by their energies."""
    names = [y.name for y in model.graph.output]
    leaves = [name for name, x in feeds.items() if x.dtype.kind == "f"]
    step = zilc.emit_training(model, output=names, wrt=leaves, outputs="grad", algorithm=algorithm)
    given = {t["name"]: targets[names.index(t["output"])] for t in step.signature["targets"]}
    got = executor(step.model)({**feeds, **given})
    return {entry["name"]: got[entry["grad"]] for entry in step.signature["input_grads"]}


def check_gradients(model: onnx.ModelProto, feeds: dict[str, np.ndarray], rtol: float = 1e-6) -> None:
    """Against central differences of the original operator in float64, along random directions."""
    rng = np.random.default_rng(1)
    run = evaluator(model).run
    targets = [y + rng.standard_normal(y.shape) for y in run(None, feeds)]
    got = gradients(model, feeds, targets)
    assert set(got) == {name for name, x in feeds.items() if x.dtype.kind == "f"}
    for name, gradient in got.items():
        assert gradient.shape == feeds[name].shape
        for _ in range(2):
            v, h = rng.standard_normal(gradient.shape), 1e-5
            plus = energy(run(None, {**feeds, name: feeds[name] + h * v}), targets)
            minus = energy(run(None, {**feeds, name: feeds[name] - h * v}), targets)
            numeric, exact = (plus - minus) / (2 * h), float(np.sum(gradient * v))
            scale = float(np.linalg.norm(gradient) * np.linalg.norm(v)) + 1e-3
            assert abs(exact - numeric) <= rtol * scale, f"{name}: {exact!r}, central difference {numeric!r}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_central_differences(case: Recurrent) -> None:
    check_gradients(case.model(), case.operands())


@pytest.mark.parametrize(
    "case",
    [Recurrent(kind, {"direction": "bidirectional"}, lengths=(4, 1, 2)) for kind in GATES],
    ids=str,
)
def test_symbolic_batch(case: Recurrent) -> None:
    check_gradients(case.model(symbolic=("N",)), case.operands())


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("outputs", [1, 2])
def test_optional_outputs(kind: str, outputs: int) -> None:
    case = Recurrent(kind, outputs=outputs)
    check_gradients(case.model(), case.operands())


@pytest.mark.parametrize("kind", GATES)
def test_one_step_from_zero_keeps_the_recurrence_a_leaf(kind: str) -> None:
    """R is multiplied by zeros, so that its gradient is zero; it can be trained nevertheless."""
    case = Recurrent(kind, steps=1, initial=False, outputs=1)
    check_gradients(case.model(), case.operands())
    targets = [np.zeros((1, 1, case.batch, case.hidden))]
    assert not gradients(case.model(), case.operands(), targets)["R"].any()


@pytest.mark.parametrize("opset", [7, 14, 17, 22])
def test_every_opset(opset: int) -> None:
    case = Recurrent("LSTM", peepholes=True)
    got = executor(unrolled(case.model(opset=opset)))(case.operands())
    for a, b in zip(got.values(), evaluator(case.model()).run(None, case.operands()), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-15)


@pytest.mark.parametrize("case", [Recurrent(kind, {"direction": "bidirectional"}) for kind in GATES], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zil_equals_bp_bit_for_bit(case: Recurrent, dtype: Any) -> None:
    model, feeds = case.model(dtype), cast(case.operands(), dtype)
    targets = [np.zeros_like(y) for y in executor(unrolled(model))(feeds).values()]
    zil, bp = (gradients(model, feeds, targets, algorithm) for algorithm in ("zil", "bp"))
    assert {n: g.tobytes() for n, g in zil.items()} == {n: g.tobytes() for n, g in bp.items()}


# -- the paper's network --


@pytest.fixture(scope="module")
def rnn() -> onnx.ModelProto:
    return models.build("rnn", unrolled=False, dtype="float64")


def test_levels_show_the_time_steps(rnn: onnx.ModelProto) -> None:
    """Two vertices a time step on the longest path (product and tanh), and R is read at each but the first."""
    report = zilc.levelize(rnn, identities="none").report
    leaves = {leaf["name"]: leaf for leaf in report["leaves"]}
    assert leaves["rnn.weight_hh"]["consumers"] == 27
    assert [leaves[n]["consumers"] for n in ("rnn.weight_ih", "rnn.bias")] == [1, 1]
    # output, Squeeze, Unsqueeze, 27 products, 28 tanh, Split, Gemm, and the bias's Squeeze, Split and Add
    assert report["levels"] == 1 + 1 + 27 + 28 + 1 + 1 + 3 + 1
    tanh = [name for name in report["vertex_levels"] if name.endswith("/Tanh")]
    assert len(tanh) == 28
    assert any("28 time steps" in note for note in report["notes"])


def test_the_papers_network_equals_its_twin(rnn: onnx.ModelProto) -> None:
    feeds = models.random_feeds(rnn, 20, np.random.default_rng(0), loss="cross-entropy")
    step = zilc.emit_training(rnn, loss="cross-entropy", outputs="grad")
    got = executor(step.model)({**feeds, **{n: np.asarray(step.state[n]) for n in step.state}})
    truth = twins.torch_gradients("rnn", rnn, {"input": feeds["input"]}, feeds["target"], "cross-entropy")
    assert set(truth) == {p["name"] for p in step.signature["parameters"]}
    for p in step.signature["parameters"]:
        expected = truth[p["name"]]
        assert np.linalg.norm(got[p["grad"]] - expected) <= 1e-12 * np.linalg.norm(expected), p["name"]


# -- lengths --


def test_long_sequences_stay_one_vertex() -> None:
    case = Recurrent("GRU", steps=unroll.LIMIT + 1)
    prepared = prepare(onnx_io.load(case.model(np.float32)))
    assert [n.op for n in prepared.graph.nodes] == ["GRU"]
    assert any("one vertex" in note and str(unroll.LIMIT + 1) in note for note in prepared.notes)


def test_a_symbolic_length_stays_one_vertex_until_it_is_settled() -> None:
    model = Recurrent("LSTM").model(np.float32, symbolic=("T",))
    report = zilc.levelize(model, output="Y").report
    assert any("one vertex" in note and "--dim" in note for note in report["notes"])
    report = zilc.levelize(model, output="Y", dims={"T": 4}).report
    assert any("4 time steps" in note for note in report["notes"])


VERTICES = [
    case
    for kind in GATES
    for case in (
        Recurrent(kind, {"direction": "bidirectional"}, lengths=(4, 2, 3)),
        Recurrent(kind, {"layout": 1}, initial=False),
    )
]


@pytest.mark.parametrize("case", VERTICES, ids=str)
def test_gradients_of_one_vertex(case: Recurrent) -> None:
    """A symbolic length in float64 is a Scan, which onnxruntime runs in that type."""
    model = case.model(symbolic=("T", "N"))
    assert "Scan" in {n.op for n in prepare(onnx_io.load(model)).graph.nodes}
    check_gradients(model, case.operands())


@pytest.mark.parametrize("case", VERTICES, ids=str)
def test_one_vertex_in_float32_on_onnxruntime(case: Recurrent) -> None:
    """Beside the unrolled graph in float64; rtol 2e-5 of each gradient's norm."""
    feeds = case.operands()
    targets = [np.ones_like(y) for y in evaluator(case.model()).run(None, feeds)]
    expected = gradients(case.model(), feeds, targets)
    small = [t.astype("f") for t in targets]
    got = gradients(case.model(np.float32, symbolic=("T", "N")), cast(feeds, np.float32), small)
    for name, gradient in expected.items():
        assert np.linalg.norm(got[name] - gradient) <= 2e-5 * np.linalg.norm(gradient), name


def test_one_vertex_is_levelled_bit_for_bit() -> None:
    case = Recurrent("LSTM", {"direction": "bidirectional"})
    model = case.model(np.float32, symbolic=("T",))
    feeds = cast(case.operands(), np.float32)
    levelled = zilc.levelize(model, output="Y").model
    before, after = executor(model)(feeds), executor(levelled)(feeds)
    assert {n: y.tobytes() for n, y in before.items()} == {n: after[n].tobytes() for n in before}


# -- as exporters write them --


class Stack(torch.nn.Module):
    """Recurrent layers with a head on every time step, and another on the final state."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.layers = getattr(torch.nn, kind)(5, 6, **options)
        width = 12 if options.get("bidirectional") else 6
        self.head = torch.nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.layers(x)
        return self.head(y)


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(
    "options",
    [{"num_layers": 2, "bidirectional": True, "batch_first": True}, {"num_layers": 1}, {"bias": False}],
    ids=["stack", "plain", "nobias"],
)
def test_exported_networks_equal_torch(kind: str, options: dict[str, Any], dynamo: bool, tmp_path: Any) -> None:
    """The input's gradient, and every entry of every parameter's."""
    torch.manual_seed(0)
    module = Stack(kind, options).double().eval()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), path, dynamo=dynamo, input_names=["x"], output_names=["y"], verbose=False)
    target = torch.randn(module(x).shape, dtype=torch.float64)
    x.requires_grad_()
    loss = 0.5 * (module(x) - target).square().sum()
    expected_x, *expected = torch.autograd.grad(loss, [x, *module.parameters()])
    step = zilc.emit_training(path, wrt=["x", "*"], outputs="grad")
    state = {n: np.asarray(step.state[n]) for n in step.state}
    got = executor(step.model)({"x": x.detach().numpy(), "target": target.numpy(), **state})
    gradient = got[step.signature["input_grads"][0]["grad"]]
    assert np.linalg.norm(gradient - expected_x.numpy()) <= 1e-12 * np.linalg.norm(expected_x.numpy())
    if not {n.op_type for n in onnx.load(path).graph.node} & set(GATES):
        return  # the exporter wrote the steps out itself, the first one folded: no twin holds these parameters
    # Exporters rearrange gates and stack directions: the same numbers in another order.
    default = {p["name"] for p in zilc.emit_training(path, outputs="grad").signature["parameters"]}
    ours = [got[p["grad"]] for p in step.signature["parameters"] if p["name"] in default]
    a = np.sort(np.abs(np.concatenate([g.reshape(-1) for g in ours])))
    b = np.sort(np.abs(np.concatenate([g.numpy().reshape(-1) for g in expected])))
    assert a.size == b.size
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
