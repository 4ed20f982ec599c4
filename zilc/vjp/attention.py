"""Attention and RotaryEmbedding.

Attention's probabilities are computed anew from the operands: they are the one large intermediate, and ONNX's operator
does not hand them out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes
from zilc.emit import Emitter
from zilc.vjp.indexing import scatter_add
from zilc.vjp.shape import known, rank_of, reshape_like, swap_last
from zilc.vjp.table import defvjp, unbroadcast

_BATCH_FIRST = [0, 2, 1, 3]  # [B, S, H, D] <-> [B, H, S, D]


def _ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def _shape(op: Emitter, *parts: int | tuple[gs.Tensor, int]) -> gs.Tensor:
    """An int64 shape from numbers and dimensions of tensors; a constant where all are known."""
    pieces = [op.constant(_ints(p)) if isinstance(p, int) else op.dim_of(*p) for p in parts]
    values = [op.value(p) for p in pieces]
    if all(v is not None for v in values):
        return op.constant(np.concatenate(values))  # type: ignore[arg-type]
    return op.Concat(*pieces, axis=0)


@dataclass
class _Attention:
    """What the formulas of Attention share.  H query heads, h key heads, H / h = r; S queries, L keys.

    The r query heads of one key head are stacked as rows, [B, h, r S, ...]: a view, so that grouped queries need
    neither copies of the keys nor sums over the copies.
    """

    op: Emitter
    q: gs.Tensor  # [B, H, S, D]
    k: gs.Tensor  # [B, h, L, D], the past included
    v: gs.Tensor
    p: gs.Tensor  # [B, H, S, L]
    tanh: gs.Tensor | None  # of softcap
    scale: gs.Tensor | float
    grouped: bool

    def rows(self, x: gs.Tensor) -> gs.Tensor:
        """[B, H, S, n] as [B, h, r S, n]."""
        if not self.grouped:
            return x
        return self.op.Reshape(x, _shape(self.op, (x, 0), (self.k, 1), -1, (x, 3)))

    def heads(self, x: gs.Tensor) -> gs.Tensor:
        """[B, h, r S, n] as [B, H, S, n]."""
        if not self.grouped:
            return x
        return self.op.Reshape(x, _shape(self.op, (x, 0), (self.q, 1), (self.q, 2), (x, 3)))


def _split_heads(op: Emitter, x: gs.Tensor, heads: int | None) -> gs.Tensor:
    """[B, S, H D] as [B, H, S, D]."""
    if rank_of(op, x) == 4:
        return x
    assert heads is not None
    n = op.dims(x)[2]  # type: ignore[index]
    width = int(n) // heads if known(n) else -1  # type: ignore[arg-type]
    return op.Transpose(op.Reshape(x, [0, 0, heads, width]), perm=_BATCH_FIRST)


def _join_heads(op: Emitter, g: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    """The inverse, into the shape of ``x``."""
    return g if rank_of(op, x) == 4 else reshape_like(op, op.Transpose(g, perm=_BATCH_FIRST), x)


def _range(op: Emitter, x: gs.Tensor, axis: int) -> gs.Tensor:
    """0 … n - 1, n a dimension of ``x``."""
    n = op.dim_of(x, axis)
    value = op.value(n)
    if value is not None:
        return op.constant(np.arange(int(value[0]), dtype=np.int64))
    return op.Range(_ints(0).reshape(()), op.Reshape(n, _ints()), _ints(1).reshape(()))


def _allowed(
    op: Emitter, q: gs.Tensor, k: gs.Tensor, past: Any, nonpad: Any, causal: int, left: int, right: int
) -> Any:
    """Which keys a query sees by position, broadcastable to [B, 1, S, L]; None where all are seen."""
    column = op.Reshape(_range(op, k, 2), [1, -1])  # j: [1, L]
    seen = []
    if nonpad is not None:
        nonpad = op.Reshape(op.cast(nonpad, np.int64), [-1, 1, 1, 1])  # [B, 1, 1, 1]
        seen.append(op.Less(column, nonpad))
    if causal or left >= 0 or right >= 0:
        position = op.Reshape(_range(op, q, 2), [-1, 1])  # [S, 1]
        if past is not None:
            position = op.Add(position, op.dim_of(past, 2))
        elif nonpad is not None:
            position = op.Add(position, op.Sub(nonpad, op.dim_of(q, 2)))
        if causal:
            seen.append(op.LessOrEqual(column, position))
        if left >= 0:
            seen.append(op.LessOrEqual(op.Sub(position, left), column))
        if right >= 0:
            seen.append(op.LessOrEqual(column, op.Add(position, right)))
    allowed = None
    for one in seen:
        allowed = one if allowed is None else op.And(allowed, one)
    return allowed


def _padded_mask(op: Emitter, mask: gs.Tensor, k: gs.Tensor) -> gs.Tensor:
    """A mask may end before the keys do: what it leaves out is masked."""
    rank = rank_of(op, mask)
    have, want = op.dims(mask)[-1], op.dims(k)[2]  # type: ignore[index]
    if have == want and have is not None:
        return mask
    if known(have) and known(want):
        if have == 1:
            return mask
        pads: Any = [0, int(want) - int(have)]  # type: ignore[arg-type]
    else:
        pads = op.Concat(op.constant(_ints(0)), op.Sub(op.dim_of(k, 2), op.dim_of(mask, rank - 1)), axis=0)
    fill = np.asarray(False) if op.dtype(mask) == np.dtype(bool) else np.asarray(-np.inf, op.dtype(mask))
    return op.Pad(mask, pads, fill, [rank - 1])


def _attend(op: Emitter, operands: tuple[Any, ...], attrs: dict[str, Any]) -> _Attention:
    q, k, v, mask, past_k, past_v, nonpad = operands
    heads, kv_heads = attrs["q_num_heads"], attrs["kv_num_heads"]
    q, k, v = _split_heads(op, q, heads), _split_heads(op, k, kv_heads), _split_heads(op, v, kv_heads)
    if past_k is not None:
        k, v = op.Concat(past_k, k, axis=2), op.Concat(past_v, v, axis=2)
    dtype = op.dtype(q)
    scale: Any = attrs["scale"]
    if not scale:
        width = op.dims(q)[3]  # type: ignore[index]
        if known(width):
            scale = 1.0 / math.sqrt(int(width))  # type: ignore[arg-type]
        else:
            scale = op.Reciprocal(op.Sqrt(op.cast(op.dim_of(q, 3), dtype)))  # [1]
    n, m = op.dims(q)[1], op.dims(k)[1]  # type: ignore[index]
    a = _Attention(op, q, k, v, q, None, scale, grouped=n is None or n != m)
    logits = a.heads(op.Mul(op.MatMul(a.rows(q), swap_last(op, k)), scale))
    softcap = attrs["softcap"] or 0.0
    if softcap > 0:
        a.tanh = op.Tanh(op.Div(logits, softcap))
        logits = op.Mul(a.tanh, softcap)
    left, right = attrs.get("left_window_size"), attrs.get("right_window_size")
    left, right = -1 if left is None else left, -1 if right is None else right
    causal = attrs["is_causal"] or 0
    allowed = _allowed(op, q, k, past_k, nonpad, causal, left, right)
    certain = nonpad is None and left < 0 and right < 0  # some key is left to every query
    if mask is not None:
        mask, certain = _padded_mask(op, mask, k), False
        if op.dtype(mask) != np.dtype(bool):
            logits = op.Add(logits, mask)
            mask = op.Greater(mask, -math.inf)
        allowed = mask if allowed is None else op.And(allowed, mask)
    # The least finite number, not -inf: a query that sees no key at all must not turn into NaN.
    if allowed is not None:
        logits = op.Where(allowed, logits, op.constant(np.asarray(_lowest(dtype), dtype)))
    precision = attrs["softmax_precision"]
    if precision:
        logits = op.cast(logits, dtypes.np_dtype(precision))
    a.p = op.cast(op.Softmax(logits, axis=-1), dtype)
    if not certain:
        a.p = op.Where(allowed, a.p, op.scalar_like(0, a.p))
    return a


def _lowest(dtype: np.dtype) -> float:
    return -6e4 if dtype.name == "float16" else -3e38 if dtype.name in ("float32", "bfloat16") else -1e300


def _d_logits(a: _Attention, g: Any, y: Any, attrs: dict[str, Any], *, biased: bool) -> gs.Tensor | None:
    """Cotangent of the logits: after mask and softcap (``biased``), or of scale * Q K^T."""
    op, mode = a.op, attrs["qk_matmul_output_mode"] or 0
    extra = g[3] if len(g) > 3 else None
    d = None
    if g[0] is not None:
        dy = _split_heads(op, g[0], attrs["q_num_heads"])
        dp = a.heads(op.MatMul(a.rows(dy), swap_last(op, a.v)))
        # sum_L P dP = sum_D Y dY
        along = op.ReduceSum(op.Mul(dy, _split_heads(op, y[0], attrs["q_num_heads"])), [-1], keepdims=1)
        d = op.Mul(a.p, op.Sub(dp, along))
    if extra is not None and mode == 3:
        along = op.ReduceSum(op.Mul(a.p, extra), [-1], keepdims=1)
        d = _plus(op, d, op.Mul(a.p, op.Sub(extra, along)))
    if extra is not None and mode == 2:
        d = _plus(op, d, extra)
    if biased:
        return d
    if extra is not None and mode == 1:
        d = _plus(op, d, extra)
    if a.tanh is not None and d is not None:
        d = op.Mul(d, op.Sub(1.0, op.Mul(a.tanh, a.tanh)))
    if extra is not None and mode == 0:
        d = _plus(op, d, extra)
    return d


def _plus(op: Emitter, x: gs.Tensor | None, more: gs.Tensor) -> gs.Tensor:
    return more if x is None else op.Add(x, more)


def _attention_q(op: Emitter, g: Any, y: Any, *xs: Any, **attrs: Any) -> Any:
    """dQ = scale dS K."""
    a = _attend(op, _seven(xs), attrs)
    d = _d_logits(a, g, y, attrs, biased=False)
    return None if d is None else _join_heads(op, op.Mul(a.heads(op.MatMul(a.rows(d), a.k)), a.scale), xs[0])


def _d_keys(op: Emitter, g: Any, y: Any, operands: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
    """dK = scale dS^T Q, past and new together."""
    a = _attend(op, operands, attrs)
    d = _d_logits(a, g, y, attrs, biased=False)
    present = g[1] if len(g) > 1 else None
    if d is None:
        return present
    made = op.Mul(op.MatMul(swap_last(op, a.rows(d)), a.rows(a.q)), a.scale)
    return made if present is None else op.Add(made, present)


def _d_values(op: Emitter, g: Any, y: Any, operands: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
    """dV = P^T dY, past and new together."""
    present = g[2] if len(g) > 2 else None
    if g[0] is None:
        return present
    a = _attend(op, operands, attrs)
    dy = _split_heads(op, g[0], attrs["q_num_heads"])
    made = op.MatMul(swap_last(op, a.rows(a.p)), a.rows(dy))
    return made if present is None else op.Add(made, present)


def _new(op: Emitter, d: Any, x: Any, past: Any) -> Any:
    """The part of a cotangent [B, h, L, n] that belongs to the new keys or values."""
    if d is None:
        return None
    if past is not None:
        d = op.Slice(d, op.dim_of(past, 2), [2**62], [2])
    return _join_heads(op, d, x)


def _old(op: Emitter, d: Any, past: Any) -> Any:
    """The part that belongs to the past."""
    return None if d is None else op.Slice(d, [0], op.dim_of(past, 2), [2])


def _attention_k(op: Emitter, g: Any, y: Any, *xs: Any, **attrs: Any) -> Any:
    return _new(op, _d_keys(op, g, y, _seven(xs), attrs), xs[1], xs[4])


def _attention_v(op: Emitter, g: Any, y: Any, *xs: Any, **attrs: Any) -> Any:
    return _new(op, _d_values(op, g, y, _seven(xs), attrs), xs[2], xs[5])


def _attention_past_k(op: Emitter, g: Any, y: Any, *xs: Any, **attrs: Any) -> Any:
    return _old(op, _d_keys(op, g, y, _seven(xs), attrs), xs[4])


def _attention_past_v(op: Emitter, g: Any, y: Any, *xs: Any, **attrs: Any) -> Any:
    return _old(op, _d_values(op, g, y, _seven(xs), attrs), xs[5])


def _attention_mask(op: Emitter, g: Any, y: Any, *xs: Any, **attrs: Any) -> Any:
    """dM = dS, summed over the axes along which the mask was broadcast, its padding left out."""
    xs = _seven(xs)
    mask = xs[3]
    a = _attend(op, xs, attrs)
    d = _d_logits(a, g, y, attrs, biased=True)
    if d is None:
        return None
    padded = _padded_mask(op, mask, a.k)
    d = unbroadcast(op, d, padded, a.p)
    return d if padded is mask else op.Slice(d, [0], op.dim_of(mask, -1), [-1])


def _seven(xs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*xs, *[None] * (7 - len(xs)))


defvjp(
    "Attention",
    _attention_q,
    _attention_k,
    _attention_v,
    _attention_mask,
    _attention_past_k,
    _attention_past_v,
    multi=True,
    note="probabilities are recomputed",
)

# -- RotaryEmbedding --


def _rotary_x(op: Emitter, g: Any, y: Any, x: Any, cos: Any, sin: Any, position: Any, **attrs: Any) -> Any:
    """A rotation's transpose turns the other way."""
    return op.RotaryEmbedding(g, cos, op.Neg(sin), position, **attrs)


