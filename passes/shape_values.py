"""Shapes that a model computes with more arithmetic than onnx's shape inference follows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from onnx.reference import ReferenceEvaluator

from zilc import dtypes

#: What exporters compute sizes and axes with.
_ARITHMETIC = frozenset(
    {"Abs", "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather",
     "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or",
     "Range", "ReduceProd", "ReduceSum", "Reshape", "ScatterND", "Size", "Slice", "Squeeze", "Sub", "Transpose",
     "Unsqueeze", "Where"}
)  # fmt: skip
#: Operators whose output's size is said by operands, and which operands.
_SIZED = {
    "CenterCropPad": (1,), "Col2Im": (1, 2), "ConstantOfShape": (0,), "Expand": (1,), "Pad": (1, 3), "Range": (0, 1, 2),
    "Reshape": (1,), "Resize": (3,), "Slice": (1, 2, 3, 4), "Split": (1,), "Tile": (1,), "TopK": (1,),
}  # fmt: skip
#: Sizes are short; longer tensors are somebody's data.
_LONGEST = 64


def infer_through_values(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Shapes of inner tensors, where those that are known decide about others by way of computed sizes.

    onnx propagates the values of sizes through a handful of operators; PyTorch's exporter also uses others
    (Mod and Reshape, for the bounds of a Slice of a Shape).  Here every value that hangs on nothing but constants and
    known dimensions is computed, shapes are inferred with it, and so on until nothing new is found.

    Args:
        proto: its ``value_info`` holds what is known already.

    Returns:
        the same nodes with more ``value_info``; ``proto`` itself where each tensor has its number of dimensions, and
        no size that is computed leaves one of them open.
    """
    while True:
        unknown, sized = _unknown(proto), _sized(proto)
        if not unknown and not sized:
            return proto
        values = _values(proto)
        if not unknown and not any(sizes <= values.keys() for sizes in sized):
            return proto
        folded = onnx.ModelProto()
        folded.CopyFrom(proto)
        nodes = [n for n in proto.graph.node if not n.output or n.output[0] not in values]
        del folded.graph.node[:]
        folded.graph.node.extend(nodes)
        held = {t.name for t in proto.graph.initializer}
        read = {name for n in nodes for name in n.input} | {o.name for o in proto.graph.output}
        folded.graph.initializer.extend(
            onnx.numpy_helper.from_array(a, n) for n, a in values.items() if n not in held and n in read
        )
        try:
            found = onnx.shape_inference.infer_shapes(folded, data_prop=True)
        except Exception:  # shapes contradict each other: told where it matters
            return proto
        before = {i.name: _known(i.type) for i in proto.graph.value_info if i.name not in unknown}
        # What sizes are computed from stays as open as it was: with its dimensions stated, onnx's inference of what is
        # emitted made 7 dimensions of a Reshape to 4 in a file of PyTorch's (a Concat of slices of a shape).
        news = [
            i for i in found.graph.value_info
            if i.type.tensor_type.HasField("shape")
            and (i.name in unknown or (_floating(i.type) and _known(i.type) > before.get(i.name, -1)))
        ]  # fmt: skip
        if not news:
            return proto
        made = onnx.ModelProto()
        made.CopyFrom(proto)
        names = {i.name for i in news}
        kept = [i for i in proto.graph.value_info if i.name not in names]
        del made.graph.value_info[:]
        made.graph.value_info.extend([*kept, *news])
        proto = made


def _unknown(proto: onnx.ModelProto) -> set[str]:
    """Tensors without a number of dimensions."""
    infos = {i.name: i.type for i in (*proto.graph.value_info, *proto.graph.output)}
    made = [name for n in proto.graph.node for name in n.output if name]
    kinds = {name: infos.get(name) for name in made}
    return {
        n for n, k in kinds.items()
        if k is None or (k.WhichOneof("value") in ("tensor_type", None) and not k.tensor_type.HasField("shape"))
    }  # fmt: skip


def _floating(kind: onnx.TypeProto) -> bool:
    dtype = dtypes.np_dtype(kind.tensor_type.elem_type)
    return dtype is not None and dtype.name in dtypes.FLOATS


def _known(kind: onnx.TypeProto) -> int:
    """How many dimensions are numbers."""
    return sum(d.HasField("dim_value") for d in kind.tensor_type.shape.dim)


def _sized(proto: onnx.ModelProto) -> list[set[str]]:
    """The tensors that say a size, of each node whose output's is computed by nodes and not all known."""
    infos = {i.name: i.type for i in proto.graph.value_info}
    made = {name for n in proto.graph.node if n.op_type != "Constant" for name in n.output if name}
    found = []
    for node in proto.graph.node:
        sizes = {node.input[k] for k in _SIZED.get(node.op_type, ()) if k < len(node.input) and node.input[k]}
        if node.domain not in ("", "ai.onnx") or not made & sizes:
            continue
        kinds = [infos[name] for name in node.output if name in infos and _floating(infos[name])]
        if any(_known(kind) < len(kind.tensor_type.shape.dim) for kind in kinds):
            found.append(sizes)
    return found


def _values(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Short integral tensors whose values are known."""
    infos = (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)
    dims = {i.name: i.type.tensor_type.shape.dim for i in infos if i.type.tensor_type.HasField("shape")}
    shapes = {n: [d.dim_value for d in ds] for n, ds in dims.items() if all(d.HasField("dim_value") for d in ds)}
    shapes |= {t.name: list(t.dims) for t in proto.graph.initializer}
    fed = {i.name for i in proto.graph.input}
    values = {t.name: a for t in proto.graph.initializer if t.name not in fed for a in [_short(t)] if a is not None}
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
    for node in proto.graph.node:
        if node.domain not in ("", "ai.onnx") or len(node.output) != 1:
            continue
        if node.op_type == "Constant":
            tensor = next((a.t for a in node.attribute if a.name == "value"), None)
            value = None if tensor is None else _short(tensor)
        elif node.op_type == "Shape" and node.input[0] in shapes:
            value = _evaluate(node, {node.input[0]: np.empty(shapes[node.input[0]], np.bool_)}, opset)
        elif node.op_type in _ARITHMETIC and node.input and all(n in values for n in node.input if n):
            value = _evaluate(node, {n: values[n] for n in node.input if n}, opset)
        else:
            value = None
        if value is not None:
            values[node.output[0]] = value
    return values


def _short(tensor: onnx.TensorProto) -> np.ndarray | None:
    integral = tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
    if not integral or tensor.data_location == onnx.TensorProto.EXTERNAL or np.prod(tensor.dims) > _LONGEST:
        return None
    return onnx.numpy_helper.to_array(tensor)


def _evaluate(node: onnx.NodeProto, feeds: Mapping[str, np.ndarray], opset: int) -> np.ndarray | None:
    """One node by onnx's reference evaluator; None where it is not short and integral, or fails."""
    infos = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), list(x.shape))
        for n, x in feeds.items()
    ]
    output = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.UNDEFINED, None)
    graph = onnx.helper.make_graph([node], "one", infos, [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = np.asarray(next(iter(ReferenceEvaluator(model).run(None, dict(feeds)))))
    except Exception:  # a node that cannot run is told by whoever runs the model
        return None
    return made if made.dtype.kind in "iub" and made.size <= _LONGEST else None
