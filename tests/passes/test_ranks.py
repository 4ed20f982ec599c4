"""Dimensions that a model leaves open."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import zilc
from zilc import ir, onnx_io
from zilc.passes.inline import iterations_read
from zilc.passes.prepare import lift_constants, prepare
from zilc.testing import run


def _model(text: str, opset: int = 18) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')


@pytest.mark.parametrize(
    ("reader", "expected"),
    [
        ("y = Softmax<axis = 1>(s)", [1]),
        ("y = Softmax<axis = -2>(s)", [1]),
        ("y = Transpose<perm = [1, 0]>(s)", [1]),
        ("t = Relu(s) y = Softmax<axis = 1>(t)", [1]),
        ("y = Softmax<axis = 0>(s)", None),  # one dimension would do
        ("y = Relu(s)", None),
    ],
)
def test_axes_of_a_squeeze_follow_from_its_readers(reader: str, expected: list[int] | None) -> None:
    model = _model(f"g (float[N,1,3] x) => (float[A,B] y) {{ s = Squeeze(x) {reader} }}")
    graph = prepare(onnx_io.load(model)).graph
    squeeze = next(node for node in graph.nodes if node.op == "Squeeze")
    axes = [int(a) for a in squeeze.inputs[1].values] if len(squeeze.inputs) > 1 else None
    assert axes == expected
    if expected is not None:
        x = np.random.default_rng(0).random((2, 1, 3), np.float32)
        step = zilc.emit_training(model, wrt=["x"], outputs="grad")
        (y,) = run(model, {"x": x})
        names = [o.name for o in step.model.graph.output]
        got = dict(zip(names, run(step.model, {"x": x, "target": y - 1}), strict=True))
        assert got["x.grad"].shape == x.shape


def test_bounds_of_a_range_become_scalars() -> None:
    text = "g (float[2] x, int64[1] n) => (float[K,2] y) { z = Constant<value_int = 0>() o = Constant<value_int = 1>()"
    model = _model(text + " r = Range(z, n, o) f = Cast<to = 1>(r) a = Constant<value_ints = [1]>()"
                          " u = Unsqueeze(f, a) y = Mul(u, x) }")  # fmt: skip
    step = zilc.emit_training(model, wrt=["x"], outputs="grad")
    names = [o.name for o in step.model.graph.output]
    feeds = {"x": np.ones(2, np.float32), "n": np.asarray([4]), "target": np.zeros((4, 2), np.float32)}
    got = dict(zip(names, run(step.model, feeds, "onnxruntime"), strict=True))
    np.testing.assert_array_equal(got["x.grad"], np.full(2, 0 + 1 + 4 + 9, np.float32))


_GROWING = """g (float[2] x, int64 trips, bool go) => (float[2] y)
    {{ s = SequenceConstruct(x)
      {wrapped}
      t = Loop(trips, go, {carried}) <body = b (int64 i, bool c, seq(float[2]) old) => (bool more, seq(float[2]) new)
        {{ more = Identity(c) f = Cast<to = 1>(i) e = Add(x, f) new = SequenceInsert(old, e{place}) }}>
      k = Constant<value_int = {position}>()
      y = SequenceAt(t, k) }}"""


@pytest.mark.parametrize(("position", "expected"), [(0, None), (1, 1), (3, 3), (-1, None)])
def test_an_element_says_how_far_a_loop_has_come(position: int, expected: int | None) -> None:
    """Elements that every iteration appends do not depend on how many more follow."""
    model = _model(_GROWING.format(wrapped="", carried="s", place="", position=position))
    graph = lift_constants(ir.to_graph(model))
    loop = next(n for n in graph.nodes if n.op == "Loop")
    assert iterations_read(loop) == expected
    if expected is None:
        return
    step = zilc.emit_training(model, wrt=["x"], outputs="grad")
    feeds = {"x": np.asarray([1, 2], np.float32), "trips": np.asarray(5), "go": np.asarray(True)}
    names = [o.name for o in step.model.graph.output]
    got = dict(zip(names, run(step.model, {**feeds, "target": np.zeros(2, np.float32)}), strict=True))
    np.testing.assert_array_equal(got["x.grad"], feeds["x"] + expected - 1)
    np.testing.assert_array_equal(run(model, feeds)[0], got["y"])


def test_an_element_put_in_front_moves_the_others() -> None:
    text = _GROWING.format(wrapped="zero = Constant<value_int = 0>()", carried="s", place=", zero", position=1)
    graph = lift_constants(ir.to_graph(_model(text)))
    assert iterations_read(next(n for n in graph.nodes if n.op == "Loop")) is None
