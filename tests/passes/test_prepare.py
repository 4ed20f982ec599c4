"""Models as exporters write them: opsets, functions, constants, dimensions, ties, external data."""

import os

import numpy as np
import onnx
import onnx.parser
import pytest

import zilc
from tests.graphs import CHAIN, SKIP, initial, model
from zilc import onnx_io
from zilc.errors import ModelError, OptionError
from zilc.executors import executor

RNG = np.random.default_rng(0)


def gradients(proto, feeds, **options):
    step = zilc.emit_training(proto, outputs="grad", **options)
    got = executor(step.model)({**feeds, **{n: np.asarray(step.state[n]) for n in step.state}})
    return {p["name"]: got[p["grad"]] for p in step.signature["parameters"]}


def feeds(n=3, width=4, out=3):
    return {
        "x": RNG.standard_normal((n, width)).astype("f"),
        "target": RNG.standard_normal((n, out)).astype("f"),
    }


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 18, 21, 24, 26])
def test_any_opset_gives_the_same_gradients(opset):
    proto = model(SKIP)
    given = feeds()
    expected = gradients(proto, given)
    proto.opset_import[0].version = opset
    proto.ir_version = min(10, 3 + opset // 3)
    if proto.ir_version < 4:
        for t in proto.graph.initializer:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)))
    step = zilc.emit_training(proto, outputs="grad")
    assert step.model.opset_import[0].version == max(opset, 18)
    got = gradients(proto, given)
    assert all(got[n].tobytes() == expected[n].tobytes() for n in expected)


def test_operators_that_changed_are_converted():
    """Opset 7: Dropout without a mode input, Softmax on a flattened axis, BatchNormalization with spatial."""
    text = """<ir_version: 3, opset_import: ["" : 7]>
    g (float[2,3] x) => (float[2,3] y) { a = Dropout<ratio=0.5>(x)  b = Sum(a, x)  y = Softmax<axis=1>(b) }"""
    made = zilc.levelize(onnx.parser.parse_model(text)).model
    x = RNG.standard_normal((2, 3)).astype("f")
    e = np.exp(2 * x)
    assert np.allclose(executor(made)({"x": x})["y"], e / e.sum(1, keepdims=True), rtol=1e-6)


def test_newest_opset_is_brought_down_to_what_runtimes_load():
    proto = model(CHAIN)
    proto.opset_import[0].version = onnx.defs.onnx_opset_version()
    proto.ir_version = 13
    step = zilc.emit_training(proto)
    assert step.model.opset_import[0].version == 26
    assert step.model.ir_version <= 13
    wanted = onnx.defs.onnx_opset_version()
    assert zilc.emit_training(proto, opset=wanted).model.opset_import[0].version == wanted


def test_local_functions_are_inlined():
    text = """<ir_version: 10, opset_import: ["" : 18, "local" : 1]>
    g (float[N,4] x) => (float[N,3] y) <float[4,3] w> { h = MatMul(x, w)  y = local.twice(h) }
    <domain: "local", opset_import: ["" : 18]> twice (a) => (b) { t = Tanh(a)  b = Add(t, t) }"""
    plain = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[N,4] x) => (float[N,3] y) <float[4,3] w> { h = MatMul(x, w)  t = Tanh(h)  y = Add(t, t) }"""
    given = feeds()
    a, b = gradients(model(text), given), gradients(model(plain), given)
    assert a["w"].tobytes() == b["w"].tobytes()
    assert [o.domain for o in zilc.emit_training(model(text)).model.opset_import] == [""]


def test_weights_behind_constants_are_parameters():
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[N,4] x) => (float[N,3] y) <int64[2] s = {4, 3}> {
      w = ConstantOfShape<value = float[1] {0.25}>(s)
      b = Constant<value = float[3] {1.0, 2.0, 3.0}>()
      h = MatMul(x, w)
      y = Add(h, b)
    }"""
    proto = onnx.parser.parse_model(text)
    step = zilc.emit_training(proto)
    assert [p["name"] for p in step.signature["parameters"]] == ["w", "b"]
    assert np.array_equal(step.state["w"], np.full((4, 3), 0.25, "f"))
    assert np.array_equal(step.state["b"], np.float32([1, 2, 3]))
    levelled = zilc.levelize(proto).model
    assert [t.name for t in levelled.graph.initializer if np.prod(t.dims) > 3] == []  # stays a few bytes
    given = feeds()
    assert np.array_equal(executor(levelled)(given)["y"], executor(proto)(given)["y"])


