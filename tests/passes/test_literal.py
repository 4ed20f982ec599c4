"""The dynamics run as they stand give the wavefront: on random graphs, on the paper's networks, behind overflow.

Where the kernels are the same, eps + (mu' - mu) - (eps - s) is exactly s for eps = 0 and mu' = mu, so the two schedules
agree as numbers (0 ulp); only a zero may have another sign (0 - (0 - -0) = 0).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import zilc
from tests import random_graphs
from tests.graphs import SKIP, model
from tests.random_graphs import Sample
from tests.test_properties import CORNERS, corner, gradients, run, same_bits, training
from zilc import models
from zilc.errors import OptionError
from zilc.executors import executor

#: Levels that the wave has passed overflow, which numpy says aloud in onnx's evaluator.
pytestmark = pytest.mark.filterwarnings(
    "ignore:divide by zero:RuntimeWarning", "ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
)

#: name -> (sizes, batch): the paper's networks, small where they are deep.
NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "mlp2": ({}, 20),
    "mlp3": ({}, 20),
    "mlp4": ({}, 20),
    "residual": ({"inputs": 40, "hidden": 16}, 20),
    "rnn": ({"steps": 5, "inputs": 4, "hidden": 6, "outputs": 3}, 4),
    "transformer": ({"vocabulary": 11, "length": 5, "d_model": 12, "heads": 3, "d_ff": 9}, 2),
    "decoder": ({"vocabulary": 11, "length": 5, "d_model": 12, "heads": 3, "layers": 2}, 2),
    "alexnet": ({"image": 63, "width": 4, "hidden": 16, "classes": 5}, 2),
    "resnet18": ({"image": 33, "width": 4, "classes": 5}, 2),
    "digits": ({}, 2),
}
#: Largest norm-wise difference of the two schedules in units of the last place, by network and precision, 0 by default.
#: onnxruntime fuses Conv with Relu where nothing else reads the Conv, which rounds otherwise; numpy's sums depend on
#: the layout of an array in memory, and onnx's evaluator gives the loop's arrays another one.
ULPS = {
    ("digits", "float32"): 4, ("decoder", "float32"): 4, ("decoder", "float64"): 4, ("alexnet", "float64"): 4,
    ("resnet18", "float64"): 4,
}  # fmt: skip


def same_numbers(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Equal but for the sign of zeros; what is not finite is equal to nothing."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and np.array_equal(a[k], b[k]) for k in a
    )


def check(sample: Sample, *, identities: str = "shared", executors: tuple[str, ...] = ("unoptimized",)) -> None:
    for dtype in (np.float32, np.float64):
        cast = sample.cast(dtype)
        wave, literal = (
            training(cast, "zil", identities=identities, schedule=schedule) for schedule in ("wavefront", "literal")
        )
        assert (literal.signature["schedule"], literal.signature["levels"]) == ("literal", wave.signature["levels"])
        for name in executors:
            expected, loss = gradients(cast, wave, name)
            found, its_loss = gradients(cast, literal, name)
            assert same_numbers(found, expected), (dtype, name)
            assert loss == its_loss


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs(seed: int) -> None:
    check(random_graphs.seeded(3000 + seed, max_steps=20), executors=("unoptimized", "reference"))


@pytest.mark.parametrize("name", CORNERS)
def test_corners(name: str) -> None:
    check(corner(name))


@pytest.mark.parametrize("identities", ["edge", "min", "min-bytes"])
def test_other_placements(identities: str) -> None:
    for seed in range(8):
        check(random_graphs.seeded(seed, max_steps=20), identities=identities)


def test_symbolic_dimensions() -> None:
    for seed in range(8):
        check(random_graphs.seeded(2000 + seed).symbolic(), executors=("reference",))


def test_the_random_graphs_are_not_trivial() -> None:
    """Among those above: several outputs, outputs that are leaves or interior, leaves on even and odd levels, skips."""
    features = set().union(*(random_graphs.seeded(3000 + seed, max_steps=20).features for seed in range(30)))
    assert features >= {
        "skip", "shared leaf", "operand twice", "several trained outputs", "interior output", "leaf as output",
        "several outputs of one vertex", "leaf on odd level", "leaf on even level", "frozen branch",
    }  # fmt: skip


# --- the paper's networks ---------------------------------------------------------------------------


def network_gradients(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
    step = zilc.emit_training(proto, loss="cross-entropy", outputs="grad", **options)
    made = executor(step.model)({**feeds, **{name: np.asarray(step.state[name]) for name in step.state}})
    return {p["name"]: made[p["grad"]] for p in step.signature["parameters"]}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_paper_networks(name: str, dtype: str) -> None:
    """literal = wavefront to ULPS; wavefront = bp bit for bit, by every placement."""
    sizes, batch = NETWORKS[name]
    proto = models.build(name, dtype=dtype, **sizes)
    feeds = models.random_feeds(proto, batch, np.random.default_rng(0), loss="cross-entropy")
    bp = network_gradients(proto, feeds, algorithm="bp")
    for identities in ("shared", "min"):
        assert same_bits(network_gradients(proto, feeds, identities=identities), bp)
    literal = network_gradients(proto, feeds, schedule="literal")
    allowed = ULPS.get((name, dtype), 0) * float(np.finfo(dtype).eps)
    largest = max(np.linalg.norm(g) for g in bp.values())
    for key, expected in bp.items():
        assert np.isfinite(literal[key]).all(), key
        # A key bias's gradient is zero but for rounding.
        scale = largest if key.endswith("key.bias") else np.linalg.norm(expected)
        assert np.linalg.norm(literal[key] - expected) <= allowed * scale, key


def test_a_constant_exponent_that_two_levels_share() -> None:
    """It is delayed by identity vertices, whose pulls y ln x have no value at a negative base: none may come to be."""
    sample = sample_of(
        """g (double[2,3] x) => (double[2,3] y)
            <double[3,3] w1, double[3,3] w2, double[3,3] w3, double three = {3}>
            { a = MatMul(x, w1)  b = Pow(a, three)  c = MatMul(b, w2)  d = Pow(c, three)  y = MatMul(d, w3) }""",
        ["y"],
    )
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in sample.model.graph.initializer}
    assert ((sample.feeds["x"] @ arrays["w1"]) ** 3 @ arrays["w2"] < 0).any()
    found = gradients(sample, training(sample, "zil", schedule="literal"), "reference")[0]
    expected = gradients(sample, training(sample, "bp"), "reference")[0]
    assert all(np.isfinite(expected[name]).all() for name in ("w1", "w2", "w3"))
    assert all(np.allclose(found[name], expected[name], rtol=1e-14, atol=0) for name in ("w1", "w2", "w3"))


# --- what is hard about it --------------------------------------------------------------------------


def sample_of(text: str, outputs: list[str], *, residual: float = 0.5, seed: int = 0) -> Sample:
    """A float64 graph in text, with random inputs, parameters ``w…`` and targets a residual away."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}')
    for number, node in enumerate(proto.graph.node):
        node.name = f"n{number}"
    rng = np.random.default_rng(seed)
    declared = [v for v in proto.graph.value_info if v.name.startswith("w")]
    del proto.graph.value_info[:]
    for info in declared:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        array = np.round(rng.uniform(-1, 1, shape) * 256) / 256
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, info.name))
    feeds = {}
    for info in proto.graph.input:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        values = np.round(rng.uniform(-1, 1, shape) * 256) / 256
        boolean = info.type.tensor_type.elem_type == onnx.TensorProto.BOOL
        feeds[info.name] = np.asarray(values > -2) if boolean else values
    made = run(proto, feeds, "reference")
    targets = {name: np.round(made[name] * 256) / 256 - residual for name in outputs}
    leaves = [t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.DOUBLE]
    return Sample(proto, feeds, outputs, targets, leaves, [])


