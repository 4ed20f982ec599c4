"""Winograd's minimal filtering of convolutions, in standard operators.

F(m, r) makes m outputs of a filter with r taps out of m + r - 1 products instead of m r (S. Winograd, Arithmetic
Complexity of Computations, 1980):

    y = A^T [(G w) * (B^T x)]          x: m + r - 1 elements, y[i] = sum_k w[k] x[i + k]

and so, by transposition, dw = G^T [(B^T x) * (A dy)].  With several spatial axes the transforms are Kronecker products
of those of each axis.  Summed over channels, examples and tiles, the products of each element of a tile become one
matrix product (A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016): 16 of them with
tiles of 2 x 2 outputs and 3 x 3 taps, in which a multiply-add serves 2.25 of the convolution's.

How tiles are transformed: with spatial axes first, all images are one image of one channel with one more axis, the
last.  A convolution of that with the rows of B^T as filters, of one element on that axis and strided from tile to tile
on the others, transforms all of them, and copies runs of N C elements.  What it gives has the element of a tile first,
and the channels last, as the matrix products take it as it lies: [1, 1, ..., N C] -> [elements, tiles N, C].  The zeros
around an image are the convolution's own pads, so that nothing is copied for them.  A batch of an open size gets an
image of zeros where it is empty, for runtimes refuse none.

Larger tiles, of 4 x 4 outputs, save more multiplications: ResNet18's step takes a tenth less with them
(docs/PROFILE.md).  But they are several times less accurate (tests/vjp/test_winograd.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.vjp.window import Window, block, channels_first, int64s, spatial_first, zero_pad

#: Outputs of a tile on an axis.  With three taps all transforms are then of 0, 1, -1 and 1/2.
OUTPUTS = 2
#: Taps of an axis, at most.
TAPS = 3
#: Sums and differences of a tile's elements are rounded before they are multiplied, so it should be worth it.
HANDICAP = 1.1
#: Where the polynomials are evaluated, besides infinity.
_POINTS = [Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-2)]


@functools.cache
def transforms(outputs: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A^T, G and B^T of F(outputs, taps), by the Toom-Cook algorithm.

    Returns:
        float64 arrays [m, n], [n, r] and [n, n], where n = m + r - 1.
    """
    n = outputs + taps - 1
    points = _POINTS[: n - 1]

    def others(j: int) -> list[Fraction]:
        return [point for k, point in enumerate(points) if k != j]

    def polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
        """Coefficients of prod (x - root), the constant first."""
        made = [Fraction(1)]
        for root in roots:
            shifted = [Fraction(0), *made]
            made = [a - root * b for a, b in zip(shifted, [*made, Fraction(0)], strict=True)]
        return made

    def infinity(size: int) -> list[Fraction]:
        return [Fraction(0)] * (size - 1) + [Fraction(1)]

    at = [[point**i for i in range(outputs)] for point in points] + [infinity(outputs)]
    filters, inputs = [], []
    for j, point in enumerate(points):
        divisor = math.prod((point - other for other in others(j)), start=Fraction(1))
        row = [point**i / divisor for i in range(taps)]
        # Moving a power of two from G to B^T changes no rounding and keeps both near one.
        scale = Fraction(2) ** round(math.log2(max(abs(x) for x in row)))
        filters.append([x / scale for x in row])
        inputs.append([x * scale for x in (*polynomial(others(j)), Fraction(0))])
    filters.append(infinity(taps))
    inputs.append(polynomial(points))
    made = [np.array([[float(x) for x in row] for row in rows]) for rows in (at, filters, inputs)]
    return made[0].T, made[1], made[2]


