"""ONNX models as files and as protobuf: reading and checking, large and external values, writing.

What GraphSurgeon makes of a model, and back, is in :mod:`zilc.ir`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import os
import tempfile
from collections.abc import Collection, Iterator
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
from google.protobuf.message import DecodeError

from zilc.errors import FileError, ModelError

#: The newest IR version and opset that the runtimes of the day load.
MAX_IR_VERSION = 13
MAX_OPSET = 26
MIN_OPSET = 18
#: Above this many bytes of initializers a written model keeps them in a file beside it (protobuf's limit is 2 GiB).
EMBED_LIMIT = 1 << 30
#: Initializers of more elements than this are no shapes, axes or indices that inference would look at.
ASIDE = 1024

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


def holds_float64(model: onnx.ModelProto) -> bool:
    """Whether an input or output of the model is float64."""
    interface = (*model.graph.input, *model.graph.output)
    return any(i.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE for i in interface)


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
