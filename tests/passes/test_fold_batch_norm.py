"""BatchNormalization folded into the Conv before it: when, and that updates stay what they are."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest

import zilc
from tests.graphs import initial, model
from zilc.executors import executor

#: A grouped convolution with a bias, one whose weight has two readers, and a residual edge.
NET = """
<ir_version: 10, opset_import: ["" : 18]>
net (float[3,4,6,5] x) => (float[3,6] y)
   <float[6,2,3,3] w1, float[6] b1, float[6] s1, float[6] h1, float[6] m1, float[6] v1,
    float[6,6,3,3] w2, float[6] s2, float[6] h2, float[6] m2, float[6] v2,
    float[6] s3, float[6] h3, float[6] m3, float[6] v3> {
  c1 = Conv<group = 2, pads = [1, 1, 1, 1], strides = [2, 1]>(x, w1, b1)
  n1 = BatchNormalization<epsilon = 0.01>(c1, s1, h1, m1, v1)
  r1 = Relu(n1)
  c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2)
  n2 = BatchNormalization(c2, s2, h2, m2, v2)
  r2 = Relu(n2)
  c3 = Conv<pads = [1, 1, 1, 1]>(r2, w2)
  n3 = BatchNormalization(c3, s3, h3, m3, v3)
  a = Add(n3, r1)
  p = GlobalAveragePool(a)
  y = Flatten(p)
}
"""


def net(dtype: str = "float64", text: str = NET) -> onnx.ModelProto:
    made = model(text, dtype=dtype)
    for tensor in made.graph.initializer:
        if tensor.name.startswith("v"):  # a variance
            array = np.abs(onnx.numpy_helper.to_array(tensor)) + np.asarray(0.5, dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return made


def run(step: zilc.pipeline.TrainingStep, dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((3, 4, 6, 5)).astype(dtype), "target": rng.standard_normal((3, 6)).astype(dtype)}
    return executor(step.model)(initial(step, feeds, lr=0.25))


def count(step: zilc.pipeline.TrainingStep) -> Counter:
    return Counter(node.op_type for node in step.model.graph.node)


def assert_same_updates(folded, plain, atol=1e-13):
    """Those of ``folded``, of SGD, are what the gradients of ``plain`` say."""
    made, apart = run(folded, "float64"), run(plain, "float64")
    for entry, other in zip(folded.signature["parameters"], plain.signature["parameters"], strict=True):
        p = np.asarray(folded.state[entry["name"]])
        moved = 0.25 * apart[other["grad"]]
        assert np.abs(moved).max() > 1e-6, entry["name"]
        np.testing.assert_allclose(made[entry["next"]], p - moved, rtol=0, atol=atol, err_msg=entry["name"])
    np.testing.assert_allclose(made["y"], apart["y"], rtol=0, atol=atol)
    np.testing.assert_allclose(made["loss"], apart["loss"], rtol=1e-12)


@pytest.mark.parametrize("algorithm", ["zil", "bp"])
def test_updates_are_those_of_the_gradients(algorithm):
    folded = zilc.emit_training(net(), algorithm=algorithm)
    plain = zilc.emit_training(net(), algorithm=algorithm, outputs="grad")
    assert count(folded)["BatchNormalization"] == 0
    assert count(plain)["BatchNormalization"] == 3
    assert_same_updates(folded, plain)


def test_adam_takes_the_same_step():
    folded = zilc.emit_training(net(), optimizer="adam")
    plain = zilc.emit_training(net(), optimizer="adam", outputs="both")
    assert count(folded)["BatchNormalization"] == 0
    made, apart = run(folded, "float64"), run(plain, "float64")
    for entry in folded.signature["parameters"]:
        np.testing.assert_allclose(made[entry["next"]], apart[entry["next"]], rtol=0, atol=1e-8)


def test_zil_is_bp_bit_for_bit_and_float32_is_near():
    zil, bp = (zilc.emit_training(net("float32"), algorithm=algorithm) for algorithm in ("zil", "bp"))
    made, other = run(zil, "float32"), run(bp, "float32")
    exact = run(zilc.emit_training(net()), "float64")
    for entry in zil.signature["parameters"]:
        assert made[entry["next"]].tobytes() == other[entry["next"]].tobytes()
        np.testing.assert_allclose(made[entry["next"]], exact[entry["next"]], rtol=1e-4, atol=1e-5)


def test_frozen_scales_fold_too():
    options = {"freeze": ["s?", "h?"]}
    folded = zilc.emit_training(net(), **options)
    assert count(folded)["BatchNormalization"] == 0
    assert_same_updates(folded, zilc.emit_training(net(), outputs="grad", **options))


def test_a_frozen_weight_keeps_its_normalizations():
    """The gradient of a scale is taken from the weight's, which is not there."""
    folded = zilc.emit_training(net(), freeze=["w2"])
    assert count(folded)["BatchNormalization"] == 2
    assert_same_updates(folded, zilc.emit_training(net(), outputs="grad", freeze=["w2"]))


