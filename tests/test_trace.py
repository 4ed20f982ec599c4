"""Traces against a simulator that shares no code with zilc, and against what the theorem says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

import zilc
from tests import random_graphs, simulator
from tests.command import SKIP, Command, write
from tests.random_graphs import Sample
from zilc import models, signature
from zilc.errors import DataError, OptionError
from zilc.executors import executor

pytestmark = pytest.mark.filterwarnings(
    "ignore:divide by zero:RuntimeWarning", "ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
)
SEEDS = range(4000, 4012)


def traced(sample: Sample, **options: Any) -> zilc.Trace:
    names = sample.outputs
    targets = {f"target.{n}" if len(names) > 1 else "target": y for n, y in sample.targets.items()}
    return zilc.trace(sample.model, data={**sample.feeds, **targets}, output=names, wrt=sample.leaves, **options)


def simulated(sample: Sample, level: bool, **options: Any) -> tuple[simulator.Net, list[dict[str, simulator.Arrays]]]:
    net = simulator.network(sample.model, sample.outputs)
    net = simulator.levelled(net, "shared") if level else net
    states: list[dict[str, simulator.Arrays]] = []
    values = simulator.evaluate(sample.model, sample.feeds)
    simulator.simulate(net, values, sample.targets, states=states, **options)
    return net, states


def norms(of: simulator.Arrays, vertex: simulator.Vertex) -> float:
    return float(np.sqrt(sum(np.sum(of[t].astype(np.float64) ** 2) for t in vertex.outputs)))


def agree(found: zilc.Trace, net: simulator.Net, states: list[dict[str, simulator.Arrays]]) -> None:
    """Errors, movements and energies of the vertices that both name alike, to rounding, until they overflow."""
    here = {name: v for v, name in enumerate(found.vertices)}
    compared = 0
    maker = {t: n for n in found.step.source.proto.graph.node for t in n.output}
    for vertex in net.vertices:
        node = maker.get(vertex.outputs[0])
        name = (node.name or vertex.outputs[0]) if node is not None else None
        if name not in here:
            continue
        v = here[name]
        assert found.levels[v] == net.level[vertex.outputs[0]]
        compared += 1
        clamped = set(vertex.outputs).intersection(net.clamped.values())
        for t, state in enumerate(states):
            expected = norms(state["eps"], vertex)
            if expected > 1e6:
                break  # behind the wave, where differences of rounding grow as fast as the errors
            assert found.error[t, v] == pytest.approx(expected, rel=1e-9, abs=1e-11), (name, t)
            assert found.energy[t, v] == pytest.approx(0.5 * expected**2, rel=1e-9, abs=1e-11), (name, t)
            if t < found.steps and not clamped:
                moved = norms(state["dx"], vertex)
                assert found.movement[t, v] == pytest.approx(moved, rel=1e-9, abs=1e-11), (name, t)
    assert compared >= len(net.vertices) - simulator.count_identities(net)


@pytest.mark.parametrize("seed", SEEDS)
def test_zil_is_the_simulators(seed: int) -> None:
    sample = random_graphs.seeded(seed)
    found = traced(sample)
    net, states = simulated(sample, level=True)
    assert (found.steps, found.depth) == (net.k, net.k)
    assert found.error.shape == found.energy.shape == (net.k + 1, len(found.vertices))
    agree(found, net, states)


@pytest.mark.parametrize("seed", SEEDS)
def test_il_is_the_simulators(seed: int) -> None:
    sample = random_graphs.seeded(seed)
    found = traced(sample, algorithm="il", steps=7, gamma=0.2)
    net, states = simulated(sample, level=False, gamma=0.2, steps=7)
    assert (found.steps, found.gamma, found.identity.any()) == (7, 0.2, False)
    agree(found, net, states)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_error_is_zero_until_the_wave_arrives_and_then_backpropagations(seed: int) -> None:
    """eps of level l is 0 for t < l; at t = l it is delta, found by reverse mode on the tensor itself."""
    sample = random_graphs.seeded(seed)
    net = simulator.network(sample.model, sample.outputs)
    inner = [v for v in net.vertices if not set(v.outputs) & set(net.clamped.values()) and len(v.outputs) == 1]
    nodes = {t: n.name for n in sample.model.graph.node for t in n.output}
    found = traced(sample, full=[nodes[v.outputs[0]] for v in inner])
    # The tensor's name may have gone to a terminal identity behind it; the vertex keeps its own.
    tensors = {entry["vertex"]: entry["tensor"] for entry in found.step.signature["trace"]["full"]}
    waiting = np.arange(found.steps + 1)[:, None] < found.levels[None, :]
    assert waiting.any() == (found.depth > 1)
    assert not found.error[waiting].any()
    assert not found.movement[waiting[1:]].any()  # a node begins to move in the step before its error
    values = simulator.evaluate(sample.model, sample.feeds)
    for vertex in inner:
        tensor = vertex.outputs[0]
        # The rest of the network with this tensor as its leaf.
        others = [v for v in net.vertices if v is not vertex]
        rest = simulator.Net(others, [*net.leaves, tensor], net.clamped, net.level)
        delta = simulator.reverse_mode(rest, values, sample.targets)[tensor]
        level = net.level[tensor]
        error = found.full[f"{tensors[nodes[tensor]]}/error"]
        np.testing.assert_allclose(error[level], delta, rtol=1e-10, atol=1e-12)


def test_full_tensors_fit_their_norms_and_one_another() -> None:
    found = zilc.trace(_skip(), full=["bend", "a1.id2", "last"], seed=3)
    where = {name: v for v, name in enumerate(found.vertices)}
    for tensor, vertex in (("a1", "bend"), ("a1.id2", "a1.id2"), ("y", "last")):
        error = found.full[f"{tensor}/error"]
        assert error.dtype == np.float32
        np.testing.assert_allclose(np.sqrt(np.sum(error**2, axis=(1, 2))), found.error[:, where[vertex]], rtol=1e-6)
    for tensor in ("a1", "a1.id2"):
        value, movement = found.full[f"{tensor}/value"], found.full[f"{tensor}/movement"]
        assert value.shape == (found.steps + 1, *movement.shape[1:])
        np.testing.assert_array_equal(value[1:], value[:-1] + movement)
    assert not {"y/value", "y/movement"} & set(found.full)  # clamped
    with pytest.raises(OptionError, match=r"--full: no vertex 'bent' .* Close to it: bend"):
        zilc.trace(_skip(), full=["bent"])


def _skip() -> onnx.ModelProto:
    return onnx.parser.parse_model(SKIP)


@pytest.mark.parametrize("loss", ["energy", "mse", "bce-with-logits", "cross-entropy"])
@pytest.mark.parametrize("fixed", [False, True])
def test_energies_add_up(loss: str, fixed: bool) -> None:
    """Inside half the squared error, at the clamped output the loss; at step 0 nothing else."""
    found = zilc.trace(_skip(), loss=loss, fixed_predictions=fixed)
    clamped = found.levels == 0
    np.testing.assert_allclose(found.energy[:, ~clamped], 0.5 * found.error[:, ~clamped] ** 2, rtol=1e-12)
    from zilc.tracing import feeds_of

    feeds = feeds_of(found.step, None)
    value = executor(found.step.model)(feeds, [found.step.signature["loss"]])["loss"]
    assert found.energy[0].sum() == pytest.approx(float(value), rel=1e-6)
    assert found.energy[0, ~clamped].sum() == 0
    assert found.by_level("energy").sum(axis=1) == pytest.approx(found.energy.sum(axis=1))
    assert (found.by_level("error") ** 2).sum() == pytest.approx((found.error**2).sum())


def test_when_each_parameter_learns() -> None:
    model = models.build("skip")
    level = zilc.trace(model)
    assert {p: t for p, (_, t) in level.parameters.items()} == {
        "layer1.weight": 3, "layer1.bias": 3, "layer2.weight": 0, "layer2.bias": 0,
    }  # fmt: skip
    assert {t for _, t in zilc.trace(model, update_at="end").parameters.values()} == {level.steps - 1}
    assert {t for _, t in zilc.trace(model, algorithm="il").parameters.values()} == {20}
    assert "reach 2 of 4 parameters" in zilc.trace(model, steps=2).notes[0]


def test_the_signature_tells_the_outputs() -> None:
    step = zilc.emit_training(_skip(), schedule="literal", trace=["bend"])
    jsonschema.validate(step.signature, signature.schema())
    traced = step.signature["trace"]
    outputs = {o.name: o.type.tensor_type for o in step.model.graph.output}
    rows, count = traced["steps"] + 1, len(traced["vertices"])

    def dims(name: str) -> list[int]:
        return [d.dim_value for d in outputs[name].shape.dim]

    assert dims(traced["error"]) == dims(traced["energy"]) == [rows, count]
    assert dims(traced["movement"]) == [rows - 1, count]
    assert dims(traced["full"][0]["error"])[::2] == [rows, 3]
    plain = zilc.emit_training(_skip(), schedule="literal")
    assert "trace" not in plain.signature
    assert not [o.name for o in plain.model.graph.output if "trace" in o.name]


def test_names_that_are_taken_get_a_prefix() -> None:
    model = _skip()
    for node in model.graph.node:
        for names in (node.input, node.output):
            renamed = [{"h1": "trace.error", "a1": "trace.energy"}.get(name, name) for name in names]
            del names[:]
            names.extend(renamed)
    made = zilc.trace(model).step.signature["trace"]
    assert (made["error"], made["movement"], made["energy"]) == ("zilc.trace.error", "trace.movement",
                                                                 "zilc.trace.energy")  # fmt: skip


def test_the_wavefront_has_no_steps_to_trace() -> None:
    with pytest.raises(OptionError, match=r"--trace: the wavefront .* Add --schedule literal"):
        zilc.emit_training(_skip(), trace=True)
    with pytest.raises(OptionError, match="'bp' has no steps to trace"):
        zilc.trace(_skip(), algorithm="bp")  # type: ignore[arg-type]


def test_any_runtime_gives_the_same() -> None:
    """ONNX's reference evaluator and onnxruntime run the same graph."""
    found = zilc.trace(_skip())
    from zilc.tracing import feeds_of

    other = executor(found.step.model, prefer="reference")(feeds_of(found.step, None))
    np.testing.assert_allclose(other["trace.error"], found.error, rtol=1e-4)


