"""The simulator against reverse mode, central differences, levels by hand; what each ablation must break."""

import collections

import numpy as np
import onnx.parser
import pytest
from hypothesis import HealthCheck, given, settings

from tests import random_graphs, simulator
from tests.random_graphs import Sample

EXACT = 1e-12  # float64, relative; see simulator.relative_errors

moderate = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

SKIP = """
<ir_version: 10, opset_import: ["" : 18]>
g (double[2, 3] x) => (double[2, 3] y)
<double[3, 3] w = {0.5, -0.3, 0.2, 0.1, 0.7, -0.4, -0.6, 0.25, 0.9}>
{
    h = MatMul (x, w)
    r = Tanh (h)
    s = Tanh (r)
    y = Add (s, h)
}
"""

# Level already: every path from a tensor to y has one length, though x is read twice.
LEVEL = """
<ir_version: 10, opset_import: ["" : 18]>
g (double[2, 3] x) => (double[2, 3] y)
<double[3, 3] w = {0.5, -0.3, 0.2, 0.1, 0.7, -0.4, -0.6, 0.25, 0.9}, double[3] b = {0.1, -0.2, 0.3}>
{
    h = MatMul (x, w)
    s = Mul (x, b)
    r = Tanh (h)
    q = Sigmoid (s)
    y = Mul (r, q)
}
"""

# w on levels 2 and 4 of a tied chain; u is a leaf of level 1.
TIED = """
<ir_version: 10, opset_import: ["" : 18]>
g (double[2, 3] x) => (double[2, 3] y)
<double[3, 3] w = {0.5, -0.3, 0.2, 0.1, 0.7, -0.4, -0.6, 0.25, 0.9},
 double[3, 3] u = {1, 0.5, 0, 0, -1, 0.5, 0.25, 0, 1}>
{
    a = MatMul (x, w)
    b = Tanh (a)
    c = MatMul (b, w)
    d = Tanh (c)
    y = MatMul (d, u)
}
"""

# a is tapped on levels 0, 1 and 2, and twice by the last Mul.
TAPS = """
<ir_version: 10, opset_import: ["" : 18]>
g (double[2, 3] x) => (double[2, 3] y)
{
    a = Tanh (x)
    b = Mul (a, a)
    c = Add (b, a)
    d = Mul (c, a)
    e = Mul (a, a)
    y = Add (d, e)
}
"""

FROZEN = """
<ir_version: 10, opset_import: ["" : 18]>
g (double[2, 3] x) => (double[2, 3] y)
<double[3] w = {0.5, -0.75, 1.0}, double zero = {0.0}>
{
    a = Mul (x, w)
    b = Tanh (a)
    m = Greater (b, zero)
    f = Cast <to = 11> (m)
    n = Not (m)
    c = Where (n, a, b)
    s = Shape (c)
    d = Reshape (x, s)
    dead = Exp (c)
    i = Identity (c)
    p = Mul (i, f)
    y = Add (p, d)
}
"""

PIECES = """
<ir_version: 10, opset_import: ["" : 18]>
g (double[2, 4] x) => (double[2, 2] p, double[2, 2] y)
<double[2] w = {0.5, -0.75}>
{
    h = Tanh (x)
    p, q = Split <axis = 1, num_outputs = 2> (h)
    y = Mul (q, w)
}
"""


