"""Values for a model's inputs when the user brings none: numbers, masks of ones, token ids that exist."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes, onnx_io
from zilc.errors import DataError, OptionError

#: Sizes of symbolic dimensions: the leading one of an input is a batch, others stand for lengths.
BATCH, LENGTH = 2, 8
#: A batch whose statistics are taken: of two vectors, those normalize each to +1 or -1, whatever the parameters.
STATISTICS_BATCH = 8

_PASS = frozenset({"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand", "Slice"})
#: (operator, index operand) -> axis attribute of the data that bounds the index
_INDEXED = {"Gather": 0, "GatherElements": 0}


def random_feeds(
    inputs: gs.Graph | Sequence[gs.Tensor], seed: int = 0, dims: Mapping[str, int] | None = None, batch: int = BATCH
) -> dict[str, np.ndarray]:
    """One array an input of a graph, or of those named.

    Floating inputs are standard normal.  Integer inputs that index a Gather are drawn below its bound; other integer
    inputs are ones, as are boolean ones (masks).  Symbolic dimensions take the size in ``dims``, else
    ``batch`` where they lead and 8 elsewhere, the same for the same name.
    """
    rng = np.random.default_rng(seed)
    sizes = dict(dims or {})
    tensors = inputs.inputs if isinstance(inputs, gs.Graph) else inputs
    for tensor in tensors:
        for axis, size in enumerate(tensor.shape or ()):
            if not isinstance(size, (int, np.integer)):
                sizes.setdefault(str(size), batch if axis == 0 else LENGTH)
    feeds = {}
    for tensor in tensors:
        if getattr(tensor, "type", "tensor_type") != "tensor_type" or tensor.dtype is None:
            raise OptionError(
                f"input '{tensor.name}' is not a plain tensor, no values can be drawn for it", where="--inputs"
            )
        shape = [int(n) if isinstance(n, (int, np.integer)) else sizes[str(n)] for n in tensor.shape or ()]
        dtype = dtypes.np_dtype(tensor.dtype)
        assert dtype is not None
        if dtypes.is_float(tensor):
            feeds[tensor.name] = rng.standard_normal(shape).astype(dtype)
        elif dtype.kind in "iu":
            bound = index_bound(tensor)
            feeds[tensor.name] = (
                np.ones(shape, dtype) if bound is None else rng.integers(0, bound, shape).astype(dtype)
            )
        elif dtype.kind == "b":
            feeds[tensor.name] = np.ones(shape, bool)
        else:
            raise OptionError(f"input '{tensor.name}' holds {dtype}, no values can be drawn for it", where="--inputs")
    return feeds


def index_bound(tensor: gs.Tensor) -> int | None:
    """The smallest axis that a Gather indexes with this tensor; None if none does or it is symbolic."""
    bound: int | None = None
    seen, stack = {tensor.name}, [tensor]
    while stack:
        for node in stack.pop().outputs:
            if node.op in _PASS:
                for out in node.outputs:
                    if out.name not in seen:
                        seen.add(out.name)
                        stack.append(out)
            elif node.op in _INDEXED and len(node.inputs) > 1 and node.inputs[1].name in seen:
                shape = node.inputs[0].shape
                size = shape[node.attrs.get("axis", 0)] if shape else None
                if isinstance(size, (int, np.integer)):
                    bound = int(size) if bound is None else min(bound, int(size))
    return bound


def arrays(
    source: str | os.PathLike[str] | Mapping[str, np.ndarray], name: str = "inputs"
) -> tuple[Mapping[str, np.ndarray], str]:
    """Arrays by name, from an .npz file or as they are, and what error messages call them.

    Raises:
        FileError, DataError: the file cannot be read, or is no archive of arrays.
    """
    if isinstance(source, Mapping):
        return source, name
    path = Path(source)
    onnx_io.read_bytes(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {n: archive[n] for n in archive.files}, str(path)
    except (ValueError, OSError, AttributeError, TypeError) as error:
        hint = "Write it with numpy.savez."
        raise DataError("is not an .npz archive of arrays", where=str(path), hint=hint) from error


def checked_feeds(inputs: Sequence[gs.Tensor], feeds: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """The user's arrays, one an input, of the right dtype and rank.

    Raises:
        DataError: an input is missing, or its dtype or shape does not fit.
    """
    checked = {}
    for tensor in inputs:
        if tensor.name not in feeds:
            have = ", ".join(sorted(feeds)) or "nothing"
            raise DataError(f"no array '{tensor.name}' (it holds {have})", where=where)
        array = np.asarray(feeds[tensor.name])
        dtype = dtypes.np_dtype(tensor.dtype)
        if dtype is not None and array.dtype != dtype:
            if array.dtype.kind != dtype.kind:
                raise DataError(f"array '{tensor.name}' is {array.dtype}, expected {dtype}", where=where)
            array = array.astype(dtype)
        shape = tensor.shape
        if shape is not None and (
            len(shape) != array.ndim
            or any(isinstance(n, (int, np.integer)) and n != m for n, m in zip(shape, array.shape, strict=True))
        ):
            raise DataError(f"array '{tensor.name}' has shape {list(array.shape)}, expected {shape}", where=where)
        checked[tensor.name] = array
    return checked


def random_target(kind: str, shape: tuple[int, ...], dtype: np.dtype, class_axis: int, rng: np.random.Generator):
    """A target for an output of that shape: labels for cross-entropy, zeros and ones for bce, else standard normal."""
    if kind == "cross-entropy":
        axis = class_axis % len(shape)
        return rng.integers(0, shape[axis], shape[:axis] + shape[axis + 1 :])
    if kind == "bce-with-logits":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)
