"""What each condition of the theorem is for: the ablations diverge where ZIL.md, section 7, says, and nowhere else.

Every ablation is a choice of options, run as an emitted graph; its numbers are those of the simulator, which shares no
code with zilc.  Inference learning settles where theory says that it settles.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import zilc
from tests import random_graphs, simulator
from tests.command import Command
from tests.random_graphs import Sample
from tests.test_properties import gradients, run, training
from zilc import models

#: Relative, float64: the same equations in another order of sums.
EXACT = 1e-12
#: The simulator's numbers, where errors are no longer zero and grow from step to step.
CLOSE = 1e-9
#: What is called a divergence.
OFF = 1e-3

pytestmark = pytest.mark.filterwarnings(
    "ignore:divide by zero:RuntimeWarning", "ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
)

ABLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of zilc, of the simulator
    "gamma": ({"gamma": 0.9}, {"gamma": 0.9}),
    "end": ({"update_at": "end"}, {"at_end": True}),
    "unlevelled": ({"identities": "none"}, {}),
}


def literal(sample: Sample, **options: Any) -> dict[str, np.ndarray]:
    return gradients(sample, training(sample, "zil", schedule="literal", **options), "unoptimized")[0]


def truth_of(sample: Sample) -> tuple[simulator.Net, simulator.Arrays, simulator.Arrays]:
    """The network, its forward pass, and reverse mode, all by the simulator."""
    values = simulator.evaluate(sample.model, sample.feeds)
    net = simulator.network(sample.model, sample.outputs)
    return net, values, simulator.reverse_mode(net, values, sample.targets)


def only(gradients_of: simulator.Arrays, sample: Sample) -> simulator.Arrays:
    return {leaf: gradients_of[leaf] for leaf in sample.leaves}


# --- random graphs: the simulator's numbers ---------------------------------------------------------


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_random_graphs_give_the_simulators_numbers(ablation: str) -> None:
    options, theirs = ABLATIONS[ablation]
    compared = off = 0
    for seed in range(30):
        sample = random_graphs.seeded(5000 + seed, max_steps=20)
        net, values, truth = truth_of(sample)
        graph = net if ablation == "unlevelled" else simulator.levelled(net, "shared")
        expected = simulator.simulate(graph, values, sample.targets, **theirs)
        found = literal(sample, **options)
        # Levels that the wave has passed may overflow, there and here.
        finite = {leaf: expected[leaf] for leaf in sample.leaves if np.abs(expected[leaf]).max(initial=0) < 1e6}
        errors = simulator.relative_errors({leaf: found[leaf] for leaf in finite}, finite) if finite else {}
        assert all(error <= CLOSE for error in errors.values()), (seed, errors)
        compared += len(finite)
        off += max(simulator.relative_errors(found, only(truth, sample)).values()) > OFF
    assert compared >= 60
    assert off >= 10


def test_random_graphs_give_the_simulators_numbers_with_noise() -> None:
    """The emitted graph's noise is replaced by the simulator's own."""
    compared = 0
    for seed in range(40):
        sample = random_graphs.seeded(6000 + seed, max_steps=20)
        if sample.features & {"several outputs of one vertex", "identity in file", "identity as output"}:
            continue  # pieces that nobody reads have noise there and no value node here; names differ
        net, values, truth = truth_of(sample)
        level = simulator.levelled(net, "shared")
        expected = simulator.simulate(level, values, sample.targets, noise=0.01)
        step = training(sample, "zil", schedule="literal", init_noise=0.01)
        found = with_noise(sample, step, level, values)
        finite = {leaf: expected[leaf] for leaf in sample.leaves if np.abs(expected[leaf]).max(initial=0) < 1e6}
        if not finite:
            continue
        errors = simulator.relative_errors({leaf: found[leaf] for leaf in finite}, finite)
        assert all(error <= CLOSE for error in errors.values()), (seed, errors)
        compared += any(simulator.relative_errors(found, only(truth, sample))[leaf] > OFF for leaf in finite)
    assert compared >= 10


def with_noise(sample: Sample, step: Any, net: simulator.Net, values: simulator.Arrays) -> simulator.Arrays:
    """The gradients of an emitted graph whose noise is what ``simulator.simulate`` draws."""
    proto = onnx.ModelProto()
    proto.CopyFrom(step.model)
    rng = np.random.default_rng(0)
    drawn = {}
    shapes = dict(values)
    for vertex in net.vertices:
        shapes.update(zip(vertex.outputs, vertex.forward([shapes[t] for t in vertex.inputs]), strict=True))
        for tensor in vertex.outputs:
            if tensor not in net.clamped.values():
                origin, number, _ = tensor.partition("#")
                # An interior output keeps its name for the terminal; what it holds is called its value.
                held = f"{origin}#terminal" in net.clamped.values() and origin not in net.leaves
                name = f"{origin}.value" if held else origin
                name = f"{name}.id{net.level[tensor]}" if number else name
                drawn[name] = 0.01 * rng.standard_normal(shapes[tensor].shape)
    kept, feeds = [], {}
    for node in proto.graph.node:
        if node.op_type != "RandomNormalLike":
            kept.append(node)
            continue
        name = next(p.value for p in node.metadata_props if p.key == "zilc.vertex")
        feeds[node.output[0]] = drawn[name]
        info = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.DOUBLE, drawn[name].shape)
        proto.graph.input.append(info)
    assert feeds
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    signature = step.signature
    initial = {t.name: onnx.numpy_helper.to_array(t) for t in sample.model.graph.initializer}
    feeds |= sample.feeds | {p["name"]: initial[p["name"]] for p in signature["parameters"]}
    feeds |= {t["name"]: sample.targets[t["output"]] for t in signature["targets"]}
    made = run(proto, feeds, "unoptimized")
    return {p["name"]: made[p["grad"]] for p in (*signature["parameters"], *signature["input_grads"])}


@pytest.mark.parametrize("seed", range(15))
def test_who_stays_exact_on_random_graphs(seed: int) -> None:
    sample = random_graphs.seeded(7000 + seed, max_steps=20)
    net, _, truth = truth_of(sample)
    truth = only(truth, sample)
    # gamma = 1/2: a leaf of level l has 2^-(l-1) of its gradient, so level 1 is exact.
    halved = literal(sample, gamma=0.5)
    expected = {leaf: 0.5 ** (net.level[leaf] - 1) * g for leaf, g in truth.items()}
    assert max(simulator.relative_errors(halved, expected).values()) <= EXACT
    late = simulator.relative_errors(literal(sample, update_at="end"), truth)
    assert all(late[leaf] <= EXACT for leaf in truth if net.level[leaf] == net.k)
    unlevelled = simulator.relative_errors(literal(sample, identities="none"), truth)
    assert all(unlevelled[leaf] <= EXACT for leaf in truth if net.level[leaf] == 1)
    if simulator.count_identities(simulator.levelled(net, "edge")) == simulator.count_identities(net):
        assert max(unlevelled.values()) <= EXACT


# --- the paper's networks: rows of Tables 1 and 3 ---------------------------------------------------

#: name -> sizes; those of LEVEL need no identity.
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp2": {"inputs": 12, "hidden": 7, "classes": 4},
    "mlp4": {"inputs": 12, "hidden": 7, "classes": 4},
    "residual": {"inputs": 12, "hidden": 7, "classes": 4},
    "rnn": {"steps": 5, "inputs": 4, "hidden": 6, "outputs": 3},
    "transformer": {"vocabulary": 11, "length": 5, "d_model": 12, "heads": 3, "d_ff": 9},
    "decoder": {"vocabulary": 11, "length": 5, "d_model": 12, "heads": 3, "layers": 1},
    "alexnet": {"image": 63, "width": 4, "hidden": 16, "classes": 5},
    "resnet18": {"image": 16, "width": 3, "classes": 5, "blocks": (1, 2)},
}
LEVEL = ("mlp2", "mlp4", "alexnet")


def errors_of(name: str, **options: Any) -> tuple[dict[str, float], dict[str, int]]:
    """Relative error of each parameter against bp, and its level; in onnxruntime without fusions, float32."""
    model = models.build(name, **NETWORKS[name])
    feeds = models.random_feeds(model, 2, np.random.default_rng(0), loss="energy")

    def grads(**chosen: Any) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        step = zilc.emit_training(model, outputs="grad", **chosen)
        made = run(step.model, {**feeds, **{n: np.asarray(step.state[n]) for n in step.state}}, "unoptimized")
        entries = step.signature["parameters"]
        return {p["name"]: made[p["grad"]] for p in entries}, {p["name"]: p["level"] for p in entries}

    bp, levels = grads(algorithm="bp")
    found, _ = grads(**options)
    bad = {n: np.inf for n, g in found.items() if not np.isfinite(g).all()}
    whole = {n: g.astype(np.float64) for n, g in bp.items()}
    errors = simulator.relative_errors({n: found[n].astype(np.float64) for n in found}, whole)
    return {**errors, **bad}, levels


@pytest.mark.parametrize("name", NETWORKS)
def test_zil_is_exact(name: str) -> None:
    """Table 1, levelled: zero, in float32 too."""
    for options in ({}, {"schedule": "literal"}, {"schedule": "literal", "identities": "min"}):
        assert set(errors_of(name, **options)[0].values()) == {0.0}


@pytest.mark.parametrize("name", NETWORKS)
def test_without_levelling(name: str) -> None:
    """Table 1: level graphs stay exact, the others do not, but for the leaves of level 1."""
    errors, levels = errors_of(name, schedule="literal", identities="none")
    if name in LEVEL:
        assert set(errors.values()) == {0.0}
    else:
        assert max(errors.values()) > OFF
    assert all(errors[n] == 0.0 for n in errors if levels[n] == 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_gamma(name: str) -> None:
    """Table 3: level 1 exact, all others changed."""
    errors, levels = errors_of(name, schedule="literal", gamma=0.9)
    assert all((errors[n] == 0.0) == (levels[n] == 1) for n in errors)
    assert all(errors[n] > OFF for n in errors if levels[n] > 1 and not is_key_bias(n))


@pytest.mark.parametrize("name", NETWORKS)
def test_without_level_dependent_update(name: str) -> None:
    """Table 3: level K exact; of the others the nearest the output is off."""
    errors, levels = errors_of(name, schedule="literal", update_at="end")
    depth = max(levels.values())
    known = zilc.levelize(models.build(name, **NETWORKS[name])).report["levels"]
    assert all(errors[n] == 0.0 for n in errors if levels[n] == known)
    nearest = min(levels.values())
    assert all(errors[n] > OFF for n in errors if levels[n] == nearest < depth)


@pytest.mark.parametrize("name", NETWORKS)
def test_noise(name: str) -> None:
    """Table 3: nothing stays exact."""
    errors, _ = errors_of(name, schedule="literal", init_noise=0.1)
    assert min(e for n, e in errors.items() if not is_key_bias(n)) > 1e-6
    assert max(errors.values()) > OFF


def is_key_bias(name: str) -> bool:
    """Its gradient is zero but for rounding."""
    return "key" in name and "bias" in name


# --- inference learning -----------------------------------------------------------------------------

UNIT = """
<ir_version: 10, opset_import: ["" : 18]>
unit (double[1,1] x) => (double[1,1] y) <double[1,1] a = {0.75}, double[1,1] w = {1.5}, double[1] b = {0.25}> {
  h = MatMul(x, a)
  y = Gemm(h, w, b)
}
"""


def test_one_linear_unit_settles_at_its_least_energy() -> None:
    """eps_out = r / (1 + w^2), eps_h = w eps_out, x_h = mu_h - eps_h: not where backpropagation is."""
    proto = onnx.parser.parse_model(UNIT)
    x, a, w, b, y = 2.0, 0.75, 1.5, 0.25, 1.0
    h = a * x
    r = w * h + b - y
    feeds = {"x": np.full((1, 1), x), "target": np.full((1, 1), y)}

    def found(**options: Any) -> dict[str, float]:
        step = zilc.emit_training(proto, outputs="grad", wrt=["a", "w", "b"], **options)
        made = run(step.model, {**feeds, **{n: step.state[n] for n in step.state}}, "reference")
        return {n: float(made[f"{n}.grad"].squeeze()) for n in "awb"}

    eps = r / (1 + w * w)
    settled = found(algorithm="il", steps=200, gamma=0.2)
    assert settled == pytest.approx({"b": eps, "w": eps * (h - w * eps), "a": w * eps * x}, rel=1e-12)
    bp = found(algorithm="bp")
    assert bp == pytest.approx({"b": r, "w": r * h, "a": w * r * x}, rel=1e-14)
    assert found(algorithm="il", steps=200, gamma=0.2, fixed_predictions=True) == pytest.approx(bp, rel=1e-12)
    # One step of it, by hand: x_h = mu_h - gamma w r, eps_h = gamma w r.
    once = found(algorithm="il", steps=1, gamma=0.2)
    moved = h - 0.2 * w * r
    error = w * moved + b - y
    assert once == pytest.approx({"b": error, "w": error * moved, "a": 0.2 * w * r * x}, rel=1e-13)


def il_error(steps: int, *, residual: float = 1.0, name: str = "mlp4", **options: Any) -> float:
    """The largest relative error of inference learning against bp, float64, targets a residual from the outputs."""
    model = models.build(name, dtype="float64", **NETWORKS[name])
    feeds = models.random_feeds(model, 4, np.random.default_rng(0))
    output = model.graph.output[0].name
    rng = np.random.default_rng(1)
    made = run(model, feeds, "reference")[output]
    feeds["target"] = made - residual * rng.standard_normal(made.shape)

    def grads(**chosen: Any) -> dict[str, np.ndarray]:
        step = zilc.emit_training(model, outputs="grad", **chosen)
        got = run(step.model, {**feeds, **{n: np.asarray(step.state[n]) for n in step.state}}, "unoptimized")
        return {p["name"]: got[p["grad"]] for p in step.signature["parameters"]}

    found = grads(algorithm="il", steps=steps, **options)
    return max(simulator.relative_errors(found, grads(algorithm="bp")).values())


def test_with_fixed_predictions_it_converges_to_backpropagation() -> None:
    """gamma = 0.1 on four tanh layers: the error falls with T, to 1e-8 and below."""
    errors = [il_error(steps, gamma=0.1, fixed_predictions=True) for steps in (25, 50, 100, 200, 400)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[2] > 1e-2
    assert 1e-6 < errors[3] < 1e-4
    assert errors[4] <= 1e-8  # measured: 8e-13


@pytest.mark.parametrize("name", ["mlp4", "residual", "rnn", "transformer"])
def test_with_fixed_predictions_and_gamma_1_it_is_there_when_the_last_error_is(name: str) -> None:
    """The errors are then a triangular system, level by level: l - 1 sweeps do for a leaf of level l, on any graph."""
    report = zilc.levelize(models.build(name, **NETWORKS[name])).report
    deepest = max(leaf["level"] for leaf in report["leaves"] if leaf["trained"])
    assert il_error(deepest - 1, name=name, gamma=1.0, fixed_predictions=True) <= EXACT
    assert il_error(deepest - 2, name=name, gamma=1.0, fixed_predictions=True) > 1e-6


def test_without_them_it_settles_elsewhere() -> None:
    """More steps change nothing any more, and it is off; with a smaller residual by less, yet by as large a share."""
    long, longer = (il_error(steps, gamma=0.2) for steps in (400, 800))
    assert longer > 0.05
    assert abs(long - longer) < 1e-6 * longer
    small = [il_error(400, gamma=0.2, residual=r) for r in (1e-2, 1e-4)]
    # As eps_out = r / (1 + w^2) of one linear unit: the share w^2 / (1 + w^2) does not depend on r.
    assert all(error > 0.05 for error in small)
    assert abs(small[0] - small[1]) < 0.05 * small[1]


# --- from the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (["--schedule", "literal"], 0),
        (["--identities", "min"], 0),
        (["--schedule", "literal", "--identities", "none"], 1),
        (["--schedule", "literal", "--gamma", "0.5"], 1),
        (["--schedule", "literal", "--update-at", "end"], 1),
        (["--schedule", "literal", "--init-noise", "0.1"], 1),
        (["--algorithm", "il"], 1),
        (["--algorithm", "il", "--fixed-predictions", "--gamma", "1"], 0),
        (["--algorithm", "bp"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_rows_of_the_tables_from_the_command_line(
    zilc_command: Command, tmp_path: Path, options: list[str], status: int
) -> None:
    """``zilc verify`` passes what is exact and fails every ablation; the other commands take the options too."""
    path = tmp_path / "residual.onnx"
    onnx.save(models.build("residual", **NETWORKS["residual"]), path)
    result = zilc_command("verify", path, *options, "--json", "--precision", "float64", "--dim", "N=3")
    assert (result.status, result.err) == (status, "")
    assert result.json["passed"] == (status == 0)
    assert zilc_command("emit-training", path, *options, "-o", tmp_path / "step.onnx").status == 0
    data = tmp_path / "data.npz"
    rng = np.random.default_rng(0)
    np.savez(data, input=rng.standard_normal((8, 12)).astype("f"), target=rng.standard_normal((8, 4)).astype("f"))
    trained = zilc_command(
        "train", path, "--data", data, *options, "--lr", "0.001", "--epochs", "1", "--batch-size", "4",
        "-o", tmp_path / "trained.onnx", "--json",
    )  # fmt: skip
    assert trained.status == 0 or "is not finite after the last update" in trained.err  # it diverges, and says so


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--gamma", "0.5"], "--schedule: --gamma changes the dynamics, which the wavefront has folded away"),
        (["--identities", "none"], "Add --schedule literal."),
        (["--algorithm", "bp", "--steps", "3"], "--algorithm bp: reverse mode has no --steps"),
    ],
)
def test_contradictions_are_one_line(zilc_command: Command, tmp_path: Path, options: list[str], text: str) -> None:
    path = tmp_path / "mlp2.onnx"
    onnx.save(models.build("mlp2", inputs=3, hidden=3, classes=2), path)
    for command in (["emit-training", path], ["verify", path]):
        result = zilc_command(*command, *options)
        assert result.status == 1
        assert result.out == ""
        assert len(result.err.splitlines()) == 1
        assert text in result.err


def test_the_report_prints_how_far_inference_learning_is_from_backpropagation(
    zilc_command: Command, tmp_path: Path
) -> None:
    """One linear unit, T = 1: eps_out, h and their products by hand, as in the test of where it settles."""
    path = tmp_path / "unit.onnx"
    onnx.save(onnx.parser.parse_model(UNIT), path)
    feeds = tmp_path / "feeds.npz"
    x, a, w, b, y = 2.0, 0.75, 1.5, 0.25, 1.0
    np.savez(feeds, x=np.full((1, 1), x), target=np.full((1, 1), y))
    h = a * x
    r = w * h + b - y
    eps = r / (1 + w * w)
    bp = np.asarray([r, r * h, w * r * x])  # of b, w and a
    settled = np.asarray([eps, eps * (h - w * eps), w * eps * x])
    far = float(np.linalg.norm(settled - bp) / np.linalg.norm(bp))
    chosen = ["--algorithm", "il", "--gamma", "0.2", "--steps", "200", "--wrt", "*", "--inputs", feeds]
    result = zilc_command("verify", path, "--precision", "float64", *chosen)
    assert result.status == 1
    assert f"distance of IL's update from BP's, relative to BP's: {far:.3g}\n" in result.out
    found = zilc_command("verify", path, "--precision", "float64", *chosen, "--json").json
    assert found["divergence"] == pytest.approx(far, rel=1e-9)
    # With fixed predictions it has converged.
    fixed = zilc_command("verify", path, "--precision", "float64", *chosen, "--fixed-predictions", "--json").json
    assert fixed["divergence"] < 1e-12


def test_the_tables_can_be_measured(tmp_path: Path) -> None:
    """``tools/paper_tables.py`` gives zero where the paper does, and Z-IL runs the very nodes of BP."""
    tool, rows = Path(__file__).parent.parent / "tools" / "paper_tables.py", tmp_path / "rows.json"
    rows.write_text(json.dumps({"table1": {}}))

    def measured(*options: str) -> str:
        command = [sys.executable, "-W", "ignore", tool, "--networks", "mlp2", "--json", rows, *options]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    made = measured("--tables", "1,2,3", "--rounds", "2", "--slow", "il")
    one, placements, two, three = (line for line in made.splitlines() if line.startswith("| MLP, 2 layers"))
    assert (one.count("**0**"), three.count("**0**")) == (6, 4)
    assert placements == "| MLP, 2 layers | 0 | 0 | 0 | 0 |"
    assert "nodes, the same, in the same order" in two
    assert made.count("\n- ") == 1  # one machine, whatever it measured


def test_rows_measured_before_are_left_out_on_resuming() -> None:
    from tools import paper_tables

    entry = {"facts": paper_tables.facts((0.0, 0.0, 0.0))}
    assert paper_tables.fresh(entry)
    assert not paper_tables.fresh(None)
    others = [("date", "2020-01-01T00:00:00+00:00"), ("date", "2026-01-01"), ("numpy", "1.0"), ("machine", "")]
    for key, value in others:
        assert not paper_tables.fresh({"facts": {**entry["facts"], key: value}})


def test_graphs_that_differ_have_other_nodes() -> None:
    """What the table calls the same nodes is told apart by operator, attribute, operand and order."""
    from tools.paper_tables import optimised_nodes

    body = "g (float[2, 3] x) => (float[2, 3] y) {{ a = Tanh (x)  b = {op} (x)  y = Mul ({order}) }}"

    def nodes(**parts: str) -> list[bytes]:
        parts = {"op": "LeakyRelu <alpha = 0.5>", "order": "a, b", **parts}
        text = f'<ir_version: 10, opset_import: ["" : 18]> {body.format(**parts)}'
        return optimised_nodes(onnx.parser.parse_model(text))

    same = nodes()
    assert same == nodes()
    assert len(same) == 3
    for other in ({"op": "LeakyRelu <alpha = 0.25>"}, {"op": "Sigmoid"}, {"order": "b, a"}, {"order": "a, a"}):
        assert set(nodes(**other)) != set(same), other


@pytest.fixture
def zilc_command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)