def prepared(text: str, outputs: tuple[str, ...] = ("y",)) -> tuple[Sample, simulator.Net, simulator.Arrays]:
    """A hand-written model with random inputs and targets."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(text)
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    feeds = {name: rng.uniform(0.3, 1.2, shape) for name, shape in shapes.items()}
    values = simulator.evaluate(model, feeds)
    targets = {name: values[name] - rng.uniform(0.3, 1.0, values[name].shape) for name in outputs}
    sample = Sample(model, feeds, list(outputs), targets)
    return sample, simulator.network(model, outputs), values


def prepare(sample: Sample) -> tuple[simulator.Net, simulator.Arrays, simulator.Arrays]:
    """The graph, its forward values, and the gradients of reverse mode."""
    net = simulator.network(sample.model, sample.outputs)
    values = simulator.evaluate(sample.model, sample.feeds)
    return net, values, simulator.reverse_mode(net, values, sample.targets)


def worst(found: simulator.Arrays, truth: simulator.Arrays) -> float:
    return max(simulator.relative_errors(found, truth).values())


# --- levels and identities by hand -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "outputs", "levels", "edge", "shared"),
    [
        (SKIP, ("y",), {"y": 0, "s": 1, "r": 2, "h": 3, "x": 4, "w": 4}, 2, 2),
        (LEVEL, ("y",), {"y": 0, "r": 1, "q": 1, "h": 2, "s": 2, "x": 3, "w": 3, "b": 3}, 0, 0),
        (TIED, ("y",), {"y": 0, "d": 1, "u": 1, "c": 2, "b": 3, "a": 4, "w": 5, "x": 5}, 2, 2),
        # a on level 4; gaps to b, c, d, e: 0 twice, 1, 2, 2 twice.
        (TAPS, ("y",), {"y": 0, "d": 1, "e": 1, "c": 2, "b": 3, "a": 4, "x": 5}, 7, 2),
        # m, f, n, s carry no derivative, dead leads nowhere, i is removed: a -> c and x -> d have gaps.
        (FROZEN, ("y",), {"y": 0, "p": 1, "d": 1, "c": 2, "b": 3, "a": 4, "x": 5, "w": 5}, 4, 4),
        # The Split is read by Mul, so p gets a terminal identity.
        (PIECES, ("p", "y"), {"y": 0, "p#terminal": 0, "p": 1, "q": 1, "w": 1, "h": 2, "x": 3}, 1, 1),
        (PIECES, ("p",), {"p": 0, "q": 0, "h": 1, "x": 2}, 0, 0),
        # An interior output, and an input as output: terminal identities, and chains that reach level 0.
        (
            TIED,
            ("y", "b"),
            {"b#terminal": 0, "y": 0, "d": 1, "u": 1, "c": 2, "b": 3, "a": 4, **dict.fromkeys("wx", 5)},
            5,
            5,
        ),
        (SKIP, ("x",), {"x#terminal": 0, "x": 1}, 1, 1),
        (SKIP, ("y", "x"), {"x#terminal": 0, "y": 0, "s": 1, "r": 2, "h": 3, "x": 4, "w": 4}, 6, 6),
    ],
)
def test_levels_known_by_hand(
    text: str, outputs: tuple[str, ...], levels: dict[str, int], edge: int, shared: int
) -> None:
    _, net, _ = prepared(text, outputs)
    assert net.level == levels
    assert simulator.count_identities(simulator.levelled(net, "edge")) == edge
    assert simulator.count_identities(simulator.levelled(net, "shared")) == shared


def test_check_levelled_tells_level_from_not() -> None:
    assert simulator.check_levelled(onnx.parser.parse_model(LEVEL), ["y"]) == []
    broken = simulator.check_levelled(onnx.parser.parse_model(SKIP), ["y"])
    assert broken == [
        "tensor 'h': paths of 1 to 3 edges",
        "tensor 'x': paths of 2 to 4 edges",
        "tensor 'w': paths of 2 to 4 edges",
    ]
    mended = SKIP.replace("y = Add (s, h)", "i = Identity (h)\n j = Identity (i)\n y = Add (s, j)")
    assert simulator.check_levelled(onnx.parser.parse_model(mended), ["y"]) == []
    # An output that is consumed has a path of no edges and longer ones.
    assert simulator.check_levelled(onnx.parser.parse_model(LEVEL), ["y", "r"]) != []
    frozen = simulator.check_levelled(onnx.parser.parse_model(FROZEN), ["m"])
    assert frozen == ["output 'm' is not made from any leaf"]


# --- reverse mode and the theorem ------------------------------------------------------------------


@moderate
@given(random_graphs.samples())
def test_reverse_mode_equals_central_differences(sample: Sample) -> None:
    """Along random directions in float64, to 1e-6 of |gradient| |direction|."""
    net, values, truth = prepare(sample)
    rng, h = np.random.default_rng(0), 1e-5
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in sample.model.graph.initializer}
    for leaf in sample.leaves:
        v = rng.standard_normal(values[leaf].shape)
        moved = []
        for sign in (1, -1):
            changed = {**arrays, **sample.feeds, leaf: values[leaf] + sign * h * v}
            moved.append(simulator.energy(_forward(sample.model, changed), sample.targets))
        numeric, exact = (moved[0] - moved[1]) / (2 * h), float(np.sum(truth[leaf] * v))
        # The energy's rounding, 1e-16 F / h, is part of the scale: a gradient may be zero.
        scale = np.linalg.norm(truth[leaf]) * np.linalg.norm(v)
        assert abs(numeric - exact) <= 1e-6 * (scale + 1e-3 * simulator.energy(values, sample.targets)), leaf
    assert net.k >= 1


def _forward(model: onnx.ModelProto, changed: dict[str, np.ndarray]) -> simulator.Arrays:
    """The forward pass with initializers replaced."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:]
    return simulator.evaluate(bare, changed)