def test_overflow_behind_the_wave_is_told() -> None:
    """Weights of 30 drive float32 out of its range on levels that the wave has passed, and nowhere else."""
    layers = "".join(f"h{k} = MatMul (h{k - 1}, w)\n" for k in range(1, 12))
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2, 2] h0) => (float[2, 2] h11)\n'
        "<float[2, 2] w = {30.0, 2.0, -3.0, 25.0}> {" + layers + "}"
    )
    found = zilc.trace(model)
    finite = np.isfinite(found.error)
    assert not finite.all()
    wave = np.arange(found.steps + 1)[:, None] <= found.levels[None, :]
    assert finite[wave].all()
    assert any("overflow" in note for note in found.notes)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def zilc_command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def test_the_file_holds_what_is_documented(zilc_command: Command, tmp_path: Path) -> None:
    path = write(tmp_path / "skip.onnx", SKIP)
    made = zilc_command("trace", path, "-o", tmp_path / "trace.npz", "--full", "join", "--json")
    assert (made.status, made.err) == (0, "")
    found = np.load(tmp_path / "trace.npz")
    count = len(found["vertices"])
    shapes = {
        "algorithm": (), "identities": (), "gamma": (), "vertices": (count,), "operators": (count,),
        "levels": (count,), "identity": (count,), "error": (6, count), "movement": (5, count), "energy": (6, count),
        "parameters": (4,), "parameter_levels": (4,), "update_steps": (4,), "full/s/error": (6, 2, 3),
        "full/s/movement": (5, 2, 3), "full/s/value": (6, 2, 3),
    }  # fmt: skip
    assert {name: found[name].shape for name in found.files} == shapes
    text = (Path(zilc.__file__).parent.parent / "docs" / "TRACES.md").read_text()
    assert all(f"`{name}`" in text for name in shapes if not name.startswith("full/"))
    data = made.json
    assert (data["levels"], data["steps"], data["identities_inserted"]) == (5, 5, 1)
    assert data["written"] == [str(tmp_path / "trace.npz")]
    again = tmp_path / "again.npz"
    assert zilc_command("trace", path, "-o", again, "--full", "join").status == 0
    assert again.read_bytes() == (tmp_path / "trace.npz").read_bytes()


