"""onnxruntime-training's peer in tools/bench.py: its on-device training API, on the same ONNX network and weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    for index, node in enumerate(model.graph.node):
        if node.op_type == "LayerNormalization":
            # Its gradient reads the mean and the inverse deviation, which ONNX leaves optional.
            del node.output[1:]
            node.output.extend([f"norm{index}.mean", f"norm{index}.inverse"])
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
    normalizations = _spell_out_normalizations(model)
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
    facts = {}
    if normalizations:
        facts["note"] = "BatchNormalization spelled out as arithmetic, for its own is one of batch statistics"
    return Made(run, count(task.weights(), task.parameters), versions, facts)


def _spell_out_normalizations(model: Any) -> int:
    """Put arithmetic in the place of BatchNormalization in inference form; returns how many there were.

    onnxruntime-training makes every BatchNormalization one of batch statistics, which is another network:
    (x - mean) (scale / sqrt(var + epsilon)) + bias is the one that was asked for, over [N, C, ...].
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    ranks = {i.name: len(i.type.tensor_type.shape.dim) for i in graph.value_info}
    made, nodes = 0, []
    for node in graph.node:
        if node.op_type != "BatchNormalization":
            nodes.append(node)
            continue
        x, scale, bias, mean, variance = node.input
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        name, column = f"spelled{made}", (-1, *[1] * (ranks[x] - 2))
        constants = {
            "mean": arrays[mean].reshape(column),
            "inverse": (1 / np.sqrt(arrays[variance] + np.float32(epsilon))).reshape(column),
            "shape": np.asarray(column, np.int64),
        }
        graph.initializer.extend(numpy_helper.from_array(value, f"{name}.{key}") for key, value in constants.items())
        for operator, inputs, output in (
            ("Reshape", [scale, f"{name}.shape"], f"{name}.scale"),
            ("Reshape", [bias, f"{name}.shape"], f"{name}.bias"),
            ("Mul", [f"{name}.scale", f"{name}.inverse"], f"{name}.factor"),
            ("Sub", [x, f"{name}.mean"], f"{name}.centred"),
            ("Mul", [f"{name}.centred", f"{name}.factor"], f"{name}.scaled"),
            ("Add", [f"{name}.scaled", f"{name}.bias"], node.output[0]),
        ):
            nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}.node"))
        made += 1
    if made:
        read = {name for node in nodes for name in node.input}
        kept = [t for t in graph.initializer if t.name in read]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(kept)
    return made
