"""A training step beside its peers, in one run: ``python tools/bench.py [--networks mlp3,rnn] [--peers zilc,torch]``.

Peers: zilc (Z-IL, backpropagation, Z-IL's literal dynamics), PyTorch (eager, compiled), onnxruntime-training, onnx-ad's
graph in ONNX Runtime, and JAX.  Each trains the same network from the same weights on the same batch, loss and update
included, in a process of its own, on the same processors; its first losses are checked, so that no peer does less
work.  Rounds go from peer to peer, in an order of their own each time, so that a machine that slows down slows all of
them.  Quoted are medians over rounds, and ratios of the same rounds with a bootstrapped 95 % interval.  zilc's Z-IL
and backpropagation, whose graphs hold the same nodes, go on alone for as many rounds again, twice, and are built twice,
before all others and behind them.

``make bench`` sets up the environments of the peers that need their own, and runs this.  ``--write`` writes
docs/BENCHMARKS.md and docs/benchmarks.json, in which what was not measured again stays.

With ``--device cuda`` each peer's GPU memory is measured too, and how much of the device's best rate it reaches; the
peers of several networks are built at the same time (``--builds``) and timed one after another, and ``--write`` writes
docs/BENCHMARKS_CUDA.md and docs/benchmarks_cuda.json.  ``--from-json FILE,FILE --write`` writes the page of a run
elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import bench_cuda  # type: ignore[import-not-found]
import bench_page
import numpy as np
from bench_targets import ALL, CONVOLUTIONAL, TWIN_ROUNDS, TWINS
from bench_task import HALVES, PRECISIONS, TARGET, Task, device_used_mib
from rich.console import Console

from zilc.machine import processor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BATCH = {"transformer": 4, "decoder": 4}
KNOWN = (*ALL, "mlp2", "mlp4")
PEERS = (
    "zilc", "zilc-bp", "zilc-literal", "zilc-plain", "zilc-tuned", "torch", "torch-compile", "torch-graphs",
    "ort-training", "onnx-ad", "jax",
)  # fmt: skip
#: Peers that use CUDA graphs, or leave them out where they are the rule: nothing on a CPU.
CUDA_ALONE = ("zilc-plain", "torch-graphs")
#: Not measured on a GPU unless asked for: they need environments of their own, and their dynamics minutes.
CPU_ALONE = ("zilc-literal", "ort-training", "onnx-ad")
#: Those that have mixed precision.
MIXED = ("zilc", "zilc-bp", "zilc-plain", "zilc-tuned", "torch", "torch-compile", "torch-graphs", "jax")
#: Environments of their own, by peer; the rest run in this one.
ENVIRONMENTS = {"ort-training": ".venv-ort-training", "onnx-ad": ".venv-peers", "jax": ".venv-peers"}
#: Literal dynamics run K forward and backward passes a step: minutes on the convolutional networks.
LITERAL = ("mlp3", "rnn", "decoder")
#: JAX would take three quarters of the device at once, which other peers need, and nobody could tell what it used.
ON_CUDA = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
#: A round of a peer takes about this long, or one step: where steps are short and the machine is lent, less.
ROUND_MS = {"cpu": 400.0, "cuda": 150.0}
#: Peers that are built at the same time on a GPU, at most.
BUILDS = 12
#: Peers that are alive at the same time, each with its context on the GPU.
ALIVE = 40
#: Each peer has this many rounds, however slow.
LEAST_ROUNDS = 3
#: Relative differences allowed in the first loss, and in the loss after one update besides MOVED of its change.
TOLERANCES = {"float32": (1e-4, 1e-5), "float64": (1e-9, 1e-9)}
#: A peer that updates nothing is off by the whole change.
MOVED = 0.02
#: In half precision first losses of these networks were off by 7e-4 at most (bfloat16, ResNet18).
HALF_TOLERANCE = 5e-3
#: There it is the change that is held, from the peer's own first loss on: rounding does much the same to both losses,
#: and the change may be less than it (2e-4 of AlexNet's loss).  Changes were off by 3 % at most; a peer that updates
#: nothing is off by all of it, one with half the rate by half.
HALF_MOVED = 0.15
#: PyTorch's RNN has two biases, which are trained both: more parameters, and another update.
TWO_BIASES = {(peer, "rnn"): 128 for peer in ("torch", "torch-compile", "torch-graphs")}


class Peer:
    """A worker process.

    Attributes:
        facts: what the worker said of its step, or ``{"failed": reason}``.
        rounds: the median step in milliseconds, by the round's number.
        spent: seconds in counted rounds.
    """

    def __init__(self, name: str, task: Task, patience: float, round_ms: float = ROUND_MS["cpu"]) -> None:
        self.name, self.patience, self.round_ms = name, patience, round_ms
        self.device = task.device
        self.rounds: dict[int, float] = {}
        self.spent, self.steps = 0.0, 1
        self._process: subprocess.Popen[str] | None = None
        python = interpreter(name, task.device)
        if not python.exists():
            self.facts: dict[str, Any] = {"failed": "not set up (make bench does it)"}
            return
        self._process = subprocess.Popen(
            [str(python), str(HERE / "bench_workers.py"), name, str(task.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(task.threads), **(ON_CUDA if task.device == "cuda" else {})},
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
        if line.endswith("\n"):
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
            if middle is None or middle > self.round_ms:
                return
            self.steps = max(1, min(400, int(self.round_ms / max(middle, 1e-3))))

    def round(self, number: int) -> None:
        """A counted round."""
        start = time.perf_counter()
        middle = self.run(self.steps)
        self.spent += time.perf_counter() - start
        if middle is not None:
            self.rounds[number] = middle

    def end(self) -> dict[str, float] | None:
        """Its memory; None where the process failed, and ``facts`` say how.

        Where the driver does not tell a process's memory on the device, it is what its end sets free.
        """
        used = device_used_mib() if self.device == "cuda" else None
        try:
            made = self.ask("end")
        except OSError:
            made = {"failed": "the process ended"}
        self.close()
        if "failed" in made:
            self.facts = made
            return None
        if used is not None and "device_mib" not in made:
            left = device_used_mib()
            made |= {} if left is None else {"device_mib": used - left}
        return made

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            if self._process.stdin is not None:
                with contextlib.suppress(OSError):  # what was not read by a process that has ended
                    self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def interpreter(peer: str, device: str = "cpu") -> Path:
    """The Python that runs a peer: its own environment's; on a GPU JAX may live in this one."""
    own = Path(sys.executable)
    if peer not in ENVIRONMENTS:
        return own
    python = ROOT / ENVIRONMENTS[peer] / "bin" / "python"
    here = peer == "jax" and device == "cuda" and importlib.util.find_spec("jax") is not None
    return own if here and not python.exists() else python