def test_it_prints_the_wave(zilc_command: Command, tmp_path: Path) -> None:
    made = zilc_command("trace", write(tmp_path / "skip.onnx", SKIP))
    assert made.status == 0
    rows = [line.split() for line in made.out.split("steps\n")[1].split("\n\n")[0].splitlines()[1:]]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert [row[2] for row in rows] == ["0", "1", "2", "3", "4", "4"]  # the highest level with an error


def test_data_is_what_runs(zilc_command: Command, tmp_path: Path) -> None:
    path = write(tmp_path / "skip.onnx", SKIP)
    x, y = np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32)
    np.savez(tmp_path / "feeds.npz", x=x, target=y)
    assert zilc_command("trace", path, "--data", tmp_path / "feeds.npz", "-o", tmp_path / "a.npz").status == 0
    session = executor(_skip())
    state = session({"x": x})
    assert np.load(tmp_path / "a.npz")["error"][0, -1] == pytest.approx(np.linalg.norm(state["y"]), rel=1e-6)
    np.savez(tmp_path / "other.npz", z=x)
    failed = zilc_command("trace", path, "--data", tmp_path / "other.npz", "-o", tmp_path / "b.npz")
    assert (failed.status, failed.out) == (1, "")
    assert "no array 'x' (it holds z)" in failed.err
    assert not (tmp_path / "b.npz").exists()
    with pytest.raises(DataError, match="array 'target' is int64, expected float32"):
        zilc.trace(path, data={"x": x, "target": y.astype(int)})


