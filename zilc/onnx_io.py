"""File to GraphSurgeon graph and back: the only door to protobuf.

GraphSurgeon's graph is the IR.  What it drops (node and model metadata, doc strings, where external data
lies) is carried here, and its logger, which writes to stdout, is kept silent.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import math
import mmap
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnx.checker
import onnx.external_data_helper
import onnx.helper
import onnx.numpy_helper
import onnx.shape_inference
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter, dtype_to_onnx
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from zilc.errors import FileError, ModelError

#: The newest IR version and opset that the runtimes of the day load.
MAX_IR_VERSION = 13
MAX_OPSET = 26
MIN_OPSET = 18
#: Above this many bytes of initializers a written model keeps them in a file beside it (protobuf's limit is 2 GiB).
EMBED_LIMIT = 1 << 30
#: Initializers of more elements than this are no shapes, axes or indices that inference would look at.
ASIDE = 1024

FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})

ModelSource = str | os.PathLike[str] | bytes | onnx.ModelProto


@dataclass
class Source:
    """A model as it came in.  ``proto`` is never changed; external data is not loaded.

    Attributes:
        proto: the model.
        path: the file, or None for bytes and protos.
        base_dir: the folder that external data locations are relative to.
    """

    proto: onnx.ModelProto
    path: Path | None = None
    base_dir: str = ""

    @property
    def name(self) -> str:
        return str(self.path) if self.path else (self.proto.graph.name or "model")

    def digest(self) -> str:
        return hashlib.sha256(serialize(self.proto)).hexdigest()


def load(source: ModelSource | Source, *, base_dir: str | os.PathLike[str] | None = None) -> Source:
    """Read a model from a path, bytes or a ModelProto, and check it.

    Raises:
        FileError: the file cannot be read.
        ModelError: it is not a whole, valid ONNX model.
    """
    if isinstance(source, Source):
        return source
    path: Path | None = None
    if isinstance(source, onnx.ModelProto):
        proto = source
    else:
        if isinstance(source, (bytes, bytearray)):
            data, where = bytes(source), "model"
        else:
            path = Path(source)
            where = str(path)
            data = read_bytes(path)
        proto = _parse(data, where)
    folder = str(base_dir) if base_dir is not None else (str(path.parent) if path else "")
    _check(Source(proto, path, folder))
    return Source(_dense(proto), path, folder)


def _dense(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with sparse initializers as dense ones: a gradient has all entries, and so has what is trained."""
    if not proto.graph.sparse_initializer:
        return proto
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for sparse in proto.graph.sparse_initializer:
        values, places = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices)
        array = np.zeros(list(sparse.dims), values.dtype)
        # One number a place, in the order of the flattened tensor, or one for each dimension.
        array[np.unravel_index(places, array.shape) if places.ndim == 1 else tuple(places.T)] = values
        made.graph.initializer.append(onnx.numpy_helper.from_array(array, sparse.values.name))
    del made.graph.sparse_initializer[:]
    return made


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file.  Raises FileError with the reason."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise FileError("no such file", where=str(path), hint="Check the path.") from error
    except IsADirectoryError as error:
        raise FileError("is a folder, expected a file", where=str(path)) from error
    except OSError as error:
        raise FileError(f"cannot be read ({error.strerror})", where=str(path)) from error


def _parse(data: bytes, where: str) -> onnx.ModelProto:
    hint = "Expected a whole ONNX model (protobuf); export or copy it again."
    if not data:
        raise ModelError("the file is empty", where=where, hint=hint)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        text = _looks_like_text(data)
        what = "this is a text file, not an ONNX model" if text else "not an ONNX model, or cut short"
        raise ModelError(f"{what} ({len(data):,} bytes)", where=where, hint=hint) from error
    if not proto.HasField("graph") or not proto.opset_import:
        what = "this is a text file, not an ONNX model" if _looks_like_text(data) else "no graph or no opset in it"
        raise ModelError(what, where=where, hint=hint)
    return proto


def _looks_like_text(data: bytes) -> bool:
    head = data[:512]
    return all(byte in (9, 10, 13) or 32 <= byte < 127 or byte >= 128 for byte in head) and b"\x00" not in head


def _check(source: Source) -> None:
    """onnx's own structural check; external data must exist, and is not read."""
    proto = source.proto
    for tensor in external_tensors(proto):
        location = _external_info(tensor).location
        if not (Path(source.base_dir) / location).is_file():
            raise ModelError(
                f"external data file '{location}' of tensor '{tensor.name}' is not there",
                where=source.name,
                hint="Put it beside the model, or pass base_dir=.",
            )
    try:
        onnx.checker.check_model(set_aside(proto)[0])
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"onnx.checker refuses it: {reason}", where=source.name, hint="Export the model again."
        ) from error


