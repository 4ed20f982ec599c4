"""Figures for papers, drawn by matplotlib: the levelled graph, and the energies of traces.

The same input gives the same bytes (with one version of matplotlib).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from zilc.errors import RuntimeMissing
from zilc.picture import IDENTITY, INPUT, OUTPUT, PARAMETER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from zilc.tracing import Trace

Kind = Literal["svg", "png"]

INK, QUIET, EDGE = "#1c2430", "#5b6673", "#aab3be"
#: Fill and rim by kind of node.
COLOURS = {
    "vertex": ("#eef2f7", "#6b7a8c"), "heavy": ("#d6e2f0", "#2f5f8f"), "parameter": ("#fff1d6", "#c77700"),
    "untrained": ("#ffffff", "#8a94a0"), "input": ("#e0f0fa", "#1f7fb8"), "output": (INK, INK),
}  # fmt: skip
GREEN, ORANGE, LOST = "#009e73", "#f0a020", "#e39a8b"
_HEAVY = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Einsum", "Gather", "Attention"})
#: Columns in a line of the graph; a deeper graph is broken into lines, as text is.
LINE = 32
#: Inches a column and a lane take.
WIDTH, HEIGHT = 0.62, 0.30


def require() -> None:
    """Raises RuntimeMissing where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeMissing(
            "matplotlib is not installed, and figures are drawn by it", where="--svg, --png",
            hint="Install it: pip install 'zilc[plot]'",
        ) from error  # fmt: skip


