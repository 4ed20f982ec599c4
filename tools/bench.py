"""A training step beside its peers, in one run: ``python tools/bench.py [--networks mlp3,rnn] [--peers zilc,torch]``.

Each peer trains the same network with SGD on the same batch in a process of its own; rounds go from peer to peer, so
that a machine that slows down slows all of them.  Quoted are medians over rounds, and ratios of the medians with a
bootstrapped 95 % interval.  Writes docs/BENCHMARKS.md and docs/benchmarks.json when asked with ``--write``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
BATCH = {"transformer": 4}
NETWORKS = ("mlp3", "rnn", "transformer", "alexnet", "resnet18")
PEERS = ("zilc", "zilc-bp", "torch", "torch-compile")
#: A round of a peer takes about this long.
ROUND_MS = 400.0


class Peer:
    """A worker process."""

    def __init__(self, name: str, network: str, threads: int) -> None:
        self.name, self.medians = name, []  # type: ignore[var-annotated]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "bench_workers.py"), name, network, str(BATCH.get(network, 20)), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        self.facts = self._answer()
        self.steps = 1
        if "failed" not in self.facts:
            warm = self.ask("run 3")
            self.steps = max(1, min(400, int(ROUND_MS / float(np.median(warm)))))

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line.strip() else {"failed": "the process ended"}

    def ask(self, command: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def round(self) -> None:
        self.medians.append(float(np.median(self.ask(f"run {self.steps}"))))

    def end(self) -> float:
        peak = self.ask("end")["peak_mib"]
        self.process.wait()
        return float(peak)


def ratio(a: list[float], b: list[float], rng: np.random.Generator) -> tuple[float, float, float]:
    """Median of the round-by-round ratios a/b, with a bootstrapped 95 % interval."""
    pairs = np.asarray(a) / np.asarray(b)
    drawn = np.median(rng.choice(pairs, (2000, len(pairs))), axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(np.median(pairs)), float(low), float(high)


def measure(network: str, peers: list[str], rounds: int, threads: int, console: Console) -> dict[str, Any]:
    """One network: every peer, round by round."""
    running = []
    result: dict[str, Any] = {"network": network, "batch": BATCH.get(network, 20), "peers": {}}
    for name in peers:
        peer = Peer(name, network, threads)
        if "failed" in peer.facts:
            result["peers"][name] = {"failed": peer.facts["failed"]}
            console.print(f"{network}: {name} failed: {peer.facts['failed']}", style="yellow")
        else:
            running.append(peer)
    for peer in running:
        peer.round()
        peer.medians.clear()  # warm caches, not counted
    for count in range(rounds):
        for peer in running[count % len(running) :] + running[: count % len(running)]:
            peer.round()
    rng = np.random.default_rng(0)
    base = next((p for p in running if p.name == "zilc"), None)
    for peer in running:
        low, mid, high = np.percentile(peer.medians, (0, 50, 100))
        entry = {"ms": float(mid), "min": float(low), "max": float(high), "peak_mib": peer.end(), **peer.facts["ready"]}
        if base is not None and peer is not base:
            entry["zilc_ratio"] = ratio(base.medians, peer.medians, rng)
        result["peers"][peer.name] = entry
    return result


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """Rows for people."""
    rows = []
    for result in results:
        for name, entry in result["peers"].items():
            if "failed" in entry:
                rows.append([result["network"], str(result["batch"]), name, "-", "-", "-", "-", entry["failed"][:60]])
                continue
            share = entry.get("zilc_ratio")
            rows.append(
                [
                    result["network"], str(result["batch"]), name, f"{entry['ms']:.3g}",
                    f"{entry['min']:.3g} to {entry['max']:.3g}",
                    f"{share[0]:.3f}" if share else "", f"{share[1]:.3f} to {share[2]:.3f}" if share else "",
                    f"{entry['peak_mib']:.0f}",
                ]
            )  # fmt: skip
    return rows


HEADER = ["network", "batch", "peer", "ms a step", "min to max", "zilc / peer", "95 % interval", "peak MiB"]


def markdown(results: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `python tools/bench.py --write`; every figure is a median over rounds that went from peer to peer in",
        "one run, the whole step with loss and SGD update. Machines of this kind are noisy: read the ratios.",
        "",
        ", ".join(f"{k} {v}" for k, v in facts.items()) + ".",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(row) + " |" for row in table(results)),
        "",
        "## Operators that ONNX Runtime runs after its own optimisation",
        "",
    ]
    for result in results:
        both = [result["peers"].get(n, {}).get("operators") for n in ("zilc", "zilc-bp")]
        if all(both):
            lines += [f"**{result['network']}**", "", "| operator | Z-IL | BP |", "|---|---|---|"]
            for name in sorted(set(both[0]) | set(both[1])):
                lines.append(f"| {name} | {both[0].get(name, 0)} | {both[1].get(name, 0)} |")
            lines.append(f"| all | {sum(both[0].values())} | {sum(both[1].values())} |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--write", action="store_true", help="write docs/BENCHMARKS.md and docs/benchmarks.json")
    options = parser.parse_args()
    console = Console(stderr=True)
    results = []
    for network in options.networks.split(","):
        console.print(f"{network} …", style="dim")
        results.append(measure(network, options.peers.split(","), options.rounds, options.threads, console))
    facts: dict[str, Any] = {
        "date": date.today().isoformat(), "machine": f"{_cpu()}, {os.cpu_count()} cores", "threads": options.threads,
        "rounds": options.rounds, "Python": platform.python_version(),
        **{name: version(name) for name in ("zilc", "onnx", "torch", "numpy")}, "onnxruntime": _onnxruntime(),
    }  # fmt: skip
    shown = Table(*HEADER, box=None)
    for row in table(results):
        shown.add_row(*row)
    Console(width=160).print(shown)
    data = {"facts": facts, "results": results}
    if options.json:
        options.json.write_text(json.dumps(data, indent=1))
    if options.write:
        docs = HERE.parent / "docs"
        docs.mkdir(exist_ok=True)
        (docs / "BENCHMARKS.md").write_text(markdown(results, facts))
        (docs / "benchmarks.json").write_text(json.dumps(data, indent=1) + "\n")


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def _onnxruntime() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


if __name__ == "__main__":
    main()
