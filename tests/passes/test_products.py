"""What is moved around products: updates, transposes, factors of errors, softmax's sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import zilc
from tests.graphs import initial, model
from tests.passes.test_sums import shared, updates
from zilc.executors import executor
from zilc.passes import products


def test_a_matrix_takes_its_update_from_the_product():
    """W.next = Gemm(A, B, W) with alpha = -1: no gradient of W's size is written."""
    step = zilc.emit_training(shared(8))
    made = {node.output[0]: node for node in step.model.graph.node}
    attrs = {a.name: onnx.helper.get_attribute_value(a) for a in made["v.next"].attribute}
    assert (made["v.next"].op_type, attrs["alpha"], made["v.next"].input[2]) == ("Gemm", -1.0, "v")
    assert made["w.next"].op_type == "Sub"  # of a sum of two products, which nothing joins here
    both = {node.output[0]: node for node in zilc.emit_training(shared(8), outputs="both").model.graph.node}
    assert both["v.next"].op_type == "Sub"  # there its gradient is an output


@pytest.mark.parametrize(
    ("first", "last", "target", "joined"),
    [(5, 10, "cpu", True), (4, 10, "cpu", True), (1, 3, "cpu", True), (3, 4, "cpu", False), (1, 5, "cpu", False),
     (3, 4, "cuda", True)],
)  # fmt: skip
def test_a_matrix_of_middle_size_is_updated_apart_on_a_cpu(monkeypatch, first, last, target, joined):
    """v is [6, 4]; the limits are in units of 6 elements."""
    monkeypatch.setattr(products, "APART", (6 * first, 6 * last))
    step, made = updates(shared(8), "float32", target=target)
    assert ({n.output[0]: n.op_type for n in step.model.graph.node}["v.next"] == "Gemm") == joined
    both, apart = updates(shared(8), "float32", outputs="both")
    np.testing.assert_allclose(made["v.next"], apart["v.next"], rtol=0, atol=1e-6)
    assert both.signature["parameters"]


TIED = """
<ir_version: 10, opset_import: ["" : 18]>
tied (float[3,4] x, int64[3] rows) => (float[3,6] y) <float[6,4] v, float[4,4] w> {
  a = Gather(v, rows)
  b = MatMul(x, w)
  c = MatMul(b, w)
  h = Add(a, c)
  t = Transpose<perm = [1, 0]>(v)
  y = MatMul(h, t)
}
"""


@pytest.mark.parametrize("algorithm", ["zil", "bp"])
def test_products_among_the_parts_of_a_gradient_join_the_update(algorithm):
    """v is read transposed, and by rows; w twice, by products that are too large to be joined over time."""
    proto = model(TIED)
    feeds = {"x": np.arange(12, dtype=np.float32).reshape(3, 4) % 5 - 2, "rows": np.asarray([5, 0, 5]),
             "target": np.arange(18, dtype=np.float32).reshape(3, 6) % 7 - 3}  # fmt: skip
    step = zilc.emit_training(proto, algorithm=algorithm)
    made = {node.output[0]: node for node in step.model.graph.node}
    kinds = {}
    for name in ("v", "w"):
        last = made[f"{name}.next"]
        first = made[last.input[0] if last.op_type == "Sub" else last.input[2]]
        kinds[name] = (first.op_type, first.input[2], last.op_type)
    assert kinds == {"v": ("Gemm", "v", "Sub"), "w": ("Gemm", "w", "Gemm")}
    assert not any(n.op_type == "Transpose" and "v.gradient" in n.output[0] for n in step.model.graph.node)
    both = zilc.emit_training(proto, algorithm=algorithm, outputs="both")
    state = {name: np.rint(4 * value).astype(np.float32) for name, value in step.state.items()}
    whole = executor(step.model)({**initial(step, feeds, lr=0.25), **state})
    apart = executor(both.model)({**initial(both, feeds, lr=0.25), **state})
    for name in ("v", "w"):  # whole numbers and a power of two: exact in any order
        np.testing.assert_array_equal(whole[f"{name}.next"], apart[f"{name}.next"])
        assert np.abs(apart[f"{name}.next"] - state[name]).max() > 1


