"""zilc on random graphs, against a simulator that shares no code with it (ZIL.md, section 8: points 1, 2, 4, 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings

import zilc
from tests import random_graphs, simulator
from tests.random_graphs import Sample

EXACT = 1e-12  # float64, relative; see simulator.relative_errors
PLACEMENTS = ("edge", "shared")

moderate = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

#: name -> (model, trained outputs): what random graphs reach seldom or never.
CORNERS = {
    "an input and a parameter are graph outputs": (
        "g (double[2, 3] x) => (double[2, 3] x, double[3] w, double[2, 3] y) <double[3] w = {0.5, -0.75, 1.25}>"
        "{ h = Mul (x, w)  y = Tanh (h) }",
        ["x", "w", "y"],
    ),
    "only an input": ("g (double[3] x) => (double[3] y) { y = Neg (x) }", ["x"]),
    "two names of one value": (
        "g (double[2, 3] x) => (double[2, 3] a, double[2, 3] b) { h = Tanh (x)  a = Identity (h)  b = Identity (h) }",
        ["b", "a"],
    ),
    "two names of one value, one of them read": (
        "g (double[2, 3] x) => (double[2, 3] a, double[2, 3] c)"
        "{ h = Tanh (x)  a = Identity (h)  b = Identity (a)  c = Sigmoid (b) }",
        ["b", "a", "c"],
    ),
    "an Identity of an input, read and trained": (
        "g (double[2, 3] x) => (double[2, 3] c) { b = Identity (x)  d = Mul (b, x)  c = Sigmoid (d) }",
        ["c", "b"],
    ),
    "one piece of a Split trained, the other read": (
        "g (double[2, 4] x) => (double[2, 2] p, double[2, 2] y)"
        "{ h = Tanh (x)  p, q = Split <axis = 1, num_outputs = 2> (h)  y = Mul (q, q) }",
        ["y", "p"],
    ),
    "both pieces of a Split trained": (
        "g (double[2, 4] x) => (double[2, 2] p, double[2, 2] q)"
        "{ h = Tanh (x)  p, q = Split <axis = 1, num_outputs = 2> (h) }",
        ["q", "p"],
    ),
    "one piece of a Split trained, the other left": (
        "g (double[2, 4] x) => (double[2, 2] p, double[2, 2] q)"
        "{ h = Tanh (x)  p, q = Split <axis = 1, num_outputs = 2> (h) }",
        ["q"],
    ),
    # Its gradient pads between two Transposes, where onnxruntime ignores the axes of a Pad.
    "a Slice between two Transposes": (
        "g (double[2, 3] x) => (double[2, 2] y) <int64[1] a = {0}, int64[1] b = {2}>"
        "{ t = Transpose <perm = [1, 0]> (x)  s = Slice (t, a, b, a)  y = Transpose <perm = [1, 0]> (s) }",
        ["y"],
    ),
    "an operand on three levels, twice on one": (
        "g (double[2, 3] x) => (double[2, 3] y)"
        "{ a = Tanh (x)  b = Mul (a, a)  c = Add (b, a)  d = Mul (c, a)  e = Mul (a, a)  y = Add (d, e) }",
        ["y"],
    ),
    "a Where between an operand and itself": (
        "g (double[2, 3] x, bool[3] m) => (double[2, 3] y) { a = Tanh (x)  y = Where (m, a, a) }",
        ["y"],
    ),
}


# --- helpers ----------------------------------------------------------------------------------------


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], executor: str) -> dict[str, np.ndarray]:
    """All outputs of a model by name: from the reference evaluator, onnxruntime, or onnxruntime unoptimized.

    onnxruntime's own graph optimizations can change a result: as of 1.31 it fuses MatMul(Transpose(a), v) with a
    vector v into a product that is wrong.  Values are therefore judged without them, bits with and without.
    """
    names = [o.name for o in model.graph.output]
    if executor == "reference":
        values = onnx.reference.ReferenceEvaluator(model).run(names, feeds)
    else:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if executor == "unoptimized":
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values = session.run(names, feeds)
    return dict(zip(names, map(np.asarray, values), strict=True))


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two sets of arrays agree in names, dtypes, shapes and bytes."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def levelized(sample: Sample, identities: str) -> Any:
    return zilc.levelize(sample.model, identities=identities, output=sample.outputs)


def training(sample: Sample, algorithm: str, **options: Any) -> Any:
    """The training graph that gives the gradient of every leaf, inputs among them."""
    return zilc.emit_training(
        sample.model,
        output=sample.outputs,
        loss="energy",
        wrt=sample.leaves,
        outputs="grad",
        algorithm=algorithm,
        **options,
    )


def gradients(sample: Sample, step: Any, executor: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The gradients and the loss that a training graph computes, by its signature alone."""
    signature = step.signature
    initial = {t.name: onnx.numpy_helper.to_array(t) for t in sample.model.graph.initializer}
    feeds = dict(sample.feeds)
    feeds |= {p["name"]: initial[p["name"]] for p in signature["parameters"]}
    feeds |= {t["name"]: sample.targets[t["output"]] for t in signature["targets"]}
    found = run(step.model, feeds, executor)
    both = (*signature["parameters"], *signature["input_grads"])
    return {p["name"]: found[p["grad"]] for p in both}, found[signature["loss"]]


