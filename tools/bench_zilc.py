"""zilc's peers in tools/bench.py: Z-IL, backpropagation and Z-IL's literal dynamics, in ONNX Runtime."""

from __future__ import annotations

import collections
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_task import Made, Task


def zil(task: Task, imported: Callable[[], None]) -> Made:
    """The wavefront schedule."""
    return _make(task, imported, {"algorithm": "zil"})


def bp(task: Task, imported: Callable[[], None]) -> Made:
    """Plain reverse mode, emitted by the same rules."""
    return _make(task, imported, {"algorithm": "bp"})


def literal(task: Task, imported: Callable[[], None]) -> Made:
    """All of the dynamics in a Loop."""
    return _make(task, imported, {"algorithm": "zil", "schedule": "literal"})


def _make(task: Task, imported: Callable[[], None], how: dict[str, Any]) -> Made:
    """The training graph: loss, gradients and update, the loss read back."""
    import onnx
    import onnxruntime

    import zilc
    from zilc.runtime import Trainer, choose_providers

    imported()
    _limit_threads(onnxruntime, task.threads)
    step = zilc.emit_training(str(task.model), loss="cross-entropy", optimizer=task.optimizer, **how)
    trainer = Trainer(step, lr=task.lr, providers=choose_providers(task.device)[0])
    feeds = task.feeds()
    versions = {"zilc": zilc.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    facts = {"operators": _operators(step.model), "provider": trainer.providers[0]}
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
