"""Where a training step's time goes on a CPU: ``python tools/profile_step.py [--networks mlp3] [--write]``.

ONNX Runtime's profiler times every kernel of the step as :class:`zilc.Trainer` runs it; the floating-point operations
of products and convolutions follow from the shapes that it reports.  The step itself is timed without the profiler, in
turns with PyTorch's, onnxruntime-training's and onnx-ad's (tools/bench.py).  A second table times what was tried
instead of what is emitted.  ``make profile`` writes docs/PROFILE.md and docs/profile.json, in which the figures of
other machines stay.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench
import numpy as np
import onnxruntime
from pages import grid  # type: ignore[import-not-found]
from profile_tried import (  # type: ignore[import-not-found]
    CPU,
    HEAD,
    example,
    paired,
    runner,
    session_options,
    tried,
)
from rich.console import Console
from rich.table import Table

import zilc
from zilc.machine import processor

DOCS = Path(__file__).resolve().parent.parent / "docs"
NETWORKS = ("mlp3", "rnn", "transformer", "alexnet", "resnet18", "decoder")
GROUPS = {
    "products": ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"),
    "moving": ("Slice", "Concat", "Pad", "Transpose", "Expand", "Split", "Reshape", "Squeeze", "Unsqueeze", "Gather",
               "Flatten", "Tile"),
    "masks and pools": ("MaxPool", "AveragePool", "Where", "Greater", "ScatterElements", "GatherElements", "ScatterND"),
}  # fmt: skip
REST = "other"
#: Whose steps products are held against, where targets speak of them.
PEERS = {"torch": "PyTorch", "ort-training": "onnxruntime-training", "onnx-ad": "onnx-ad"}
#: Rows and columns of the product whose rate stands for what the runtime reaches at best.
LARGE = 2048


# --- a step -------------------------------------------------------------------------------------------------------


def kernels(network: str, seconds: float) -> list[dict[str, Any]]:
    """Each kernel of a step: operator, median microseconds, floating-point operations of products."""
    step, feeds = example(network)
    constants = {t.name: list(t.dims) for t in step.model.graph.initializer}
    # The profiler does not tell of operands that onnxruntime has laid out anew before the first run.
    constant = {n.name: [constants[i] for i in n.input[1:2] if i in constants] for n in step.model.graph.node}
    with tempfile.TemporaryDirectory() as folder:

        def profiled(options: Any) -> None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")

        with session_options(profiled):
            trainer = zilc.Trainer(step, lr=1e-3, providers=CPU)
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < 4 or (time.perf_counter() < end and rounds < 1000):
            trainer.step(feeds)
            rounds += 1
        events = json.loads(Path(trainer._session.end_profiling()).read_text())
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["name"]].append(event)
    return [
        {
            "name": name.removesuffix("_kernel_time"),
            "operator": times[0]["args"]["op_name"],
            "us": statistics.median(e["dur"] for e in times[1:] or times),
            "operations": operations(times[-1]["args"], constant.get(name.removesuffix("_kernel_time"), [])),
        }
        for name, times in found.items()
    ]


def operations(kernel: dict[str, Any], constant: Sequence[list[int]] = ()) -> float:
    """Multiplications and additions of a product or convolution, by the shapes of operands and result.

    Args:
        kernel: what the profiler says.
        constant: shape of the second operand, where it is a constant that the profiler leaves out.
    """
    name = kernel["op_name"]
    if name not in GROUPS["products"]:
        return 0.0
    told = [next(iter(shape.values())) for shape in kernel["input_type_shape"][:2]]
    x, w = [told[0], *(constant or told[1:])][:2]
    y = next(iter(kernel["output_type_shape"][0].values()))
    if name in ("Conv", "FusedConv"):
        return 2.0 * math.prod(y) * math.prod(w[1:])
    if name == "ConvTranspose":
        return 2.0 * math.prod(x) * math.prod(w[1:])
    # [m, k] [k, n] -> [m, n], whichever is transposed
    inner = math.prod(x[-2:]) * math.prod(w[-2:]) / math.prod(y[-2:])
    return 2.0 * math.prod(y) * math.sqrt(inner)


# --- pieces -------------------------------------------------------------------------------------------------------


def large_product() -> float:
    """GFLOP/s of one large product in ONNX Runtime."""
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((LARGE, LARGE), dtype=np.float32) for name in "xw"}
    square = f"float[{LARGE},{LARGE}]"
    run = runner(f"{HEAD} ({square} x, {square} w) => ({square} y) {{ y = MatMul(x, w) }}", feeds)
    return 2.0 * LARGE**3 / paired({"": run}, 9)[""] / 1e6


# --- the page -----------------------------------------------------------------------------------------------------

HEADER = [
    "network", "zilc, ms", "PyTorch, ms", "nodes", *(f"{name}, ms" for name in (*GROUPS, REST)), "GFLOP",
    "GFLOP/s in products", "of a large product's", *(f"products / {peer}" for peer in PEERS.values()),
]  # fmt: skip


READING = f"""Made by `make profile`, on one machine after the other: a training step (SGD, cross-entropy, the
benchmark's batches) on a CPU, kernel by kernel, by ONNX Runtime's profiler. The profiler adds some microseconds to each
kernel, so that on small networks the parts are more than the whole, which is timed without it, in turns with others'
steps. *products* are convolutions and matrix products; *moving* is copies, pads, slices and transposes, most of it for
the gradients of convolutions' weights. *A large product* is one of {LARGE} x {LARGE} matrices. The last columns are
what zilc would take beside PyTorch eager, onnxruntime-training and onnx-ad if everything but the products cost nothing:
where that is near a target or above, no other graph meets it, only other kernels, or fewer multiplications. What is
empty was not measured there."""
TRIED = """What is emitted comes first. Relu's derivative as a product would turn an infinite error at a dead unit into
NaN: where errors can be infinite by rights, Where is emitted. Lowerings of convolutions, pools and tables are in
[LOWERINGS.md](LOWERINGS.md); softmax, LayerNormalization and BatchNormalization have one form each, for the others are
no faster by more than some hundredths of what is itself a small part of a step."""


def row(network: str, found: list[dict[str, Any]], entry: dict[str, Any], best: float) -> dict[str, Any]:
    """The figures of a network."""
    groups = dict.fromkeys((*GROUPS, REST), 0.0)
    for kernel in found:
        group = next((name for name, operators in GROUPS.items() if kernel["operator"] in operators), REST)
        groups[group] += kernel["us"] / 1e3
    work = sum(kernel["operations"] for kernel in found) / 1e9
    peers = entry["peers"]
    return {
        "network": network, "ms": peers["zilc"]["ms"], "nodes": len(found), "groups": groups, "gflop": work,
        "peers": {name: peers[name]["ms"] for name in PEERS if "ms" in peers.get(name, {})},
        "rate": work / groups["products"] * 1e3, "share": work / groups["products"] * 1e3 / best,
        "slowest": sorted(found, key=lambda kernel: -kernel["us"])[:10],
    }  # fmt: skip


def cells(entry: dict[str, Any]) -> list[str]:
    """A row for people."""
    products, peers = entry["groups"]["products"], entry["peers"]
    return [
        entry["network"], f"{entry['ms']:.3g}", f"{peers['torch']:.3g}" if "torch" in peers else "",
        str(entry["nodes"]), *(f"{x:.3g}" for x in entry["groups"].values()), f"{entry['gflop']:.3g}",
        f"{entry['rate']:.0f}", f"{entry['share']:.0%}",
        *(f"{products / peers[name]:.2f}" if name in peers else "" for name in PEERS),
    ]  # fmt: skip


def markdown(machines: Sequence[dict[str, Any]]) -> str:
    """docs/PROFILE.md."""
    lines = ["# Where a step's time goes", "", textwrap.fill(READING, 110), ""]
    for made in machines:
        facts = made["facts"]
        lines += [
            f"## {facts['machine']}", "",
            f"{facts['date']}, Python {facts['Python']}, onnxruntime {facts['onnxruntime']}, torch {facts['torch']}; a "
            f"large product reaches {made['best']:.0f} GFLOP/s.", "",
            *grid(HEADER, [cells(entry) for entry in made["rows"]]), "",
            "The slowest kernels:", "",
            *grid(
                ["network", "kernel", "ms", "of all"],
                [
                    [entry["network"], f"{k['operator']} `{k['name']}`", f"{k['us'] / 1e3:.3g}",
                     f"{k['us'] / 1e3 / sum(entry['groups'].values()):.1%}"]
                    for entry in made["rows"] for k in entry["slowest"][:5]
                ],
            ), "",
        ]  # fmt: skip
    tables = {made["facts"]["machine"]: made["tried"] for made in machines if made["tried"]}
    if tables:
        forms = dict.fromkeys((what, how) for tried in tables.values() for what in tried for how in tried[what])
        lines += [
            "## What was tried", "",
            textwrap.fill(TRIED, 110), "",
            *grid(
                ["what", "how", *(f"ms, {machine}" for machine in tables)],
                [
                    [what, how, *(_time(tried, what, how) for tried in tables.values())] for what, how in forms
                ],
            ), "",
        ]  # fmt: skip
    return "\n".join(lines)


def _time(tried: dict[str, dict[str, float]], what: str, how: str) -> str:
    ms = tried.get(what, {}).get(how)
    return "" if ms is None else f"{ms:.3g}"


def write(made: dict[str, Any], docs: Path) -> None:
    """The page and its data: what was measured in place of the machine's old figures, before those of others."""
    place = docs / "profile.json"
    present = json.loads(place.read_text())["machines"] if place.exists() else []
    machines = [made]
    for one in present:
        if one["facts"]["machine"] != made["facts"]["machine"]:
            machines.append(one)
            continue
        rows = {row["network"]: row for row in (*one["rows"], *made["rows"])}
        machines[0] = {**made, "rows": list(rows.values()), "tried": {**one["tried"], **made["tried"]}}
    (docs / "PROFILE.md").write_text(markdown(machines))
    place.write_text(json.dumps({"machines": machines}, indent=1) + "\n")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=8.0, help="of profiled steps, and of each side's rounds")
    parser.add_argument("--no-tried", action="store_true", help="leave out what was tried")
    parser.add_argument("--write", action="store_true", help="write docs/PROFILE.md and docs/profile.json")
    options = parser.parse_args()
    console = Console()
    side = bench.parse(["--seconds", str(options.seconds), "--rounds", str(options.rounds)])
    best, measured = large_product(), []
    for network in options.networks.split(","):
        console.print(f"{network} …", markup=False)
        entry = bench.measure(network, ["zilc", *PEERS], options.rounds, side, "sgd", console)
        measured.append((network, kernels(network, options.seconds), entry))
        best = max(best, large_product())  # the machine's speed varies
    rows = [row(*each, best) for each in measured]
    made: dict[str, Any] = {
        "facts": {
            "date": date.today().isoformat(), "machine": f"{processor()} ({os.cpu_count()} cores)",
            "Python": platform.python_version(), "onnxruntime": onnxruntime.__version__, "torch": version("torch"),
        },
        "best": best, "rows": rows, "tried": {} if options.no_tried else tried(),
    }  # fmt: skip
    table = Table(*HEADER)
    for entry in rows:
        table.add_row(*cells(entry))
    console.print(table)
    for what, forms in made["tried"].items():
        console.print(f"{what}: " + ", ".join(f"{how} {ms:.3g} ms" for how, ms in forms.items()), markup=False)
    if options.write:
        write(made, DOCS)


if __name__ == "__main__":
    main()