def set_aside(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[onnx.TensorProto]]:
    """The model with its large and external initializers as graph inputs, and those initializers.

    Checking, converting and inferring need no large values; each of them would copy the whole model several times, and
    fails beyond 2 GiB.  The same model comes back if there is nothing to set aside.
    """
    graph = proto.graph
    aside = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL or _elements(t) > ASIDE]
    if not aside:
        return proto, []
    names = {t.name for t in aside}
    light = _without_initializers(proto)
    light.graph.initializer.extend(t for t in graph.initializer if t.name not in names)
    listed = {i.name for i in graph.input}
    for tensor in aside:
        if tensor.name not in listed:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            light.graph.input.append(info)
    return light, aside


def _without_initializers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that no large value was copied for."""
    made = onnx.ModelProto()
    _copy_fields(proto, made, but=("graph",))
    _copy_fields(proto.graph, made.graph, but=("initializer",))
    return made


def _copy_fields(source: Any, into: Any, *, but: Collection[str]) -> None:
    for descriptor, value in source.ListFields():
        if descriptor.name in but:
            continue
        if isinstance(value, (int, str, bytes)):
            setattr(into, descriptor.name, value)
        else:
            getattr(into, descriptor.name).extend(value)


#: Where a TensorProto may hold its numbers.
DATA_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def without_values(proto: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy in which the named initializers have their types, shapes and places, but no numbers."""
    made = _without_initializers(proto)
    for tensor in proto.graph.initializer:
        _copy_fields(tensor, made.graph.initializer.add(), but=DATA_FIELDS if tensor.name in names else ())
    return made


def put_back(light: onnx.ModelProto, proto: onnx.ModelProto) -> None:
    """Undo :func:`set_aside`: ``proto`` takes over what inference found on ``light`` (in place).

    Its initializers stay where they are: copying them would cost more than all else.
    """
    held = {t.name for t in proto.graph.initializer}
    listed = {i.name for i in proto.graph.input}
    inputs = [i for i in light.graph.input if i.name in listed or i.name not in held]
    graph = proto.graph
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(light.graph.node)
    graph.input.extend(inputs)
    graph.output.extend(light.graph.output)
    graph.value_info.extend(light.graph.value_info)


def _elements(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims)


def external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers whose data lies in another file."""
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor


def _external_info(tensor: onnx.TensorProto) -> Any:
    return onnx.external_data_helper.ExternalDataInfo(tensor)


class ExternalValues(LazyValues):
    """Values in another file, mapped when asked for."""

    def __init__(self, tensor: onnx.TensorProto, base_dir: str) -> None:
        super().__init__(tensor)
        self.base_dir = base_dir

    def load(self) -> np.ndarray:
        return read_tensor(self.tensor, self.base_dir)


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


def read_tensor(tensor: onnx.TensorProto, base_dir: str = "") -> np.ndarray:
    """The array of a TensorProto; external raw data is memory-mapped, so only what is used is read."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    info = _external_info(tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    path = Path(base_dir) / info.location
    try:
        if dtype.itemsize * np.prod(tensor.dims, dtype=np.int64) == 0:
            return np.zeros(tuple(tensor.dims), dtype)
        return np.memmap(path, dtype=dtype, mode="r", offset=info.offset or 0, shape=tuple(tensor.dims))
    except (OSError, ValueError) as error:
        raise FileError(f"external data of tensor '{tensor.name}' cannot be read ({error})", where=str(path)) from error


def read_here_and_there(array: np.ndarray) -> np.ndarray:
    """The same array; of a mapped file, the system reads no more than the pages that are asked for, where it can."""
    mapped = getattr(array, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return array


# --- protobuf -> IR -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """GraphSurgeon logs to stdout, which belongs to results."""
    old = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.CRITICAL
    try:
        yield
    finally:
        G_LOGGER.severity = old


def np_dtype(dtype: Any) -> np.dtype | None:
    """A GraphSurgeon dtype (numpy's, or ONNX's number) as numpy's; None if there is none."""
    if dtype is None:
        return None
    if isinstance(dtype, np.dtype):
        return dtype
    if isinstance(dtype, int):
        try:
            return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype))
        except (KeyError, TypeError):
            return None
    return np.dtype(dtype)


def lowest(dtype: np.dtype) -> float:
    """The lowest finite number of a floating dtype."""
    if dtype.kind == "f":
        return float(np.finfo(dtype).min)
    import ml_dtypes  # bfloat16 is no dtype of numpy's own

    return float(ml_dtypes.finfo(dtype).min)


