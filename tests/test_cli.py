"""The commands on real files: exit codes, what goes to stdout and stderr, what is written."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import jsonschema
import numpy as np
import onnx
import pytest

from tests.command import ROOT, SKIP, Command, spawn, write
from zilc import checkpoint, models, onnx_io, show, signature
from zilc.cli import zilc as group

COMMANDS = sorted(group.commands)


@pytest.fixture
def zilc(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def skip(tmp_path: Path) -> str:
    return write(tmp_path / "skip.onnx", SKIP)


# --- help -------------------------------------------------------------------------------------------------------


def test_the_commands_are_those_of_the_contract() -> None:
    assert COMMANDS == ["demo", "emit-training", "levelize", "ops", "trace", "train", "verify"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_docstring_and_ends_with_an_example(zilc: Command, name: str) -> None:
    command = group.commands[name]
    text = (command.callback.__doc__ or "").strip()
    assert text.split("\n")[0] == command.get_short_help_str(limit=200)
    example = text.split("\b\n    Example:\n")[1]
    assert all(f"zilc {name}" in line or line.startswith("            ") for line in example.splitlines())
    result = zilc(name, "--help")
    assert result.status == 0
    assert result.err == ""
    assert f"Example:\n      zilc {name}" in result.out
    described = [p for p in command.params if isinstance(p, click.Option)]
    assert all(option.help for option in described)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name: str) -> None:
    """Every option that an example uses exists."""
    doc = group.commands[name].callback.__doc__ or ""
    lines = doc.split("Example:\n")[1].replace("\\\n", " ").strip().splitlines()
    assert lines
    for line in lines:
        argv = shlex.split(line.split("|")[0])[2:]
        group.commands[name].make_context(name, argv)


def test_help_names_no_command_without_a_line(zilc: Command) -> None:
    result = zilc("--help")
    assert result.status == 0
    listed = result.out.split("Commands:\n")[1]
    for name in COMMANDS:
        assert re.search(rf"^  {name}  +\w.*\w\.$", listed, re.MULTILINE), listed  # whole sentences, none cut short


def test_version(zilc: Command) -> None:
    result = zilc("--version")
    assert (result.status, result.err) == (0, "")
    assert re.fullmatch(r"zilc \d+\.\d+\.\d+\n", result.out)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from zilc.__main__ import main; main(['--help']); main(['verify', '--help'])\n"
        "print([m for m in ('numpy', 'onnx', 'onnx_graphsurgeon', 'onnxruntime', 'networkx', 'rich.table', 'sklearn')"
        " if m in sys.modules], file=sys.stderr)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert made.stderr == "[]\n"


def test_help_is_instant() -> None:
    """Under half a second; the best of several runs, since others may use the machine."""
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        assert spawn("--help").returncode == 0
        best = min(best, time.perf_counter() - begun)
    assert best < 0.5


# --- usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["compile"], "No such command 'compile'"),
        (["levelize"], "Missing argument 'MODEL.onnx'"),
        (["levelize", "m.onnx", "--identities", "most"], "'most' is not one of"),
        (["levelize", "m.onnx", "--identities", "none", "-o", "x.onnx"], "--identities none only reports"),
        (["levelize", "m.onnx", "--colour"], "No such option"),
        (["emit-training", "m.onnx", "--tie", "a"], "'a' is not of the form A=B"),
        (["emit-training", "m.onnx", "--dim", "N=many"], "'many' is not a whole number"),
        (["emit-training", "m.onnx", "--opt", "=3"], "'=3' is not of the form KEY=VALUE"),
        (["emit-training", "m.onnx", "--loss", "y=hinge"], "no loss 'hinge'"),
        (["train", "m.onnx"], "Missing option"),
        (["train", "m.onnx", "--data", "d.npz", "--lr", "1", "--epochs", "1", "--batch-size", "1", "-o", "o.onnx",
          "--outputs", "grad"], "--outputs grad gives no updates"),
        (["verify", "m.onnx", "--precision", "float16"], "'float16' is not one of"),
    ],
)  # fmt: skip
def test_usage_is_2(zilc: Command, argv: list[str], text: str) -> None:
    result = zilc(*argv)
    assert result.status == 2
    assert result.out == ""
    assert text in result.err


def test_nothing_said_is_help_and_2(zilc: Command) -> None:
    result = zilc()
    assert result.status == 2
    assert "Commands:" in result.err


def test_option_names_match_the_library() -> None:
    from zilc import losses, optimizers, options, pipeline

    assert tuple(losses.LOSSES) == options.LOSSES
    assert tuple(optimizers.DEFAULTS) == options.OPTIMIZERS
    assert pipeline.PLACEMENTS == options.PLACEMENTS


# --- levelize ---------------------------------------------------------------------------------------------------


def test_levelize_reports(zilc: Command, skip: str, tmp_path: Path) -> None:
    result = zilc("levelize", skip)
    assert (result.status, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines()]
    assert ["K", "5"] in rows
    assert ["edge", "1", "12*N"] in rows  # one float32 row of three an example
    assert ["shared", "1", "12*N"] in rows
    assert ["bend", "join", "0", "3", "1", "1"] in rows
    assert ["w2", "parameter", "[3,3]", "3", "2", "yes"] in rows
    assert ["x", "input", "[N,3]", "5", "no"] in rows
    assert os.listdir(tmp_path) == ["skip.onnx"]  # without -o it only reports


def test_levelize_json_has_every_level(zilc: Command, skip: str) -> None:
    report = zilc("levelize", skip, "--json").json
    assert report["levels"] == 5
    assert [entry["vertices"] for entry in report["per_level"]] == [1, 1, 1, 1, 1, 0]
    assert [entry["identities_shared"] for entry in report["per_level"]] == [0, 0, 1, 0, 0, 0]
    assert report["vertex_levels"] == {"first": 4, "bend": 3, "second": 2, "join": 1, "last": 0}


def test_levelize_writes_and_twice_changes_nothing(zilc: Command, skip: str, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
    assert zilc("levelize", skip, "-o", once).status == 0
    assert zilc("levelize", once, "-o", twice).status == 0
    model = onnx.load(once)
    onnx.checker.check_model(model, full_check=True)
    assert [n.op_type for n in model.graph.node].count("Identity") == 1
    assert once.read_bytes() == twice.read_bytes()


def test_levels_with_equal_counts_share_a_row() -> None:
    per_level = [{"level": n, "vertices": 1, "identities_edge": int(n > 4), "identities_shared": 0} for n in range(8)]
    assert show.level_rows(per_level) == [["0-4", "1 each", 0, 0], ["5-7", "1 each", "1 each", 0]]


def test_very_deep_graphs_are_shown_in_ranges() -> None:
    per_level = [
        {"level": n, "vertices": 1 + n % 2, "identities_edge": 0, "identities_shared": n % 2} for n in range(10)
    ]
    assert show.level_rows(per_level, most=4) == [
        ["0-2", "4 in all", 0, "1 in all"], ["3-5", "5 in all", 0, "2 in all"],
        ["6-8", "4 in all", 0, "1 in all"], ["9-9", "2 in all", 0, "1 in all"],
    ]  # fmt: skip


# --- emit-training ----------------------------------------------------------------------------------------------


def test_emit_training_names_its_files_after_the_model(zilc: Command, skip: str, tmp_path: Path) -> None:
    result = zilc("emit-training", skip, "--loss", "mse", "--optimizer", "adam")
    assert (result.status, result.err) == (0, "")
    graph, state = tmp_path / "skip.step.onnx", tmp_path / "skip.step.safetensors"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "skip.onnx", graph, state]
    onnx.checker.check_model(onnx.load(graph), full_check=True)
    held = checkpoint.load_state(state, checkpoint.graph_digest(graph.read_bytes()))
    parameters, slots = ("w1", "b1", "w2", "w3"), ("", ".exp_avg", ".exp_avg_sq")
    assert set(held) == {"step", *(name + slot for name in parameters for slot in slots)}
    rows = [line.split() for line in result.out.splitlines()]
    assert ["w1", "[3,3]", "5", "4", "w1.next", "w1.exp_avg.next", "w1.exp_avg_sq.next"] in rows
    assert ["target", "float", "[N,2]"] in rows
    assert [str(graph)] in rows
    assert [str(state)] in rows


def test_emit_training_without_state(zilc: Command, skip: str, tmp_path: Path) -> None:
    data = zilc("emit-training", skip, "-o", tmp_path / "s.onnx", "--state", "none", "--json").json
    assert data["written"] == {"graph": str(tmp_path / "s.onnx"), "state": None}
    assert sorted(os.listdir(tmp_path)) == ["s.onnx", "skip.onnx"]


def test_emit_training_says_what_is_left_out_and_why(zilc: Command, skip: str) -> None:
    result = zilc("emit-training", skip, "--freeze", "b*", "--state", "none")
    assert re.search(r"^b1 +frozen by --freeze b\*$", result.out, re.MULTILINE)
    data = zilc("emit-training", skip, "--freeze", "b*", "--state", "none", "--json").json
    assert data["report"]["left_out"] == [{"name": "b1", "reason": "frozen by --freeze b*"}]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--optimizer", "adamw", "--opt", "weight_decay=0.1", "--opt", "betas=0.8,0.9"],
        ["--optimizer", "momentum", "--opt", "nesterov=true", "--outputs", "both"],
        ["--outputs", "grad", "--wrt", "x", "--wrt", "w*"],
        ["--algorithm", "bp", "--loss", "mse"],
        ["--identities", "edge", "--loss", "y=bce-with-logits"],
        ["--identities", "min-bytes"],
        ["--schedule", "literal", "--identities", "none", "--gamma", "0.5", "--steps", "7", "--update-at", "end"],
        ["--algorithm", "il", "--fixed-predictions", "--init-noise", "0.01"],
        ["--output", "y", "--output", "a1", "--loss", "energy", "--loss", "y=cross-entropy", "--class-axis", "-1"],
        ["--dim", "N=4", "--opset", "21"],
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_emit_training_json_holds_a_valid_signature(
    zilc: Command, skip: str, tmp_path: Path, options: list[str]
) -> None:
    result = zilc("emit-training", skip, *options, "--json")
    assert (result.status, result.err) == (0, "")
    jsonschema.validate(result.json["signature"], signature.schema())
    model = onnx.load(tmp_path / "skip.step.onnx")
    assert signature.read(model) == result.json["signature"]
    assert [i["name"] for i in result.json["graph"]["inputs"]] == [i.name for i in model.graph.input]


def test_options_reach_the_library(zilc: Command, skip: str) -> None:
    options = ["--optimizer", "adam", "--opt", "eps=1e-6", "--dim", "N=4", "--opset", "21", "--wrt", "w1"]
    data = zilc("emit-training", skip, *options, "--loss", "cross-entropy", "--class-axis", "0", "--json").json
    assert data["report"]["optimizer"]["eps"] == 1e-6
    assert data["graph"]["opset"] == 21
    assert [p["name"] for p in data["signature"]["parameters"]] == ["w1"]
    inputs = {i["name"]: i for i in data["graph"]["inputs"]}
    assert inputs["x"]["shape"] == [4, 3]
    assert inputs["target"] == {"name": "target", "dtype": "int64", "shape": [2]}


def test_tie(zilc: Command, tmp_path: Path) -> None:
    path = write(tmp_path / "tied.onnx", SKIP.replace(
        "float[3, 3] w2 = {-0.5, 0.25, 0.75, 1.25, -0.3, 0.2, 0.45, -0.7, 0.35}",
        "float[3, 3] w2 = {0.5, -0.25, 1.5, 0.75, -1.0, 0.125, 0.3, 0.6, -0.9}",
    ))  # fmt: skip
    data = zilc("emit-training", path, "--tie", "w1=w2", "--json").json
    assert [p["name"] for p in data["signature"]["parameters"]] == ["w1", "b1", "w3"]


# --- verify, train, ops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_verify(zilc: Command, skip: str, precision: str) -> None:
    result = zilc("verify", skip, "--loss", "cross-entropy", "--precision", precision)
    assert (result.status, result.err) == (0, "")
    assert re.search(r"^w2 +3  bits equal ", result.out, re.MULTILINE)
    assert "Z-IL equals BP bit for bit: yes\nverdict: passed\n" in result.out
    data = zilc("verify", skip, "--loss", "cross-entropy", "--precision", precision, "--json").json
    assert data["passed"]
    assert data["zil_equals_bp"]
    assert {p["name"] for p in data["parameters"]} == {"w1", "b1", "w2", "w3"}


def test_verify_takes_feeds(zilc: Command, skip: str, tmp_path: Path) -> None:
    feeds = tmp_path / "feeds.npz"
    np.savez(feeds, x=np.ones((3, 3), np.float32), target=np.zeros((3, 2), np.float32))
    assert zilc("verify", skip, "--inputs", feeds).status == 0


def test_verify_that_fails_prints_its_table_and_is_1(zilc: Command, skip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from zilc import verification

    monkeypatch.setitem(verification.TOLERANCE, "float32", 0.0)
    result = zilc("verify", skip)
    assert result.status == 1
    assert result.err == ""
    assert re.search(r"^w2 +3  bits equal ", result.out, re.MULTILINE)
    assert result.out.endswith("verdict: FAILED\n")
    result = zilc("verify", skip, "--json")
    assert result.status == 1
    assert result.json["passed"] is False


@pytest.fixture
def data(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 3)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, target=(x[:, 0] > 0).astype(np.int64))
    return str(tmp_path / "data.npz")


TRAIN = ["--loss", "cross-entropy", "--optimizer", "adam", "--lr", "0.05", "--epochs", "6", "--batch-size", "16",
         "--device", "cpu"]  # fmt: skip


def test_train(zilc: Command, skip: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "trained.onnx"
    result = zilc("train", skip, "--data", data, "--val", data, *TRAIN, "-o", out)
    assert result.status == 0
    lines = result.out.splitlines()
    figure = r"\d+\.\d{4}"
    for n, line in enumerate(lines[:6], 1):
        figures = "  ".join(f"{name} {figure}" for name in ("loss", "accuracy", "val_loss", "val_accuracy"))
        assert re.fullmatch(rf"epoch {n}/6  {figures}  seconds [\d.]+", line)
    assert f"written       {out}" in lines
    trained = onnx.load(out)
    before = onnx.load(skip)
    assert [n.op_type for n in trained.graph.node] == [n.op_type for n in before.graph.node]
    assert onnx_io.serialize(trained) != onnx_io.serialize(before)


def test_train_json(zilc: Command, skip: str, data: str, tmp_path: Path) -> None:
    result = zilc("train", skip, "--data", data, *TRAIN, "-o", tmp_path / "trained.onnx", "--json")
    assert result.status == 0
    history = result.json["history"]
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert history[-1]["accuracy"] > 0.9


def test_ops(zilc: Command) -> None:
    data = zilc("ops", "--json").json
    names = [entry["operator"] for entry in data["operators"]]
    schemas = onnx.defs.get_all_schemas_with_history()
    assert set(names) == {s.name for s in schemas if s.domain == "" and s.since_version <= data["opset"]}
    assert names == sorted(names)
    status = {entry["operator"]: entry["status"] for entry in data["operators"]}
    assert status["MatMul"] == "rule"
    assert status["Shape"] == "no gradient"
    assert status["CenterCropPad"] == "function body"
    assert status["SequenceAt"] == "taken apart"
    assert data["counts"]["missing"] == 0
    assert sum(data["counts"].values()) == len(names)
    result = zilc("ops")
    assert result.status == 0
    rows = {line.split()[0]: line for line in result.out.splitlines() if line}
    assert all(name in rows for name in names)
    assert re.fullmatch(r"MatMul +rule +1\b.*", rows["MatMul"])


# --- stdout and stderr ------------------------------------------------------------------------------------------


LONG = "a.very.long.name." * 12 + "weight"


def test_rows_are_whole_lines_where_there_is_no_terminal(zilc: Command, tmp_path: Path) -> None:
    path = write(tmp_path / "long.onnx", SKIP.replace("w2", LONG.replace(".", "_")))
    result = zilc("levelize", path)
    assert re.search(rf"^{LONG.replace('.', '_')}  parameter  \[3,3\] +3 +2  yes$", result.out, re.MULTILINE)
    assert not re.search(r"[^\x20-\x7e\n]", result.out)  # no rules, no colours
    assert not re.search(r" $", result.out, re.MULTILINE)


def test_names_are_no_markup(zilc: Command, tmp_path: Path) -> None:
    model = onnx.load(write(tmp_path / "odd.onnx", SKIP))
    name = "[bold]w:smile:[/x]"
    for tensor in model.graph.initializer:
        tensor.name = name if tensor.name == "w2" else tensor.name
    model.graph.node[2].input[1] = name
    onnx.save(model, tmp_path / "odd.onnx")
    assert f"\n{name}  parameter" in zilc("levelize", tmp_path / "odd.onnx").out


class Terminal(io.StringIO):
    """A terminal of 60 columns."""

    def isatty(self) -> bool:
        return True


def test_tables_fold_on_a_terminal_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    screen = Terminal()
    show.Page(screen).table("leaves", ["name", "level#"], [[LONG, 7]])
    text = re.sub("\x1b\\[[0-9;]*m", "", screen.getvalue())
    assert all(len(line) <= 60 for line in text.splitlines())
    assert LONG in "".join(line.split("  ")[0].strip() for line in text.splitlines())


def test_json_has_no_nan() -> None:
    text = show.document({"a": float("nan"), "b": [np.float32(np.inf), np.int64(3), np.True_], "c": (1, None)})
    assert json.loads(text) == {"a": None, "b": [None, 3, True], "c": [1, None]}


def test_a_reader_that_leaves_is_met_with_silence() -> None:
    writer = subprocess.Popen(
        [sys.executable, "-m", "zilc", "ops"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait(60) == 1


def test_an_interrupt_is_quiet(zilc: Command, skip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from zilc import pipeline

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "levelize", interrupted)
    result = zilc("levelize", skip)
    assert result.status == 130
    assert result.out == ""
    assert result.err.strip() == ""


def test_a_bug_keeps_its_traceback(zilc: Command, skip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from zilc import pipeline
    from zilc.errors import EnsuresError

    def broken(*_: Any, **__: Any) -> Any:
        raise EnsuresError("levelled does not hold")

    monkeypatch.setattr(pipeline, "levelize", broken)
    with pytest.raises(EnsuresError, match="levelled does not hold"):
        zilc("levelize", skip)


# --- the same input gives the same bytes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "digits", "transformer"])
def test_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path, name: str) -> None:
    sizes: dict[str, dict[str, Any]] = {
        "residual": {"inputs": 12, "hidden": 7, "classes": 4},
        "digits": {"channels": 4},
        "transformer": {"vocabulary": 11, "length": 5, "d_model": 12, "heads": 3, "d_ff": 9},
    }
    path = tmp_path / "net.onnx"
    onnx_io.save(models.build(name, **sizes[name]), path)
    made = []
    for seed in ("0", "1", "4711"):
        out = tmp_path / seed
        out.mkdir()
        files = [out / "levelled.onnx", out / "step.onnx", out / "step.safetensors"]
        env = {"PYTHONHASHSEED": seed}
        levels = spawn("levelize", path, "-o", files[0], "--identities", "edge", env=env)
        step = spawn("emit-training", path, "-o", files[1], "--loss", "cross-entropy", "--optimizer", "adam", env=env)
        assert (levels.returncode, step.returncode) == (0, 0), levels.stderr + step.stderr
        printed = (levels.stdout + step.stdout).replace(str(out), "")
        made.append(([file.read_bytes() for file in files], printed))
    assert made[0] == made[1]
    assert made[0] == made[2]
