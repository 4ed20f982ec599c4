"""GraphSurgeon's graph, which passes work on, from a model and back.

What GraphSurgeon drops (node and model metadata, doc strings, where external data lies) is carried here, and its
logger, which writes to stdout, is kept silent.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.shape_inference
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter, dtype_to_onnx
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from zilc import dtypes, onnx_io


class ExternalValues(LazyValues):
    """Values in another file, mapped when asked for."""

    def __init__(self, tensor: onnx.TensorProto, base_dir: str) -> None:
        super().__init__(tensor)
        self.base_dir = base_dir

    def load(self) -> np.ndarray:
        return onnx_io.read_tensor(self.tensor, self.base_dir)


class FilledValues(LazyValues):
    """One value everywhere, as ConstantOfShape makes it; written back as that operator."""

    def __init__(self, shape: Sequence[int], value: np.generic) -> None:
        self.tensor = onnx.TensorProto()
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(value.dtype)
        self.value = value
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def load(self) -> np.ndarray:
        return np.full(self.shape, self.value, dtype=self.dtype)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """GraphSurgeon logs to stdout, which belongs to results."""
    old = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.CRITICAL
    try:
        yield
    finally:
        G_LOGGER.severity = old


def to_graph(
    proto: onnx.ModelProto, base_dir: str = "", aside: Sequence[onnx.TensorProto] = ()
) -> gs.Graph:
    """GraphSurgeon's graph of a model, with metadata on nodes (``node.metadata``, ``node.doc_string``).

    Args:
        base_dir: where external data lies.
        aside: initializers that stand among the graph's inputs (:func:`zilc.onnx_io.set_aside`).
    """
    with quiet():
        graph = gs.import_onnx(proto)
    weights = {t.name: t for t in aside}
    for tensor in graph.inputs:
        if tensor.name in weights:
            tensor.to_constant(LazyValues(weights[tensor.name]))
    graph.inputs = [t for t in graph.inputs if t.name not in weights]
    graph.import_domains = [onnx.helper.make_opsetid(o.domain, o.version) for o in proto.opset_import]
    for node, original in zip(graph.nodes, proto.graph.node, strict=True):
        node.metadata = {p.key: p.value for p in original.metadata_props}
        node.doc_string = original.doc_string
        for name, value in list(node.attrs.items()):
            # GraphSurgeon cannot tell an empty list's type when it exports it.
            if isinstance(value, list) and not value:
                node.attrs[name] = EmptyList(next(a.type for a in original.attribute if a.name == name))
    graph.metadata = {p.key: p.value for p in proto.metadata_props}
    for tensor in tensors(graph).values():
        if isinstance(tensor, gs.Constant):
            lazy = tensor._values
            if isinstance(lazy, LazyValues) and lazy.tensor.data_location == onnx.TensorProto.EXTERNAL:
                tensor._values = ExternalValues(lazy.tensor, base_dir)
        elif tensor.dtype is not None and isinstance(tensor.dtype, int):
            tensor.dtype = dtypes.np_dtype(tensor.dtype) or tensor.dtype
    _set_apart(graph)
    return graph


def _set_apart(graph: gs.Graph) -> None:
    """Constants of different subgraphs may share a name in a file; here a name is one tensor (in place)."""
    taken = {t.name: t for t in tensors(graph).values()}
    for inner in graph.subgraphs(recursive=True):
        for node in inner.nodes:
            for tensor in node.inputs:
                if not isinstance(tensor, gs.Constant) or taken.setdefault(tensor.name, tensor) is tensor:
                    continue
                name, count = tensor.name, 0
                while name in taken:
                    count += 1
                    name = f"{tensor.name}_{count}"
                tensor.name, taken[name] = name, tensor


class EmptyList(list):
    """An empty list attribute that remembers its ONNX attribute type."""

    def __init__(self, onnx_type: int) -> None:
        super().__init__()
        self.onnx_type = onnx_type


def subgraphs(node: gs.Node) -> list[gs.Graph]:
    """The graphs among a node's attributes; most nodes have none, and large graphs ask often."""
    return [value for value in node.attrs.values() if isinstance(value, gs.Graph)] if node.attrs else []