def test_what_a_convolution_gives_may_be_wanted_elsewhere():
    output = net(text=NET.replace("(float[3,6] y)", "(float[3,6] y, float[3,6,3,5] c2)"))
    step = zilc.emit_training(output, output="y")
    assert count(step)["BatchNormalization"] == 1
    assert_same_updates(step, zilc.emit_training(output, output="y", outputs="grad"))
    read_twice = net(text=NET.replace("Add(n3, r1)", "Add(n3, c1)"))
    step = zilc.emit_training(read_twice)
    assert count(step)["BatchNormalization"] == 1
    assert_same_updates(step, zilc.emit_training(read_twice, outputs="grad"))


def test_a_weight_that_is_computed_is_left_alone():
    text = NET.replace("c3 = Conv<pads = [1, 1, 1, 1]>(r2, w2)", "w4 = Tanh(w2) c3 = Conv<pads = [1, 1, 1, 1]>(r2, w4)")
    step = zilc.emit_training(net(text=text))
    assert count(step)["BatchNormalization"] == 1
    assert_same_updates(step, zilc.emit_training(net(text=text), outputs="grad"))


def test_half_precision_is_left_alone():
    step = zilc.emit_training(net("float32"), precision="float16")
    assert count(step)["BatchNormalization"] == 3


@pytest.mark.parametrize("op", ["Conv", "BatchNormalization"])
def test_a_rule_of_the_users_stays_in_force(op):
    """Whether it is registered before zilc compiles for the first time, in a process of its own, or later."""
    rule = {
        "Conv": 'lambda op, g, y, x, w, b, **_: op.Mul(x, 3.0), lambda op, g, y, x, w, b, **_: op.Mul(w, 3.0), None',
        "BatchNormalization": "lambda op, g, y, x, s, h, m, v, **_: op.Mul(g, 3.0), None, None, None, None",
    }[op]
    program = f"""
from zilc import rules
rules.defvjp("{op}", {rule}, replace=True)
import zilc
from tests.passes.test_fold_batch_norm import count, net
assert count(zilc.emit_training(net("float32"), wrt=["w1", "w2"]))["BatchNormalization"] == 3
rules.remove("{op}")
assert count(zilc.emit_training(net("float32")))["BatchNormalization"] == 0
with rules.scoped():
    rules.defvjp("{op}", {rule}, replace=True)
    assert count(zilc.emit_training(net("float32"), wrt=["w1", "w2"]))["BatchNormalization"] == 3
assert count(zilc.emit_training(net("float32")))["BatchNormalization"] == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_node_has_a_vertex_and_the_forward_part_its_role():
    step = zilc.emit_training(net("float32"))
    for node in step.model.graph.node:
        props = {p.key: p.value for p in node.metadata_props}
        assert props.get("zilc.vertex"), node.name
        assert props.get("zilc.role"), node.name
