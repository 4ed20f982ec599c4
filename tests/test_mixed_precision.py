"""Mixed precision: what computes in which type, Z-IL against BP, gradients against PyTorch's autocast, loss scaling."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

import zilc
from tests import twins
from tests.command import Command
from tests.graphs import initial
from zilc import ir, models, onnx_io, scaling, signature
from zilc.emit import Emitter
from zilc.errors import DataError, ModelError, OptionError
from zilc.executors import executor
from zilc.graph import PRECISION
from zilc.passes.mixed_precision import mixed_precision
from zilc.passes.prepare import prepare
from zilc.train import train

CPU = ["CPUExecutionProvider"]
LOW = ["float16", "bfloat16"]
KINDS = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
SIZES: dict[str, dict[str, int]] = {
    "mlp3": {"inputs": 12, "hidden": 16},
    "transformer": {"vocabulary": 40, "length": 7, "d_model": 16, "heads": 2, "d_ff": 32},
}
#: Opset 22 is the first in which a Conv may be of bfloat16.
NORMED = """
<ir_version: 10, opset_import: ["" : 22]>
normed (float[N,3,6,6] x) => (float[N,5] y)
<float[4,3,3,3] w1, float[4] b1, float[4] s1, float[4] t1, float[4] m1, float[4] v1,
 float[4,4,3,3] w2, float[4] s2, float[4] t2, float[4] m2, float[4] v2, float[5,4] w3, float[5] b3>
{
    [conv1] c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
    [norm1] n1 = BatchNormalization (c1, s1, t1, m1, v1)
    [bend1] a1 = Tanh (n1)
    [conv2] c2 = Conv <pads = [1,1,1,1]> (a1, w2)
    [norm2] n2 = BatchNormalization (c2, s2, t2, m2, v2)
    [join]  j = Add (n2, a1)
    [pool]  p = GlobalAveragePool (j)
    [flat]  f = Flatten (p)
    [drop]  d = Dropout (f)
    [head]  y = Gemm <transB = 1> (d, w3, b3)
}
"""


def written(text: str, **values: Any) -> onnx.ModelProto:
    """A model in ONNX's text syntax; initializers declared without values get the named ones, or random ones."""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for info in model.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        value = values.get(info.name, 0.4 * rng.standard_normal(shape))
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, np.float32), info.name))
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    return model


@cache
def network(name: str) -> onnx.ModelProto:
    if name == "normed":
        return written(NORMED, v1=np.full(4, 1.5), v2=np.full(4, 0.5), s1=np.ones(4), s2=np.full(4, 0.75))
    return models.build(name, opset=22, **SIZES[name])


@cache
def feeds_of(name: str, batch: int = 6) -> Mapping[str, np.ndarray]:
    return models.random_feeds(network(name), batch, np.random.default_rng(1), loss="cross-entropy")


def emitted(name: str, precision: str, **options: Any) -> zilc.TrainingStep:
    return zilc.emit_training(network(name), loss="cross-entropy", precision=precision, **options)


def run(step: zilc.TrainingStep, feeds: Mapping[str, np.ndarray], prefer: str = "onnxruntime", **more: Any) -> Any:
    given = {**initial(step, dict(feeds)), **more}
    if step.signature["seed"]:
        given[step.signature["seed"]] = np.asarray(3, np.int64)
    return executor(step.model, prefer=prefer)(given)


def types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX's element type of every tensor that the model names."""
    graph = model.graph
    found = {t.name: t.data_type for t in graph.initializer}
    for info in (*graph.input, *graph.output, *graph.value_info):
        found[info.name] = info.type.tensor_type.elem_type
    return found


# --- Z-IL equals BP ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefer", ["onnxruntime", "reference"])
@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize(("name", "mode"), [("mlp3", "eval"), ("normed", "eval"), ("normed", "train"),
                                            ("transformer", "eval")])  # fmt: skip
