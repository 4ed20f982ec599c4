"""Conv and ConvTranspose: weight and input cotangents, each as several lowerings and one choice among them.

Conv is Y[m,p] = sum_{c,k} W[m,c,k] X[c, s p + d k - a] + B[m] (a = begin pads), summed over the channels c of the
group of m, and ConvTranspose is its adjoint in X.  So two sums serve both operators, where the *image* is Conv's
operand (ConvTranspose's output) and the *map* is Conv's output (ConvTranspose's operand):

    weight:  dW[m,c,k] = sum_{n,p} map[n,m,p] image[n,c, s p + d k - a]
    image:   dX[n,c,q] = sum_{m,p,k: s p + d k - a = q} map[n,m,p] W[m,c,k]

float64 graphs have no convolution in ONNX Runtime's CPU provider and run in ONNX's reference evaluator, where
ConvTranspose loops in Python and mixes up its groups; nothing emitted for float64 relies on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.lowerings import Lowering, assumed
from zilc.vjp.conv_lowerings import (
    conv_pads,
    image_by_conv,
    image_by_transpose,
    weight_by_columns,
    weight_by_gather,
    weight_by_rows,
    weight_by_swapped_conv,
    weight_by_volume_conv,
)
from zilc.vjp.table import defvjp
from zilc.vjp.window import (
    Window,
    channels_first,
    conv_window,
    int64s,
    spatial_first,
    spatial_rank,
    spatial_shape,
    transpose_window,
)
from zilc.vjp.winograd import (
    HANDICAP,
    TAPS,
    Tiling,
    fits,
    image_by_winograd,
    image_tiling,
    in_phases,
    map_tiling,
    value_by_winograd,
    weight_by_winograd,
)

#: Winograd's form where the values around it are expected to have spatial axes first as well, and where not.
AMONG, ALONE = "winograd", "winograd alone"
#: Elements of float32 up to which reading them again costs little (32 MiB), by the measurements.
_CACHED = 1 << 23
#: Elements of an index that is kept on the device with the graph.
_INDEX = 1 << 22
Form = Callable[..., gs.Tensor]
Work = dict[str, float]

# --- the choice among forms -------------------------------------------------------------------------------------


class _Counts(NamedTuple):
    """What the work of a convolution is counted in: examples, filters, and products of sizes."""

    batch: int
    channels: int
    filters: int
    weight: int
    taps: int
    positions: int
    elements: int


def _counts(op: Emitter, batched: gs.Tensor, w: gs.Tensor, window: Window) -> _Counts | None:
    """None where a size is open (but for the batch, the first of ``batched``), or where there is nothing."""
    shape, example = op.static(w), assumed(op, batched)
    if shape is None or example is None or window.kernel is None or window.map is None or window.image is None:
        return None
    if 0 in (*shape, *example, *window.map, *window.image):
        return None
    taps, positions, elements = (math.prod(sizes) for sizes in (window.kernel, window.map, window.image))
    return _Counts(example[0], shape[1] * window.group, shape[0], math.prod(shape), taps, positions, elements)


def _is_depthwise(op: Emitter, w: gs.Tensor, window: Window) -> bool:
    dims = op.dims(w)
    return window.group > 1 and dims is not None and dims[1] == 1


def _kind(op: Emitter, operand: str, w: gs.Tensor, window: Window) -> str:
    """The name that costs are kept by: convolutions of different kinds are fitted apart."""
    words = [operand]
    if _is_depthwise(op, w, window):
        words.append("depthwise")
    if window.kernel is not None and all(k == 1 for k in window.kernel):
        words.append("pointwise")
    if any(s > 1 for s in window.strides):
        words.append("strided")
    return ", ".join(words)


def lowerings_of(
    forms: Mapping[str, tuple[Form, Work]], window: Window, erratic: Collection[str] = (), images: Collection[int] = (),
    *, gives_image: bool = False,
) -> dict[str, Lowering]:
    """Forms with their work as candidates.

    Args:
        images: which operands are images or maps; :data:`AMONG` is measured with these in the order of axes that it
            takes them in.
        gives_image: what is computed is one, too.
    """  # fmt: skip
    made: dict[str, Lowering] = {}
    for name, (form, work) in forms.items():
        emit, handicap = partial(form, window=window), HANDICAP if name.startswith("winograd") else 1.0
        timed = partial(_among_others, emit, images, gives_image) if name == AMONG else None
        made[name] = Lowering(emit, work, name in erratic, handicap, timed)
    return made


def _among_others(
    emit: Form, images: Collection[int], gives_image: bool, op: Emitter, *operands: gs.Tensor
) -> gs.Tensor:
    """A form whose operands come with spatial axes first, and whose result is taken so."""
    given = [_as_if_spatial_first(op, x) if k in images else x for k, x in enumerate(operands)]
    made = emit(op, *given)
    return spatial_first(op, made) if gives_image else made


def _as_if_spatial_first(op: Emitter, x: gs.Tensor) -> gs.Tensor:
    """Some array of the shape of ``x`` that lies in memory with spatial axes first."""
    dims = op.dims(x)
    assert dims is not None, "static sizes"
    batch = dims[0] if isinstance(dims[0], (int, np.integer)) else -1
    return channels_first(op, op.Reshape(x, [*dims[2:], batch, dims[1]]))


def weight_cotangent(
    op: Emitter, image: gs.Tensor, map_: gs.Tensor, w: gs.Tensor, window: Window, *, adjoint: bool = False
) -> gs.Tensor:
    """dW[m,c,k] = sum_{n,p} map[n,m,p] image[n,c, s p + d k - a], by the lowering that suits the shapes.

    ``adjoint``: the image is what the operator gave.
    """
    _tell_shapes(op, image, map_, w, window)
    forms = _weight_forms(op, image, w, window, adjoint=adjoint)
    # On a GPU it depends on the algorithm that cuDNN finds: half or ten times the time of products of columns.
    erratic = {"swapped"} if op.lowerings.target == "cuda" and len(forms) > 1 else set()
    kind, candidates = _kind(op, "Conv.weight", w, window), lowerings_of(forms, window, erratic, (0, 1))
    return op.lowerings.emit(op, kind, window.site, [image, map_, w], candidates)


def _weight_forms(
    op: Emitter, image: gs.Tensor, w: gs.Tensor, window: Window, *, adjoint: bool = False
) -> dict[str, tuple[Form, Work]]:
    """The forms of the weight cotangent that these shapes allow, each with its work."""
    convs: dict[str, Form] = {"volume": weight_by_volume_conv, "swapped": weight_by_swapped_conv}
    if window.rank == 3:
        del convs["volume"]  # ONNX Runtime's fast convolutions have at most three spatial axes
    counts = _counts(op, image, w, window)
    if counts is None:
        # Nothing to go by: one product a channel where each has its own, else one product for all.
        name = "swapped" if _is_depthwise(op, w, window) or window.rank == 3 else "volume"
        return {name: (convs[name], {})}
    n, channels, filters, weight, taps, positions, elements = counts
    work: Work = {
        "multiply-adds": n * weight * positions, "columns": n * channels * taps * positions,
        "image": n * channels * elements, "map": n * filters * positions, "weight": weight, "groups": window.group,
    }  # fmt: skip
    by_example: Work = {"partial results": n * weight, "products": n * window.group}
    found: dict[str, tuple[Form, Work]] = {name: (form, work) for name, form in convs.items()}
    found["columns"] = (weight_by_columns, work)
    found["columns by example"] = (partial(weight_by_columns, batched=True), {**work, **by_example})
    if taps == 1 and op.lowerings.target == "cpu":
        del found["columns"]  # for the same product as by rows more is moved
        if window.group == 1:
            found["rows"] = (weight_by_rows, work)
    if taps > 1:
        apart: Work = {**work, "taps": taps, "kernels": taps * n * window.group}
        found["taps"] = (partial(weight_by_columns, apart=True), apart)
        found["taps by example"] = (partial(weight_by_columns, apart=True, batched=True), {**apart, **by_example})
    assert window.kernel is not None
    assert window.map is not None
    k = window.kernel[0]
    if window.rank > 1 and k > 1 and window.strides[0] == 1:
        # The first axis' taps on the map, over all image positions of this axis: k copies of the map and K / k of the
        # image, instead of K of the image.
        longer = (window.extent[0] - 1 + window.map[0]) / window.map[0]
        rows: Work = {
            **work, "columns": (work["columns"] / k + work["map"] * k) * longer,
            "multiply-adds": work["multiply-adds"] * longer,
        }  # fmt: skip
        form = partial(weight_by_columns, on_map=[0])
        found["columns, rows on the map"] = (form, rows)
        found["columns by example, rows on the map"] = (partial(form, batched=True), {**rows, **by_example})
    phases = in_phases(window)
    if _by_winograd(op, w, window):
        forms = _winograd_weights(counts, map_tiling(window))
        if not op.lowerings.whole:
            among = not adjoint and _is_spatial_first(op, image, w, window)
            # Not those that were measured with operands in another order of axes than is expected.
            forms = {name: form for name, form in forms.items() if (name == AMONG) == among}
        found |= forms
    elif phases is not None and phases.kernel == [TAPS, TAPS] and _by_winograd(op, w, phases):
        # With two taps a phase nothing is saved: tiles of 9 elements make 4 outputs, of 9 taps before.
        inner = _counts_in_phases(counts, window, phases)
        forms = _winograd_weights(inner, map_tiling(phases))
        del forms[AMONG]  # an image that is taken apart has the model's order
        found |= forms
    if op.lowerings.target == "cuda":
        for name in ("volume", "taps", "taps by example"):  # which gathered columns beat there
            found.pop(name, None)
        found["gathered columns by example"] = (partial(weight_by_gather, batched=True), {**work, **by_example})
        dims = op.dims(image)
        if dims is not None and isinstance(dims[0], (int, np.integer)) and n * taps * positions <= _INDEX:
            found["gathered columns"] = (weight_by_gather, work)
    return found


def _winograd_weights(counts: _Counts, tiling: Tiling) -> dict[str, tuple[Form, Work]]:
    """Winograd's forms of a weight's cotangent, under the names that their costs are kept by."""
    work, products = _tile_work(counts, tiling), counts.batch * tiling.elements
    by_example: Work = {"partial results": products * counts.channels * counts.filters, "products": products}
    return {
        AMONG: (weight_by_winograd, work),
        ALONE: (weight_by_winograd, work),
        "winograd by example": (partial(weight_by_winograd, batched=True), {**work, **by_example}),
    }


def image_cotangent(op: Emitter, map_: gs.Tensor, w: gs.Tensor, image: gs.Tensor, window: Window) -> gs.Tensor:
    """dX[n,c,q] = sum_{m,p,k: s p + d k - a = q} map[n,m,p] W[m,c,k], by the lowering that suits the shapes."""
    _tell_shapes(op, image, map_, w, window)
    forms = _image_forms(op, w, image, window)
    kind = _kind(op, "Conv.image", w, window)
    candidates = lowerings_of(forms, window, images=(0,), gives_image=True)
    return op.lowerings.emit(op, kind, window.site, [map_, w, image], candidates)


def _tell_shapes(op: Emitter, image: gs.Tensor, map_: gs.Tensor, w: gs.Tensor, window: Window) -> None:
    """What follows of the cotangent's shape: in a Loop inference does not tell it, and lowerings are chosen by it.

    The literal dynamics have to choose what reverse mode chooses, to be equal to it to the bit.
    """
    filters, known = op.dims(w), [op.dims(image), op.dims(map_)]
    batch = next((dims[0] for dims in known if dims is not None and dims[0] is not None), None)
    if filters is None or not isinstance(filters[1], (int, np.integer)):
        return
    wholes = [(image, filters[1] * window.group, window.image), (map_, filters[0], window.map)]
    for (x, channels, sizes), dims in zip(wholes, known, strict=True):
        if sizes is not None and isinstance(x, gs.Variable) and (dims is None or None in dims):
            x.shape = [batch, channels, *sizes]


def _image_forms(op: Emitter, w: gs.Tensor, image: gs.Tensor, window: Window) -> dict[str, tuple[Form, Work]]:
    """The forms of the image cotangent that these shapes allow, each with its work; first the one for open sizes."""
    both: dict[str, Form] = {"transpose": image_by_transpose, "conv": image_by_conv}
    if op.dtype(image) == np.float64:
        del both["transpose"]
    elif all(s == 1 for s in window.strides):
        both = dict(reversed(both.items()))
    counts = _counts(op, image, w, window)
    if counts is None:
        name = next(iter(both))
        return {name: (both[name], {})}
    n, channels, filters, weight, taps, positions, elements = counts
    common: Work = {"image": n * channels * elements, "weight": weight, "products": n * window.group}
    works: dict[str, Work] = {
        "transpose": {
            **common, "multiply-adds": n * weight * positions, "columns": n * channels * taps * positions,
            "map": n * filters * positions,
        },
        "conv": {
            **common, "multiply-adds": n * weight * elements, "columns": n * filters * taps * elements,
            "map": n * filters * positions * math.prod(window.strides),
        },
    }  # fmt: skip
    found = {name: (form, works[name]) for name, form in both.items()}
    if _by_winograd(op, w, window):
        found[AMONG] = (image_by_winograd, _tile_work(counts, image_tiling(window)))
    return found


def value_lowerings(op: Emitter, x: gs.Tensor, w: gs.Tensor, window: Window) -> dict[str, Lowering]:
    """The forms of a Conv itself, first the operator as it stands; none if it is the only one."""
    counts = _counts(op, x, w, window)
    if counts is None or not _by_winograd(op, w, window):
        return {}
    n, channels, filters, weight, taps, positions, elements = counts
    direct: Work = {
        "multiply-adds": n * weight * positions, "columns": n * channels * taps * positions,
        "image": n * channels * elements, "map": n * filters * positions, "weight": weight, "products": n,
    }  # fmt: skip
    forms = {"conv": (_as_it_stands, direct), AMONG: (value_by_winograd, _tile_work(counts, map_tiling(window)))}
    return lowerings_of(forms, window, images=(0,), gives_image=True)


def _is_spatial_first(op: Emitter, x: gs.Tensor, w: gs.Tensor, window: Window) -> bool:
    """Whether a Conv's value is computed with spatial axes first: its image and map are then expected so, too."""
    candidates = value_lowerings(op, x, w, window)
    return op.lowerings.choose(op, "Conv", window.site, [x, w], candidates)[0] == AMONG if candidates else False


