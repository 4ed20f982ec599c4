"""Trained weights back in the user's file with all else as it was, and the training command's checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.external_data_helper
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import onnxruntime
import pytest

import zilc
from zilc import models, onnx_io
from zilc.errors import DataError, FileError, ModelError, OptionError
from zilc.runtime import Trainer
from zilc.train import train
from zilc.trained import export_trained, with_values

CPU = ["CPUExecutionProvider"]


def _run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    return onnxruntime.InferenceSession(str(path), options, providers=CPU).run(None, feeds)


def _trained(model: Any, feeds: dict[str, np.ndarray], **options: Any) -> Trainer:
    trainer = Trainer(zilc.emit_training(model, **options), lr=0.1, providers=CPU)
    for _ in range(3):
        trainer.step(feeds)
    return trainer


def _assert_exported(path: Path, trainer: Trainer, feeds: dict[str, np.ndarray], output: str) -> onnx.ModelProto:
    """The file is valid, computes what the trainer computes, and can be trained on from there."""
    onnx.checker.check_model(str(path), full_check=True)
    inputs = {n: a for n, a in feeds.items() if n != "target"}
    expected = trainer.evaluate(feeds).predictions[output]
    np.testing.assert_allclose(_run(path, inputs)[0], expected, rtol=1e-6, atol=1e-7)
    again = zilc.emit_training(path).state
    for name in again:
        np.testing.assert_array_equal(again[name], trainer.state[name], err_msg=name)
    return onnx.load(path, load_external_data=False)


WEIGHTS = """
    <ir_version: 10, opset_import: ["": 18], producer_name: "someone", doc_string: "kept">
    weights (float[N, 3] x) => (float[N, 2] y)
    <float[3, 3] w = {1, 2, -1, 0.5, 0, 1, 2, -3, 1}, int64[2] shape = {3, 2}> {
        a = MatMul(x, w)
        v = Constant <value = float[3] {0.5, -0.25, 2}> ()
        b = Add(a, v)
        u = Constant <value_floats = [0.5, 0.25, 3.0]> ()
        c = Mul(b, u)
        t = Tanh(c)
        z = ConstantOfShape <value = float[1] {0.5}> (shape)
        y = MatMul(t, z)
    }"""


def _weights(ir_version: int = 10) -> onnx.ModelProto:
    model = onnx.parser.parse_model(WEIGHTS)
    model.graph.initializer[0].doc_string = "a weight"
    model.metadata_props.append(onnx.StringStringEntryProto(key="who", value="someone"))
    model.graph.node[0].name = "first"
    if ir_version < 4:
        model.ir_version = ir_version
        for tensor in model.graph.initializer:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            model.graph.input.append(info)
    return model


FEEDS = {
    "x": np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32),
    "target": np.random.default_rng(1).standard_normal((4, 2)).astype(np.float32),
}


@pytest.mark.parametrize("ir_version", [3, 10])
def test_every_kind_of_weight_goes_back(tmp_path: Path, ir_version: int) -> None:
    model = _weights(ir_version)
    before = onnx_io.serialize(model)
    trainer = _trained(model, FEEDS)
    assert set(trainer.state) == {"w", "v", "u", "z"}
    trainer.export(tmp_path / "out.onnx")
    found = _assert_exported(tmp_path / "out.onnx", trainer, FEEDS, "y")
    assert onnx_io.serialize(model) == before

    # Undo the change of each trained tensor: what is left must be the original, byte for byte.
    state = trainer.state
    for name in ("w", "z"):
        tensor = next(t for t in found.graph.initializer if t.name == name)
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), state[name])
    nodes = {n.output[0]: n for n in found.graph.node}
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(nodes["v"].attribute[0].t), state["v"])
    np.testing.assert_array_equal(np.asarray(nodes["u"].attribute[0].floats, np.float32), state["u"])
    assert [i.name for i in found.graph.input] == (["x", "w", "z"] if ir_version == 3 else ["x"])
    assert next(t for t in found.graph.initializer if t.name == "w").doc_string == "a weight"
    undone, original = onnx.ModelProto(), onnx.ModelProto()
    undone.CopyFrom(found)
    original.CopyFrom(model)
    for proto in (undone, original):
        for tensor in list(proto.graph.initializer):
            if tensor.name in ("z", "shape"):
                proto.graph.initializer.remove(tensor)
            else:
                tensor.ClearField("raw_data")
                tensor.ClearField("float_data")
        for info in [i for i in proto.graph.input if i.name in ("z", "shape")]:
            proto.graph.input.remove(info)
        for node in list(proto.graph.node):
            if node.op_type == "ConstantOfShape":
                proto.graph.node.remove(node)
            elif node.op_type == "Constant":
                del node.attribute[:]
    assert onnx_io.serialize(undone) == onnx_io.serialize(original)


def test_initializers_alone_change_nothing_else(tmp_path: Path) -> None:
    """Where the weights have raw data already, only those bytes differ."""
    model = models.build("mlp2", inputs=3, hidden=4, classes=2)
    feeds = {"input": FEEDS["x"], "target": FEEDS["target"]}
    onnx_io.save(model, tmp_path / "in.onnx")
    trainer = _trained(tmp_path / "in.onnx", feeds)
    trainer.export(tmp_path / "out.onnx")
    _assert_exported(tmp_path / "out.onnx", trainer, feeds, "logits")
    trainer.load_state(zilc.emit_training(tmp_path / "in.onnx").state)
    trainer.export(tmp_path / "same.onnx")
    assert (tmp_path / "same.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()
    assert (tmp_path / "out.onnx").stat().st_size == (tmp_path / "in.onnx").stat().st_size


def test_a_trainer_holds_the_weights_once(tmp_path: Path) -> None:
    """Of the original it keeps what the export does not replace, and the step's own copy stays whole."""
    model = models.build("mlp2", inputs=3, hidden=4, classes=2)
    step = zilc.emit_training(model, freeze="*.bias")
    trainer = Trainer(step, lr=0.1, providers=CPU)
    kept = {t.name: len(t.raw_data) for t in trainer._original.proto.graph.initializer}  # type: ignore[union-attr]
    trained = {p["name"] for p in step.signature["parameters"]}
    assert trained == {name for name in kept if "bias" not in name}
    assert {name for name, size in kept.items() if not size} == trained
    trainer.export(tmp_path / "same.onnx")
    assert (tmp_path / "same.onnx").read_bytes() == onnx_io.serialize(model) == onnx_io.serialize(step.source.proto)