def test_initializers_listed_as_inputs_are_parameters():
    proto = model(CHAIN)
    for t in proto.graph.initializer:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)))
    step = zilc.emit_training(proto)
    assert step.signature["inputs"] == ["x"]
    assert [p["name"] for p in step.signature["parameters"]] == ["w1", "b1", "w2"]


def test_symbolic_dimensions_stay_and_can_be_fixed():
    def shapes(**options):
        inputs = zilc.emit_training(model(SKIP), **options).model.graph.input
        return {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in inputs}

    assert shapes()["x"] == ["N", 4]
    assert shapes()["target"] == ["N", 3]
    assert shapes(dims={"N": 7})["target"] == [7, 3]
    with pytest.raises(OptionError, match=r"no symbolic dimension 'M'.*symbolic dimensions: N"):
        zilc.emit_training(model(SKIP), dims={"M": 7})


@pytest.mark.parametrize("transposed", [False, True])
def test_tied_weights_become_one_leaf(transposed):
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[N,4] x) => (float[N,4] y) <float[4,4] a, float[4,4] b> {
      h = MatMul(x, a)  t = Tanh(h)  y = MatMul(t, b) }"""
    proto = model(text)
    a = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    b = proto.graph.initializer[1]
    b.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(a.T if transposed else a), "b"))
    given = feeds(out=4)
    apart, together = gradients(proto, given), gradients(proto, given, tie=[("a", "b")])
    assert list(together) == ["a"]
    expected = apart["a"] + (apart["b"].T if transposed else apart["b"])
    assert np.allclose(together["a"], expected, rtol=1e-5, atol=1e-6)
    notes = zilc.emit_training(proto).report["notes"]
    assert any("'b' looks" in line and ("transpose" in line) == transposed for line in notes)


def test_a_tie_of_different_values_is_refused():
    with pytest.raises(OptionError, match="hold different values"):
        zilc.emit_training(model(SKIP), tie=[("w1", "b1")])
    with pytest.raises(OptionError, match="no parameter 'w9'"):
        zilc.emit_training(model(SKIP), tie={"w1": "w9"})


def test_external_data(tmp_path):
    proto = model(SKIP)
    given = feeds()
    expected = gradients(proto, given)
    path = tmp_path / "m.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="m.bin", size_threshold=0)
    got = gradients(path, given)
    assert all(got[n].tobytes() == expected[n].tobytes() for n in expected)
    got = gradients(path.read_bytes(), given, base_dir=tmp_path)
    assert all(got[n].tobytes() == expected[n].tobytes() for n in expected)
    # A frozen weight stays in the graph, and the graph stands alone.
    step = zilc.emit_training(path, freeze=["w1"])
    onnx_io.save(step.model, tmp_path / "sub.onnx", base_dir=str(tmp_path))
    ready = initial(step, given)
    os.rename(tmp_path / "m.bin", tmp_path / "gone.bin")
    assert executor(onnx.load(tmp_path / "sub.onnx"))(ready)["loss"].shape == ()
    with pytest.raises(ModelError, match=r"external data file 'm.bin' of tensor 'w1' is not there"):
        zilc.levelize(path)


def test_a_model_with_a_wrong_inner_shape_is_inferred_anew():
    proto = model(SKIP)
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("h1", 1, ["N", 9]))
    assert zilc.levelize(proto).report["levels"] == 6


def test_older_ways_to_place_pixels_keep_their_meaning():
    """Opset 10's nearest pixel is the one below, and above where the axis shrinks; here one axis each, scales fed."""
    text = """<ir_version: 5, opset_import: ["" : 10]>
    g (float[1,1,5,2] x, float[4] s) => (float[1,1,M,N] y) { y = Resize<mode="nearest">(x, s) }"""
    proto = onnx.parser.parse_model(text)
    x = RNG.standard_normal((1, 1, 5, 2)).astype("f")
    given = {"x": x, "s": np.float32([1, 1, 0.6, 2.5])}
    expected = executor(proto)(given)["y"]
    assert np.array_equal(expected[0, 0], x[0, 0][[0, 2, 4]][:, [0, 0, 0, 1, 1]])
    assert np.array_equal(executor(zilc.levelize(proto).model)(given)["y"], expected)


