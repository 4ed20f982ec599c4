"""Products of matrices and tensors: MatMul, Gemm, Einsum, Det, AffineGrid."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.errors import ModelError
from zilc.lowerings import Lowering, assumed
from zilc.vjp.shape import known, rank_of, reshape_like, swap_last
from zilc.vjp.table import defvjp, sum_axes, unbroadcast, variadic

# -- MatMul --


def _matmul_a(op: Emitter, g: Any, y: Any, a: Any, b: Any) -> Any:
    """Y = A B;  dA = G B^T."""
    ra, rb = rank_of(op, a), rank_of(op, b)
    if rb == 1:
        return op.Mul(g, b) if ra == 1 else op.MatMul(op.Unsqueeze(g, [-1]), op.Unsqueeze(b, [0]))
    if ra == 1:  # [K] [..., K, N] -> [..., N]
        if rb == 2:
            return op.MatMul(b, g)
        columns = op.MatMul(b, op.Unsqueeze(g, [-1]))  # [..., K, 1]
        return op.ReduceSum(columns, [*range(rb - 2), rb - 1], keepdims=0)
    product = op.MatMul(g, swap_last(op, b))
    return product if rb == 2 else _sum_batch(op, product, a, y)


def _matmul_b(op: Emitter, g: Any, y: Any, a: Any, b: Any) -> Any:
    """Y = A B;  dB = A^T G, one product of two matrices where B is one matrix."""
    ra, rb = rank_of(op, a), rank_of(op, b)
    if ra == 1:
        return op.Mul(g, a) if rb == 1 else op.MatMul(op.Unsqueeze(a, [1]), op.Unsqueeze(g, [-2]))
    if rb == 1:
        return op.MatMul(op.Reshape(g, [-1]) if ra > 2 else g, _rows(op, a))
    if all(n == 1 for n in op.dims(b)[:-2]):  # type: ignore[index]
        product = op.Gemm(_rows(op, a), _rows(op, g), transA=1)
        return product if rb == 2 else reshape_like(op, product, b)
    return _sum_batch(op, op.MatMul(swap_last(op, a), g), b, y)


def _rows(op: Emitter, x: gs.Tensor) -> gs.Tensor:
    """``x`` [..., n] as a matrix [rows, n]."""
    rank = rank_of(op, x)
    return x if rank == 2 else op.as_matrix(x, rank - 1)


def _sum_batch(op: Emitter, g: gs.Tensor, x: gs.Tensor, y: gs.Tensor) -> gs.Tensor:
    """Undo the broadcasting of the batch axes of ``x``; only the last two axes of ``y`` differ from those of ``g``."""
    xs, ys = op.dims(x), op.dims(y)
    assert xs is not None
    assert ys is not None
    lead = len(ys) - len(xs)
    axes = list(range(lead))
    for k, (n, m) in enumerate(zip(xs[:-2], ys[lead:-2], strict=True)):
        if n == 1 and m != 1:
            axes.append(lead + k)
        elif not known(n) and (n is None or n != m):
            return unbroadcast(op, g, x, g)
    return sum_axes(op, g, axes, lead, xs)


defvjp("MatMul", _matmul_a, _matmul_b)

# -- Gemm --


def _gemm_a(
    op: Emitter, g: Any, y: Any, a: Any, b: Any, c: Any, *, alpha: float, beta: float, transA: int, transB: int
) -> Any:
    """Y = alpha A' B' + beta C;  dA = alpha G B'^T, transposed if A was."""
    if transA:
        return op.Gemm(b, g, alpha=alpha, transA=transB, transB=1)
    return op.Gemm(g, b, alpha=alpha, transA=0, transB=1 - transB)


def _gemm_b(
    op: Emitter, g: Any, y: Any, a: Any, b: Any, c: Any, *, alpha: float, beta: float, transA: int, transB: int
) -> Any:
    """Y = alpha A' B' + beta C;  dB = alpha A'^T G, transposed if B was."""
    if transB:
        return op.Gemm(g, a, alpha=alpha, transA=1, transB=transA)
    return op.Gemm(a, g, alpha=alpha, transA=1 - transA, transB=0)


def _gemm_c(
    op: Emitter, g: Any, y: Any, a: Any, b: Any, c: Any, *, alpha: float, beta: float, transA: int, transB: int
) -> Any:
    """Y = alpha A' B' + beta C;  dC = beta G, summed over the axes along which C was broadcast."""
    summed = unbroadcast(op, g, c, y)  # before the factor: C is often a row
    return summed if beta == 1.0 else op.Mul(summed, float(beta))


