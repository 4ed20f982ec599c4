"""Clean-up: what it joins, what it leaves alone, and that values stay."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx
import pytest

import zilc
from tests.graphs import initial, model
from tests.passes.test_sums import shared, updates
from zilc import lowerings
from zilc.executors import executor
from zilc.passes import simplify
from zilc.pipeline import TrainingStep


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


POOLED = """
<ir_version: 10, opset_import: ["" : 18]>
pooled (float[2,3,9,9] x) => (float[2,3,P,P] y) <float[3,3,1,1] w> {
  a = Conv(x, w)
  h = Relu(a)
  y = MaxPool<kernel_shape = [K, K], strides = [S, S], pads = [E, E, E, E]>(h)
}
"""


@pytest.fixture
def by_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool's cotangent by its indices, on these small images too."""
    monkeypatch.setattr(lowerings, "costs", dict)


def pooled(kernel: int, stride: int, pad: int) -> onnx.ModelProto:
    size = (9 + 2 * pad - kernel) // stride + 1
    text = POOLED
    for letter, value in (("P", size), ("K", kernel), ("S", stride), ("E", pad)):
        text = re.sub(rf"\b{letter}\b", str(value), text)
    return model(text)


@pytest.mark.parametrize("algorithm", ["zil", "bp"])
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 0), (3, 2, 1), (3, 1, 1)])
@pytest.mark.parametrize("run", ["reference", "onnxruntime"])
def test_a_mask_behind_a_pool_gives_the_same_bits(monkeypatch, by_indices, window, algorithm, run):
    rng = np.random.default_rng(1)
    proto, made = pooled(*window), []
    size = proto.graph.output[0].type.tensor_type.shape.dim[2].dim_value
    feeds = {"x": rng.standard_normal((2, 3, 9, 9)).astype("f"), "target": np.zeros((2, 3, size, size), "f")}
    feeds["x"][0, :, :4, :4] = -np.abs(feeds["x"][0, :, :4, :4])  # windows in which all is cut off
    feeds["target"] += rng.standard_normal(feeds["target"].shape).astype("f")
    for off in (False, True):
        if off:
            monkeypatch.setattr(simplify, "mask_pooled", lambda graph: None)
        step = zilc.emit_training(proto, algorithm=algorithm, outputs="both", wrt=["w", "x"])
        masks = [node for node in step.model.graph.node if node.op_type == "Where"]
        shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in step.model.graph.value_info}
        assert [shapes[node.output[0]][2] for node in masks] == [9 if off else size]
        given = initial(step, feeds)
        made.append(executor(step.model, prefer=run)(given))
        # The pool's output where it was masked behind the pool.
        compared = {node.input[0] for node in step.model.graph.node if node.op_type == "Greater"}
        assert compared == {"h" if off else "y"}
    assert np.any(made[0]["x.grad"])
    for name, value in made[0].items():
        assert value.tobytes() == made[1][name].tobytes(), name


def test_an_infinite_error_at_a_dead_unit_stays_out(by_indices):
    proto = pooled(2, 2, 0)
    feeds = {"x": np.full((2, 3, 9, 9), 1.0, "f"), "target": np.zeros((2, 3, 4, 4), "f")}
    step = zilc.emit_training(proto, outputs="grad", wrt=["w", "x"])
    given = initial(step, feeds)
    given["w"] = -np.ones_like(given["w"])
    given["target"][...] = np.inf
    assert not np.any(executor(step.model)(given)["x.grad"])


def test_a_relu_with_other_readers_keeps_its_mask(by_indices):
    """The image's cotangent is a sum there, and the sum is what is masked."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    read_twice (float[1,2,4,4] x) => (float[1,2,4,4] y) <float[2,2,1,1] w> {
      a = Conv(x, w)
      h = Relu(a)
      p = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(h)
      y = Mul(p, h)
    }
    """
    step = zilc.emit_training(model(text), outputs="grad")
    (mask,) = [node for node in step.model.graph.node if node.op_type == "Where"]
    made = {name: node.op_type for node in step.model.graph.node for name in node.output}
    assert made[mask.input[1]] == "Add"


def test_two_pools_of_one_relu(by_indices):
    """Their cotangents are added, and the sum is masked; a pool of a mask of another tensor is none of its business."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    twice (float[1,2,4,4] x) => (float[1,2,2,2] y) <float[2,2,1,1] w> {
      a = Conv(x, w)
      h = Relu(a)
      p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(h)
      q = MaxPool<kernel_shape = [3, 3]>(h)
      y = Mul(p, q)
    }
    """
    made = zilc.emit_training(model(text), outputs="grad").model.graph.node
    assert [node.input[0] for node in made if node.op_type == "Greater"] == ["h"]