def _as_it_stands(
    op: Emitter, x: gs.Tensor, w: gs.Tensor, bias: gs.Tensor | None = None, *, window: Window
) -> gs.Tensor:
    assert isinstance(window.begin, list), "static sizes"
    assert isinstance(window.end, list), "static sizes"
    return op.Conv(
        x, w, bias, strides=window.strides, dilations=window.dilations, pads=[*window.begin, *window.end],
        group=window.group,
    )  # fmt: skip


def _by_winograd(op: Emitter, w: gs.Tensor, window: Window) -> bool:
    """Whether there is a Winograd form: it would leave too little of sums in half precision, and is for speed."""
    return op.lowerings.target == "cpu" and op.dtype(w) == np.float32 and fits(window)


def _counts_in_phases(counts: _Counts, window: Window, phases: Window) -> _Counts:
    """Of the convolution without strides that has the phases of the image as channels."""
    assert phases.kernel is not None, "static sizes"
    assert phases.image is not None, "static sizes"
    channels, taps = counts.channels * math.prod(window.strides), math.prod(phases.kernel)
    return counts._replace(
        channels=channels, weight=counts.filters * channels * taps, taps=taps, elements=math.prod(phases.image)
    )


def _tile_work(counts: _Counts, tiling: Tiling) -> Work:
    """What Winograd's forms do: transforms of both kinds of tiles, and the products."""
    tiles = counts.batch * tiling.tiles * tiling.elements
    image, map_ = counts.channels * tiles, counts.filters * tiles
    return {
        "multiply-adds": counts.channels * map_, "image tiles": image, "map tiles": map_, "weight": counts.weight,
        "tiles beyond caches": max(image + map_ - _CACHED, 0),
    }  # fmt: skip