@pytest.mark.parametrize("places", [[0, 4, 7], [[0, 0], [1, 1], [2, 1]]])
def test_sparse_weights_are_trained_and_written_as_dense_ones(places: list[Any], tmp_path: Path) -> None:
    """Places count through the flattened tensor, or name each dimension."""
    values = onnx.numpy_helper.from_array(np.asarray([1, 2, 3], np.float32), "w")
    indices = onnx.numpy_helper.from_array(np.asarray(places, np.int64), "places")
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 18]>
        g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }""")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [4, 3]))
    onnx.save(model, tmp_path / "in.onnx")
    step = zilc.emit_training(tmp_path / "in.onnx")
    dense = [[1, 0, 0], [0, 2, 0], [0, 3, 0], [0, 0, 0]]
    np.testing.assert_array_equal(step.state["w"], np.asarray(dense, np.float32))
    trainer = Trainer(step, lr=0.1, providers=CPU)
    feeds = {"x": np.ones((2, 4), np.float32), "target": np.zeros((2, 3), np.float32)}
    assert trainer.step(feeds) > trainer.step(feeds)
    trainer.export(tmp_path / "out.onnx")
    _assert_exported(tmp_path / "out.onnx", trainer, feeds, "y")


def test_a_shape_that_others_read_stays() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18]>
        g (float[N, 2] x) => (float[N, 3] y, float[2, 3] e) <int64[2] shape = {2, 3}, float one = {1}> {
            z = ConstantOfShape <value = float[1] {0.5}> (shape)
            y = MatMul(x, z)
            e = Expand(one, shape)
        }""")
    made = with_values(onnx_io.load(model), {"z": np.ones((2, 3), np.float32)}, {})
    assert [t.name for t in made.graph.initializer] == ["shape", "one", "z"]
    assert [n.op_type for n in made.graph.node] == ["MatMul", "Expand"]
    onnx.checker.check_model(made, full_check=True)