def test_a_pool_of_another_tensor_has_another_mask(by_indices):
    """What is pooled is above zero everywhere, where Relu's output is not."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    lifted (float[1,2,4,4] x) => (float[1,2,2,2] y) <float[2,2,1,1] w, float[1] one = {9}> {
      a = Conv(x, w)
      h = Relu(a)
      s = Add(h, one)
      y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(s)
    }
    """
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full((2, 2, 1, 1), 0.5, "f"), "w"))
    made = zilc.emit_training(proto, outputs="grad", wrt=["w"]).model.graph.node
    assert [node.input[0] for node in made if node.op_type == "Greater"] == ["h"]


def test_the_models_own_unpooling_stays(by_indices):
    """Values of another shape than the pool's are no cotangent of its."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    unpool (float[2,2,4,4] x) => (float[2,2,4,4] y)
    <float[2,2,1,1] w, int64[1] all = {-1}, int64[1] size = {64}, int64[4] image = {2, 2, 4, 4},
     float[1] nothing = {0}, float zero = {0}> {
      a = Conv(x, w)
      h = Relu(a)
      p, places = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(h)
      e = Flatten(p)
      blank = Expand(nothing, size)
      flat = Reshape(places, all)
      values = Reshape(e, all)
      s = ScatterElements<axis = 0>(blank, flat, values)
      u = Reshape(s, image)
      c = Greater(h, zero)
      y = Where(c, u, zero)
    }
    """
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full((2, 2, 1, 1), 0.5, "f"), "w"))
    step = zilc.emit_training(proto)
    x = np.random.default_rng(0).standard_normal((2, 2, 4, 4)).astype("f")
    made = executor(step.model)(initial(step, {"x": x, "target": np.zeros_like(x)}))
    pooled_, h = made["y"], np.maximum(np.einsum("nchw,mc->nmhw", x, np.full((2, 2), 0.5, "f")), 0)
    best = h.reshape(2, 2, 2, 2, 2, 2).max((3, 5)).repeat(2, 2).repeat(2, 3)
    np.testing.assert_allclose(pooled_, np.where((h == best) & (h > 0), h, 0), atol=1e-6)


# --- masks --------------------------------------------------------------------------------------------------------

#: Relu on products, a residual edge between them, and Relu under a root, whose derivative at 0 is infinite.
GATED = """
<ir_version: 10, opset_import: ["" : 18]>
gated (float[8,4] x) => (float[8,6] y) <float[6,4] v, float[6,6] w, float[6,6] u> {
  a1 = Gemm<transB = 1>(x, v)
  h1 = Relu(a1)
  a2 = Gemm<transB = 1>(h1, w)
  h2 = Relu(a2)
  s = Add(h2, h1)
  a3 = Gemm<transB = 1>(s, u)
  y = Relu(a3)
}
"""


def operators(step: TrainingStep) -> Counter:
    return Counter(n.op_type for n in step.model.graph.node)


def classified(proto: onnx.ModelProto, **options) -> tuple[TrainingStep, dict]:
    """A step of cross-entropy in float64, and what it gives."""
    step = zilc.emit_training(proto, loss="cross-entropy", **options)
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((8, 4)), "target": rng.integers(0, 6, 8)}
    return step, executor(step.model)(initial(step, feeds, lr=0.25))


@pytest.mark.parametrize("algorithm", ["zil", "bp"])
def test_a_mask_on_products_is_a_factor(algorithm):
    """Behind the loss, a product, and a sum of one and a masked one."""
    proto = model(GATED, dtype="float64")
    step, made = classified(proto, algorithm=algorithm)
    both, apart = classified(proto, algorithm=algorithm, outputs="both")
    assert (operators(step)["Where"], operators(step)["Cast"]) == (0, 3)
    assert operators(both)["Where"] == 3
    for entry, other in zip(step.signature["parameters"], both.signature["parameters"], strict=True):
        p = np.asarray(step.state[entry["name"]])
        assert np.abs(apart[other["grad"]]).max() > 1e-3
        np.testing.assert_allclose(made[entry["next"]], p - 0.25 * apart[other["grad"]], rtol=0, atol=1e-14)


def test_an_error_that_holds_the_target_may_be_no_number():
    """Missing labels as NaN, which the model masks: their masks stay, and what they give is 0."""
    assert operators(zilc.emit_training(model(GATED)))["Where"] == 3


@pytest.mark.parametrize(
    "forward",
    [
        "r = Relu(w) s = Pow(r, half) y = Add(x, s)",
        "r = Relu(w) q = Reciprocal(r) n = Neg(q) s = Exp(n) y = Add(x, s)",
        "r = Relu(w) s = Sqrt(r) y = Mul(x, s)",
        "r = Relu(w) b = Add(r, half) c = Sub(b, half) s = Sqrt(c) q = Add(s, half) t = Reciprocal(q) y = Mul(x, t)",
    ],
)
def test_what_parameters_make_may_be_infinite(forward):
    """Derivatives of functions of a parameter, at points where Relu is off."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    bent (float[8,4] x) => (float[8,4] y) <float half, float[4] w> { FORWARD }
    """
    step = zilc.emit_training(model(text.replace("FORWARD", forward)), loss="cross-entropy", wrt=["w"])
    feeds = {"x": np.random.default_rng(0).standard_normal((8, 4)).astype("f"), "target": np.arange(8) % 4}
    given = initial(step, feeds)
    given["w"] = np.asarray([1, -1, 2, -0.5], "f")
    half = next((t for t in step.model.graph.initializer if t.name == "half"), None)
    if half is not None:
        half.CopyFrom(onnx.numpy_helper.from_array(np.float32(0.7), "half"))
    assert np.isfinite(executor(step.model)(given)["w.next"]).all()