def test_the_models_own_transposed_products_stay():
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    turned (float[3,4] x) => (float[6,3] y) <float[4,6] w> {
      h = Gemm(x, w)
      y = Transpose<perm = [1, 0]>(h)
    }
    """
    kinds = [node.op_type for node in zilc.emit_training(model(text)).model.graph.node]
    assert kinds[:2] == ["Gemm", "Transpose"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_update_from_a_product_is_the_update(dtype):
    """At lr = 1/4, against the gradient; with a factor of the product's own there is nothing to join."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    scaled (float[8,4] x) => (float[8,6] y) <float[6,4] v, float[6,6] w> {
      h = Gemm<transB = 1>(x, v)
      y = Gemm<transB = 1, alpha = 0.5>(h, w)
    }
    """
    proto = model(text, dtype=dtype)
    step, made = updates(proto, dtype)
    both, apart = updates(proto, dtype, outputs="both")
    for entry, other in zip(step.signature["parameters"], both.signature["parameters"], strict=True):
        p = np.asarray(step.state[entry["name"]])
        wanted = p - 0.25 * apart[other["grad"]]
        np.testing.assert_allclose(made[entry["next"]], wanted, rtol=0, atol=1e-5 if dtype == "float32" else 1e-14)
        assert np.abs(wanted - p).max() > 1e-2


@pytest.mark.parametrize(
    "forward",
    [
        "(float[3,4] x, float[3,5] z) => (float[3,4] d) <float[5,4] w> { c = Gemm<beta = 0.0>(z, w)",
        "(float[3,4] x, float[1,5] z) => (float[3,4] d) <float[5,4] w> { c = Gemm(z, w)",
        "(float[N,4] x, float[1,5] z) => (float[N,4] d) <float[5,4] w> { c = Gemm(z, w)",
        "(float[2,3,4] x, float[3,5] z) => (float[2,3,4] d) <float[5,4] w> { c = Gemm(z, w)",
        "(float[4] x, float[3,5] z) => (float[3,4] d) <float[5,4] w> { c = Gemm(z, w)",
    ],
)
def test_the_models_own_differences_stay(forward):
    """Sub(input, Gemm) of the model is no update: its operands may broadcast, and its Gemm's beta says nothing."""
    proto = model(f'<ir_version: 10, opset_import: ["" : 18]> m {forward} d = Sub(x, c) }}')
    step = zilc.emit_training(proto)
    shapes = {i.name: [d.dim_value or 3 for d in i.type.tensor_type.shape.dim] for i in step.model.graph.input}
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shapes[name]).astype("f") for name in ("x", "z", "target")}
    given = initial(step, feeds, lr=0.0)
    np.testing.assert_allclose(executor(step.model)(given)["d"], feeds["x"] - feeds["z"] @ given["w"], atol=1e-5)


#: A Relu in front of a pool whose windows overlap, are disjoint, or reach over the edge.


# -- a large error's factor --

CLASSIFIER = """
<ir_version: 10, opset_import: ["" : 18]>
classifier (float[2,3,4] x) => (float[2,3,100] y) <float[4,4] v, float[4,100] w, float[100] b> {
  h = MatMul(x, v)
  p = MatMul(h, w)
  y = Add(p, b)
}
"""


def classified(monkeypatch: pytest.MonkeyPatch, factored: int, text: str = CLASSIFIER, **options: Any) -> Any:
    """A step, and what it makes of whole numbers."""
    monkeypatch.setattr(products, "FACTORED", factored)
    step = zilc.emit_training(model(text), **options)
    rng = np.random.default_rng(0)
    feeds = {"x": rng.integers(-2, 3, (2, 3, 4)).astype(np.float32),
             "target": rng.integers(-2, 3, (2, 3, 100)).astype(np.float32)}  # fmt: skip
    state = {name: np.rint(4 * value).astype(np.float32) for name, value in step.state.items()}
    return step, executor(step.model)({**initial(step, feeds, lr=0.25), **state})


def scaled(step: zilc.TrainingStep) -> list[list[int]]:
    """Shapes of what the rate, or what was made of it alone, is multiplied with."""
    graph = step.model.graph
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in (*graph.value_info, *graph.input)}
    rates = {"lr"}
    found = []
    for node in graph.node:
        if node.op_type in ("Mul", "Div") and rates.intersection(node.input):
            others = [name for name in node.input if name not in rates]
            if all(shapes.get(name, []) == [] for name in others):
                rates.update(node.output)
            else:
                found += [shapes[name] for name in others]
    return sorted(found)