defvjp("Gemm", _gemm_a, _gemm_b, _gemm_c)


#: Of more rows than this the product itself takes longer than reading its factors.
_FEW = 64


def gemm_lowerings(
    op: Emitter, a: gs.Tensor, b: gs.Tensor, *, alpha: float, beta: float, transA: int, transB: int
) -> dict[str, Lowering]:
    """The forms of Y = A B^T + C itself, first the operator as it stands; none if it is the only one.

    Of few rows and a wide B, most of the time goes into reading B.  onnxruntime lays the second factor of a product out
    anew before it uses it, the first it takes as it comes: where B comes first, in Y^T = B A^T, it is read once.
    """
    rows, weight = assumed(op, a), op.static(b)
    if transA or not transB or alpha != 1.0 or beta != 1.0 or rows is None or weight is None or 0 in weight:
        return {}
    if not 1 < rows[0] <= _FEW or op.lowerings.target != "cpu" or op.dtype(b) != np.float32:
        return {}
    (n, k), m = rows, weight[0]
    work = {"multiply-adds": n * k * m, "weight": k * m, "operand": n * k, "result": n * m}
    return {"gemm": Lowering(_gemm, work), "turned": Lowering(_turned_gemm, work)}


def _gemm(op: Emitter, a: gs.Tensor, b: gs.Tensor, c: gs.Tensor | None = None) -> gs.Tensor:
    return op.Gemm(a, b, c, transB=1)


def _turned_gemm(op: Emitter, a: gs.Tensor, b: gs.Tensor, c: gs.Tensor | None = None) -> gs.Tensor:
    made = op.Transpose(op.MatMul(b, op.Transpose(a, perm=[1, 0])), perm=[1, 0])
    return made if c is None else op.Add(made, c)

# -- Einsum --


def _einsum(op: Emitter, g: Any, y: Any, index: int, *operands: Any, equation: str) -> Any:
    """The einsum that takes g in the output's place and gives operand ``index``.

    What the operand's subscripts repeat (a diagonal) is put back on the diagonal of zeros; what only this operand has
    was summed, so its cotangent is the same all along.
    """
    terms, out, batch = _subscripts(equation, [rank_of(op, x) for x in operands])
    x, term = operands[index], terms[index]
    distinct = "".join(dict.fromkeys(term))
    others = [(t, o) for k, (t, o) in enumerate(zip(terms, operands, strict=True)) if k != index]
    present = set(out).union(*(t for t, _ in others))
    kept = "".join(c for c in distinct if c in present)
    inputs = ",".join([out, *(t for t, _ in others)])
    d = op.Einsum(g, *(o for _, o in others), equation=f"{inputs}->{kept}")
    missing = [k for k, c in enumerate(distinct) if c not in present]
    if missing:
        d = op.Unsqueeze(d, missing)
    if len(distinct) < len(term):
        return _to_diagonal(op, d, x, term, distinct)
    return _fit(op, d, x, term, terms, operands, batch, bool(missing))