@pytest.mark.parametrize("how", ['nearest_mode = "ceil"', 'mode = "linear"'])
def test_a_way_to_place_pixels_that_is_gone_is_refused(how):
    text = f"""<ir_version: 6, opset_import: ["" : 11]>
    g (float[1,1,4,4] x) => (float[1,1,M,N] y) <float[0] r = {{}}, float[4] s = {{1, 1, 2, 2}}> {{
      y = Resize<coordinate_transformation_mode = "tf_half_pixel_for_nn", {how}>(x, r, s) }}"""
    with pytest.raises(ModelError, match="no opset from 13 on has"):
        zilc.levelize(onnx.parser.parse_model(text))


@pytest.mark.parametrize("kind", ["double", "float16", "float"])
def test_bounds_that_became_operands_have_the_type_of_the_data(kind):
    text = f"""<ir_version: 3, opset_import: ["" : 7]>
    g ({kind}[2,3] x) => ({kind}[2,4] y) {{ a = Clip<min=-0.5>(x)  y = Pad<pads=[0,0,0,1], value=0.25>(a) }}"""
    made = zilc.levelize(onnx.parser.parse_model(text)).model
    x = RNG.standard_normal((2, 3)).astype({"float": "f"}.get(kind, kind))
    expected = np.concatenate([np.maximum(x, -0.5), np.full((2, 1), 0.25)], axis=1)
    assert np.array_equal(executor(made)({"x": x})["y"], expected.astype(x.dtype))


def test_what_an_older_operator_does_not_take_goes_through_the_function_body():
    """Celu takes float64 from opset 28 on."""
    text = '<ir_version: 13, opset_import: ["" : 28]> g (double[2,3] x) => (double[2,3] y) { y = Celu<alpha=0.7>(x) }'
    made = zilc.levelize(onnx.parser.parse_model(text)).model
    assert made.opset_import[0].version == 26
    x = RNG.standard_normal((2, 3))
    expected = np.maximum(x, 0) + np.minimum(0, 0.7 * np.expm1(x / 0.7))
    assert np.allclose(executor(made)({"x": x})["y"], expected, rtol=1e-6)  # the attribute is float32


@pytest.mark.parametrize("wrong", [("h", [2, 9]), ("b", [4, 9]), ("b", [4, 2, 1])])
def test_a_wrong_inner_shape_is_named_and_takes_no_other_with_it(wrong):
    """What the file alone can say, the rank of a Reshape to a shape fed at run time, is still believed."""
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[2,4] x, int64[r] s, int64[2] i) => (float[2,3] y) <float[4,3] w> {
      a = Reshape(x, s)  b = Gather(a, i)  t = ReduceSum<keepdims=0>(b)  h = MatMul(x, w)  y = Add(h, t) }"""
    proto = model(text)
    with pytest.raises(ModelError, match="tensor 'a': the number of dimensions is unknown"):
        zilc.emit_training(proto, wrt=["x"], outputs="grad")
    for name, shape in (("a", [4, 2]), wrong):
        proto.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, shape))
    step = zilc.emit_training(proto, wrt=["x"], outputs="grad")
    said = [line for line in step.report["notes"] if "the file says its shape" in line]
    assert len(said) == 1
    assert f"tensor '{wrong[0]}': the file says its shape is {wrong[1]}" in said[0]
