"""Straight-through estimation: which quantised tensors carry the gradient."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from zilc import dtypes
from zilc.errors import ModelError, describe_vertex
from zilc.graph import Rebuild, is_standard

#: Operators that compute with integers where a QDQ model computes with floating-point numbers.
INTEGER = frozenset({"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"})


def pass_through(graph: gs.Graph, opset: int, where: str) -> tuple[gs.Graph, list[str]]:
    """A new graph in which what lies between QuantizeLinear and DequantizeLinear carries the gradient.

    Both stay vertices of their own: the cotangent of the quantised tensor is that of the dequantised one, and passes
    QuantizeLinear where it did not saturate.

    Requires: acyclic(graph).
    Ensures:  outputs equal to those of graph.  Also gives the names of the QuantizeLinear vertices.

    Raises:
        ModelError: the model computes with integers, or nothing in it is quantised and dequantised.
    """
    integer = [n for n in graph.nodes if n.op in INTEGER and is_standard(n)]
    if integer:
        shown = ", ".join(describe_vertex(n.name or n.outputs[0].name, n.op, opset=opset) for n in integer[:4])
        more = f" and {len(integer) - 4} more" if len(integer) > 4 else ""
        raise ModelError(
            f"{shown}{more} compute with integers: there is no floating-point operator to differentiate",
            where=where,
            hint="Quantise the model in QDQ format instead: quantize_static(..., quant_format=QuantFormat.QDQ).",
        )
    rebuild = Rebuild(graph)
    names = []
    for node in graph.nodes:
        made = rebuild.add(node)
        if node.op == "QuantizeLinear" and any(n.op == "DequantizeLinear" for n in node.outputs[0].outputs):
            setattr(made.outputs[0], dtypes.STRAIGHT, True)
            names.append(node.name or node.outputs[0].name)
    if not names:
        raise ModelError(
            "no QuantizeLinear whose output a DequantizeLinear reads", where=where, hint="Leave out --straight-through."
        )
    return rebuild.finish(), names