def test_levels_behind_the_wave_may_overflow() -> None:
    """A residual of 1e4 drives Exp past float32's range on levels that the wave has passed; no gradient shows it."""
    sample = sample_of(
        "g (double[2, 3] x) => (double[2, 3] y)"
        "<double[3, 3] w1, double[3, 3] w2, double[3, 3] w3, double[3, 3] w4>"
        "{ a = MatMul (x, w1)  b = Exp (a)  c = MatMul (b, w2)  d = Exp (c)  e = MatMul (d, w3)  f = Exp (e)"
        "  y = MatMul (f, w4) }",
        ["y"],
        residual=1e4,
    ).cast(np.float32)
    expected, _ = gradients(sample, training(sample, "zil"), "unoptimized")
    found, _ = gradients(sample, training(sample, "zil", schedule="literal"), "unoptimized")
    assert all(np.isfinite(g).all() for g in expected.values())
    assert same_numbers(found, expected)
    late, _ = gradients(sample, training(sample, "zil", schedule="literal", update_at="end"), "unoptimized")
    assert not np.isfinite(late["w4"]).all()  # so it did overflow
    assert same_numbers({"w1": late["w1"]}, {"w1": expected["w1"]})


def test_optional_outputs_that_rules_read() -> None:
    """MaxPool's indices and LayerNormalization's statistics are predictions of the step like any other."""
    check(
        sample_of(
            "g (double[2, 2, 6] x) => (double[2, 2, 3] y) <double[6] w1, double[3] w2, double[3] w3>"
            "{ a = Mul (x, w1)  b = MaxPool <kernel_shape = [2], strides = [2]> (a)  c = Tanh (b)"
            "  y = LayerNormalization (c, w2, w3) }",
            ["y"],
        )
    )