def ratio(a: dict[int, float], b: dict[int, float], rng: np.random.Generator) -> tuple[float, float, float]:
    """Median of a/b over the rounds that both had, with a bootstrapped 95 % interval."""
    pairs = np.asarray([a[number] / b[number] for number in sorted(a.keys() & b.keys())])
    drawn = np.median(rng.choice(pairs, (2000, len(pairs))), axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(np.median(pairs)), float(low), float(high)


def together(rounds: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Geometric means over processes of the rounds that all of them had."""
    shared = set.intersection(*(set(each) for each in rounds))
    return {number: math.prod(each[number] for each in rounds) ** (1 / len(rounds)) for number in sorted(shared)}


@dataclass(frozen=True)
class Case:
    """A network to measure, in one form.

    Attributes:
        rounds: of each peer.
    """

    network: str
    batch: int
    precision: str
    optimizer: str
    peers: tuple[str, ...]
    rounds: int

    def __str__(self) -> str:
        return f"{self.network}, batch {self.batch}, {self.precision}, {self.optimizer}"

    def result(self, peers: dict[str, Any], **more: Any) -> dict[str, Any]:
        """What is said of it."""
        return {
            "network": self.network, "batch": self.batch, "precision": self.precision, "optimizer": self.optimizer,
            **more, "peers": peers,
        }  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A case's files and what is expected of its peers.

    Attributes:
        loss: that each peer must find first.
        parameters: how many numbers are trained.
        gflop: of the step's products; None where they are not asked for.
    """

    task: Task
    loss: float
    parameters: int
    gflop: float | None


def prepare(folder: Path, case: Case, options: argparse.Namespace) -> Prepared:
    """Write a network's files.

    The loss is computed here in float64 from the forward pass in ONNX Runtime, not by any peer.
    """
    import onnx
    import onnxruntime
    from bench_work import step_operations  # type: ignore[import-not-found]

    import zilc
    from zilc import models

    dtype = "float32" if case.precision in HALVES else case.precision
    model = models.build(case.network, batch=case.batch, dtype=dtype)
    feeds = models.random_feeds(model, case.batch, np.random.default_rng(0), loss="cross-entropy")
    step = zilc.emit_training(model, loss="cross-entropy", algorithm="bp")
    names = [entry["name"] for entry in step.signature["parameters"]]
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    weights = {n: a for n, a in arrays.items() if a.dtype.kind == "f" and a.ndim}
    task = Task(
        folder=folder, network=case.network, batch=case.batch, parameters=tuple(names),
        inputs=tuple(i.name for i in model.graph.input), output=model.graph.output[0].name,
        lr=1e-2 if case.optimizer == "sgd" else 1e-4, optimizer=case.optimizer, precision=case.precision,
        device=options.device, threads=options.threads, gate=options.gate if options.builds > 1 else "",
    )  # fmt: skip
    onnx.save(model, str(task.model))
    task.write(weights, feeds)
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(task.model), quiet, providers=["CPUExecutionProvider"])
    (logits,) = session.run([task.output], {name: feeds[name] for name in task.inputs})
    work = step_operations(step.model) / 1e9 if options.device == "cuda" else None
    return Prepared(task, cross_entropy(logits, feeds[TARGET]), sum(weights[n].size for n in names), work)


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
        after: expected after one update; None where that is not known.  In half precision it is the change to it from
            ``loss`` that counts.
    """
    more = TWO_BIASES.get((peer, network), 0)
    if facts["parameters"] != parameters + more:
        return f"trains {facts['parameters']} numbers, expected {parameters + more}"
    first, second = TOLERANCES.get(precision, (HALF_TOLERANCE, 0.0))
    own, own_after = facts["losses"]
    if not math.isclose(own, loss, rel_tol=first):
        return f"its first loss is {own:.6g}, expected {loss:.6g}"
    if after is None or (more and precision not in HALVES):
        return None
    if precision in HALVES:
        # A second bias adds to the change, but less than there is room for.
        good = abs((own_after - own) - (after - loss)) <= HALF_MOVED * abs(after - loss)
    else:
        good = abs(own_after - after) <= second * abs(loss) + MOVED * abs(loss - after)
    return None if good else f"its loss after one update is {own_after:.6g}, expected {after:.6g}"


@dataclass(frozen=True)
class Started:
    """A case whose peers are being built."""

    case: Case
    made: Prepared
    folder: tempfile.TemporaryDirectory[str]
    peers: list[tuple[str, Future[Peer]]]


def lineup(peers: Sequence[str], *, twice: bool) -> list[str]:
    """Processes in the order in which they are built, by peer.

    One after another on a CPU, the sooner a process was built the slower it is here, by some hundredths.  So zilc's
    twins are built twice, before all others and behind them, and count as the mean of both: what is nearly the same can
    then be compared.
    """
    return [*peers, *reversed([name for name in peers if twice and name in TWINS])]


def start(case: Case, options: argparse.Namespace, pool: ThreadPoolExecutor) -> Started:
    """Write a case's files, and let the pool build its peers."""
    folder = tempfile.TemporaryDirectory()
    made = prepare(Path(folder.name), case, options)
    peers = [
        (name, pool.submit(Peer, name, made.task, options.patience, options.round_ms))
        for name in lineup(case.peers, twice=options.device == "cpu" and options.builds == 1)
    ]
    return Started(case, made, folder, peers)


def expected_after(
    case: Case, loss: float, own: list[float] | None, results: Sequence[Mapping[str, Any]]
) -> float | None:
    """The loss after one update: the first one and the change that zilc makes, in float32 if that was measured before.

    Args:
        loss: the first one, exactly.
        own: zilc's losses in this case.
    """
    if case.precision not in HALVES:
        return own[1] if own else None
    for result in results:
        same = [result[key] for key in ("network", "batch", "optimizer")] == [case.network, case.batch, case.optimizer]
        if same and result["precision"] == "float32" and "losses" in result["peers"].get("zilc", {}):
            own = result["peers"]["zilc"]["losses"]
    return loss + own[1] - own[0] if own else None


def finish(
    started: Started, options: argparse.Namespace, console: Console, results: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Check a case's peers, and time them round by round.

    Args:
        results: of the cases before it.
    """
    case, made = started.case, started.made
    built: dict[str, list[Peer]] = {name: [] for name in case.peers}
    for name, future in started.peers:
        built[name].append(future.result())
    started.folder.cleanup()
    entries: dict[str, Any] = dict.fromkeys(case.peers)
    own: list[float] | None = None
    running: list[Peer] = []
    for name, peers in built.items():
        reason = fault_of_all(name, peers, case, made, expected_after(case, made.loss, own, results))
        if reason is not None:
            entries[name] = {"failed": reason}
            console.print(f"{case}: {name} failed: {reason}", style="yellow", markup=False)
            for peer in peers:
                peer.close()
            continue
        if name == "zilc":
            own = peers[0].facts["losses"]
        running += peers
    rng = np.random.default_rng(0)
    time_rounds(running, case.rounds, options, rng)
    times = {name: together([peer.rounds for peer in peers]) for name, peers in built.items()}
    for name, peers in built.items():
        entries[name] = entries[name] or entry(peers, times[name])
    if "failed" not in entries.get("zilc", {"failed": ""}):
        for name in entries:
            if name != "zilc" and "failed" not in entries[name]:
                entries[name]["zilc_ratio"] = ratio(times["zilc"], times[name], rng)
    work = {} if made.gflop is None else {"gflop": made.gflop}
    return case.result(entries, parameters=made.parameters, loss=made.loss, **work)


def fault_of_all(name: str, peers: Sequence[Peer], case: Case, made: Prepared, after: float | None) -> str | None:
    """Why a peer is not measured: the first of its processes that did not start, or does other work."""
    for peer in peers:
        if "failed" in peer.facts:
            return str(peer.facts["failed"])
    for peer in peers:
        found = fault(
            name, case.network, peer.facts, loss=made.loss, after=after, parameters=made.parameters,
            precision=case.precision,
        )  # fmt: skip
        if found is not None:
            return found
    return None


def time_rounds(running: Sequence[Peer], rounds: int, options: argparse.Namespace, rng: np.random.Generator) -> None:
    """Rounds that go from process to process; on a CPU those of the twins go on alone."""
    for peer in running:
        peer.warm()
    twins = [peer for peer in running if peer.name in TWINS]
    paired = {peer.name for peer in twins} == set(TWINS)
    for count in range(TWIN_ROUNDS * rounds if paired and options.device == "cpu" else rounds):
        those = running if count < rounds else twins
        # In an order of its own each time: nobody always comes after the same neighbour, and what that one leaves.
        for peer in (those[k] for k in rng.permutation(len(those))):
            slow = peer.spent > options.seconds and len(peer.rounds) >= LEAST_ROUNDS
            if "failed" not in peer.facts and not slow:
                peer.round(count)


def entry(peers: Sequence[Peer], times: Mapping[int, float]) -> dict[str, Any]:
    """What is said of a peer, whose processes are ended: the most memory that one of them took, and the time of all.

    Args:
        times: milliseconds a step by round, see :func:`together`.
    """
    known = dict(peers[0].facts)
    memories = [None if "failed" in peer.facts else peer.end() for peer in peers]
    whole = [memory for memory in memories if memory is not None]
    if len(whole) < len(peers):
        for peer in peers:
            peer.close()
        return {"failed": next(peer.facts["failed"] for peer in peers if "failed" in peer.facts)}
    memory = {key: max(each[key] for each in whole) for key in whole[0]}
    low, mid, high = np.percentile(list(times.values()), (0, 50, 100))
    made = {
        "ms": float(mid), "min": float(low), "max": float(high), "rounds": len(times), **memory,
        "growth_mib": memory["peak_mib"] - known["imported_mib"], **known,
    }  # fmt: skip
    if len(peers) > 1:
        made["each_ms"] = [float(np.median(list(peer.rounds.values()))) for peer in peers]
    return made


def measure(
    network: str, peers: list[str], rounds: int, options: argparse.Namespace, optimizer: str, console: Console
) -> dict[str, Any]:
    """One network with one optimizer, in the first of the precisions and batches."""
    batch = batches(network, options.batch)[0]
    case = Case(network, batch, options.precision[0], optimizer, tuple(peers), rounds)
    with ThreadPoolExecutor(options.builds) as pool:
        return finish(start(case, options, pool), options, console)


def batches(network: str, asked: Mapping[str, list[int]] | None) -> list[int]:
    """A network's batches: those asked for by its name, else those asked for of all, else the usual one."""
    asked = asked or {}
    return asked.get(network) or asked.get("") or [BATCH.get(network, 20)]


def plan(options: argparse.Namespace) -> list[Case]:
    """What is to be measured, in that order.

    For the memory zilc and PyTorch are measured with Adam too, each network once: time needs no figures there.
    """
    cases = []
    for network in options.networks:
        for index, batch in enumerate(batches(network, options.batch)):
            for precision in options.precision:
                peers = tuple(chosen(options, network, precision))
                cases.append(Case(network, batch, precision, options.optimizer, peers, options.rounds))
                pair = tuple(name for name in ("zilc", "torch") if name in peers)
                first = index == 0 and precision == options.precision[0]
                if first and options.optimizer == "sgd" and len(pair) == 2 and not options.no_adam:
                    cases.append(Case(network, batch, precision, "adam", pair, min(options.rounds, LEAST_ROUNDS)))
    return [case for case in cases if case.peers]


def waves(cases: Sequence[Case], builds: int, alive: int) -> Iterator[list[Case]]:
    """Cases whose peers are built together: one case where they are built one by one."""
    wave: list[Case] = []
    for case in cases:
        full = sum(len(c.peers) for c in wave) + len(case.peers) > alive
        if wave and (builds == 1 or full):
            yield wave
            wave = []
        wave.append(case)
    if wave:
        yield wave


def measure_all(
    options: argparse.Namespace, console: Console, written: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Every case, wave by wave: first all peers of a wave are built, then one runs at a time.

    A case that cannot be prepared, or whose measurement breaks down, is said to have failed; the rest goes on.

    Args:
        written: is told the results so far after each case.
    """
    results: list[dict[str, Any]] = []

    def broken(case: Case, error: Exception) -> None:
        console.print(f"{case}: {type(error).__name__}: {error}", style="yellow", markup=False)
        results.append(case.result({name: {"failed": f"{type(error).__name__}: {error}"[:300]} for name in case.peers}))

    with ThreadPoolExecutor(options.builds) as pool:
        for wave in waves(plan(options), options.builds, options.alive):
            started = []
            for case in wave:
                console.print(f"{case} …", style="dim", markup=False)
                try:
                    started.append(start(case, options, pool))
                except Exception as error:
                    broken(case, error)
            for each in started:
                for _, future in each.peers:
                    future.exception()  # waits: nothing is built while others are timed
            for each in started:
                try:
                    results.append(finish(each, options, console, results))
                except Exception as error:
                    broken(each.case, error)
                written(results)
    return results


def chosen(options: argparse.Namespace, network: str, precision: str) -> list[str]:
    """A network's peers: those asked for, else all that finish in reasonable time; zilc first, as the reference."""
    if options.peers:
        names = list(dict.fromkeys(options.peers))
    else:
        left_out = CPU_ALONE if options.device == "cuda" else (*CUDA_ALONE, "zilc-tuned")
        some = {"zilc-literal": LITERAL, "zilc-tuned": CONVOLUTIONAL}
        names = [p for p in PEERS if p not in left_out and network in some.get(p, (network,))]
    names = [name for name in names if precision not in HALVES or name in MIXED]
    return sorted(names, key=lambda name: name != "zilc")


def _names(known: tuple[str, ...]) -> Any:
    """An argument's type: known names with commas between them."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown) or 'name'}; known are {', '.join(known)}")
        return list(dict.fromkeys(names))

    return parse


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}', expected a whole number of 1 or more")
    return int(text)


def _batches(text: str) -> dict[str, list[int]]:
    """``64``, or ``resnet18=20,resnet18=128,64``: batches by network; under the empty name those of all others."""
    made: dict[str, list[int]] = {}
    for part in text.split(","):
        network, _, number = part.strip().rpartition("=")
        if network and network not in KNOWN:
            raise argparse.ArgumentTypeError(f"no {network}; known are {', '.join(KNOWN)}")
        made.setdefault(network, []).append(_positive(number))
    return made


def _files(text: str) -> list[Path]:
    return [Path(name) for name in text.split(",") if name]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=_names(KNOWN), default=list(ALL), help=f"of {', '.join(KNOWN)}")
    parser.add_argument(
        "--peers", type=_names(PEERS), help=f"of {', '.join(PEERS)}; default: all of the device, but zilc-literal on "
        f"{', '.join(LITERAL)} only",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=_batches, metavar="N|NETWORK=N,…", help="a network may have several; default: 20, with "
        "transformers 4",
    )  # fmt: skip
    parser.add_argument("--rounds", type=_positive, default=9)
    parser.add_argument("--round-ms", type=float, help="length of a round; default: 400, on cuda 150")
    parser.add_argument("--seconds", type=float, default=60.0, help="a peer's rounds on a network, at least 3 rounds")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds without an answer: the peer is ended")
    parser.add_argument("--threads", type=_positive, default=os.cpu_count() or 1, help="of each peer, bound to as many")
    parser.add_argument(
        "--builds", type=_positive, help="peers that are built at the same time; all are built before any is timed; "
        f"default: 1, on cuda as many as processors, at most {BUILDS}",
    )  # fmt: skip
    parser.add_argument("--alive", type=_positive, default=ALIVE, help="with --builds, peers alive at the same time")
    parser.add_argument(
        "--no-gate", action="store_true", help="with --builds, let peers search for kernels while others run: quicker, "
        "and they choose worse",
    )  # fmt: skip
    parser.add_argument(
        "--precision", type=_names(PRECISIONS), default=["float32"], metavar="NAME,…", help=f"of "
        f"{', '.join(PRECISIONS)}; the last two are mixed with float32",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd")
    parser.add_argument("--no-adam", action="store_true", help="leave out the short run for memory with Adam")
    parser.add_argument("--json", type=Path, help="write the results here, after each network")
    parser.add_argument("--from-json", type=_files, metavar="FILE,…", help="show these runs, joined by machine")
    parser.add_argument(
        "--write", action="store_true", help="write docs/BENCHMARKS.md and docs/benchmarks.json, where what was not "
        "measured again stays, or for cuda "
        "docs/BENCHMARKS_CUDA.md and docs/benchmarks_cuda.json",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    wrong = [name for name in options.peers or () if options.device == "cpu" and name in CUDA_ALONE]
    if wrong:
        parser.error(f"{', '.join(wrong)}: with --device cuda only")
    options.round_ms = options.round_ms or ROUND_MS[options.device]
    options.builds = options.builds or (1 if options.device == "cpu" else min(BUILDS, options.threads))
    options.gate = "" if options.no_gate else str(Path(tempfile.gettempdir()) / f"bench-{os.getpid()}.gate")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is asked for."""
    if hasattr(os, "sched_setaffinity"):
        # The workers inherit it: no runtime takes more processors than another, whatever it reads its number from.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    facts: dict[str, Any] = {
        "date": date.today().isoformat(), "machine": f"{processor()}, {os.cpu_count()} cores", "device": options.device,
        "threads": options.threads, "rounds": options.rounds, "precision": ", ".join(options.precision),
    }  # fmt: skip
    if options.device == "cuda":
        # Several compile at a time: torch.compile's own pool of processes would be one a core for each of them.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(2, 2 * options.threads // options.builds)))
        facts |= bench_cuda.device_facts(options.precision)

    def written(results: list[dict[str, Any]]) -> None:
        bench_cuda.add_shares(results, facts.get("peak_gflops", {}))
        if options.json:
            # In one go: who is stopped while writing keeps what was there.
            part = options.json.with_name(options.json.name + ".part")
            part.write_text(json.dumps(bench_page.document(results, facts), indent=1))
            part.replace(options.json)

    results = measure_all(options, Console(stderr=True), written)
    written(results)
    return bench_page.document(results, facts)


def main() -> None:
    options = parse()
    if options.from_json:
        made = bench_page.by_machine([run for path in options.from_json for run in bench_page.read(path)])
    else:
        made = [run(options)]
    if options.write:
        bench_page.write(made, ROOT / "docs")
    if options.from_json and options.json:
        options.json.write_text(json.dumps(bench_page.together(made), indent=1))
    for data in made:
        bench_page.report(data)


if __name__ == "__main__":
    main()
