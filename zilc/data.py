"""Arrays for a training graph: what its inputs expect, exact conversion, npz files, batches.

Examples lie along axis 0 of every input and target.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx

from zilc import dtypes, onnx_io
from zilc.errors import DataError, FileError, ModelError, OptionError

T = TypeVar("T")
Dim = int | str | None
DataSource = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Spec:
    """What an input expects; ``dims`` is None where even the rank is unknown, a name where a size is symbolic."""

    name: str
    dtype: np.dtype
    dims: tuple[Dim, ...] | None

    def __str__(self) -> str:
        shape = "any shape" if self.dims is None else shown(self.dims)
        return f"'{self.name}' {self.dtype.name} {shape}"


def shown(dims: Iterable[Dim]) -> str:
    """``[N, 784]``; an unnamed size is a question mark."""
    return f"[{', '.join('?' if d is None else str(d) for d in dims)}]"


def specs(graph: onnx.GraphProto, names: Sequence[str] | None = None) -> dict[str, Spec]:
    """What the inputs of a graph expect, by name; all that have no initializer, or those of ``names``.

    Raises:
        ModelError: an input that is not a tensor of numbers.
    """
    given = {t.name for t in graph.initializer}
    infos = {i.name: i for i in graph.input}
    made = {}
    for name in [n for n in infos if n not in given] if names is None else names:
        kind = infos[name].type
        tensor = kind.tensor_type
        dtype = dtypes.np_dtype(tensor.elem_type) if kind.WhichOneof("value") == "tensor_type" else None
        if dtype is None or dtype.kind == "O":
            raise ModelError(
                f"input '{name}' is not a tensor of numbers, which arrays cannot feed",
                hint="Export the model with numeric tensors as inputs.",
            )
        dims = onnx_io.stated_shape(tensor)
        made[name] = Spec(name, dtype, None if dims is None else tuple(dims))
    return made


def fed(graph: onnx.GraphProto, signature: Mapping[str, Any]) -> dict[str, Spec]:
    """What the inputs of a training graph expect that change from batch to batch: the model's, and the targets."""
    return specs(graph, [*signature["inputs"], *(t["name"] for t in signature["targets"] if t["name"])])


def _is_float(dtype: np.dtype) -> bool:
    return dtype.name in dtypes.FLOATS


def convert(spec: Spec, value: Any, where: str | None = None) -> np.ndarray:
    """An array of exactly the input's dtype.

    Any number becomes a float.  Integers and booleans become one another only without loss; a float never becomes
    an integer.

    Raises:
        DataError: the dtype does not convert.
    """
    array = np.asarray(value)
    if array.dtype == spec.dtype:
        return array
    whole = array.dtype.kind in "biu"
    if _is_float(spec.dtype) and (whole or _is_float(array.dtype)):
        with np.errstate(over="ignore"):
            return array.astype(spec.dtype)
    if spec.dtype.kind in "biu" and whole:
        cast = array.astype(spec.dtype)
        if np.array_equal(cast.astype(array.dtype), array) and not ((cast < 0) != (array < 0)).any():
            return cast
        raise DataError(f"'{spec.name}' holds values that {spec.dtype.name} cannot", where=where)
    hint = f"Convert it: {spec.name}.astype(numpy.{spec.dtype.name})." if _is_float(array.dtype) else None
    raise DataError(
        f"'{spec.name}' holds {array.dtype.name}, expected {spec.dtype.name}", where=where, hint=hint
    )


def check_names(expected: Mapping[str, Spec], given: Iterable[str], *, where: str | None = None, extra: bool) -> None:
    """All expected names are there; others only where ``extra`` allows them.

    Raises:
        DataError: a name is missing or unknown; lists what is expected, with dtypes and shapes, and what is there.
    """
    names = list(given)
    missing = [n for n in expected if n not in names]
    unknown = [] if extra else [n for n in names if n not in expected]
    if not missing and not unknown:
        return
    parts = []
    if missing:
        parts.append(f"missing {', '.join(repr(n) for n in missing)}")
    if unknown:
        parts.append(f"unknown {', '.join(repr(n) for n in unknown)}")
    raise DataError(
        f"{' and '.join(parts)}; it has {', '.join(repr(n) for n in names) or 'nothing'}",
        where=where,
        hint=f"Expected: {'; '.join(map(str, expected.values()))}.",
    )


