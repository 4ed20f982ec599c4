"""onnxruntime's side of a trainer: sessions that say nothing, tensors that stay where they are, the forward part."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from zilc import dtypes, onnx_io
from zilc.errors import DataError, ModelError
from zilc.graph import INFERENCE
from zilc.in_place import CUDA_OVER, in_place, operands
from zilc.providers import CPU, CUDA, Providers, import_onnxruntime, provider_names, why_no_cuda
from zilc.touched_rows import touch_rows

#: Optimizations of onnxruntime that a CPU is faster without.  Its Gemm writes the bias into the product's place with
#: one thread, then adds to it with all: up to a third more, for many rows and short sums, than a product and then a sum
#: (docs/PROFILE.md).
_SLOWER_FUSIONS = ["MatMulAddFusion"]
#: A graph that holds more than this, in bytes, is not written to disk and read again.
_REWRITTEN = 1 << 29


@dataclass(frozen=True)
class TrainingSession:
    """A session for updates.

    Attributes:
        session: onnxruntime's.
        over: inputs whose successors it may write over them: one buffer serves both.
        harmless: names of nodes that run before anything is written over.
        captures: whether it records runs as CUDA graphs and replays them, see :class:`zilc.bindings.Bound`.
        through: outputs that are written over these inputs in between, and over which: the buffer serves them too.
    """

    session: Any
    over: frozenset[str] = frozenset()
    harmless: frozenset[str] = frozenset()
    captures: bool = False
    through: Mapping[str, str] = field(default_factory=dict)

    def unharmed(self, error: Exception) -> bool:
        """Whether a run that failed has left all state as it was, as far as onnxruntime's message tells."""
        failed = re.search(r"Name:'([^']*)'", str(error))
        return not self.over or (failed is not None and failed[1] in self.harmless)


def make_session(
    model: onnx.ModelProto, providers: Providers, *, folder: str = "", where: str | None = None, spinning: bool = True
) -> Any:
    """A session that prints nothing.

    Args:
        folder: of external data.
        where: what to call the model in messages.
        spinning: see :func:`stop_spinning`.

    Raises:
        ModelError: onnxruntime does not take it.
    """
    options = _options(model, folder, providers)
    if not spinning:
        stop_spinning(options)
    return _open(model, options, providers, where)


def stop_spinning(options: Any) -> None:
    """Threads of a session with these options do not wait awake for its next run, which takes time from others."""
    options.add_session_config_entry("session.force_spinning_stop", "1")


def make_training_session(
    model: onnx.ModelProto,
    providers: Providers,
    pairs: Sequence[tuple[str, str]],
    *,
    folder: str = "",
    where: str | None = None,
    cuda_graph: bool = True,
) -> TrainingSession:
    """A session that writes state over itself where it can, see :mod:`zilc.in_place`, and on CUDA replays its runs.

    State needs a second set of buffers for a graph whose initializers lie outside of it or are large, on other
    providers than the CPU's and CUDA's, and on CUDA unless all of the state can be written over.

    Args:
        pairs: (input, output) that is fed back to it.
        folder, where: as for :func:`make_session`.
        cuda_graph: record CUDA graphs where onnxruntime can: not with control flow, nor where a node that computes
            runs on the CPU.

    Raises:
        ModelError: onnxruntime does not take it.
    """
    ort = import_onnxruntime()
    names = provider_names(providers)
    if CUDA in names and why_no_cuda(ort):
        names.remove(CUDA)  # onnxruntime goes on without it
    on_cuda = names[:1] == [CUDA]
    own = next(onnx_io.external_tensors(model), None) is None and model.ByteSize() <= _REWRITTEN
    if not own or not (on_cuda or names == [CPU]):
        return TrainingSession(make_session(model, providers, folder=folder, where=where))
    if not on_cuda:
        model = touch_rows(model, pairs)
    options = _options(model, folder, providers)
    with tempfile.TemporaryDirectory(prefix="zilc-") as place:
        options.optimized_model_filepath = str(Path(place) / "optimised.onnx")
        _open(model, options, providers, where)
        optimised = onnx.load(options.optimized_model_filepath)
    if on_cuda:
        ordered = in_place(optimised, model, pairs, may=CUDA_OVER, partly=False, chains=False)
    else:
        ordered = in_place(optimised, model, pairs)
    options = _options(model, folder, providers)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is done, and the order stays
    recording = _recording(ordered.model, options, providers, where) if on_cuda and cuda_graph else None
    session = recording or _open(ordered.model, options, providers, where)
    captures = recording is not None
    return TrainingSession(session, ordered.over, ordered.harmless, captures=captures, through=ordered.through)


