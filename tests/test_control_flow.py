"""Models with If, Scan and Loop, from file to gradient: unrolled where their course is known, one vertex where not."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import pytest
import torch

import zilc
from zilc.errors import MissingRule
from zilc.executors import executor
from zilc.reference import evaluator

RNG = np.random.default_rng(11)
HEAD = '<ir_version: 8, opset_import: ["" : 18]>'
IF = f"""{HEAD} g (double[3,4] x, bool c) => (double[3,5] y) <double[4,5] w, double[5] b> {{
  h = Tanh(x)
  y = If(c) <then_branch = t () => (double[3,5] ty) {{ m = MatMul(h, w)  ty = Add(m, b) }},
             else_branch = e () => (double[3,5] ey) {{ n = MatMul(x, w)  ey = Sigmoid(n) }}>
}}"""
NESTED_IF = f"""{HEAD} g (double[3,4] x, bool c, bool d) => (double[3,5] y) <double[4,5] w, double[5] b> {{
  y = If(c) <then_branch = t () => (double[3,5] ty) {{
               m = MatMul(x, w)
               ty = If(d) <then_branch = a () => (double[3,5] ay) {{ s = Sigmoid(b)  ay = Mul(m, s) }},
                           else_branch = o () => (double[3,5] oy) {{ oy = Tanh(m) }}> }},
             else_branch = e () => (double[3,5] ey) {{ n = MatMul(x, w)  ey = Exp(n) }}>
}}"""
SCAN = f"""{HEAD} g (double[3,4] s, double[T,3,4] x) => (double[3,4] last, double[T,3,4] y) <double[4,4] w> {{
  last, y = Scan <num_scan_inputs = 1, scan_input_directions = [1],
      body = b (double[3,4] h, double[3,4] u) => (double[3,4] after, double[3,4] out) {{
        m = MatMul(h, w)  a = Add(m, u)  after = Tanh(a)  out = Mul(after, h) }}> (s, x)
}}"""
LOOP = f"""{HEAD} g (int64 n, double[3,4] s) => (double[3,4] last, double[T,3,4] y) <double[4,4] w> {{
  last, y = Loop (n, , s) <body = b (int64 i, bool go, double[3,4] h)
                                   => (bool on, double[3,4] after, double[3,4] out) {{
      on = Identity(go)  m = MatMul(h, w)  after = Tanh(m)  k = Cast <to = 11> (i)  out = Mul(after, k) }}>
}}"""
FEEDS: dict[str, dict[str, np.ndarray]] = {
    "if then": {"c": np.asarray(True)},
    "if else": {"c": np.asarray(False)},
    "nested then": {"c": np.asarray(True), "d": np.asarray(False)},
    "nested then then": {"c": np.asarray(True), "d": np.asarray(True)},
    "nested else": {"c": np.asarray(False), "d": np.asarray(True)},
    "scan": {"s": RNG.standard_normal((3, 4)), "x": RNG.standard_normal((5, 3, 4))},
    "loop": {"n": np.asarray(4), "s": RNG.standard_normal((3, 4))},
}
TEXTS = {"if": IF, "nested": NESTED_IF, "scan": SCAN, "loop": LOOP}


def model(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    """The text's model, its <locals> random parameters; inputs named in ``constants`` become initializers."""
    made = onnx.parser.parse_model(text)
    for info in made.graph.value_info:
        shape = tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        made.graph.initializer.append(onnx.numpy_helper.from_array(RNG.standard_normal(shape), info.name))
    del made.graph.value_info[:]
    for name, value in constants.items():
        made.graph.input.remove(next(i for i in made.graph.input if i.name == name))
        made.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return made


