"""Derived rules: operators that ONNX defines by a function body get their VJP by reverse mode through that body.

The operator stays one vertex of the graph.  Its body is instantiated where the rule is applied, on the vertex's
operands, and each of the body's nodes passes the cotangent on by its own rule, looked up in the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper
import onnx_graphsurgeon as gs

from zilc import dtypes, ir
from zilc.emit import Emitter
from zilc.vjp import table
from zilc.vjp.table import Rule

#: One operand's dtype (numpy's name) and shape; None for an absent operand.
OperandType = tuple[str, tuple[int | str | None, ...] | None] | None


def derive(node: gs.Node, opset: int) -> Rule | None:
    """The rule of an operator that has a function body at ``opset``; None where there is none, or none that serves.

    A body serves if every node on a differentiable path from a floating operand to an output has a rule.
    """
    domain = node.domain or ""
    if domain not in ("", "ai.onnx") or not _has_body(node.op, opset):
        return None
    if any(isinstance(v, gs.Graph) for v in node.attrs.values()):
        return None
    types = tuple(_type(t) for t in node.inputs)
    attrs = _attributes(node, opset)
    return _derive(node.op, opset, attrs, types, len(node.outputs))


@cache
def _has_body(op_type: str, opset: int) -> bool:
    try:
        schema: Any = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def _type(tensor: gs.Tensor) -> OperandType:
    dtype = dtypes.np_dtype(tensor.dtype)
    if not tensor.name or dtype is None:
        return None
    return dtype.name, None if tensor.shape is None else tuple(tensor.shape)


def _attributes(node: gs.Node, opset: int) -> bytes:
    """A node's attributes over the schema's defaults, as a NodeProto's bytes: hashable, and what onnx asks for."""
    proto = onnx.NodeProto(op_type=node.op)
    for name, value in sorted(table.attributes(node, opset).items()):
        if value is None:
            continue
        if isinstance(value, ir.EmptyList):
            proto.attribute.append(onnx.AttributeProto(name=name, type=value.onnx_type))  # type: ignore[arg-type]
            continue
        if isinstance(value, gs.Constant):
            value = onnx.numpy_helper.from_array(ir.values(value))
        elif isinstance(value, np.ndarray):
            value = onnx.numpy_helper.from_array(value)
        proto.attribute.append(onnx.helper.make_attribute(name, value))
    return proto.SerializeToString(deterministic=True)


def forget() -> None:
    """The table has changed: what was derived by it is derived anew."""
    _derive.cache_clear()


@lru_cache(maxsize=1024)
def _derive(op_type: str, opset: int, attrs: bytes, types: tuple[OperandType, ...], outputs: int) -> Rule | None:
    body = _body(op_type, opset, attrs, types, outputs)
    if body is None:
        return None
    reached = _differentiable_operands(body, opset, types)
    if reached is None:
        return None
    formulas = tuple(_formula(body, k) if k in reached else None for k in range(len(types)))
    since = onnx.defs.get_schema(op_type, opset, "").since_version
    return Rule(op_type, "", since, formulas, multi=True, note="derived from ONNX's function body")


# -- the body --