def test_the_tracing_graph_can_be_written(zilc_command: Command, tmp_path: Path) -> None:
    path = write(tmp_path / "skip.onnx", SKIP)
    made = zilc_command(
        "emit-training", path, "--schedule", "literal", "--trace", "--full", "join", "-o", tmp_path / "s.onnx", "--json"
    )
    assert made.status == 0
    stored = onnx.load(tmp_path / "s.onnx")
    kept = json.loads(next(p.value for p in stored.metadata_props if p.key == "zilc.signature"))
    assert kept["trace"]["full"][0]["error"] == "s.trace.error"
    assert {o.name for o in stored.graph.output} > {"trace.error", "trace.movement", "trace.energy", "s.trace.value"}


def test_errors_pass_the_masks_of_the_training_mode() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        g (float[6, 4] x) => (float[6, 3] y) <float[4, 5] W, float[5, 3] V> {
            h = MatMul(x, W)
            n = BatchNormalization(h, s, b, m, v)
            ratio = Constant<value_float = 0.5>()
            d = Dropout(n, ratio)
            y = MatMul(d, V)
        }"""
    )
    rng = np.random.default_rng(0)
    made = {n: rng.standard_normal(k) for n, k in (("W", (4, 5)), ("V", (5, 3)), ("s", 5), ("b", 5), ("m", 5))}
    made["v"] = np.ones(5)
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v.astype(np.float32), n) for n, v in made.items())
    data = {"x": rng.standard_normal((6, 4)).astype(np.float32), "target": np.zeros((6, 3), np.float32)}
    found = zilc.trace(model, data=data, mode="train", full=["n", "d"], seed=7)
    value, error = found.full["d/value"][0], found.full["n/error"]
    masked = value == 0
    assert 0 < masked.sum() < masked.size
    step = next(t for t, row in enumerate(error) if np.any(row))
    assert np.array_equal(error[step] == 0, masked)
    h = data["x"] @ made["W"].astype(np.float32)
    whole = made["s"] * (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) + made["b"]
    np.testing.assert_allclose(value, np.where(masked, 0, 2 * whole), rtol=1e-4, atol=1e-5)
