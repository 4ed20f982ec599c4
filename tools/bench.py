"""A training step beside its peers, in one run: ``python tools/bench.py [--networks mlp3,rnn] [--peers zilc,torch]``.

Peers: zilc (Z-IL, backpropagation, Z-IL's literal dynamics), PyTorch (eager, compiled), onnxruntime-training, onnx-ad's
graph in ONNX Runtime, and JAX.  Each trains the same network from the same weights on the same batch, loss and update
included, in a process of its own, on the same processors; its first losses are checked, so that no peer does less
work.  Rounds go from peer to peer, so that a machine that slows down slows all of them.  Quoted are medians over
rounds, and ratios of the same rounds with a bootstrapped 95 % interval.

``make bench`` sets up the environments of the peers that need their own, and runs this.  ``--write`` writes
docs/BENCHMARKS.md and docs/benchmarks.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from bench_targets import ALL, judge
from bench_task import TARGET, Task
from rich.console import Console
from rich.table import Table

from zilc.machine import processor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BATCH = {"transformer": 4, "decoder": 4}
PEERS = ("zilc", "zilc-bp", "zilc-literal", "torch", "torch-compile", "ort-training", "onnx-ad", "jax")
#: Environments of their own, by peer; the rest run in this one.
ENVIRONMENTS = {"ort-training": ".venv-ort-training", "onnx-ad": ".venv-peers", "jax": ".venv-peers"}
#: Literal dynamics run K forward and backward passes a step: minutes on the convolutional networks.
LITERAL = ("mlp3", "rnn", "decoder")
#: A round of a peer takes about this long, or one step.
ROUND_MS = 400.0
#: Each peer has this many rounds, however slow.
LEAST_ROUNDS = 3
#: Relative differences allowed in the first loss, and in the loss after one update besides MOVED of its change.
TOLERANCES = {"float32": (1e-4, 1e-5), "float64": (1e-9, 1e-9)}
#: A peer that updates nothing is off by the whole change.
MOVED = 0.02
#: PyTorch's RNN has two biases, which are trained both: more parameters, and another update.
TWO_BIASES = {("torch", "rnn"): 128, ("torch-compile", "rnn"): 128}


class Peer:
    """A worker process.

    Attributes:
        facts: what the worker said of its step, or ``{"failed": reason}``.
        rounds: the median step in milliseconds, by the round's number.
        spent: seconds in counted rounds.
    """

    def __init__(self, name: str, task: Task, patience: float) -> None:
        self.name, self.patience = name, patience
        self.rounds: dict[int, float] = {}
        self.spent, self.steps = 0.0, 1
        self._process: subprocess.Popen[str] | None = None
        python = interpreter(name)
        if not python.exists():
            self.facts: dict[str, Any] = {"failed": "not set up (make bench does it)"}
            return
        self._process = subprocess.Popen(
            [str(python), str(HERE / "bench_workers.py"), name, str(task.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(task.threads)},
        )  # fmt: skip
        answer = self._answer()
        self.facts = answer.get("ready", answer)
        if "failed" in self.facts:
            self._process.wait()

    def _answer(self) -> Any:
        """The worker's next line; one that says nothing for too long is ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()  # type: ignore[union-attr]

        timer = threading.Timer(self.patience, end)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if line.strip():
            return json.loads(line)
        if late.is_set():
            return {"failed": f"no answer within {self.patience:g} s"}
        return {"failed": f"the process ended ({self._process.wait()})"}

    def ask(self, command: str) -> Any:
        """Send a command, read its answer.

        Raises:
            OSError: the process has ended.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def run(self, steps: int) -> float | None:
        """The median of some steps in milliseconds; None where the process failed, and ``facts`` say how."""
        try:
            times = self.ask(f"run {steps}")
        except OSError:
            times = {"failed": "the process ended"}
        if isinstance(times, dict):
            self.facts = times
            return None
        return float(np.median(times))

    def warm(self) -> None:
        """Caches filled, the length of a round settled."""
        for _ in range(2):
            middle = self.run(self.steps)
            if middle is None or middle > ROUND_MS:
                return
            self.steps = max(1, min(400, int(ROUND_MS / max(middle, 1e-3))))

    def round(self, number: int) -> None:
        """A counted round."""
        start = time.perf_counter()
        middle = self.run(self.steps)
        self.spent += time.perf_counter() - start
        if middle is not None:
            self.rounds[number] = middle

    def end(self) -> dict[str, float]:
        """Its memory."""
        made = self.ask("end")
        self.close()
        return made

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def interpreter(peer: str) -> Path:
    """The Python that runs a peer."""
    if peer in ENVIRONMENTS:
        return ROOT / ENVIRONMENTS[peer] / "bin" / "python"
    return Path(sys.executable)


def ratio(a: dict[int, float], b: dict[int, float], rng: np.random.Generator) -> tuple[float, float, float]:
    """Median of a/b over the rounds that both had, with a bootstrapped 95 % interval."""
    pairs = np.asarray([a[number] / b[number] for number in sorted(a.keys() & b.keys())])
    drawn = np.median(rng.choice(pairs, (2000, len(pairs))), axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(np.median(pairs)), float(low), float(high)


def prepare(folder: Path, network: str, options: argparse.Namespace, optimizer: str) -> tuple[Task, float, int]:
    """Write a network's files; returns the task, the loss that each peer must find first, and how many are trained.

    The loss is computed here in float64 from the forward pass in ONNX Runtime, not by any peer.
    """
    import onnx
    import onnxruntime

    import zilc
    from zilc import models

    batch = options.batch or BATCH.get(network, 20)
    model = models.build(network, batch=batch, dtype=options.precision)
    feeds = models.random_feeds(model, batch, np.random.default_rng(0), loss="cross-entropy")
    names = [entry["name"] for entry in zilc.emit_training(model, loss="cross-entropy").signature["parameters"]]
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    weights = {n: a for n, a in arrays.items() if a.dtype.kind == "f" and a.ndim}
    task = Task(
        folder=folder, network=network, batch=batch, parameters=tuple(names),
        inputs=tuple(i.name for i in model.graph.input), output=model.graph.output[0].name,
        lr=1e-2 if optimizer == "sgd" else 1e-4, optimizer=optimizer, precision=options.precision,
        device=options.device, threads=options.threads,
    )  # fmt: skip
    onnx.save(model, str(task.model))
    task.write(weights, feeds)
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(task.model), quiet, providers=["CPUExecutionProvider"])
    (logits,) = session.run([task.output], {name: feeds[name] for name in task.inputs})
    return task, cross_entropy(logits, feeds[TARGET]), sum(weights[n].size for n in names)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the labels, in float64.

    Args:
        logits: floating, shape [..., classes].
        labels: int64, shape [...].
    """
    flat = logits.reshape(-1, logits.shape[-1]).astype(np.float64)
    top = flat.max(axis=1)
    total = top + np.log(np.exp(flat - top[:, None]).sum(axis=1))
    return float(np.mean(total - flat[np.arange(len(flat)), labels.reshape(-1)]))