def onnx_dtype(dtype: Any) -> int:
    return dtype if isinstance(dtype, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def is_float(tensor: gs.Tensor) -> bool:
    """Whether the tensor holds floating-point numbers (float16, bfloat16, float32 or float64)."""
    if getattr(tensor, "type", "tensor_type") not in ("tensor_type", None):
        return False
    return bool(_is_float_dtype(tensor.dtype))


@functools.cache
def _is_float_dtype(dtype: Any) -> bool | None:
    """Whether a GraphSurgeon dtype is floating; None if there is none.

    numpy works a dtype's name out each time, and large graphs ask often.
    """
    known = np_dtype(dtype)
    return None if known is None else known.name in FLOATS


def holds_float64(model: onnx.ModelProto) -> bool:
    """Whether an input or output of the model is float64."""
    interface = (*model.graph.input, *model.graph.output)
    return any(i.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE for i in interface)


#: Set on quantised tensors through which the gradient passes as if they were not.
STRAIGHT = "_zilc_straight"


def is_straight(tensor: gs.Tensor) -> bool:
    """Whether a quantised tensor carries the gradient (``--straight-through``)."""
    return bool(getattr(tensor, STRAIGHT, False))


def carry_straight(tensor: gs.Tensor, made: gs.Tensor) -> None:
    """Make ``made`` carry the gradient if ``tensor``, which it stands for, does."""
    if is_straight(tensor):
        setattr(made, STRAIGHT, True)


def may_hold_floats(tensor: gs.Tensor) -> bool:
    """Whether floating-point numbers may pass through: a floating tensor, one of unknown type, a sequence or optional.

    What a foreign operator makes has no type unless the file says so.
    """
    if getattr(tensor, "type", "tensor_type") not in ("tensor_type", None) or is_straight(tensor):
        return True
    return _is_float_dtype(tensor.dtype) is not False


def to_graph(
    proto: onnx.ModelProto, base_dir: str = "", aside: Sequence[onnx.TensorProto] = ()
) -> gs.Graph:
    """GraphSurgeon's graph of a model, with metadata on nodes (``node.metadata``, ``node.doc_string``).

    Args:
        base_dir: where external data lies.
        aside: initializers that stand among the graph's inputs (:func:`set_aside`).
    """
    with _quiet():
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
            tensor.dtype = np_dtype(tensor.dtype) or tensor.dtype
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
    return read_tensor(held.tensor, getattr(held, "base_dir", ""))


def copy_values(held: np.ndarray | LazyValues) -> np.ndarray | LazyValues:
    """The same values for a constant of another name: GraphSurgeon writes a constant's name into lazy values."""
    if not isinstance(held, LazyValues):
        return held
    made = copy.copy(held)
    made.tensor = type(held.tensor)()
    made.tensor.CopyFrom(held.tensor)
    return made


# --- IR -> protobuf -------------------------------------------------------------------------------------------


def to_proto(graph: gs.Graph, *, ir_version: int | None = None, infer: bool = False) -> onnx.ModelProto:
    """The model of a graph, node metadata included.

    Args:
        ir_version: at least 10 where nodes carry metadata.
        infer: fill in the shapes of all tensors (onnx's shape inference, strict).
    """
    with _quiet():
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
        light, aside = set_aside(proto)
        light = onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True, data_prop=True)
        if not aside:
            return light
        put_back(light, proto)
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


def infer_types(
    node: gs.Node, opset: int, domains: Sequence[Any] = ()
) -> list[tuple[np.dtype | None, list[int | str | None] | None]]:
    """dtype and shape of each output of one node, by onnx's inference; (None, None) where it cannot tell."""
    unknown: list[tuple[np.dtype | None, list[int | str | None] | None]] = [(None, None)] * len(node.outputs)
    if node.domain not in (None, "", "ai.onnx"):
        from zilc import foreign

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


#: What :func:`infer_types` found, by all that inference looks at: deep models repeat an operator on the same types.
_INFERRED: dict[tuple, list[tuple[np.dtype | None, list[int | str | None] | None]]] = {}
INFERRED_LIMIT = 4096


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
            data = values(tensor).tobytes()
        first = next(i for i, other in enumerate(node.inputs) if other.name == tensor.name)
        operands.append((k - first, tensor.dtype, shape, data))
    outputs = tuple(bool(t.name) for t in node.outputs)
    return node.op, opset, tuple(attrs), tuple(operands), outputs


