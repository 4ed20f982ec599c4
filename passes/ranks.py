"""Numbers of dimensions that a model leaves open, or that runtimes take though ONNX does not allow them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc import ir
from zilc.emit import Emitter
from zilc.graph import Rebuild, is_standard

#: Operators whose attribute ``axis`` names a dimension of every operand that is listed here (None: of all).
_AXIS: dict[str, tuple[int, ...] | None] = {
    "Split": (0,), "Concat": None, "Gather": (0,), "GatherElements": (0, 1), "ScatterElements": (0, 1, 2),
    "Softmax": (0,), "LogSoftmax": (0,), "Hardmax": (0,), "ArgMax": (0,), "ArgMin": (0,), "TopK": (0,),
    "LayerNormalization": (0,),
}  # fmt: skip
#: Operators that want this many dimensions at the least.
_LEAST = {"Gemm": 2, "Conv": 3, "ConvTranspose": 3, "RNN": 3, "LSTM": 3, "GRU": 3, "MaxPool": 3, "AveragePool": 3}
#: Operators whose output has as many dimensions as their operand.
_SAME = frozenset({"Identity", "Cast", "CastLike", "Relu", "Tanh", "Sigmoid", "Neg", "Exp", "Sqrt", "Dropout"})


def settle_ranks(graph: gs.Graph) -> gs.Graph:
    """Squeeze without axes gets those that it must have meant.

    It takes away every dimension of size 1, so where a size is known only at run time not even the number of
    dimensions is known before.  A reader that names an axis beyond what would be left rules that out.

    Requires: acyclic(graph).
    Ensures:  outputs equal to those of graph, wherever graph has any.

    Before:  x [N, 1, 3] -> Squeeze -> y -> Split(axis=1)
    After:   x [N, 1, 3] -> Squeeze([1]) -> y [N, 3] -> Split(axis=1)
    """
    meant = {id(node): axes for node in graph.nodes for axes in [_axes(node)] if axes is not None}
    if not meant:
        return graph
    rebuild = Rebuild(graph)
    names = Emitter(graph).names
    for node in graph.nodes:
        made = rebuild.add(node)
        if id(node) in meant:
            name = f"{node.outputs[0].name}.axes"
            while name in names:
                name += "_"
            names.add(name)
            made.inputs.append(gs.Constant(name, np.asarray(meant[id(node)], np.int64)))
    return rebuild.finish()


def scalar_bounds(graph: gs.Graph) -> gs.Graph:
    """Bounds of a Range that hold one element in some dimensions lose those.

    ONNX asks for scalars, and its shape inference insists on them; runtimes, and ONNX's own function bodies
    (AffineGrid), do not.

    Requires: acyclic(graph).
    Ensures:  outputs equal to those of graph.

    Before:  n [1] -> Range
    After:   n [1] -> Reshape([]) -> Range
    """
    if not any(_loose(t) for node in graph.nodes if node.op == "Range" for t in node.inputs):
        return graph
    rebuild = Rebuild(graph)
    op = Emitter(gs.Graph(nodes=rebuild.nodes, opset=graph.opset), Emitter(graph).names)
    for node in graph.nodes:
        if node.op != "Range":
            rebuild.add(node)
            continue
        with op.place(node.name or node.outputs[0].name):
            bounds = []
            for tensor in node.inputs:
                bound = rebuild.tensor(tensor)
                if _loose(tensor):
                    bound = op.Reshape(bound, op.constant(np.zeros(0, np.int64)))
                    bound.dtype, bound.shape = tensor.dtype, []
                bounds.append(bound)
        rebuild.add(node, bounds)
    return rebuild.finish()


def _loose(tensor: gs.Tensor) -> bool:
    return bool(tensor.shape) and all(n == 1 for n in tensor.shape)


def _axes(node: gs.Node) -> list[int] | None:
    """The axes of a Squeeze without any, where they follow."""
    if node.op != "Squeeze" or not is_standard(node) or node.attrs.get("axes"):
        return None
    if len(node.inputs) > 1 and node.inputs[1].name:
        return None
    dims = node.inputs[0].shape
    if dims is None:
        return None
    gone = [k for k, n in enumerate(dims) if n == 1]
    left = len(dims) - len(gone)
    unknown = any(not isinstance(n, (int, np.integer)) for n in dims)
    return gone if unknown and _least(node.outputs[0]) >= left else None


def _least(tensor: gs.Tensor) -> int:
    """How many dimensions a tensor must have for its readers, at the least."""
    found = 0
    for node in tensor.outputs:
        if not is_standard(node):
            continue
        places = [k for k, t in enumerate(node.inputs) if t is tensor]
        if node.op in _SAME and 0 in places:
            found = max(found, _least(node.outputs[0]))
        if node.op in _LEAST and 0 in places:
            found = max(found, _LEAST[node.op])
        if node.op == "Transpose":
            found = max(found, len(node.attrs.get("perm") or ()))
        if node.op in _AXIS and (_AXIS[node.op] is None or set(places) & set(_AXIS[node.op] or ())):
            found = max(found, _reach(node.attrs.get("axis", 0)))
        if node.op.startswith("Reduce") and 0 in places:
            listed: Any = node.attrs.get("axes")
            if listed is None and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
                listed = ir.values(node.inputs[1]).reshape(-1)
            found = max([found, *(_reach(int(axis)) for axis in (() if listed is None else listed))])
    return found


def _reach(axis: int) -> int:
    return axis + 1 if axis >= 0 else -axis