def corner(name: str) -> Sample:
    """One of the corners, with random inputs and targets."""
    text, outputs = CORNERS[name]
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}')
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
    rng = np.random.default_rng(0)
    feeds = {}
    for info in model.graph.input:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        values = np.round(rng.uniform(0.3, 1.2, shape) * 256) / 256
        feeds[info.name] = values if info.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE else values > 0.7
    values = simulator.evaluate(model, feeds)
    targets = {n: np.round(values[n] * 64) / 64 - rng.integers(1, 5, values[n].shape) / 8 for n in outputs}
    leaves = simulator.network(model, outputs).leaves
    return Sample(model, feeds, outputs, targets, leaves, [n for n in leaves if n in feeds])


# --- what must hold ---------------------------------------------------------------------------------


def clamped(sample: Sample, model: onnx.ModelProto) -> list[str]:
    """Trained outputs by their names in a levelled model, where a leaf keeps its own name beside its terminal."""
    made = {name for node in model.graph.node for name in node.output}
    return [name if name in made else f"{name}.clamped" for name in sample.outputs]


def check_levelize(sample: Sample) -> None:
    """Outputs to the bit, levelled from scratch, the simulator's levels and counts, twice the same as once."""
    net = simulator.network(sample.model, sample.outputs)
    single = sample.cast(np.float32)
    # Unoptimized, onnxruntime picks another kernel where an Identity stands between a product and its constant.
    runs = [(sample, "reference"), (single, "onnxruntime")]
    before = [run(s.model, s.feeds, executor) for s, executor in runs]
    vertex = {t: n.name or n.output[0] for n in sample.model.graph.node for t in n.output}
    file_identities = {vertex[n.output[0]] for n in sample.model.graph.node if n.op_type == "Identity"}
    expected = {vertex[v.outputs[0]]: net.level[v.outputs[0]] for v in net.vertices if v.outputs[0] in vertex}
    expected |= {leaf: net.level[leaf] for leaf in net.leaves}
    terminals = simulator.count_identities(net)
    for identities in PLACEMENTS:
        made = levelized(sample, identities)
        onnx.checker.check_model(made.model, full_check=True)
        assert simulator.check_levelled(made.model, clamped(sample, made.model)) == []
        for (s, executor), original in zip(runs, before, strict=True):
            after = run(levelized(s, identities).model, s.feeds, executor)
            assert same_bits(original, {name: after[name] for name in original}), executor

        found = {n: level for n, level in made.levels.items() if not n.endswith(".terminal")}
        assert {n: level for n, level in found.items() if n not in file_identities} == expected
        assert made.report["levels"] == net.k
        total = simulator.count_identities(simulator.levelled(net, identities))
        assert simulator.active_identities(made.model, clamped(sample, made.model)) == total
        assert made.report["identities"][identities]["vertices"] == total - terminals

        again = zilc.levelize(made.model, identities=identities, output=sample.outputs)
        assert again.model.SerializeToString(deterministic=True) == made.model.SerializeToString(deterministic=True)


