"""One peer of tools/bench.py in a process of its own: commands on stdin, JSON on stdout.

``python bench_workers.py PEER FOLDER`` reads what bench.py wrote to FOLDER (see :class:`bench_task.Task`), builds the
peer's training step, runs it twice (more often on a GPU) and prints ``{"ready": …}``; then for each line ``run N`` the
milliseconds of N steps, and for ``end`` its memory.  One process a peer keeps one runtime's waiting threads and
allocator out of another's measurement, and lets each peer live in an environment of its own: nothing here imports
zilc but its peers.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from bench_task import Made, Task, device_mib, peak_mib, reset_peak, timed_runs

#: Module and function of each peer.  A function takes the task and a callback for when its imports are done.
PEERS: dict[str, tuple[str, str]] = {
    "zilc": ("bench_zilc", "zil"),
    "zilc-bp": ("bench_zilc", "bp"),
    "zilc-literal": ("bench_zilc", "literal"),
    "zilc-plain": ("bench_zilc", "plain"),
    "zilc-tuned": ("bench_zilc", "tuned"),
    "torch": ("bench_torch", "eager"),
    "torch-compile": ("bench_torch", "compiled"),
    "torch-graphs": ("bench_torch", "graphs"),
    "ort-training": ("bench_ort_training", "step"),
    "onnx-ad": ("bench_onnx_ad", "step"),
    "jax": ("bench_jax", "step"),
}
#: Steps on a GPU before any is timed: CUDA graphs are recorded in the second or third.
GPU_STEPS = 5
#: Updates that a loss scale may skip at first: it begins at 65536, and each skip halves it.
SKIPS = 16


def say(answer: object, stream: object) -> None:
    print(json.dumps(answer), file=stream, flush=True)  # type: ignore[call-overload]


def first_losses(step: Callable[[], float], precision: str) -> list[float]:
    """The loss before any update and after the first one; with float16 that is the first one not skipped.

    A skipped update leaves the weights as they are, and so the loss but for the order of its sums.
    """
    losses = [float(step()), float(step())]
    for _ in range(SKIPS if precision == "float16" else 0):
        if not math.isclose(*losses, rel_tol=1e-5):
            break
        losses[1] = float(step())
    return losses


def main() -> None:
    peer, task = sys.argv[1], Task.read(Path(sys.argv[2]))
    gpu = task.device == "cuda"
    # Runtimes print as they like: their lines must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    imported: list[float] = []
    try:
        module, function = PEERS[peer]
        make: Callable[[Task, Callable[[], None]], Made] = getattr(importlib.import_module(module), function)
        made = make(task, lambda: imported.append(peak_mib()))
        with task.alone():
            losses = first_losses(made.step, task.precision)
            for _ in range(GPU_STEPS if gpu else 0):
                made.step()
    except Exception as error:
        # The first line that says something; the type alone where there is none.
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        say({"failed": f"{type(error).__name__}: {reason}"[:300]}, answers)
        return
    built, on_device = peak_mib(), device_mib() if gpu else None
    reset_peak()
    ready = {
        "losses": losses, "parameters": made.parameters, "imported_mib": imported[0], **made.facts,
        "versions": {"Python": platform.python_version(), **made.versions},
    }  # fmt: skip
    say({"ready": ready}, answers)
    for times in timed_runs(made.step, sys.stdin):
        say(times, answers)
    stepping = peak_mib()
    memory = {"peak_mib": max(built, stepping), "stepping_mib": stepping}
    held = [mib for mib in (on_device, device_mib() if gpu else None) if mib is not None]
    say({**memory, "device_mib": max(held)} if held else memory, answers)
    if gpu:
        os._exit(0)  # the driver frees what runtimes would take a second to free one by one


if __name__ == "__main__":
    main()