def _subscripts(equation: str, ranks: list[int]) -> tuple[list[str], str, str]:
    """Subscripts of each operand and of the output with letters for the ellipsis, and these letters."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [c for c in string.ascii_letters if c not in equation]
    width = max((r - len(t) + 3 for t, r in zip(terms, ranks, strict=True) if "..." in t), default=0)
    batch = "".join(free[:width])
    filled = []
    for term, rank in zip(terms, ranks, strict=True):
        own = rank - len(term) + 3
        filled.append(term.replace("...", batch[width - own :] if own else ""))
    if arrow:
        out = right.replace("...", batch)
    else:  # implicit: the ellipsis, then the letters that occur once, in the order of the alphabet
        letters = left.replace("...", "").replace(",", "")
        out = batch + "".join(c for c in sorted(set(letters)) if letters.count(c) == 1)
    return filled, out, batch


def _to_diagonal(op: Emitter, d: gs.Tensor, x: gs.Tensor, term: str, distinct: str) -> gs.Tensor:
    """``d`` [distinct subscripts] where all positions of a repeated subscript agree, zero elsewhere; shape of ``x``."""
    first = [term.index(c) for c in distinct]
    spread = op.Unsqueeze(d, [k for k in range(len(term)) if k not in first]) if len(first) < len(term) else d
    order = sorted(first)
    assert order == first  # subscripts are kept in the order of their first occurrence
    zero = op.scalar_like(0, d)
    for k, c in enumerate(term):
        if k == term.index(c):
            continue
        mask = op.Equal(_positions(op, x, k, len(term)), _positions(op, x, term.index(c), len(term)))
        spread = op.Where(mask, spread, zero)
    return op.Expand(spread, op.shape_of(x))


def _positions(op: Emitter, x: gs.Tensor, axis: int, rank: int) -> gs.Tensor:
    """0 … n - 1 along ``axis``, with size 1 along the others."""
    n = op.Reshape(op.dim_of(x, axis), op.constant(np.asarray([], np.int64)))
    count = op.Range(op.constant(np.asarray(0)), n, op.constant(np.asarray(1)))
    return op.Unsqueeze(count, [k for k in range(rank) if k != axis]) if rank > 1 else count


def _fit(
    op: Emitter, d: gs.Tensor, x: gs.Tensor, term: str, terms: list[str], operands: Any, batch: str, missing: bool
) -> gs.Tensor:
    """Sum and repeat where a subscript had size 1 in one operand and n in another.

    A named subscript is taken to have one size where sizes are symbolic; under an ellipsis they may broadcast.
    """
    want = op.dims(x)
    assert want is not None
    summed, repeated = [], missing
    for k, c in enumerate(term):
        found = [op.dims(o)[t.index(c)] for t, o in zip(terms, operands, strict=True) if c in t]  # type: ignore[index]
        sizes = set(found)
        if len(found) == 1 or (len(sizes) == 1 and None not in sizes):
            continue
        if want[k] == 1:
            summed.append(k)
        elif 1 in sizes:
            repeated = True
        elif c in batch and not (known(want[k]) and want[k] != 1):
            # Sizes are settled at run time: repeat to the larger, then sum down to x.
            full = op.Expand(d, op.shape_of(x))
            return unbroadcast(op, full, x, full)
    if summed:
        d = op.ReduceSum(d, summed, keepdims=1)
    return op.Expand(d, op.shape_of(x)) if repeated else d


variadic("Einsum", _einsum)

# -- Det --


def _det(op: Emitter, g: Any, y: Any, x: Any) -> Any:
    """d det X / dX = the cofactors of X, which exist where the inverse does not."""
    dims = op.dims(x)
    n = dims[-1] if dims is not None and known(dims[-1]) else (dims[-2] if dims is not None else None)
    if not known(n):
        raise ModelError(
            "Det has a VJP rule only for matrices of known size", where=f"tensor '{x.name}'", hint="Fix it with --dim."
        )
    n = int(n)  # type: ignore[arg-type]
    spread = op.Unsqueeze(g, [-1, -2])
    if n == 1:
        return reshape_like(op, spread, x)
    rest = np.asarray([[j for j in range(n) if j != i] for i in range(n)], np.int64)  # [n, n - 1]
    rank = rank_of(op, x)
    rows = op.Gather(x, rest, axis=rank - 2)  # [..., i, n - 1, n]
    minors = op.Gather(rows, rest, axis=rank)  # [..., i, n - 1, j, n - 1]
    lead = list(range(rank - 2))
    ordered = op.Transpose(minors, perm=[*lead, rank - 2, rank, rank - 1, rank + 1])
    signs = np.asarray([[(-1.0) ** (i + j) for j in range(n)] for i in range(n)], op.dtype(x))
    return op.Mul(spread, op.Mul(op.Det(ordered), signs))


defvjp("Det", _det, note="matrices of known size")

# -- AffineGrid --


def _affine_grid(op: Emitter, g: Any, y: Any, theta: Any, size: Any, *, align_corners: int) -> Any:
    """y = [p, 1] theta^T for each point p of a grid; the grid itself is what theta = [I, 0] gives."""
    n = rank_of(op, y) - 2  # spatial dimensions, 2 or 3
    one = op.Concat(np.asarray([1], np.int64), op.Slice(size, [1], [n + 2], [0]), axis=0)
    grid = op.AffineGrid(np.eye(n, n + 1, dtype=op.dtype(theta))[None], one, align_corners=align_corners)
    points = op.Pad(op.Reshape(grid, [-1, n]), [0, 0, 0, 1], op.scalar_like(1, theta))  # [points, n + 1]
    return op.MatMul(swap_last(op, op.Reshape(g, [0, -1, n])), points)


defvjp("AffineGrid", _affine_grid, None)