def test_ties_are_written_twice(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18]>
        tied (float[N, 2] x) => (float[N, 2] y)
        <float[2, 3] a = {1, 2, 3, 4, 5, 6}, float[3, 2] b = {1, 4, 2, 5, 3, 6}, float[2, 3] c = {1, 2, 3, 4, 5, 6}> {
            h = MatMul(x, a)
            k = MatMul(x, c)
            s = Add(h, k)
            y = MatMul(s, b)
        }""")
    feeds = {"x": FEEDS["x"][:, :2] / 30, "target": FEEDS["target"]}
    trainer = _trained(model, feeds, tie=[("a", "b"), ("a", "c")])
    trainer.lr = 1e-3
    assert set(trainer.state) == {"a"}
    trainer.export(tmp_path / "out.onnx")
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    np.testing.assert_array_equal(found["a"], trainer.state["a"])
    np.testing.assert_array_equal(found["b"], trainer.state["a"].T)
    np.testing.assert_array_equal(found["c"], trainer.state["a"])
    assert not np.array_equal(found["a"], [[1, 2, 3], [4, 5, 6]])
    expected = trainer.evaluate(feeds).predictions["y"]
    np.testing.assert_allclose(_run(tmp_path / "out.onnx", {"x": feeds["x"]})[0], expected, rtol=1e-6)


def test_parameters_inside_functions(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18, "own": 1]>
        calls (float[N, 3] x) => (float[N, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            h = own.shift(x)
            y = MatMul(h, w)
        }
        <domain: "own", opset_import: ["": 18]>
        shift (x) => (y) {
            b = Constant <value = float[3] {0.5, 1.5, 2.5}> ()
            y = Add(x, b)
        }""")
    trainer = _trained(model, {"x": FEEDS["x"] / 10, "target": FEEDS["target"]})
    assert len(trainer.state) == 2
    trainer.export(tmp_path / "out.onnx")
    found = _assert_exported(tmp_path / "out.onnx", trainer, {"x": FEEDS["x"], "target": FEEDS["target"]}, "y")
    assert len(found.functions) == 0

    # With the function's constant frozen the model keeps its function.
    frozen = _trained(model, {"x": FEEDS["x"] / 10, "target": FEEDS["target"]}, wrt="w")
    frozen.export(tmp_path / "frozen.onnx")
    assert len(onnx.load(tmp_path / "frozen.onnx").functions) == 1


def test_old_opsets_stay_old(tmp_path: Path) -> None:
    """Training converts the model; the trained file is the one that came in."""
    model = onnx.parser.parse_model("""
        <ir_version: 6, opset_import: ["": 11]>
        old (float[N, 3] x) => (float[N, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            h = MatMul(x, w)
            s = ReduceSum <axes = [1], keepdims = 1> (h)
            y = Sub(h, s)
        }""")
    feeds = {"x": FEEDS["x"] / 10, "target": FEEDS["target"]}
    trainer = _trained(model, feeds)
    trainer.export(tmp_path / "out.onnx")
    found = _assert_exported(tmp_path / "out.onnx", trainer, feeds, "y")
    assert (found.ir_version, found.opset_import[0].version) == (6, 11)


# --- external data --------------------------------------------------------------------------------------------


