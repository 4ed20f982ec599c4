"""Trained values back into the user's own model: everything but the trained tensors stays as it was."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from zilc import dtypes, onnx_io
from zilc.errors import DataError, FileError, ModelError
from zilc.onnx_io import Source
from zilc.passes.prepare import inline_functions

Ties = Mapping[str, tuple[str, bool]]


def export_trained(
    source: Source, values: Mapping[str, np.ndarray], ties: Ties, path: str | os.PathLike[str]
) -> None:
    """Write the original model with trained values; its file is whole or absent, and may be the original's own.

    A model with external data is written with external data, ``NAME.onnx.data`` beside it.

    Args:
        source: the model that was trained.
        values: arrays by parameter name.
        ties: leaves that follow another one: {B: (A, B is A's transpose)}.

    Raises:
        DataError: a value of another shape or dtype than the parameter's.
        ModelError: the model has no such parameter.
        FileError: the file cannot be written, or would overwrite the original's external data.
    """
    proto = with_values(source, values, ties)
    outside = [onnx.external_data_helper.ExternalDataInfo(t).location for t in onnx_io.external_tensors(source.proto)]
    if outside:
        _spare_the_original(source, outside, Path(path))
    onnx_io.save(proto, path, base_dir=source.base_dir, external=bool(outside))


def without_values(source: Source, names: Collection[str], ties: Ties) -> Source:
    """The original, but for the numbers that :func:`export_trained` will replace: what a trainer must remember of it.

    Args:
        names: parameters whose values will be given.
        ties: as there.
    """
    replaced = {*names, *(b for b, (a, _) in ties.items() if a in names)}
    return dataclasses.replace(source, proto=onnx_io.without_values(source.proto, replaced))


def with_values(source: Source, values: Mapping[str, np.ndarray], ties: Ties) -> onnx.ModelProto:
    """A copy of the original with trained values; external tensors that were not trained stay outside."""
    wanted = dict(values)
    for b, (a, transposed) in ties.items():
        if a in values:
            wanted[b] = np.asarray(values[a]).T if transposed else np.asarray(values[a])
    proto = source.proto
    running = {name for name in wanted if _running(proto.graph, name) is not None}
    if any(name not in _places(proto.graph) for name in wanted if name not in running):
        # A parameter inside a function has its name only once the function is inlined.
        proto = inline_functions(source)
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    places = _places(made.graph)
    for name, value in wanted.items():
        if name not in places:
            found = _running(made.graph, name)
            if found is not None:
                _add_running(made, *found, name, np.asarray(value))
                continue
            raise ModelError(
                f"no parameter '{name}' in the model",
                where=source.name,
                hint="Give the model that the training graph was made from.",
            )
        place = places[name]
        if isinstance(place, onnx.TensorProto):
            _write_tensor(place, np.asarray(value), name)
        elif place.op_type == "Constant":
            _write_constant(place, np.asarray(value), name)
        else:
            _replace_filled(made, place, np.asarray(value))
    return made


def _places(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto | onnx.NodeProto]:
    """Where each constant of a graph is written: its initializer, or the node that makes it."""
    found: dict[str, onnx.TensorProto | onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type in ("Constant", "ConstantOfShape") and node.domain in ("", "ai.onnx"):
            found[node.output[0]] = node
    found.update({t.name: t for t in graph.initializer})
    return found


#: Running statistics that share a tensor with something else (see zilc.passes.train_mode): ending of their name, and
#: which input of a BatchNormalization they are.
_RUNNING = {".running_mean": 3, ".running_var": 4}


def _running(graph: onnx.GraphProto, name: str) -> tuple[onnx.NodeProto, int] | None:
    """The BatchNormalization whose statistics ``name`` are, and which input, where the file has no such tensor."""
    if name in _places(graph):
        return None
    for ending, index in _RUNNING.items():
        for node in graph.node:
            if node.op_type == "BatchNormalization" and name == f"{node.output[0]}{ending}":
                return node, index
    return None


def _add_running(model: onnx.ModelProto, node: onnx.NodeProto, index: int, name: str, value: np.ndarray) -> None:
    """An initializer of its own for what the file had in a tensor that others read too."""
    kind = dtypes.onnx_dtype(value.dtype)
    node.input[index] = name
    made = model.graph.initializer.add(name=name, data_type=kind, dims=value.shape)
    made.raw_data = value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
    if model.ir_version < 4:
        # Before IR version 4 every initializer is a graph input as well.
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))


def _expect(name: str, value: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if value.dtype != dtype or value.shape != shape:
        raise DataError(
            f"'{name}' was given {value.dtype.name} {list(value.shape)}, expected {dtype.name} {list(shape)}",
            hint="Export into the model that was trained.",
        )


def _write_tensor(tensor: onnx.TensorProto, value: np.ndarray, name: str) -> None:
    """New data under the same name, type, shape and documentation."""
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    _expect(name, value, dtype, tuple(tensor.dims))
    for field in (*onnx_io.DATA_FIELDS, "external_data"):
        tensor.ClearField(field)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = value.astype(dtype.newbyteorder("<"), copy=False).tobytes()


def _write_constant(node: onnx.NodeProto, value: np.ndarray, name: str) -> None:
    """New data in whichever attribute the Constant has."""
    attribute = node.attribute[0]
    if attribute.name == "value":
        _write_tensor(attribute.t, value, name)
    elif attribute.name == "value_floats":
        _expect(name, value, np.dtype(np.float32), (len(attribute.floats),))
        attribute.floats[:] = value.tolist()
    elif attribute.name == "value_float":
        _expect(name, value, np.dtype(np.float32), ())
        attribute.f = float(value)
    else:
        raise ModelError(f"constant '{name}' is given by '{attribute.name}', which holds no trained value")


def _replace_filled(model: onnx.ModelProto, node: onnx.NodeProto, value: np.ndarray) -> None:
    """An initializer in place of a ConstantOfShape; the shape goes too, where nothing else reads it."""
    graph, name = model.graph, node.output[0]
    fill = next((a.t for a in node.attribute if a.name == "value"), None)
    kind = fill.data_type if fill is not None else onnx.TensorProto.FLOAT
    shape = next((t for t in graph.initializer if t.name == node.input[0]), None)
    dims = onnx.numpy_helper.to_array(shape).tolist() if shape is not None else list(value.shape)
    _expect(name, value, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)), tuple(dims))
    made = graph.initializer.add(name=name, data_type=kind, dims=dims)
    made.raw_data = value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
    if model.ir_version < 4:
        # Before IR version 4 every initializer is a graph input as well.
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, dims))
    del graph.node[next(i for i, n in enumerate(graph.node) if n.output[0:1] == [name])]
    if shape is not None and shape.name not in set(_reads(graph)):
        # onnxruntime warns about initializers that nothing reads.
        for entries in (graph.initializer, graph.input):
            for index in [i for i, entry in enumerate(entries) if entry.name == shape.name]:
                del entries[index]


def _reads(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that the nodes and outputs of a graph read, its subgraphs' included."""
    yield from (o.name for o in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _reads(inner)


def _spare_the_original(source: Source, locations: list[str], path: Path) -> None:
    """The data file that comes beside ``path`` must not be one that the original reads, unless both are replaced."""
    if source.path is not None and path.exists() and path.samefile(source.path):
        return
    data = path.with_name(path.name + ".data")
    for location in locations:
        theirs = Path(source.base_dir) / location
        if data.exists() and theirs.exists() and data.samefile(theirs):
            raise FileError(
                f"its data file '{data.name}' would overwrite the original's",
                where=str(path),
                hint="Choose another file name.",
            )
