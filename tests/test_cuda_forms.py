"""What is emitted for CUDA: other operators, the same values; computed here on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx_graphsurgeon as gs
import pytest

import zilc
from tests.command import spawn
from zilc import cuda_forms, ir, models
from zilc.emit import Emitter
from zilc.executors import executor
from zilc.lowerings import Lowerings

#: batch, channels, filters, groups, kernel, stride, dilation, size, pad, spatial axes
CONVOLUTIONS = {
    "plain": (3, 4, 6, 1, 3, 1, 1, 9, 1, 2),
    "groups, strided": (3, 4, 6, 2, 3, 2, 1, 9, 1, 2),
    "depthwise": (2, 6, 6, 6, 3, 2, 1, 10, 1, 2),
    "49 taps": (2, 3, 5, 1, 7, 2, 1, 15, 3, 2),
    "image left over": (2, 3, 5, 1, 11, 4, 1, 31, 2, 2),
    "dilated": (2, 4, 4, 1, 3, 1, 2, 9, 2, 2),
    "pointwise": (2, 4, 8, 1, 1, 2, 1, 8, 0, 2),
    "tiles": (2, 3, 4, 1, 5, 5, 1, 17, 0, 2),
    "sound": (2, 3, 4, 1, 5, 3, 1, 40, 0, 1),
    "volume": (2, 4, 4, 2, 2, 1, 1, 5, 0, 3),
}


def _convolution(case: str, symbolic: bool) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    n, c, m, group, k, s, d, size, pad, rank = CONVOLUTIONS[case]
    out = (size + 2 * pad - d * (k - 1) - 1) // s + 1
    batch = "N" if symbolic else n
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.standard_normal((m, c // group, *[k] * rank), np.float32), "w")
    node = onnx.helper.make_node(
        "Conv", ["x", "w"], ["y"], strides=[s] * rank, dilations=[d] * rank, group=group, pads=[pad] * 2 * rank
    )
    graph = onnx.helper.make_graph(
        [node], "convolution",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, c, *[size] * rank])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [batch, m, *[out] * rank])],
        [weight],
    )  # fmt: skip
    x = rng.standard_normal((n, c, *[size] * rank), np.float32)
    target = rng.standard_normal((n, m, *[out] * rank), np.float32)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    return model, {"x": x, "target": target}


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic batch"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_every_lowering_of_a_weights_gradient(case: str, symbolic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that is offered for CUDA, against the one that is emitted for the CPU."""
    model, feeds = _convolution(case, symbolic)
    offered: set[str] = set()
    wanted = ""

    class Wanted(Lowerings):
        def choose(self, op: Any, kind: str, site: str, operands: Any, candidates: Any) -> tuple[str, str]:
            if kind.startswith("Conv.weight"):
                offered.update(candidates)
            return wanted if wanted in candidates else next(iter(candidates)), "only"

    def gradient(target: str) -> np.ndarray:
        step = zilc.emit_training(model, outputs="grad", target=target)  # type: ignore[arg-type]
        onnx.checker.check_model(step.model, full_check=True)
        given = {**feeds, **{name: np.asarray(value) for name, value in step.state.items()}}
        return executor(step.model)(given)[step.signature["parameters"][0]["grad"]]

    truth = gradient("cpu")
    monkeypatch.setattr("zilc.pipeline.Lowerings", Wanted)
    gradient("cuda")
    kernel, rank = CONVOLUTIONS[case][4], CONVOLUTIONS[case][9]
    expected = {"swapped", "columns", "columns by example", "gathered columns by example"}
    expected |= {"gathered columns"} if not symbolic else set()
    rows = {"columns, rows on the map", "columns by example, rows on the map"}
    assert offered == expected | (rows if rank > 1 and kernel > 1 and CONVOLUTIONS[case][5] == 1 else set())
    for wanted in sorted(offered):
        found = gradient("cuda")
        assert np.abs(found - truth).max() <= 1e-5 * np.abs(truth).max(), wanted


