"""The figures of docs/ZIL.md, and its table of conditions: ``python tools/figures.py [-o docs]``.

Every figure is drawn from what zilc finds or runs: levels and identities of a model, traces of its dynamics, the
certificate's divergences, inference learning after T steps.  The table is made from docs/paper.json.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import zilc
from zilc import models
from zilc.analysis import structure
from zilc.executors import executor
from zilc.graph import Dataflow
from zilc.passes.identities import flow_of, insert_identities
from zilc.passes.levels import Levels, find_levels
from zilc.verification import overall

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
#: The same numbers give the same file.
STYLE = {"svg.hashsalt": "zilc", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10}
GREEN, RED, GREY = "#2e8b57", "#c0392b", "#5b6570"
#: The network of most figures, small: five layers with a skip around each, the paper's appendix.
SMALL = {"inputs": 12, "hidden": 8, "classes": 4}
#: What Table 3 and Table 1 call a condition that is left out, and what the page says of it.
CONDITIONS = (
    ("table1", "Z-IL", "none: Z-IL", "all"),
    ("table1", "Z-IL without levelling", "the graph is levelled", "level 1"),
    ("table3", "gamma = 0.5", "γ = 1", "level 1"),
    ("table3", "noise of 0.1 at the start", "x₀ = μ₀", "none"),
    ("table3", "all updates at the last step", "each leaf learns at its step", "level K"),
    ("table3", "IL", "all of them: inference learning", "none"),
    ("table3", "IL, fixed predictions", "all of them, predictions fixed", "all"),
)


def residual(**options: Any) -> Any:
    return models.build("residual", **SMALL, **options)


# --- levels -----------------------------------------------------------------------------------------


def levels_figure() -> plt.Figure:
    """The residual network as it is and levelled: skips as arcs, identity vertices in green."""
    found = structure(residual())
    graph = insert_identities(found.graph, found.flow, found.levels)
    flow = flow_of(graph, found.clamped)
    figure, axes = plt.subplots(2, 1, figsize=(8, 3.6), layout="constrained", sharex=True)
    draw(axes[0], found.flow, found.levels, "as it is: edges that skip levels, in red")
    draw(axes[1], flow, find_levels(flow), "levelled: identity vertices, in green, delay them")
    axes[1].set_xticks([-level for level in range(found.levels.depth + 1)])
    axes[1].set_xticklabels([str(level) for level in range(found.levels.depth + 1)])
    axes[1].set_xlabel("level (the output is clamped on level 0)")
    return figure


def draw(axis: Axes, flow: Dataflow, levels: Levels, title: str) -> None:
    """Vertices from the highest level to the output; identity vertices on a lane of their own."""
    place = {v: (-levels.vertices[v], 1.0 if node.op == "Identity" else 0.0) for v, node in enumerate(flow.vertices)}
    source = next(name for name in flow.leaves if name == "input")
    start = (-levels.leaves[source], 0.0)
    boxes = [box(axis, *place[v], node.op) for v, node in enumerate(flow.vertices)]
    origin = box(axis, *start, "input")
    for edge in flow.edges:
        if edge.source is None and edge.tensor != source:
            continue  # parameters would hide the picture
        skips = levels.gap(edge) > 0
        tail, at = (origin, start) if edge.source is None else (boxes[edge.source], place[edge.source])
        axis.annotate(
            "", place[edge.consumer], at, zorder=1,
            arrowprops={  # from box to box, whatever their widths
                "arrowstyle": "-|>", "color": RED if skips else GREY, "shrinkA": 0, "shrinkB": 0,
                "patchA": tail, "patchB": boxes[edge.consumer],
                "connectionstyle": "arc3,rad=-0.35" if skips else "arc3",
            },
        )  # fmt: skip
    axis.set(title=title, xlim=(-levels.depth - 0.6, 0.6), ylim=(-0.6, 1.6), yticks=[])
    axis.title.set_ha("left")
    axis.title.set_x(0.0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def box(axis: Axes, x: float, y: float, kind: str) -> FancyBboxPatch:
    """A vertex, or the input."""
    color = {"Identity": GREEN, "input": GREY}.get(kind, "white")
    text = axis.text(
        x, y, {"Identity": "Id"}.get(kind, kind), ha="center", va="center", zorder=2, fontsize=8,
        color="black" if color == "white" else "white",
        bbox={"boxstyle": "round,pad=0.3", "fc": color, "ec": "black" if color == "white" else color, "lw": 0.8},
    )  # fmt: skip
    patch = text.get_bbox_patch()
    assert patch is not None
    return patch


# --- dynamics ---------------------------------------------------------------------------------------


def wave_figure() -> plt.Figure:
    """Prediction errors by level and step: Z-IL's wave, and inference learning beside it."""
    model = residual(batch=8)
    zil = zilc.trace(model, loss="cross-entropy")
    il = zilc.trace(model, loss="cross-entropy", algorithm="il", steps=3 * zil.depth, gamma=0.1)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained", width_ratios=(1, 1.8))
    for axis, run, title in zip(axes, (zil, il), ("Z-IL, γ = 1", "inference learning, γ = 0.1"), strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            shown = np.ma.masked_invalid(np.log10(run.by_level("error").T))
        image = axis.imshow(shown, origin="lower", aspect="auto", vmin=-5, vmax=1, cmap="viridis")
        axis.set(title=title, xlabel="inference step t", ylabel="level")
    for level, t in set(zil.parameters.values()):
        axes[0].plot(t, level, "s", mfc="none", mec=RED, ms=7)
    axes[0].set(ylim=(-0.5, zil.depth + 0.5))
    axes[1].set(ylim=(-0.5, zil.depth + 0.5))
    figure.colorbar(image, ax=axes, extend="both", label="log₁₀ of the prediction error's norm")
    return figure


def conditions_figure() -> plt.Figure:
    """Each parameter's divergence from BP when one condition is left out, by its level."""
    data = zilc.certify(residual(), loss="cross-entropy", directions=1).data
    titles = {v["name"]: v["title"] for v in data["variants"]}
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    exact = 1e-17  # where a log axis shows zero
    shown = ("zil", "unlevelled", "gamma", "init-noise", "update-at-end", "il")
    # Open ones of different sizes, so that one shows inside another.
    for name, marker, width in zip(shown, "o^sD*v", (9, 8, 10, 7, 9, 5), strict=True):
        # Weight and bias of a layer are on one level: the worse of the two.
        worst: dict[int, float] = {}
        for row in data["parameters"]:
            far = row["variants"][name]["float64"]["bp"]["relative"]
            worst[row["level"]] = max(worst.get(row["level"], exact), far)
        at = sorted(worst)
        axis.plot(at, [worst[level] for level in at], marker + "-", label=titles[name], lw=0.8, ms=width, mfc="none")
    axis.set(yscale="log", xlabel="level of the parameter", ylabel="divergence from BP", ylim=(exact / 5, None))
    ticks = [exact, 1e-12, 1e-8, 1e-4, 1e0, 1e4, 1e8]
    axis.set_yticks(ticks, ["0", *(f"$10^{{{round(np.log10(t))}}}$" for t in ticks[1:])])
    axis.set_xticks(sorted({row["level"] for row in data["parameters"]}))
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def il_divergence(steps: int, fixed: bool) -> float:
    """Inference learning's divergence from BP on four tanh layers after T steps, gamma = 0.1, float64."""
    model = models.build("mlp4", dtype="float64", inputs=12, hidden=8, classes=4)
    feeds = models.random_feeds(model, 4, np.random.default_rng(0), loss="energy")

    def gradients(**options: Any) -> dict[str, np.ndarray]:
        step = zilc.emit_training(model, outputs="grad", **options)
        made = executor(step.model)({**feeds, **{n: np.asarray(step.state[n]) for n in step.state}})
        return {p["name"]: made[p["grad"]] for p in step.signature["parameters"]}

    found = gradients(algorithm="il", steps=steps, gamma=0.1, fixed_predictions=fixed)
    return overall(found, gradients(algorithm="bp"))


def convergence_figure() -> plt.Figure:
    """Inference learning against the number of steps: fixed predictions make it converge to BP, nothing else does."""
    steps = (1, 2, 5, 10, 20, 50, 100, 150, 200, 250, 300, 350, 400)
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for fixed, label in ((False, "predictions follow the value nodes"), (True, "fixed predictions")):
        axis.plot(steps, [il_divergence(t, fixed) for t in steps], "o-", ms=3, lw=1, label=label)
    axis.set(yscale="log", xlabel="inference steps T", ylabel="divergence from BP")
    axis.legend(frameon=False)
    return figure


#: File name -> what draws it.
FIGURES = {
    "levels": levels_figure,
    "wave": wave_figure,
    "conditions": conditions_figure,
    "convergence": convergence_figure,
}


def write(name: str, folder: Path) -> Path:
    """Draw one figure into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure = FIGURES[name]()
        path = folder / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)
    return path


# --- the table --------------------------------------------------------------------------------------


def table(data: dict[str, Any]) -> list[str]:
    """What each condition is worth on the paper's residual network at full size, from Tables 1 and 3."""
    lines = ["| left out | exact parameters | divergence from BP, float64 | float32 |", "|---|---|---|---|"]
    for number, row, condition, exact in CONDITIONS:
        found = data[number]["residual"]["rows"][row]
        cells = ["0" if found[d] == 0 else f"{found[d]:.2g}" for d in ("float64", "float32")]
        lines.append(f"| {condition} | {exact} | {cells[0]} | {cells[1]} |")
    return lines


def with_table(text: str, data: dict[str, Any]) -> str:
    """The page with its table made anew."""
    block = "\n".join(["<!-- conditions -->", *table(data), "<!-- /conditions -->"])
    return re.sub(r"<!-- conditions -->.*<!-- /conditions -->", lambda _: block, text, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "docs", help="the folder of ZIL.md and figures/")
    options = parser.parse_args()
    for name in FIGURES:
        print(write(name, options.out / "figures"))
    page = options.out / "ZIL.md"
    if page.exists():
        page.write_text(with_table(page.read_text("utf-8"), json.loads((ROOT / "docs" / "paper.json").read_text())))
        print(page)


if __name__ == "__main__":
    main()