def test_an_operand_without_derivative_stays_at_its_forward_value() -> None:
    """Running statistics made by an active vertex: the edge takes no part in levels, so that vertex moves too early."""
    sample = sample_of(
        "g (double[4, 3] x) => (double[4, 3] y, double[3] z)"
        "<double[4, 3] w1, double[3] w2, double[3] w3, double[3] w4, int64[1] rows = {0}, double[3] v = {1, 2, 0.5}>"
        "{ a = Mul (x, w1)  m = ReduceMean <keepdims = 0> (a, rows)  z = Neg (m)"
        "  b = BatchNormalization (a, w2, w3, m, v)  c = Tanh (b)  d = Mul (c, w4)  y = Tanh (d) }",
        ["y", "z"],
    )
    sample.leaves.remove("v")
    # m is on level 1 and moves in step 0; the normalization is on level 3, and its error passes in step 3.
    levels = zilc.levelize(sample.model, output=["y", "z"]).levels
    assert (levels["n1"], levels["n3"]) == (1, 3)
    check(sample)
    check(sample, identities="min")


def test_control_flow_vertex() -> None:
    """The branch of an If reads the state of the step, not the forward values outside."""
    sample = sample_of(
        "g (double[4] x, bool c) => (double[4] y) <double[4] w1, double[4] w2>"
        "{ a = Mul (x, w1)  b = Exp (a)  i = If (c) <then_branch = t () => (double[4] p) { p = Mul (a, b) },"
        " else_branch = e () => (double[4] q) { q = Sub (b, a) }>  y = Mul (i, w2) }",
        ["y"],
    )
    expected, _ = gradients(sample, training(sample, "zil"), "unoptimized")
    for identities in ("shared", "edge"):
        literal = training(sample, "zil", schedule="literal", identities=identities)
        assert same_numbers(gradients(sample, literal, "unoptimized")[0], expected)
    # Were the branch to read what is outside, inference learning would not see it move either.
    fixed = training(sample, "il", steps=3, gamma=0.5, fixed_predictions=True)
    free = training(sample, "il", steps=3, gamma=0.5)
    a, b = (gradients(sample, step, "unoptimized")[0]["w1"] for step in (fixed, free))
    assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(a)


def test_a_frozen_parameter_is_written_once() -> None:
    """The loop reads it from outside."""
    proto = models.build("mlp2", inputs=40, hidden=30)
    step = zilc.emit_training(proto, loss="cross-entropy", freeze="layer1.weight", schedule="literal")
    loop = next(n for n in step.model.graph.node if n.op_type == "Loop")
    assert "layer1.weight" in {t.name for t in step.model.graph.initializer}
    assert all(np.prod(t.dims) <= 64 for t in loop.attribute[0].g.initializer)