def _external(folder: Path, name: str = "m.onnx") -> tuple[Path, dict[str, np.ndarray]]:
    model = models.build("mlp2", inputs=300, hidden=16, classes=3)
    model.graph.initializer[0].doc_string = "a weight"
    onnx_io.save(model, folder / name, external=True)
    rng = np.random.default_rng(0)
    feeds = {"input": rng.standard_normal((2, 300)) / 20, "target": rng.standard_normal((2, 3))}
    return folder / name, {k: v.astype(np.float32) for k, v in feeds.items()}


def test_external_data_stay_external(tmp_path: Path) -> None:
    path, feeds = _external(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    trainer = _trained(path, feeds, freeze="layer2.bias")
    trainer.export(tmp_path / "out.onnx")
    assert {n: (tmp_path / n).read_bytes() for n in before} == before
    assert {p.name for p in tmp_path.iterdir()} == {*before, "out.onnx", "out.onnx.data"}
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    found = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    large = found.graph.initializer[0]
    assert onnx.external_data_helper.ExternalDataInfo(large).location == "out.onnx.data"
    assert large.doc_string == "a weight"
    loaded = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    for name, array in trainer.state.items():
        np.testing.assert_array_equal(loaded[name], array)
    expected = trainer.evaluate(feeds).predictions["logits"]
    np.testing.assert_allclose(_run(tmp_path / "out.onnx", {"input": feeds["input"]})[0], expected, rtol=1e-6)


def test_overwriting_the_original(tmp_path: Path) -> None:
    path, feeds = _external(tmp_path)
    trainer = _trained(path, feeds)
    trainer.export(tmp_path / "other.onnx")
    expected = trainer.state
    trainer.export(path)
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data", "other.onnx", "other.onnx.data"}
    assert (tmp_path / "m.onnx.data").read_bytes() == (tmp_path / "other.onnx.data").read_bytes()
    again = zilc.emit_training(path).state
    for name, array in expected.items():
        np.testing.assert_array_equal(again[name], array)


def test_data_of_the_original_are_not_overwritten(tmp_path: Path) -> None:
    path, feeds = _external(tmp_path)
    path.rename(tmp_path / "renamed.onnx")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    trainer = _trained(tmp_path / "renamed.onnx", feeds)
    with pytest.raises(FileError, match=r"its data file 'm\.onnx\.data' would overwrite the original's"):
        trainer.export(tmp_path / "m.onnx")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, feeds = _external(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    trainer = _trained(path, feeds)

    def full(proto: onnx.ModelProto) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_io, "serialize", full)
    for target in (path, tmp_path / "out.onnx"):
        with pytest.raises(FileError, match="No space left on device"):
            trainer.export(target)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_values_that_do_not_belong(tmp_path: Path) -> None:
    source = onnx_io.load(_weights())
    with pytest.raises(ModelError, match="no parameter 'nothing' in the model"):
        export_trained(source, {"nothing": np.zeros(2, np.float32)}, {}, tmp_path / "out.onnx")
    for name in ("w", "v", "u", "z"):
        with pytest.raises(DataError, match=rf"'{name}' was given float64 \[7\], expected float32 \[3"):
            export_trained(source, {name: np.zeros(7)}, {}, tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


# --- train ----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model and two data sets whose classes can be learned."""
    onnx_io.save(models.build("mlp2", inputs=4, hidden=8, classes=3), tmp_path / "m.onnx")
    for name, count, seed in (("train.npz", 90, 0), ("val.npz", 30, 1)):
        x = np.random.default_rng(seed).standard_normal((count, 4))
        np.savez(tmp_path / name, input=x, target=x[:, :3].argmax(1).astype(np.int32))
    return tmp_path


def _train(place: Path, **changes: Any) -> Any:
    options = {
        "data": place / "train.npz", "val": place / "val.npz", "out": place / "out.onnx", "lr": 0.05, "epochs": 8,
        "batch_size": 16, "loss": "cross-entropy", "optimizer": "adam", "device": "cpu",
    }  # fmt: skip
    return train(place / "m.onnx", **{**options, **changes})


def test_train(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started, batches, epochs = [], [], []
    result = _train(
        place, on_start=lambda *a: started.append(a), on_batch=batches.append, on_epoch=epochs.append
    )
    assert result.path == place / "out.onnx"
    assert result.device == started[0][1] == "CPU: asked for"
    assert result.providers == CPU
    assert epochs == result.history
    assert len(batches) == 8 * 6
    assert batches[-1].epochs == 8
    assert batches[-1].batches == 6
    assert result.history[-1]["val_accuracy"] > 0.85 > result.history[0]["val_accuracy"]
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    with np.load(place / "val.npz") as val:
        logits = _run(result.path, {"input": val["input"].astype(np.float32)})[0]
        assert np.mean(logits.argmax(1) == val["target"]) == result.history[-1]["val_accuracy"]
    assert capfd.readouterr() == ("", "")


def test_the_seed_decides_the_result(place: Path) -> None:
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        _train(place, out=place / name, seed=seed, epochs=2)
        made.append((place / name).read_bytes())
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out": "missing/out.onnx"}, FileError, r"missing/out\.onnx: cannot be written \(No such file or directory\)"),
        ({"out": "."}, FileError, "is a folder, expected a file name"),
        ({"lr": 0.0}, OptionError, "--lr: learning rate 0.0, expected a finite number above 0"),
        ({"epochs": 0}, OptionError, "--epochs: 0 epochs. Take at least 1"),
        ({"batch_size": 0}, OptionError, "--batch-size: 0 examples a batch"),
        ({"data": "none.npz"}, FileError, r"none\.npz: no such file"),
        ({"val": "none.npz"}, FileError, r"none\.npz: no such file"),
        ({"data": "m.onnx"}, FileError, r"m\.onnx: not an npz file.*numpy\.savez"),
        ({"device": "tpu"}, OptionError, "no device 'tpu'"),
    ],
)  # fmt: skip
def test_what_is_found_out_before_compiling(
    place: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], error: type, message: str
) -> None:
    monkeypatch.setattr("zilc.train.emit_training", lambda *a, **k: pytest.fail("compiled"))
    changes = {k: place / v if isinstance(v, str) and k != "device" else v for k, v in changes.items()}
    before = sorted(place.iterdir())
    with pytest.raises(error, match=message):
        _train(place, **changes)
    assert sorted(place.iterdir()) == before