@moderate
@given(random_graphs.samples())
def test_zil_equals_reverse_mode(sample: Sample) -> None:
    """On every random graph, with errors carried (1e-12) and with errors recomputed (1e-9: they cancel)."""
    net, values, truth = prepare(sample)
    for identities in ("edge", "shared"):
        level = simulator.levelled(net, identities)
        gaps = [level.level[t] - level.level[j.outputs[0]] for j, _, t in level.edges()]
        assert set(gaps) <= {1}
        assert worst(simulator.simulate(level, values, sample.targets), truth) <= EXACT
        assert worst(simulator.simulate(level, values, sample.targets, recompute=True), truth) <= 1e-9


def test_random_graphs_hold_every_difficulty() -> None:
    """What the random graphs are for turns up in them, often."""
    seen: collections.Counter[str] = collections.Counter()
    operators: set[str] = set()
    for seed in range(150):
        sample = random_graphs.seeded(seed)
        seen.update(sample.features)
        operators.update(node.op_type for node in sample.model.graph.node)
    wanted = {
        "skip", "shared leaf", "operand twice", "broadcasting", "several trained outputs",
        "interior output", "leaf as output", "identity as output", "identity in file",
        "several outputs of one vertex", "frozen branch", "dead branch", "constant vertex",
        "leaf on odd level", "leaf on even level",
    }  # fmt: skip
    assert set(seen) == wanted
    assert min(seen.values()) >= 8, seen
    assert operators >= set(simulator.VJP)


def test_seeded_graphs_repeat() -> None:
    once, again = random_graphs.seeded(3), random_graphs.seeded(3)
    assert once.model.SerializeToString() == again.model.SerializeToString()
    assert once.outputs == again.outputs


# --- the ablations break what they must, and nothing else ------------------------------------------


@moderate
@given(random_graphs.samples())
def test_gamma_scales_a_leaf_by_its_level(sample: Sample) -> None:
    """With gamma = 1/2 a leaf of level l gets gamma^(l-1) times its gradient; level 1 is exact."""
    net, values, truth = prepare(sample)
    level = simulator.levelled(net, "shared")
    found = simulator.simulate(level, values, sample.targets, gamma=0.5)
    expected = {leaf: 0.5 ** (net.level[leaf] - 1) * g for leaf, g in truth.items()}
    assert worst(found, expected) <= EXACT


@moderate
@given(random_graphs.samples())
def test_printed_sign_is_wrong_on_even_levels(sample: Sample) -> None:
    """Eq. 7 as printed gives (-1)^(l-1) times the gradient of a leaf of level l."""
    net, values, truth = prepare(sample)
    found = simulator.simulate(simulator.levelled(net, "shared"), values, sample.targets, printed_sign=True)
    assert worst(found, {leaf: (-1) ** (net.level[leaf] - 1) * g for leaf, g in truth.items()}) <= EXACT


