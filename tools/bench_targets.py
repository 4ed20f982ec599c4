"""What the benchmark is held against: targets for zilc's time and memory, met or missed by the figures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

#: Of a peer's entry in a run: time by pairs of rounds, or memory of its process.
Measure = Literal["ms", "peak_mib", "growth_mib"]
PAPER = ("mlp3", "rnn", "transformer", "alexnet", "resnet18")
ALL = (*PAPER, "decoder")
CONVOLUTIONAL = ("alexnet", "resnet18")
#: Two that run the same nodes, to be told apart by a hundredth: they have this many times the rounds, the rest of them
#: with nobody else.
TWINS, TWIN_ROUNDS = ("zilc", "zilc-bp"), 3


@dataclass(frozen=True)
class Target:
    """zilc's figure over a peer's is to be at most ``limit`` on ``needed`` of the networks (all by default)."""

    name: str
    peer: str
    networks: tuple[str, ...]
    limit: float
    measure: Measure = "ms"
    optimizer: str = "sgd"
    needed: int | None = None


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured.

    Attributes:
        met: None where too little was measured to tell.
        measured: zilc's figure over the peer's by network; None where either is missing.
    """

    target: Target
    met: bool | None
    measured: dict[str, float | None]

    def row(self) -> list[str]:
        """Name, limit, figures and verdict, for people."""
        needed, networks = self.target.needed, self.target.networks
        limit = f"≤ {self.target.limit:g}" + (f" on {needed} of {len(networks)}" if needed else "")
        figures = ", ".join(f"{name} {self._shown(value)}" for name, value in self.measured.items())
        return [self.target.name, limit, figures, {True: "met", False: "missed", None: "not measured"}[self.met]]


    def _shown(self, value: float | None) -> str:
        """With another digit where three would look like the limit."""
        if value is None:
            return "not measured"
        hidden = (round(value, 3) <= self.target.limit) != (value <= self.target.limit)
        return f"{value:.4f}" if hidden else f"{value:.3f}"


TARGETS: tuple[Target, ...] = (
    Target("Z-IL against BP", "zilc-bp", ALL, 1.01),
    Target("PyTorch eager, MLP", "torch", ("mlp3",), 0.25),
    Target("PyTorch eager, RNN", "torch", ("rnn",), 0.5),
    Target("PyTorch eager, Transformer", "torch", ("transformer",), 0.8),
    Target("PyTorch eager, AlexNet", "torch", ("alexnet",), 1.0),
    Target("PyTorch eager, ResNet18", "torch", ("resnet18",), 1.0),
    Target("torch.compile", "torch-compile", PAPER, 1.0, needed=4),
    Target("onnxruntime-training, convolutional networks", "ort-training", CONVOLUTIONAL, 0.5),
    Target("onnxruntime-training, MLP", "ort-training", ("mlp3",), 0.8),
    Target("onnx-ad, convolutional networks", "onnx-ad", CONVOLUTIONAL, 0.5),
    Target("Peak memory, PyTorch eager", "torch", ALL, 1.0, "peak_mib"),
    Target("Peak memory without the imports', PyTorch eager", "torch", ALL, 1.0, "growth_mib"),
    Target("Peak memory with Adam, PyTorch eager", "torch", ALL, 1.0, "peak_mib", "adam"),
    Target("Peak memory with Adam without the imports', PyTorch eager", "torch", ALL, 1.0, "growth_mib", "adam"),
)  # fmt: skip


def judge(results: Sequence[Mapping[str, Any]], targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Each target beside a run's results, one of which is a network with one optimizer (see ``bench.measure``)."""
    found = {(r["network"], r["optimizer"]): r["peers"] for r in results}
    verdicts = []
    for target in targets:
        measured = {n: _figure(found.get((n, target.optimizer), {}), target) for n in target.networks}
        known = [value for value in measured.values() if value is not None]
        good = sum(value <= target.limit for value in known)
        needed = target.needed or len(target.networks)
        # What was not measured cannot be held to be met, but a target may be missed or met without it.
        met: bool | None = None
        if good >= needed:
            met = True
        elif good + len(measured) - len(known) < needed:
            met = False
        verdicts.append(Verdict(target, met, measured))
    return verdicts


def _figure(peers: Mapping[str, Any], target: Target) -> float | None:
    peer, own = peers.get(target.peer, {}), peers.get("zilc", {})
    if target.measure == "ms":
        share = peer.get("zilc_ratio")
        return None if share is None else float(share[0])
    if target.measure not in peer or target.measure not in own:
        return None
    return float(own[target.measure] / peer[target.measure])