def check_gradients(sample: Sample, *executors: str) -> None:
    """Z-IL equals BP bit for bit in float32 and float64; in float64 both equal the simulator."""
    net = simulator.network(sample.model, sample.outputs)
    values = simulator.evaluate(sample.model, sample.feeds)
    reverse = simulator.reverse_mode(net, values, sample.targets)
    dynamics = simulator.simulate(simulator.levelled(net, "edge"), values, sample.targets)

    single = sample.cast(np.float32)
    zil, bp = training(single, "zil"), training(single, "bp")
    for executor in ("onnxruntime", "unoptimized"):
        found, loss = gradients(single, zil, executor)
        yardstick, its_loss = gradients(single, bp, executor)
        assert same_bits(found, yardstick), executor
        assert same_bits({"loss": loss}, {"loss": its_loss}), executor

    zil, bp = training(sample, "zil"), training(sample, "bp")
    assert zil.signature["levels"] == net.k
    levels = {p["name"]: p["level"] for p in (*zil.signature["parameters"], *zil.signature["input_grads"])}
    assert levels == {leaf: net.level[leaf] for leaf in sample.leaves}
    for executor in executors:
        found, loss = gradients(sample, zil, executor)
        assert same_bits(found, gradients(sample, bp, executor)[0]), executor
        assert {k: g.shape for k, g in found.items()} == {k: values[k].shape for k in sample.leaves}
        for truth in (reverse, dynamics):
            errors = simulator.relative_errors(found, {leaf: truth[leaf] for leaf in sample.leaves})
            assert max(errors.values()) <= EXACT, (executor, errors)
        energy = simulator.energy(values, sample.targets)
        assert abs(float(loss) - energy) <= EXACT * energy


# --- the properties ---------------------------------------------------------------------------------


@moderate
@given(random_graphs.samples())
def test_levelize(sample: Sample) -> None:
    check_levelize(sample)


@pytest.mark.parametrize("seed", range(40))
def test_levelize_seeded(seed: int) -> None:
    check_levelize(random_graphs.seeded(seed))


@moderate
@given(random_graphs.samples())
def test_gradients(sample: Sample) -> None:
    check_gradients(sample, "reference", "unoptimized")


@pytest.mark.parametrize("seed", range(60))
def test_gradients_seeded(seed: int) -> None:
    check_gradients(random_graphs.seeded(1000 + seed, max_steps=24), "reference", "unoptimized")


@pytest.mark.parametrize("seed", range(30))
def test_gradients_with_symbolic_dimensions(seed: int) -> None:
    """Every dimension of every input is symbolic, so that broadcasting is undone at run time."""
    sample = random_graphs.seeded(2000 + seed).symbolic()
    check_gradients(sample, "reference")


@pytest.mark.parametrize("name", CORNERS)
def test_corners(name: str) -> None:
    sample = corner(name)
    check_levelize(sample)
    check_gradients(sample, "reference", "unoptimized")


@pytest.mark.parametrize("identities", PLACEMENTS)
def test_gradients_do_not_depend_on_the_placement(identities: str) -> None:
    """Levels decide the order of sums, so edge and shared chains give the same bits, in float32 and float64."""
    for seed in range(20):
        sample = random_graphs.seeded(seed)
        for dtype, executor in ((np.float32, "onnxruntime"), (np.float64, "reference")):
            cast = sample.cast(dtype)
            found, _ = gradients(cast, training(cast, "zil", identities=identities), executor)
            assert same_bits(found, gradients(cast, training(cast, "bp"), executor)[0])


def test_one_leaf_alone_gets_the_same_gradient() -> None:
    """Which leaves are trained changes what is emitted, never a level or a bit."""
    for seed in range(10):
        sample = random_graphs.seeded(seed)
        everything, _ = gradients(sample, training(sample, "zil"), "reference")
        for leaf in sample.leaves:
            alone = Sample(sample.model, sample.feeds, sample.outputs, sample.targets, [leaf])
            found, _ = gradients(alone, training(alone, "zil"), "reference")
            assert same_bits(found, {leaf: everything[leaf]})
