"""Operators that read or write by index: a gather's VJP scatters, a scatter's gathers.

Sums over repeated indices are made with ScatterElements or a product with a one-hot matrix.  ScatterND is emitted only
where the user's own graph scatters: runtimes may run it in parallel without atomic additions, and lose summands.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.lowerings import Lowering, assumed
from zilc.vjp.shape import known, rank_of, reshape_like
from zilc.vjp.table import defvjp

#: Elements of a one-hot matrix that is made whatever the costs say.
_HOT = 1 << 22


def _int64(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def scatter_add(
    op: Emitter,
    g: gs.Tensor,
    index: gs.Tensor,
    axis: int,
    rank: int,
    size: gs.Tensor,
    *,
    shape: gs.Tensor | None = None,
) -> gs.Tensor:
    """Zeros with ``size`` entries along ``axis``, the slices of ``g`` added at ``index`` [n]: the transpose of Gather.

    Args:
        rank: of ``g`` and of the result.
        size: int64 [1].
        shape: the result's shape where it is at hand.
    """
    if shape is None:
        static = op.static(g)
        value = op.value(size)
        if static is not None and value is not None:
            shape = op.constant(_int64(*static[:axis], int(value[0]), *static[axis + 1 :]))
        else:
            shape = op.Concat(*(op.dim_of(g, k) if k != axis else size for k in range(rank)), axis=0)
    column = op.Unsqueeze(index, list(range(1, rank - axis))) if axis + 1 < rank else index  # [n, 1, ...]
    where = op.Expand(column, op.shape_of(g)) if rank > 1 else index
    return op.add_at(op.Expand(op.scalar_like(0, g), shape), where, g, axis=axis)


def _gather(op: Emitter, g: Any, y: Any, x: Any, index: Any, *, axis: int) -> Any:
    """g added to zeros at the rows that were read."""
    rank, index_rank = rank_of(op, x), rank_of(op, index)
    axis %= rank
    run = _run_of(op, index)
    dims = op.dims(x)
    if run is not None and dims is not None:
        return _gather_run(op, g, x, axis, index_rank, *run)
    if index_rank == 0:
        g = op.Unsqueeze(g, [axis])
    elif index_rank > 1:
        g = _merge(op, g, axis, index_rank)
    if index_rank != 1:
        index = op.Reshape(index, [-1])
    rows = dims[axis] if dims is not None else None
    if axis != 0 or rank == 1 or not known(rows):
        return scatter_add(op, g, index, axis, rank, op.dim_of(x, axis), shape=op.shape_of(x))
    sizes = assumed(op, g)
    work: dict[str, float] = {}
    if sizes is not None and 0 not in sizes[1:]:
        read, width, count = sizes[0], math.prod(sizes[1:]), int(rows)  # type: ignore[arg-type]
        work = {
            "updates": read * width, "table": count * width, "multiply-adds": read * count * width, "hot": read * count,
        }  # fmt: skip
    candidates = {"scatter": Lowering(_gather_by_scatter, work), "one-hot": Lowering(_gather_by_one_hot, work)}
    if not work:
        candidates = {"scatter": candidates["scatter"]}
    elif op.lowerings.target == "cuda" and work["hot"] <= _HOT:
        # The same bits every time: a scattered sum is in the order in which threads arrive.
        candidates = {"one-hot": candidates["one-hot"]}
    return op.lowerings.emit(op, "Gather.data", "", [g, index, x], candidates)


def _gather_by_scatter(op: Emitter, g: gs.Tensor, index: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    """Add row by row."""
    return scatter_add(op, g, index, 0, rank_of(op, x), op.dim_of(x, 0), shape=op.shape_of(x))


def _gather_by_one_hot(op: Emitter, g: gs.Tensor, index: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    """A product with the one-hot matrix of the index; of half precision in float32, as scattered sums are."""
    rows, rank, wide = int(op.dims(x)[0]), rank_of(op, x), op.widened(g)  # type: ignore[index, arg-type]
    hot = op.cast(op.OneHot(index, np.asarray(rows), np.asarray([0, 1], np.float32), axis=0), op.dtype(wide))
    made = op.cast(op.MatMul(hot, wide if rank == 2 else op.as_matrix(wide, 1)), op.dtype(g))
    return made if rank == 2 else reshape_like(op, made, x)


def _run_of(op: Emitter, index: gs.Tensor) -> tuple[int, int] | None:
    """(first, count) of a constant index that counts up by one, such as the 0 of ``hidden[:, 0]``."""
    values = op.value(index)
    if values is None or values.size == 0:
        return None
    flat = values.reshape(-1).astype(np.int64)
    if np.any(np.diff(flat) != 1) or (flat[0] < 0 <= flat[-1]):
        return None
    return int(flat[0]), int(flat.size)


def _gather_run(op: Emitter, g: Any, x: Any, axis: int, index_rank: int, first: int, count: int) -> Any:
    """A gather of neighbours is a slice: pad with zeros."""
    if index_rank == 0:
        g = op.Unsqueeze(g, [axis])
    elif index_rank > 1:
        g = _merge(op, g, axis, index_rank)
    n = op.dims(x)[axis]  # type: ignore[index]
    if known(n):
        low = first % int(n)  # type: ignore[arg-type]
        after = int(n) - low - count  # type: ignore[arg-type]
        return g if low == after == 0 else op.Pad(g, [low, after], None, [axis])
    size = op.dim_of(x, axis)
    if first >= 0:
        pads = op.Concat(op.constant(_int64(first)), op.Sub(size, first + count), axis=0)
    else:
        pads = op.Concat(op.Add(size, first), op.constant(_int64(-first - count)), axis=0)
    return op.Pad(g, pads, None, [axis])


def _merge(op: Emitter, g: gs.Tensor, axis: int, count: int) -> gs.Tensor:
    """``count`` axes from ``axis`` on as one."""
    dims = op.dims(g)
    assert dims is not None
    outer = [*dims[:axis], *dims[axis + count :]]
    if axis == 0 and all(known(n) and n for n in outer):
        return op.Reshape(g, _int64(-1, *outer))  # type: ignore[arg-type]
    parts = [op.dim_of(g, k) for k in range(len(dims))]
    middle = parts[axis]
    values = [op.value(p) for p in parts]
    if all(v is not None for v in values):
        flat = [int(v[0]) for v in values]  # type: ignore[index]
        shape = [*flat[:axis], int(np.prod(flat[axis : axis + count])), *flat[axis + count :]]
        return op.Reshape(g, _int64(*shape), allowzero=1 if 0 in shape else None)
    for part in parts[axis + 1 : axis + count]:
        middle = op.Mul(middle, part)
    return op.Reshape(g, op.Concat(*parts[:axis], middle, *parts[axis + count :], axis=0), allowzero=1)


def _gather_elements(op: Emitter, g: Any, y: Any, x: Any, index: Any, *, axis: int) -> Any:
    return op.add_at(op.zeros_like(x), index, g, axis=axis)


def _gather_nd(op: Emitter, g: Any, y: Any, x: Any, index: Any, *, batch_dims: int) -> Any:
    """Tuples of indices become row numbers of x seen as [rows, slice]; g is added at these rows."""
    rank, b = rank_of(op, x), batch_dims
    dims, index_dims = op.static(x), op.dims(index)
    k = index_dims[-1] if index_dims is not None else None
    index = op.cast(index, np.int64)
    if dims is not None and known(k):
        k = int(k)  # type: ignore[arg-type]
        read, inner = dims[b : b + k], dims[b + k :]
        stride = [int(np.prod(read[j + 1 :], dtype=np.int64)) for j in range(k)]
        bounds: Any = op.constant(_int64(*read))
        strides: Any = op.constant(_int64(*stride))
        block: Any = op.constant(_int64(int(np.prod(read, dtype=np.int64))))
        rows: Any = int(np.prod(dims[: b + k], dtype=np.int64))
        flat_shape: Any = op.constant(_int64(rows, int(np.prod(inner, dtype=np.int64))))
    else:
        depth = op.constant(_int64(k)) if known(k) else op.dim_of(index, -1)  # type: ignore[arg-type]
        shape = op.Shape(x)
        bounds = op.Slice(shape, _int64(b), op.Add(depth, b), _int64(0))
        # strides[j] is the product of bounds[l] over l > j.
        order = op.Range(_int64(0).reshape(()), op.Reshape(depth, _int64()), _int64(1).reshape(()))
        later = op.Greater(op.Unsqueeze(order, [0]), op.Unsqueeze(order, [1]))
        strides = op.ReduceProd(op.Where(later, op.Unsqueeze(bounds, [0]), _int64(1)), [1], keepdims=0)
        block = op.ReduceProd(bounds, [0], keepdims=1)
        outer = op.ReduceProd(op.Slice(shape, _int64(0), op.Add(depth, b), _int64(0)), [0], keepdims=1)
        inner_size = op.ReduceProd(op.Slice(shape, op.Add(depth, b), _int64(rank), _int64(0)), [0], keepdims=1)
        flat_shape = op.Concat(outer, inner_size, axis=0)
    wrapped = op.Where(op.Less(index, 0), op.Add(index, bounds), index)
    row = op.ReduceSum(op.Mul(wrapped, strides), [-1], keepdims=0)  # [batch ..., m ...]
    if b:
        batch = op.Slice(op.shape_of(x), _int64(0), _int64(b), _int64(0))
        total = op.ReduceProd(batch, [0], keepdims=0)
        offsets = op.Mul(op.Range(_int64(0).reshape(()), total, _int64(1).reshape(())), block)
        # [batch ...] against [batch ..., m ...]: rows are laid out batch by batch
        row = op.Reshape(op.Add(op.Reshape(row, op.Concat(op.Reshape(total, [1]), _int64(-1), axis=0)),
                                op.Unsqueeze(offsets, [1])), [-1])  # fmt: skip
    else:
        row = op.Reshape(row, [-1])
    inner_n = op.Slice(flat_shape, _int64(1), _int64(2), _int64(0)) if op.value(flat_shape) is None else None
    width = op.constant(_int64(int(op.value(flat_shape)[1]))) if inner_n is None else inner_n  # type: ignore[index]
    updates = op.Reshape(g, op.Concat(op.Shape(row), width, axis=0), allowzero=1)
    where = op.Expand(op.Unsqueeze(row, [1]), op.Shape(updates))
    zeros = op.Expand(op.scalar_like(0, g), flat_shape)
    return reshape_like(op, op.add_at(zeros, where, updates, axis=0), x)


defvjp("Gather", _gather, None)
defvjp("GatherElements", _gather_elements, None)
defvjp("GatherND", _gather_nd, None)


# -- scatters --


class _Scatter:
    """ScatterElements or ScatterND, and the gather that reads the same places."""

    def __init__(self, op: Emitter, index: gs.Tensor, axis: int | None) -> None:
        self.op, self.index, self.axis = op, index, axis

    def put(self, data: gs.Tensor, updates: gs.Tensor, reduction: str = "none") -> gs.Tensor:
        kind = None if reduction == "none" else reduction
        if self.axis is None:
            return self.op.ScatterND(data, self.index, updates, reduction=kind)
        return self.op.ScatterElements(data, self.index, updates, axis=self.axis, reduction=kind)

    def read(self, data: gs.Tensor) -> gs.Tensor:
        if self.axis is None:
            return self.op.GatherND(data, self.index)
        return self.op.GatherElements(data, self.index, axis=self.axis)


def _scatter_data(
    op: Emitter, g: Any, y: Any, x: Any, index: Any, updates: Any, *, reduction: str, axis: int | None = None
) -> Any:
    s = _Scatter(op, index, axis)
    if reduction == "none":
        return s.put(g, op.zeros_like(updates))
    if reduction == "add":
        return g
    if reduction == "mul":
        return s.put(g, updates, "mul")
    return op.Where(op.Equal(x, y), op.Div(g, _ties(op, s, y, x, updates)), op.scalar_like(0, g))


def _scatter_updates(
    op: Emitter, g: Any, y: Any, x: Any, index: Any, updates: Any, *, reduction: str, axis: int | None = None
) -> Any:
    s = _Scatter(op, index, axis)
    if reduction in ("none", "add"):
        return s.read(g)
    zero = op.scalar_like(0, g)
    if reduction == "mul":
        # The product of the others: of the nonzero ones, over u itself, unless another factor is 0.
        is_zero = op.Equal(updates, zero)
        zeros = s.read(s.put(op.zeros_like(x), op.cast(is_zero, op.dtype(g)), "add"))
        safe = op.Where(is_zero, op.scalar_like(1, g), updates)
        product = s.read(op.Mul(g, s.put(x, safe, "mul")))
        others = op.Sub(zeros, op.cast(is_zero, op.dtype(g)))
        return op.Where(op.Greater(others, zero), zero, op.Div(product, safe))
    share = s.read(op.Div(g, _ties(op, s, y, x, updates)))
    return op.Where(op.Equal(updates, s.read(y)), share, zero)


def _ties(op: Emitter, s: _Scatter, y: Any, x: Any, updates: Any) -> Any:
    """How many candidates equal the largest (or least) one at each place."""
    dtype = op.dtype(x)
    return s.put(op.cast(op.Equal(x, y), dtype), op.cast(op.Equal(updates, s.read(y)), dtype), "add")


_TIES = "max and min: ties share evenly"
defvjp("ScatterElements", _scatter_data, None, _scatter_updates, note=_TIES)
defvjp("ScatterND", _scatter_data, None, _scatter_updates, note=_TIES)


# -- selections --


def _top_k(op: Emitter, g: Any, y: Any, x: Any, k: Any, *, axis: int, largest: int, sorted: int) -> Any:
    return op.ScatterElements(op.zeros_like(x), y[1], g, axis=axis)


def _compress(op: Emitter, g: Any, y: Any, x: Any, condition: Any, *, axis: int | None) -> Any:
    """The chosen places are distinct: nothing is added."""
    chosen = op.Reshape(op.NonZero(condition), [-1])
    if axis is None:
        return reshape_like(op, scatter_add(op, g, chosen, 0, 1, op.size_of(x)), x)
    rank = rank_of(op, x)
    return scatter_add(op, g, chosen, axis % rank, rank, op.dim_of(x, axis % rank), shape=op.shape_of(x))


defvjp("TopK", _top_k, None, extra_outputs=(1,))
defvjp("Compress", _compress, None)

# -- TensorScatter: update is written into the cache along an axis, from write_indices[batch] on --


def _written(op: Emitter, past: Any, update: Any, start: Any, axis: int, mode: str) -> gs.Tensor:
    """Where each element of ``update`` was written along ``axis``, of its shape."""
    rank = rank_of(op, past)
    count = op.Squeeze(op.dim_of(update, axis), [0])
    place = op.Range(op.constant(np.asarray(0)), count, op.constant(np.asarray(1)))
    place = op.Reshape(place, _int64(*(-1 if k == axis else 1 for k in range(rank))))
    if start is not None:
        place = op.Add(place, op.Reshape(start, _int64(-1, *([1] * (rank - 1)))))
    if mode == "circular":
        place = op.Mod(place, op.dim_of(past, axis))
    return op.Expand(place, op.shape_of(update))


def _tensor_scatter_past(
    op: Emitter, g: Any, y: Any, past: Any, update: Any, start: Any, *, axis: int, mode: str
) -> gs.Tensor:
    """0 where the update overwrote the cache."""
    axis %= rank_of(op, past)
    return op.ScatterElements(g, _written(op, past, update, start, axis, mode), op.zeros_like(update), axis=axis)


def _tensor_scatter_update(
    op: Emitter, g: Any, y: Any, past: Any, update: Any, start: Any, *, axis: int, mode: str
) -> gs.Tensor:
    axis %= rank_of(op, past)
    return op.GatherElements(g, _written(op, past, update, start, axis, mode), axis=axis)


defvjp("TensorScatter", _tensor_scatter_past, _tensor_scatter_update, None)