def example(name: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    made = model(TEXTS[name.split()[0]])
    feeds = {i.name: FEEDS[name].get(i.name) for i in made.graph.input}
    return made, {k: RNG.standard_normal((3, 4)) if v is None else v for k, v in feeds.items()}


def trained(
    proto: onnx.ModelProto, feeds: dict[str, np.ndarray], targets: dict[str, np.ndarray], **options: Any
) -> dict[str, np.ndarray]:
    """Gradients of every parameter and floating input."""
    inputs = [n for n, x in feeds.items() if x.dtype.kind == "f"]
    step = zilc.emit_training(proto, output=list(targets), wrt=[*inputs, "w", "b"][: len(inputs) + count(proto)],
                              outputs="grad", **options)  # fmt: skip
    state = {n: np.asarray(step.state[n]) for n in step.state}
    given = {t["name"]: targets[t["output"]] for t in step.signature["targets"]}
    got = executor(step.model)({**feeds, **state, **given})
    return {e["name"]: got[e["grad"]] for e in (*step.signature["parameters"], *step.signature["input_grads"])}


def count(proto: onnx.ModelProto) -> int:
    return sum(t.name in ("w", "b") for t in proto.graph.initializer)


def numeric(
    proto: onnx.ModelProto, feeds: dict[str, np.ndarray], targets: dict[str, np.ndarray], name: str, v: np.ndarray
) -> float:
    """The energy's derivative along v, by central differences of the original model in float64."""

    def energy(h: float) -> float:
        moved, given = onnx.ModelProto(), dict(feeds)
        moved.CopyFrom(proto)
        if name in given:
            given[name] = given[name] + h * v
        else:
            tensor = next(t for t in moved.graph.initializer if t.name == name)
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + h * v, name))
        made = dict(zip([o.name for o in proto.graph.output], evaluator(moved).run(None, given), strict=True))
        return sum(0.5 * float(np.sum((made[n] - t) ** 2)) for n, t in targets.items())

    return (energy(1e-5) - energy(-1e-5)) / 2e-5


def check(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], **options: Any) -> None:
    outputs = dict(zip([o.name for o in proto.graph.output], evaluator(proto).run(None, feeds), strict=True))
    targets = {name: y + RNG.standard_normal(y.shape) for name, y in outputs.items()}
    got = trained(proto, feeds, targets, **options)
    assert set(got) == {n for n, x in feeds.items() if x.dtype.kind == "f"} | {
        t.name for t in proto.graph.initializer if t.name in ("w", "b")
    }
    for name, gradient in got.items():
        v = RNG.standard_normal(gradient.shape)
        exact, expected = float(np.sum(gradient * v)), numeric(proto, feeds, targets, name, v)
        scale = float(np.linalg.norm(gradient) * np.linalg.norm(v)) + 1e-3
        assert abs(exact - expected) <= 1e-6 * scale, f"{name}: {exact!r}, central difference {expected!r}"
    if options.get("algorithm", "zil") == "zil":
        other = trained(proto, feeds, targets, **{**options, "algorithm": "bp"})
        assert {n: g.tobytes() for n, g in got.items()} == {n: g.tobytes() for n, g in other.items()}


@pytest.mark.parametrize("name", FEEDS)
def test_one_vertex(name: str) -> None:
    """Course known at run time only: central differences of the original, and Z-IL = BP bit for bit."""
    proto, feeds = example(name)
    assert any("one vertex" in note for note in zilc.levelize(proto, output=proto.graph.output[0].name).report["notes"])
    check(proto, feeds)


@pytest.mark.parametrize("name", FEEDS)
def test_levelled_model_is_the_original_bit_for_bit(name: str) -> None:
    proto, feeds = example(name)
    levelled = zilc.levelize(proto, output=proto.graph.output[0].name).model
    for key, y in executor(proto)(feeds).items():
        assert executor(levelled)(feeds)[key].tobytes() == y.tobytes()


@pytest.mark.parametrize("taken", [True, False])
def test_a_known_branch_is_inlined(taken: bool) -> None:
    proto = model(IF, c=np.asarray(taken))
    feeds = {"x": RNG.standard_normal((3, 4))}
    if taken:
        check(proto, feeds)
    else:  # what only the other branch reads is no leaf
        step = zilc.emit_training(proto, outputs="grad")
        assert [p["name"] for p in step.signature["parameters"]] == ["w"]
    assert "If" not in {n.op_type for n in zilc.levelize(proto).model.graph.node}