def test_names_are_asked_for_before_compiling(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zilc.train.emit_training", lambda *a, **k: pytest.fail("compiled"))
    np.savez(place / "bad.npz", x=np.zeros((4, 4)), y=np.zeros(4))
    expected = r"bad\.npz: missing 'input'; it has 'x', 'y'\. Expected: 'input' float32 \[N, 4\], and the target"
    with pytest.raises(DataError, match=expected):
        _train(place, data=place / "bad.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input": np.zeros((8, 4))},
         r"missing 'target'; it has 'input'\. Expected: 'input' float32 \[N, 4\]; 'target' int64 \[N\]"),
        ({"input": np.zeros((8, 5)), "target": np.zeros(8, int)}, r"'input' has shape \[8, 5\], expected \[N, 4\]"),
        ({"input": np.zeros((8, 4)), "target": np.zeros(8)}, r"'target' holds float64, expected int64\. Convert it"),
        ({"input": np.zeros((8, 4)), "target": np.zeros(7, int)},
         "arrays of different lengths along axis 0: 'input' 8, 'target' 7"),
        ({"input": np.zeros((0, 4)), "target": np.zeros(0, int)}, "0 examples, expected at least 1"),
        ({"input": np.array([None] * 8), "target": np.zeros(8, int)}, "array 'input' cannot be read"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit(place: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(place / "bad.npz", **arrays)
    for name in ("data", "val"):
        with pytest.raises(DataError, match=rf"bad\.npz: {message}"):
            _train(place, **{name: place / "bad.npz"})
    assert not (place / "out.onnx").exists()


def test_other_arrays_are_left_alone_with_a_note(place: Path) -> None:
    with np.load(place / "train.npz") as data:
        result = _train(place, data={**data, "names": np.array(["a"])}, epochs=1)
    assert result.notes == ["data: not read: names"]


def test_a_fixed_batch_leaves_a_note(place: Path) -> None:
    onnx_io.save(models.build("mlp2", inputs=4, hidden=8, classes=3, batch=20), place / "m.onnx")
    result = _train(place, batch_size=20, epochs=1)
    assert [n.split(": ", 1)[1] for n in result.notes] == [
        f"the last 10 of {count} examples are left out: the model's batches are fixed at 20" for count in (90, 30)
    ]


def test_divergence_writes_nothing(place: Path) -> None:
    with np.load(place / "train.npz") as found:
        data = {"input": found["input"], "target": found["input"][:, :3]}
    changes = {"data": data, "val": None, "loss": "energy", "optimizer": "sgd"}
    with pytest.raises(DataError, match=r"epoch \d+, batch \d+: the loss is (inf|nan)\. Try a learning rate below 50"):
        _train(place, lr=50.0, epochs=50, **changes)
    with pytest.raises(DataError, match=r"is not finite after the last update\. Try a learning rate below 1e"):
        _train(place, lr=1e38, epochs=1, batch_size=90, **changes)
    assert not (place / "out.onnx").exists()


def test_several_outputs(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18]>
        two (float[N, 3] x) => (float[N, 2] a, float[N, 4] b)
        <float[3, 2] w = {0, 0, 0, 0, 0, 0}, float[3, 4] v = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}> {
            a = MatMul(x, w)
            b = MatMul(x, v)
        }""")
    for tensor in model.graph.initializer:  # zeros would be taken for a table
        array = np.random.default_rng(0).standard_normal(tuple(tensor.dims)).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((60, 3))
    signs = (x @ rng.standard_normal((3, 4)) > 0).astype(float)
    data = {"x": x, "target.a": (x[:, 0] > 0).astype(np.int64), "target.b": signs}
    options: dict[str, Any] = {
        "lr": 0.5, "epochs": 20, "batch_size": 20, "device": "cpu", "output": ["a", "b"],
        "loss": {"a": "cross-entropy", "b": "bce-with-logits"},
    }  # fmt: skip
    result = train(model, data, out=tmp_path / "out.onnx", **options)
    assert result.history[-1]["accuracy.a"] > 0.85
    assert result.history[-1]["accuracy.b"] > 0.85
    with pytest.raises(DataError, match=r"missing 'target\.b'"):
        train(model, {k: v for k, v in data.items() if k != "target.b"}, out=tmp_path / "o", **options)


def test_classes_on_another_axis(tmp_path: Path) -> None:
    """Segmentation: logits [N, C, L] with C = L, where the shapes alone do not tell the classes' axis."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18]>
        seg (float[N, 3, 3] x) => (float[N, 3, 3] y) <float[3] w = {1, 1, 1}> { y = Mul(x, w) }""")
    x = np.random.default_rng(0).standard_normal((12, 3, 3)) * 4
    result = train(
        model, {"x": x, "target": x.argmax(1)}, out=tmp_path / "out.onnx", lr=1e-6, epochs=1, batch_size=5,
        device="cpu", loss="cross-entropy", class_axis=1,
    )  # fmt: skip
    assert result.history[0]["accuracy"] == 1.0


def test_constant_inputs_go_to_every_batch(tmp_path: Path) -> None:
    """A scalar and a table are no examples."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18]>
        g (float[N, 3] x, float s, float[3] table) => (float[N, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            a = Mul(x, s)
            b = Add(a, table)
            y = MatMul(b, w)
        }""")
    feeds = {"x": FEEDS["x"], "s": np.float32(0.1), "table": np.ones(3), "target": FEEDS["target"]}
    seen = []
    train(model, feeds, out=tmp_path / "o", lr=1e-3, epochs=1, batch_size=3, device="cpu", on_batch=seen.append)
    assert [p.examples for p in seen] == [3, 1]