def test_small_residual_keeps_the_precision_of_backpropagation() -> None:
    """float32, output residual 1e-6: recomputing eps as mu - x would lose most of it (ZIL.md, section 5)."""
    sample = sample_of(
        "g (double[2, 3] x) => (double[2, 3] y) <double[3, 3] w1, double[3, 3] w2, double[3, 3] w3>"
        "{ a = MatMul (x, w1)  b = Tanh (a)  c = MatMul (b, w2)  d = Tanh (c)  y = MatMul (d, w3) }",
        ["y"],
    ).cast(np.float32)
    outputs = run(sample.model, sample.feeds, "unoptimized")
    sample.targets["y"] = outputs["y"] - np.float32(1e-6)
    wave, _ = gradients(sample, training(sample, "zil"), "unoptimized")
    literal, _ = gradients(sample, training(sample, "zil", schedule="literal"), "unoptimized")
    assert same_numbers(literal, wave)
    assert all(np.any(g) for g in wave.values())


# --- the emitted graph, options ---------------------------------------------------------------------


def test_one_loop_of_standard_operators() -> None:
    step = zilc.emit_training(model(SKIP), schedule="literal", outputs="grad")
    loops = [n for n in step.model.graph.node if n.op_type == "Loop"]
    assert len(loops) == 1
    count = next(t for t in step.model.graph.initializer if t.name == loops[0].input[0])
    # K steps, and the round before them that makes the first predictions.
    assert onnx.numpy_helper.to_array(count) == step.signature["levels"] + 1
    nodes = [*step.model.graph.node, *loops[0].attribute[0].g.node]
    assert {n.domain for n in nodes} == {""}
    onnx.checker.check_model(step.model, full_check=True)


@pytest.mark.parametrize("options", [{}, {"init_noise": 0.1}, {"identities": "none"}, {"algorithm": "il"}])
def test_onnxruntime_says_nothing(options: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    proto = models.build("residual", inputs=9, hidden=5)
    step = zilc.emit_training(proto, **{"schedule": "literal", "algorithm": "zil", **options})
    capfd.readouterr()
    onnxruntime.InferenceSession(step.model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert capfd.readouterr().err == ""


def test_too_few_steps_leave_the_far_leaves_alone() -> None:
    sample = random_graphs.seeded(3, max_steps=20)
    wave = training(sample, "zil")
    levels = {p["name"]: p["level"] for p in (*wave.signature["parameters"], *wave.signature["input_grads"])}
    steps = max(levels.values()) - 1
    expected, _ = gradients(sample, wave, "unoptimized")
    found, _ = gradients(sample, training(sample, "zil", schedule="literal", steps=steps), "unoptimized")
    assert {level > steps for level in levels.values()} == {True, False}
    for name, level in levels.items():
        assert np.array_equal(found[name], expected[name] if level <= steps else np.zeros_like(expected[name]))


def test_the_same_input_gives_the_same_bytes() -> None:
    once, again = (
        zilc.emit_training(model(SKIP), schedule="literal", init_noise=0.1).model.SerializeToString(deterministic=True)
        for _ in range(2)
    )
    assert once == again


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gamma": 0.5}, "--gamma changes the dynamics"),
        ({"identities": "none"}, "--identities none changes the dynamics"),
        ({"steps": 3, "init_noise": 0.1, "schedule": "wavefront"}, "--steps, --init-noise changes the dynamics"),
        ({"algorithm": "bp", "fixed_predictions": True}, "reverse mode has no --fixed-predictions"),
        ({"algorithm": "bp", "schedule": "literal"}, "reverse mode has no schedule"),
        ({"algorithm": "il", "schedule": "wavefront"}, "inference learning has no wavefront"),
        ({"algorithm": "il", "identities": "shared"}, "inference learning runs on the graph as it is"),
        ({"schedule": "literal", "steps": 0}, "0 inference steps, expected at least 1"),
        ({"schedule": "literal", "init_noise": -1.0}, "-1.0 is negative"),
        ({"schedule": "literal", "update_at": "never"}, "no choice 'never'"),
        ({"identities": "fewest"}, "no choice 'fewest'"),
    ],
)
def test_contradictions_are_one_line(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError) as caught:
        zilc.emit_training(model(SKIP), **options)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