@dataclass(frozen=True)
class Tiling:
    """Tiles over the positions of the outputs; lists have one entry a spatial axis.

    Attributes:
        outputs: of a tile, m; where there is a single tap, 1.
        taps: r.
        counts: tiles of an image.
    """

    outputs: list[int]
    taps: list[int]
    counts: list[int]

    @classmethod
    def over(cls, sizes: Sequence[int], taps: Sequence[int]) -> Tiling:
        """Tiles over outputs of ``sizes``."""
        outputs = [1 if k == 1 else OUTPUTS for k in taps]
        return cls(outputs, list(taps), [-(-n // m) for n, m in zip(sizes, outputs, strict=True)])

    @property
    def lengths(self) -> list[int]:
        """Elements that a tile is made of, n = m + r - 1."""
        return [m + r - 1 for m, r in zip(self.outputs, self.taps, strict=True)]

    @property
    def elements(self) -> int:
        return math.prod(self.lengths)

    @property
    def tiles(self) -> int:
        """Of an image."""
        return math.prod(self.counts)

    @property
    def covered(self) -> list[int]:
        """Outputs of all tiles of an image, those beyond the last included."""
        return [n * m for n, m in zip(self.counts, self.outputs, strict=True)]

    def kronecker(self, which: int) -> np.ndarray:
        """A^T (0), G (1) or B^T (2) of all axes."""
        each = [transforms(m, r)[which] for m, r in zip(self.outputs, self.taps, strict=True)]
        return functools.reduce(np.kron, each)


def fits(window: Window) -> bool:
    """Whether there are Winograd forms for a window: all of its sizes are known, and no step leaves elements out."""
    return (
        window.rank <= 2
        and window.group == 1
        and all(s == d == 1 for s, d in zip(window.strides, window.dilations, strict=True))
        and window.kernel is not None
        and window.image is not None
        and window.map is not None
        and any(k > 1 for k in window.kernel)
        and all(k <= TAPS for k in window.kernel)
    )


class _Sizes(NamedTuple):
    """What is static of a convolution: the weight's shape, and a list for the spatial axes of each other thing."""

    weight: tuple[int, ...]
    taps: list[int]
    begin: list[int]
    image: list[int]
    map: list[int]


def _sizes(op: Emitter, w: gs.Tensor, window: Window) -> _Sizes:
    weight = op.static(w)
    assert weight is not None, "static sizes"
    assert window.kernel is not None, "static sizes"
    assert isinstance(window.begin, list), "static sizes"
    assert window.image is not None, "static sizes"
    assert window.map is not None, "static sizes"
    return _Sizes(weight, window.kernel, window.begin, window.image, window.map)


def weight_by_winograd(
    op: Emitter, image: gs.Tensor, map_: gs.Tensor, w: gs.Tensor, window: Window, *, batched: bool = False
) -> gs.Tensor:
    """dW = G^T [sum over examples and tiles of (A map) (B^T image)^T].

    A strided window's image is taken apart first: see :func:`in_phases`.  The weight's and all spatial sizes must be
    static; the batch may be symbolic.

    ``batched``: a product an example, added up; nothing is transposed, but there are as many partial results as
    examples.
    """
    sizes = _sizes(op, w, window)
    if max(window.strides) > 1:
        return _weight_in_phases(op, image, map_, sizes, window, batched=batched)
    return _weight(op, image, map_, sizes, window, batched=batched)


def _weight(
    op: Emitter, image: gs.Tensor, map_: gs.Tensor, sizes: _Sizes, window: Window, *, batched: bool
) -> gs.Tensor:
    tiling, (m, c) = map_tiling(window), sizes.weight[:2]
    x = _image_tiles(op, image, tiling, sizes.begin, sizes.image, batched=batched)
    # The map in whole tiles.
    front, behind = [0] * window.rank, [n - p for n, p in zip(tiling.covered, sizes.map, strict=True)]
    g = map_ if batched else spatial_first(op, map_)
    g = _tiles(
        op, g, sizes.map, tiling.kronecker(0).T, tiling.outputs, tiling.outputs, front, behind, batched=batched
    )
    if batched:
        x, g = (op.Reshape(t, [tiling.elements, -1, n, tiling.tiles]) for t, n in ((x, c), (g, m)))
        products = op.ReduceSum(op.MatMul(g, op.Transpose(x, perm=[0, 1, 3, 2])), [1], keepdims=0)
    else:
        x, g = (op.Reshape(t, [tiling.elements, -1, n]) for t, n in ((x, c), (g, m)))
        products = op.MatMul(op.Transpose(g, perm=[0, 2, 1]), x)  # [elements, M, C]
    products = op.Reshape(products, [tiling.elements, m * c])
    return op.Reshape(op.Gemm(products, _constant(op, tiling.kronecker(1), g), transA=1), list(sizes.weight))


def in_phases(window: Window) -> Window | None:
    """The window without strides that is left when an image is taken apart into s x s phases, each a channel.

    Tap k of a strided window is tap k / s of phase k mod s.  None where the phases are not SpaceToDepth's.
    """
    if window.rank != 2 or window.group > 1 or len(set(window.strides)) > 1 or window.strides[0] == 1:
        return None
    if max(window.dilations) > 1 or window.kernel is None or window.map is None or window.image is None:
        return None
    if isinstance(window.begin, gs.Tensor):
        return None
    if any(not 0 <= a < k for a, k in zip(window.begin, window.kernel, strict=True)):
        return None
    taps = [-(-k // window.strides[0]) for k in window.kernel]
    image = [p + k - 1 for p, k in zip(window.map, taps, strict=True)]
    return Window(2, 1, [1, 1], [1, 1], [0, 0], [0, 0], taps, image, window.map)


def _weight_in_phases(
    op: Emitter, image: gs.Tensor, map_: gs.Tensor, sizes: _Sizes, window: Window, *, batched: bool
) -> gs.Tensor:
    inner, s = in_phases(window), window.strides[0]
    assert inner is not None, "SpaceToDepth's phases"
    assert inner.image is not None, "static sizes"
    assert inner.kernel is not None, "static sizes"
    # What the taps reach of the padded image, those that fill the last phases up among them.
    reach = [n * s for n in inner.image]
    cut = [min(n, u - a) for n, u, a in zip(sizes.image, reach, sizes.begin, strict=True)]
    x = block(op, image, [0, 0], cut, window.spatial, sizes.image)
    behind = [u - a - n for u, a, n in zip(reach, sizes.begin, cut, strict=True)]
    x = op.SpaceToDepth(zero_pad(op, x, sizes.begin, behind, window.spatial), blocksize=s)
    (m, c), (rows, columns) = sizes.weight[:2], inner.kernel
    apart = _Sizes((m, s * s * c, rows, columns), inner.kernel, [0, 0], inner.image, sizes.map)
    made = op.Reshape(_weight(op, x, map_, apart, inner, batched=batched), [m, s, s, c, rows, columns])
    whole = op.Reshape(op.Transpose(made, perm=[0, 3, 4, 1, 5, 2]), [m, c, rows * s, columns * s])
    return block(op, whole, [0, 0], sizes.taps, window.spatial, [rows * s, columns * s])


def image_by_winograd(op: Emitter, map_: gs.Tensor, w: gs.Tensor, image: gs.Tensor, window: Window) -> gs.Tensor:
    """The map filtered with the mirrored weight, dX = A^T [(G mirrored W)^T (B^T map)].

    The weight's and all spatial sizes must be static; the batch may be symbolic.
    """
    sizes = _sizes(op, w, window)
    begin = [k - 1 - a for k, a in zip(sizes.taps, sizes.begin, strict=True)]
    return _filtered(op, map_, w, sizes.weight[:2], image_tiling(window), begin, sizes.map, sizes.image, mirrored=True)


def value_by_winograd(
    op: Emitter, x: gs.Tensor, w: gs.Tensor, bias: gs.Tensor | None = None, *, window: Window
) -> gs.Tensor:
    """Conv itself, Y = A^T [(G W) (B^T X)] + bias.

    The weight's and all spatial sizes must be static; the batch may be symbolic.
    """
    sizes = _sizes(op, w, window)
    y = _filtered(op, x, w, sizes.weight[:2], map_tiling(window), sizes.begin, sizes.image, sizes.map)
    return y if bias is None else op.Add(y, op.Reshape(bias, [sizes.weight[0], *[1] * window.rank]))


def map_tiling(window: Window) -> Tiling:
    """Tiles of the map: of a convolution's value and its weight's gradient."""
    assert window.kernel is not None, "static sizes"
    assert window.map is not None, "static sizes"
    return Tiling.over(window.map, window.kernel)


def image_tiling(window: Window) -> Tiling:
    """Tiles of the image: of its gradient."""
    assert window.kernel is not None, "static sizes"
    assert window.image is not None, "static sizes"
    return Tiling.over(window.image, window.kernel)


def _filtered(
    op: Emitter,
    x: gs.Tensor,
    w: gs.Tensor,
    channels: Sequence[int],
    tiling: Tiling,
    begin: Sequence[int],
    sizes: Sequence[int],
    outputs: Sequence[int],
    *,
    mirrored: bool = False,
) -> gs.Tensor:
    """``outputs`` sums of ``x`` [N, in, sizes] and ``w`` [out, in, taps].

    Args:
        channels: the weight's first two axes, out and in.
        begin: pads in front; negative where the first elements are left out.
        mirrored: each axis of the taps is read backwards, and the weight is [in, out, taps].
    """
    m, c = channels
    out, into = (c, m) if mirrored else (m, c)
    # Taps are mirrored by the order of G's columns.
    transform = tiling.kronecker(1)[:, :: -1 if mirrored else 1]
    filters = op.Gemm(_constant(op, transform, w), op.Reshape(w, [m * c, math.prod(tiling.taps)]), transB=1)
    filters = op.Reshape(filters, [tiling.elements, m, c])
    if not mirrored:
        filters = op.Transpose(filters, perm=[0, 2, 1])
    images = op.Reshape(_image_tiles(op, x, tiling, begin, sizes), [tiling.elements, -1, into])
    products = op.MatMul(images, filters)  # [elements, tiles N, out]
    rank = len(outputs)
    ones, spatial = [1] * (2 - rank), list(range(rank))
    columns = tiling.kronecker(0).T.reshape(tiling.elements, 1, *ones, *tiling.outputs, 1)
    products = op.Reshape(products, [1, tiling.elements, *ones, *tiling.counts, -1])
    made = op.ConvTranspose(products, _constant(op, columns, w), strides=[*ones, *tiling.outputs, 1])
    y = op.Reshape(made, [*tiling.covered, -1, out])
    if _is_open(op, x, 0):
        stop = op.Concat(int64s(op, outputs), op.dim_of(x, 0), axis=0)
        y = op.Slice(y, int64s(op, [0] * (rank + 1)), stop, [*spatial, rank])
    else:
        y = block(op, y, [0] * rank, list(outputs), spatial, tiling.covered)
    return channels_first(op, y)


def _image_tiles(
    op: Emitter, x: gs.Tensor, tiling: Tiling, begin: Sequence[int], sizes: Sequence[int], *, batched: bool = False
) -> gs.Tensor:
    """B^T of all tiles of ``x`` [N, C, sizes], padded in front.

    Returns:
        [1, elements, tiles on each axis, images], or images before tiles where ``batched``; images are of (N, C).
    """
    rank = len(sizes)
    # What the tiles reach.
    reach = [n * m + r - 1 for n, m, r in zip(tiling.counts, tiling.outputs, tiling.taps, strict=True)]
    start = [max(-a, 0) for a in begin]
    stop = [min(n, u - a) for n, u, a in zip(sizes, reach, begin, strict=True)]
    spatial = list(range(2, 2 + rank)) if batched else list(range(rank))
    x = block(op, x if batched else spatial_first(op, x), start, stop, spatial, list(sizes))
    front = [max(a, 0) for a in begin]
    behind = [u - a - s for u, a, s in zip(reach, begin, stop, strict=True)]
    left = [s - a for a, s in zip(start, stop, strict=True)]
    return _tiles(
        op, x, left, tiling.kronecker(2), tiling.lengths, tiling.outputs, front, behind, batched=batched
    )


def _not_empty(op: Emitter, x: gs.Tensor, batch: int) -> gs.Tensor:
    """A batch of an open size, the axis ``batch``, with an example of zeros where there is none."""
    if not _is_open(op, x, batch):
        return x
    rank = op.rank(x)
    assert rank is not None, "static sizes"
    missing = op.Max(op.Sub(int64s(op, [1]), op.dim_of(x, batch)), int64s(op, [0]))
    return op.Pad(x, op.Concat(int64s(op, [0] * (rank + batch)), missing, int64s(op, [0] * (rank - 1 - batch)), axis=0))


def _is_open(op: Emitter, x: gs.Tensor, axis: int) -> bool:
    dims = op.dims(x)
    return dims is None or not isinstance(dims[axis], (int, np.integer))


def _tiles(
    op: Emitter,
    x: gs.Tensor,
    sizes: Sequence[int],
    transform: np.ndarray,
    lengths: Sequence[int],
    strides: Sequence[int],
    front: Sequence[int],
    behind: Sequence[int],
    *,
    batched: bool,
) -> gs.Tensor:
    """Products of ``transform`` [elements, lengths] and all tiles of [sizes, N, C], the first index outermost.

    Args:
        front, behind: zeros around each image.
        batched: of [N, C, sizes], and the result has the images before the tiles.
    """
    # With three axes at least onnxruntime keeps out of its blocked layout of channels, out of which it would copy.
    ones, rank = [1] * (2 - len(sizes)), len(sizes)
    x = _not_empty(op, x, 0 if batched else rank)

    def axes(images: int, each: Sequence[int]) -> list[int]:
        single = 0 if images == 0 else 1
        return [*[single] * len(ones), *([images, *each] if batched else [*each, images])]

    rows = transform.reshape(len(transform), 1, *axes(1, lengths))
    x = op.Reshape(x, [1, 1, *axes(-1, sizes)])
    return op.Conv(x, _constant(op, rows, x), strides=axes(1, strides), pads=[*axes(0, front), *axes(0, behind)])


def _constant(op: Emitter, array: np.ndarray, like: gs.Tensor) -> gs.Constant:
    return op.constant(np.ascontiguousarray(array, op.dtype(like)))
