"""Memory against time with --memory-budget: ``python tools/recompute.py [--networks decoder] [--rounds 9] [--write]``.

Each network is compiled without a budget and with some, as shares of the activations that are alive at once without.
Every variant is run in a process of its own that holds nothing but the training graph's file: its resident memory is
read when the session is loaded, and its peak over the updates after.  Rounds of updates go from variant to variant, so
that a machine that slows down slows all of them.  After two updates from the same state on the same batch the loss and
every parameter of every variant are compared, bit by bit.  ``make recompute`` writes docs/RECOMPUTE.md and
docs/recompute.json.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from bench_task import peak_mib, reset_peak, timed_runs

from zilc.machine import processor

HERE = Path(__file__).resolve().parent
#: Sizes: activations of some hundred MiB, and an update in well under a second.
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"batch": 16, "image": 112, "width": 32},
    "transformer": {
        "batch": 16, "layers": 4, "length": 128, "d_model": 128, "d_ff": 512, "heads": 4, "vocabulary": 1000,
    },
    "decoder": {"batch": 16, "layers": 4, "length": 128, "d_model": 128, "heads": 4, "vocabulary": 1000},
}  # fmt: skip
#: Budgets, as shares of what is alive at once without; one that cannot be reached is left out.
SHARES = (0.75, 0.5, 0.35, 0.25)
#: Without a budget.
WITHOUT = "none"
#: A round of a variant takes about this long, or one update.
ROUND_MS = 500.0
#: Seconds of rounds, of all variants of a network together: fewer rounds on a slow machine, but three.
SECONDS, LEAST_ROUNDS = 40.0, 3
MIB = float(1 << 20)


# --- a variant's process ------------------------------------------------------------------------------------------


def resident_mib() -> float:
    """This process's resident memory now."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return peak_mib()
    return float(next(line.split()[1] for line in lines if line.startswith("VmRSS:"))) / 1024


def work(folder: Path, variant: str) -> None:
    """Load the training graph, run two updates and say what came of them; then do as stdin says."""
    import zilc

    with np.load(folder / "feeds.npz") as file:
        feeds = {name: file[name] for name in file.files}
    trainer = zilc.Trainer(folder / "step.onnx", lr=0.01, providers=["CPUExecutionProvider"])
    gc.collect()
    reset_peak()
    base = resident_mib()
    losses = [trainer.step(feeds) for _ in range(2)]
    bits = hashlib.sha256(np.asarray(losses).tobytes())
    peak = peak_mib()  # before the state is copied for its bits
    for name, array in sorted(trainer.state.items()):
        bits.update(name.encode() + array.tobytes())
    print(json.dumps({"losses": losses, "bits": bits.hexdigest()}), flush=True)
    reset_peak()
    for times in timed_runs(lambda: trainer.step(feeds), sys.stdin):
        print(json.dumps(times), flush=True)
    print(json.dumps({"base_mib": base, "growth_mib": max(peak, peak_mib()) - base}), flush=True)


