"""Which values have spatial axes first: the fewest elements transposed, and the same results."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import zilc
from tests.graphs import model
from zilc import ir, models, onnx_io
from zilc.executors import executor
from zilc.graph import INFERENCE, SPATIAL_FIRST
from zilc.passes import layouts
from zilc.session import inference_form

#: How a test's graph begins and ends: u and v are computed with spatial axes first, by what keeps its order.
HEAD = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[2,3,4,5] x, float[3,1,1] c, float[1,3,1,1] d, float[2,1,1,1] e) => ({outputs})
   <float z = {{0}}, int64[1] one = {{1}}, int64[1] four = {{4}}, int64[1] two = {{2}},
    int64[3] ends = {{0, 2, 3}}, int64[2] inner = {{-1, 2}}, int64[4] all_axes = {{0, 1, 2, 3}},
    int64 z0 = {{0}}> {{
  [into] t = Transpose<perm = [2, 3, 0, 1]>(x)
  s = CumSum(t, z0)
  [out_of] u = Transpose<perm = [2, 3, 0, 1]>(s)
  {body}
  [into_again] q = Transpose<perm = [2, 3, 0, 1]>(v)
  y = CumSum(q, z0)
}}
"""


def _graph(body: str, outputs: str = "float[4,5,2,3] y") -> gs.Graph:
    return _marked(onnx.parser.parse_model(HEAD.format(body=body, outputs=outputs)))


def _marked(proto: onnx.ModelProto) -> gs.Graph:
    """With the Transposes marked whose names say that they may be moved."""
    graph = ir.to_graph(onnx.shape_inference.infer_shapes(proto))
    for node in graph.nodes:
        if node.name.startswith(("into", "out_of")):
            setattr(node, SPATIAL_FIRST, node.name.startswith("into"))
    return graph


def _run(graph: gs.Graph) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    feeds = {t.name: rng.standard_normal([int(n) for n in t.shape], np.float32) for t in graph.inputs}
    proto = ir.to_proto(graph, infer=True)
    onnx_io.check_full(proto)
    return executor(proto)(feeds)


def _transposed(graph: gs.Graph) -> float:
    """Elements that are transposed."""
    shapes = onnx_io.shapes(ir.to_proto(graph, infer=True))
    return float(sum(np.prod(shapes[n.outputs[0].name]) for n in graph.nodes if n.op == "Transpose"))


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("v = Relu(u)", 120),
        # What is broadcast to a value is turned as well.
        ("a = Add(u, c)  b = Mul(a, d)  f = Sub(e, b)  v = Max(f, z)", 120 + 3 + 3 + 2),
        ("m = Greater(u, z)  k = Cast<to = 1>(m)  a = Mul(u, k)  v = Where(m, a, z)", 120),
        # Both orders are wanted: once is enough.
        ("a = Relu(u)  v = Add(a, x)", 120),
        ("a = Relu(x)  b = Add(u, a)  v = Tanh(b)", 120),
        ("a = ReduceSum(u, inner)  b = Mul(u, a)  v = Neg(b)", 120),
        ("a = ReduceMean(u, all_axes)  b = Mul(u, a)  v = Neg(b)", 120),
        ("a = ReduceSum<keepdims = 0>(u, ends)  b = Reshape(a, three)  v = Add(u, b)", 120 + 3),
        ("a = Slice(u, one, four, two)  b = Slice(a, z1, one, two)  v = Concat<axis = -2>(a, b)", 120),
        ("n = Shape<start = 1>(u)  f = Cast<to = 1>(n)  g = ReduceSum<keepdims = 0>(f)  v = Mul(u, g)", 120),
        ("n = Size(u)  f = Cast<to = 1>(n)  v = Mul(u, f)", 120),
        # LogSoftmax takes the model's order only.
        ("a = LogSoftmax(u)  v = Relu(a)", 360),
        ("v = LogSoftmax<axis = 1>(u)", 360),
    ],
)
def test_results_stay_and_little_is_transposed(body: str, left: int) -> None:
    head = "three = Constant<value_ints = [1, 3, 1, 1]>()  z1 = Constant<value_ints = [0]>()  "
    plain, settled = _graph(head + body), _graph(head + body)
    expected = _run(plain)
    layouts.settle_layouts(settled)
    got = _run(settled)
    assert expected.keys() == got.keys()
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-6, atol=1e-6)
    assert _transposed(settled) == left
    assert _transposed(plain) == 360