def test_a_branch_that_shapes_decide() -> None:
    """As exporters guard a squeeze: If(shape[0] == 3)."""
    text = f"""{HEAD} g (double[N,4] x) => (double[N,5] y) <double[4,5] w, double[5] b> {{
      s = Shape <start = 0, end = 1> (x)  three = Constant <value_ints = [3]> ()  q = Equal(s, three)  c = Squeeze(q)
      y = If(c) <then_branch = t () => (double[N,5] ty) {{ m = MatMul(x, w)  ty = Add(m, b) }},
                 else_branch = e () => (double[N,5] ey) {{ n = MatMul(x, w)  ey = Sub(n, b) }}>
    }}"""
    proto = model(text)
    assert "If" in {n.op_type for n in zilc.levelize(proto).model.graph.node}
    assert "If" not in {n.op_type for n in zilc.levelize(proto, dims={"N": 3}).model.graph.node}
    check(proto, {"x": RNG.standard_normal((3, 4))}, dims={"N": 3})
    check(proto, {"x": RNG.standard_normal((2, 4))})


@pytest.mark.parametrize("batch", [1, 2])
def test_branches_of_different_rank(batch: int) -> None:
    """As PyTorch guards a squeeze whose dimension may be 1; what is declared of the output fits one branch only."""
    text = f"""{HEAD} g (double[N,3,4] x) => (double[R,5] y) <double[4,5] w, double[5] b> {{
      h = Tanh(x)
      s = Shape <start = 0, end = 1> (h)  one = Constant <value_ints = [1]> ()  q = Equal(s, one)  c = Squeeze(q)
      i = If(c) <then_branch = t () => (double[3,4] ti) {{ z = Constant <value_ints = [0]> ()  ti = Squeeze(h, z) }},
                 else_branch = e () => (double[N,3,4] ei) {{ ei = Identity(h) }}>
      rows = Constant <value_ints = [-1, 4]> ()  r = Reshape(i, rows)  m = MatMul(r, w)  y = Add(m, b)
    }}"""
    proto = model(text)
    if batch == 1:
        proto.graph.value_info.append(onnx.helper.make_tensor_value_info("i", onnx.TensorProto.DOUBLE, [3, 4]))
    assert "If" in {n.op_type for n in zilc.levelize(proto).model.graph.node}
    check(proto, {"x": RNG.standard_normal((batch, 3, 4))})


def test_a_scan_of_known_length_is_unrolled() -> None:
    proto = model(SCAN.replace("[T,", "[5,"))
    report = zilc.levelize(proto, output="last").report
    assert any("5 iterations" in note for note in report["notes"])
    leaves = {leaf["name"]: leaf for leaf in report["leaves"]}
    assert leaves["w"]["consumers"] == 5
    assert report["levels"] == 3 * 5 + 1  # the final state is an output of the last iteration too: a terminal
    check(proto, FEEDS["scan"])


def test_a_loop_of_known_length_is_unrolled() -> None:
    proto = model(LOOP.replace("[T,", "[4,"), n=np.asarray(4))
    report = zilc.levelize(proto, output="last").report
    assert any("4 iterations" in note for note in report["notes"])
    assert {leaf["name"]: leaf["consumers"] for leaf in report["leaves"]} == {"w": 4, "s": 1}
    check(proto, {"s": FEEDS["loop"]["s"]})


@pytest.mark.parametrize("options", [{}, {"dims": {"T": 5}}], ids=["vertex", "unrolled"])
def test_axes_and_directions(options: dict[str, Any]) -> None:
    text = f"""{HEAD} g (double[3] s, double[4,T] x) => (double[3] last, double[4,T] y) <double[4,3] w, double[3] b> {{
      last, y = Scan <num_scan_inputs = 1, scan_input_directions = [1], scan_input_axes = [-1], scan_output_axes = [1],
        scan_output_directions = [1],
        body = b (double[3] h, double[4] u) => (double[3] after, double[4] out) {{
          m = MatMul(u, w)  a = Add(m, h)  c = Mul(a, b)  after = Tanh(c)
          p = ReduceSum(after)  out = Mul(u, p) }}> (s, x)
    }}"""
    check(model(text), {"s": RNG.standard_normal(3), "x": RNG.standard_normal((4, 5))}, **options)


