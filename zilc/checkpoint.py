"""State in safetensors files: parameters, optimizer slots and step, whole or absent, bound to their graph.

The file's metadata names the training graph that the state belongs to: ``zilc.graph`` is the SHA-256 of its bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zilc import onnx_io
from zilc.errors import DataError, FileError

#: Key of the graph's digest in the file's metadata.
GRAPH = "zilc.graph"

#: The format's name of each dtype; bfloat16 is numpy's by way of ml_dtypes, which onnx brings along.
_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def graph_digest(data: bytes) -> str:
    """What binds a state to its graph: SHA-256 of the training graph's bytes as they stand in its file."""
    return hashlib.sha256(data).hexdigest()


def state_path(graph: str | os.PathLike[str]) -> Path:
    """Where the state of a training graph lies unless something else is said: ``STEP.safetensors`` beside it."""
    return Path(graph).with_suffix(".safetensors")


def save_state(path: str | os.PathLike[str], state: Mapping[str, np.ndarray], digest: str) -> None:
    """Write a state; the file is whole or absent, and the same state gives the same bytes.

    Arrays are read one at a time, so a lazy ``state`` is never in memory as a whole.

    Args:
        state: arrays by name.
        digest: of the training graph, see :func:`graph_digest`.

    Raises:
        DataError: an array of a dtype that the format does not know.
        FileError: the file cannot be written.
    """
    facts = {}
    for name in state:
        array = np.asarray(state[name])
        if array.dtype.name not in _NAMES:
            raise DataError(
                f"'{name}' holds {array.dtype.name}, which a state file cannot hold",
                where=str(path),
                hint=f"It can hold {', '.join(_NAMES)}.",
            )
        facts[name] = (array.dtype, array.shape, array.nbytes)
    # Wide elements first: then every array is aligned, as the format's own writer has it.
    order = sorted(facts, key=lambda name: (-facts[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {GRAPH: digest}}
    end = 0
    for name in order:
        dtype, shape, size = facts[name]
        header[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with onnx_io.atomic_write(path) as handle:
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for name in order:
            array = np.asarray(state[name])
            handle.write(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def load_state(path: str | os.PathLike[str], expect_digest: str | None = None) -> dict[str, np.ndarray]:
    """Read a state into arrays of its own memory.

    Args:
        expect_digest: of the training graph that the state must belong to; None takes any.

    Raises:
        FileError: no such file, cut short, or not a safetensors file.
        DataError: the state belongs to another training graph.
    """
    import safetensors

    if Path(path).is_dir():
        raise FileError("is a folder, expected a safetensors file", where=str(path))
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            _check_digest((opened.metadata() or {}).get(GRAPH), expect_digest, path)
            return {name: _array(opened, name, path) for name in opened.keys()}  # noqa: SIM118  (not a dict)
    except FileNotFoundError as error:
        raise FileError("no such file", where=str(path), hint="Check the path.") from error
    except OSError as error:
        raise FileError(f"cannot be read ({error.strerror or error})", where=str(path)) from error
    except safetensors.SafetensorError as error:
        raise FileError(
            f"not a safetensors file, or cut short ({error})",
            where=str(path),
            hint="Copy it again, or write it anew with 'zilc emit-training'.",
        ) from error


def _array(opened: Any, name: str, path: str | os.PathLike[str]) -> np.ndarray:
    kind = opened.get_slice(name).get_dtype()
    if kind not in _NAMES.values():
        raise FileError(f"'{name}' holds {kind}, expected one of {', '.join(_NAMES.values())}", where=str(path))
    try:
        return np.array(opened.get_tensor(name), order="C")
    except (AttributeError, TypeError) as error:  # older ones do not give bfloat16 to numpy
        raise FileError(
            f"the installed safetensors package cannot read '{name}' ({kind}) into numpy",
            where=str(path),
            hint="pip install --upgrade safetensors ml_dtypes",
        ) from error


def _check_digest(found: str | None, expected: str | None, path: str | os.PathLike[str]) -> None:
    if expected is None or found == expected:
        return
    if found is None:
        what = f"no '{GRAPH}' in its metadata: not the state of a training graph"
    else:
        what = f"the state of another training graph ({found[:12]}…, expected {expected[:12]}…)"
    raise DataError(
        what, where=str(path), hint="Give the state that was written with this graph, or emit both again."
    )
