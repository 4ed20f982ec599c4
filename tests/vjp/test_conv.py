"""Conv and ConvTranspose: every attribute, every lowering, static and symbolic."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from tests.vjp.cases import Case, both, check, label
from zilc import ir
from zilc.emit import Emitter
from zilc.testing import check_vjp, op_model, run, vjp_model
from zilc.vjp import conv, conv_lowerings
from zilc.vjp.window import conv_window


def _r(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def _conv(x: tuple, w: tuple, bias: bool = False, label: str = "", **attrs: object) -> Case:
    # Symbolic cases need kernel_shape for the output's shape to be inferred; the lowering tests go without it.
    attrs = {"kernel_shape": list(w[2:]), **attrs}
    return Case("Conv", [_r(*x), _r(*w), *([_r(w[0])] if bias else [])], attrs, label=label)


CONV = [
    _conv((2, 3, 7), (4, 3, 3), bias=True),
    _conv((2, 3, 9), (4, 3, 3), strides=[2], pads=[1, 2], dilations=[2]),
    _conv((2, 4, 9), (6, 2, 2), strides=[3], group=2),
    _conv((2, 3, 5, 6), (4, 3, 3, 2), bias=True, label="plain"),
    _conv((2, 3, 5, 6), (4, 3, 3, 3), pads=[1, 1, 1, 1], label="pad1"),
    _conv((1, 2, 5, 6), (3, 2, 3, 2), pads=[2, 0, 1, 1], label="asymmetric"),
    _conv((2, 2, 7, 8), (3, 2, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], label="stride2"),
    _conv((2, 2, 8, 9), (3, 2, 3, 2), strides=[2, 3], pads=[0, 1, 1, 0], label="strides"),
    _conv((1, 2, 11, 9), (2, 2, 3, 4), strides=[4, 1], label="stride above kernel"),
    _conv((2, 2, 8, 7), (3, 2, 1, 1), strides=[2, 2], label="1x1 stride2"),
    _conv((2, 2, 4, 3), (3, 2, 1, 1), pads=[1, 0, 2, 1], label="1x1 padded beyond the kernel"),
    _conv((1, 2, 9, 9), (2, 2, 3, 2), dilations=[2, 3], pads=[2, 1, 0, 3], label="dilations"),
    _conv((1, 2, 12, 11), (2, 2, 3, 3), dilations=[2, 3], strides=[3, 2], label="dilations strides"),
    _conv((1, 2, 12, 11), (2, 2, 3, 2), dilations=[2, 4], strides=[4, 2], label="dilations sharing a factor"),
    _conv((2, 4, 6, 5), (6, 2, 3, 2), group=2, pads=[1, 0, 1, 1], bias=True, label="groups"),
    _conv((2, 4, 7, 6), (6, 2, 3, 2), group=2, strides=[2, 2], label="groups stride2"),
    _conv((2, 4, 7, 6), (4, 1, 3, 3), group=4, strides=[2, 1], pads=[1, 1, 1, 1], label="depthwise"),
    _conv((1, 3, 6, 6), (6, 1, 3, 3), group=3, dilations=[2, 1], label="depthwise times two"),
    _conv((2, 2, 7, 8), (3, 2, 3, 2), auto_pad="SAME_UPPER", label="same upper"),
    _conv((2, 2, 7, 8), (3, 2, 3, 2), auto_pad="SAME_LOWER", strides=[2, 3], label="same lower strides"),
    _conv((2, 2, 7, 8), (3, 2, 4, 3), auto_pad="SAME_UPPER", strides=[2, 3], label="same upper strides"),
    _conv((1, 2, 7, 8), (3, 2, 2, 3), auto_pad="SAME_LOWER", dilations=[2, 1], label="same lower dilations"),
    _conv((1, 2, 7, 8), (3, 2, 1, 1), auto_pad="SAME_UPPER", strides=[3, 2], label="same, nothing to pad"),
    _conv((2, 2, 7, 8), (3, 2, 3, 2), auto_pad="VALID", strides=[2, 1], label="valid"),
    _conv((1, 2, 4, 5, 4), (3, 2, 2, 3, 2), bias=True, label="3d"),
    _conv((2, 2, 5, 6, 5), (2, 2, 2, 3, 2), strides=[2, 1, 2], pads=[1, 0, 1, 0, 1, 1], label="3d strides"),
    _conv((1, 4, 4, 5, 4), (4, 2, 2, 2, 2), group=2, dilations=[1, 2, 1], label="3d groups dilations"),
    _conv((1, 1, 1, 1), (1, 1, 1, 1), label="one element"),
]


def _transpose(x: tuple, w: tuple, bias: bool = False, label: str = "", **attrs: object) -> Case:
    group = int(attrs.get("group", 1))  # type: ignore[call-overload]
    inputs = [_r(*x), _r(*w), *([_r(w[1] * group)] if bias else [])]
    return Case("ConvTranspose", inputs, {"kernel_shape": list(w[2:]), **attrs}, label=label)


# ConvTranspose in ONNX's reference evaluator is right where there is one group, or one channel a group and no bias.
TRANSPOSE = [
    _transpose((2, 3, 4), (3, 2, 3), bias=True),
    _transpose((1, 2, 4), (2, 2, 3), strides=[3], output_padding=[2], pads=[1, 0], dilations=[2]),
    _transpose((2, 3, 3, 4), (3, 2, 3, 2), bias=True, label="plain"),
    _transpose((1, 2, 3, 4), (2, 2, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1], label="doubling"),
    _transpose((1, 2, 3, 4), (2, 2, 3, 2), strides=[2, 3], pads=[0, 1, 2, 0], label="asymmetric"),
    _transpose((1, 2, 3, 3), (2, 2, 2, 3), dilations=[2, 1], strides=[1, 2], label="dilations"),
    _transpose((2, 3, 3, 4), (3, 1, 3, 2), group=3, strides=[2, 1], label="depthwise"),
    _transpose((1, 2, 3, 4), (2, 2, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER", label="same upper"),
    _transpose((1, 2, 3, 4), (2, 2, 4, 3), strides=[2, 1], auto_pad="SAME_LOWER", label="same lower"),
    _transpose((1, 2, 3, 4), (2, 2, 3, 3), strides=[2, 2], auto_pad="VALID", label="valid"),
    _transpose(
        (1, 2, 3, 4), (2, 2, 4, 4), strides=[2, 2], auto_pad="SAME_UPPER", output_shape=[7, 8], label="output shape"
    ),
    _transpose(
        (1, 2, 3, 4),
        (2, 2, 4, 4),
        strides=[2, 2],
        auto_pad="SAME_LOWER",
        output_shape=[7, 9],
        label="output shape lower",
    ),
    _transpose((1, 2, 2, 3, 2), (2, 2, 2, 2, 2), strides=[1, 2, 1], label="3d"),
]

# What the reference evaluator cannot run, or runs wrongly; ONNX Runtime can, in float32.
TRANSPOSE_RUNTIME = [
    _transpose((2, 4, 3, 4), (4, 3, 3, 2), group=2, bias=True, strides=[2, 1], label="groups"),
    _transpose((2, 3, 3, 4), (3, 2, 3, 2), group=3, bias=True, pads=[1, 0, 1, 1], label="depthwise times two"),
    _transpose((2, 2, 3, 4), (2, 2, 4, 4), strides=[2, 2], output_shape=[7, 9], label="output shape"),
    _transpose((1, 4, 2, 3, 2), (4, 1, 2, 2, 2), group=2, strides=[2, 1, 1], bias=True, label="3d groups"),
]

CASES: list[Case] = CONV + TRANSPOSE


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_against_central_differences(case: Case, symbolic: bool) -> None:
    check(case, symbolic)


@pytest.mark.parametrize(("case", "symbolic"), both(TRANSPOSE_RUNTIME), ids=label)
def test_in_onnxruntime(case: Case, symbolic: bool) -> None:
    """The operator is linear in each operand, so a step of 1 makes the difference exact but for rounding."""
    inputs = [None if x is None else x.astype(np.float32) for x in case.inputs]
    check_vjp(case.op, inputs, case.attrs, symbolic=symbolic, executor="onnxruntime", step=1.0, rtol=1e-5)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
def test_output_padding_of_a_stride(symbolic: bool) -> None:
    """No executor at hand runs this forward, which the standard and PyTorch allow; the VJP does without it."""
    attrs = {"kernel_shape": [2, 3], "dilations": [3, 1], "output_padding": [2, 0]}
    x, w = (torch.tensor(_r(*shape), requires_grad=True) for shape in ((1, 2, 3, 3), (2, 2, 2, 3)))
    y = torch.conv_transpose2d(x, w, dilation=(3, 1), output_padding=(2, 0))
    g = torch.tensor(_r(*y.shape, seed=1))
    model = vjp_model(op_model("ConvTranspose", [x.detach().numpy(), w.detach().numpy()], attrs, symbolic=symbolic))
    del model.graph.node[0], model.graph.output[0]
    got = run(model, {"x0": x.detach().numpy(), "x1": w.detach().numpy(), "g0": g.numpy()})
    for d, expected in zip(got, torch.autograd.grad(y, (x, w), g), strict=True):
        _same(d, expected.numpy(), 1e-12)


def _symbolic(array: np.ndarray, which: str) -> list[int | str]:
    free = {"static": (), "batch": (0,), "sizes": tuple(range(2, array.ndim)), "all": tuple(range(array.ndim))}[which]
    return [f"n{axis}_{array.ndim}" if axis in free else n for axis, n in enumerate(array.shape)]


def _lower(
    case: Case, which: str, formula: object, dtype: type = np.float64, *, g: np.ndarray | None = None
) -> np.ndarray:
    """Run one lowering ``formula(op, x, w, g, window)`` on a Conv case; ``which`` says what is symbolic.

    ``g`` in place of the cotangent that ``_truth`` takes.
    """
    x, w = (np.asarray(a, dtype) for a in case.inputs[:2])
    y = run(op_model("Conv", [x, w], case.attrs), {"x0": x, "x1": w})[0]
    g = np.asarray(_r(*y.shape, seed=1) if g is None else g, dtype)
    tensors = [gs.Variable(n, dtype, _symbolic(a, which)) for n, a in (("x", x), ("g", g))]
    tensors.insert(1, gs.Variable("w", dtype, _symbolic(w, which if which == "all" else "static")))
    graph = gs.Graph(inputs=tensors, opset=18)
    graph.import_domains = [onnx.helper.make_opsetid("", 18)]
    op = Emitter(graph)
    attrs = {"auto_pad": "NOTSET", "group": 1} | dict.fromkeys(("dilations", "kernel_shape", "pads", "strides"))
    window = conv_window(op, tensors[0], tensors[1], **{**attrs, **case.attrs, "kernel_shape": None})
    made = formula(op, *tensors, window)  # type: ignore[operator]
    out = gs.Variable("out", dtype)
    graph.nodes.append(gs.Node("Identity", inputs=[made], outputs=[out]))
    graph.outputs = [out]
    model = ir.to_proto(graph, infer=True)
    feeds = {"x": x, "w": w, "g": g}
    feeds = {i.name: feeds[i.name] for i in model.graph.input}
    return run(model, feeds, "reference" if dtype == np.float64 else "onnxruntime")[0]


def _truth(case: Case, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """Both cotangents of a Conv case by PyTorch, with the pads of auto_pad written out."""
    x, w = (torch.tensor(np.asarray(a, dtype), dtype=torch.float64, requires_grad=True) for a in case.inputs[:2])
    r = w.ndim - 2
    attrs = case.attrs
    s, d = attrs.get("strides", [1] * r), attrs.get("dilations", [1] * r)
    pads = list(attrs.get("pads", [0] * 2 * r))
    mode = attrs.get("auto_pad", "NOTSET")
    if mode.startswith("SAME"):
        for i in range(r):
            n, e = x.shape[2 + i], d[i] * (w.shape[2 + i] - 1) + 1
            total = max((-(-n // s[i]) - 1) * s[i] + e - n, 0)
            pads[i] = total - total // 2 if mode == "SAME_LOWER" else total // 2
            pads[r + i] = total - pads[i]
    wide = torch.nn.functional.pad(x, [p for i in reversed(range(r)) for p in (pads[i], pads[r + i])])
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[r - 1]
    y = function(wide, w, stride=s, dilation=d, groups=attrs.get("group", 1))
    g = torch.tensor(np.asarray(_r(*y.shape, seed=1), dtype), dtype=torch.float64)
    dx, dw = torch.autograd.grad(y, (x, w), g)
    return dx.numpy(), dw.numpy()


def _same(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


WEIGHT = {
    "swapped": conv_lowerings.weight_by_swapped_conv,
    "volume": conv_lowerings.weight_by_volume_conv,
    "columns": conv_lowerings.weight_by_columns,
    "columns by example": functools.partial(conv_lowerings.weight_by_columns, batched=True),
    "taps": functools.partial(conv_lowerings.weight_by_columns, apart=True),
    "taps by example": functools.partial(conv_lowerings.weight_by_columns, apart=True, batched=True),
}
IMAGE = {"transpose": conv_lowerings.image_by_transpose, "conv": conv_lowerings.image_by_conv}
SYMBOLIC = ["static", "batch", "sizes", "all"]
BOTH_DTYPES = [(np.float64, 1e-12), (np.float32, 2e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_DTYPES)
@pytest.mark.parametrize("which", SYMBOLIC)
@pytest.mark.parametrize("name", WEIGHT)
def test_every_weight_lowering(name: str, which: str, dtype: type, tolerance: float) -> None:
    checked = 0
    for case in CONV:
        rank = np.ndim(case.inputs[1]) - 2
        if (name.startswith(("columns", "taps")) and which in ("sizes", "all")) or (name == "volume" and rank == 3):
            continue
        got = _lower(case, which, lambda op, x, w, g, window: WEIGHT[name](op, x, g, w, window), dtype)
        _same(got, _truth(case, dtype)[1], tolerance)
        checked += 1
    assert checked or (name.startswith(("columns", "taps")) and which in ("sizes", "all"))


POINTWISE = [
    _conv((2, 3, 7), (4, 3, 1), strides=[2]),
    _conv((2, 3, 4, 5), (4, 3, 1, 1)),
    _conv((3, 2, 5, 6), (4, 2, 1, 1), strides=[2, 2], label="by 2"),
    _conv((2, 3, 5, 6), (1, 3, 1, 1), strides=[1, 3], pads=[1, 0, 2, 1], label="by 1 and 3, with pads"),
    _conv((2, 3, 3, 4, 3), (2, 3, 1, 1, 1), strides=[2, 1, 1]),
]


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_DTYPES)
@pytest.mark.parametrize("which", ["static", "batch"])
@pytest.mark.parametrize("case", POINTWISE, ids=str)
def test_rows_of_channels(case: Case, which: str, dtype: type, tolerance: float) -> None:
    def formula(op, x, w, g, window):
        return conv_lowerings.weight_by_rows(op, x, g, w, window)

    _same(_lower(case, which, formula, dtype), _truth(case, dtype)[1], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_DTYPES)
@pytest.mark.parametrize("batched", [False, True], ids=["one product", "by example"])
@pytest.mark.parametrize("case", CONV, ids=str)
def test_taps_laid_out_on_the_map(case: Case, batched: bool, dtype: type, tolerance: float) -> None:
    """weight_by_columns with every choice of kernel axes whose stride is 1."""
    rank = np.ndim(case.inputs[1]) - 2
    strides = case.attrs.get("strides", [1] * rank)
    free = [axis for axis in range(rank) if strides[axis] == 1]
    expected = _truth(case, dtype)[1]
    for bits in range(1 << len(free)):
        on_map = [axis for i, axis in enumerate(free) if bits >> i & 1]

        def formula(op, x, w, g, window, on_map=on_map, apart=bool(bits % 2)):
            return conv_lowerings.weight_by_columns(op, x, g, w, window, on_map=on_map, batched=batched, apart=apart)

        _same(_lower(case, "batch", formula, dtype), expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_DTYPES)
@pytest.mark.parametrize("which", SYMBOLIC)
@pytest.mark.parametrize("name", IMAGE)
def test_every_image_lowering(name: str, which: str, dtype: type, tolerance: float) -> None:
    for case in CONV:
        grouped = case.attrs.get("group", 1) > 1
        if name == "transpose" and grouped and dtype == np.float64:
            continue  # the reference evaluator's ConvTranspose mixes up groups
        got = _lower(case, which, lambda op, x, w, g, window: IMAGE[name](op, g, w, x, window), dtype)
        _same(got, _truth(case, dtype)[0], tolerance)


@pytest.mark.parametrize("which", SYMBOLIC)
def test_the_choice_runs_in_both_executors(which: str) -> None:
    """What the rule itself emits, in float64 (reference evaluator) and in float32 (ONNX Runtime)."""
    for case in CONV:
        for dtype, tolerance in BOTH_DTYPES:
            dx, dw = _truth(case, dtype)
            got = _lower(case, which, lambda op, x, w, g, window: conv.image_cotangent(op, g, w, x, window), dtype)
            _same(got, dx, tolerance)
            got = _lower(case, which, lambda op, x, w, g, window: conv.weight_cotangent(op, x, g, w, window), dtype)
            _same(got, dw, tolerance)
