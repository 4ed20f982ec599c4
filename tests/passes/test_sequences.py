"""Sequences of known content are taken apart; others stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import zilc
from zilc.errors import MissingRule
from zilc.executors import executor

SEQUENCES = {
    "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SequenceAt", "SequenceLength",
    "ConcatFromSequence", "SplitToSequence", "SequenceMap", "Optional", "OptionalGetElement", "OptionalHasElement",
}  # fmt: skip

BODIES = {
    "split into chunks, joined anew": """
        k = Constant <value_int: int = 4> ()
        s = SplitToSequence <axis = 0> (x, k)
        zero = Constant <value_int: int = 0> ()
        one = Constant <value_int: int = 1> ()
        a = SequenceAt (s, zero)
        b = SequenceAt (s, one)
        c = Concat <axis = 0> (b, b)
        d = Mul (a, c)
        t = SequenceConstruct (d, c)
        y = ConcatFromSequence <axis = 1, new_axis = 1> (t)
    """,
    "single slices": """
        s = SplitToSequence <axis = 1, keepdims = 0> (x)
        last = Constant <value_int: int = -1> ()
        a = SequenceAt (s, last)
        e = SequenceErase (s)
        b = SequenceAt (e, last)
        y = Mul (a, b)
    """,
    "built element by element": """
        e = SequenceEmpty ()
        f = SequenceInsert (e, x)
        zero = Constant <value_int: int = 0> ()
        z = Sin (x)
        g = SequenceInsert (f, z, zero)
        n = SequenceLength (g)
        m = CastLike (n, x)
        a = ConcatFromSequence <axis = -1> (g)
        y = Mul (a, m)
    """,
    "optional": """
        o = Optional (x)
        has = OptionalHasElement (o)
        a = OptionalGetElement (o)
        b = Sin (a)
        y = Where (has, b, x)
    """,
    "an element is an output": """
        s = SplitToSequence <axis = 1> (x)
        zero = Constant <value_int: int = 0> ()
        y = SequenceAt (s, zero)
    """,
    "mapped": """
        s = SplitToSequence <axis = 0> (x)
        t = SequenceMap (s, w) <body = f (float[1, 2] u, float[2] v) => (float[1, 2] r) {
            p = Mul (u, v)
            r = Sin (p)
        }>
        y = ConcatFromSequence <axis = 0> (t)
    """,
}


def _model(body: str, shape: str) -> onnx.ModelProto:
    text = f'<ir_version: 9, opset_import: ["" : 18]> g (float[6, 2] x, float[2] w) => (float[{shape}] y) {{ {body} }}'
    return onnx.parser.parse_model(text)


def _shape(name: str) -> str:
    return {"split into chunks, joined anew": "4, 2, 2", "single slices": "6", "built element by element": "6, 4",
            "an element is an output": "6, 1"}.get(name, "6, 2")  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_taken_apart(name: str) -> None:
    model = _model(BODIES[name], _shape(name))
    rng = np.random.default_rng(3)
    feeds = {"x": rng.standard_normal((6, 2)).astype(np.float32), "w": rng.random(2).astype(np.float32)}
    made = zilc.levelize(model, identities="none").model
    assert not SEQUENCES & {node.op_type for node in made.graph.node}
    expected = executor(model)(feeds)["y"]
    np.testing.assert_allclose(executor(made)(feeds)["y"], expected, rtol=1e-6)
    step = zilc.emit_training(model, wrt=["x"], outputs="grad")
    assert not SEQUENCES & {node.op_type for node in step.model.graph.node}
    target = np.zeros_like(expected)
    grad = step.signature["input_grads"][0]["grad"]
    got = executor(step.model)({**feeds, "target": target})[grad].astype(np.float64)
    v = rng.standard_normal((6, 2))
    h = 1e-2

    def energy(x: np.ndarray) -> float:
        y = executor(model)({**feeds, "x": x.astype(np.float32)})["y"]
        return 0.5 * float(np.sum(np.square(y, dtype=np.float64)))

    slope = (energy(feeds["x"] + h * v) - energy(feeds["x"] - h * v)) / (2 * h)
    # float32, and a step of 1e-2.
    assert np.sum(got * v) == pytest.approx(slope, rel=1e-2, abs=1e-3)


def test_chunks_of_a_length_known_at_run_time() -> None:
    body = """
        s = SplitToSequence <axis = 0> (x, k)
        one = Constant <value_int: int = 1> ()
        y = SequenceAt (s, one)
    """
    text = f'<ir_version: 9, opset_import: ["" : 18]> g (float[6, 2] x, int64 k) => (float[n, 2] y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    step = zilc.emit_training(model, wrt=["x"], outputs="grad")
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    grad = step.signature["input_grads"][0]["grad"]
    got = executor(step.model)({"x": x, "k": np.asarray(4), "target": np.zeros((2, 2), np.float32)})
    np.testing.assert_array_equal(got[grad], np.where(np.arange(6)[:, None] >= 4, x, 0))


def test_a_position_known_at_run_time_is_refused() -> None:
    body = "s = SplitToSequence <axis = 0> (x)  y = SequenceAt (s, k)"
    text = f'<ir_version: 9, opset_import: ["" : 18]> g (float[6, 2] x, int64 k) => (float[1, 2] y) {{ {body} }}'
    with pytest.raises(MissingRule, match="SequenceAt"):
        zilc.emit_training(onnx.parser.parse_model(text), wrt=["x"], outputs="grad")
