"""What tools/bench.py and its workers share, in every environment: the task, and this process's memory."""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

#: Of the labels in the feeds.
TARGET = "target"


@dataclass(frozen=True)
class Task:
    """A network to train, as files: ``task.json``, ``model.onnx``, ``weights.npz`` and ``feeds.npz``.

    Attributes:
        network, batch: as in ``zilc.models.build``.
        parameters: names of the trained initializers; all others are constants.
        inputs, output: of the model; the output's last axis holds logits, the labels (int64) have its other axes.
        lr, optimizer: "sgd" or "adam" (betas 0.9 and 0.999, epsilon 1e-8).
        precision: "float32" or "float64".
        device: "cpu" or "cuda".
        threads: of the peer, which is also bound to as many processors.
    """

    folder: Path
    network: str
    batch: int
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    lr: float
    optimizer: str
    precision: str
    device: str
    threads: int

    @property
    def model(self) -> Path:
        """The network as ONNX, with its initial weights."""
        return self.folder / "model.onnx"

    def weights(self) -> dict[str, np.ndarray]:
        """The floating initializers by name, in the model's order."""
        with np.load(self.folder / "weights.npz") as file:
            return {name: file[name] for name in file.files}

    def feeds(self) -> dict[str, np.ndarray]:
        """The batch: the model's inputs, and the labels as ``target``."""
        with np.load(self.folder / "feeds.npz") as file:
            return {name: file[name] for name in file.files}

    def write(self, weights: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray]) -> None:
        """All but the model."""
        np.savez(self.folder / "weights.npz", **dict(weights))  # type: ignore[arg-type]
        np.savez(self.folder / "feeds.npz", **dict(feeds))  # type: ignore[arg-type]
        (self.folder / "task.json").write_text(json.dumps({**asdict(self), "folder": "."}))

    @classmethod
    def read(cls, folder: Path) -> Task:
        made = json.loads((folder / "task.json").read_text())
        made["folder"] = folder
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in made.items()})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Made:
    """A training step, ready to run.

    Attributes:
        step: one update; returns the loss before it, read back.
        parameters: how many numbers are trained.
        versions: of the packages that do the work.
        facts: what else the table's readers may want.
    """

    step: Callable[[], float]
    parameters: int
    versions: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)


def count(arrays: Mapping[str, np.ndarray], names: tuple[str, ...]) -> int:
    """How many numbers the named arrays hold."""
    return sum(arrays[name].size for name in names)


def timed_runs(step: Callable[[], object], lines: Iterable[str]) -> Iterator[list[float]]:
    """Milliseconds of each of N steps for every line ``run N``, until one says ``end``."""
    for line in lines:
        words = line.split()
        if words[0] == "end":
            return
        times = []
        for _ in range(int(words[1])):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        yield times


def peak_mib() -> float:
    """This program's peak resident memory.

    Linux hands ru_maxrss down from the process that started this one, so its own high-water mark is read where
    there is one.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak() -> None:
    """Start the high-water mark anew, where Linux lets us; elsewhere it stays."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
