"""Types and shapes of what one node makes, by onnx's inference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper
import onnx.shape_inference
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from zilc import dtypes, foreign, ir, onnx_io
from zilc.graph import is_standard

#: dtype and shape of a tensor as far as they are known; a shape's entries are numbers, names or None.
Inferred = tuple[np.dtype | None, list[int | str | None] | None]
#: What :func:`infer_types` found, by all that inference looks at: deep models repeat an operator on the same types.
_INFERRED: dict[tuple, list[Inferred]] = {}
#: How much of that is remembered.
INFERRED_LIMIT = 4096


def infer_types(node: gs.Node, opset: int) -> list[Inferred]:
    """dtype and shape of each output of one node, by onnx's inference; (None, None) where it cannot tell."""
    unknown: list[Inferred] = [(None, None)] * len(node.outputs)
    if not is_standard(node):
        made_of = foreign.infer_types(node)
        known = [tuple(t) for t in made_of or []][: len(node.outputs)]
        return [*known, *unknown[len(known) :]]  # type: ignore[list-item]
    key = _inference_key(node, opset)
    if key is not None and key in _INFERRED:
        return [(dtype, None if shape is None else list(shape)) for dtype, shape in _INFERRED[key]]
    result = _infer_types(node, opset)
    if result is None:
        return unknown
    if key is not None:
        if len(_INFERRED) >= INFERRED_LIMIT:
            _INFERRED.clear()
        _INFERRED[key] = [(dtype, None if shape is None else list(shape)) for dtype, shape in result]
    return result


def _inference_key(node: gs.Node, opset: int) -> tuple | None:
    """Everything that the types of a node's outputs depend on; None where that is more than a few numbers."""
    attrs = []
    for name, value in node.attrs.items():
        if isinstance(value, list):
            value = (type(value), *value)
        if not isinstance(value, (int, float, str, tuple)):
            return None
        attrs.append((name, type(value), value))
    operands: list[Any] = []
    for k, tensor in enumerate(node.inputs):
        if not tensor.name:
            operands.append(None)
            continue
        # Two operands that are one tensor, or share a symbolic dimension, are told apart by its name.
        shape = None if tensor.shape is None else tuple(tensor.shape)
        data = None
        if isinstance(tensor, gs.Constant) and math.prod(tensor.shape) <= 64:
            data = ir.values(tensor).tobytes()
        first = next(i for i, other in enumerate(node.inputs) if other.name == tensor.name)
        # Of a sequence it is a protobuf; of a tensor numpy's, whose name takes a while to be worked out.
        kind = tensor.dtype if isinstance(tensor.dtype, (np.dtype, int)) else str(tensor.dtype)
        operands.append((k - first, kind, shape, data))
    outputs = tuple(bool(t.name) for t in node.outputs)
    return node.op, opset, tuple(attrs), tuple(operands), outputs


def _infer_types(node: gs.Node, opset: int) -> list[Inferred] | None:
    """:func:`infer_types` of an ONNX operator, by onnx; None where it fails."""
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
        with ir.quiet():
            made = OnnxExporter.export_node(node)
        types = {}
        data = {}
        for tensor in node.inputs:
            if not tensor.name or tensor.dtype is None:
                continue
            types[tensor.name] = onnx.helper.make_tensor_type_proto(dtypes.onnx_dtype(tensor.dtype), tensor.shape)
            if isinstance(tensor, gs.Constant) and np.prod(tensor.shape, dtype=np.int64) <= 64:
                data[tensor.name] = onnx.numpy_helper.from_array(ir.values(tensor), tensor.name)
        found = onnx.shape_inference.infer_node_outputs(
            schema, made, types, data, opset_imports=[onnx.helper.make_opsetid("", opset)]
        )
    except Exception:
        return None
    result: list[Inferred] = []
    for tensor in node.outputs:
        kind = found.get(tensor.name)
        if kind is None or not kind.HasField("tensor_type"):
            result.append((None, None))
            continue
        shape = onnx_io.stated_shape(kind.tensor_type)
        if shape is None:
            shape = _rank_at_least(node)
        result.append((dtypes.np_dtype(kind.tensor_type.elem_type), shape))
    return result


def _rank_at_least(node: gs.Node) -> list[int | str | None] | None:
    """Operands known only at run time leave the sizes open, not the number of dimensions."""
    if node.op == "Split" and node.inputs[0].shape is not None:
        shape = list(node.inputs[0].shape)
        shape[node.attrs.get("axis", 0)] = None
        return shape
    if node.op == "Reshape" and node.inputs[1].shape is not None:
        (rank,) = node.inputs[1].shape
        return [None] * int(rank) if isinstance(rank, (int, np.integer)) else None
    return None
