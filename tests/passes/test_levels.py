"""Levels by hand, the active part, and what takes no part in levels."""

import numpy as np
import onnx
import onnx.parser
import pytest

import zilc
from tests.graphs import CHAIN, SKIP, WEAVE, model
from zilc import analysis


def levels(text, **options):
    found = analysis.structure(model(text), **options)
    named = {found.flow.names[v]: n for v, n in enumerate(found.levels.vertices)}
    return found.levels.depth, {**named, **found.levels.leaves}


def test_chain():
    depth, by_name = levels(CHAIN)
    assert depth == 3
    assert by_name == {"fc2": 0, "act": 1, "fc1": 2, "x": 3, "w1": 3, "b1": 3, "w2": 1}


def test_longest_path_counts():
    depth, by_name = levels(SKIP)
    assert depth == 6
    assert by_name == {
        "out": 0, "relu": 1, "join": 2, "act": 3, "bias": 4, "fc1": 5, "w2": 1, "b1": 5, "w1": 6, "x": 6,
    }  # fmt: skip


def test_consumed_output_gets_a_terminal():
    depth, by_name = levels(WEAVE, output=["h", "y"])
    assert by_name["h.terminal"] == 0
    assert by_name["last"] == 0
    assert by_name["shift"] == 3
    assert by_name["b"] == 4  # read by `last` (level 0) and by `shift` (level 3)
    assert depth == 6 == by_name["w"]


def test_levels_do_not_depend_on_what_is_trained():
    a, b = zilc.levelize(model(SKIP), wrt=["w2"]), zilc.levelize(model(SKIP), freeze=["w1"])
    assert a.levels == b.levels == zilc.levelize(model(SKIP)).levels


@pytest.mark.parametrize(
    ("line", "frozen"),
    [
        ("s = Shape(h1)\n z = ConstantOfShape(s)\n h2 = Add(h1, z)", {"s", "z"}),
        ("k = Greater(h1, h1)\n h2 = Where(k, h1, h1)", {"k"}),
        ("i = ArgMax<axis=1,keepdims=1>(h1)\n f = Cast<to=1>(i)\n h2 = Add(h1, f)", {"i", "f"}),
    ],
)
def test_edges_without_a_derivative_take_no_part(line, frozen):
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (float[N,4] x) => (float[N,4] h2) <float[4,4] w> {{ h1 = MatMul(x, w)
    {line} }}"""
    found = analysis.structure(model(text))
    assert not frozen & set(found.flow.names)
    assert found.levels.depth == 2


def test_running_statistics_are_frozen():
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[N,4] x) => (float[N,4] y) <float[4] s, float[4] b, float[4] m, float[4] v> {
      y = BatchNormalization(x, s, b, m, v) }"""
    found = analysis.structure(model(text))
    assert found.flow.leaves == ["x", "s", "b"]


def test_identity_nodes_of_the_file_are_removed_first():
    text = SKIP.replace("[join] h3 = Add(h2, x)", "i1 = Identity(h2)\n i2 = Identity(i1)\n [join] h3 = Add(i2, x)")
    assert levels(text) == levels(SKIP)


def test_a_leaf_that_is_the_output():
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2] x) => (float[2] y, float[2] x) { y = Neg(x) }'
    )
    found = analysis.structure(proto, output="x")
    assert found.levels.leaves == {"x": 1}
    step = zilc.emit_training(proto, output="x", wrt="x", outputs="grad")
    from zilc.executors import executor

    x, y = np.float32([1, 2]), np.float32([3, 5])
    assert executor(step.model)({"x": x, "target": y})["x.grad"].tolist() == [-2, -3]
