"""BatchNormalization and Dropout turned to training form: structure, every opset, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import pytest

import zilc
from tests.graphs import model
from zilc.analysis import structure
from zilc.errors import ModelError, OptionError
from zilc.executors import executor
from zilc.graph import FROZEN, STATISTICS
from zilc.passes import contracts
from zilc.passes.identities import flow_of
from zilc.passes.levels import find_levels

#: Both operators in inference form, and Dropout's mask read.
BOTH = """
<ir_version: 10, opset_import: ["" : 18]>
both (float[N,3] x) => (float[N,2] y, bool[N,4] kept) <float[3,4] w1, float[4] s, float[4] b, float[4] m, float[4] v,
  float[4,2] w2, float ratio> {
  [fc1] h0 = MatMul(x, w1)
  [norm] h1 = BatchNormalization(h0, s, b, m, v)
  [act] h2 = Tanh(h1)
  [drop] h3, kept = Dropout(h2, ratio)
  [out] y = MatMul(h3, w2)
}
"""


def both(text: str = BOTH, *, ratio: float = 0.25, dtype: str = "float32", seed: int = 0) -> onnx.ModelProto:
    proto = model(text, seed=seed, dtype=dtype)
    for tensor in proto.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if tensor.name == "v":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.abs(value) + 1, "v"))
        if tensor.name == "ratio":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(ratio, value.dtype), "ratio"))
    return proto


def feeds(step: zilc.pipeline.TrainingStep, count: int = 6, dtype: str = "float32", **more: object) -> dict:
    rng = np.random.default_rng(1)
    given = {"x": rng.standard_normal((count, 3)), "target": rng.standard_normal((count, 2)), "lr": np.asarray(0.1)}
    cast = {name: value.astype(dtype) for name, value in given.items()}
    return {**cast, **step.state, "seed": np.asarray(4), **more}


# --- structure ------------------------------------------------------------------------------------------------


def test_turned_vertices_stay_one_vertex_on_their_level() -> None:
    plain, turned = structure(both()), structure(both(), mode="train")
    assert [turned.flow.names[v] for v in range(5)] == plain.flow.names == ["fc1", "norm", "act", "drop", "out"]
    assert turned.levels.vertices == plain.levels.vertices
    assert turned.levels.depth == plain.levels.depth
    assert turned.flow.leaves == plain.flow.leaves
    ops = [node.op for node in turned.flow.vertices]
    assert ops == ["MatMul", "BatchNormalization", "Tanh", "Mul", "MatMul"]
    assert plain.mode is None
    assert turned.mode is not None
    assert turned.mode.batch_normalizations == ["norm"]
    assert turned.mode.dropouts == ["drop"]
    assert list(turned.mode.carried) == ["m", "v"]
    assert (turned.mode.seed, turned.mode.step) == ("seed", "step")


def test_what_is_frozen_carries_no_derivative() -> None:
    turned = structure(both(), mode="train")
    frozen = [node for node in turned.graph.nodes if getattr(node, FROZEN, False)]
    assert len(frozen) == len(turned.graph.nodes) - 5
    assert not {id(node) for node in frozen} & {id(node) for node in turned.flow.vertices}
    norm = next(node for node in turned.graph.nodes if node.op == "BatchNormalization")
    assert norm.attrs["training_mode"] == 1
    made = {t.name for node in frozen for t in node.outputs}
    assert set(getattr(norm, STATISTICS)) <= made
    assert contracts.acyclic(turned.graph) is None
    assert find_levels(flow_of(turned.graph, turned.clamped)) == turned.levels


def test_the_training_graph_holds_plain_operators_and_each_statistic_once() -> None:
    step = zilc.emit_training(both(), mode="train")
    ops = [node.op_type for node in step.model.graph.node]
    assert "BatchNormalization" not in ops
    assert "Dropout" not in ops
    assert ops.count("ReduceMean") == 2  # mean and variance, shared by forward, running update and derivative
    assert not any(op.startswith("Random") for op in ops)


def test_a_graph_without_either_is_returned_as_it_is() -> None:
    text = BOTH.replace("BatchNormalization(h0, s, b, m, v)", "Relu(h0)").replace(
        "h3, kept = Dropout(h2, ratio)", "h3 = Relu(h2)\n  kept = Greater(h2, h3)"
    )
    step = zilc.emit_training(model(text.replace(", float ratio", "")), mode="train")
    assert step.signature["mode"] == "train"
    assert step.signature["seed"] is None
    assert step.signature["step"] is None
    assert step.signature["carried"] == []
    plain = zilc.emit_training(model(text.replace(", float ratio", "")))
    assert list(step.model.graph.node) == list(plain.model.graph.node)


# --- every opset ------------------------------------------------------------------------------------------------


def at_opset(opset: int, *, outputs: int = 1, ratio: float = 0.25) -> onnx.ModelProto:
    """Both operators as opset 7 to 25 writes them; ``outputs`` of BatchNormalization, more than one in training."""
    rng = np.random.default_rng(0)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    values = {"w1": rng.standard_normal((3, 4)), "s": rng.standard_normal(4), "b": rng.standard_normal(4),
              "m": rng.standard_normal(4), "v": np.abs(rng.standard_normal(4)) + 1, "w2": rng.standard_normal((4, 2)),
              "ratio": np.asarray(ratio)}  # fmt: skip
    if opset < 12:
        del values["ratio"]
    training = {"training_mode": 1} if outputs > 1 and opset >= 14 else {}
    names = ["h1", "m_out", "v_out", "m_saved", "v_saved"][:outputs]
    drop = helper.make_node("Dropout", ["h2"], ["h3"], ratio=ratio) if opset < 12 else helper.make_node(
        "Dropout", ["h2", "ratio"], ["h3"]
    )  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h0"]),
        helper.make_node("BatchNormalization", ["h0", "s", "b", "m", "v"], names, momentum=0.75, **training),
        helper.make_node("Tanh", ["h1"], ["h2"]),
        drop,
        helper.make_node("MatMul", ["h3", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "both",
        [helper.make_tensor_value_info("x", kind, ["N", 3])], [helper.make_tensor_value_info("y", kind, ["N", 2])],
        [onnx.numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in values.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(made)
    return made


def update(proto: onnx.ModelProto, **more: object) -> dict[str, np.ndarray]:
    step = zilc.emit_training(proto, mode="train", **more)
    onnx.checker.check_model(step.model, full_check=True)
    return executor(step.model)(feeds(step))


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 20, 22, 24, 25])
def test_every_opset_gives_the_same_update(opset: int) -> None:
    expected, found = update(at_opset(18)), update(at_opset(opset))
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(("opset", "outputs"), [(7, 5), (9, 5), (13, 5), (14, 3), (15, 3), (20, 3)])
def test_training_form_in_the_file_gives_the_same_update(opset: int, outputs: int) -> None:
    expected, found = update(at_opset(18)), update(at_opset(opset, outputs=outputs))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(("opset", "outputs"), [(9, 5), (15, 3)])
def test_training_form_in_the_file_stays_so_in_eval_mode(opset: int, outputs: int) -> None:
    """Batch statistics and their derivative, as the file says; nothing is carried, and a note says so."""
    step = zilc.emit_training(at_opset(opset, outputs=outputs), outputs="grad")
    assert step.signature["carried"] == []
    assert any("are in training form in the file" in note for note in step.report["notes"])
    # Dropout passes everything in both.
    turned = zilc.emit_training(at_opset(18, ratio=0.0), mode="train", outputs="grad")
    given = feeds(turned)
    expected, found = executor(turned.model)(given), executor(step.model)({**given, **step.state})
    for leaf in step.signature["parameters"]:
        np.testing.assert_allclose(found[leaf["grad"]], expected[leaf["grad"]], rtol=2e-6, atol=2e-6)


def test_saved_statistics_that_are_read_are_refused() -> None:
    proto = at_opset(9, outputs=5)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("m_saved", onnx.TensorProto.FLOAT, [4]))
    with pytest.raises(ModelError, match=r"^vertex 'h1' \(BatchNormalization\): its saved statistics 'm_saved' are"):
        zilc.emit_training(proto, output="y", mode="train")


def test_running_outputs_that_the_file_reads_hold_the_next_statistics() -> None:
    proto = at_opset(15, outputs=3)
    for name in ("m_out", "v_out"):
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]))
    step = zilc.emit_training(proto, output="y", mode="train")
    found = executor(step.model)(feeds(step))
    assert np.array_equal(found["m_out"], found["m.next"])
    assert np.array_equal(found["v_out"], found["v.next"])
    assert not np.array_equal(found["m.next"], step.state["m"])


# --- Dropout's ratio ------------------------------------------------------------------------------------------


def test_ratio_zero_is_left_in_inference_form() -> None:
    step = zilc.emit_training(both(ratio=0.0), output="y", mode="train")
    assert step.signature["seed"] is None
    assert step.report["turned"] == {"BatchNormalization": ["norm"], "Dropout": []}
    found = executor(step.model)({n: v for n, v in feeds(step).items() if n != "seed"})
    assert found["kept"].all()


def test_ratio_one_drops_everything_and_nothing_is_nan() -> None:
    step = zilc.emit_training(both(ratio=1.0), output="y", mode="train", outputs="grad")
    found = executor(step.model)(feeds(step))
    assert not found["kept"].any()
    assert not found["y"].any()
    for leaf in step.signature["parameters"]:
        assert not found[leaf["grad"]].any(), leaf["name"]


@pytest.mark.parametrize("shape", ["", "[1]"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.7, 1.0])
def test_a_ratio_at_run_time_gives_the_bits_of_a_constant_one(ratio: float, shape: str) -> None:
    text = BOTH.replace(", float ratio>", ">").replace("(float[N,3] x)", f"(float[N,3] x, float{shape} ratio)")
    step = zilc.emit_training(both(text), output="y", mode="train")
    assert "ratio" in step.signature["inputs"]
    asked = np.full((1,) if shape else (), ratio, np.float32)
    found = executor(step.model)(feeds(step, 200, ratio=asked))
    constant = zilc.emit_training(both(ratio=ratio), output="y", mode="train")
    expected = executor(constant.model)(feeds(constant, 200))
    for name in ("kept", "y", "loss", "w1.next", "m.next"):
        assert np.array_equal(found[name], expected[name]), name


def test_a_ratio_at_run_time_has_no_gradient() -> None:
    text = BOTH.replace(", float ratio>", ">").replace("(float[N,3] x)", "(float[N,3] x, float ratio)")
    with pytest.raises(OptionError, match="no gradient path from input 'ratio'"):
        zilc.emit_training(both(text), output="y", mode="train", wrt="ratio")


def test_a_ratio_out_of_range_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^vertex 'drop' \(Dropout\): ratio 1\.5, expected one from 0 to 1"):
        zilc.emit_training(both(ratio=1.5), output="y", mode="train")


# --- running statistics ---------------------------------------------------------------------------------------

#: One layer, applied to x and to what it made of x.
TWICE = """
<ir_version: 10, opset_import: ["" : 18]>
twice (float[N,3] x) => (float[N,3] y) <float[3] s, float[3] b, float[3] m, float[3] v, float[3,3] w> {
  [first] h0 = BatchNormalization<momentum: float = 0.75>(x, s, b, m, v)
  [mix] h1 = MatMul(h0, w)
  [second] y = BatchNormalization<momentum: float = 0.75>(h1, s, b, m, v)
}
"""


def test_a_layer_applied_twice_moves_its_statistics_twice() -> None:
    proto = both(TWICE, dtype="float64")
    step = zilc.emit_training(proto, mode="train", outputs="grad")
    assert [entry["name"] for entry in step.signature["carried"]] == ["m", "v"]
    x = np.random.default_rng(2).standard_normal((7, 3))
    found = executor(step.model)({"x": x, "target": np.zeros((7, 3)), **step.state})
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    m, v, value = held["m"], held["v"], x
    epsilon = float(np.float32(1e-5))
    for last in (False, True):
        mean, variance = value.mean(0), value.var(0)
        m, v = 0.75 * m + 0.25 * mean, 0.75 * v + 0.25 * variance
        value = (value - mean) / np.sqrt(variance + epsilon) * held["s"] + held["b"]
        value = value if last else value @ held["w"]
    np.testing.assert_allclose(found["y"], value, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found["m.next"], m, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found["v.next"], v, rtol=1e-12, atol=1e-12)


#: Two fresh layers as exporters write them that merge equal constants.
MERGED = TWICE.replace("h1, s, b, m, v", "h1, s2, b2, m, v").replace(
    "float[3,3] w>", "float[3,3] w, float[3] s2, float[3] b2>"
)


@pytest.mark.parametrize(
    ("text", "own"),
    [
        (MERGED, ["h0.running_mean", "h0.running_var", "y.running_mean", "y.running_var"]),
        (TWICE.replace("x, s, b, m, v", "x, s, m, m, v").replace("h1, s, b, m, v", "h1, s, b, s, b"),
         ["h0.running_mean", "v", "y.running_mean", "y.running_var"]),
    ],
)  # fmt: skip
def test_merged_constants_are_taken_apart(text: str, own: list[str]) -> None:
    step = zilc.emit_training(both(text), mode="train")
    assert [entry["name"] for entry in step.signature["carried"]] == own
    assert any("have one of their own" in note for note in step.report["notes"])
    assert not {p["name"] for p in step.signature["parameters"]} & set(own)


def test_a_bias_merged_with_a_running_mean_is_trained_by_itself() -> None:
    """Fresh layers have zeros for both: in eval mode the tensor is left out, in training they part."""
    text = TWICE.replace("x, s, b, m, v", "x, s, b, b, v").replace("h1, s, b, m, v", "h1, s, b, b, v")
    plain, turned = zilc.emit_training(both(text)), zilc.emit_training(both(text), mode="train")
    assert "b" not in [p["name"] for p in plain.signature["parameters"]]
    assert "b" in [p["name"] for p in turned.signature["parameters"]]
    assert np.array_equal(turned.state["h0.running_mean"], turned.state["b"])


def test_running_statistics_that_a_node_makes_are_refused() -> None:
    text = TWICE.replace("[first] h0", "[shift] mm = Add(m, b)\n  [first] h0")
    text = text.replace("x, s, b, m, v", "x, s, b, mm, v")
    with pytest.raises(ModelError, match=r"^vertex 'first' \(BatchNormalization\): its running statistics 'mm' are no"):
        zilc.emit_training(both(text), mode="train")


def test_inside_control_flow_is_refused() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    branch (float[N,3] x, bool c) => (float[N,3] y) <float[3,3] w> {
      h = MatMul(x, w)
      [choose] y = If (c) <
        then_branch = t () => (float[N,3] a) { [gone] a = Dropout(h) },
        else_branch = e () => (float[N,3] b) { b = Neg(h) }
      >
    }
    """
    expected = (
        "vertex 'choose' (If): holds vertex 'gone' (Dropout) in its body, expected training-mode operators outside "
        "control flow. Fix its course, so that it is written out (--dim NAME=N settles a length), or use --mode eval."
    )
    with pytest.raises(ModelError) as caught:
        zilc.emit_training(model(text), mode="train")
    assert str(caught.value) == expected


