"""Fit what each lowering of a gradient costs: ``python tools/fit_lowerings.py [--device cuda] [--write]``.

Where a VJP can be emitted in several ways, zilc takes the one whose predicted time is the least: a sum of counts of
work, each times what an item costs.  This tool measures every candidate on layers of well-known networks, in
onnxruntime, on a CPU or a GPU, fits costs by non-negative least squares of relative errors (scipy), and says how much
the choice loses against the fastest candidate of every site: on the sites themselves, and on sites left out of the fit.
``--write`` puts the costs into zilc/lowerings.json and the measurements into docs/LOWERINGS.md, those of a GPU into
docs/LOWERINGS_CUDA.md, with the measurements beside it.  Those of other machines are kept, and costs are fitted to the
geometric mean of all, so that the choice suits no processor alone.  ``--refit`` fits again to what is kept, on any
machine; with ``--json FILE``, as ``--json`` left it on another, that is added to it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx.helper
import onnx_graphsurgeon as gs
import onnxruntime
from rich.console import Console
from rich.progress import track
from scipy.optimize import nnls

import zilc.vjp  # noqa: F401  (fills the table)
from zilc.emit import Emitter
from zilc.lowerings import Lowering, Lowerings, measure, predicted
from zilc.machine import gpu, processor
from zilc.providers import choose_providers
from zilc.vjp import table
from zilc.vjp.conv import value_lowerings
from zilc.vjp.linear import gemm_lowerings
from zilc.vjp.window import conv_window

ROOT = Path(__file__).resolve().parent.parent
#: Where the costs lie that zilc reads.
COSTS = ROOT / "zilc" / "lowerings.json"
PAGES = {"cpu": ROOT / "docs" / "LOWERINGS.md", "cuda": ROOT / "docs" / "LOWERINGS_CUDA.md"}
#: The measurements, to fit again from.
DATA = {"cpu": ROOT / "docs" / "lowerings_cpu.json", "cuda": ROOT / "docs" / "lowerings_cuda.json"}

#: (channels, filters, groups, kernel, stride, dilation, size): layers of AlexNet, VGG, ResNet18 and 50, ResNeXt,
#: MobileNetV2, EfficientNet, ConvNeXt, DeepLab, YOLOv5, DCGAN and the MNIST examples; in one dimension, of speech
#: models.
IMAGES = [
    (3, 64, 1, 11, 4, 1, 224), (64, 192, 1, 5, 1, 1, 27), (192, 384, 1, 3, 1, 1, 13), (384, 256, 1, 3, 1, 1, 13),
    (3, 64, 1, 3, 1, 1, 112), (64, 128, 1, 3, 1, 1, 56), (3, 64, 1, 7, 2, 1, 224), (64, 64, 1, 3, 1, 1, 56),
    (64, 128, 1, 3, 2, 1, 56), (128, 128, 1, 3, 1, 1, 28), (128, 256, 1, 3, 2, 1, 28), (256, 256, 1, 3, 1, 1, 14),
    (256, 512, 1, 3, 2, 1, 14), (512, 512, 1, 3, 1, 1, 7), (64, 128, 1, 1, 2, 1, 56), (256, 512, 1, 1, 2, 1, 14),
    (64, 256, 1, 1, 1, 1, 56), (256, 64, 1, 1, 1, 1, 56), (512, 128, 1, 1, 1, 1, 28), (1024, 256, 1, 1, 1, 1, 14),
    (128, 128, 32, 3, 1, 1, 56), (256, 256, 32, 3, 1, 1, 28), (512, 512, 32, 3, 1, 1, 14),
    (32, 32, 32, 3, 1, 1, 112), (96, 96, 96, 3, 2, 1, 112), (144, 144, 144, 3, 1, 1, 56), (192, 192, 192, 3, 1, 1, 28),
    (384, 384, 384, 3, 1, 1, 14), (960, 960, 960, 3, 1, 1, 7), (240, 240, 240, 5, 2, 1, 28),
    (144, 144, 144, 3, 2, 1, 56), (192, 192, 192, 3, 2, 1, 28), (576, 576, 576, 3, 2, 1, 14),
    (64, 64, 64, 3, 2, 1, 112),
    (672, 672, 672, 5, 2, 1, 14), (32, 32, 32, 5, 2, 1, 56),
    (512, 1024, 1, 1, 2, 1, 28), (128, 256, 1, 1, 2, 1, 28), (16, 32, 1, 1, 2, 1, 16), (16, 32, 1, 3, 2, 1, 32),
    (32, 64, 1, 3, 2, 1, 16), (64, 64, 1, 2, 2, 1, 56), (3, 96, 1, 4, 4, 1, 224),
    (3, 32, 1, 6, 2, 1, 128), (64, 128, 1, 5, 2, 1, 32), (3, 32, 1, 3, 2, 1, 224), (128, 128, 1, 3, 2, 1, 56),
    (256, 256, 1, 3, 2, 1, 28), (512, 512, 1, 3, 2, 1, 14), (64, 64, 1, 5, 2, 1, 64), (3, 64, 1, 11, 4, 1, 112),
    (96, 96, 96, 7, 1, 1, 56), (192, 192, 192, 7, 1, 1, 28), (384, 384, 384, 7, 1, 1, 14),
    (128, 128, 1, 3, 1, 2, 28), (256, 256, 1, 3, 1, 4, 14), (1, 32, 1, 3, 1, 1, 28), (32, 64, 1, 3, 1, 1, 26),
    (1, 6, 1, 5, 1, 1, 28), (6, 16, 1, 5, 1, 1, 14), (16, 16, 1, 3, 1, 1, 32), (32, 32, 1, 3, 1, 1, 16),
    (64, 64, 1, 3, 1, 1, 8), (3, 8, 1, 3, 1, 1, 16), (8, 16, 1, 3, 1, 1, 8), (4, 4, 1, 3, 1, 1, 6),
    (16, 32, 1, 3, 1, 1, 6),
]  # fmt: skip
SOUNDS = [
    (1, 64, 1, 10, 5, 1, 8000), (64, 64, 1, 3, 2, 1, 1599), (80, 128, 1, 3, 1, 1, 300), (128, 128, 1, 3, 2, 1, 300),
    (128, 128, 128, 15, 1, 1, 300), (64, 64, 1, 3, 1, 4, 512),
]  # fmt: skip
#: (channels, kernel, stride, pad, size)
POOLS = [
    (64, 3, 2, 1, 112), (64, 3, 2, 0, 55), (192, 3, 2, 0, 27), (256, 3, 2, 0, 13), (64, 2, 2, 0, 112),
    (128, 2, 2, 0, 56), (512, 2, 2, 0, 14), (32, 2, 2, 0, 28), (256, 3, 1, 1, 14), (16, 5, 1, 2, 20),
]  # fmt: skip
#: (rows, width, indices)
TABLES = [
    (16, 64, 256), (32, 128, 512), (64, 64, 256), (64, 256, 128), (128, 128, 512), (128, 512, 256), (256, 64, 512),
    (256, 256, 256), (512, 128, 256), (512, 768, 128), (1024, 64, 256), (2048, 256, 256), (10000, 512, 160),
]  # fmt: skip
#: (operand's width, result's width) of linear layers: AlexNet's, ResNets', of perceptrons and transformers.
PRODUCTS = [
    (9216, 4096), (4096, 4096), (4096, 1000), (512, 1000), (2048, 1000), (784, 128), (128, 128), (128, 10), (784, 512),
    (768, 3072), (1024, 1024), (256, 64),
]  # fmt: skip
#: Rows of these.
ROWS = (4, 20, 64)
BATCHES = {"cpu": (4, 20), "cuda": (20, 64)}
#: Milliseconds that keep a lowering from being taken.
NEVER = 1e9
#: Sites are measured in this many rounds.
STRIDE = 8


class Recorder(Lowerings):
    """Keeps what it is offered, and takes the first."""

    def __init__(self, target: str) -> None:
        super().__init__(target, whole=True)
        self.offered: list[tuple[Emitter, str, list[gs.Tensor], Mapping[str, Lowering]]] = []

    def choose(self, op: Emitter, kind: str, site: str, operands: Any, candidates: Any) -> tuple[str, str]:
        self.offered.append((op, kind, list(operands), candidates))
        return next(iter(candidates)), "only"


def node(op: str, dtype: str, shapes: list[tuple[int, ...]], out: tuple[int, ...], **attrs: Any) -> gs.Node:
    inputs = [gs.Variable(f"x{k}", np.dtype(dtype), list(shape)) for k, shape in enumerate(shapes)]
    return gs.Node(op, "node", attrs, inputs, [gs.Variable("y", np.dtype(dtype), list(out))])


def convolutions(batches: Sequence[int], dtype: str) -> Iterator[tuple[str, gs.Node, int]]:
    """Each layer twice, for its weight's gradient and for its image's (and for its value, with the first)."""
    for batch in batches:
        for rank, layers in ((2, IMAGES), (1, SOUNDS)):
            for c, m, group, k, s, d, size in layers:
                pad = d * (k - 1) // 2
                out = (size + 2 * pad - d * (k - 1) - 1) // s + 1
                shapes = [(batch, c, *[size] * rank), (m, c // group, *[k] * rank)]
                attrs: dict[str, Any] = {"strides": [s] * rank, "dilations": [d] * rank, "group": group}
                made = node("Conv", dtype, shapes, (batch, m, *[out] * rank), pads=[pad] * 2 * rank, **attrs)
                said = f"{batch}×{c}→{m}" + (f"/{group}" if group > 1 else "") + f", {k}" + (f"/{s}" if s > 1 else "")
                said += (f" dil. {d}" if d > 1 else "") + f", {'×'.join([str(size)] * rank)}"
                yield said, made, 1
                yield said, made, 0


def others(batches: Sequence[int], dtype: str) -> Iterator[tuple[str, gs.Node, int]]:
    for batch in batches:
        for c, k, s, pad, size in POOLS:
            out = (size + 2 * pad - k) // s + 1
            made = node("MaxPool", dtype, [(batch, c, size, size)], (batch, c, out, out),
                        kernel_shape=[k, k], strides=[s, s], pads=[pad] * 4)  # fmt: skip
            made.outputs.append(gs.Variable("indices", np.dtype(np.int64), [batch, c, out, out]))
            yield f"{batch}×{c}, {k}/{s}, {size}×{size}", made, 0
    for rows in ROWS:
        for into, out in PRODUCTS:
            made = node("Gemm", dtype, [(rows, into), (out, into)], (rows, out), transB=1)
            yield f"{rows}×{into}→{out}", made, 0
    for rows, width, count in TABLES:
        made = node("Gather", dtype, [(rows, width), (count,)], (count, width), axis=0)
        made.inputs[1].dtype = np.dtype(np.int64)
        yield f"{rows}×{width}, {count} read", made, 0


def offers(
    kinds: list[str], target: str = "cpu", dtype: str = "float32"
) -> Iterator[tuple[str, str, Emitter, list[gs.Tensor], Mapping[str, Lowering]]]:
    """Site, kind, and what there is to choose among."""
    batches = BATCHES[target]
    for said, made, operand in (*convolutions(batches, dtype), *others(batches, dtype)):
        graph = gs.Graph(nodes=[made], inputs=list(made.inputs), opset=18)
        graph.import_domains = [onnx.helper.make_opsetid("", 18)]
        recorder = Recorder(target)
        op = Emitter(graph, lowerings=recorder)
        g = gs.Variable("g", np.dtype(dtype), list(made.outputs[0].shape))
        table.vjp(op, made, operand, [g, *[None] * (len(made.outputs) - 1)])
        if made.op == "Conv" and operand == 1:
            x, w = made.inputs
            window = conv_window(op, x, w, **table.attributes(made, 18))
            recorder.offered.append((op, "Conv", [x, w], value_lowerings(op, x, w, window)))
        elif made.op == "Gemm":
            forms = gemm_lowerings(op, *made.inputs, **table.attributes(made, 18))
            recorder.offered.append((op, "Gemm", list(made.inputs), forms))
        for emitter, kind, operands, candidates in recorder.offered:
            if len(candidates) > 1 and (not kinds or kind.partition(",")[0] in kinds):
                yield said, kind, emitter, operands, candidates


def fit(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Costs of every lowering of one kind from its measurements."""
    costs = {}
    for name in dict.fromkeys(name for row in rows for name in row["ms"] if name not in row.get("erratic", ())):
        mine = [row for row in rows if row["ms"].get(name) is not None]
        works = sorted({work for row in mine for work in row["work"][name]})
        matrix = np.array([[1.0, *(row["work"][name].get(w, 0.0) for w in works)] for row in mine])
        times = np.array([row["ms"][name] for row in mine])
        scale = matrix.max(axis=0)
        scale[scale == 0] = 1.0
        solution, _ = nnls(matrix / scale / times[:, None], np.ones(len(mine)))
        found = dict(zip(["constant", *works], solution / scale, strict=True))
        costs[name] = {work: float(f"{cost:.4g}") for work, cost in found.items() if cost > 0}
    return costs


