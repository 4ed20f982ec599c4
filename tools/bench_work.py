"""How much a training step of tools/bench.py computes: operations of its products, by the shapes of its graph."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
import onnx.shape_inference

PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def step_operations(model: onnx.ModelProto) -> float:
    """Multiplications and additions of a graph's convolutions and matrix products.

    They are nominal: what the plainest form takes, whatever the kernels do.

    Args:
        model: with static shapes.

    Raises:
        ValueError: a product's shapes cannot be inferred.
    """
    # Not what the graph's own shapes say: they need not be there.
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    graph = inferred.graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    for info in (*graph.input, *graph.output, *graph.value_info):
        dims = info.type.tensor_type.shape.dim
        if all(d.HasField("dim_value") for d in dims):
            shapes[info.name] = tuple(d.dim_value for d in dims)
    return sum(_operations(node, shapes) for node in _nodes(graph))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The products of a graph.

    Raises:
        ValueError: some are in a branch or a loop, which runs who knows how often.
    """
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH and any(n.op_type in PRODUCTS for n in attribute.g.node):
                raise ValueError(f"products within {node.op_type} '{node.name}'")
        if node.op_type in PRODUCTS and not node.domain:
            yield node


def _operations(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> float:
    missing = [name for name in (*node.input[:2], node.output[0]) if name not in shapes]
    if missing:
        raise ValueError(f"{node.op_type} '{node.name}': no shape of {', '.join(missing)}")
    x, w, y = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Conv":  # y [n, m, …], w [m, c/groups, …]
        return 2.0 * math.prod(y) * math.prod(w[1:])
    if node.op_type == "ConvTranspose":  # x [n, c, …], w [c, m/groups, …]
        return 2.0 * math.prod(x) * math.prod(w[1:])
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return 2.0 * math.prod(y) * (x[0] if node.op_type == "Gemm" and transposed else x[-1])