def check_shape(
    spec: Spec, shape: Sequence[int], sizes: dict[str, tuple[int, str]], *, where: str | None = None, free: bool = False
) -> None:
    """Rank and sizes fit; a symbolic size is the same wherever its name stands.

    Args:
        sizes: symbolic sizes seen so far, with the input that had them; added to.
        free: axis 0 counts examples and may have any length.

    Raises:
        DataError: they do not.
    """
    if spec.dims is None:
        return
    first = 1 if free else 0
    fits = len(shape) == len(spec.dims) and all(
        not isinstance(d, int) or n == d for n, d in zip(shape[first:], spec.dims[first:], strict=True)
    )
    if not fits:
        raise DataError(f"'{spec.name}' has shape {shown(shape)}, expected {shown(spec.dims)}", where=where)
    for n, d in zip(shape[first:], spec.dims[first:], strict=True):
        size, other = sizes.setdefault(d, (n, spec.name)) if isinstance(d, str) else (n, "")
        if size != n:
            wanted = f"{shown(spec.dims)} with {d} = {size} as in '{other}'"
            raise DataError(f"'{spec.name}' has shape {shown(shape)}, expected {wanted}", where=where)


# --- files ----------------------------------------------------------------------------------------------------


def load_arrays(source: DataSource, wanted: Iterable[str] | None = None) -> tuple[dict[str, np.ndarray], str]:
    """Arrays by name, from an npz file or a mapping, and what to call their place in messages.

    Args:
        wanted: read only these, where they are there.

    Raises:
        FileError: no such file, or not an npz file.
        DataError: an array of Python objects.
    """
    if isinstance(source, Mapping):
        keep = set(source) if wanted is None else set(wanted)
        return {name: np.asarray(value) for name, value in source.items() if name in keep}, "data"
    where = str(source)
    with _open_npz(source) as opened:
        keep = set(opened.files) if wanted is None else set(wanted)
        return {name: _read(opened, name, where) for name in opened.files if name in keep}, where


def names_in(source: DataSource) -> list[str]:
    """Names of the arrays in an npz file or a mapping; no array is read."""
    if isinstance(source, Mapping):
        return list(source)
    with _open_npz(source) as opened:
        return list(opened.files)


def _open_npz(path: str | os.PathLike[str]) -> Any:
    if Path(path).is_dir():
        raise FileError("is a folder, expected an npz file", where=str(path))
    try:
        opened = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise FileError("no such file", where=str(path), hint="Check the path.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FileError(
            "not an npz file, or cut short", where=str(path), hint="Write it with numpy.savez(path, NAME=array, …)."
        ) from error
    if isinstance(opened, np.ndarray):
        raise FileError(
            "holds one array without a name", where=str(path), hint="Write it with numpy.savez(path, NAME=array, …)."
        )
    return opened


def _read(opened: Any, name: str, where: str) -> np.ndarray:
    try:
        return opened[name]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"array '{name}' cannot be read ({error})", where=where) from error


# --- examples -------------------------------------------------------------------------------------------------


