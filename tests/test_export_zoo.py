"""Networks as PyTorch exports them, gradients held against PyTorch's: some here, all of them under ``long``."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

import zilc
from tests.export_zoo import ExporterError, Places, cases, examine, export, make
from zilc.executors import executor
from zilc.passes.precision import to_float64
from zilc.passes.shape_values import infer_through_values

#: One or two of each family, the cheap exporter mostly.
QUICK = [
    ("distilbert", "torchscript"), ("electra", "torchscript"), ("llama", "torchscript"), ("qwen2", "torchscript"),
    ("t5", "torchscript"), ("bart", "torchscript"), ("swin", "torchscript"), ("pvt", "torchscript"),
    ("mobilenet-v3", "torchscript"), ("convnext", "torchscript"), ("unet-transposed", "torchscript"),
    ("unet-bilinear", "torchscript"), ("wav2vec2", "torchscript"), ("mamba", "torchscript"),
    ("bilstm", "torchscript"), ("bigru", "torchscript"), ("transformer-encoder", "torchscript"),
    ("vit", "dynamo"), ("gan", "dynamo"), ("bert", "dynamo-raw"),
]  # fmt: skip


@pytest.mark.parametrize(("network", "exporter"), QUICK)
def test_gradients_are_pytorchs(network: str, exporter: str) -> None:
    assert examine(network, exporter).status == "right"


@pytest.mark.long
@pytest.mark.parametrize(("network", "exporter"), [case for case in cases() if case not in QUICK])
def test_gradients_are_pytorchs_everywhere(network: str, exporter: str) -> None:
    """Skipped where PyTorch's exporter itself fails: there is no file then.  docs/EXPORTS.md has those rows."""
    status = examine(network, exporter).status
    if status.startswith("exporter:"):
        pytest.skip(status)
    assert status == "right"


def test_examination_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is off by 1e-9 is not right."""
    from tests import export_zoo

    true = export_zoo.run

    def off(*given: object) -> object:
        made, loss, runtime = true(*given)  # type: ignore[arg-type]
        return {n: g * (1 + 1e-9) for n, g in made.items()}, loss, runtime

    monkeypatch.setattr(export_zoo, "run", off)
    assert examine("mlp-mixer", "torchscript").status.startswith("verdict: AssertionError")


def test_an_invalid_file_is_the_exporters() -> None:
    """The patches lose a transposition on their way through the exporter: the Add after them broadcasts no more."""
    assert examine("patchtst", "torchscript").status.startswith("exporter: its file does not run")


def test_an_unknown_operator_is_the_exporters() -> None:
    with pytest.raises(ExporterError, match="histc"):
        export("mixtral", "torchscript")


def test_raw_export_keeps_the_names_of_parameters() -> None:
    names = {n for n, _ in make("vit").named_parameters()}
    assert names <= {t.name for t in export("vit", "dynamo-raw").graph.initializer}


def test_places_are_not_found_by_chance() -> None:
    """One number of many that equals a parameter's says nothing about where the others come from."""
    layer = torch.nn.Linear(3, 4)
    array = np.arange(100, 112, dtype=np.float32)
    array[5] = layer.weight.detach().numpy()[0, 0]
    assert list(Places(layer).find(array)) == []
    (found,) = Places(layer).find(layer.weight.detach().numpy().T)
    assert found[0] == "weight"
    assert found[1].tolist() == np.arange(12).reshape(4, 3).T.reshape(-1).tolist()


SPLIT_BY_MOD = """
<ir_version: 9, opset_import: ["" : 20]>
g (float[n, 6] x) => (float[n] y)
<int64[1] zero = {0}, int64[1] five = {5}, int64[1] four = {4}, int64[1] flat = {-1}, int64[2] halves = {2, 3},
 float[2, 3] w = {1, 2, 3, 4, 5, 6}, int64[2] last = {1, 2}>
{
  s = Shape(x)
  end = Mod(five, four)
  stop = Reshape(end, flat)
  batch = Slice(s, zero, stop)
  target = Concat <axis = 0> (batch, halves)
  parts = Reshape(x, target)
  scaled = Mul(parts, w)
  y = ReduceSum <keepdims = 0> (scaled, last)
}
"""


def test_ranks_follow_computed_sizes() -> None:
    """The bound of the Slice is computed by Mod, which onnx's data propagation stops at."""
    model = onnx.parser.parse_model(SPLIT_BY_MOD)
    plain = onnx.shape_inference.infer_shapes(model, data_prop=True)
    assert not {i.name: i for i in plain.graph.value_info}["parts"].type.tensor_type.shape.dim
    made = infer_through_values(plain)
    assert len({i.name: i for i in made.graph.value_info}["parts"].type.tensor_type.shape.dim) == 3
    assert [n.op_type for n in made.graph.node] == [n.op_type for n in model.graph.node]
    step = zilc.emit_training(model, loss="energy", outputs="grad", wrt=["w"])
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    names = [step.signature["parameters"][0]["grad"]]
    feeds = {"x": x, step.signature["targets"][0]["name"]: np.zeros(2, np.float32), **step.state}
    (gradient,) = executor(step.model)(feeds, names).values()
    w = np.asarray(step.state["w"])
    y = (x.reshape(2, 2, 3) * w).sum((1, 2))
    assert np.allclose(gradient, (y[:, None, None] * x.reshape(2, 2, 3)).sum(0))