def test_errors_of_convolutions_are_finite_by_rights():
    """Through normalizations, pools, sums over places and Winograd's transforms."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    convolved (float[2,3,8,8] x) => (float[2,5] y)
       <float[8,3,3,3] w, float[8] s, float[8] b, float[8] m, float[8] v, float[8,8,3,3] w2, float[8,8,3,3] w3,
        float[5,8] u> {
      a = Conv<pads = [1, 1, 1, 1]>(x, w)
      n = BatchNormalization(a, s, b, m, v)
      h = Relu(n)
      p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(h)
      a2 = Conv<pads = [1, 1, 1, 1]>(p, w2)
      h2 = Relu(a2)
      a3 = Conv<pads = [1, 1, 1, 1]>(h2, w3)
      h3 = Relu(a3)
      q = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(h3)
      h4 = Relu(q)
      g = GlobalAveragePool(h4)
      f = Flatten(g)
      y = Gemm<transB = 1>(f, u)
    }
    """
    for freeze in ((), ("w",)):  # with the normalization folded, and as it is
        assert operators(zilc.emit_training(model(text), freeze=freeze, loss="cross-entropy"))["Where"] == 0


@pytest.mark.parametrize(
    ("forward", "left", "freeze"),
    [
        # The root's derivative is infinite at 0, and so are products with it.
        ("h3 = Relu(a3) y = Sqrt(h3)", 3, ()),
        # All that a frozen product gives for an example may be infinite: its own mask is behind it.
        ("h3 = Relu(a3) e = MatMul(h3, w) y = Sqrt(e)", 3, ("w",)),
        # The product with another example's prediction, infinite or not.
        ("h3 = Relu(a3) r = Reciprocal(h3) t = Transpose(r) e = MatMul(h3, t) c = Clip(e, zero, one) y = MatMul(c, h3)",
         3, ()),
    ],
)  # fmt: skip
def test_an_infinite_derivative_is_masked_and_not_multiplied(forward, left, freeze):
    """0 where Relu is off, as in PyTorch, where 0 times infinity would be NaN."""
    text = GATED.replace("y = Relu(a3)", forward).replace("<float[6,4] v", "<float zero, float one, float[6,4] v")
    step = zilc.emit_training(model(text), freeze=freeze, loss="cross-entropy")
    assert operators(step)["Where"] >= left


@pytest.mark.parametrize("algorithm", ["zil", "bp"])
def test_an_example_that_is_off_stays_out(algorithm):
    """Sqrt(Relu(x) W) of an example with Relu off: its error is infinite, and none of it reaches a weight."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    off (float[2,4] x) => (float[2,3] y) <float[5,4] w, float[5,3] f> {
      a = Gemm<transB = 1>(x, w)
      h = Relu(a)
      e = MatMul(h, f)
      y = Sqrt(e)
    }
    """
    step = zilc.emit_training(model(text), algorithm=algorithm, freeze=["f"])
    x = np.stack([np.full(4, 1, "f"), np.full(4, -1, "f")])
    given = initial(step, {"x": x, "target": np.ones((2, 3), "f")})
    given["w"] = np.abs(given["w"])
    i = next(t for t in step.model.graph.initializer if t.name == "f")
    i.CopyFrom(onnx.numpy_helper.from_array(np.abs(onnx.numpy_helper.to_array(i)), "f"))
    made = executor(step.model)(given)
    assert np.isfinite(made["w.next"]).all()
    assert (made["w.next"] != given["w"]).any()


def test_a_mask_of_unknown_type_is_cast_as_it_is():
    """A condition is bool by definition; inference does not tell what a custom operator gives."""
    text = """
    <ir_version: 10, opset_import: ["" : 18, "my" : 1]>
    custom (float[8,4] x) => (float[8,6] y) <float[4,6] w, float[6,6] u> {
      a = MatMul(x, w)
      c = my.Threshold(a)
      z = Constant<value = float {0.0}>()
      h = Where(c, a, z)
      y = Gemm(h, u)
    }
    """
    step = zilc.emit_training(model(text), loss="cross-entropy")
    assert operators(step)["Where"] == 1  # the model's own


def test_a_gpu_has_a_kernel_for_masks():
    assert operators(zilc.emit_training(model(GATED), target="cuda"))["Where"] == 3