def tensors(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """Every tensor of the graph by name, in the order inputs, node outputs and operands, outputs.

    Operands of a control-flow node are what its subgraphs read from outside too, their constants among it.
    """
    found: dict[str, gs.Tensor] = {t.name: t for t in graph.inputs}
    for node in graph.nodes:
        for tensor in node.inputs:
            if tensor.name:
                found.setdefault(tensor.name, tensor)
        for tensor in node.outputs:
            if tensor.name:
                found.setdefault(tensor.name, tensor)
        for inner in subgraphs(node):
            for tensor in foreign(inner):
                found.setdefault(tensor.name, tensor)
    for tensor in graph.outputs:
        found.setdefault(tensor.name, tensor)
    return found


def foreign(inner: gs.Graph) -> list[gs.Tensor]:
    """What a subgraph reads and does not make, in order of first use: outer tensors, and constants of its own."""
    made = {t.name for t in inner.inputs} | {t.name for node in inner.nodes for t in node.outputs}
    found: dict[str, gs.Tensor] = {}
    for node in inner.nodes:
        nested = [t for graph in subgraphs(node) for t in foreign(graph)]
        for tensor in (*node.inputs, *nested):
            if tensor.name and tensor.name not in made:
                found.setdefault(tensor.name, tensor)
    for tensor in inner.outputs:
        if tensor.name and tensor.name not in made:
            found.setdefault(tensor.name, tensor)
    return list(found.values())


def values(tensor: gs.Constant) -> np.ndarray:
    """A constant's array, without making the constant keep it."""
    return load_values(tensor._values)


def load_values(held: np.ndarray | LazyValues) -> np.ndarray:
    """The array behind a constant's values, in the dtype of the file (GraphSurgeon would widen bfloat16)."""
    if not isinstance(held, LazyValues):
        return held
    if isinstance(held, (FilledValues, SparseValues)):
        return held.load()
    return onnx_io.read_tensor(held.tensor, getattr(held, "base_dir", ""))


def copy_values(held: np.ndarray | LazyValues) -> np.ndarray | LazyValues:
    """The same values for a constant of another name: GraphSurgeon writes a constant's name into lazy values."""
    if not isinstance(held, LazyValues):
        return held
    made = copy.copy(held)
    made.tensor = type(held.tensor)()
    made.tensor.CopyFrom(held.tensor)
    return made


def to_proto(graph: gs.Graph, *, ir_version: int | None = None, infer: bool = False) -> onnx.ModelProto:
    """The model of a graph, node metadata included.

    Args:
        ir_version: at least 10 where nodes carry metadata.
        infer: fill in the shapes of all tensors (onnx's shape inference, strict).
    """
    with quiet():
        if graph.functions:
            proto = gs.export_onnx(_with_exportable_attributes(graph), do_type_check=False)
        else:
            proto = _export(graph)
    for node, made in zip(graph.nodes, proto.graph.node, strict=True):
        for name, value in node.attrs.items():
            if isinstance(value, EmptyList):
                made.attribute.append(onnx.AttributeProto(name=name, type=value.onnx_type))  # type: ignore[arg-type]
        made.doc_string = getattr(node, "doc_string", "") or ""
        for key, value in (getattr(node, "metadata", None) or {}).items():
            entry = made.metadata_props.add()
            entry.key, entry.value = key, str(value)
    _write_filled(graph, proto)
    _strip_shadows(proto.graph, {i.name for i in (*proto.graph.input, *proto.graph.initializer)})
    del proto.opset_import[:]
    used = _used_domains(proto.graph.node)
    for entry in graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)]:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if domain in used or domain == "":
            version = graph.opset if domain == "" else entry.version
            proto.opset_import.append(onnx.helper.make_opsetid(domain, version))
    if "" not in {o.domain for o in proto.opset_import}:  # a model of other domains alone: what is emitted is not
        proto.opset_import.append(onnx.helper.make_opsetid("", graph.opset))
    # Not getattr: GraphSurgeon takes an unknown name for an operator, and complains on stdout.
    for key, value in (vars(graph).get("metadata") or {}).items():
        proto.metadata_props.append(onnx.StringStringEntryProto(key=key, value=value))
    proto.ir_version = ir_version or graph.ir_version or 10
    if infer:
        light, aside = onnx_io.set_aside(proto)
        light = onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True, data_prop=True)
        if not aside:
            return light
        onnx_io.put_back(light, proto)
    return proto


def _export(graph: gs.Graph) -> onnx.ModelProto:
    """What ``gs.export_onnx`` writes, written in place: it makes each node and each type twice and copies them.

    Attributes, constants and whatever is no plain tensor are GraphSurgeon's to write.
    """
    proto = onnx.helper.make_model(onnx.GraphProto(), opset_imports=graph.import_domains or [])
    proto.producer_name, proto.producer_version = graph.producer_name, graph.producer_version
    if graph.ir_version is not None:
        proto.ir_version = graph.ir_version
    made = proto.graph
    made.name = graph.name
    if graph.doc_string:
        made.doc_string = graph.doc_string
    found: dict[str, gs.Tensor] = {t.name: t for t in graph.inputs}
    for node in graph.nodes:
        entry = made.node.add()
        entry.op_type = node.op
        if node.name:
            entry.name = node.name
        if node.domain is not None:
            entry.domain = node.domain
        for tensor in node.inputs:
            entry.input.append(tensor.name)
            found[tensor.name] = tensor
        for tensor in node.outputs:
            entry.output.append(tensor.name)
            found[tensor.name] = tensor
        if node.attrs:
            attrs = {k: v for k, v in node.attrs.items() if not isinstance(v, EmptyList)}
            entry.attribute.extend(OnnxExporter.export_attributes(attrs))
    found.update((t.name, t) for t in graph.outputs)
    found.pop("", None)
    interface = {t.name for t in (*graph.inputs, *graph.outputs)}
    kinds: dict[Any, int] = {}
    for tensor in graph.inputs:
        _export_type(tensor, made.input, kinds)
    for tensor in graph.outputs:
        _export_type(tensor, made.output, kinds)
    for name, tensor in found.items():
        if isinstance(tensor, gs.Constant):
            if isinstance(tensor._values, SparseValues):
                made.sparse_initializer.append(OnnxExporter.export_sparse_tensor_proto(tensor))
            else:
                made.initializer.append(OnnxExporter.export_tensor_proto(tensor))
        elif name not in interface and (tensor.dtype is not None or tensor.shape is not None):
            _export_type(tensor, made.value_info, kinds)
    return proto


