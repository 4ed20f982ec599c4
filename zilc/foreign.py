"""What is known of operators outside ONNX's default domain: types of their outputs, and what they compute.

Filled by :mod:`zilc.rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.helper
import onnx_graphsurgeon as gs
from onnx.reference.op_run import OpRun

from zilc.errors import OptionError


class TensorType(NamedTuple):
    """dtype and shape of a tensor: ints, names of symbolic dimensions, None for unknown ones; None for all unknown."""

    dtype: np.dtype
    shape: list[int | str | None] | None


Infer = Callable[..., Any]
Compute = Callable[..., Any]


@dataclass(frozen=True)
class Operator:
    """One operator of a custom domain.

    Attributes:
        infer: ``infer(*operand types, **attributes)``: the type of the output, or a list of them.
        compute: ``compute(*arrays, **attributes)``: the output in NumPy, or a tuple; None where nothing says.
    """

    infer: Infer | None = None
    compute: Compute | None = None


#: By (domain, operator).
OPERATORS: dict[tuple[str, str], Operator] = {}


def outputs_of(domain: str, op: str, types: list[TensorType | None], attrs: dict[str, Any]) -> list[TensorType] | None:
    """Types of an operator's outputs; None where its inference is not registered, or an operand's type is unknown.

    Raises:
        OptionError: the registered function fails.
    """
    entry = OPERATORS.get((domain, op))
    if entry is None or entry.infer is None:
        return None
    try:
        found = entry.infer(*types, **attrs)
        several = isinstance(found, list)
        each = found if several else [found]
        made = [TensorType(np.dtype(t[0]), None if t[1] is None else list(t[1])) for t in each]
    except Exception as error:
        raise OptionError(
            f"its infer function fails ({type(error).__name__}: {error})",
            where=f"operator {domain}.{op}",
            hint="It takes the operands' types, attributes by keyword, and gives (dtype, shape), or a list of them.",
        ) from error
    return made


def add_types(model: onnx.ModelProto) -> bool:
    """State the types of what registered operators make, as far as their operands' are stated (in place)."""
    from zilc import dtypes, onnx_io

    if not any((n.domain, n.op_type) in OPERATORS for n in model.graph.node):
        return False
    graph, changed = model.graph, False
    types: dict[str, TensorType] = {}
    for info in (*graph.input, *graph.output, *graph.value_info):
        kind = info.type.tensor_type
        dtype = dtypes.np_dtype(kind.elem_type) if kind.elem_type else None
        if dtype is not None:
            types[info.name] = TensorType(dtype, onnx_io.stated_shape(kind))
    for tensor in graph.initializer:
        types[tensor.name] = TensorType(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), list(tensor.dims))
    for node in graph.node:
        if all(types.get(name) is not None and types[name].shape is not None for name in node.output if name):
            continue
        if any(name and name not in types for name in node.input):
            continue
        attrs = {a.name: _plain(onnx.helper.get_attribute_value(a)) for a in node.attribute}
        made = outputs_of(node.domain, node.op_type, [types.get(name) for name in node.input], attrs)
        for name, kind in zip(node.output, made or [], strict=False):
            if not name or (name in types and types[name].shape is not None) or types.get(name) == kind:
                continue
            types[name], changed = kind, True
            stated = onnx.helper.make_tensor_value_info(name, dtypes.onnx_dtype(kind.dtype), kind.shape)
            held = next((i for i in (*graph.output, *graph.value_info) if i.name == name), None)
            if held is not None:
                held.CopyFrom(stated)
            else:
                graph.value_info.append(stated)
    return changed


def infer_types(node: gs.Node) -> list[TensorType] | None:
    """Types of what a registered operator makes in a graph under construction."""
    from zilc import dtypes

    types: list[TensorType | None] = []
    for tensor in node.inputs:
        dtype = dtypes.np_dtype(tensor.dtype)
        if tensor.name and dtype is None:
            return None
        types.append(TensorType(dtype, None if tensor.shape is None else list(tensor.shape)) if dtype else None)
    return outputs_of(node.domain or "", node.op, types, dict(node.attrs))


def evaluated(model: onnx.ModelProto) -> Iterator[type[OpRun]]:
    """The registered operators of a model, for ONNX's reference evaluator.

    Raises:
        OptionError: nothing says what one of them computes.
    """
    for domain, op in sorted({(n.domain, n.op_type) for n in model.graph.node if n.domain not in ("", "ai.onnx")}):
        entry = OPERATORS.get((domain, op))
        if entry is None:
            continue
        if entry.compute is None:
            raise OptionError(
                "onnxruntime does not run it in float64, and nothing else says what it computes",
                where=f"operator {domain}.{op}",
                hint="Give it a compute function: zilc.rules.operator(..., compute=...).",
            )
        yield _evaluated(domain, op, entry.compute)


def _evaluated(domain: str, op: str, compute: Compute) -> type[OpRun]:
    def _run(self: Any, *arrays: Any, **_: Any) -> tuple[Any, ...]:
        attrs = {a.name: _plain(onnx.helper.get_attribute_value(a)) for a in self.onnx_node.attribute}
        found = compute(*arrays, **attrs)
        return found if isinstance(found, tuple) else (np.asarray(found),)

    return type(op, (OpRun,), {"op_domain": domain, "_run": _run})


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
