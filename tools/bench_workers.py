"""One peer of tools/bench.py in a process of its own: commands on stdin, JSON on stdout.

``python bench_workers.py PEER FOLDER`` reads what bench.py wrote to FOLDER (see :class:`bench_task.Task`), builds the
peer's training step, runs it twice and prints ``{"ready": …}``; then for each line ``run N`` the milliseconds of N
steps, and for ``end`` its memory.  One process a peer keeps one runtime's waiting threads and allocator out of
another's measurement, and lets each peer live in an environment of its own: nothing here imports zilc but its peers.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from bench_task import Made, Task, peak_mib, reset_peak, timed_runs

#: Module and function of each peer.  A function takes the task and a callback for when its imports are done.
PEERS: dict[str, tuple[str, str]] = {
    "zilc": ("bench_zilc", "zil"),
    "zilc-bp": ("bench_zilc", "bp"),
    "zilc-literal": ("bench_zilc", "literal"),
    "torch": ("bench_torch", "eager"),
    "torch-compile": ("bench_torch", "compiled"),
    "ort-training": ("bench_ort_training", "step"),
    "onnx-ad": ("bench_onnx_ad", "step"),
    "jax": ("bench_jax", "step"),
}


def say(answer: object, stream: object) -> None:
    print(json.dumps(answer), file=stream, flush=True)  # type: ignore[call-overload]


def main() -> None:
    peer, task = sys.argv[1], Task.read(Path(sys.argv[2]))
    # Runtimes print as they like: their lines must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    imported: list[float] = []
    try:
        module, function = PEERS[peer]
        make: Callable[[Task, Callable[[], None]], Made] = getattr(importlib.import_module(module), function)
        made = make(task, lambda: imported.append(peak_mib()))
        losses = [float(made.step()) for _ in range(2)]
    except Exception as error:
        # The first line that says something; the type alone where there is none.
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        say({"failed": f"{type(error).__name__}: {reason}"[:300]}, answers)
        return
    built = peak_mib()
    reset_peak()
    ready = {
        "losses": losses, "parameters": made.parameters, "imported_mib": imported[0], **made.facts,
        "versions": {"Python": platform.python_version(), **made.versions},
    }  # fmt: skip
    say({"ready": ready}, answers)
    for times in timed_runs(made.step, sys.stdin):
        say(times, answers)
    stepping = peak_mib()
    say({"peak_mib": max(built, stepping), "stepping_mib": stepping}, answers)


if __name__ == "__main__":
    main()
