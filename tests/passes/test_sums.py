"""Sums of products over time, and sums over rows as products with ones."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

import zilc
from tests.graphs import initial, model
from zilc.executors import executor
from zilc.passes import sums
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
    """Operators of gradients, and of what an update is made with."""
    names = ("gradient", "optimizer/Gemm")
    return Counter(node.op_type for node in step.model.graph.node if any(name in node.name for name in names))


@pytest.mark.parametrize("algorithm", ["zil", "bp"])
def test_sums_over_time_are_one_product(algorithm):
    """Three products and two additions of w's gradient, three sums and two additions of b's."""
    joined = count(updates(shared(2), "float32", algorithm=algorithm)[0])
    assert joined["Gemm"] == 2  # of v, of w
    assert joined["Concat"] == 2
    assert joined["MatMul"] == joined["Sum"] == 1
    assert joined["ReduceSum"] == 0
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


# -- sums over rows --

#: A bias on three axes, a table of positions that is no row, and a scale.
BIASED = """
<ir_version: 10, opset_import: ["" : 18]>
biased (float[BATCH,3,4] x) => (float[BATCH,3,6] y)
  <float[4,6] w, float[6] b, float[3,6] positions, float[6] scale>
{
  h = MatMul(x, w)
  a = Add(h, b)
  s = Mul(a, scale)
  y = Add(s, positions)
}
"""


def biased(batch: object = 5, dtype: str = "float32") -> onnx.ModelProto:
    return model(BIASED.replace("BATCH", str(batch)), dtype=dtype)


def biased_updates(proto: onnx.ModelProto, batch: int, **options) -> tuple[TrainingStep, dict]:
    """Of whole numbers, whose sums are exact in any order."""
    step = zilc.emit_training(proto, loss="energy", **options)
    rng = np.random.default_rng(0)
    dtype = np.dtype(step.state["w"].dtype)
    feeds = {
        name: rng.integers(-3, 4, (batch, 3, width)).astype(dtype) for name, width in (("x", 4), ("target", 6))
    }
    state = {name: rng.integers(-2, 3, np.shape(value)).astype(dtype) for name, value in step.state.items()}
    return step, executor(step.model)({**initial(step, feeds, lr=0.25), **state})


def sums_of(step: TrainingStep) -> dict[str, list[str]]:
    """Operators behind each row's gradient, by the row."""
    nodes = [node for node in step.model.graph.node if "gradient" in node.name]
    return {
        name: [node.op_type for node in nodes if node.name.startswith(f"{name}.gradient")]
        for name in ("b", "scale", "positions")
    }


@pytest.mark.parametrize("algorithm", ["zil", "bp"])
def test_a_sum_over_rows_is_a_product_with_ones(algorithm):
    found = sums_of(zilc.emit_training(biased(), loss="energy", algorithm=algorithm))
    assert found["b"] == ["Flatten", "MatMul"]
    assert found["scale"] == ["Mul", "Flatten", "MatMul"]
    assert found["positions"] == ["ReduceSum"]  # [3, 6] of [5, 3, 6]: not all axes but the last


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float64", {}), ("float32", {"outputs": "both"}), ("float32", {"target": "cuda"}),
     ("float32", {"schedule": "literal"})],
)  # fmt: skip
def test_where_sums_stay(dtype, options):
    """Gradients that are looked at keep the sums of the dynamics; a GPU has a kernel for them."""
    step = zilc.emit_training(biased(dtype=dtype), loss="energy", **options)
    assert not any(node.op_type == "MatMul" and "ReduceSum" in node.name for node in step.model.graph.node)


def test_the_forward_parts_own_sums_stay():
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    summed (float[8,4] x) => (float[4] y) <float[4,4] w> {
      h = MatMul(x, w)
      axes = Constant<value_ints = [0]>()
      y = ReduceSum<keepdims = 0>(h, axes)
    }
    """
    step = zilc.emit_training(model(text), loss="energy")
    assert [node.op_type for node in step.model.graph.node].count("ReduceSum") == 1


@pytest.mark.parametrize("batch", [1, 5])
def test_as_a_product_the_sum_is_the_same(batch):
    step, made = biased_updates(biased(batch), batch)
    assert "MatMul" in sums_of(step)["b"]
    both, apart = biased_updates(biased(batch), batch, outputs="both")
    for entry, other in zip(step.signature["parameters"], both.signature["parameters"], strict=True):
        np.testing.assert_array_equal(made[entry["next"]], apart[other["next"]])


@pytest.mark.parametrize("batch", [0, 2])
def test_rows_of_an_open_number_get_their_ones_in_the_run(batch, monkeypatch):
    few = zilc.emit_training(biased("N"), loss="energy")
    assert "MatMul" not in sums_of(few)["b"]  # making ones would take as long as it saves
    monkeypatch.setattr(sums, "OPEN", 1)
    step, made = biased_updates(biased("N"), batch)
    assert "Expand" in sums_of(step)["b"]
    both, apart = biased_updates(biased("N"), batch, outputs="both")
    for entry, other in zip(step.signature["parameters"], both.signature["parameters"], strict=True):
        np.testing.assert_array_equal(made[entry["next"]], apart[other["next"]])


def test_many_ones_are_no_part_of_the_file(monkeypatch):
    monkeypatch.setattr(sums, "STORED", 10)
    step, made = biased_updates(biased(), 5)
    assert "Expand" in sums_of(step)["b"]
    assert not any(list(t.dims) == [15] for t in step.model.graph.initializer)
    both, apart = biased_updates(biased(), 5, outputs="both")
    np.testing.assert_array_equal(made["b.next"], apart["b.next"])
    assert both.signature["parameters"]