def test_zil_equals_bp_bit_for_bit(name: str, mode: str, precision: str, prefer: str) -> None:
    options = {"optimizer": "adam", "outputs": "both", "mode": mode}
    zil, bp = (emitted(name, precision, algorithm=a, **options) for a in ("zil", "bp"))
    assert zil.signature["schedule"] == "wavefront"
    found, expected = (run(step, feeds_of(name), prefer) for step in (zil, bp))
    assert found.keys() == expected.keys()
    for key in found:
        assert found[key].tobytes() == expected[key].tobytes(), key
        assert np.isfinite(found[key]).all(), key
    for leaf in zil.signature["parameters"]:
        assert found[leaf["grad"]].dtype == found[leaf["next"]].dtype == np.float32
        assert found[leaf["grad"]].any(), leaf["name"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # levels that the wave has passed may overflow
@pytest.mark.parametrize("name", ["mlp3", "transformer"])
def test_the_literal_schedule_in_bfloat16_has_the_wavefronts_gradients(name: str) -> None:
    wave, literal = (emitted(name, "bfloat16", outputs="grad", schedule=s) for s in ("wavefront", "literal"))
    found, expected = (run(step, feeds_of(name), "reference") for step in (literal, wave))
    for leaf in wave.signature["parameters"]:
        np.testing.assert_array_equal(found[leaf["grad"]], expected[leaf["grad"]], err_msg=leaf["name"])


# --- against PyTorch --------------------------------------------------------------------------------------------


def _normed(p: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    def norm(x: torch.Tensor, k: int) -> torch.Tensor:
        return F.batch_norm(x, p[f"m{k}"], p[f"v{k}"], p[f"s{k}"], p[f"t{k}"], training=False, eps=twins.EPSILON)

    a = torch.tanh(norm(F.conv2d(inputs["x"], p["w1"], p["b1"], padding=1), 1))
    j = norm(F.conv2d(a, p["w2"], padding=1), 2) + a
    return F.linear(j.mean((2, 3)), p["w3"], p["b3"])


def _torch_gradients(name: str, dtype: Any, low: Any = None, scale: float = 1.0) -> dict[str, np.ndarray]:
    """By PyTorch's autograd; under torch.autocast where ``low`` is given."""
    model, feeds = network(name), feeds_of(name)
    statistics = {"m1", "v1", "m2", "v2"}
    tensors = twins.to_torch(twins.parameters(model), dtype)
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if n not in statistics}
    given = twins.to_torch(feeds, dtype)
    with torch.autocast("cpu", dtype=low, enabled=low is not None):
        output = _normed(tensors, given) if name == "normed" else twins.twin(name, model)(tensors, given)
    output = output if low is None else output.float()
    loss = twins.torch_loss(output, given["target"], "cross-entropy")
    gradients = torch.autograd.grad(loss * scale, list(leaves.values()))
    return {n: g.double().numpy() / scale for n, g in zip(leaves, gradients, strict=True)}


def _distance(found: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> float:
    """Of all gradients laid end to end, relative."""
    off = sum(float(np.sum((np.asarray(found[n], np.float64) - g) ** 2)) for n, g in truth.items())
    return float(np.sqrt(off / sum(float(np.sum(g**2)) for g in truth.values())))


@pytest.mark.parametrize("prefer", ["onnxruntime", "reference"])
@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", ["mlp3", "normed", "transformer"])
def test_gradients_are_as_near_to_the_truth_as_autocasts(name: str, precision: str, prefer: str) -> None:
    """At most twice PyTorch's own distance from the float64 gradient, and as far from exact as the type is."""
    truth = _torch_gradients(name, np.float64)
    scale = scaling.INITIAL if precision == "float16" else 1.0
    theirs = _distance(_torch_gradients(name, np.float32, getattr(torch, precision), scale), truth)
    step = emitted(name, precision, outputs="grad")
    made = run(step, feeds_of(name), prefer)
    ours = {leaf["name"]: made[leaf["grad"]] for leaf in step.signature["parameters"]}
    assert ours.keys() == truth.keys()
    assert _distance(ours, truth) <= 2 * theirs
    if prefer == "reference":
        assert _distance(ours, truth) > (1e-4 if precision == "float16" else 1e-3)


# --- what computes in which type --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", LOW)
def test_products_of_a_transformer_are_all_low_and_delicate_operators_are_not(precision: str) -> None:
    step = emitted("transformer", precision, outputs="both", optimizer="adam")
    onnx.checker.check_model(step.model, full_check=True)
    kinds = types(step.model)
    products = [
        n for n in step.model.graph.node
        # Rows of the embedding are looked up, and their gradients added up, in float32.
        if n.op_type in ("MatMul", "Gemm") and not n.name.startswith("embedding.weight.gradient")
    ]  # fmt: skip
    assert len(products) == 3 * 9  # nine products forwards, two VJPs each
    for node in products:
        assert {kinds[name] for name in (*node.input, *node.output)} == {KINDS[precision]}, node.name
    delicate = [n for n in step.model.graph.node if n.op_type in ("Softmax", "LayerNormalization", "LogSoftmax", "Exp",
                                                                  "Pow", "Sqrt", "Reciprocal")]  # fmt: skip
    assert {n.op_type for n in delicate} >= {"Softmax", "LayerNormalization", "LogSoftmax"}
    for node in delicate:
        low = [name for name in (*node.input, *node.output) if name and kinds[name] == KINDS[precision]]
        assert not low, node.name


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", ["mlp3", "normed", "transformer"])
def test_the_interface_is_that_of_float32(name: str, precision: str) -> None:
    step, plain = (emitted(name, p, optimizer="adam", outputs="both") for p in (precision, "float32"))
    scale = {"loss_scale", "good_steps"} if precision == "float16" else set()
    for mine, theirs in ((step.model.graph.input, plain.model.graph.input),
                         (step.model.graph.output, plain.model.graph.output)):  # fmt: skip
        added = scale | {f"{n}.next" for n in scale}
        found = {i.name: i.type.SerializeToString() for i in mine if i.name not in added}
        assert found == {i.name: i.type.SerializeToString() for i in theirs}
    jsonschema.validate(step.signature, signature.schema())
    assert step.signature["precision"] == precision
    assert {c["name"] for c in step.signature["carried"]} == scale
    low = [t.name for t in step.model.graph.initializer if t.data_type == KINDS[precision]]
    assert all(n.startswith("zilc.const/") for n in low)  # the compiler's own, in VJPs


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", ["mlp3", "normed", "transformer"])
def test_no_cast_undoes_another_and_each_version_is_made_once(name: str, precision: str) -> None:
    graph = prepare(onnx_io.load(network(name))).graph
    made, found = mixed_precision(graph, precision)
    casts = [n for n in made.nodes if getattr(n, PRECISION, False)]
    assert len(casts) == found.casts > 0
    outputs = {n.outputs[0].name: n for n in casts}
    assert not any(n.inputs[0].name in outputs for n in casts)
    assert len({n.inputs[0].name for n in casts}) == len(casts)


def _vertices(text: str, precision: str = "float16", **values: Any) -> tuple[list[str], dict[str, Any]]:
    step = zilc.emit_training(written(text, **values), precision=precision, outputs="grad")
    return step.report["mixed_precision"]["vertices"], step.report["mixed_precision"]


SCORES = """
<ir_version: 10, opset_import: ["" : 18]>
scores (float[N,5,8] x) => (float[N,5,8] y)
<float[8,8] w, float[5,5] mask, float[8] b>
{
    [product] s = MatMul (x, w)
    [bias]    h = Add (s, b)
    [turn]    t = Transpose <perm = [0,2,1]> (h)
    [again]   q = MatMul (h, t)
    [masked]  m = Add (q, mask)
    [soft]    p = Softmax <axis = -1> (m)
    [mix]     y = MatMul (p, h)
}
"""


@pytest.mark.parametrize(("least", "low"), [(-3.4e38, False), (-1e4, True)])
def test_a_constant_that_the_type_lacks_keeps_its_operator_in_float32(least: float, low: bool) -> None:
    mask = np.triu(np.full((5, 5), least), 1)
    vertices, report = _vertices(SCORES, mask=mask)
    assert ("masked" in vertices) == low
    assert set(vertices) - {"masked"} == {"product", "bias", "turn", "again", "mix"}
    assert report["float32"] == ({"Softmax": 1} if low else {"Softmax": 1, "Add": 1})


EPSILON = """
<ir_version: 10, opset_import: ["" : 18]>
quotient (float[N,4] x) => (float[N,4] y)
<float[4,4] w, float eps, float two>
{
    [product] h = MatMul (x, w)
    [size]    a = Abs (h)
    [safe]    b = Add (a, eps)
    [ratio]   c = Div (h, b)
    [half]    y = Div (h, two)
}
"""


def test_an_epsilon_that_would_be_zero_and_quotients_stay_in_float32() -> None:
    text = EPSILON.replace("y = Div (h, two)", "d = Div (h, two)\n y = Add (c, d)")
    vertices, _ = _vertices(text, eps=1e-12, two=2.0)
    assert vertices == ["product", "size", "half"]
    assert _vertices(text, eps=1e-2, two=2.0)[0] == ["product", "size", "safe", "half"]


def test_what_lies_between_a_normalization_and_a_convolution_is_kept_low() -> None:
    text = NORMED.replace("Tanh (n1)", "Relu (n1)").replace("j = Add (n2, a1)", "j = Relu (n2)")
    assert _vertices(text, v1=np.ones(4), v2=np.ones(4))[0] == ["conv1", "bend1", "conv2", "head"]
    # A skip around the convolution reads the same tensor in float32.
    assert "bend1" not in _vertices(NORMED.replace("Tanh", "Relu"), v1=np.ones(4), v2=np.ones(4))[0]


def test_operators_that_the_opset_has_not_in_bfloat16_are_named() -> None:
    step = zilc.emit_training(models.build("digits", channels=4, opset=18), precision="bfloat16")
    assert step.report["mixed_precision"]["refused"] == {"Conv": 22}
    assert any("Conv has no bfloat16 form at this opset" in note and "--opset 22" in note
               for note in step.report["notes"])  # fmt: skip
    newer = zilc.emit_training(models.build("digits", channels=4, opset=18), precision="bfloat16", opset=22)
    assert newer.report["mixed_precision"]["refused"] == {}
    assert not newer.report["mixed_precision"]["float32"]


INNER = """
<ir_version: 10, opset_import: ["" : 18]>
inner (float[N,4] x, int64 n) => (float[N,4] y)
<float[4,4] w>
{
    h = MatMul (x, w)
    r = Relu (h)
    z = Loop (n, , r) <body = body (int64 i, bool c, float[N,4] s) => (bool more, float[N,4] t) {
        more = Identity (c)
        a = Add (s, h)
        t = Tanh (a)
    }>
    y = Add (z, h)
}
"""


def test_a_loop_reads_float32_and_an_inner_output_keeps_its_name_and_type() -> None:
    step = zilc.emit_training(
        written(INNER), output=["r", "y"], loss="mse", precision="float16", outputs="grad", algorithm="zil"
    )
    kinds = types(step.model)
    assert kinds["h"] == kinds["r"] == kinds["y"] == onnx.TensorProto.FLOAT
    plain = zilc.emit_training(written(INNER), output=["r", "y"], loss="mse", outputs="grad")
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((2, 4)).astype(np.float32), "n": np.asarray(3, np.int64),
             "target.r": np.zeros((2, 4), np.float32), "target.y": np.zeros((2, 4), np.float32)}  # fmt: skip
    found = run(step, feeds, "reference", loss_scale=np.float32(256))
    expected = run(plain, feeds, "reference")
    largest = np.abs(expected["w.grad"]).max()
    np.testing.assert_allclose(found["w.grad"], expected["w.grad"], rtol=4e-3, atol=1e-3 * largest)


ONE = """
<ir_version: 10, opset_import: ["" : 18]>
one (float[N,4] x) => (float[N,1] y)
<float[4,1] w, float[1] b>
{
    h = MatMul (x, w)
    y = Add (h, b)
}
"""


def test_a_parameter_that_is_read_twice_is_told() -> None:
    text = ONE.replace("float[4,1] w", "float[4,4] w").replace("float[N,1] y", "float[N,4] y")
    text = text.replace("h = MatMul (x, w)", "g = MatMul (x, w)\n h = MatMul (g, w)")
    for precision in ("float32", "float16"):
        step = zilc.emit_training(written(text), precision=precision)
        assert any("parameter 'w' is read 2 times" in note for note in step.report["notes"])


@pytest.mark.parametrize("bias", [0.0, 0.5, 1e-9])  # the last is zero in float16, so that the Add stays in float32
def test_the_same_parameters_are_trained(bias: float) -> None:
    trained = {
        precision: [p["name"] for p in zilc.emit_training(written(ONE, b=[bias]), precision=precision).signature[
            "parameters"]] for precision in ("float32", *LOW)
    }  # fmt: skip
    assert {tuple(sorted(names)) for names in trained.values()} == {("b", "w")}


# --- float32 is as before ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp3", "normed", "transformer"])
def test_float32_changes_nothing(name: str) -> None:
    plain = zilc.emit_training(network(name), loss="cross-entropy", optimizer="adam")
    asked = emitted(name, "float32", optimizer="adam")
    assert onnx_io.serialize(plain.model) == onnx_io.serialize(asked.model)
    assert plain.signature == asked.signature
    assert plain.report == asked.report
    assert not {"precision", "loss_scale"} & plain.signature.keys()
    assert "mixed_precision" not in plain.report
    assert not {"float16", "bfloat16"} & {np.dtype(onnx.helper.tensor_dtype_to_np_dtype(k)).name
                                          for k in types(plain.model).values() if k}  # fmt: skip


# --- loss scaling -----------------------------------------------------------------------------------------------


OPTIMIZERS = [("sgd", {}), ("momentum", {"dampening": 0.1}), ("adam", {})]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
@pytest.mark.parametrize("huge", [1e9, np.nan, np.inf])
def test_an_overflow_skips_the_update_and_halves_the_scale(optimizer: str, options: dict, huge: float) -> None:
    step = emitted("mlp3", "float16", optimizer=optimizer, options=options)
    feeds = feeds_of("mlp3")
    given = initial(step, dict(feeds))
    rng = np.random.default_rng(2)
    for leaf in step.signature["parameters"]:
        for slot in leaf["state"]:
            given[slot["name"]] = rng.uniform(0.5, 1, given[slot["name"]].shape).astype(np.float32)
    given["good_steps"] = np.asarray(7, np.int64)
    ran = executor(step.model, prefer="reference")  # onnxruntime's CPU provider computes an MLP in float32
    good = ran(given)
    # In the target of no entry, in one entry of the input: 1e9 is infinite in float16 alone.
    given["input"] = np.array(given["input"])
    given["input"][0, 0] = huge
    bad = ran(given)
    pairs = signature.carried_pairs(step.signature)
    assert len(pairs) >= 6 + 2
    for name, following in pairs:
        if name == "loss_scale":
            assert (good[following], bad[following]) == (65536, 32768)
        elif name == "good_steps":
            assert (good[following], bad[following]) == (8, 0)
        else:
            assert bad[following].tobytes() == given[name].tobytes(), name
            assert good[following].tobytes() != given[name].tobytes(), name
            assert np.isfinite(good[following]).all(), name


def test_a_scale_that_is_too_large_is_found_by_itself() -> None:
    """The energy's errors are not divided by anything: times 65536 they leave float16, in onnxruntime too."""
    model = models.build("digits", channels=4)
    step = zilc.emit_training(model, precision="float16")
    feeds = models.random_feeds(model, 8, np.random.default_rng(0), loss="energy")
    trainer = zilc.Trainer(step, lr=1e-3, providers=CPU)
    seen, losses = [], []
    for _ in range(30):
        before = trainer.state
        losses.append(trainer.step(feeds))
        seen.append(float(trainer.state["loss_scale"]))
        moved = any(not np.array_equal(before[p["name"]], trainer.state[p["name"]])
                    for p in step.signature["parameters"])  # fmt: skip
        assert moved == (trainer.state["good_steps"] > 0)
    halved = 16 - int(np.log2(seen[-1]))
    assert 0 < halved < 12
    assert seen[: halved] == [2.0 ** (15 - k) for k in range(halved)]
    assert set(seen[halved - 1 :]) == {seen[-1]}
    assert trainer.state["good_steps"] == 30 - halved
    assert losses[-1] < 0.9 * losses[0]
    assert losses[0] == losses[halved - 1]


@pytest.mark.parametrize(("values", "finite"), [
    ([0.0, -1e30, 1e-45], True), ([0.0, np.nan, 1.0], False), ([np.inf, -np.inf, 1.0], False), ([-np.inf, 0, 0], False),
])  # fmt: skip
@pytest.mark.parametrize("where", [0, 1, 2])
def test_one_entry_that_is_not_finite_is_found_in_any_gradient(values: list[float], finite: bool, where: int) -> None:
    graph = gs.Graph(opset=18)
    shapes: list[list[int]] = [[3], [], [3, 1]]
    graph.inputs = [gs.Variable(f"g{k}", np.dtype(np.float32), shape) for k, shape in enumerate(shapes)]
    made = scaling.all_finite(Emitter(graph), graph.inputs)
    made.shape = []
    graph.outputs = [made]
    arrays = [np.ones(shape, np.float32) for shape in shapes]
    arrays[where] = np.asarray(values, np.float32).reshape(shapes[where]) if shapes[where] else np.float32(values[1])
    expected = finite or (where == 1 and np.isfinite(values[1]))
    for prefer in ("onnxruntime", "reference"):
        ran = executor(ir.to_proto(graph, ir_version=10), prefer=prefer)
        (found,) = ran({f"g{k}": array for k, array in enumerate(arrays)}).values()
        assert found.dtype == bool
        assert found == expected


@pytest.mark.parametrize(("scale", "good", "following", "count"), [
    (1024.0, 1998, 1024.0, 1999), (1024.0, 1999, 2048.0, 0), (2.0**127, 1999, 2.0**127, 0), (0.25, 5, 0.25, 6),
])  # fmt: skip
def test_the_scale_grows_after_2000_good_steps(scale: float, good: int, following: float, count: int) -> None:
    """As torch.amp.GradScaler's: doubled at the 2000th, unless it would be infinite."""
    graph = gs.Graph(opset=18)
    op = Emitter(graph)
    inputs = [gs.Variable("scale", np.dtype(np.float32), []), gs.Variable("good", np.dtype(np.int64), []),
              gs.Variable("finite", np.dtype(bool), [])]  # fmt: skip
    made = scaling.following_scale(op, *inputs)
    for tensor in made:
        tensor.shape = []
    graph.inputs, graph.outputs = inputs, list(made)
    ran = executor(ir.to_proto(graph, ir_version=10))
    feeds = {"scale": np.float32(scale), "good": np.int64(good), "finite": np.asarray(True)}
    assert [float(x) for x in ran(feeds).values()] == [following, count]
    assert [float(x) for x in ran({**feeds, "finite": np.asarray(False)}).values()] == [scale / 2, 0]


def test_loss_and_gradients_do_not_depend_on_the_scale() -> None:
    """Short of the ends of float16; a power of two is no rounding."""
    step = emitted("transformer", "float16", outputs="grad")
    assert step.signature["lr"] is None
    feeds = feeds_of("transformer")
    found, expected = (run(step, feeds, loss_scale=np.float32(s)) for s in (1024.0, 16384.0))
    assert found["loss"] == expected["loss"]
    plain = run(emitted("transformer", "float32", outputs="grad"), feeds)
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    for leaf in step.signature["parameters"]:
        if "key.bias" in leaf["name"]:
            continue  # zero but for rounding
        largest = np.abs(plain[leaf["grad"]]).max()
        np.testing.assert_allclose(found[leaf["grad"]], expected[leaf["grad"]], rtol=0, atol=2e-3 * largest)


def test_the_scale_keeps_errors_that_float16_would_lose() -> None:
    step = zilc.emit_training(network("mlp3"), precision="float16", outputs="grad", loss="mse")
    feeds = {"input": feeds_of("mlp3")["input"], "target": np.zeros((6, 10), np.float32)}
    feeds["target"] = run(step, feeds, "reference")["logits"] + np.float32(1e-7)
    lost = run(step, feeds, "reference", loss_scale=np.float32(1))
    kept = run(step, feeds, "reference")
    for leaf in step.signature["parameters"]:
        assert not lost[leaf["grad"]].any(), leaf["name"]
        assert kept[leaf["grad"]].any(), leaf["name"]


def test_running_statistics_stay_with_the_parameters() -> None:
    step = emitted("normed", "float16", mode="train", optimizer="momentum")
    assert [c["name"] for c in step.signature["carried"]] == ["m1", "v1", "m2", "v2", "loss_scale", "good_steps"]
    feeds = dict(feeds_of("normed"))
    good = run(step, feeds)
    feeds["x"] = np.where(np.arange(6)[:, None, None, None] == 0, np.float32(np.nan), feeds["x"])
    bad = run(step, feeds)
    for entry in step.signature["carried"][:4]:
        assert bad[entry["next"]].tobytes() == np.asarray(step.state[entry["name"]]).tobytes()
        assert good[entry["next"]].tobytes() != np.asarray(step.state[entry["name"]]).tobytes()
    # The masks' steps go on: momentum counts none.
    assert bad[step.signature["step"]["next"]] == 1
    adam = emitted("normed", "float16", mode="train", optimizer="adam")
    assert run(adam, feeds)[adam.signature["step"]["next"]] == 0


# --- training ---------------------------------------------------------------------------------------------------


def _digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = (data.images.reshape(-1, 64) / 16).astype(np.float32), data.target.astype(np.int64)
    return {"input": x[:1200], "target": y[:1200]}, {"input": x[1200:], "target": y[1200:]}


def test_training_reaches_what_float32_reaches_and_float32_weights_go_back(tmp_path: Path) -> None:
    model = models.build("mlp3", inputs=64, hidden=32)
    data, val = _digits()
    accuracy = {}
    for precision in ("float32", "float16"):
        made = train(
            model, data, out=tmp_path / f"{precision}.onnx", val=val, lr=5e-3, epochs=4, batch_size=32, device="cpu",
            loss="cross-entropy", optimizer="adam", precision=precision,
        )  # fmt: skip
        accuracy[precision] = made.history[-1]["val_accuracy"]
    assert accuracy["float32"] > 0.88
    assert abs(accuracy["float16"] - accuracy["float32"]) < 0.02
    trained, original = onnx.load(tmp_path / "float16.onnx"), onnx_io.load(model).proto
    assert {t.data_type for t in trained.graph.initializer} == {onnx.TensorProto.FLOAT}
    for before, after in zip(original.graph.initializer, trained.graph.initializer, strict=True):
        assert before.name == after.name
        assert before.raw_data != after.raw_data
        after.raw_data = before.raw_data
    assert onnx_io.serialize(trained) == onnx_io.serialize(original)


def test_a_run_that_skips_every_update_is_an_error(tmp_path: Path) -> None:
    """The derivative of a root at zero is infinite, whatever the scale."""
    text = ONE.replace("h = MatMul (x, w)", "p = MatMul (x, w)\n r = Abs (p)\n h = Sqrt (r)")
    model = written(text, w=np.zeros((4, 1)))
    data = {"x": np.ones((8, 4), np.float32), "target": np.zeros((8, 1), np.float32)}
    with pytest.raises(DataError, match=r"every update was skipped.* loss scale of 4096\."):
        train(model, data, out=tmp_path / "out.onnx", lr=0.1, epochs=2, batch_size=4, device="cpu",
              precision="float16", wrt="w")  # fmt: skip
    assert not (tmp_path / "out.onnx").exists()


def test_a_trainer_evaluates_and_exports_in_training_mode(tmp_path: Path) -> None:
    model, feeds = network("normed"), feeds_of("normed")
    trainer = zilc.Trainer(emitted("normed", "float16", mode="train", optimizer="adam"), lr=0.02, providers=CPU)
    losses = [trainer.step(feeds) for _ in range(20)]
    assert losses[-1] < losses[0]
    trainer.export(tmp_path / "trained.onnx")
    ran = onnxruntime.InferenceSession(str(tmp_path / "trained.onnx"), providers=CPU).run(None, {"x": feeds["x"]})[0]
    evaluated = trainer.evaluate(feeds).predictions["y"]
    assert np.abs(evaluated - run(emitted("normed", "float32"), feeds)["y"]).max() > 0.1  # it has learnt something
    np.testing.assert_allclose(ran, evaluated, rtol=0, atol=2e-3 * np.abs(ran).max())
    assert {t.name for t in onnx.load(tmp_path / "trained.onnx").graph.initializer} == {
        t.name for t in model.graph.initializer
    }


# --- command line and errors ------------------------------------------------------------------------------------


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def test_the_command_trains_and_reports(command: Command, tmp_path: Path) -> None:
    data, _ = _digits()
    np.savez(tmp_path / "data.npz", **{n: a[:320] for n, a in data.items()})
    onnx.save(models.build("mlp2", inputs=64, hidden=16), tmp_path / "mlp.onnx")
    shared = ("--loss", "cross-entropy", "--precision", "float16")
    done = command(
        "train", tmp_path / "mlp.onnx", "--data", tmp_path / "data.npz", "--lr", "0.2", "--epochs", "3",
        "--batch-size", "32", "--device", "cpu", "-o", tmp_path / "out.onnx", "--json", *shared,
    )  # fmt: skip
    assert done.status == 0, done.err
    history = done.json["history"]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    made = command("emit-training", tmp_path / "mlp.onnx", "--json", *shared)
    assert made.status == 0, made.err
    jsonschema.validate(made.json["signature"], signature.schema())
    assert made.json["signature"]["precision"] == "float16"
    assert made.json["report"]["mixed_precision"]["vertices"] == ["layer1/Gemm", "layer1/Tanh", "layer2/Gemm"]
    shown = command("emit-training", tmp_path / "mlp.onnx", *shared)
    assert "3 vertices compute in float16, 0 in float32; 6 casts lie between" in " ".join(shown.out.split())
    trainer = zilc.Trainer(tmp_path / "mlp.step.onnx", lr=0.1, providers=CPU)
    assert trainer.state["loss_scale"] == 65536


def test_what_onnxruntime_cannot_run_is_said() -> None:
    step = emitted("mlp3", "bfloat16")
    with pytest.raises(ModelError, match=r"NOT_IMPLEMENTED.*few bfloat16 kernels on a CPU. Use float16 or float32"):
        zilc.Trainer(step, lr=0.1, providers=CPU)


@pytest.mark.parametrize(("model", "options", "text"), [
    ("float32", {"precision": "float8"},
     "--precision: no choice 'float8'. Choose one of float32, float16, bfloat16."),
    ("float64", {"precision": "float16"},
     "--precision: skip is not a float32 model: 'input' is float64. Leave it out, or give the float32 model."),
    ("float32", {"precision": "float16", "schedule": "literal"},
     "--precision: float16 wants errors multiplied by a loss scale, and by errors the literal schedule moves its "
     "value nodes. Use the wavefront, or bfloat16."),
    ("float32", {"precision": "float16", "algorithm": "il"},
     "--precision: float16 wants errors multiplied by a loss scale, and by errors the literal schedule moves its "
     "value nodes. Use the wavefront, or bfloat16."),
])  # fmt: skip
def test_errors(model: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError) as raised:
        zilc.emit_training(models.build("skip", dtype=model), **options)
    assert str(raised.value) == text


def test_a_model_that_is_low_inside_is_refused() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 18]>
        half (float[N,2] x) => (float[N,2] y)
        <float16[2,2] w = {1, 2, 3, 4}>
        {
            a = Cast <to = 10> (x)
            b = MatMul (a, w)
            y = Cast <to = 1> (b)
        }"""
    with pytest.raises(OptionError, match="'a' is float16"):
        zilc.emit_training(onnx.parser.parse_model(text), precision="float16")