# --- rules ------------------------------------------------------------------------------------------------------


def _conv_x(op: Emitter, g: gs.Tensor, y: Any, x: gs.Tensor, w: gs.Tensor, b: Any, **attrs: Any) -> gs.Tensor:
    return image_cotangent(op, g, w, x, conv_window(op, x, w, **attrs))


def _conv_w(op: Emitter, g: gs.Tensor, y: Any, x: gs.Tensor, w: gs.Tensor, b: Any, **attrs: Any) -> gs.Tensor:
    return weight_cotangent(op, x, g, w, conv_window(op, x, w, **attrs))


def _bias(op: Emitter, g: gs.Tensor, y: Any, x: gs.Tensor, w: gs.Tensor, b: gs.Tensor, **attrs: Any) -> gs.Tensor:
    """dB[m] = sum_{n,p} g[n,m,p]."""
    rank = spatial_rank(op, x, w, attrs["kernel_shape"], attrs["strides"], attrs["dilations"])
    return op.ReduceSum(g, [0, *range(2, 2 + rank)], keepdims=0)


def _transpose_x(
    op: Emitter, g: gs.Tensor, y: gs.Tensor, x: gs.Tensor, w: gs.Tensor, b: Any, **attrs: Any
) -> gs.Tensor:
    """The adjoint of the adjoint: the convolution of g with W."""
    window = transpose_window(op, x, w, y, **attrs)
    image, pads = conv_pads(op, g, window, [])
    d = op.Conv(image, w, strides=window.strides, dilations=window.dilations, pads=pads, group=window.group)
    # Output padding of a whole stride would make room for one more position of the kernel.
    extra = attrs["output_padding"]
    if extra and any(e >= s for e, s in zip(extra, window.strides, strict=True)):
        return op.Slice(d, int64s(op, [0] * window.rank), spatial_shape(op, x), window.spatial)
    return d


def _transpose_w(
    op: Emitter, g: gs.Tensor, y: gs.Tensor, x: gs.Tensor, w: gs.Tensor, b: Any, **attrs: Any
) -> gs.Tensor:
    return weight_cotangent(op, g, x, w, transpose_window(op, x, w, y, **attrs), adjoint=True)


defvjp("Conv", _conv_x, _conv_w, _bias)
defvjp("ConvTranspose", _transpose_x, _transpose_w, _bias)