def _saved(figure: Figure, kind: Kind) -> bytes:
    import matplotlib

    made = io.BytesIO()
    # Identifiers in SVG come from a salt, the date and the software's name are left out.
    with matplotlib.rc_context({"svg.hashsalt": "zilc", "svg.fonttype": "none"}):
        if kind == "svg":
            figure.savefig(made, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(made, format="png", bbox_inches="tight", dpi=200, metadata={"Software": None})
    return made.getvalue()


# --- the graph ------------------------------------------------------------------------------------------------


def levels(picture: Mapping[str, Any], kind: Kind = "svg") -> bytes:
    """The levelled graph, level by level, the trained output on the right.

    Args:
        picture: what :func:`zilc.picture.draw` gives.

    Raises:
        RuntimeMissing: matplotlib is not installed.
    """
    require()
    from matplotlib.figure import Figure

    nodes = picture["nodes"]
    column = np.asarray(nodes["column"])
    lines = list(_lines(int(column.max(initial=0))))
    rows = []
    for high, low in lines:
        lanes = sorted({nodes["lane"][i] for i in np.flatnonzero((column >= low) & (column <= high))} | {0})
        rows.append({lane: k for k, lane in enumerate(lanes)})
    tall = [len(r) + 1.6 for r in rows]
    wide = max(high - low + 1 for high, low in lines) + 1.4
    figure = Figure(figsize=(wide * WIDTH, sum(tall) * HEIGHT + 0.45))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(-1.2, wide - 1.2)
    axes.set_ylim(sum(tall) + 0.2, -1.3)  # lanes count downwards
    axes.axis("off")
    counts = picture["counts"]
    axes.text(
        -0.9, -0.75,
        f"{counts['vertices']} vertices on {picture['levels']} levels, {counts['identities']} identity vertices "
        f"({picture['placement']}) for {counts['delayed']} delayed edges",
        fontsize=8, color=QUIET, va="center",
    )  # fmt: skip
    top = 0.0
    for (high, low), row, height in zip(lines, rows, tall, strict=True):
        _draw_line(axes, picture, high, low, row, top)
        top += height
    return _saved(figure, kind)


def _lines(last: int) -> Iterator[tuple[int, int]]:
    """Columns of each line, from the input's end: (highest, lowest)."""
    count = -(-(last + 1) // LINE)
    for k in range(count - 1, -1, -1):
        yield (last + 1) * (k + 1) // count - 1, (last + 1) * k // count


def _draw_line(axes: Any, picture: Mapping[str, Any], high: int, low: int, row: Mapping[int, int], top: float) -> None:
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.patches import FancyBboxPatch

    nodes = picture["nodes"]
    column, lane, kinds = nodes["column"], nodes["lane"], nodes["kind"]
    inside = [i for i in range(len(kinds)) if low <= column[i] <= high]
    at = {i: (float(high - column[i]), top + row[lane[i]] + 0.5) for i in inside}
    green: list[np.ndarray] = []
    grey: list[np.ndarray] = []
    brown: list[np.ndarray] = []
    pairs = np.asarray(picture["edges"], np.int64).reshape(-1, 2)
    delayed = set(picture["delayed"])
    for number, (a, b) in enumerate(pairs.tolist()):
        if a not in at and b not in at:
            continue
        # An edge that leaves the line ends at the margin, and goes on at the next one's.
        start = at[a] if a in at else (-0.75, at[b][1])
        end = at[b] if b in at else (high - low + 0.75, at[a][1])
        half = [0.4 * (i in at and kinds[i] != IDENTITY) for i in (a, b)]
        path = _curve(start, end, *half)
        late = kinds[a] == IDENTITY or kinds[b] == IDENTITY or number in delayed
        (green if late else brown if kinds[a] == PARAMETER else grey).append(path)
    axes.add_collection(LineCollection(grey, colors=EDGE, linewidths=0.7, zorder=1))
    axes.add_collection(LineCollection(brown, colors=COLOURS["parameter"][1], linewidths=0.5, alpha=0.6, zorder=1))
    axes.add_collection(LineCollection(green, colors=GREEN, linewidths=1.3, zorder=2))
    dots = [at[i] for i in inside if kinds[i] == IDENTITY]
    if dots:
        axes.scatter(*zip(*dots, strict=True), s=16, color=GREEN, edgecolors="white", linewidths=0.5, zorder=4)
    boxes: dict[str, list[Any]] = {}
    for i in inside:
        if kinds[i] == IDENTITY:
            continue
        x, y = at[i]
        style = _style(nodes, i)
        rounding = 0.28 if kinds[i] in (PARAMETER, INPUT) else 0.1
        box = FancyBboxPatch((x - 0.42, y - 0.32), 0.84, 0.64, boxstyle=f"round,pad=0,rounding_size={rounding}")
        boxes.setdefault(style, []).append(box)
        axes.text(
            x, y, _text(nodes, i), fontsize=4.6 if kinds[i] in (PARAMETER, INPUT) else 5.2, ha="center", va="center",
            color="white" if style == "output" else "#8a5200" if style == "parameter" else INK, zorder=5,
            parse_math=False, clip_on=False,
        )  # fmt: skip
    for style, patches in sorted(boxes.items()):
        fill, rim = COLOURS[style]
        axes.add_collection(PatchCollection(patches, facecolors=fill, edgecolors=rim, linewidths=0.6, zorder=3))
    every = max(1, (high - low + 1) // 32)
    bottom = top + len(row) + 0.35
    axes.text(-0.75, bottom, "level", fontsize=5, color=QUIET, ha="center", va="center")
    for level in range(low, high + 1, every):
        axes.text(high - level, bottom, str(level), fontsize=5, color=QUIET, ha="center", va="center")


def _curve(start: tuple[float, float], end: tuple[float, float], after: float, before: float) -> np.ndarray:
    """A line from the right side of one node to the left side of another, as points; half their widths are given."""
    (x0, y0), (x1, y1) = start, end
    if abs(x1 - x0) < 1e-6 or y0 == y1:
        return np.asarray([start, end])
    x0, x1 = x0 + after, x1 - before
    s = np.linspace(0.0, 1.0, 13)
    return np.stack([x0 + (x1 - x0) * s, y0 + (y1 - y0) * (3 * s**2 - 2 * s**3)], axis=1)


def _style(nodes: Mapping[str, Any], i: int) -> str:
    kind = nodes["kind"][i]
    if kind == PARAMETER:
        return "untrained" if nodes["t"][i] is None else "parameter"
    if kind == INPUT:
        return "input"
    if kind == OUTPUT:
        return "output"
    return "heavy" if nodes["op"][i] in _HEAVY else "vertex"


def _text(nodes: Mapping[str, Any], i: int) -> str:
    kind, name, t = nodes["kind"][i], nodes["name"][i], nodes["t"][i]
    if kind in (PARAMETER, INPUT):
        short = name if len(name) <= 12 else "…" + name[-11:]
        return short if t is None else f"{short}\nt = {t}"
    op = nodes["op"][i]
    return op if len(op) <= 11 else op[:10] + "…"


# --- traces ---------------------------------------------------------------------------------------------------

_NAMES = {"zil": "Z-IL", "il": "Inference learning"}


def waves(traces: Sequence[Trace], kind: Kind = "svg") -> bytes:
    """The energy of every level at every step, a panel a trace, on one logarithmic scale.

    White is exactly zero, pale what the wave has left behind and no parameter reads; dots or a line mark the steps at
    which parameters learn.

    Raises:
        RuntimeMissing: matplotlib is not installed.
    """
    require()
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    maps = [trace.by_level("energy")[: trace.steps + (trace.algorithm == "il")].T for trace in traces]
    low, high, extend = _span(traces, maps)
    norm = LogNorm(low, high, clip=True)
    colours = matplotlib.colormaps["viridis"]
    figure = Figure(figsize=(4.4 * len(maps) + 0.6, 3.3), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for panel, trace, energy in zip(panels, traces, maps, strict=True):
        with np.errstate(all="ignore"):
            picture = colours(norm(np.where(np.isfinite(energy) & (energy > 0), energy, high)))
        picture[~np.isfinite(energy)] = matplotlib.colors.to_rgba(LOST)
        passed = _passed(trace, energy)
        picture[passed] = 0.72 + 0.28 * picture[passed]
        picture[energy == 0] = 1.0
        rows, columns = energy.shape
        panel.imshow(
            picture, origin="lower", aspect="auto", interpolation="none", extent=(-0.5, columns - 0.5, -0.5, rows - 0.5)
        )
        panel.set_title(f"{_NAMES[trace.algorithm]}, γ = {trace.gamma:g}, {trace.steps} steps", fontsize=9)
        panel.set_xlabel("inference step t", fontsize=8)
        panel.set_ylabel("level", fontsize=8)
        panel.tick_params(labelsize=7)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        learning = sorted({t for _, t in trace.parameters.values() if t < columns})
        if trace.algorithm == "zil" and trace.update_at == "level":
            size = float(np.clip(900 / max(rows, columns) ** 1.5, 1.5, 26))
            panel.scatter(learning, learning, s=size, color=ORANGE, edgecolors="white", linewidths=0.4, zorder=3)
        else:
            for t in learning:
                panel.axvline(t, color=ORANGE, linewidth=2)
    scale = figure.colorbar(matplotlib.cm.ScalarMappable(norm, colours), ax=list(panels), pad=0.01, extend=extend)
    scale.set_label("energy of the level", fontsize=8)
    scale.ax.tick_params(labelsize=7)
    signs = [
        Patch(facecolor="white", edgecolor=QUIET, label="exactly 0"),
        Patch(facecolor=0.72 + 0.28 * np.asarray(colours(0.7)), label="paler: the wave has passed, nothing reads it"),
        Line2D([], [], marker="o", linestyle="none", color=ORANGE, label="parameters learn"),
    ]
    if not all(np.isfinite(m).all() for m in maps):
        signs.append(Patch(facecolor=LOST, label="overflowed"))
    figure.legend(handles=signs, loc="outside lower center", ncols=len(signs), fontsize=7, frameon=False)
    return _saved(figure, kind)


def _span(traces: Sequence[Trace], maps: Sequence[np.ndarray]) -> tuple[float, float, str]:
    """The energies that colours span, and at which ends there are others ("neither", "min", "max" or "both").

    What Z-IL's front has, and of the others what lies near it: inference learning that diverges would leave the front
    one colour.
    """
    live = [m[np.isfinite(m) & (m > 0) & ~_passed(t, m)] for t, m in zip(traces, maps, strict=True)]
    every = np.concatenate([*live, np.zeros(0)])
    first = np.concatenate([*(v for t, v in zip(traces, live, strict=True) if t.algorithm == "zil"), np.zeros(0)])
    first = first if first.size else every
    if not first.size:
        return 0.1, 1.0, "neither"
    near = every[(every >= first.min() * 1e-6) & (every <= first.max() * 10)]
    high = float(near.max())
    low = max(float(near.min()), high * 1e-10)
    below, above = bool(every.min() < low), bool(every.max() > high)
    return min(low, high / 10), high, {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]


def _passed(trace: Trace, energy: np.ndarray) -> np.ndarray:
    """Where the wave has passed: t > l, on a levelled graph."""
    if trace.algorithm != "zil" or trace.update_at != "level":
        return np.zeros(energy.shape, bool)
    level, t = np.indices(energy.shape)
    return (t > level) & (energy != 0)