@pytest.mark.parametrize("network", ["mlp3", "resnet18", "transformer"])
def test_a_network_has_the_same_gradients(network: str) -> None:
    sizes: dict[str, Any] = {"image": 33, "width": 8, "classes": 10} if network == "resnet18" else {}
    model = models.build(network, **sizes)
    feeds = models.random_feeds(model, 2, np.random.default_rng(0), loss="cross-entropy")
    found = []
    for target in ("cpu", "cuda"):
        step = zilc.emit_training(model, loss="cross-entropy", outputs="grad", target=target)  # type: ignore[arg-type]
        onnx.checker.check_model(step.model, full_check=True)
        assert step.report["lowerings"]["target"] == target
        made = executor(step.model)({**feeds, **{n: np.asarray(v) for n, v in step.state.items()}})
        found.append({p["name"]: made[p["grad"]] for p in step.signature["parameters"]})
    cpu, cuda = found
    for name, truth in cpu.items():
        assert np.abs(cuda[name] - truth).max() <= 1e-4 * np.abs(truth).max(), name


def _operators(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def _emitter(target: str, *shapes: tuple[int, ...], dtype: Any = np.float32) -> tuple[Emitter, list[gs.Variable]]:
    inputs = [gs.Variable(f"x{k}", np.dtype(dtype), list(shape)) for k, shape in enumerate(shapes)]
    graph = gs.Graph(inputs=list(inputs), opset=18)
    graph.import_domains = [onnx.helper.make_opsetid("", 18)]
    return Emitter(graph, lowerings=Lowerings(target)), inputs


def _run(op: Emitter, made: gs.Variable, *arrays: np.ndarray) -> np.ndarray:
    op.graph.outputs = [made]
    made.dtype = made.dtype or np.dtype(np.float32)
    feeds = {given.name: array for given, array in zip(op.graph.inputs, arrays, strict=True)}
    return executor(ir.to_proto(op.graph, infer=True))(feeds)[made.name]


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize(
    ("shape", "axes", "sums"),
    [
        ((3, 4, 5, 6), [0, 2, 3], 2), ((3, 4, 5, 6), [2, 3, 0], 2), ((3, 4, 5), [0, -1], 2), ((3, 4, 5, 6), [0, 1], 1),
        ((3, 4, 5, 6), [2, 3], 1), ((3, 4, 5), [1], 1), ((3, 4), [0, 1], 1), ((2, 3, 4, 5, 6), [0, 2, 4], 1),
        ((2, 3, 4, 5), [0, 3], 2),
    ],
)  # fmt: skip
def test_sums_over_leading_and_trailing_axes(
    shape: tuple[int, ...], axes: list[int], sums: int, keepdims: int
) -> None:
    op, (x,) = _emitter("cuda", shape)
    made = op.ReduceSum(x, axes, keepdims=keepdims)
    assert _operators(op.graph) == ["ReduceSum"] * sums
    array = np.random.default_rng(0).integers(-9, 9, shape).astype(np.float32)  # sums without rounding
    np.testing.assert_array_equal(_run(op, made, array), array.sum(tuple(axes), keepdims=bool(keepdims)))


@pytest.mark.parametrize("count", [2, 32, 33, 64, 65, 1100])
def test_many_operands_of_concat(count: int) -> None:
    op, (x,) = _emitter("cuda", (2, count))
    parts = [op.Slice(x, [k], [k + 1], [1]) for k in range(count)]
    made = op.Concat(*parts, axis=1)
    assert all(len(node.inputs) <= cuda_forms.OPERANDS for node in op.graph.nodes if node.op == "Concat")
    array = np.random.default_rng(0).standard_normal((2, count), np.float32)
    assert _run(op, made, array).tobytes() == array.tobytes()


@pytest.mark.parametrize("kind", ["float32", "int64", "bool"])
@pytest.mark.parametrize("dims", [["N"], ["N", 3], ["N", "T", 2], [3, "N", 2]])
def test_a_count_is_computed_from_the_elements(dims: list[Any], kind: str) -> None:
    """Not from a Shape, which the CPU would compute; NaN and zero are elements like others."""
    sizes = [{"N": 5, "T": 4}.get(n, n) for n in dims]
    x = gs.Variable("x", np.dtype(kind), dims)
    graph = gs.Graph(inputs=[x], opset=18)
    graph.import_domains = [onnx.helper.make_opsetid("", 18)]
    op = Emitter(graph, lowerings=Lowerings("cuda"))
    made = op.count(x, np.float32)
    assert not {"Shape", "Size"} & set(_operators(graph))
    array = np.arange(np.prod(sizes)).reshape(sizes).astype(kind)
    if kind == "float32":
        array.flat[-1] = np.nan
    assert _run(op, made, array) == np.prod(sizes)


@pytest.mark.parametrize(
    ("network", "loss"), [("mlp3", "cross-entropy"), ("mlp3", "mse"), ("transformer", "cross-entropy")]
)
def test_no_number_comes_from_a_shape_where_the_batch_is_open(network: str, loss: str) -> None:
    """What onnxruntime computes on the CPU are shapes, read as such: else no update could be recorded."""
    step = zilc.emit_training(models.build(network), loss=loss, target="cuda")
    shapes: set[str] = set()
    readers = set()
    for node in step.model.graph.node:
        if node.op_type in ("Shape", "Size"):
            shapes.update(node.output)
        elif shapes.intersection(node.input):
            if shapes.issuperset(node.input[:1]):
                shapes.update(node.output)
            else:
                readers.add((node.op_type, min(k for k, name in enumerate(node.input) if name in shapes)))
    assert readers <= {("Reshape", 1), ("Expand", 1), ("Slice", 1), ("Pad", 1)}
    numbers = [node for node in step.model.graph.node if node.op_type in ("Mul", "Div", "Sub", "Add")]
    assert not [node.name for node in numbers if shapes.intersection(node.input)]


def test_a_sum_over_nothing() -> None:
    op, (x,) = _emitter("cuda", (0, 3))
    made = op.ReduceSum(x, [0], keepdims=0)
    assert _operators(op.graph) == ["ReduceSum", "Squeeze"]
    assert (_run(op, made, np.zeros((0, 3), np.float32)) == np.zeros(3)).all()


@pytest.mark.parametrize("pads", [[0, 1, 1, 2], [2, 0, 1, 0], [0, 0, 1, 1]])
@pytest.mark.parametrize("stride", [1, 2])
def test_pads_that_differ(stride: int, pads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The image's gradient by a transposed convolution of equal pads, cut."""
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.standard_normal((3, 2, 3, 2), np.float32), "w")
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], strides=[stride] * 2, pads=pads)
    out = [(8 + pads[k] + pads[2 + k] - kernel) // stride + 1 for k, kernel in enumerate((3, 2))]
    graph = onnx.helper.make_graph(
        [node], "convolution", [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 2, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3, *out])], [weight],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    feeds = {"x": rng.standard_normal((2, 2, 8, 8), np.float32), "target": np.zeros((2, 3, *out), np.float32)}

    class Transposed(Lowerings):
        def choose(self, op: Any, kind: str, site: str, operands: Any, candidates: Any) -> tuple[str, str]:
            return "transpose" if "transpose" in candidates else next(iter(candidates)), "only"

    monkeypatch.setattr("zilc.pipeline.Lowerings", Transposed)
    found = []
    for target in ("cpu", "cuda"):
        step = zilc.emit_training(model, outputs="grad", wrt=["x"], target=target)  # type: ignore[arg-type]
        (transposed,) = (n for n in step.model.graph.node if n.op_type == "ConvTranspose")
        given = next(list(a.ints) for a in transposed.attribute if a.name == "pads")
        assert (given[:2] == given[2:]) == (target == "cuda")
        made = executor(step.model)({**feeds, **{n: np.asarray(v) for n, v in step.state.items()}})
        found.append(made["x.grad"])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_bfloat16_is_compared_as_float32() -> None:
    op, (x,) = _emitter("cuda", (4,), dtype=ml_dtypes.bfloat16)
    op.Greater(x, 0.0)
    assert _operators(op.graph) == ["Cast", "Greater"]
    op, (x,) = _emitter("cpu", (4,), dtype=ml_dtypes.bfloat16)
    op.Greater(x, 0.0)
    assert _operators(op.graph) == ["Greater"]


def test_the_command_takes_a_target(tmp_path: Path) -> None:
    onnx.save(models.build("resnet18", image=33, width=4, classes=5, batch=2), tmp_path / "m.onnx")
    for target in ("cpu", "cuda"):
        done = spawn("emit-training", str(tmp_path / "m.onnx"), "--loss", "cross-entropy", "--target", target)
        assert done.returncode == 0, done.stderr
        model = onnx.load(tmp_path / "m.step.onnx")
        assert (sum(node.op_type == "Gather" for node in model.graph.node) > 8) == (target == "cuda")
    done = spawn("emit-training", str(tmp_path / "m.onnx"), "--target", "abacus")
    assert done.returncode != 0
    assert "abacus" in done.stderr


def test_a_later_opset_is_noted() -> None:
    for opset in (18, 21):
        step = zilc.emit_training(models.build("mlp2", opset=opset), target="cuda")
        notes = [cuda_forms.newer_opset(opset)] if opset > 18 else []
        assert step.report["notes"] == notes
    assert not zilc.emit_training(models.build("mlp2", opset=21)).report["notes"]