def lost(rows: list[dict[str, Any]], costs: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    """The chosen lowerings' time over the fastest ones': the geometric mean and the worst."""
    ratios = []
    for row in rows:
        ran = {name: ms for name, ms in row["ms"].items() if ms is not None}
        known = [name for name in ran if name not in row.get("erratic", ())]
        handicaps = row.get("handicaps", {})
        times = {n: predicted(costs.get(n, {}), row["work"][n]) * handicaps.get(n, 1.0) for n in known}
        chosen = min(known, key=times.__getitem__)
        row["chosen"] = chosen
        ratios.append(ran[chosen] / min(ran.values()))
    return float(np.exp(np.mean(np.log(ratios)))), max(ratios)


def left_out(rows: list[dict[str, Any]], parts: int = 6) -> tuple[float, float]:
    """The same on sites that the costs were not fitted to: a sixth at a time."""
    results = []
    for part in range(parts):
        held = [dict(row) for k, row in enumerate(rows) if k % parts == part]
        rest = [row for k, row in enumerate(rows) if k % parts != part]
        if held and rest:
            results.append((lost(held, fit(rest)), len(held)))
    if not results:
        return math.nan, math.nan
    mean = np.exp(sum(np.log(r[0]) * n for r, n in results) / sum(n for _, n in results))
    return float(mean), max(r[1] for r, _ in results)


def always(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What it would lose to take the same lowering everywhere, for each that runs everywhere."""
    names = [name for name in rows[0]["ms"] if all(row["ms"].get(name) is not None for row in rows)]
    logs = {name: [np.log(row["ms"][name] / min(x for x in row["ms"].values() if x)) for row in rows] for name in names}
    return {name: float(np.exp(np.mean(values))) for name, values in logs.items()}


def pooled(machines: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of all machines as one, by kind: geometric means of milliseconds.

    Args:
        machines: what :func:`measured` gives, of each.

    For a kind those machines count that measured all lowerings of the last one, on the sites that all of them measured.
    """
    joined: dict[str, list[dict[str, Any]]] = {}
    for kind in dict.fromkeys(kind for machine in machines for kind in machine["found"]):
        known = [machine["found"][kind] for machine in machines if kind in machine["found"]]
        names = [{name for row in rows for name in row["ms"]} for rows in known]
        counted = [
            {row["site"]: row for row in rows} for rows, own in zip(known, names, strict=True) if own >= names[-1]
        ]
        # A machine that measured other sites says nothing of these.
        counted = [rows for rows in counted if rows.keys() & counted[-1].keys()]
        joined[kind] = [
            {**row, "ms": {name: _mean([rows[site]["ms"].get(name) for rows in counted]) for name in row["ms"]}}
            for site, row in counted[-1].items()
            if all(site in rows for rows in counted)
        ]
    return joined


def _mean(times: Sequence[float | None]) -> float | None:
    """The geometric mean; None where it does not run somewhere."""
    known = [ms for ms in times if ms is not None]
    return float(np.exp(np.mean(np.log(known)))) if len(known) == len(times) else None


def refit(made: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Costs by target, and what :func:`page` shows.

    Args:
        made: by target, what :func:`measured` gives, of each machine.
    """
    costs, shown = {}, {}
    for target, machines in made.items():
        found = pooled(machines)
        costs[target], quality = judged(found)
        for machine in machines if len(machines) > 1 else ():
            for kind, rows in machine["found"].items():
                fitted = costs[target][kind]
                # Lowerings that the last machine did not measure are none any more.
                held = [
                    {**row, "ms": {n: ms for n, ms in row["ms"].items() if n in fitted or n in row.get("erratic", ())}}
                    for row in rows
                ]
                own = lost(held, fitted)
                quality[kind].setdefault("machines", []).append((machine["facts"]["machine"], own))
        shown[target] = {"facts": [machine["facts"] for machine in machines], "found": found, "quality": quality}
    return costs, shown


def page(made: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/LOWERINGS.md or its like for CUDA, of what :func:`refit` gives by target."""
    lines = [
        "# Lowerings" + (" on CUDA" if "cuda" in made else ""),
        "",
        "Made by `make lowerings`. Where a gradient can be emitted in several ways, the one of the least predicted",
        "time is taken: counts of work times costs that were fitted to these measurements (`zilc/lowerings.json`).",
        "`--tune` measures on your own machine instead. Milliseconds in onnxruntime, medians of interleaved runs, all",
        "candidates of a site in turns; the chosen one is in bold. *lost* is the time of the choice over that of the",
        "fastest, as a geometric mean over sites; *left out* is the same on sites that were not fitted, a sixth at a",
        "time. What follows no counts of work, in italics, is taken by `--tune` alone.",
        *([] if "cuda" in made else ["Winograd's form, which rounds less well, is taken where it saves a tenth."]),
        "",
    ]
    for target, one in made.items():
        if len(made) > 1:
            lines += [f"# Target {target}", ""]
        several = len(one["facts"]) > 1
        for facts in one["facts"]:
            said = f"{facts['machine']}; {facts['versions']}; {facts['date']}, load {facts['load']}."
            said += f" {facts['note']}" if "note" in facts else ""
            lines += [f"- {said}"] if several else [said]
        if several:
            lines += [
                "",
                "Milliseconds are geometric means of these machines, so that the choice suits no processor alone; of a",
                "kind, those count that measured all of its lowerings.",
            ]
        lines.append("")
        lines += _tables(one["found"], one["quality"])
    lines += [
        "Sites of a convolution: batch×channels→filters/groups, kernel/stride, size of the image. Of a pool: batch×",
        "channels, kernel/stride, size. Of Gather: rows×width of the table, rows that are read.",
        *([] if "cuda" in made else ["Of Gemm: rows×width of the operand→width of the result."]),
    ]
    return "\n".join(lines) + "\n"


def _tables(found: Mapping[str, list[dict[str, Any]]], quality: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for kind, rows in found.items():
        facts = quality[kind]
        names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
        lines += [f"## {kind}", ""]
        lines += [
            f"Lost: {facts['lost'][0]:.3f} (worst {facts['lost'][1]:.2f}); left out: {facts['left out'][0]:.3f} (worst "
            f"{facts['left out'][1]:.2f}). The same everywhere would lose: "
            + ", ".join(f"{name} {ratio:.2f}" for name, ratio in facts["always"].items())
            + "."
            + "".join(
                f" On {name.partition(' (')[0]} alone: {own[0]:.3f} (worst {own[1]:.2f})."
                for name, own in facts.get("machines", ())
            ),
            "",
            "| site | " + " | ".join(names) + " | lost |",
            "|---|" + "---|" * (len(names) + 1),
        ]
        for row in rows:
            best = min(ms for ms in row["ms"].values() if ms is not None)
            cells = []
            for name in names:
                ms = row["ms"].get(name)
                text = "" if name not in row["ms"] else "does not run" if ms is None else f"{ms:.3g}"
                mark = "**" if name == row["chosen"] else "*" if text and name in row.get("erratic", ()) else ""
                cells.append(f"{mark}{text}{mark}")
            ratio = row["ms"][row["chosen"]] / best
            lines.append(f"| {row['site']} | " + " | ".join(cells) + f" | {ratio:.2f} |")
        lines.append("")
    return lines


def judged(found: Mapping[str, list[dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Costs and how good they are, by kind; rows learn what is chosen.

    Where one lowering everywhere loses less than the fitted choice does on sites that it was not fitted to, the costs
    are made so that it is taken everywhere.
    """
    costs, quality = {}, {}
    for kind, rows in found.items():
        made, blind, same = fit(rows), left_out(rows), always(rows)
        steady = {name: ratio for name, ratio in same.items() if name in made}
        best = min(steady, key=lambda name: steady[name], default="")
        if best and not blind[0] <= steady[best]:
            made = {name: {**cost, "constant": NEVER} if name != best else cost for name, cost in made.items()}
        costs[kind] = made
        quality[kind] = {"left out": blind, "lost": lost(rows, made), "always": same}
    return costs, quality


def measured(options: argparse.Namespace, dtype: str, console: Console) -> dict[str, Any]:
    """Facts and times of all sites."""
    providers, _ = choose_providers(options.device)
    begun = os.getloadavg()[0]
    found: dict[str, list[dict[str, Any]]] = {}
    kinds = (options.kinds or "").split(",") if options.kinds else []
    sites = list(offers(kinds, options.device, dtype))
    end = time.monotonic() + options.limit
    # Every so-maniest site, over and over, so that a run that is cut short has seen all kinds.
    place = {site[:2]: k for k, site in enumerate(sites)}
    for said, kind, op, operands, candidates in track(
        [site for k in range(STRIDE) for site in sites[k::STRIDE]], "measuring", console=console
    ):
        if time.monotonic() > end:
            break
        times = measure(op, operands, candidates, providers, seconds=options.seconds)
        work = {name: dict(candidate.work) for name, candidate in candidates.items()}
        erratic = [name for name, candidate in candidates.items() if candidate.erratic]
        handicaps = {name: one.handicap for name, one in candidates.items() if one.handicap != 1.0}
        row = {"site": said, "ms": times, "work": work, "erratic": erratic, "handicaps": handicaps}
        found.setdefault(kind, []).append(row)
    for kind, rows in found.items():
        rows.sort(key=lambda row, kind=kind: place[row["site"], kind])  # type: ignore[misc]
    machine = f"{processor()} ({os.cpu_count()} cores)"
    facts = {
        "machine": machine if options.device == "cpu" else f"{gpu().get('GPU', '')}, {machine}",
        "versions": f"Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}, {dtype}",
        "date": datetime.now(UTC).date().isoformat(), "load": f"{begun:.1f} to {os.getloadavg()[0]:.1f}",
    }  # fmt: skip
    return {"facts": facts, "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or both with a comma; default: float32")
    parser.add_argument("--kinds", help="such as Conv.weight,MaxPool.x; by default all")
    parser.add_argument("--seconds", type=float, default=1.0, help="at most about this long for a site")
    parser.add_argument("--limit", type=float, default=math.inf, help="stop after about this many seconds a dtype")
    parser.add_argument("--json", type=Path, help="keep the measurements here; with --refit, add those that are here")
    parser.add_argument("--refit", action="store_true", help="measure nothing")
    parser.add_argument("--write", action="store_true", help=f"write {COSTS.name} and the page in docs")
    options = parser.parse_args()
    if options.write and options.kinds:
        parser.error("--write is for all kinds: the page and the costs are of one run")
    console = Console(stderr=True)
    made: dict[str, list[dict[str, Any]]] = {}
    if not options.refit:
        for dtype in options.dtype.split(","):
            name = options.device if dtype == "float32" else f"{options.device}, half"
            made[name] = [measured(options, dtype, console)]
            if options.json:
                options.json.write_text(json.dumps(made, indent=1) + "\n")
    elif options.json:
        made = json.loads(options.json.read_text())
    device = "cuda" if any(target.startswith("cuda") for target in made) else options.device
    if not options.kinds:
        kept = json.loads(DATA[device].read_text()) if DATA[device].exists() else {}
        made = {target: _replaced(kept.get(target, []), made.get(target, [])) for target in {**kept, **made}}
    known = json.loads(COSTS.read_text())
    costs, shown = refit(made)
    known["costs"] |= costs
    known["facts"] |= {target: one["facts"] for target, one in shown.items()}
    if options.write:
        COSTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        PAGES[device].write_text(page(shown))
        DATA[device].write_text(json.dumps(made, separators=(",", ":")) + "\n")
    else:
        print(page(shown))


def _replaced(kept: Sequence[dict[str, Any]], made: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``kept`` but for the machines in ``made``, and ``made``."""
    measured_now = {one["facts"]["machine"] for one in made}
    return [one for one in kept if one["facts"]["machine"] not in measured_now] + list(made)


if __name__ == "__main__":
    main()