@pytest.mark.parametrize("algorithm", ["zil", "bp"])
@pytest.mark.parametrize("loss", ["energy", "mse"])
def test_a_large_errors_factor_goes_to_the_small_sides(monkeypatch, algorithm, loss):
    """The weight's other operand, the error's product with it, and the bias's sum: 24, 24 and 100 of 600 elements."""
    step, made = classified(monkeypatch, 600, algorithm=algorithm, loss=loss)
    assert scaled(step) == [[2, 3, 4], [6, 4], [100]]
    onnx.checker.check_model(step.model, full_check=True)
    plain, expected = classified(monkeypatch, 601, algorithm=algorithm, loss=loss)
    assert scaled(plain) == [[2, 3, 100]]
    for entry in step.signature["parameters"]:
        np.testing.assert_allclose(made[entry["next"]], expected[entry["next"]], rtol=1e-6, atol=1e-6)
        assert np.abs(made[entry["next"]] - np.rint(4 * step.state[entry["name"]])).max() > 0.01


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (CLASSIFIER, {"outputs": "both"}),
        (CLASSIFIER, {"precision": "float16"}),
        # The error is not read by products alone; there is no small side.
        (CLASSIFIER.replace("y = Add(p, b)", "q = Add(p, b)\n y = Tanh(q)"), {}),
        (CLASSIFIER.replace("[4,100] w", "[4,6] w").replace(",100]", ",6]").replace("[100] b", "[6] b"), {}),
    ],
)
def test_where_a_factor_stays(monkeypatch, text, options):
    monkeypatch.setattr(products, "FACTORED", 1)
    step = zilc.emit_training(model(text), loss="mse", **options)
    assert not any(name.endswith("/direction") for node in step.model.graph.node for name in node.output)


# -- softmax in an attention --

ATTENTION = """
<ir_version: 10, opset_import: ["" : 18]>
attention (float[BATCH,KEYS,8] x) => (float[BATCH,KEYS,8] y)
  <float[8,8] q, float[8,8] k, float[8,8] v>
{
  heads = Constant<value_ints = [0, 0, 2, 4]>()
  whole = Constant<value_ints = [0, 0, 8]>()
  q1 = MatMul(x, q)
  q2 = Reshape(q1, heads)
  q3 = Transpose<perm = [0, 2, 1, 3]>(q2)
  k1 = MatMul(x, k)
  k2 = Reshape(k1, heads)
  k3 = Transpose<perm = [0, 2, 3, 1]>(k2)
  v1 = MatMul(x, v)
  v2 = Reshape(v1, heads)
  v3 = Transpose<perm = [0, 2, 1, 3]>(v2)
  s = MatMul(q3, k3)
  p = Softmax<axis = -1>(s)
  a = MatMul(p, v3)
  t = Transpose<perm = [0, 2, 1, 3]>(a)
  y = Reshape(t, whole)
}
"""


def attention(batch: object, keys: object) -> onnx.ModelProto:
    return model(ATTENTION.replace("BATCH", str(batch)).replace("KEYS", str(keys)))


def reduced(step: zilc.TrainingStep) -> list[str]:
    """What softmax's derivative sums: operands of the products that are summed over the last axis."""
    made = {name: node for node in step.model.graph.node for name in node.output}
    sums = [node for node in step.model.graph.node if node.op_type == "ReduceSum"]
    return sorted(name for node in sums for name in made[node.input[0]].input)


@pytest.mark.parametrize("algorithm", ["zil", "bp"])
def test_softmaxs_sum_over_keys_is_one_over_a_head(monkeypatch, algorithm):
    monkeypatch.setattr(products, "ATTENDED", 3 * 2 * 9 * 9)
    feeds = {name: np.random.default_rng(k).standard_normal((3, 9, 8), dtype=np.float32)
             for k, name in enumerate(("x", "target"))}  # fmt: skip
    step = zilc.emit_training(attention(3, 9), algorithm=algorithm)
    assert "a" in reduced(step)
    assert "p" not in reduced(step)
    monkeypatch.setattr(products, "ATTENDED", 1 << 30)
    plain = zilc.emit_training(attention(3, 9), algorithm=algorithm)
    assert "p" in reduced(plain)
    made, expected = (executor(s.model)(initial(s, feeds, lr=0.25)) for s in (step, plain))
    for name in ("q", "k", "v"):
        np.testing.assert_allclose(made[f"{name}.next"], expected[f"{name}.next"], rtol=0, atol=1e-5)
        assert np.abs(expected[f"{name}.next"] - step.state[name]).max() > 1e-2


