"""What tools/bench.py and its workers share, in every environment: the task, its gate, and memory."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

#: Of the labels in the feeds.
TARGET = "target"
#: Mixed precision: products in these, weights and updates in float32.
HALVES = ("float16", "bfloat16")
PRECISIONS = ("float32", "float64", *HALVES)


@dataclass(frozen=True)
class Task:
    """A network to train, as files: ``task.json``, ``model.onnx``, ``weights.npz`` and ``feeds.npz``.

    Attributes:
        network, batch: as in ``zilc.models.build``.
        parameters: names of the trained initializers; all others are constants.
        inputs, output: of the model; the output's last axis holds logits, the labels (int64) have its other axes.
        lr, optimizer: "sgd" or "adam" (betas 0.9 and 0.999, epsilon 1e-8).
        precision: "float32" or "float64", of everything; "float16" or "bfloat16", mixed with float32.
        device: "cpu" or "cuda".
        threads: of the peer, which is also bound to as many processors.
        gate: file that peers lock for their first steps, see :meth:`alone`; empty where they are built one by one.
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
    gate: str = ""

    @property
    def weights_precision(self) -> str:
        """The dtype of weights, inputs and updates."""
        return "float32" if self.precision in HALVES else self.precision

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other peer's first steps meanwhile: runtimes time kernels there to choose among them, on one device."""
        if not self.gate:
            yield
            return
        import fcntl

        with Path(self.gate).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

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


def device_mib() -> float | None:
    """This process's memory on its GPU, the context's included; None where the driver does not tell.

    In a container it often does not: it knows processes by numbers of the host.
    """
    with contextlib.suppress(Exception):  # no driver, no package, no right: nothing to report
        nvml = _nvml()
        for index in range(nvml.nvmlDeviceGetCount()):
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(index)):
                if process.pid == os.getpid() and process.usedGpuMemory:
                    return float(process.usedGpuMemory) / 2**20
    return None


def device_used_mib() -> float | None:
    """What all processes together hold on the first GPU."""
    with contextlib.suppress(Exception):
        nvml = _nvml()
        return float(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0)).used) / 2**20
    return None


def _nvml() -> Any:
    """The driver's interface, where there is one."""
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    return nvml