def _rotary_cache(op: Emitter, g: Any, y: Any, x: Any, cache: Any, position: Any, attrs: dict[str, Any]) -> Any:
    """y = cos x + sin J x: ``x`` here is x or J x; products are summed over heads and over each pair."""
    products = op.Mul(g, x)
    if rank_of(op, products) == 3:
        products = op.Reshape(products, [0, 0, attrs["num_heads"], -1])
        heads = 2
    else:
        heads = 1
    products = op.ReduceSum(products, [heads], keepdims=0)  # [B, S, D]
    half = op.dim_of(cache, -1)
    turned = op.Slice(products, [0], op.Mul(half, 2), [2])
    b, s = op.dim_of(products, 0), op.dim_of(products, 1)
    if attrs["interleaved"]:
        pairs = op.Reshape(turned, op.Concat(b, s, half, _ints(2), axis=0))
        d = op.ReduceSum(pairs, [3], keepdims=0)
    else:
        pairs = op.Reshape(turned, op.Concat(b, s, _ints(2), half, axis=0))
        d = op.ReduceSum(pairs, [2], keepdims=0)
    if position is None:
        return d  # [B, S, D / 2]
    rows = op.Reshape(d, op.Concat(_ints(-1), half, axis=0))
    return scatter_add(op, rows, op.Reshape(position, [-1]), 0, 2, op.dim_of(cache, 0), shape=op.shape_of(cache))


def _rotary_cos(op: Emitter, g: Any, y: Any, x: Any, cos: Any, sin: Any, position: Any, **attrs: Any) -> Any:
    return _rotary_cache(op, g, y, x, cos, position, attrs)


def _rotary_sin(op: Emitter, g: Any, y: Any, x: Any, cos: Any, sin: Any, position: Any, **attrs: Any) -> Any:
    zero, one = op.scalar_like(0, sin), op.scalar_like(1, sin)
    shape = op.shape_of(sin)
    turned = op.RotaryEmbedding(x, op.Expand(zero, shape), op.Expand(one, shape), position, **attrs)
    return _rotary_cache(op, g, y, turned, sin, position, attrs)


defvjp("RotaryEmbedding", _rotary_x, _rotary_cos, _rotary_sin, None)