@dataclass(frozen=True)
class _Node:
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class _Body:
    """A function body whose attribute references are filled in."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[_Node, ...]


def _body(op_type: str, opset: int, attrs: bytes, types: Sequence[OperandType], outputs: int) -> _Body | None:
    schema: Any = onnx.defs.get_schema(op_type, opset, "")
    call = onnx.NodeProto.FromString(attrs)
    call.input.extend("" if t is None else f"x{k}" for k, t in enumerate(types))
    call.output.extend(f"y{k}" for k in range(outputs))
    data = _context_body(schema, opset, call, types) if schema.has_context_dependent_function else b""
    if not data and schema.has_function and schema.function_opset_versions[0] <= opset:
        data = schema.get_function_with_opset_version(opset)
    if not data:
        return None
    function = onnx.FunctionProto.FromString(data)
    written_for = next((o.version for o in function.opset_import if o.domain in ("", "ai.onnx")), opset)
    given = {a.name: a for a in call.attribute}
    nodes = []
    for node in function.node:
        if node.domain not in ("", "ai.onnx") or not _same_meaning(node, written_for, opset):
            return None
        filled = {}
        for a in node.attribute:
            if a.ref_attr_name:
                if a.ref_attr_name in given:
                    filled[a.name] = _value(given[a.ref_attr_name])
            elif a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                return None  # a branch or loop inside the body
            else:
                filled[a.name] = _value(a)
        nodes.append(_Node(node.op_type, tuple(node.input), tuple(node.output), tuple(sorted(filled.items()))))
    return _Body(tuple(function.input), tuple(function.output), tuple(nodes))


def _context_body(schema: Any, opset: int, call: onnx.NodeProto, types: Sequence[OperandType]) -> bytes:
    versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
    if not versions:
        return b""
    kinds = []
    for t in types:
        if t is None:
            kinds.append(onnx.TypeProto().SerializeToString())
        else:
            shape = None if t[1] is None else list(t[1])
            kinds.append(
                onnx.helper.make_tensor_type_proto(dtypes.onnx_dtype(_numpy(t[0])), shape).SerializeToString()
            )
    try:
        return schema.get_context_dependent_function_with_opset_version(max(versions), call.SerializeToString(), kinds)
    except RuntimeError:  # onnx declines: the body exists only in other circumstances
        return b""


def _numpy(name: str) -> np.dtype:
    if name == "bfloat16":
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16))
    return np.dtype(name)


def _value(a: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(a)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return gs.Constant("", onnx.numpy_helper.to_array(value))
    return tuple(value) if isinstance(value, list) else value


def _same_meaning(node: onnx.NodeProto, written_for: int, opset: int) -> bool:
    """Whether a body's node, written for an older opset, is valid as it stands: its attributes still exist."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return False
    known = set(schema.attributes)
    if schema.deprecated or len(node.input) > schema.max_input:
        return False
    return all(a.name in known for a in node.attribute)


# -- instantiation and reverse mode --


@dataclass
class _Made:
    """A body instantiated on operands: its values by name, and the emitted node behind each of the body's nodes."""

    values: dict[str, gs.Tensor | None]
    nodes: list[tuple[_Node, gs.Node | None]]


def _instantiate(op: Emitter, body: _Body, operands: Sequence[gs.Tensor | None]) -> _Made:
    values: dict[str, gs.Tensor | None] = {"": None, **dict.fromkeys(body.inputs)}
    values.update(zip(body.inputs, operands, strict=False))
    nodes: list[tuple[_Node, gs.Node | None]] = []
    for node in body.nodes:
        inputs = [values[name] for name in node.inputs]
        attrs = dict(node.attrs)
        if node.op == "Constant":
            values[node.outputs[0]] = op.constant(_constant(attrs))
            continue
        if node.op == "CastLike" and inputs[0] is not None and inputs[1] is not None:
            x, dtype = inputs[0], op.dtype(inputs[1])
            known = op.value(x)
            if known is not None:
                values[node.outputs[0]] = op.constant(known.astype(dtype))
                continue
            made: Any = op.cast(x, dtype)
            values[node.outputs[0]] = made
            nodes.append((node, None if made is x else made.inputs[0]))
            continue
        if node.op == "Identity":
            values[node.outputs[0]] = inputs[0]
            nodes.append((node, None))
            continue
        made = op.emit(node.op, *inputs, outputs=len(node.outputs), **_emittable(attrs))
        made = (made,) if len(node.outputs) == 1 else made
        values.update((name, t) for name, t in zip(node.outputs, made, strict=True) if name)
        nodes.append((node, made[0].inputs[0]))
    return _Made(values, nodes)


