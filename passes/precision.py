"""A model in float64: the same graph with every narrower float made double, for exact comparisons."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from zilc import onnx_io

_DOUBLE = onnx.TensorProto.DOUBLE
_NARROWER = frozenset((onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16))


def to_float64(model: onnx.ModelProto, base_dir: str = "") -> onnx.ModelProto:
    """A copy of ``model`` whose float32, float16 and bfloat16 tensors, constants, casts and interfaces are float64.

    Requires: local functions are inlined.  External data is read and embedded.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _convert_graph(made.graph, base_dir)
    return made


def _convert_graph(graph: onnx.GraphProto, base_dir: str) -> None:
    for tensor in graph.initializer:
        _convert_tensor(tensor, base_dir)
    del graph.value_info[:]  # inferred anew where wanted
    for info in (*graph.input, *graph.output):
        _convert_type(info.type)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _convert_tensor(attribute.t, base_dir)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                _convert_graph(attribute.g, base_dir)
            elif attribute.name in ("to", "dtype", "output_dtype") and attribute.i in _NARROWER:
                attribute.i = _DOUBLE
        _convert_implicit(node)


def _convert_implicit(node: onnx.NodeProto) -> None:
    """Attributes that mean float32 without saying so."""
    if node.op_type == "Constant":
        for attribute in list(node.attribute):
            if attribute.name in ("value_float", "value_floats"):
                values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                tensor = onnx.numpy_helper.from_array(np.asarray(values, np.float32).astype(np.float64))
                node.attribute.remove(attribute)
                node.attribute.append(onnx.helper.make_attribute("value", tensor))
    elif node.op_type == "ConstantOfShape" and not any(a.name == "value" for a in node.attribute):
        zero = onnx.numpy_helper.from_array(np.zeros(1, np.float64))
        node.attribute.append(onnx.helper.make_attribute("value", zero))
    elif node.op_type in ("RandomNormal", "RandomUniform", "EyeLike") and not any(
        a.name == "dtype" for a in node.attribute
    ):
        node.attribute.append(onnx.helper.make_attribute("dtype", _DOUBLE))


def _convert_tensor(tensor: onnx.TensorProto, base_dir: str) -> None:
    if tensor.data_type not in _NARROWER:
        return
    name = tensor.name
    array = np.asarray(onnx_io.read_tensor(tensor, base_dir), np.float64)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))


def _convert_type(kind: onnx.TypeProto) -> None:
    if kind.HasField("tensor_type") and kind.tensor_type.elem_type in _NARROWER:
        kind.tensor_type.elem_type = _DOUBLE
    elif kind.HasField("sequence_type"):
        _convert_type(kind.sequence_type.elem_type)
    elif kind.HasField("optional_type"):
        _convert_type(kind.optional_type.elem_type)