@moderate
@given(random_graphs.samples())
def test_update_at_end_keeps_the_highest_level(sample: Sample) -> None:
    net, values, truth = prepare(sample)
    found = simulator.simulate(simulator.levelled(net, "shared"), values, sample.targets, at_end=True)
    errors = simulator.relative_errors(found, truth)
    assert all(errors[leaf] <= EXACT for leaf in net.leaves if net.level[leaf] == net.k)


@moderate
@given(random_graphs.samples())
def test_without_levelling_a_level_graph_matches(sample: Sample) -> None:
    """Where nothing had to be inserted, the dynamics on the graph as it is are exact."""
    net, values, truth = prepare(sample)
    found = simulator.simulate(net, values, sample.targets)
    if simulator.count_identities(simulator.levelled(net, "edge")) == simulator.count_identities(net):
        assert worst(found, truth) <= EXACT
    # Whatever the gaps, a leaf of level 1 reads only clamped outputs, at t = 0.
    errors = simulator.relative_errors(found, truth)
    assert all(errors[leaf] <= EXACT for leaf in net.leaves if net.level[leaf] == 1)


def test_ablations_by_hand() -> None:
    """On the tied chain (levels 1 and 5): each ablation is off by more than 1e-3 where it must be."""
    sample, net, values = prepared(TIED)
    level = simulator.levelled(net, "shared")
    truth = simulator.reverse_mode(net, values, sample.targets)

    def errors(graph: simulator.Net, **ablation: float) -> dict[str, float]:
        found = simulator.simulate(graph, values, sample.targets, **ablation)  # type: ignore[arg-type]
        return simulator.relative_errors(found, truth)

    assert max(errors(level).values()) <= EXACT
    unlevelled = errors(net)
    assert unlevelled["w"] > 1e-3
    assert max(unlevelled["u"], unlevelled["x"]) <= EXACT  # one path each: u on level 1, x on level K
    gamma = errors(level, gamma=0.9)
    assert gamma["u"] <= EXACT
    assert min(gamma["w"], gamma["x"]) > 1e-3
    end = errors(level, at_end=True)
    assert end["u"] > 1e-3
    assert max(end["w"], end["x"]) <= EXACT
    assert min(errors(level, noise=0.1).values()) > 1e-3


@pytest.mark.parametrize("ablation", ["levels", "gamma", "noise", "end"])
def test_ablations_diverge_on_random_graphs(ablation: str) -> None:
    """Over seeded graphs of at least 3 levels with skips, each ablation is off (> 1e-6) on most."""
    off = total = 0
    for seed in range(80):
        net, values, truth = prepare(sample := random_graphs.seeded(seed))
        if net.k < 3 or "skip" not in sample.features:
            continue
        level = net if ablation == "levels" else simulator.levelled(net, "shared")
        found = simulator.simulate(
            level,
            values,
            sample.targets,
            gamma=0.9 if ablation == "gamma" else 1.0,
            noise=0.1 if ablation == "noise" else 0.0,
            at_end=ablation == "end",
        )
        total += 1
        off += worst(found, truth) > 1e-6
    assert total >= 20
    assert off > 0.6 * total, f"{off} of {total}"


def test_clamped_residual_of_1e_6_needs_carried_errors() -> None:
    """In float32 a tiny residual is lost in mu - x, and kept by carried errors."""
    sample, _, _ = prepared(TIED)
    single = sample.cast(np.float32)
    net, values, _ = prepare(single)
    rng = np.random.default_rng(1)
    y = values["y"] - (1e-6 * rng.standard_normal(values["y"].shape)).astype(np.float32)
    level = simulator.levelled(net, "shared")
    truth = simulator.reverse_mode(net, values, {"y": y})
    assert worst(simulator.simulate(level, values, {"y": y}), truth) <= 1e-6
    assert worst(simulator.simulate(level, values, {"y": y}, recompute=True), truth) >= 1e-3
