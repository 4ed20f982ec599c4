"""onnxruntime-training's peer in tools/bench.py: its on-device training API, on the same ONNX network and weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from bench_task import TARGET, Made, Task, count


def step(task: Task, imported: Callable[[], None]) -> Made:
    """Training step, optimizer step, gradients reset; the loss read back.

    The API takes logits of rank 2: others are reshaped in the network's copy.
    """
    import onnx
    import onnxruntime
    from onnx import helper
    from onnxruntime.training import artifacts, onnxblock
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    imported()
    model = onnx.load(str(task.model))
    output = model.graph.output[0]
    dims = [d.dim_value for d in output.type.tensor_type.shape.dim]
    if len(dims) > 2:
        shape = helper.make_tensor("flat.shape", onnx.TensorProto.INT64, [2], [-1, dims[-1]])
        model.graph.initializer.append(shape)
        model.graph.node.append(helper.make_node("Reshape", [output.name, shape.name], ["flat"]))
        dims = [int(np.prod(dims[:-1])), dims[-1]]
        flat = helper.make_tensor_value_info("flat", output.type.tensor_type.elem_type, dims)
        del model.graph.output[:]
        model.graph.output.append(flat)
    trained = set(task.parameters)
    floating = [t.name for t in model.graph.initializer if t.data_type in (1, 11) and t.dims]
    optimizer = artifacts.OptimType.SGD
    if task.optimizer == "adam":
        # Adam where nothing decays; the epsilon is torch's.
        optimizer = onnxblock.optim.AdamW(eps=1e-8, weight_decay=0.0)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        artifacts.generate_artifacts(
            model,
            requires_grad=[n for n in floating if n in trained],
            frozen_params=[n for n in floating if n not in trained],
            loss=artifacts.LossType.CrossEntropyLoss,
            optimizer=optimizer,
            artifact_directory=folder,
        )
        state = CheckpointState.load_checkpoint(place / "checkpoint")
        module = Module(
            place / "training_model.onnx", state, place / "eval_model.onnx", device=task.device, session_options=options
        )
        updater = Optimizer(place / "optimizer_model.onnx", module)
    updater.set_learning_rate(task.lr)
    module.train()
    feeds = task.feeds()
    labels = feeds.pop(TARGET).reshape(-1)
    # Its inputs are the model's, then the labels.
    arrays = [feeds.get(name, labels) for name in module.input_names()]

    def run() -> float:
        loss = module(*arrays)
        updater.step()
        module.lazy_reset_grad()
        return float(loss)

    versions = {"onnxruntime-training": onnxruntime.__version__, "onnx": onnx.__version__}
    return Made(run, count(task.weights(), task.parameters), versions)
