"""The straight-through line of a quantised model: what its gradients are held against.

Differences of a rounding function are zero or huge and say nothing of a straight-through gradient.  Each pair of
QuantizeLinear and DequantizeLinear is replaced by the line through its value at the feeds: slope 1 where the entry
was within the quantised type, 0 where it saturated.  The mask is found here in NumPy, apart from the emitted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from zilc.executors import executor


def straight_line(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A copy of ``model`` without rounding, equal to it at ``feeds``.

    Args:
        model: float32; functions inlined; its parameters are its initializers.
        feeds: arrays by input name, in the model's types.

    QuantizeLinear and DequantizeLinear of constants become constants.  Scales are constants too.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    pairs = [
        node
        for node in graph.node
        if node.op_type == "QuantizeLinear"
        and any(n.op_type == "DequantizeLinear" for n in readers.get(node.output[0], ()))
    ]
    ends = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    asked = [name for node in pairs for name in node.input if name]
    asked += [node.output[0] for node in (*pairs, *ends)]
    values = _values(model, sorted(set(asked)), feeds)
    begins = {node.output[0]: node for node in pairs}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.output[0] in begins:
            others = [n for n in readers[node.output[0]] if n.op_type != "DequantizeLinear"]
            if not others:
                continue
        if node.op_type != "DequantizeLinear":
            nodes.append(node)
            continue
        y = node.output[0]
        begin = begins.get(node.input[0])
        if begin is None:
            graph.initializer.append(onnx.numpy_helper.from_array(values[y], y))
            continue
        mask = inside(begin, values).astype(values[y].dtype)
        rest = values[y] - values[begin.input[0]] * mask
        for kind, array in (("slope", mask), ("rest", rest)):
            graph.initializer.append(onnx.numpy_helper.from_array(array, f"zilc.{kind}.{y}"))
        nodes.append(onnx.helper.make_node("Mul", [begin.input[0], f"zilc.slope.{y}"], [f"zilc.line.{y}"]))
        nodes.append(onnx.helper.make_node("Add", [f"zilc.line.{y}", f"zilc.rest.{y}"], [y]))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return made


def _values(model: onnx.ModelProto, names: list[str], feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inner tensors of a model."""
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    listed = {o.name for o in opened.graph.output}
    made = {name for node in opened.graph.node for name in node.output}
    wanted = [name for name in names if name in made]
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in listed)
    found = executor(onnx.shape_inference.infer_shapes(opened))(feeds, wanted)
    return {**{n: held[n] for n in names if n in held}, **{n: feeds[n] for n in names if n in feeds}, **found}


def inside(node: onnx.NodeProto, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Where a QuantizeLinear did not saturate."""
    attrs: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    x, scale = values[node.input[0]], values[node.input[1]]
    zero = values[node.input[2]] if len(node.input) > 2 and node.input[2] else None
    kind = values[node.output[0]].dtype
    axis, block = attrs.get("axis", 1), attrs.get("block_size", 0)

    def beside(value: np.ndarray) -> np.ndarray:
        value = np.asarray(value, np.float32)
        if value.size == 1:
            return value.reshape(())
        if block:
            return np.take(np.repeat(value, block, axis=axis), np.arange(x.shape[axis]), axis=axis)
        shape = [1] * x.ndim
        shape[axis] = -1
        return value.reshape(shape)

    r = np.rint(np.asarray(x, np.float32) / beside(scale)) + (0 if zero is None else beside(zero))
    info: Any = np.iinfo(kind) if kind.kind in "iu" else ml_dtypes.iinfo(kind)
    return np.asarray((r >= int(info.min)) & (r <= int(info.max)))
