"""onnx-ad's peer in tools/bench.py: its reverse-mode graph of the same ONNX network, with SGD appended, in ORT."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import numpy as np
from bench_task import TARGET, Made, Task, count


def step(task: Task, imported: Callable[[], None]) -> Made:
    """One ONNX model a step: loss, adjoints and the parameters' next values, which never leave ONNX Runtime.

    Raises:
        ValueError: an optimizer other than SGD.
    """
    import onnx
    import onnx_ad
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    imported()
    if task.optimizer != "sgd":
        raise ValueError("onnx-ad makes gradients only; the bench adds SGD to them and no other optimizer")
    model = onnx.load(str(task.model))
    graph = model.graph
    weights, feeds = task.weights(), task.feeds()
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(task.precision))
    trained = set(task.parameters)
    left = [t for t in graph.initializer if t.name not in trained]
    del graph.initializer[:]
    graph.initializer.extend(left)
    graph.input.extend(helper.make_tensor_value_info(n, kind, weights[n].shape) for n in task.parameters)
    # Cross-entropy from standard operators: LogSoftmax, the labels' entries, their mean.
    classes = graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    labels = feeds.pop(TARGET).reshape(-1, 1)
    graph.input.append(helper.make_tensor_value_info(TARGET, TensorProto.INT64, labels.shape))
    flat = numpy_helper.from_array(np.asarray([-1, classes], np.int64), "loss.shape")
    graph.initializer.append(flat)
    graph.node.extend(
        [
            helper.make_node("Reshape", [task.output, flat.name], ["loss.flat"]),
            helper.make_node("LogSoftmax", ["loss.flat"], ["loss.log"], axis=-1),
            helper.make_node("GatherElements", ["loss.log", TARGET], ["loss.chosen"], axis=-1),
            helper.make_node("ReduceMean", ["loss.chosen"], ["loss.mean"], keepdims=0),
            helper.make_node("Neg", ["loss.mean"], ["loss"]),
        ]
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("loss", kind, []))
    model = onnx_ad.reverse(
        onnx.shape_inference.infer_shapes(model), inputs=list(task.parameters), outputs=["loss"], layout="onnx"
    )
    _append_sgd(model, task, weights)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.log_severity_level = 4
    provider = "CUDAExecutionProvider" if task.device == "cuda" else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise ValueError(f"this ONNX Runtime has no {provider}")
    feeds[TARGET] = labels
    feeds["lr"] = np.asarray(task.lr, task.precision)
    feeds["adj_loss"] = np.ones(1, task.precision)
    # Two sets of buffers that change places, nothing copied.  On a CPU a value lies in the array that it is made from:
    # an array of its own for each, or an update would write over weights that the step has yet to read.
    sides = [
        {n: onnxruntime.OrtValue.ortvalue_from_numpy(weights[n].copy(), task.device) for n in task.parameters}
        for _ in range(2)
    ]
    bindings = []
    for side in (0, 1):
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, task.device))
        for name in task.parameters:
            binding.bind_ortvalue_input(name, sides[side][name])
            binding.bind_ortvalue_output(f"{name}.next", sides[1 - side][name])
        binding.bind_output("loss", "cpu")
        bindings.append(binding)

    def run() -> float:
        binding = bindings[0]
        session.run_with_iobinding(binding)
        bindings.reverse()
        return float(binding.get_outputs()[-1].numpy())

    versions = {"onnx-ad": version("onnx-ad"), "onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    return Made(run, count(weights, task.parameters), versions)


def _append_sgd(model: object, task: Task, weights: dict[str, np.ndarray]) -> None:
    """W.next = W - lr adj_W for every parameter; the outputs become these and the loss."""
    from onnx import helper, numpy_helper

    graph = model.graph  # type: ignore[attr-defined]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(task.precision))
    graph.input.append(helper.make_tensor_value_info("lr", kind, []))
    # onnx-ad's layout has a last axis for the number of seeds, which is one.
    graph.initializer.append(numpy_helper.from_array(np.asarray([-1], np.int64), "sgd.axis"))
    del graph.output[:]
    for index, name in enumerate(task.parameters):
        graph.node.extend(
            [
                helper.make_node("Squeeze", [f"adj_{name}", "sgd.axis"], [f"sgd.g{index}"]),
                helper.make_node("Mul", [f"sgd.g{index}", "lr"], [f"sgd.d{index}"]),
                helper.make_node("Sub", [name, f"sgd.d{index}"], [f"{name}.next"]),
            ]
        )
        graph.output.append(helper.make_tensor_value_info(f"{name}.next", kind, weights[name].shape))
    graph.output.append(helper.make_tensor_value_info("loss", kind, []))