class Variant:
    """A training graph and the process that runs it.

    Attributes:
        facts: what is written of it.
        rounds: the median update of each round, in milliseconds.
    """

    def __init__(self, name: str, folder: Path, facts: dict[str, Any]) -> None:
        self.name, self.facts, self.updates = name, facts, 1
        self.rounds: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "recompute.py"), "--worker", str(folder), name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.facts.update(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip():
            raise RuntimeError(f"the process of variant '{self.name}' ended ({self._process.wait()})")
        return json.loads(line)

    def _say(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    def run(self) -> float:
        """A round; the median update in milliseconds."""
        self._say(f"run {self.updates}")
        return float(np.median(self._answer()))

    def warm(self) -> None:
        """Caches filled, the length of a round settled."""
        self.updates = max(1, int(ROUND_MS / max(self.run(), 1e-3)))

    def end(self) -> None:
        """Note the memory and let the process go."""
        self._say("end")
        self.facts.update(self._answer())
        self._process.wait()
        low, mid, high = np.percentile(self.rounds, (0, 50, 100))
        self.facts.update({"ms": float(mid), "min_ms": float(low), "max_ms": float(high), "rounds": len(self.rounds)})


# --- the measurement ----------------------------------------------------------------------------------------------


def measure(network: str, rounds: int) -> dict[str, Any]:
    """All variants of a network, round by round.

    Raises:
        RuntimeError: a process ended, or the bits of two variants differ.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        variants = prepare(network, folder)
        for variant in variants:
            variant.warm()
        begun = time.perf_counter()
        for count in range(rounds):
            if count >= LEAST_ROUNDS and time.perf_counter() - begun > SECONDS:
                break
            turn = count % len(variants)
            for variant in variants[turn:] + variants[:turn]:
                variant.rounds.append(variant.run())
        for variant in variants:
            variant.end()
    differing = [v.name for v in variants if v.facts["bits"] != variants[0].facts["bits"]]
    if differing:
        raise RuntimeError(f"{network}: other bits with {', '.join(differing)}")
    return {"network": network, "sizes": NETWORKS[network], "variants": [v.facts for v in variants]}


def prepare(network: str, folder: Path) -> list[Variant]:
    """Compile a network's variants, and start their processes."""
    import zilc
    from zilc import models
    from zilc.files import save_step

    sizes = NETWORKS[network]
    model = models.build(network, **sizes)
    feeds = models.random_feeds(model, sizes["batch"], np.random.default_rng(0), loss="cross-entropy")
    peak = 0
    variants: list[Variant] = []
    for name, share in [(WITHOUT, 1.0), *((f"{share:.0%}", share) for share in SHARES)]:
        place = folder / name.replace(" ", "-")
        place.mkdir()
        begun = time.perf_counter()
        try:
            budget = int(share * peak) if share < 1 else None
            step = zilc.emit_training(model, loss="cross-entropy", memory_budget=budget)
        except zilc.ZilcError as error:
            print(f"{network}, {name}: {error}", file=sys.stderr)
            break
        seconds = time.perf_counter() - begun
        if not peak:
            whole = zilc.emit_training(model, loss="cross-entropy", memory_budget=1 << 60)
            peak = whole.signature["recompute"]["peak_without"]
        save_step(step, place / "step.onnx", place / "step.safetensors")
        np.savez(place / "feeds.npz", **feeds)  # type: ignore[arg-type]
        found = step.signature.get("recompute", {"peak": peak, "nodes": 0, "bytes": 0})
        facts = {
            "budget": name, "budget_bytes": budget, "simulated_mib": found["peak"] / MIB, "nodes": found["nodes"],
            "recomputed_mib": found["bytes"] / MIB, "graph_nodes": len(step.model.graph.node), "compile_s": seconds,
        }  # fmt: skip
        variants.append(Variant(name, place, facts))
    return variants


# --- the page -----------------------------------------------------------------------------------------------------

HEADER = [
    "network", "budget", "alive at once, simulated MiB", "measured growth MiB", "of that without", "ms an update",
    "min to max", "times that without", "nodes recomputed", "MiB recomputed", "nodes in all", "compile s",
]  # fmt: skip


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Lines of the table: one a variant."""
    first = result["variants"][0]
    return [
        [
            result["network"], v["budget"], f"{v['simulated_mib']:.0f}", f"{v['growth_mib']:.0f}",
            f"{v['growth_mib'] / first['growth_mib']:.0%}", f"{v['ms']:.0f}", f"{v['min_ms']:.0f} to {v['max_ms']:.0f}",
            f"{v['ms'] / first['ms']:.2f}", str(v["nodes"]), f"{v['recomputed_mib']:.0f}", str(v["graph_nodes"]),
            f"{v['compile_s']:.1f}",
        ]
        for v in result["variants"]
    ]  # fmt: skip


TEXT = """\
*budget* is a share of the activations that are alive at once without one. *Simulated* is what the compiler counts:
from the node that makes a tensor to its last reader, beside the graph's inputs and outputs. *Measured growth* is the
peak of the process's resident memory over its updates above that of the loaded session; it holds what the compiler
does not count too: the outputs (predictions, and everything that is fed back, once), what kernels need for themselves,
and what the allocator loses. Updates are bit-identical in all rows of a network; the tool stops if they are not.

## In other programs

Nothing has to be set so that the recomputed nodes stay: they are behind barriers that no optimizer of onnxruntime
removes, and the updates have the same bits with its default options. To get the memory down as well, run the nodes in
the order of the file, and take memory as it is needed and only as long (onnxruntime else keeps a tensor's memory for
the next one of the same shape, which may be a whole pass away):

```python
options = onnxruntime.SessionOptions()
options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
options.enable_mem_pattern = False
options.enable_mem_reuse = False
```

A barrier is a Reshape of an operand to its own shape plus a zero: the least of 0 and a number that is 0 or 1 and comes
from an element of the error before it (GatherND, Cast, Cast, Min, Add). A runtime can neither take the second run of an
operator for the first, nor start it before the wave has come. The same Reshape keeps apart two predictions that would
be fused only since the wave no longer reads what is between them. What this costs is in the times above.

Switching off onnxruntime's elimination of common subexpressions would not be enough. A node that reads predictions
alone is ready in the forward pass, and onnxruntime runs it there wherever a fused node, which it counts among the last,
is not ready yet: the wave's own nodes of this kind were seen to, a Tanh's derivative among them, and wait at barriers
now. And where a prediction had lost a reader, a sum was fused with the normalization behind it, which changed bits.
"""


def markdown(results: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Memory against time: recomputation within a budget",
        "",
        "Made by `python tools/recompute.py --write` (`make recompute`); every variant in a process of its own, rounds",
        "interleaved.",
        "",
        ", ".join(f"{k} {v}" for k, v in facts.items()) + ".",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(cells) + " |" for result in results for cells in rows(result)),
        "",
        "Sizes: " + "; ".join(f"{r['network']} {', '.join(f'{k} {v}' for k, v in r['sizes'].items())}" for r in results)
        + ". Cross-entropy, SGD, float32.",
        "",
        TEXT,
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="with commas between them")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="write docs/RECOMPUTE.md and docs/recompute.json")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Path(options.worker[0]), options.worker[1])
        return
    facts = {
        "date": date.today().isoformat(), "machine": f"{processor()}, {os.cpu_count()} cores",
        "load before": f"{os.getloadavg()[0]:.1f}", "Python": platform.python_version(),
        **{name: version(name) for name in ("zilc", "onnx", "numpy")}, "onnxruntime": _onnxruntime(),
    }  # fmt: skip
    results = []
    for network in options.networks.split(","):
        results.append(measure(network, options.rounds))
        for cells in rows(results[-1]):
            print(" | ".join(cells), flush=True)
    if options.write:
        docs = HERE.parent / "docs"
        (docs / "RECOMPUTE.md").write_text(markdown(results, facts))
        (docs / "recompute.json").write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")


def _onnxruntime() -> str:
    import onnxruntime

    return onnxruntime.__version__


if __name__ == "__main__":
    main()
