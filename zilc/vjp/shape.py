"""Operators that move elements and compute nothing: their VJP moves the cotangent back, and adds what was copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Dim, Emitter
from zilc.errors import ModelError
from zilc.vjp.table import defvjp, unbroadcast, variadic

# -- shared by the families of rules --


def known(n: Dim) -> bool:
    """Whether a dimension is a number."""
    return isinstance(n, (int, np.integer))


def rank_of(op: Emitter, x: gs.Tensor) -> int:
    """Number of dimensions.

    Raises:
        ModelError: it is unknown; a rule cannot name the axes then.
    """
    rank = op.rank(x)
    if rank is None:
        raise ModelError(
            "the number of dimensions is unknown, and a VJP rule needs it",
            where=f"tensor '{x.name}'",
            hint="Give the model's inputs their ranks (symbolic dimensions are fine).",
        )
    return rank


def reshape_like(op: Emitter, g: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    """The elements of ``g`` in the shape of ``x``, without a ``Shape`` node wherever the shape can be written down."""
    dims, given = op.dims(x), op.dims(g)
    if dims is not None and dims == given and None not in dims:
        return g
    if dims is not None:
        if all(known(n) for n in dims):
            return op.Reshape(g, op.constant(np.asarray(dims, np.int64)), allowzero=1 if 0 in dims else None)
        # 0 copies the dimension of the same position, which is right where both have the same symbol there.
        copied = [
            0 if isinstance(n, str) and given is not None and k < len(given) and given[k] == n else n
            for k, n in enumerate(dims)
        ]
        if 0 not in dims:
            open_axes = [k for k, n in enumerate(copied) if not known(n)]
            if not open_axes:
                return op.Reshape(g, op.constant(np.asarray(copied, np.int64)))
            if sum(not known(n) for n in dims) == 1:
                shape = [n if known(n) else -1 for n in dims]
                return op.Reshape(g, op.constant(np.asarray(shape, np.int64)))
    return op.Reshape(g, op.Shape(x), allowzero=1)


def const_ints(op: Emitter, x: gs.Tensor | None) -> list[int] | None:
    """The integers of a constant operand as a flat list; None if absent or known only at run time."""
    value = op.value(x)
    return None if value is None else [int(n) for n in value.reshape(-1)]


def swap_last(op: Emitter, x: gs.Tensor) -> gs.Tensor:
    """Transpose of the last two axes."""
    rank = rank_of(op, x)
    return op.Transpose(x, perm=[*range(rank - 2), rank - 1, rank - 2])


# -- views --

defvjp("Reshape", lambda op, g, y, x, shape, *, allowzero: reshape_like(op, g, x), None)
defvjp("Flatten", lambda op, g, y, x, *, axis: reshape_like(op, g, x))
defvjp("Unsqueeze", lambda op, g, y, x, axes: op.Squeeze(g, axes), None)


def _transpose(op: Emitter, g: Any, y: Any, x: Any, *, perm: list[int] | None) -> Any:
    return op.Transpose(g, perm=None if perm is None else [int(k) for k in np.argsort(perm)])


def _squeeze(op: Emitter, g: Any, y: Any, x: Any, axes: Any) -> Any:
    return reshape_like(op, g, x) if axes is None else op.Unsqueeze(g, axes)


def _expand(op: Emitter, g: Any, y: Any, x: Any, shape: Any) -> Any:
    return unbroadcast(op, g, x, y)


def _tile(op: Emitter, g: Any, y: Any, x: Any, repeats: Any) -> Any:
    """y has axes of size r d; as [r, d] pairs the r are summed."""
    dims, times = op.static(x), const_ints(op, repeats)
    if dims is not None and times is not None:
        shape: list[int] = []
        axes: list[int] = []
        for n, r in zip(dims, times, strict=True):
            if r != 1:
                axes.append(len(shape))
                shape.append(r)
            shape.append(n)
        if not axes:
            return g
        pairs = op.Reshape(g, shape, allowzero=1 if 0 in shape else None)
        return op.ReduceSum(pairs, axes, keepdims=0)
    stacked = op.Concat(op.Unsqueeze(repeats, [1]), op.Unsqueeze(op.Shape(x), [1]), axis=1)  # [rank, 2]
    pairs = op.Reshape(g, op.Reshape(stacked, [-1]), allowzero=1)
    return op.ReduceSum(pairs, [2 * k for k in range(rank_of(op, x))], keepdims=0, noop_with_empty_axes=1)


defvjp("Transpose", _transpose)
defvjp("Squeeze", _squeeze, None)
defvjp("Expand", _expand, None)
defvjp("Tile", _tile, None)

# -- joining and splitting --


def _concat(op: Emitter, g: Any, y: Any, index: int, *operands: Any, axis: int) -> Any:
    """The part of g that came from operand ``index``."""
    if len(operands) == 1:
        return g
    shapes = [op.dims(x) for x in operands]
    sizes = [None if s is None else s[axis] for s in shapes]
    if all(known(n) for n in sizes[: index + 1]):
        ends = np.cumsum(np.asarray(sizes[: index + 1], np.int64))
        end = int(ends[-1])
        return op.Slice(g, [end - int(sizes[index])], [end], [axis])  # type: ignore[arg-type]
    lengths = op.Concat(*(op.dim_of(x, axis) for x in operands), axis=0)
    return op.Split(g, lengths, axis=axis, outputs=len(operands))[index]


def _split(op: Emitter, g: Any, y: Any, x: Any, split: Any, *, axis: int, num_outputs: int | None = None) -> Any:
    """The cotangents side by side; zeros where an output has none."""
    if all(part is None for part in g):
        return None
    parts = [op.zeros_like(made) if part is None else part for part, made in zip(g, y, strict=True)]
    return op.Concat(*parts, axis=axis) if len(parts) > 1 else parts[0]


variadic("Concat", _concat)
defvjp("Split", _split, None, multi=True)

# -- slices and padding --


def _slice(op: Emitter, g: Any, y: Any, x: Any, starts: Any, ends: Any, axes: Any, steps: Any) -> Any:
    """Zeros outside the slice: g is turned round where a step is negative, spread where it is not 1, then padded."""
    rank = rank_of(op, x)
    stride = const_ints(op, steps)
    first = const_ints(op, starts)
    where = const_ints(op, axes)
    if axes is None:
        count = next((n[0] for n in (op.static(starts), op.static(ends)) if n is not None), None)
        where = None if count is None else list(range(count))
    if where is None or (steps is not None and stride is None):
        return _slice_by_index(op, g, x, starts, ends, axes, steps)
    where = [a % rank for a in where]
    stride = stride or [1] * len(where)
    last = const_ints(op, ends)
    sizes = op.dims(x)
    before: list[int | gs.Tensor] = []
    after: list[int | gs.Tensor] = []
    spread = g
    for k, (axis, step) in enumerate(zip(where, stride, strict=True)):
        if step < 0:
            spread = op.Slice(spread, [-1], [-(2**62)], [axis], [-1])
        if abs(step) > 1:
            spread = _spread(op, spread, axis, abs(step))
        n = sizes[axis] if sizes is not None else None
        if known(n) and first is not None and last is not None:
            chosen = range(*slice(first[k], last[k], step).indices(int(n)))  # type: ignore[arg-type]
            low, high = (min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1]) + 1) if len(chosen) else (0, 0)
            before.append(low)
            after.append(int(n) - high)  # type: ignore[arg-type]
            continue
        size, length = op.dim_of(x, axis), op.dim_of(g, axis)  # [1] each
        start = op.Slice(starts, [k], [k + 1], [0]) if first is None else None
        below = _first_chosen(op, start if first is None else first[k], size, length, step)
        before.append(below)
        counts = op.value(length)
        if counts is not None:
            used: Any = max((int(counts[0]) - 1) * abs(step) + 1, 0)
            used = used + below if isinstance(below, int) else op.Add(below, used)
        else:
            used = op.Max(op.Sub(op.Mul(length, abs(step)), abs(step) - 1), 0) if abs(step) > 1 else length
            used = used if isinstance(below, int) and below == 0 else op.Add(used, below)
        after.append(op.Sub(size, used))
    if all(isinstance(p, int) for p in before + after):
        if before == after == [0] * len(where):
            return spread
        pads: Any = [*before, *after]
    else:
        pads = op.Concat(
            *(p if isinstance(p, gs.Tensor) else op.constant(np.asarray([p], np.int64)) for p in before + after), axis=0
        )
    return op.Pad(spread, pads, None, None if where == list(range(rank)) else where)


def _first_chosen(
    op: Emitter, start: gs.Tensor | int | None, size: gs.Tensor, length: gs.Tensor, step: int
) -> gs.Tensor | int:
    """The lowest index that a slice reads, [1] where it is known only at run time."""
    count = op.value(length)
    if isinstance(start, int) and step > 0:
        if start >= 0:
            # Where something was read, the start lies within.
            return start if start == 0 or (count is not None and count[0] > 0) else op.Min(size, start)
        return op.Max(op.Add(size, start), 0)
    begin: Any = op.constant(np.asarray([start], np.int64)) if isinstance(start, int) else op.cast(start, np.int64)
    begin = op.Where(op.Less(begin, 0), op.Add(begin, size), begin)
    begin = op.Min(op.Max(begin, 0), size if step > 0 else op.Sub(size, 1))
    # For a negative step the lowest is the last one read.
    return begin if step > 0 else op.Add(begin, op.Mul(op.Sub(length, 1), step))


def _spread(op: Emitter, g: gs.Tensor, axis: int, step: int) -> gs.Tensor:
    """``step - 1`` zeros between the elements along ``axis``."""
    rank = rank_of(op, g)
    padded = op.Pad(op.Unsqueeze(g, [axis + 1]), [0, step - 1], None, [axis + 1])
    parts = [op.dim_of(g, k) for k in range(rank)]
    values = [op.value(n) for n in parts]
    if all(v is not None for v in values):
        flat = [int(v[0]) * (step if k == axis else 1) for k, v in enumerate(values)]  # type: ignore[index]
        merged = op.Reshape(padded, flat, allowzero=1 if 0 in flat else None)
    else:
        parts[axis] = op.Mul(parts[axis], step)
        merged = op.Reshape(padded, op.Concat(*parts, axis=0), allowzero=1)
    return op.Slice(merged, [0], [1 - step], [axis])


def _slice_by_index(op: Emitter, g: Any, x: Any, starts: Any, ends: Any, axes: Any, steps: Any) -> Any:
    """Axes or steps known only at run time: slice the numbers of the elements, and put g at the numbers chosen."""
    count = op.count(x, np.int64)
    numbers = op.Reshape(op.Range(op.constant(np.asarray(0)), count, op.constant(np.asarray(1))), op.Shape(x))
    chosen = op.Slice(numbers, starts, ends, axes, steps)
    zeros = op.Expand(op.scalar_like(0, g), op.size_of(x))
    flat = op.ScatterElements(zeros, op.Reshape(chosen, [-1]), op.Reshape(g, [-1]), axis=0)
    return reshape_like(op, flat, x)


defvjp("Slice", _slice, None, None, None, None)


def pad_index(op: Emitter, x: gs.Tensor, axis: int, pads: gs.Tensor, mode: str) -> gs.Tensor:
    """Which element along ``axis`` each element of the padded tensor copies; ``pads`` is [before, after]."""
    size = op.Reshape(op.dim_of(x, axis), op.constant(np.asarray([], np.int64)))
    places = op.Range(op.constant(np.asarray(0)), size, op.constant(np.asarray(1)))
    # As floats, which hold every place exactly: Pad has no CUDA kernel for integers.
    return op.cast(op.Pad(op.cast(places, np.float64), pads, mode=mode), np.int64)


def _crop(op: Emitter, g: gs.Tensor, pads: gs.Tensor, axes: Any) -> gs.Tensor:
    """Undo a Pad: slice where it added, add zeros where it cropped."""
    amounts, rank = const_ints(op, pads), rank_of(op, g)
    if amounts is not None:
        count = len(amounts) // 2
        low, high = ([max(n, 0) for n in side] for side in (amounts[:count], amounts[count:]))
        where = axes if axes is not None else list(range(rank))
        if any(low) or any(high):
            g = op.Slice(g, low, [-n if n else 2**62 for n in high], where)
        return op.Pad(g, [max(-n, 0) for n in amounts], None, axes) if min(amounts, default=0) < 0 else g
    low_t, high_t = op.Split(op.Max(pads, 0), num_outputs=2, outputs=2)
    sizes = op.shape_of(g) if axes is None else op.Gather(op.shape_of(g), axes)
    g = op.Slice(g, low_t, op.Sub(sizes, high_t), list(range(rank)) if axes is None else axes)
    return op.Pad(g, op.Max(op.Neg(pads), 0), None, axes)


def _pad(op: Emitter, g: Any, y: Any, x: Any, pads: Any, value: Any, axes: Any, *, mode: str) -> Any:
    """Constant: crop.  Else: add up what was copied."""
    amounts = const_ints(op, pads)
    if mode == "constant":
        return _crop(op, g, pads, axes)
    from zilc.vjp.indexing import scatter_add

    rank = rank_of(op, x)
    where = const_ints(op, axes) if axes is not None else list(range(rank))
    if where is None:
        raise ModelError(
            f"Pad (mode {mode}) whose axes are known only at run time has no VJP rule", where=f"tensor '{y.name}'"
        )
    for k, axis in enumerate(where):
        if amounts is not None:
            if amounts[k] == amounts[k + len(where)] == 0:
                continue
            pair = op.constant(np.asarray([amounts[k], amounts[k + len(where)]], np.int64))
        else:
            pair = op.Gather(pads, [k, k + len(where)])
        index = pad_index(op, x, axis % rank, pair, mode)
        g = scatter_add(op, g, index, axis % rank, rank, op.dim_of(x, axis % rank))
    return g


def _pad_value(op: Emitter, g: Any, y: Any, x: Any, pads: Any, value: Any, axes: Any, *, mode: str) -> Any:
    """The sum of g over the border."""
    if mode != "constant":
        return op.zeros_like(value)
    inner = op.Pad(_pad(op, g, y, x, pads, value, axes, mode=mode), pads, None, axes)
    return reshape_like(op, op.ReduceSum(op.Sub(g, inner), keepdims=0), value)


defvjp("Pad", _pad, None, _pad_value, None)

# -- rearrangements --


def _depth_to_space(op: Emitter, g: Any, y: Any, x: Any, *, blocksize: int, mode: str) -> Any:
    if mode == "DCR":
        return op.SpaceToDepth(g, blocksize=blocksize)
    # CRD: y[n, c, h b + i, w b + j] = x[n, c b^2 + i b + j, h, w]
    b = blocksize
    n, h, w = (op.dim_of(x, k) for k in (0, 2, 3))
    block = op.constant(np.asarray([b], np.int64))
    static = op.static(x)
    if static is not None:
        shape: Any = [static[0], static[1] // (b * b), static[2], b, static[3], b]
    else:
        shape = op.Concat(n, op.constant(np.asarray([-1], np.int64)), h, block, w, block, axis=0)
    blocks = op.Transpose(op.Reshape(g, shape), perm=[0, 1, 3, 5, 2, 4])
    return reshape_like(op, blocks, x)


defvjp("DepthToSpace", _depth_to_space)
defvjp("SpaceToDepth", lambda op, g, y, x, *, blocksize, mode="DCR": op.DepthToSpace(g, blocksize=blocksize, mode=mode))
defvjp("Trilu", lambda op, g, y, x, k, *, upper: op.Trilu(g, k, upper=upper), None)
defvjp("ReverseSequence", lambda op, g, y, x, lengths, **attrs: op.ReverseSequence(g, lengths, **attrs), None)


def _range_delta(op: Emitter, g: Any, y: Any, start: Any, limit: Any, delta: Any, **_: Any) -> Any:
    """y_i = start + i delta;  d delta = sum_i i g_i."""
    n = op.Squeeze(op.dim_of(g, 0), [0])
    numbers = op.cast(op.Range(op.constant(np.asarray(0)), n, op.constant(np.asarray(1))), op.dtype(g))
    return reshape_like(op, op.ReduceSum(op.Mul(g, numbers), keepdims=0), delta)


defvjp(
    "Range",
    lambda op, g, y, start, limit, delta, **_: reshape_like(op, op.ReduceSum(g, keepdims=0), start),
    None,
    _range_delta,
    note="limit decides the number of elements only",
)