def recording_session(model: onnx.ModelProto, providers: Providers) -> Any:
    """A session that records runs as CUDA graphs; None where onnxruntime cannot."""
    return _recording(model, _options(model, "", providers), providers, None)


def _recording(model: onnx.ModelProto, options: Any, providers: Providers, where: str | None) -> Any:
    asked: Providers = []
    for provider in providers:
        name, given = (provider, {}) if isinstance(provider, str) else provider
        asked.append((name, {**given, "enable_cuda_graph": "1"} if name == CUDA else given))
    try:
        return _open(model, options, asked, where)
    except ModelError:
        return None


def _options(model: onnx.ModelProto, folder: str, providers: Providers) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    # Nodes in the order of the schedule, so that each update frees its gradient at once.  onnxruntime's default
    # walks back from the outputs and keeps more alive: 192 MiB instead of 122 for ResNet18 (64 x 64, batch 32).
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    # With a pattern of memory onnxruntime takes, from the second run on, one block for all that the first had in
    # pieces, and keeps both.
    options.enable_mem_pattern = False
    if provider_names(providers) == [CPU]:
        # onnxruntime would not give back a tensor's memory where a later one has the same shape, and would hold it for
        # that one meanwhile: what a layer has made for itself in the forward part, until its backward part.
        options.enable_mem_reuse = False
    if onnx_io.holds_float64(model):
        # Its extended level moves scalar factors into attributes, which are float32: 2e-8 instead of 1e-15.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if next(onnx_io.external_tensors(model), None) is not None:
        place = str(Path(folder or ".").resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", place)
    return options


def _open(model: onnx.ModelProto, options: Any, providers: Providers, where: str | None) -> Any:
    ort = import_onnxruntime()
    without = _SLOWER_FUSIONS if provider_names(providers) == [CPU] else None
    try:
        # Without the fallback of onnxruntime's Python layer, which prints and runs on something else.
        return ort.InferenceSession(
            onnx_io.serialize(model), options, providers=providers, enable_fallback=0, disabled_optimizers=without
        )
    except Exception as error:
        hint = "Check the providers, or upgrade onnxruntime."
        if "NOT_IMPLEMENTED" in str(error) and _computes_in_bfloat16(model):
            hint = "It has few bfloat16 kernels on a CPU. Use float16 or float32, or another runtime."
        raise ModelError(
            f"onnxruntime {ort.__version__} refuses the training graph ({_first_line(error)})", where=where, hint=hint
        ) from error


def _computes_in_bfloat16(model: onnx.ModelProto) -> bool:
    """Whether a graph holds bfloat16 tensors, as far as its inferred types and initializers say."""
    graph = model.graph
    infos = (*graph.input, *graph.output, *graph.value_info)
    kinds = {i.type.tensor_type.elem_type for i in infos} | {t.data_type for t in graph.initializer}
    return onnx.TensorProto.BFLOAT16 in kinds


class Buffer:
    """A tensor that stays where it is: on the CPU an array that onnxruntime writes into, else device memory."""

    __slots__ = ("array", "shape", "value")

    def __init__(self, shape: Sequence[int], dtype: np.dtype, device: tuple[str, int]) -> None:
        ort = import_onnxruntime()
        self.shape = tuple(shape)
        self.array: np.ndarray | None = None
        if device[0] == "cpu":
            self.array = _aligned(shape, dtype)
            if dtype.isbuiltin == 1:
                self.value = ort.OrtValue.ortvalue_from_numpy(self.array, "cpu")
            else:  # bfloat16: numpy knows it by way of ml_dtypes only
                kind = dtypes.onnx_dtype(dtype)
                self.value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(self.array, kind)
        elif dtype.isbuiltin != 1:
            raise ModelError(
                f"onnxruntime's Python interface cannot move {dtype.name} to a device",
                hint="Train in float32 or float16, or on the CPU.",
            )
        else:
            self.value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, *device)

    def write(self, array: np.ndarray) -> None:
        if self.array is not None:
            np.copyto(self.array, array)
        else:
            self.value.update_inplace(np.require(array, requirements="C"))

    def read(self) -> np.ndarray:
        return self.array.copy() if self.array is not None else self.value.numpy()

    def view(self) -> np.ndarray:
        """What it holds now, for as long as no update is made: on the CPU its own memory."""
        return self.array if self.array is not None else self.value.numpy()


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Zeros that start on a cache line, as onnxruntime's own tensors do; numpy aligns to 16 bytes only."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