def test_names_that_are_taken_get_the_prefix() -> None:
    text = BOTH.replace("float[N,3] x", "float[N,3] seed").replace("MatMul(x, w1)", "MatMul(seed, w1)")
    signature = zilc.emit_training(both(text), output="y", mode="train", optimizer="adam").signature
    assert signature["inputs"] == ["seed"]
    assert signature["seed"] == "zilc.seed"
    assert signature["step"] == {"name": "step", "next": "step.next"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_takes_its_statistics_in_float32(dtype: str) -> None:
    """300 numbers near 300: their sum is beyond float16, and their squares further."""
    text = BOTH.replace('"" : 18', '"" : 22').replace("float[", f"{dtype}[").replace("float ratio", f"{dtype} ratio")
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    kind = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, dtype.upper()))
    del proto.graph.value_info[:]
    shapes = {"w1": (3, 4), "s": (4,), "b": (4,), "m": (4,), "v": (4,), "w2": (4, 2)}
    values = {n: rng.standard_normal(s) for n, s in shapes.items()} | {"v": np.ones(4), "ratio": np.asarray(0.25)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v.astype(kind), n) for n, v in values.items())
    step = zilc.emit_training(proto, output="y", mode="train")
    onnx.checker.check_model(step.model, full_check=True)
    x = (300 + rng.standard_normal((300, 3))).astype(kind)
    given = {"x": x, "target": np.zeros((300, 2), kind), "lr": np.float32(0), "seed": np.asarray(0), **step.state}
    found = executor(step.model, prefer="reference")(given)
    hidden = (x @ np.asarray(step.state["w1"])).astype(np.float64)
    mean = 0.9 * np.asarray(step.state["m"], np.float64) + 0.1 * hidden.mean(0)
    assert found["m.next"].dtype == kind
    np.testing.assert_allclose(found["m.next"].astype(np.float64), mean, rtol=2e-2)
    assert np.isfinite(found["v.next"].astype(np.float64)).all()
    assert np.isfinite(found["y"].astype(np.float64)).all()
