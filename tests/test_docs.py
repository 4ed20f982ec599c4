"""The pages of docs/: their tables are those of the measured rows, their figures are drawn, their example runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from tools import cuda_check, cuda_networks, figures, fit_lowerings, paper_tables

DOCS = Path(__file__).resolve().parent.parent / "docs"
ZIL = (DOCS / "ZIL.md").read_text("utf-8")
ROWS = json.loads((DOCS / "paper.json").read_text("utf-8"))
#: The dynamics overflow behind the wave, which is what some figures show.
pytestmark = pytest.mark.filterwarnings(
    "ignore:divide by zero:RuntimeWarning", "ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
)


def test_the_papers_tables_are_the_measured_rows() -> None:
    assert paper_tables.page(ROWS) == (DOCS / "PAPER.md").read_text("utf-8")


def test_zil_diverges_by_no_bit_in_any_row() -> None:
    """Point 3 of what the tables are to show; the wavefront and BP, float32 as well as float64."""
    assert set(ROWS["table1"]) == set(paper_tables.NETWORKS)
    for row in ROWS["table1"].values():
        assert row["rows"]["Z-IL"] == {"float32": 0.0, "float64": 0.0}
    assert ROWS["table1"]["alexnet"]["size"] == {"batch": 4}  # no size of the network is reduced


def test_the_conditions_are_the_measured_rows() -> None:
    assert figures.with_table(ZIL, ROWS) == ZIL
    assert "| none: Z-IL | all | 0 | 0 |" in ZIL


def test_the_identities_of_the_text_are_the_measured_ones() -> None:
    counts = ROWS["table1"]["rnn"]["identities"]
    assert f"that is {counts['edge']}, {counts['shared']} and {counts['min']}" in " ".join(ZIL.split())


def test_figures_are_those_that_are_drawn() -> None:
    shown = set(re.findall(r"!\[[^]]+\]\(figures/(\w+)\.svg\)", ZIL))
    assert shown == set(figures.FIGURES) == {path.stem for path in (DOCS / "figures").iterdir()}


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", ZIL):
        assert link.startswith("https://") or (DOCS / link).is_file(), link


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_the_same_each_time(name: str, tmp_path: Path) -> None:
    if name == "convergence":
        assert figures.il_divergence(300, True) < 1e-8
        assert figures.il_divergence(400, False) == pytest.approx(1.2, abs=0.05)  # as the page says
        return
    once, again = (figures.write(name, tmp_path / folder) for folder in ("a", "b"))
    assert once.read_bytes() == again.read_bytes()
    tree = ElementTree.parse(once)
    words = {text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")}
    kept = {text.text for text in ElementTree.parse(DOCS / "figures" / f"{name}.svg").iter(
        "{http://www.w3.org/2000/svg}text")}  # fmt: skip
    assert words == kept  # labels and ticks are those of the file that is kept
    if name == "levels":
        assert sum(text.text == "Id" for text in tree.iter("{http://www.w3.org/2000/svg}text")) == 6


def test_the_researchers_example(tmp_path: Path) -> None:
    """A PyTorch module -> ONNX -> levels -> traces -> figure."""
    made = subprocess.run(
        [sys.executable, "-W", "ignore", DOCS / "examples" / "researcher.py", tmp_path],
        capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "K = 9, 13 vertices" in made.stdout
    assert "identities, shared: 6" in made.stdout
    learns = dict(re.findall(r"^(\S+) +level +\d+, learns in step (\d+)$", made.stdout, re.M))
    assert (learns["inner.0.weight"], learns["gate.1.bias"], learns["readout.weight"]) == ("8", "4", "0")
    (far,) = re.findall(r"Z-IL from autograd, relative, largest: (\S+)", made.stdout)
    assert float(far) < 1e-12
    assert ElementTree.parse(tmp_path / "mine.svg").getroot().tag.endswith("svg")
    with np.load(tmp_path / "mine.zil.npz") as trace:
        before = np.arange(len(trace["error"]))[:, None] < trace["levels"]
        assert not trace["error"][before & (trace["levels"] > 0)].any()  # zero until the wave arrives
    with np.load(tmp_path / "mine.il.npz") as trace:
        assert len(trace["movement"]) == 18


def test_pages_of_what_was_run_on_a_gpu_are_what_was_measured() -> None:
    checked = json.loads(cuda_check.JSON.read_text("utf-8"))
    assert cuda_check.markdown(checked) == cuda_check.MARKDOWN.read_text("utf-8")
    networks = json.loads(cuda_networks.JSON.read_text("utf-8"))
    assert cuda_networks.markdown(networks) == cuda_networks.MARKDOWN.read_text("utf-8")
    for row in networks["rows"]:
        # Where bits differ, they do when Z-IL is run again, too.
        assert row["bp"] == row["again"]
        assert row["cpu off"] < 2 * row["resolution"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_costs_are_fitted_to_the_measurements_that_are_kept(device: str) -> None:
    costs, shown = fit_lowerings.refit(json.loads(fit_lowerings.DATA[device].read_text("utf-8")))
    known = json.loads(fit_lowerings.COSTS.read_text("utf-8"))
    for target, one in shown.items():
        assert costs[target] == known["costs"][target]
        assert known["facts"][target] == one["facts"]
    assert fit_lowerings.page(shown) == fit_lowerings.PAGES[device].read_text("utf-8")