class Outputs(Mapping[str, np.ndarray]):
    """Outputs of the last step other than the loss and what is fed back; copied from the device when looked up."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = {name: k for k, name in enumerate(names)}
        self.binding: Any = None

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names or self.binding is None:
            raise KeyError(name)
        # They are bound last, in this order.
        return np.array(self.binding.get_outputs()[self._names[name] - len(self._names)].numpy())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names if self.binding is not None else ())

    def __len__(self) -> int:
        return len(self._names) if self.binding is not None else 0


def holds_batched_kernel(model: onnx.ModelProto) -> bool:
    """Whether a gradient of a Conv's weight is a Conv itself, whose kernel has an axis of the batch's examples.

    Where there are none, onnxruntime does not end on it.
    """
    made = {name for node in model.graph.node for name in node.output}
    return any(
        node.op_type == "Conv" and node.input[1] in made
        and any((entry.key, entry.value) == ("zilc.role", "update") for entry in node.metadata_props)
        for node in model.graph.node
    )  # fmt: skip


def forward_part(model: onnx.ModelProto, wanted: Sequence[str]) -> onnx.ModelProto:
    """What the ``wanted`` outputs need of a model."""
    live = set(wanted)
    nodes = []
    for node in reversed(model.graph.node):
        if live.intersection(node.output):
            nodes.append(node)
            live.update(operands(node))
    graph = model.graph
    made = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    made.graph.name = graph.name
    made.graph.node.extend(reversed(nodes))
    made.graph.initializer.extend(t for t in graph.initializer if t.name in live)
    made.graph.input.extend(i for i in graph.input if i.name in live)
    made.graph.output.extend(o for o in graph.output if o.name in set(wanted))
    return made


def inference_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """A training graph of ``--mode train`` whose forward part is in inference form again.

    A node with ``zilc.inference`` in its metadata makes something else there: ``{"input": NAME, "axes": [...],
    "dtype": N}``, running statistics in place of the batch's, is Unsqueeze(NAME, axes) of ONNX's element type N;
    ``{"value": 1, "dtype": N}``, in place of a mask, is that number, with ``"shape_of": NAME`` as many as NAME holds.
    A graph without such nodes is returned as it is.
    """
    marked = {
        node.output[0]: json.loads(entry.value)
        for node in model.graph.node
        for entry in node.metadata_props
        if entry.key == INFERENCE
    }
    if not marked:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    del graph.node[:], graph.value_info[:]
    for node in model.graph.node:
        facts = marked.get(node.output[0])
        if facts is None:
            graph.node.append(node)
            continue
        dtype = onnx.helper.tensor_dtype_to_np_dtype(facts["dtype"])
        if "value" in facts:
            one = node.output[0] if "shape_of" not in facts else f"{node.output[0]}/one"
            graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(facts["value"], dtype), one))
            if "shape_of" in facts:
                shape = f"{node.output[0]}/shape"
                graph.node.append(onnx.helper.make_node("Shape", [facts["shape_of"]], [shape]))
                graph.node.append(onnx.helper.make_node("Expand", [one, shape], [node.output[0]]))
            continue
        axes, cast = f"{node.output[0]}/axes", f"{node.output[0]}/running"
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(facts["axes"], np.int64), axes))
        graph.node.append(onnx.helper.make_node("Cast", [facts["input"]], [cast], to=facts["dtype"]))
        graph.node.append(onnx.helper.make_node("Unsqueeze", [cast, axes], [node.output[0]]))
    return made


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]


def run_error(error: Exception) -> DataError:
    """What a failed run means to the user."""
    return DataError(
        f"onnxruntime cannot compute with these values ({_first_line(error)})",
        hint="Look for indices or labels out of range, and for sizes that do not belong together.",
    )
