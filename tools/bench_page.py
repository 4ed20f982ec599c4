"""What tools/bench.py writes and shows: runs on one machine or several as tables, held against the targets.

A run is ``{"facts": …, "results": …}``; docs/benchmarks.json holds one of each machine, ``{"machines": [run, …]}``, the
latest first: which graph, and which peer, is fastest hangs on the processor.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_cuda  # type: ignore[import-not-found]
from bench_targets import TWIN_ROUNDS, judge
from bench_task import PRECISIONS
from pages import grid  # type: ignore[import-not-found]
from rich.console import Console
from rich.table import Table

Run = dict[str, Any]


# --- runs ---------------------------------------------------------------------------------------------------------


def document(results: list[dict[str, Any]], facts: dict[str, Any]) -> Run:
    """A run as it is written; targets are for the CPU."""
    data: dict[str, Any] = {"facts": facts, "results": results}
    if facts["device"] == "cpu":
        data["targets"] = [
            {"target": v.target.name, "limit": v.target.limit, "measured": v.measured, "met": v.met}
            for v in judge(judged(results))
        ]
    return data


def judged(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What targets are held against: each network with each optimizer in the first of its precisions and batches."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        first.setdefault((result["network"], result["optimizer"]), result)
    return list(first.values())


def joined(runs: Sequence[Run]) -> Run:
    """Several runs on one machine as one; what was measured again stands as it was measured last."""
    facts: dict[str, Any] = {}
    results: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        own = run["facts"]
        peaks = {**facts.get("peak_gflops", {}), **own.get("peak_gflops", {})}
        named = f"{facts.get('precision', '')}, {own['precision']}".split(", ")
        precisions = [name for name in PRECISIONS if name in named]
        days = [day for day in (facts.get("date"), own.get("date")) if day]
        facts = {**facts, **own, "precision": ", ".join(precisions), **({"peak_gflops": peaks} if peaks else {})}
        if days:
            facts["date"] = max(days)
        for result in run["results"]:
            results[tuple(result.get(name) for name in ("network", "batch", "precision", "optimizer"))] = result
    return document(list(results.values()), facts)


def by_machine(runs: Sequence[Run]) -> list[Run]:
    """Runs joined where they were on one machine, in the order in which the machines come."""
    apart: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        apart.setdefault(tuple(run["facts"].get(key) for key in ("device", "GPU", "machine")), []).append(run)
    return [joined(group) for group in apart.values()]


def together(runs: Sequence[Run]) -> dict[str, Any]:
    """Runs on several machines as one document; a single run is its own."""
    return runs[0] if len(runs) == 1 else {"machines": list(runs)}


def read(path: Path) -> list[Run]:
    """The runs of a document."""
    data = json.loads(path.read_text())
    runs: list[Run] = data.get("machines", [data])
    return runs


def write(runs: Sequence[Run], docs: Path) -> None:
    """Pages and their data; of the CPU, what is there stays if it was not measured again.

    Raises:
        ValueError: runs on several GPUs, of which the page shows one.
    """
    docs.mkdir(exist_ok=True)
    on_gpu = [run for run in runs if run["facts"]["device"] == "cuda"]
    if len(on_gpu) > 1:
        named = [f"{run['facts'].get('GPU')} in {run['facts'].get('machine')}" for run in on_gpu]
        raise ValueError(f"runs on different machines: {', '.join(named)}")
    for run in on_gpu:
        (docs / "BENCHMARKS_CUDA.md").write_text(bench_cuda.markdown(run["results"], run["facts"]))
        (docs / "benchmarks_cuda.json").write_text(json.dumps(run, indent=1) + "\n")
    made = [run for run in runs if run["facts"]["device"] == "cpu"]
    if not made:
        return
    place = docs / "benchmarks.json"
    made = by_machine([*(read(place) if place.exists() else []), *made])
    made.sort(key=lambda run: str(run["facts"]["date"]), reverse=True)
    (docs / "BENCHMARKS.md").write_text(markdown(made))
    place.write_text(json.dumps({"machines": made}, indent=1) + "\n")


# --- the page -----------------------------------------------------------------------------------------------------

HEADER = [
    "network", "batch", "peer", "ms a step", "min to max", "rounds", "zilc / peer", "95 % interval", "peak MiB",
    "since imports", "in steps",
]  # fmt: skip


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """Rows for people; a peer that failed has the reason in place of its figures."""
    rows = []
    several = len({result.get("precision") for result in results}) > 1
    for result in results:
        network = bench_cuda.label(result) + (f", {result['precision']}" if several else "")
        for name, entry in result["peers"].items():
            start = [network, str(result["batch"]), name]
            if "failed" in entry:
                rows.append([*start, entry["failed"], *[""] * (len(HEADER) - 4)])
                continue
            share = entry.get("zilc_ratio")
            rows.append(
                [
                    *start, f"{entry['ms']:.3g}", f"{entry['min']:.3g} to {entry['max']:.3g}", str(entry["rounds"]),
                    f"{share[0]:.3f}" if share else "", f"{share[1]:.3f} to {share[2]:.3f}" if share else "",
                    f"{entry['peak_mib']:.0f}", f"{entry['growth_mib']:.0f}", f"{entry['stepping_mib']:.0f}",
                ]
            )  # fmt: skip
    return rows


READING = f"""Made by `make bench BENCH=--write`, on one machine after the other.  Every figure is a median over rounds
that went from peer to peer in one run, the whole step with loss and update, from the same weights on the same batch;
first losses are checked.  Machines of this kind are noisy: read the ratios.  Memory is that of the peer's process: its
peak, how much of it came after the imports, and the peak in steps alone, once the step was built and run twice.  Peers
have a new order in each round; zilc and zilc-bp, whose graphs hold the same nodes, go on alone to {TWIN_ROUNDS} times
the rounds.  The sooner a process was built the slower it is on these machines, by some hundredths: so these two are
built twice, before all others and behind them, and count as the geometric mean of both.  On the MLP, the RNN and
AlexNet the two are one graph, node for node (tests/test_equivalence.py): what their ratio is off 1 is the machine's
doing."""
HELD = """zilc's figure over the peer's; a target counts as met only where all that it needs was measured.  Where the
time of a step goes, kernel by kernel, and what was tried to shorten it: [PROFILE.md](PROFILE.md)."""


def markdown(runs: Sequence[Run]) -> str:
    """docs/BENCHMARKS.md: the targets on each machine, then each machine."""
    lines = ["# Benchmarks", "", textwrap.fill(READING, 118), "", "## Targets", "", textwrap.fill(HELD, 118), ""]
    verdicts = [judge(judged(run["results"])) for run in runs]
    held = [
        [*each[0].row()[:2], *(": ".join(verdict.row()[2 : 3 if verdict.met is None else 4]) for verdict in each)]
        for each in zip(*verdicts, strict=True)
    ]
    lines += [*grid(["target", "limit", *(run["facts"]["machine"] for run in runs)], held), ""]
    for run in runs:
        lines += _machine(run)
    return "\n".join(lines)


def _machine(run: Run) -> list[str]:
    """A run: its figures, versions, and the operators of the two graphs that are compared."""
    results, facts = run["results"], run["facts"]
    notes = {}
    for result in results:
        for name, entry in result["peers"].items():
            if "note" in entry:
                notes[f"{result['network']}, {name}"] = entry["note"]
    lines = [
        f"## {facts['machine']}",
        "",
        ", ".join(f"{k} {v}" for k, v in facts.items()) + ".",
        "",
        *grid(HEADER, table(results)),
        "",
        *(f"{where}: {note}.\n" for where, note in notes.items()),
        "### Versions",
        "",
        *bench_cuda.versions(results),
        "",
        "### Operators that ONNX Runtime runs after its own optimisation",
        "",
    ]
    for result in results:
        both = [result["peers"].get(n, {}).get("operators") for n in ("zilc", "zilc-bp")]
        if all(both) and result["optimizer"] == "sgd" and result in judged(results):
            rows = [[n, str(both[0].get(n, 0)), str(both[1].get(n, 0))] for n in sorted(set(both[0]) | set(both[1]))]
            rows.append(["all", str(sum(both[0].values())), str(sum(both[1].values()))])
            lines += [f"**{result['network']}**", "", *grid(["operator", "Z-IL", "BP"], rows), ""]
    return lines


# --- the terminal -------------------------------------------------------------------------------------------------


def report(run: Run) -> None:
    """A run's figures, and its targets as far as they were measured."""
    results, out = run["results"], Console(width=max(Console().width, 150))
    out.print(f"{run['facts']['machine']}, {run['facts']['date']}", style="bold", markup=False)
    if run["facts"]["device"] == "cuda":
        _print(out, bench_cuda.HEADER, bench_cuda.table(results))
        return
    _print(out, HEADER, table(results))
    _print(out, ["target", "limit", "measured", ""], [v.row() for v in judge(judged(results)) if v.met is not None])


def _print(console: Console, header: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal; a failed peer's reason stands below it, where there is room."""
    shown = Table(*header, box=None)
    reasons = []
    for row in rows:
        first = header.index("ms a step") if "ms a step" in header else len(header)
        if first < len(header) and not any(row[first + 1 :]):
            reasons.append(f"{', '.join(row[:first])}: {row[first]}")
            row = [*row[:first], "failed", *row[first + 1 :]]
        shown.add_row(*row)
    console.print(shown)
    for reason in reasons:
        console.print(reason, markup=False)
    console.print()