@pytest.mark.parametrize(
    ("batch", "keys", "values"), [(3, 7, False), (3, 8, True), (3, "L", True), ("N", 4, True), ("N", "L", True)]
)
def test_few_keys_are_summed_over_as_they_are(monkeypatch, batch, keys, values):
    """A head has 4 elements; sizes that are open may be large."""
    monkeypatch.setattr(products, "ATTENDED", 1)
    assert ("a" in reduced(zilc.emit_training(attention(batch, keys)))) == values


@pytest.mark.parametrize("batch", [0, 3])
def test_an_open_batch_may_be_empty(batch):
    """9 keys and heads of 4 elements: onnxruntime's reductions keep the shape of what is empty."""
    proto = attention("N", 9)
    step = zilc.emit_training(proto)
    assert "a" in reduced(step)
    trainer = zilc.Trainer(step, lr=0.25, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((batch, 9, 8), dtype=np.float32) for name in ("x", "target")}
    assert trainer.step(feeds) >= 0
    both = zilc.emit_training(proto, outputs="both")
    expected = {f"{name}.next": step.state[name] for name in "qkv"}
    if batch:
        expected = executor(both.model)(initial(both, feeds, lr=0.25))
    for name in "qkv":
        np.testing.assert_allclose(trainer.state[name], expected[f"{name}.next"], rtol=0, atol=1e-5)


def test_gradients_keep_softmaxs_own_sum(monkeypatch):
    monkeypatch.setattr(products, "ATTENDED", 1)
    assert "p" in reduced(zilc.emit_training(attention(3, 9), outputs="both"))


@pytest.mark.parametrize("late", [False, True])
def test_the_models_own_sums_over_keys_stay(monkeypatch, late):
    """The same nodes forwards, before the product that they could be summed from, or behind it."""
    monkeypatch.setattr(products, "ATTENDED", 1)
    value = "y1 = MatMul(p, v)"
    text = f"""
    <ir_version: 10, opset_import: ["" : 18]>
    own (float[2,8,4] u, float[2,8,8] x) => (float[2,8,4] y) <float[8,16] a, float[8,16] c, float[8,4] b> {{
      q = MatMul(x, a)
      k = MatMul(x, c)
      t = Transpose<perm = [0, 2, 1]>(k)
      s = MatMul(q, t)
      p = Softmax<axis = -1>(s)
      v = MatMul(x, b)
      {"" if late else value}
      w = Transpose<perm = [0, 2, 1]>(v)
      d = MatMul(u, w)
      m = Mul(p, d)
      axes = Constant<value_ints = [-1]>()
      z = ReduceSum<keepdims = 1>(m, axes)
      {value if late else ""}
      y = Add(y1, z)
    }}
    """
    step = zilc.emit_training(model(text), loss="energy")
    made = {name: node for node in step.model.graph.node for name in node.output}
    assert made["z"].input[0] == "m"
    assert list(made["m"].input) == ["p", "d"]


SQUARED = """
<ir_version: 10, opset_import: ["" : 18]>
squared (float[6,4] x, float[6,4] u) => (float[6,100] y) <float[4,100] w, float[4,4] v> {
  axes = Constant<value_ints = [6, 100]>()
  h = MatMul(x, v)
  p = MatMul(h, w)
  q = MatMul(u, w)
  r = Reshape(q, axes)
  y = Add(p, r)
}
"""


@pytest.mark.parametrize("algorithm", ["zil", "bp"])
def test_a_factor_that_reaches_products_through_views(monkeypatch, algorithm):
    """Each small side is multiplied in front of the first that reads it."""
    results = []
    for factored in (1, 1 << 30):
        monkeypatch.setattr(products, "FACTORED", factored)
        step = zilc.emit_training(model(SQUARED), loss="mse", algorithm=algorithm)
        onnx.checker.check_model(step.model, full_check=True)
        rng = np.random.default_rng(0)
        feeds = {n: rng.standard_normal(s, dtype=np.float32) for n, s in
                 (("x", (6, 4)), ("u", (6, 4)), ("target", (6, 100)))}  # fmt: skip
        results.append(executor(step.model)(initial(step, feeds, lr=0.25)))
    for name in ("v", "w"):
        np.testing.assert_allclose(results[0][f"{name}.next"], results[1][f"{name}.next"], rtol=1e-5, atol=1e-6)
