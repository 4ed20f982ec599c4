"""zilc's peers in tools/bench.py: Z-IL, backpropagation and Z-IL's literal dynamics, in ONNX Runtime."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_task import HALVES, Made, Task

#: What the CUDA provider has kernels for, see docs/CUDA.md.
CUDA_OPSET = 18


def zil(task: Task, imported: Callable[[], None]) -> Made:
    """The wavefront schedule."""
    return _make(task, imported, {"algorithm": "zil"})


def bp(task: Task, imported: Callable[[], None]) -> Made:
    """Plain reverse mode, emitted by the same rules."""
    return _make(task, imported, {"algorithm": "bp"})


def literal(task: Task, imported: Callable[[], None]) -> Made:
    """All of the dynamics in a Loop."""
    return _make(task, imported, {"algorithm": "zil", "schedule": "literal"})


def plain(task: Task, imported: Callable[[], None]) -> Made:
    """The wavefront schedule without CUDA graphs."""
    return _make(task, imported, {"algorithm": "zil"}, cuda_graph=False)


def tuned(task: Task, imported: Callable[[], None]) -> Made:
    """The wavefront schedule with lowerings measured on this machine."""
    return _make(task, imported, {"algorithm": "zil", "tune": task.folder / "tuned.json"})


def _make(task: Task, imported: Callable[[], None], how: dict[str, Any], *, cuda_graph: bool = True) -> Made:
    """The training graph: loss, gradients and update, the loss read back."""
    import onnx
    import onnxruntime

    import zilc
    from zilc.runtime import Trainer, choose_providers

    imported()
    _limit_threads(onnxruntime, task.threads)
    half, gpu = task.precision in HALVES, task.device == "cuda"
    how = {**how, **({"precision": task.precision} if half else {})}
    if gpu:
        how |= {"opset": CUDA_OPSET, "target": "cuda"}
    with task.alone() if "tune" in how else contextlib.nullcontext():
        step = zilc.emit_training(str(task.model), loss="cross-entropy", optimizer=task.optimizer, **how)
    trainer = Trainer(step, lr=task.lr, providers=choose_providers(task.device)[0], cuda_graph=cuda_graph)
    feeds = trainer.place(task.feeds())  # as every peer has its batch on the device
    versions = {"zilc": zilc.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    facts: dict[str, Any] = {"provider": trainer.providers[0], "lowerings": step.report["lowerings"]["taken"]}
    wide = [note for note in step.report["notes"] if "stays in float32" in note]
    if wide:
        facts["note"] = "; ".join(wide)
    if not half and cuda_graph and not gpu:
        facts["operators"] = _operators(step.model)
    dims = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in step.model.graph.input}
    numbers = sum(math.prod(dims[entry["name"]]) for entry in trainer.signature["parameters"])
    del step  # what it was made from is not needed to train
    return Made(lambda: trainer.step(feeds), numbers, versions, facts)


def _limit_threads(onnxruntime: Any, threads: int) -> None:
    """zilc leaves the number of threads to ONNX Runtime, which takes one a core: so only where fewer are wanted."""
    if threads == (os.cpu_count() or 1):
        return
    make = onnxruntime.SessionOptions

    def limited() -> Any:
        options = make()
        options.intra_op_num_threads = threads
        return options

    onnxruntime.SessionOptions = limited


def _operators(model: Any) -> dict[str, int]:
    """What ONNX Runtime runs after its own optimisation, by operator."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        made = onnx.load(options.optimized_model_filepath)
    return dict(sorted(collections.Counter(node.op_type for node in made.graph.node).items()))
