"""What tools/bench.py says of a run on a GPU: its table, its page, the device's facts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import grid  # type: ignore[import-not-found]

from zilc.machine import gpu

HEADER = [
    "network", "batch", "precision", "peer", "ms a step", "min to max", "rounds", "zilc / peer", "95 % interval",
    "GFLOP a step", "share of peak", "device MiB",
]  # fmt: skip

READING = """Made by `tools/bench.py --device cuda` on one GPU. Every figure is a median over rounds that went from
peer to peer in one run, the whole step with loss and update, from the same weights on the same batch, the loss read
back after each step; first losses are checked. Peers compute in equal precision: *float32* is all of float32, TF32
off in each; *float16* and *bfloat16* are mixed, products in the narrow type, weights and updates in float32, with a
loss scale for float16 alone (`torch.autocast` and `GradScaler`, zilc's `--precision`, casts and a fixed scale in
JAX). PyTorch searches for the fastest kernels of convolutions (`cudnn.benchmark`), as XLA does; zilc's trainer takes
what cuDNN's heuristics say. *torch-graphs* is torch.compile with CUDA graphs (`reduce-overhead`), *zilc-plain* is
zilc's trainer without them, *zilc-tuned* is zilc with lowerings measured there (`--tune`).
*GFLOP a step* are the multiplications and additions of convolutions and matrix products in the emitted BP graph, by
its shapes: nominal work, the same for each peer. *Share of peak* is that work over the step's time, beside the rate
of one product of 8192 x 8192 matrices in PyTorch in the same precision and run, which in float16 and bfloat16 is
that of float16 or bfloat16 products alone. *Device MiB* is the most that the peer's process held on the GPU as far
as its driver tells: the CUDA context (some hundred MiB) and what allocators keep for later are in it, kernel
searches too."""


def label(result: Mapping[str, Any]) -> str:
    """A network, and its optimizer where that is not SGD."""
    return str(result["network"]) + ("" if result["optimizer"] == "sgd" else f", {result['optimizer']}")


def add_shares(results: Iterable[dict[str, Any]], peaks: Mapping[str, float]) -> None:
    """Each peer's operations a second beside the device's best, in its entry."""
    for result in results:
        peak = peaks.get(result["precision"])
        for entry in result["peers"].values():
            if peak and "ms" in entry and "gflop" in result:
                entry["peak_share"] = result["gflop"] / (entry["ms"] / 1e3) / peak


def table(results: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Rows for people; a peer that failed has the reason in place of its figures."""
    rows = []
    for result in results:
        for name, entry in result["peers"].items():
            start = [label(result), str(result["batch"]), result["precision"], name]
            if "failed" in entry:
                rows.append([*start, entry["failed"], *[""] * (len(HEADER) - 5)])
                continue
            share, part, mib = entry.get("zilc_ratio"), entry.get("peak_share"), entry.get("device_mib")
            rows.append(
                [
                    *start, f"{entry['ms']:.3g}", f"{entry['min']:.3g} to {entry['max']:.3g}", str(entry["rounds"]),
                    f"{share[0]:.3f}" if share else "", f"{share[1]:.3f} to {share[2]:.3f}" if share else "",
                    f"{result['gflop']:.3g}" if "gflop" in result else "", "" if part is None else f"{part:.2%}",
                    "" if mib is None else f"{mib:.0f}",
                ]
            )  # fmt: skip
    return rows


def summary(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """zilc's time over each peer's by precision: the geometric mean over networks and batches, and its ends."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for result in results:
        for name, entry in result["peers"].items():
            if result["optimizer"] == "sgd" and "zilc_ratio" in entry:
                where = f"{result['network']} ({result['batch']})"
                found.setdefault((result["precision"], name), {})[where] = entry["zilc_ratio"][0]
    rows = []
    for (precision, name), ratios in found.items():
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        least, most = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        ends = [f"{ratios[where]:.3f}, {where}" for where in (least, most)]
        rows.append([precision, name, str(len(ratios)), f"{mean:.3f}", *ends])
    return rows


def memory(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """zilc's memory on the device over PyTorch's."""
    rows = []
    for result in results:
        own, peer = (result["peers"].get(name, {}).get("device_mib") for name in ("zilc", "torch"))
        if own and peer:
            rows.append([label(result), str(result["batch"]), result["precision"], f"{own / peer:.2f}"])
    return rows


def versions(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of what did the work, by peer."""
    found: dict[str, dict[str, str]] = {}
    for result in results:
        for name, entry in result["peers"].items():
            found.setdefault(name, {}).update(entry.get("versions", {}))
    said = {name: ", ".join(f"{k} {v}" for k, v in sorted(of.items())) for name, of in found.items() if of}
    made: list[str] = grid(["peer", "versions"], [[name, text] for name, text in said.items()])
    return made


def markdown(results: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """docs/BENCHMARKS_CUDA.md."""
    notes: dict[str, dict[str, None]] = {}
    for result in results:
        for name, entry in result["peers"].items():
            if "note" in entry:
                notes.setdefault(f"{result['network']}: {entry['note']}", {})[name] = None
    held = memory(results)
    peaks = [f"{rate / 1e3:.1f} TFLOP/s in {name}" for name, rate in facts.get("peak_gflops", {}).items()]
    lines = [
        "# Benchmarks on a GPU",
        "",
        textwrap.fill(READING, 118),
        "",
        ", ".join(f"{k} {v}" for k, v in facts.items() if k != "peak_gflops") + ".",
        "",
        *([f"The large product: {', '.join(peaks)}.", ""] if peaks else []),
        *grid(HEADER, table(results)),
        "",
        *(f"{note} ({', '.join(peers)}).\n" for note, peers in notes.items()),
        "## zilc beside each peer",
        "",
        "zilc's time over the peer's with SGD, so that less than 1 is faster: geometric mean, least and most.",
        "",
        *grid(["precision", "peer", "measured", "mean", "least", "most"], summary(results)),
        "",
        *(["## Memory", "", "What zilc's process holds on the device over what PyTorch's does, eager.", "",
           *grid(["network", "batch", "precision", "zilc / torch"], held), ""] if held else []),
        "## Versions",
        "",
        *versions(results),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def device_facts(precisions: Iterable[str], device: str = "cuda") -> dict[str, Any]:
    """The GPU's name, driver and versions, and its best rate by precision; what cannot be had is left out."""
    facts: dict[str, Any] = {**gpu()}
    script = Path(__file__).resolve().parent / "bench_peak.py"
    try:
        words = [sys.executable, str(script), device, *precisions]
        facts |= json.loads(subprocess.run(words, capture_output=True, text=True, timeout=300, check=True).stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        pass
    return facts