@pytest.mark.parametrize("way", [0, 1])
def test_a_scan_of_opset_8(way: int) -> None:
    """It has a batch, and an operand for lengths: the same numbers as opset 9's Scan, sequence by sequence."""
    head = HEAD.replace("18", "8").replace("ir_version: 8", "ir_version: 3")
    text = f"""{head} g (double[2,4] s, double[2,3,4] x) => (double[2,4] last, double[2,3,4] y) {{
      last, y = Scan <num_scan_inputs = 1, directions = [{way}],
        body = b (double[4] h, double[4] u) => (double[4] after, double[4] out) {{
          a = Add(h, u)  after = Tanh(a)  out = Mul(after, u) }}> ( , s, x)
    }}"""
    proto = onnx.parser.parse_model(text)
    feeds = {"s": RNG.standard_normal((2, 4)), "x": RNG.standard_normal((2, 3, 4))}
    target = {"last": np.zeros((2, 4)), "y": np.zeros((2, 3, 4))}
    got = trained(proto, feeds, target)
    s, x = (torch.tensor(feeds[n], requires_grad=True) for n in ("s", "x"))
    h, ys = s, []
    for t in (range(3), range(2, -1, -1))[way]:
        h = torch.tanh(h + x[:, t])
        ys.append(h * x[:, t])
    (0.5 * (h.square().sum() + sum(y.square().sum() for y in ys))).backward()
    for name, leaf in (("s", s), ("x", x)):
        np.testing.assert_allclose(got[name], leaf.grad.numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("way", [0, 1])
def test_a_scan_of_opset_8_over_sequences_of_several_lengths(way: int) -> None:
    """Forward as onnxruntime has it, zeros behind the end; backwards as the loop over each sequence."""
    head = HEAD.replace("18", "8").replace("ir_version: 8", "ir_version: 3")
    text = f"""{head} g (int64[3] n, double[3,4] s, double[3,5,4] x) => (double[3,4] last, double[3,5,4] y) {{
      last, y = Scan <num_scan_inputs = 1, directions = [{way}],
        body = b (double[4] h, double[4] u) => (double[4] after, double[4] out) {{
          a = Add(h, u)  after = Tanh(a)  out = Mul(after, u) }}> (n, s, x)
    }}"""
    proto, lengths = onnx.parser.parse_model(text), np.asarray([5, 2, 3])
    feeds = {"n": lengths, "s": RNG.standard_normal((3, 4)), "x": RNG.standard_normal((3, 5, 4))}
    levelled = executor(zilc.levelize(proto, output="last").model)(feeds)
    for name, expected in executor(proto)(feeds).items():
        np.testing.assert_allclose(levelled[name], expected, rtol=1e-12, atol=1e-13)
    got = trained(proto, feeds, {"last": np.zeros((3, 4)), "y": np.zeros((3, 5, 4))})
    s, x = (torch.tensor(feeds[n], requires_grad=True) for n in ("s", "x"))
    energy = torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(lengths):
        h = s[b]
        for t in range(length)[:: -1 if way else 1]:
            h = torch.tanh(h + x[b, t])
            energy = energy + 0.5 * (h * x[b, t]).square().sum()
        energy = energy + 0.5 * h.square().sum()
    energy.backward()
    for name, leaf in (("s", s), ("x", x)):
        np.testing.assert_allclose(got[name], leaf.grad.numpy(), rtol=1e-12, atol=1e-13)


def test_a_while_loop_whose_condition_follows() -> None:
    """i < 3, counted in the loop itself, no trip count."""
    text = f"""{HEAD} g (double[3,4] s) => (double[3,4] last) <double[4,4] w> {{
      zero = Constant <value = int64 {{0}}> ()
      k, last = Loop ( , , zero, s) <body = b (int64 i, bool go, int64 n, double[3,4] h)
                                             => (bool on, int64 m, double[3,4] after) {{
          one = Constant <value = int64 {{1}}> ()  m = Add(n, one)  three = Constant <value = int64 {{3}}> ()
          on = Less(m, three)  p = MatMul(h, w)  after = Sin(p) }}>
    }}"""
    proto = model(text)
    report = zilc.levelize(proto).report
    assert any("3 iterations" in note for note in report["notes"])
    check(proto, {"s": FEEDS["loop"]["s"]})


def test_a_while_loop_decided_by_values() -> None:
    text = f"""{HEAD} g (double[3,4] s) => (double[3,4] last) <double[4,4] w> {{
      last = Loop ( , , s) <body = b (int64 i, bool go, double[3,4] h) => (bool on, double[3,4] after) {{
          p = MatMul(h, w)  q = Tanh(p)  tenth = Constant <value = double {{0.1}}> ()  after = Mul(q, tenth)
          size = ReduceSumSquare <keepdims = 0> (after)  bound = Constant <value = double {{0.001}}> ()
          on = Greater(size, bound) }}>
    }}"""
    proto = model(text)
    assert any("one vertex" in note for note in zilc.levelize(proto).report["notes"])
    check(proto, {"s": FEEDS["loop"]["s"]})


def test_weights_of_a_branch_are_leaves() -> None:
    """Initializers inside a subgraph, of one name in both branches, are two parameters."""
    text = f"""{HEAD} g (double[3,4] x, bool c) => (double[3,5] y) {{
      y = If(c) <then_branch = t () => (double[3,5] ty) <double[4,5] w> {{ ty = MatMul(x, w) }},
                 else_branch = e () => (double[3,5] ey) <double[4,5] w> {{ n = MatMul(x, w)  ey = Tanh(n) }}>
    }}"""
    proto = onnx.parser.parse_model(text)
    values = RNG.standard_normal((2, 4, 5))
    for attribute, value in zip(proto.graph.node[0].attribute, values, strict=True):
        del attribute.g.value_info[:]
        attribute.g.initializer.append(onnx.numpy_helper.from_array(value, "w"))
    step = zilc.emit_training(proto, outputs="grad")
    names = [p["name"] for p in step.signature["parameters"]]
    assert len(names) == 2
    x, target = RNG.standard_normal((3, 4)), RNG.standard_normal((3, 5))
    for taken in (True, False):
        got = executor(step.model)(
            {"x": x, "c": np.asarray(taken), "target": target, **{n: np.asarray(step.state[n]) for n in names}}
        )
        w = torch.tensor(values, requires_grad=True)
        m = torch.tensor(x) @ w[0 if taken else 1]
        (0.5 * ((m if taken else torch.tanh(m)) - torch.tensor(target)).square().sum()).backward()
        expected = sorted(np.linalg.norm(g) for g in w.grad.numpy())
        np.testing.assert_allclose(sorted(np.linalg.norm(got[f"{n}.grad"]) for n in names), expected, rtol=1e-12)


def test_a_missing_rule_inside_is_named() -> None:
    text = IF.replace('["" : 18]', '["" : 18, "my" : 1]').replace("ey = Sigmoid(n)", "ey = my.Odd(n)")
    with pytest.raises(MissingRule, match="Odd"):
        zilc.emit_training(model(text))


def test_a_scripted_loop_equals_torch() -> None:
    """TorchScript exports a Python loop as Loop; its trip count is a constant."""

    class Repeat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            for _ in range(int(n)):
                x = torch.tanh(self.inner(x))
            return x

    torch.manual_seed(0)
    module = Repeat().double()
    x, n = torch.randn(3, 4, dtype=torch.float64), torch.tensor(3)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            torch.jit.script(module), (x, n), file, dynamo=False, input_names=["x", "n"], output_names=["y"]
        )
    proto = onnx.load_from_string(file.getvalue())
    assert "Loop" in {node.op_type for node in proto.graph.node}
    target = torch.randn(3, 4, dtype=torch.float64)
    step = zilc.emit_training(proto, outputs="grad")
    got = executor(step.model)(
        {"x": x.numpy(), "n": n.numpy(), "target": target.numpy(), **{k: np.asarray(step.state[k]) for k in step.state}}
    )
    (0.5 * (module(x, n) - target).square().sum()).backward()
    ours = sorted(float(np.linalg.norm(got[p["grad"]])) for p in step.signature["parameters"])
    theirs = sorted(float(p.grad.norm()) for p in module.parameters())
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