def fault(
    peer: str, network: str, facts: dict[str, Any], *, loss: float, after: float | None, parameters: int, precision: str
) -> str | None:
    """What shows that a peer does other work than is asked of it.

    Args:
        facts: the worker's: its first two losses, and how many numbers it trains.
        loss: expected at first.
        after: expected after one update; None where that is not known.
    """
    more = TWO_BIASES.get((peer, network), 0)
    if facts["parameters"] != parameters + more:
        return f"trains {facts['parameters']} numbers, expected {parameters + more}"
    first, second = TOLERANCES[precision]
    if not math.isclose(facts["losses"][0], loss, rel_tol=first):
        return f"its first loss is {facts['losses'][0]:.6g}, expected {loss:.6g}"
    room = second * abs(loss) + MOVED * abs(loss - after) if after is not None else 0.0
    if after is not None and not more and not abs(facts["losses"][1] - after) <= room:
        return f"its loss after one update is {facts['losses'][1]:.6g}, expected {after:.6g}"
    return None


def measure(
    network: str, peers: list[str], rounds: int, options: argparse.Namespace, optimizer: str, console: Console
) -> dict[str, Any]:
    """One network with one optimizer: every peer, round by round."""
    running: list[Peer] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        task, loss, parameters = prepare(Path(folder), network, options, optimizer)
        after: float | None = None
        for name in peers:
            peer = Peer(name, task, options.patience)
            reason = peer.facts.get("failed")
            if reason is None:
                reason = fault(
                    name, network, peer.facts, loss=loss, after=after, parameters=parameters,
                    precision=options.precision,
                )  # fmt: skip
            if reason is not None:
                failed[name] = reason
                console.print(f"{network}: {name} failed: {reason}", style="yellow", markup=False)
                peer.close()
                continue
            if name == "zilc":
                after = peer.facts["losses"][1]
            running.append(peer)
    for peer in running:
        peer.warm()
    for count in range(rounds):
        turn = count % max(1, len(running))
        for peer in running[turn:] + running[:turn]:
            slow = peer.spent > options.seconds and len(peer.rounds) >= LEAST_ROUNDS
            if "failed" not in peer.facts and not slow:
                peer.round(count)
    rng = np.random.default_rng(0)
    base = next((p for p in running if p.name == "zilc" and "failed" not in p.facts), None)
    entries: dict[str, Any] = {}
    for name in peers:
        if name in failed:
            entries[name] = {"failed": failed[name]}
            continue
        peer = next(p for p in running if p.name == name)
        if "failed" in peer.facts:
            entries[name] = {"failed": peer.facts["failed"]}
            peer.close()
            continue
        low, mid, high = np.percentile(list(peer.rounds.values()), (0, 50, 100))
        memory = peer.end()
        entry = {
            "ms": float(mid), "min": float(low), "max": float(high), "rounds": len(peer.rounds), **memory,
            "growth_mib": memory["peak_mib"] - peer.facts["imported_mib"], **peer.facts,
        }  # fmt: skip
        if base is not None and peer is not base:
            entry["zilc_ratio"] = ratio(base.rounds, peer.rounds, rng)
        entries[name] = entry
    return {
        "network": network, "batch": task.batch, "optimizer": optimizer, "parameters": parameters,
        "loss": loss, "peers": entries,
    }  # fmt: skip


