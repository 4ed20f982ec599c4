"""The text of each message: one line that says where, what, what was expected and what to do; exit 1; no file."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import zilc
from tests.command import SKIP, Command, spawn, write
from zilc import models, onnx_io


@pytest.fixture
def zilc_(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def skip(tmp_path: Path) -> str:
    return write(tmp_path / "skip.onnx", SKIP)


def refused(command: Command, folder: Path, *argv: str | Path) -> str:
    """The one line of a command that fails, and leaves the folder as it was."""
    before = sorted(p.name for p in folder.rglob("*"))
    result = command(*argv)
    assert result.status == 1, result
    assert result.out == ""
    assert result.err.endswith("\n")
    assert len(result.err.splitlines()) == 1, result.err
    assert sorted(p.name for p in folder.rglob("*")) == before
    prefix = "zilc: error: "
    assert result.err.startswith(prefix)
    return result.err[len(prefix) : -1]


# --- files that are no models -----------------------------------------------------------------------------------


WHOLE = "Expected a whole ONNX model (protobuf); export or copy it again."


@pytest.mark.parametrize("command", ["levelize", "emit-training", "verify"])
def test_missing_file(zilc_: Command, tmp_path: Path, command: str) -> None:
    path = tmp_path / "gone.onnx"
    assert refused(zilc_, tmp_path, command, path) == f"{path}: no such file. Check the path."


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_truncated_file(zilc_: Command, tmp_path: Path, skip: str, part: float) -> None:
    data = Path(skip).read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(len(data) * part)])
    size = path.stat().st_size
    text = refused(zilc_, tmp_path, "emit-training", path)
    assert text == f"{path}: not an ONNX model, or cut short ({size:,} bytes). {WHOLE}"


def test_text_file(zilc_: Command, tmp_path: Path) -> None:
    path = tmp_path / "notes.onnx"
    path.write_text("dear reader,\nthis is no model\n")
    text = refused(zilc_, tmp_path, "levelize", path)
    assert text == f"{path}: this is a text file, not an ONNX model (30 bytes). {WHOLE}"


def test_empty_file(zilc_: Command, tmp_path: Path) -> None:
    path = tmp_path / "empty.onnx"
    path.touch()
    assert refused(zilc_, tmp_path, "levelize", path) == f"{path}: the file is empty. {WHOLE}"


def test_folder_for_a_model(zilc_: Command, tmp_path: Path) -> None:
    assert refused(zilc_, tmp_path, "levelize", tmp_path) == f"{tmp_path}: is a folder, expected a file"


# --- models that cannot be trained ------------------------------------------------------------------------------


def test_no_parameters(zilc_: Command, tmp_path: Path) -> None:
    path = write(
        tmp_path / "bare.onnx",
        '<ir_version: 10, opset_import: ["" : 18]> bare (float[N] x) => (float[N] y) { y = Relu (x) }',
    )
    assert refused(zilc_, tmp_path, "emit-training", path) == (
        f"{path}: no parameter to train and no input gradient asked for. "
        "The model has no floating-point initializer; --wrt INPUT gives the gradient of an input."
    )


def test_operators_without_a_rule_are_all_named_at_once(zilc_: Command, tmp_path: Path) -> None:
    path = write(
        tmp_path / "warped.onnx",
        """
        <ir_version: 10, opset_import: ["" : 18, "my.ops" : 1]>
        warped (float[N, 3] x) => (float[N, 3] y)
        <float[3] b = {1.5, 2.5, 3.5}, float[N, 3] h, float[N, 3] p, float[N, 3] q>
        {
            h = Add (x, b)
            [warp] p = my.ops.Warp (h)
            [twist] q = my.ops.Twist (p)
            y = Relu (q)
        }
        """,
    )
    assert refused(zilc_, tmp_path, "emit-training", path) == (
        f"{path}: 2 vertices have no VJP rule for an operand on a path to a trained leaf: "
        "vertex 'warp' (my.ops.Warp, opset 18, level 2); vertex 'twist' (my.ops.Twist, opset 18, level 1). "
        "'zilc ops' lists the operators covered, --rules FILE.py adds rules of yours (docs/RULES.md); "
        "--wrt and --freeze choose the trained leaves."
    )


def test_no_path_is_dropped_for_want_of_a_type(zilc_: Command, tmp_path: Path) -> None:
    """A second path beside the one that has rules must not vanish: only the file could tell what Warp makes."""
    path = write(
        tmp_path / "paths.onnx",
        """
        <ir_version: 10, opset_import: ["" : 18, "my.ops" : 1]>
        paths (float[2, 3] x) => (float[2, 3] y) <float[3] b = {1.5, 2.5, 3.5}>
        { h = Add (x, b)  [warp] w = my.ops.Warp (h)  y = Add (w, h) }
        """,
    )
    assert refused(zilc_, tmp_path, "emit-training", path) == (
        f"{path}: 1 vertex has no VJP rule for an operand on a path to a trained leaf: "
        "vertex 'warp' (my.ops.Warp, opset 18, level 1). "
        "'zilc ops' lists the operators covered, --rules FILE.py adds rules of yours (docs/RULES.md); "
        "--wrt and --freeze choose the trained leaves."
    )


def test_quantised_model(zilc_: Command, tmp_path: Path) -> None:
    path = write(
        tmp_path / "int8.onnx",
        """
        <ir_version: 10, opset_import: ["" : 18]>
        int8 (float[N, 3] x) => (float[N, 2] y)
        <float s = {0.1}, uint8 z = {128}, int8[3, 2] w = {1, 2, 3, 4, 5, 6}, float ws = {0.05}, int8 wz = {0}>
        {
            [quantise] q = QuantizeLinear (x, s, z)
            m = QLinearMatMul (q, s, z, w, ws, wz, s, z)
            y = DequantizeLinear (m, s, z)
        }
        """,
    )
    assert refused(zilc_, tmp_path, "emit-training", path) == (
        f"{path}: no parameter to train and no input gradient asked for. "
        "The model is quantised: vertex 'quantise' (QuantizeLinear) cuts the gradient. "
        "Train the floating-point model it was made from, or, if it is of QDQ format, add --straight-through."
    )


# --- choices that do not fit ------------------------------------------------------------------------------------


def test_unknown_wrt(zilc_: Command, tmp_path: Path, skip: str) -> None:
    text = refused(zilc_, tmp_path, "emit-training", skip, "--wrt", "w11")
    assert text == "--wrt: no parameter or input matches 'w11'; the nearest: w1, w3, w2"


def test_several_outputs_and_none_chosen(zilc_: Command, tmp_path: Path) -> None:
    path = write(
        tmp_path / "two.onnx",
        """
        <ir_version: 10, opset_import: ["" : 18]>
        two (float[N, 3] x) => (float[N, 3] y, float[N, 3] z) <float[3] b = {1.5, 2.5, 3.5}>
        { y = Add (x, b)  z = Relu (y) }
        """,
    )
    text = refused(zilc_, tmp_path, "emit-training", path)
    assert text == (
        "--output: the model has 2 floating-point outputs: y, z. Choose one or more with --output NAME."
    )
    assert refused(zilc_, tmp_path, "levelize", path, "--output", "q") == (
        "--output: no tensor 'q' in the model. Its outputs: y, z."
    )


def test_cross_entropy_of_a_softmax(zilc_: Command, tmp_path: Path) -> None:
    path = write(
        tmp_path / "softmax.onnx",
        """
        <ir_version: 10, opset_import: ["" : 18]>
        net (float[N, 3] x) => (float[N, 3] y) <float[3] b = {1.5, 2.5, 3.5}>
        { scores = Add (x, b)  [odds] y = Softmax (scores) }
        """,
    )
    text = refused(zilc_, tmp_path, "emit-training", path, "--loss", "cross-entropy")
    assert text == (
        "--loss: cross-entropy wants logits, and output 'y' is made by a Softmax, vertex 'odds'. "
        "Train its input instead: --output scores"
    )
    assert zilc_("emit-training", path, "--loss", "cross-entropy", "--output", "scores").status == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--loss", "z=mse"], "--loss: 'z' is not a trained output. They are: y."),
        (["--loss", "cross-entropy", "--class-axis", "2"],
         "--class-axis: output 'y' has 2 dimensions, no axis 2. Choose one from -2 to 1."),
        (["--dim", "M=3"], "--dim: no symbolic dimension 'M' among the inputs. The model's symbolic dimensions: N."),
        (["--tie", "w1=w4"], "--tie: no parameter 'w4'. 'zilc levelize' lists the parameters."),
        (["--tie", "w1=w2"],
         "--tie: 'w1' [3, 3] and 'w2' [3, 3] hold different values. "
         "Only equal tensors, or a matrix and its transpose, can become one leaf."),
        (["--opt", "betas=0.9,0.99"], "--opt: sgd has no option 'betas'. Its options: weight_decay, maximize."),
        (["--optimizer", "adam", "--opt", "betas=0.9"], "--opt: betas='0.9' is not 2 numbers with a comma between"),
        (["--freeze", "*"], None),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(
    zilc_: Command, tmp_path: Path, skip: str, options: list[str], text: str | None
) -> None:
    expected = text or (
        f"{skip}: no parameter to train and no input gradient asked for. "
        "Floating tensors left out: w1 (frozen), b1 (frozen), w2 (frozen), w3 (frozen)."
    )
    assert refused(zilc_, tmp_path, "emit-training", skip, *options) == expected


# --- data -------------------------------------------------------------------------------------------------------


def _arrays(**changed: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((8, 3)).astype(np.float32), "target": rng.standard_normal((8, 2)).astype("f4")}
    return {**arrays, **changed}


def test_wrong_target_shape_in_train(zilc_: Command, tmp_path: Path, skip: str) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, **_arrays(target=np.zeros((8, 5), np.float32)))
    options = ["--lr", "0.1", "--epochs", "1", "--batch-size", "4", "-o", tmp_path / "out.onnx"]
    text = refused(zilc_, tmp_path, "train", skip, "--data", data, *options)
    assert text == f"{data}: 'target' has shape [8, 5], expected [N, 2]"
    text = refused(zilc_, tmp_path, "train", skip, "--data", data, "--loss", "cross-entropy", *options)
    assert text == f"{data}: 'target' has shape [8, 5], expected [N]"


def test_wrong_target_shape_in_a_trainer(skip: str) -> None:
    trainer = zilc.Trainer(zilc.emit_training(skip), lr=0.1, providers=["CPUExecutionProvider"])
    with pytest.raises(zilc.DataError) as caught:
        trainer.step(_arrays(target=np.zeros((8, 5), np.float32)))
    assert str(caught.value) == "feeds: 'target' has shape [8, 5], expected [N, 2]"
    with pytest.raises(zilc.DataError) as caught:
        trainer.step(_arrays(target=np.zeros((7, 2), np.float32)))
    assert str(caught.value) == "feeds: 'target' has shape [7, 2], expected [N, 2] with N = 8 as in 'x'"


def test_feeds_that_are_no_archive(zilc_: Command, tmp_path: Path, skip: str) -> None:
    path = tmp_path / "feeds.npz"
    path.write_text("1 2 3\n")
    text = refused(zilc_, tmp_path, "verify", skip, "--inputs", path)
    assert text.startswith(f"{path}: ")
    assert "npz" in text


# --- places that cannot be written ------------------------------------------------------------------------------


ROOM = "Check that the folder exists, is writable, and has room."


@pytest.mark.parametrize("command", ["levelize", "emit-training"])
def test_no_such_folder(zilc_: Command, tmp_path: Path, skip: str, command: str) -> None:
    path = tmp_path / "nowhere" / "out.onnx"
    text = refused(zilc_, tmp_path, command, skip, "-o", path)
    assert text == f"{path}: cannot be written (No such file or directory). {ROOM}"


def test_no_folder_for_the_state(zilc_: Command, tmp_path: Path, skip: str) -> None:
    path = tmp_path / "nowhere" / "out.safetensors"
    text = refused(zilc_, tmp_path, "emit-training", skip, "--state", path)
    assert text == f"{path}: cannot be written (No such file or directory). {ROOM}"


def test_a_folder_in_the_place_of_a_file(zilc_: Command, tmp_path: Path, skip: str) -> None:
    for argv in (["levelize", skip, "-o", tmp_path], ["emit-training", skip, "-o", tmp_path],
                 ["emit-training", skip, "--state", tmp_path]):  # fmt: skip
        assert refused(zilc_, tmp_path, *argv) == f"{tmp_path}: is a folder, expected a file name"


def test_one_place_for_two_files(zilc_: Command, tmp_path: Path, skip: str) -> None:
    path = tmp_path / "out"
    text = refused(zilc_, tmp_path, "emit-training", skip, "-o", path, "--state", path)
    assert text == f"{path}: named twice, expected different files"


@pytest.mark.parametrize("command", ["levelize", "emit-training"])
def test_unwritable_folder(
    zilc_: Command, tmp_path: Path, skip: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> Any:  # the superuser may write anywhere, so the folder cannot just be locked
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", denied)
    monkeypatch.setattr(tempfile, "mkdtemp", denied)
    path = tmp_path / "out.onnx"
    text = refused(zilc_, tmp_path, command, skip, "-o", path)
    assert text == f"{path}: cannot be written (Permission denied). {ROOM}"


def _limit(size: int) -> Any:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("argv", "room", "culprit"),
    [
        (["levelize", "-o", "net.out.onnx"], 100_000, "net.out.onnx"),
        (["emit-training", "-o", "net.step.onnx"], 2_000, "net.step.onnx"),
        # The graph holds no weights and fits; the state, 200 kB, does not.
        (["emit-training", "-o", "net.step.onnx"], 100_000, "net.step.safetensors"),
    ],
)
def test_full_disk(tmp_path: Path, argv: list[str], room: int, culprit: str) -> None:
    path = tmp_path / "net.onnx"
    assert len(onnx_io.save(models.build("mlp2", hidden=64), path)) > 200_000
    command, option, out = argv
    result = spawn(command, path, option, tmp_path / out, preexec_fn=_limit(room))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"zilc: error: {tmp_path / culprit}: cannot be written (File too large). {ROOM}\n"
    assert os.listdir(tmp_path) == ["net.onnx"]


def test_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    size = len(onnx_io.save(models.build("mlp2", hidden=64), path))
    for name in ("net.step.onnx", "net.step.safetensors"):
        (tmp_path / name).write_text("old")
    result = spawn("emit-training", path, "--optimizer", "adam", preexec_fn=_limit(2 * size))
    assert result.returncode == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p != path} == {
        "net.step.onnx": b"old", "net.step.safetensors": b"old",
    }  # fmt: skip


# --- the rest ---------------------------------------------------------------------------------------------------


def test_demo_without_scikit_learn(zilc_: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    text = refused(zilc_, tmp_path, "demo", "-o", tmp_path / "demo")
    assert text == "zilc demo: scikit-learn, which holds the digits, is not installed. pip install 'zilc[demo]'"


def test_debug_keeps_the_traceback(tmp_path: Path) -> None:
    result = spawn("--debug", "levelize", tmp_path / "gone.onnx")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert "FileError" in result.stderr


def test_every_error_is_a_zilc_error_but_a_broken_promise() -> None:
    errors = [zilc.ModelError, zilc.MissingRule, zilc.OptionError, zilc.DataError, zilc.FileError]
    for error in [*errors, zilc.RuntimeMissing, zilc.RequiresError]:
        assert issubclass(error, zilc.ZilcError)
    assert not issubclass(zilc.EnsuresError, zilc.ZilcError)


def test_a_message_is_one_line() -> None:
    error = zilc.ZilcError("two\nlines", where="here", hint="Do\n  this.")
    assert str(error) == "here: two lines. Do this."
    parsed = onnx.parser.parse_model(SKIP)
    parsed.graph.node[0].op_type = "Nonsense"
    with pytest.raises(zilc.ModelError) as caught:
        zilc.levelize(parsed)
    assert len(str(caught.value).splitlines()) == 1
