"""What the README says is what happens: its commands run, its programs run, its printed walk is the real one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
SHELL = re.findall(r"^```sh\n(.*?)^```", TEXT, re.S | re.M)
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M)


def run(arguments: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every shell block has run here."""
    made = tmp_path_factory.mktemp("readme")
    for block in SHELL:
        run(["bash", "-e", "-c", block], made)
    return made


def test_shell_blocks_write_what_they_say(folder):
    for name in (
        "skip.levelled.onnx", "skip.step.onnx", "skip.step.safetensors", "digits.trained.onnx", "skip.levels.html",
        "skip.levels.svg", "skip.trace.npz", "skip.trace.html", "skip.wave.svg", "skip.il.npz", "skip.traced.onnx",
    ):  # fmt: skip
        assert (folder / name).is_file()


def test_the_page_on_traces_reads_the_file(folder):
    text = (ROOT / "docs" / "TRACES.md").read_text("utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    (folder / "trace.npz").write_bytes((folder / "skip.trace.npz").read_bytes())
    check = (
        "assert sorted(set(arrived)) == [0, 1, 2, 3] and len(by_level) == 4 and by_level[3][:3].tolist() == [0, 0, 0]"
    )
    run([sys.executable, "-c", f"{program}\n{check}"], folder)


@pytest.mark.parametrize("program", PYTHON, ids=lambda p: p.strip().splitlines()[0])
def test_programs_run_and_learn(folder, program):
    out = run([sys.executable, "-c", program], folder)
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", out)]
    assert losses
    assert losses[-1] < 1.0  # below chance: log 3 = 1.10 and log 10 = 2.30


def test_the_walk_is_the_real_one(folder):
    printed = run([sys.executable, str(ROOT / "tools" / "walk.py"), "skip.onnx"], folder)
    shown = re.search(r"<!-- walk -->\n```text\n(.*?)```\n<!-- /walk -->", TEXT, re.S)
    assert shown is not None
    assert printed == shown.group(1)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([\w-]+)", TEXT):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(((?:docs|zilc|tools)/[^)]+)\)", TEXT):
        assert (ROOT / link).is_file(), link


def test_every_command_and_option_group_is_named():
    for command in ("levelize", "emit-training", "verify", "train", "trace", "ops"):
        assert f"zilc {command}" in TEXT