def _export_type(tensor: gs.Tensor, infos: Any, kinds: dict[Any, int]) -> None:
    """Append the type of a tensor to a list of ValueInfoProto; ``kinds`` keeps ONNX's numbers of dtypes."""
    shape, dtype = tensor.shape, tensor.dtype
    plain = shape is None or all(n is None or isinstance(n, (int, str)) for n in shape)
    if dtype is None or not plain or getattr(tensor, "type", "tensor_type") != "tensor_type":
        infos.append(OnnxExporter.export_value_info_proto(tensor, False))
        return
    number = kinds.get(dtype)
    if number is None:
        number = kinds[dtype] = dtype_to_onnx(dtype)
    info = infos.add()
    info.name = tensor.name
    kind = info.type.tensor_type
    kind.elem_type = number
    if shape is None:
        return
    kind.shape.dim.extend([])  # rank 0 is not the same as unknown
    for n in shape:
        dim = kind.shape.dim.add()
        if isinstance(n, int):
            dim.dim_value = n
        elif n is not None:
            dim.dim_param = n


def _strip_shadows(graph: onnx.GraphProto, outer: set[str]) -> None:
    """GraphSurgeon writes a constant into every graph that reads it; where an outer graph has it, that one holds."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type != onnx.AttributeProto.GRAPH:
                continue
            inner = attribute.g
            made = {i.name for i in inner.input} | {name for n in inner.node for name in n.output}
            kept = [t for t in inner.initializer if t.name not in outer]
            if len(kept) < len(inner.initializer):
                del inner.initializer[:]
                inner.initializer.extend(kept)
            # Shapes of outer tensors are noted outside.
            infos = [v for v in inner.value_info if v.name in made]
            del inner.value_info[:]
            inner.value_info.extend(infos)
            _strip_shadows(inner, outer | {t.name for t in kept})


def _used_domains(nodes: Any) -> set[str]:
    """Operator domains of nodes and of their subgraphs."""
    used: set[str] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        used.add("" if node.domain == "ai.onnx" else node.domain)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                stack.extend(attribute.g.node)
    return used


def _with_exportable_attributes(graph: gs.Graph) -> gs.Graph:
    """The same graph, empty-list attributes set aside (GraphSurgeon cannot export them)."""
    if not any(isinstance(v, EmptyList) for n in graph.nodes for v in n.attrs.values()):
        return graph
    shell = gs.Graph(
        inputs=graph.inputs, outputs=graph.outputs, name=graph.name, doc_string=graph.doc_string,
        opset=graph.opset, import_domains=graph.import_domains, functions=graph.functions,
        producer_name=graph.producer_name, producer_version=graph.producer_version, ir_version=graph.ir_version,
    )  # fmt: skip
    nodes = []
    for node in graph.nodes:
        if any(isinstance(v, EmptyList) for v in node.attrs.values()):
            attrs = {k: v for k, v in node.attrs.items() if not isinstance(v, EmptyList)}
            stand_in = gs.Node.__new__(gs.Node)
            for key, value in (("op", node.op), ("name", node.name), ("attrs", attrs), ("domain", node.domain)):
                object.__setattr__(stand_in, key, value)
            object.__setattr__(stand_in, "inputs", node.inputs)
            object.__setattr__(stand_in, "outputs", node.outputs)
            node = stand_in
        nodes.append(node)
    shell.nodes = nodes
    return shell


def _write_filled(graph: gs.Graph, proto: onnx.ModelProto) -> None:
    """Constants of one repeated value go out as ConstantOfShape, so that a small file stays small."""
    filled = {
        t.name: t._values
        for t in tensors(graph).values()
        if isinstance(t, gs.Constant) and isinstance(t._values, FilledValues)
    }
    if not filled:
        return
    kept = [t for t in proto.graph.initializer if t.name not in filled]
    nodes = []
    for name, fill in filled.items():
        shape = onnx.numpy_helper.from_array(np.asarray(fill.shape, np.int64), f"{name}.shape")
        kept.append(shape)
        value = onnx.numpy_helper.from_array(np.asarray([fill.value], fill.dtype), "")
        nodes.append(onnx.helper.make_node("ConstantOfShape", [shape.name], [name], name=f"{name}.fill", value=value))
    body = list(proto.graph.node)
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.initializer.extend(kept)
    proto.graph.node.extend(nodes + body)