def _emittable(attrs: dict[str, Any]) -> dict[str, Any]:
    return {k: ir.values(v) if isinstance(v, gs.Constant) else v for k, v in attrs.items()}


def _constant(attrs: dict[str, Any]) -> np.ndarray:
    name, value = next(iter(attrs.items()))
    if name == "value":
        return ir.values(value)
    return np.asarray(value, np.float32 if "float" in name else np.int64)


def _paths(op: Emitter, body: _Body, made: _Made, start: set[str]) -> tuple[set[str], bool]:
    """Names of the body's values that depend differentiably on ``start``, and whether all rules on the way exist."""
    found, complete = set(start), True
    for node, emitted in made.nodes:
        carried = [k for k, name in enumerate(node.inputs) if name in found and _passes(op, node, emitted, made, k)]
        if not carried:
            continue
        if emitted is not None and table.lookup(emitted, op.graph.opset) is None:
            complete = False
        for name in node.outputs:
            value = made.values.get(name)
            if value is not None and np.dtype(op.dtype(value)).name in dtypes.FLOATS:
                found.add(name)
    return found, complete


def _passes(op: Emitter, node: _Node, emitted: gs.Node | None, made: _Made, k: int) -> bool:
    if emitted is None or node.op == "CastLike":
        value = made.values[node.inputs[0]]
        return k == 0 and value is not None and np.dtype(op.dtype(value)).name in dtypes.FLOATS
    for output in emitted.outputs:
        op.dtype(output)
    op.dtype(emitted.inputs[k])
    return table.is_differentiable_operand(emitted, k, op.graph.opset)


def _differentiable_operands(body: _Body, opset: int, types: Sequence[OperandType]) -> set[int] | None:
    """Operands with a differentiable path to an output; None if a rule on such a path is missing."""
    graph = gs.Graph(opset=opset)
    op = Emitter(graph)
    operands = [
        None if t is None else gs.Variable(f"x{k}", dtype=_numpy(t[0]), shape=None if t[1] is None else list(t[1]))
        for k, t in enumerate(types)
    ]
    made = _instantiate(op, body, operands)
    reached = set()
    for k, name in enumerate(body.inputs[: len(types)]):
        value = operands[k]
        if value is None or np.dtype(value.dtype).name not in dtypes.FLOATS:
            continue
        found, complete = _paths(op, body, made, {name})
        if any(out in found for out in body.outputs):
            if not complete:
                return None
            reached.add(k)
    return reached


def _formula(body: _Body, operand: int) -> Callable[..., gs.Tensor | None]:
    """Reverse mode through the body, contributions added in reverse topological order."""

    def formula(op: Emitter, g: Any, y: Any, *operands: Any, **_: Any) -> gs.Tensor | None:
        made = _instantiate(op, body, operands)
        target = body.inputs[operand]
        found, _complete = _paths(op, body, made, {target})
        cotangents: dict[str, gs.Tensor] = {}
        for name, cotangent in zip(body.outputs, g, strict=False):
            if cotangent is not None and name in found:
                _add(op, cotangents, name, cotangent)
        for node, emitted in reversed(made.nodes):
            arriving = [cotangents.get(name) for name in node.outputs]
            if all(a is None for a in arriving):
                continue
            for k, name in enumerate(node.inputs):
                if name not in found or not _passes(op, node, emitted, made, k):
                    continue
                if emitted is None:
                    passed = arriving[0]
                elif node.op == "CastLike":
                    passed = op.cast(arriving[0], op.dtype(made.values[name]))
                else:
                    passed = table.vjp(op, emitted, k, arriving)
                if passed is not None:
                    _add(op, cotangents, name, passed)
        return cotangents.get(target)

    return formula


def _add(op: Emitter, cotangents: dict[str, gs.Tensor], name: str, more: gs.Tensor) -> None:
    cotangents[name] = op.Add(cotangents[name], more) if name in cotangents else more