@dataclass
class Examples:
    """Arrays whose axis 0 counts examples, and arrays that every batch gets as they are.

    Attributes:
        count: number of examples.
        fixed: size that the graph wants every batch to have; None where it takes any.
    """

    sliced: dict[str, np.ndarray]
    constant: dict[str, np.ndarray]
    count: int
    fixed: int | None
    where: str
    notes: list[str] = field(default_factory=list)

    def batches(self, size: int, order: np.ndarray | None = None) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(number of examples, feeds) of each batch; a short last one only where the graph takes any size."""
        end = self.count if self.fixed is None else self.count - self.count % size
        for start in range(0, end, size):
            stop = min(start + size, end)
            pick: Any = slice(start, stop) if order is None else order[start:stop]
            yield stop - start, {**{n: a[pick] for n, a in self.sliced.items()}, **self.constant}

    def batch_bytes(self, size: int) -> int:
        """Bytes that are copied to cut a batch."""
        return sum(a[:1].nbytes for a in self.sliced.values()) * size

    def batch_count(self, size: int) -> int:
        """How many batches :meth:`batches` gives."""
        return self.count // size if self.fixed is not None else math.ceil(self.count / size)


#: Batches of at least this many bytes are cut while the one before is in use; for less a thread costs more than it
#: saves.
PREFETCHED = 1 << 20


def prefetched(batches: Iterable[T]) -> Iterator[T]:
    """The same, each cut by another thread while the one before is in use: onnxruntime computes without Python's lock.

    Where the caller stops early, one batch was cut for nothing.
    """
    source = iter(batches)
    done = object()
    with ThreadPoolExecutor(1, thread_name_prefix="zilc-batches") as pool:
        coming = pool.submit(next, source, done)
        while (batch := coming.result()) is not done:
            coming = pool.submit(next, source, done)
            yield batch  # type: ignore[misc]


def fixed_batch(expected: Mapping[str, Spec]) -> int | None:
    """The batch size that a graph prescribes: the first size of its inputs; None where it is symbolic or unknown."""
    for spec in expected.values():
        if spec.dims is None:
            return None
        if spec.dims:
            return spec.dims[0] if isinstance(spec.dims[0], int) else None
    return None


def examples(expected: Mapping[str, Spec], source: DataSource, batch_size: int) -> Examples:
    """Data checked against what the graph expects.

    An input has an axis of examples if its first size is symbolic, or is the batch size that the graph prescribes;
    any other one (a scalar, a table) is given to every batch whole.  Arrays with other names are left alone.

    Raises:
        DataError: names, dtypes, shapes or lengths do not fit, or there are too few examples.
        OptionError: the graph prescribes another batch size.
    """
    if batch_size < 1:
        raise OptionError(f"{batch_size} examples a batch", where="--batch-size", hint="Take at least 1.")
    fixed = fixed_batch(expected)
    if fixed is not None and fixed != batch_size:
        raise OptionError(
            f"the model's batch dimension is fixed at {fixed}, not {batch_size}",
            where="--batch-size",
            hint=f"Take {fixed}, or export the model with a symbolic batch dimension.",
        )
    where = "data" if isinstance(source, Mapping) else str(source)
    names = names_in(source)
    check_names(expected, names, where=where, extra=True)
    arrays, where = load_arrays(source, expected)
    sliced: dict[str, np.ndarray] = {}
    constant: dict[str, np.ndarray] = {}
    sizes: dict[str, tuple[int, str]] = {}
    for name, spec in expected.items():
        array = arrays[name]
        counts = spec.dims is None or (bool(spec.dims) and (not isinstance(spec.dims[0], int) or spec.dims[0] == fixed))
        check_shape(spec, array.shape, sizes, where=where, free=counts)
        convert(spec, array[:1] if counts else array, where)
        if counts and not array.ndim:
            raise DataError(f"'{name}' is a scalar, expected examples along axis 0", where=where)
        (sliced if counts else constant)[name] = array
    lengths = {name: len(a) for name, a in sliced.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"'{name}' {n}" for name, n in lengths.items())
        raise DataError(f"arrays of different lengths along axis 0: {listed}", where=where)
    count = next(iter(lengths.values()), 0)
    if count < (fixed or 1):
        raise DataError(f"{count} examples, expected at least {fixed or 1}", where=where)
    made = Examples(sliced, constant, count, fixed, where)
    if fixed and count % fixed:
        made.notes.append(
            f"{where}: the last {count % fixed} of {count} examples are left out: "
            f"the model's batches are fixed at {fixed}"
        )
    others = [n for n in names if n not in expected]
    if others:
        made.notes.append(f"{where}: not read: {', '.join(others)}")
    return made
