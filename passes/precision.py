"""A model in float64: the same graph with every narrower float made double, for exact comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.inliner
import onnx.numpy_helper
import onnx.shape_inference

from zilc import onnx_io
from zilc.passes.opset import opset_of

_DOUBLE = onnx.TensorProto.DOUBLE
_NARROWER = frozenset((onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16))


def to_float64(model: onnx.ModelProto, base_dir: str = "") -> onnx.ModelProto:
    """A copy of ``model`` whose float32, float16 and bfloat16 tensors, constants, casts and interfaces are float64.

    Requires: local functions are inlined.  External data is read and embedded.
    """
    made = onnx.ModelProto()
    made.CopyFrom(_spelled_out(model))
    _convert_graph(made.graph, base_dir)
    _keep_declared(made, model)
    return made


def _spelled_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """Operators that take float32 but no float64, such as Celu before opset 28, as their function bodies."""
    version = opset_of(model)
    found = set()
    for op in {n.op_type for n in model.graph.node if n.domain in ("", "ai.onnx")}:
        try:
            schema: Any = onnx.defs.get_schema(op, version, "")
        except onnx.defs.SchemaError:
            continue
        types = [{*x.types} for x in (*schema.inputs, *schema.outputs)]
        single = all("tensor(float)" in t and "tensor(double)" not in t for t in types)
        if types and single and (schema.has_function or schema.has_context_dependent_function):
            found.add(("", op))
    if not found:
        return model
    try:
        return onnx.inliner.inline_selected_functions(model, sorted(found), exclude=False, inline_schema_functions=True)
    except RuntimeError:  # a body that hangs on types which inference leaves open: left to executors that do not ask
        return model


def _keep_declared(made: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Shapes that the file alone can say, of tensors that inference leaves open (in place); others are inferred."""
    declared = [i for i in model.graph.value_info if i.type.tensor_type.HasField("shape")]
    if not declared:
        return
    light = onnx_io.set_aside(made)[0]
    found = {i.name: i for i in onnx.shape_inference.infer_shapes(light, data_prop=True).graph.value_info}
    for info in declared:
        held = found.get(info.name)
        if held is not None and held.type.tensor_type.HasField("shape"):
            continue
        kept = made.graph.value_info.add()
        kept.CopyFrom(info)
        _convert_type(kept.type)
        if held is not None and held.type.tensor_type.elem_type:
            kept.type.tensor_type.elem_type = held.type.tensor_type.elem_type


def _convert_graph(graph: onnx.GraphProto, base_dir: str) -> None:
    single = _single_scales(graph, base_dir)
    for tensor in graph.initializer:
        _convert_tensor(tensor, base_dir)
    graph.initializer.extend(single)
    del graph.value_info[:]  # inferred anew where wanted
    for info in (*graph.input, *graph.output):
        _convert_type(info.type)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                _convert_tensor(attribute.t, base_dir)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                _convert_graph(attribute.g, base_dir)
            elif node.op_type == "Cast" and node.output[0].endswith(".float32"):
                continue  # a scale, of above
            elif attribute.name in ("to", "dtype", "output_dtype") and attribute.i in _NARROWER:
                attribute.i = _DOUBLE
        _convert_implicit(node)


def _single_scales(graph: onnx.GraphProto, base_dir: str) -> list[onnx.TensorProto]:
    """Scales of a Resize are float32 whatever it resizes: each is read from a float32 copy (in place).

    Returns:
        the copies of those that are constants; others are cast by a node.
    """
    held = {t.name: t for t in graph.initializer}
    constants = [n for n in graph.node if n.op_type == "Constant"]
    held.update({n.output[0]: n.attribute[0].t for n in constants if n.attribute[0].t.dims})
    made: dict[str, onnx.TensorProto | onnx.NodeProto] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type in ("Resize", "Upsample") and node.domain in ("", "ai.onnx"):
            place = 2 if node.op_type == "Resize" and len(node.input) > 2 else 1
            name = node.input[place] if place < len(node.input) else ""
            if name:
                node.input[place] = f"{name}.float32"
                if name in held and name not in made:
                    array = np.asarray(onnx_io.read_tensor(held[name], base_dir), np.float32)
                    made[name] = onnx.numpy_helper.from_array(array, f"{name}.float32")
                elif name not in made:
                    made[name] = onnx.helper.make_node("Cast", [name], [f"{name}.float32"], to=onnx.TensorProto.FLOAT)
                    nodes.append(made[name])
        nodes.append(node)
    casts = [n for n in made.values() if isinstance(n, onnx.NodeProto)]
    if casts:
        kept = onnx.GraphProto(node=nodes)
        del graph.node[:]
        graph.node.extend(kept.node)
    return [t for t in made.values() if isinstance(t, onnx.TensorProto)]


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
    elif node.op_type in ("RandomNormal", "RandomUniform", "EyeLike", "SequenceEmpty") and not any(
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