def _infer_types(node: gs.Node, opset: int) -> list[tuple[np.dtype | None, list[int | str | None] | None]] | None:
    """:func:`infer_types` of an ONNX operator, by onnx; None where it fails."""
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
        with _quiet():
            made = OnnxExporter.export_node(node)
        types = {}
        data = {}
        for tensor in node.inputs:
            if not tensor.name or tensor.dtype is None:
                continue
            types[tensor.name] = onnx.helper.make_tensor_type_proto(onnx_dtype(tensor.dtype), tensor.shape)
            if isinstance(tensor, gs.Constant) and np.prod(tensor.shape, dtype=np.int64) <= 64:
                data[tensor.name] = onnx.numpy_helper.from_array(values(tensor), tensor.name)
        found = onnx.shape_inference.infer_node_outputs(
            schema, made, types, data, opset_imports=[onnx.helper.make_opsetid("", opset)]
        )
    except Exception:
        return None
    result: list[tuple[np.dtype | None, list[int | str | None] | None]] = []
    for tensor in node.outputs:
        kind = found.get(tensor.name)
        if kind is None or not kind.HasField("tensor_type"):
            result.append((None, None))
            continue
        shape = stated_shape(kind.tensor_type)
        if shape is None:
            shape = _rank_at_least(node)
        result.append((np_dtype(kind.tensor_type.elem_type), shape))
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


def shapes(proto: onnx.ModelProto) -> dict[str, list[int | str | None]]:
    """Shapes of a model's tensors as far as it states them: numbers, names of symbolic dimensions, None."""
    graph = proto.graph
    found = {i.name: stated_shape(i.type.tensor_type) for i in (*graph.input, *graph.output, *graph.value_info)}
    return {name: shape for name, shape in found.items() if shape is not None}


def stated_shape(kind: onnx.TypeProto.Tensor) -> list[int | str | None] | None:
    """A type's shape: numbers, names of symbolic dimensions, None for unknown ones; None where it states no rank."""
    if not kind.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]


def check_full(proto: onnx.ModelProto) -> None:
    """onnx.checker with full checks; what it raises is raised as it is."""
    onnx.checker.check_model(set_aside(proto)[0], full_check=True)


# --- writing --------------------------------------------------------------------------------------------------


def serialize(proto: onnx.ModelProto) -> bytes:
    """Bytes that depend on the content alone."""
    return proto.SerializeToString(deterministic=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write beside the place, then rename: the file is whole or absent.

    Raises:
        FileError: the folder is missing or not writable, or the disk is full.
    """
    target = Path(path)
    handle = None
    try:
        if target.is_dir():
            raise FileError("is a folder, expected a file name", where=str(path))
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent or ".")
        try:
            with os.fdopen(descriptor, "wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise FileError(
            f"cannot be written ({error.strerror or error})",
            where=str(path),
            hint="Check that the folder exists, is writable, and has room.",
        ) from error


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all.  Raises FileError."""
    with atomic_write(path) as handle:
        handle.write(data)


def save(proto: onnx.ModelProto, path: str | os.PathLike[str], *, base_dir: str = "", external: bool = False) -> bytes:
    """Write a model; its file is whole or absent.  Returns the bytes of the model file.

    External tensors are read from ``base_dir`` and embedded, or gathered in ``NAME.onnx.data`` beside the model
    where ``external`` is asked for or they are too large to embed.
    """
    outside = list(external_tensors(proto))
    total = sum(np.prod(t.dims, dtype=np.int64) * 4 for t in proto.graph.initializer)
    if outside or external or total > EMBED_LIMIT:
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        proto = copy
        if external or total > EMBED_LIMIT:
            return _save_external(proto, Path(path), base_dir)
        for tensor in external_tensors(proto):
            name = tensor.name
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(read_tensor(tensor, base_dir)), name))
    data = serialize(proto)
    write_bytes(path, data)
    return data


def _save_external(proto: onnx.ModelProto, path: Path, base_dir: str) -> bytes:
    """Write ``path``, with every initializer of 1 KiB or more in ``path``.data; both are on disk before a rename."""
    location = path.name + ".data"
    with atomic_write(path.with_name(location)) as handle:
        for tensor in proto.graph.initializer:
            array = np.ascontiguousarray(read_tensor(tensor, base_dir))
            if array.nbytes < 1024:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    tensor.CopyFrom(onnx.numpy_helper.from_array(array.reshape(tuple(tensor.dims)), tensor.name))
                continue
            handle.write(b"\0" * (-handle.tell() % 64))
            offset = handle.tell()
            handle.write(array.tobytes())
            for field in DATA_FIELDS:
                tensor.ClearField(field)
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", str(offset)), ("length", str(array.nbytes))):
                tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
        handle.flush()
        os.fsync(handle.fileno())
        data = serialize(proto)
        write_bytes(path, data)
    return data