HEADER = [
    "network", "batch", "peer", "ms a step", "min to max", "rounds", "zilc / peer", "95 % interval", "peak MiB",
    "since imports", "in steps",
]  # fmt: skip


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """Rows for people; a peer that failed has the reason in place of its figures."""
    rows = []
    for result in results:
        network = result["network"] + ("" if result["optimizer"] == "sgd" else f", {result['optimizer']}")
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


def _grid(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]


def markdown(results: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The page."""
    versions: dict[str, dict[str, str]] = {}
    notes = {}
    for result in results:
        for name, entry in result["peers"].items():
            versions.setdefault(name, {}).update(entry.get("versions", {}))
            if "note" in entry:
                notes[f"{result['network']}, {name}"] = entry["note"]
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench BENCH=--write`.  Every figure is a median over rounds that went from peer to peer in one",
        "run, the whole step with loss and update, from the same weights on the same batch; first losses are checked.",
        "Machines of this kind are noisy: read the ratios.  Memory is that of the peer's process: its peak, how much",
        "of it came after the imports, and the peak in steps alone, once the step was built and run twice.",
        "",
        ", ".join(f"{k} {v}" for k, v in facts.items()) + ".",
        "",
        *_grid(HEADER, table(results)),
        "",
        *(f"{where}: {note}.\n" for where, note in notes.items()),
        "## Targets",
        "",
        "zilc's figure over the peer's; a target counts as met only where all that it needs was measured.  Where the",
        "time of a step goes, kernel by kernel, and what was tried to shorten it: [PROFILE.md](PROFILE.md).",
        "",
        *_grid(["target", "limit", "measured", ""], [verdict.row() for verdict in judge(results)]),
        "",
        "## Versions",
        "",
        *_grid(
            ["peer", "versions"],
            [[n, ", ".join(f"{k} {v}" for k, v in sorted(found.items()))] for n, found in versions.items() if found],
        ),
        "",
        "## Operators that ONNX Runtime runs after its own optimisation",
        "",
    ]
    for result in results:
        both = [result["peers"].get(n, {}).get("operators") for n in ("zilc", "zilc-bp")]
        if all(both) and result["optimizer"] == "sgd":
            rows = [[n, str(both[0].get(n, 0)), str(both[1].get(n, 0))] for n in sorted(set(both[0]) | set(both[1]))]
            rows.append(["all", str(sum(both[0].values())), str(sum(both[1].values()))])
            lines += [f"**{result['network']}**", "", *_grid(["operator", "Z-IL", "BP"], rows), ""]
    return "\n".join(lines)


def chosen(options: argparse.Namespace, network: str) -> list[str]:
    """A network's peers: those asked for, else all that finish in reasonable time; zilc first, as the reference."""
    if options.peers:
        names = list(dict.fromkeys(options.peers))
        return sorted(names, key=lambda name: name != "zilc")
    return [p for p in PEERS if p != "zilc-literal" or network in LITERAL]


def _names(known: tuple[str, ...]) -> Any:
    """An argument's type: known names with commas between them."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown) or 'name'}; known are {', '.join(known)}")
        return names

    return parse


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}', expected a whole number of 1 or more")
    return int(text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (*ALL, "mlp2", "mlp4")
    parser.add_argument("--networks", type=_names(known), default=list(ALL), help=f"of {', '.join(known)}")
    parser.add_argument(
        "--peers", type=_names(PEERS), help=f"of {', '.join(PEERS)}; default: all, but zilc-literal on "
        f"{', '.join(LITERAL)} only",
    )  # fmt: skip
    parser.add_argument("--batch", type=_positive, help="default: 20, with transformers 4")
    parser.add_argument("--rounds", type=_positive, default=9)
    parser.add_argument("--seconds", type=float, default=60.0, help="a peer's rounds on a network, at least 3 rounds")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds without an answer: the peer is ended")
    parser.add_argument("--threads", type=_positive, default=os.cpu_count() or 1, help="of each peer, bound to as many")
    parser.add_argument("--precision", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd")
    parser.add_argument("--no-adam", action="store_true", help="leave out the short run for memory with Adam")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--write", action="store_true", help="write docs/BENCHMARKS.md and docs/benchmarks.json")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if hasattr(os, "sched_setaffinity"):
        # The workers inherit it: no runtime takes more processors than another, whatever it reads its number from.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    console = Console(stderr=True)
    results = []
    for network in options.networks:
        console.print(f"{network} …", style="dim")
        peers = chosen(options, network)
        results.append(measure(network, peers, options.rounds, options, options.optimizer, console))
        pair: list[str] = [name for name in ("zilc", "torch") if name in peers]
        if options.optimizer == "sgd" and len(pair) == 2 and not options.no_adam:
            # For the memory: time needs no figures of its own here.
            results.append(measure(network, pair, min(options.rounds, LEAST_ROUNDS), options, "adam", console))
    facts: dict[str, Any] = {
        "date": date.today().isoformat(), "machine": f"{processor()}, {os.cpu_count()} cores", "device": options.device,
        "threads": options.threads, "rounds": options.rounds, "precision": options.precision,
    }  # fmt: skip
    verdicts = judge(results)
    out = Console(width=max(Console().width, 150))
    _print(out, HEADER, table(results))
    _print(out, ["target", "limit", "measured", ""], [v.row() for v in verdicts if v.met is not None])
    data = {
        "facts": facts,
        "results": results,
        "targets": [
            {"target": v.target.name, "limit": v.target.limit, "measured": v.measured, "met": v.met} for v in verdicts
        ],
    }
    if options.json:
        options.json.write_text(json.dumps(data, indent=1))
    if options.write:
        docs = ROOT / "docs"
        docs.mkdir(exist_ok=True)
        (docs / "BENCHMARKS.md").write_text(markdown(results, facts))
        (docs / "benchmarks.json").write_text(json.dumps(data, indent=1) + "\n")


def _print(console: Console, header: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal; a failed peer's reason stands below it, where there is room."""
    shown = Table(*header, box=None)
    reasons = []
    for row in rows:
        if header is HEADER and not any(row[4:]):
            reasons.append(f"{row[0]}, {row[2]}: {row[3]}")
            row = [*row[:3], "failed", *row[4:]]
        shown.add_row(*row)
    console.print(shown)
    for reason in reasons:
        console.print(reason, markup=False)
    console.print()


if __name__ == "__main__":
    main()