def test_sizes_follow_computed_pads() -> None:
    """PyTorch's exporter reverses and flattens the pads of F.pad in the graph."""
    text = """
    <ir_version: 9, opset_import: ["" : 18]>
    g (float[N, 4] x) => (float[P, Q] y)
    <int64[4] pads = {0, 1, 0, 2}, int64[2] pairs = {2, 2}, int64[1] flat = {-1}>
    {
      square = Reshape(pads, pairs)
      turned = Transpose <perm = [1, 0]> (square)
      back = Transpose <perm = [1, 0]> (turned)
      given = Reshape(back, flat)
      padded = Pad(x, given)
      half = Relu(padded)
      y = Tanh(half)
    }
    """
    plain = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True)
    made = infer_through_values(plain)
    for found, width in ((plain, 0), (made, 7)):
        dims = {i.name: i.type.tensor_type.shape.dim for i in found.graph.value_info}
        assert [dims[name][1].dim_value for name in ("padded", "half")] == [width, width]


def test_scales_of_a_resize_stay_float32() -> None:
    """The operator takes no others, whatever it resizes; a scale that is computed is cast."""
    text = """
    <ir_version: 9, opset_import: ["" : 20]>
    g (float[1, 1, 2, 2] x, float[4] given) => (float[1, 1, a, b] y)
    <float[4] scales = {1, 1, 2, 2}>
    {
      half = Resize <mode = "nearest"> (x, , scales)
      more = Neg(given)
      again = Neg(more)
      y = Resize <mode = "nearest"> (half, , again)
    }
    """
    wide = to_float64(onnx.parser.parse_model(text))
    onnx.checker.check_model(wide, full_check=True)
    x, given = np.arange(4.0).reshape(1, 1, 2, 2), np.array([1.0, 1.0, 1.0, 2.0])
    made = executor(wide)({"x": x, "given": given})["y"]
    assert made.dtype == np.float64
    assert np.array_equal(made, x.repeat(2, 2).repeat(4, 3))


def test_float64_keeps_the_shapes_that_only_the_file_says() -> None:
    """The rank of a Reshape to a shape fed at run time; LayerNormalization's statistics stay float32."""
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[2,4] x, int64[r] s) => (float[4] y) <float[2] w = {1.0, 2.0}, float[4,2] a, float[4,2] n, float[4,1] m> {
      a = Reshape(x, s)  n, m = LayerNormalization<axis=-1>(a, w)  p = Squeeze(m)  k = CastLike(p, w)
      t = ReduceSum<keepdims=0>(n)  y = Add(k, t) }"""
    wide = to_float64(onnx.parser.parse_model(text))
    kinds = {i.name: (i.type.tensor_type.elem_type, len(i.type.tensor_type.shape.dim)) for i in wide.graph.value_info}
    assert kinds["a"] == (onnx.TensorProto.DOUBLE, 2)
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((2, 4)), "s": np.asarray([4, 2])}
    assert executor(wide)(feeds)["y"].dtype == np.float64
    step = zilc.emit_training(wide, wrt=["x"], outputs="grad")
    assert step.signature["input_grads"][0]["name"] == "x"


def test_what_an_exporter_computes_of_a_parameter_is_its() -> None:
    """RWKV's 1 - p is a constant of its own in the file; its gradient counts, turned."""
    layer = torch.nn.Linear(3, 4)
    (found,) = Places(layer).find(1 - layer.bias.detach().numpy())
    assert found[0] == "bias"
    assert found[3].tolist() == [-1.0] * 4


def test_float64_of_an_operator_that_takes_none() -> None:
    """Celu, before opset 28, by its function body."""
    text = '<ir_version: 9, opset_import: ["" : 20]> g (float[n, 3] x) => (float[n, 3] y) { y = Celu<alpha = 0.5>(x) }'
    wide = to_float64(onnx.parser.parse_model(text))
    onnx.checker.check_model(wide, full_check=True)
    x = np.asarray([[-2.0, -0.25, 3.0]])
    made = executor(wide)({"x": x})["y"]
    assert np.allclose(made, np.where(x > 0, x, 0.5 * np.expm1(x / 0.5)), rtol=1e-14)


def test_an_empty_sequence_is_one_of_float64() -> None:
    text = """<ir_version: 9, opset_import: ["" : 20]> g (float[2, 3] x) => (float[2, 3] y) {
      e = SequenceEmpty()  s = SequenceInsert(e, x)  c = ConcatFromSequence<axis = 0>(s)  y = Sin(c) }"""
    wide = to_float64(onnx.parser.parse_model(text))
    onnx.checker.check_model(wide, full_check=True)
    assert zilc.emit_training(wide, wrt=["x"], outputs="grad").signature["input_grads"][0]["name"] == "x"