class RandomGraph:
    """A graph of nodes that can take either order, some that cannot, and Transposes that may be moved."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.rank = int(self.rng.choice([3, 4, 4]))
        shape = [int(n) for n in self.rng.choice([1, 2, 3], 2)] + [int(n) for n in self.rng.choice([1, 2, 4], 2)]
        self.values: dict[str, list[int]] = {"x": shape[: self.rank]}
        self.nodes: list[onnx.NodeProto] = []
        self.constants = [onnx.numpy_helper.from_array(np.asarray(0), "z")]
        self.outputs: list[str] = []
        self._native(self._any())
        for _ in range(int(self.rng.integers(2, 10))):
            kind = str(self.rng.choice(["unary", "binary", "broadcast", "reduced", "sliced", "joined", "sized", "other",
                                        "native", "captured"]))  # fmt: skip
            getattr(self, f"_{kind}")(self._any())
        for _ in range(2):
            value = self._any()
            turned = self._add("Transpose", [value], name="into", perm=self._order())
            self.outputs.append(self._add("CumSum", [turned, "z"]))
        made = [name for name in self.values if name != "x"]
        self.outputs += [str(name) for name in self.rng.choice(made, 2)]

    def _any(self) -> str:
        return str(self.rng.choice([name for name, shape in self.values.items() if len(shape) == self.rank]))

    def _order(self) -> list[int]:
        return [*range(2, self.rank), 0, 1]

    def _add(self, op: str, operands: list[str], *, name: str = "", **attrs: Any) -> str:
        made = f"v{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(op, operands, [made], name=f"{name or op}_{made}", **attrs))
        return made

    def _constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(array, name))
        return name

    def _axes(self) -> list[int]:
        return [int(a) for a in self.rng.choice(self.rank, int(self.rng.integers(1, self.rank + 1)), replace=False)]

    def _native(self, x: str) -> None:
        first = self._add("CumSum", [self._add("Transpose", [x], name="into", perm=self._order()), "z"])
        back = [self.rank - 2, self.rank - 1, *range(self.rank - 2)]
        self.values[self._add("Transpose", [first], name="out_of", perm=back)] = self.values[x]

    def _unary(self, x: str) -> None:
        self.values[self._add(str(self.rng.choice(["Relu", "Tanh", "Identity"])), [x])] = self.values[x]

    def _binary(self, x: str) -> None:
        other = str(self.rng.choice(list(self.values)))
        try:
            shape = np.broadcast_shapes(tuple(self.values[x]), tuple(self.values[other]))
        except ValueError:
            return
        self.values[self._add(str(self.rng.choice(["Add", "Mul", "Max"])), [other, x])] = list(shape)

    def _broadcast(self, x: str) -> None:
        shape = [n if self.rng.random() < 0.5 else 1 for n in self.values[x]][int(self.rng.integers(0, self.rank)) :]
        operand = self._constant(self.rng.standard_normal(shape).astype(np.float32))
        self.values[operand] = shape
        self.values[self._add("Sub", [x, operand])] = self.values[x]

    def _reduced(self, x: str) -> None:
        axes, keep = self._axes(), int(self.rng.integers(0, 2))
        made = self._add("ReduceMean", [x, self._constant(np.asarray(axes))], keepdims=keep)
        shape = [1 if a in axes else n for a, n in enumerate(self.values[x])]
        self.values[made] = shape if keep else [n for a, n in enumerate(self.values[x]) if a not in axes]

    def _sliced(self, x: str) -> None:
        axis, shape = int(self.rng.integers(0, self.rank)), list(self.values[x])
        if shape[axis] > 1:
            where = [self._constant(np.asarray([n])) for n in (1, shape[axis], axis - self.rank)]
            shape[axis] -= 1
            self.values[self._add("Slice", [x, *where])] = shape

    def _joined(self, x: str) -> None:
        axis, shape = int(self.rng.integers(0, self.rank)), list(self.values[x])
        shape[axis] *= 2
        self.values[self._add("Concat", [x, x], axis=axis)] = shape

    def _sized(self, x: str) -> None:
        size = self._add("Cast", [self._add(str(self.rng.choice(["Shape", "Size"])), [x])], to=1)
        self.values[self._add("Mul", [x, self._add("ReduceSum", [size], keepdims=0)])] = self.values[x]

    def _other(self, x: str) -> None:
        self.values[self._add("LogSoftmax", [x], axis=1)] = self.values[x]

    def _captured(self, x: str) -> None:
        kinds = {"then_branch": "Neg", "else_branch": "Exp"}
        branches = {
            branch: onnx.helper.make_graph(
                [onnx.helper.make_node(op, [x], ["r"])], branch, [],
                [onnx.helper.make_tensor_value_info("r", 1, self.values[x])],
            )
            for branch, op in kinds.items()
        }  # fmt: skip
        self.values[self._add("If", [self._constant(np.asarray(True))], **branches)] = self.values[x]

    def graph(self) -> gs.Graph:
        outputs = [onnx.helper.make_tensor_value_info(name, 1, None) for name in dict.fromkeys(self.outputs)]
        given = [onnx.helper.make_tensor_value_info("x", 1, self.values["x"])]
        made = onnx.helper.make_graph(self.nodes, "g", given, outputs, self.constants)
        opsets = [onnx.helper.make_opsetid("", 18)]
        return _marked(onnx.helper.make_model(made, opset_imports=opsets, ir_version=10))


def test_random_graphs_compute_the_same() -> None:
    moved = 0
    for seed in range(60):
        made = RandomGraph(seed)
        expected, settled = _run(made.graph()), layouts.settle_layouts(made.graph())
        got = _run(settled)
        assert expected.keys() == got.keys(), seed
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4, err_msg=str(seed))
        moved += any("spatial_first" in t.name for node in settled.nodes for t in node.outputs)
    assert moved > 20


def test_a_transpose_that_a_subgraph_reads_stays() -> None:
    body = """
      condition = Greater(z, one_half)
      b = If(condition) <then_branch = t () => (float[4,5,2,3] r) { r = Neg(t) },
                         else_branch = f () => (float[4,5,2,3] r) { r = Exp(t) }>
      m = ReduceSum<keepdims = 0>(b)  v = Add(u, m)"""
    body = "one_half = Constant<value_float = 0.5>()" + body
    expected, settled = _run(_graph(body)), layouts.settle_layouts(_graph(body))
    np.testing.assert_allclose(_run(settled)["y"], expected["y"], rtol=1e-6)


def test_what_is_one_number_in_inference_form_is_not_put_in_order() -> None:
    """Nor what is made of it alone."""
    body = "m = Greater(u, z)  k = Cast<to = 1>(m)  h = Neg(k)  a = Mul(u, h)  v = Relu(a)"
    graph = _graph(body)
    marked = next(node for node in graph.nodes if node.outputs[0].name == "k")
    marked.metadata = {**marked.metadata, INFERENCE: json.dumps({"value": 1, "dtype": 1})}
    expected = _run(_graph(body))
    layouts.settle_layouts(graph)
    np.testing.assert_allclose(_run(graph)["y"], expected["y"], rtol=1e-6)
    rng = np.random.default_rng(1)
    evaluated = inference_form(ir.to_proto(graph, infer=True))
    feeds = {t.name: rng.standard_normal([int(n) for n in t.shape], np.float32) for t in graph.inputs}
    u = feeds["x"].cumsum(2)
    np.testing.assert_allclose(
        executor(evaluated)(feeds)["y"], np.maximum(-u, 0).transpose(2, 3, 0, 1).cumsum(0), rtol=1e-5
    )


def test_an_operator_of_theirs_is_not_taken_for_onnxs() -> None:
    graph = _graph("n = Shape(u)  v = Relu(u)", "float[4,5,2,3] y, int64[4] n")
    next(node for node in graph.nodes if node.op == "Shape").domain = "theirs"
    layouts.settle_layouts(graph)
    assert [(node.op, node.domain) for node in graph.nodes if node.outputs[0].name == "n"] == [("Shape", "theirs")]


def test_values_that_are_outputs_or_read_by_a_subgraph_are_there_with_the_models_order() -> None:
    body = """
      a = Relu(u)  total = ReduceSum<keepdims = 0>(a)  condition = Greater(total, z)
      b = If(condition) <then_branch = t () => (float[2,3,4,5] r) { r = Neg(a) },
                         else_branch = f () => (float[2,3,4,5] r) { r = Exp(a) }>
      v = Add(a, b)"""
    outputs = "float[4,5,2,3] y, float[2,3,4,5] a"
    expected, settled = _run(_graph(body, outputs)), layouts.settle_layouts(_graph(body, outputs))
    got = _run(settled)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name])


def test_values_along_one_axis() -> None:
    """[N, C, W] to [W, N, C] is no transposition that undoes itself."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[2,3,5] x, float[3,1] c) => (float[5,2,3] y) <int64 z = {0}> {
      [into] t = Transpose<perm = [2, 0, 1]>(x)
      s = CumSum(t, z)
      [out_of] u = Transpose<perm = [1, 2, 0]>(s)
      a = Add(u, c)
      v = Relu(a)
      [into_again] q = Transpose<perm = [2, 0, 1]>(v)
      y = CumSum(q, z)
    }"""
    graphs = [_marked(onnx.parser.parse_model(text)) for _ in range(2)]
    expected = _run(graphs[0])
    layouts.settle_layouts(graphs[1])
    np.testing.assert_array_equal(_run(graphs[1])["y"], expected["y"])
    assert _transposed(graphs[1]) == 30 + 3


@given(st.data())
def test_the_cut_is_a_minimum(data: st.DataObject) -> None:
    free = data.draw(st.integers(0, 5))
    place = st.integers(0, 1 + free)
    values = data.draw(st.lists(st.tuples(st.integers(1, 20), st.sets(place, min_size=1, max_size=4)), max_size=7))

    def cost(turned: set[int]) -> int:
        return sum(1 + size for size, touching in values if 0 < len(touching & turned) < len(touching))

    found = layouts._cut(free, [(float(size), touching) for size, touching in values])
    assert layouts._TURNED in found
    assert layouts._PLAIN not in found
    places = range(2, 2 + free)
    every = [set(some) | {1} for k in range(free + 1) for some in itertools.combinations(places, k)]
    assert cost(found) == min(map(cost, every))


#: A residual block, a branch of another size behind it, and a bias.
NET = """
<ir_version: 10, opset_import: ["" : 18]>
net (float[N,2,6,6] x) => (float[N,3] y)
<float[3,2,3,3] w1, float[3] b1, float[3,3,3,3] w2, float[3,3,3,3] w3, float[3,3,1,1] w4> {
  a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
  b = Relu(a)
  c = Conv<pads = [1, 1, 1, 1]>(b, w2)
  d = Add(c, b)
  e = Tanh(d)
  f = Conv<pads = [1, 1, 1, 1]>(e, w3)
  h = Conv<strides = [2, 2]>(f, w4)
  p = GlobalAveragePool(h)
  y = Flatten(p)
}
"""


@pytest.mark.parametrize("algorithm", ["zil", "bp"])
@pytest.mark.parametrize("batch", [0, 3])
def test_updates_stay_and_a_network_keeps_one_order(
    forced: None, monkeypatch: pytest.MonkeyPatch, algorithm: Any, batch: int
) -> None:
    rng = np.random.default_rng(0)
    shapes = {"x": (batch, 2, 6, 6), "target": (batch, 3)}
    feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    found = []
    for settle in (lambda graph: graph, layouts.settle_layouts):
        monkeypatch.setattr("zilc.pipeline.settle_layouts", settle)
        step = zilc.emit_training(model(NET), algorithm=algorithm)
        trainer = zilc.Trainer(step, lr=0.1, providers=["CPUExecutionProvider"])
        trainer.step(feeds)
        found.append((step, {**trainer.last, **trainer.state}))
    (plain, expected), (settled, got) = found
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6)
    turned = Counter(n.op_type for n in settled.model.graph.node if "spatial_first" in "".join(n.output))
    assert {"Relu", "Tanh", "Add"} <= turned.keys()
    assert not any("spatial_first" in "".join(n.output) for n in plain.model.graph.node)


def test_gradients_that_are_looked_at_keep_the_models_order(forced: None) -> None:
    step = zilc.emit_training(model(NET), outputs="grad")
    assert not any("spatial_first" in "".join(n.output) for n in step.model.graph.node)


#: Batch statistics and a mask around convolutions that are computed with spatial axes first; as many rows as channels,
#: so that an order of axes that is taken for another goes unnoticed by shapes.
TRAINED = """
<ir_version: 10, opset_import: ["" : 18]>
net (float[N,4,4,4] x) => (float[N,4] y)
<float[4,4,3,3] w1, float[4] s1, float[4] h1, float[4] m1, float[4] v1, float[4,4,3,3] w2, float[4,4,3,3] w3> {
  a = Conv<pads = [1, 1, 1, 1]>(x, w1)
  b = BatchNormalization(a, s1, h1, m1, v1)
  c = Relu(b)
  d = Conv<pads = [1, 1, 1, 1]>(c, w2)
  half = Constant<value_float = 0.5>()
  e = Dropout(d, half)
  f = Relu(e)
  h = Conv<pads = [1, 1, 1, 1]>(f, w3)
  p = GlobalAveragePool(h)
  y = Flatten(p)
}
"""


@pytest.mark.parametrize(
    ("dims", "budget"), [(None, None), ({"N": 5}, None), ({"N": 5}, "1TiB")], ids=["open", "fixed", "budget"]
)
def test_in_train_mode_updates_and_evaluation_stay(
    forced: None, monkeypatch: pytest.MonkeyPatch, dims: dict[str, int] | None, budget: str | None
) -> None:
    proto = model(TRAINED)
    for tensor in proto.graph.initializer:
        if tensor.name == "v1":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.linspace(0.5, 2, 4, dtype=np.float32), "v1"))
    rng = np.random.default_rng(0)
    shapes = {"x": (5, 4, 4, 4), "target": (5, 4)}
    feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    found = []
    for settle in (lambda graph: graph, layouts.settle_layouts):
        monkeypatch.setattr("zilc.pipeline.settle_layouts", settle)
        step = zilc.emit_training(proto, mode="train", dims=dims, memory_budget=budget)
        trainer = zilc.Trainer(step, lr=0.1, providers=["CPUExecutionProvider"], seed=3)
        losses = [trainer.step(feeds) for _ in range(3)]
        evaluation = trainer.evaluate(feeds)
        found.append({"losses": np.asarray(losses), "loss": np.asarray(evaluation.loss), **evaluation.predictions,
                      **trainer.state})  # fmt: skip
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert any("spatial_first" in name for node in step.model.graph.node for name in node.output)


def test_within_a_memory_budget_updates_have_the_same_bits(forced: None) -> None:
    """Transposes that a runtime moves past sums, or does not, would change them."""
    proto = models.build("resnet18", batch=4, image=32, width=8, classes=10)
    feeds = models.random_feeds(proto, 4, np.random.default_rng(0), loss="cross-entropy")

    def updated(budget: int | str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        step = zilc.emit_training(proto, loss="cross-entropy", memory_budget=budget)
        trainer = zilc.Trainer(step, lr=0.1, providers=["CPUExecutionProvider"])
        trainer.step(feeds)
        return step.signature["recompute"], trainer.state

    without, expected = updated("1TiB")
    for share in (0.9, 0.8):
        said, got = updated(int(without["peak_without"] * share))
        assert said["nodes"]
        assert [name for name in expected if expected[name].tobytes() != got[name].tobytes()] == []
