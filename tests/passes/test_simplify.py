"""Clean-up: what it joins, what it leaves alone, and that values stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

import zilc
from tests.graphs import initial, model
from zilc.executors import executor
from zilc.pipeline import TrainingStep

#: One weight and one bias at three time steps.
SHARED = """
<ir_version: 10, opset_import: ["" : 18]>
shared (float[8,4] x) => (float[8,6] y) <float[6,4] v, float[6,6] w, float[6] b> {
  h0 = Gemm<transB = 1>(x, v)
  a1 = Gemm<transB = 1>(h0, w, b)
  h1 = Tanh(a1)
  a2 = Gemm<transB = 1>(h1, w, b)
  h2 = Tanh(a2)
  y = Gemm<transB = 1>(h2, w, b)
}
"""


def shared(rows: int = 8, dtype: str = "float32") -> onnx.ModelProto:
    return model(SHARED.replace("[8,", f"[{rows},"), dtype=dtype)


def updates(proto: onnx.ModelProto, dtype: str, **options) -> tuple[TrainingStep, dict]:
    step = zilc.emit_training(proto, **options)
    rng = np.random.default_rng(0)
    rows = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    feeds = {"x": rng.standard_normal((rows, 4)).astype(dtype), "target": rng.standard_normal((rows, 6)).astype(dtype)}
    return step, executor(step.model)(initial(step, feeds, lr=0.25))


def count(step) -> Counter:
    return Counter(node.op_type for node in step.model.graph.node if "gradient" in node.name)


@pytest.mark.parametrize("algorithm", ["zil", "bp"])
def test_sums_over_time_are_one_product(algorithm):
    """Three products and two additions of w's gradient, three sums and two additions of b's."""
    joined = count(updates(shared(2), "float32", algorithm=algorithm)[0])
    assert joined["Gemm"] == 2  # of v, of w
    assert joined["Concat"] == 2
    assert joined["ReduceSum"] == joined["Sum"] == 1
    assert joined["Add"] == 0


def test_gradients_keep_their_order_of_sums():
    plain = Counter(node.op_type for node in updates(shared(2), "float32", outputs="both")[0].model.graph.node)
    assert plain["Gemm"] == 4 + 3 + 4  # forward, errors, gradients
    assert plain["Concat"] == 0


def test_a_large_batch_is_not_copied():
    """Eight rows of 6 + 6 are more than a gradient of 6 x 6."""
    assert count(updates(shared(8), "float32")[0])["Concat"] == 0


@pytest.mark.parametrize("rows", [2, 8])
def test_joined_or_not_the_update_is_the_same(rows):
    proto = shared(rows, "float64")
    step, made = updates(proto, "float64")
    both, apart = updates(proto, "float64", outputs="both")
    for entry, other in zip(step.signature["parameters"], both.signature["parameters"], strict=True):
        p = np.asarray(step.state[entry["name"]])
        np.testing.assert_allclose(made[entry["next"]], p - 0.25 * apart[other["grad"]], rtol=0, atol=1e-14)
        np.testing.assert_allclose(apart[other["next"]], p - 0.25 * apart[other["grad"]], rtol=0, atol=1e-15)


def test_the_rate_enters_once():
    """Plain SGD: no gradient is scaled, the errors of the clamped output are."""
    step, _ = updates(shared(8), "float32")
    readers = [node for node in step.model.graph.node if "lr" in node.input]
    assert [node.op_type for node in readers] == ["Mul"]
    assert "loss" in readers[0].name


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "momentum"}, {"options": {"weight_decay": 0.1}}, {"outputs": "both"}, {"wrt": ["w", "x"]},
        {"schedule": "literal"},
    ],
)  # fmt: skip
def test_where_the_rate_stays_with_the_updates(options):
    """Slots, decay, gradients that are asked for, and dynamics that errors move, need them unscaled."""
    step, _ = updates(shared(8), "float32", **options)
    readers = [node for node in step.model.graph.node if "lr" in node.input]
    assert readers
    assert not any("loss" in node.name for node in readers)


def test_a_large_matrix_takes_its_update_from_the_product():
    """W.next = Gemm(A, B, W) with alpha = -1: no gradient of W's size is written."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    wide (float[2,4] x) => (float[2,1025] y) <float[1024,4] v, float[1025,1024] w> {
      h = Gemm<transB = 1>(x, v)
      y = Gemm<transB = 1>(h, w)
    }
    """
    step = zilc.emit_training(model(text))
    made = {node.output[0]: node for node in step.model.graph.node}
    attrs = {a.name: onnx.helper.get_attribute_value(a) for a in made["w.next"].attribute}
    assert (made["w.next"].op_type, attrs["alpha"], made["w.next"].input[2]) == ("Gemm", -1.0, "w")
    assert made["v.next"].op_type == "Sub"
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((2, 4)).astype("f"), "target": rng.standard_normal((2, 1025)).astype("f")}
    given = initial(step, feeds)
    after = executor(step.model)(given)["w.next"]
    h = feeds["x"] @ given["v"].T
    np.testing.assert_allclose(after, given["w"] - 0.1 * (h @ given["w"].T - feeds["target"]).T @ h, atol=1e-4)
