"""Winograd's forms of a convolution's gradients, against PyTorch's in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from tests.vjp.cases import Case
from tests.vjp.test_conv import BOTH_DTYPES, _conv, _lower, _r, _same, _truth
from zilc import ir
from zilc.emit import Emitter
from zilc.executors import executor
from zilc.lowerings import Lowerings
from zilc.testing import op_model, run
from zilc.vjp import conv, winograd
from zilc.vjp.window import Window, conv_window
from zilc.vjp.winograd import (
    Tiling,
    fits,
    image_by_winograd,
    in_phases,
    transforms,
    value_by_winograd,
    weight_by_winograd,
)

CASES = [
    _conv((2, 3, 7), (4, 3, 3)),
    _conv((3, 2, 8), (2, 2, 2), pads=[1, 0]),
    _conv((2, 2, 5), (3, 2, 3), pads=[3, 4], label="pads beyond the taps"),
    _conv((2, 3, 5, 6), (4, 3, 3, 3), pads=[1, 1, 1, 1], label="pad1"),
    _conv((2, 3, 6, 5), (4, 3, 3, 3), label="no pads"),
    _conv((1, 2, 5, 7), (3, 2, 3, 3), pads=[3, 0, 2, 4], label="pads beyond the taps"),
    _conv((2, 2, 4, 6), (2, 2, 2, 2), pads=[0, 1, 1, 0], label="2x2"),
    _conv((2, 2, 5, 6), (2, 2, 1, 3), label="1x3"),
    _conv((2, 2, 5, 6), (2, 2, 3, 1), pads=[1, 0, 1, 0], label="3x1"),
    _conv((2, 2, 5, 6), (2, 2, 3, 1), pads=[1, 2, 1, 1], label="3x1, padded beyond its taps"),
    _conv((2, 2, 3, 3), (2, 2, 3, 3), label="a single position"),
    _conv((2, 2, 6, 7), (3, 2, 2, 3), auto_pad="SAME_LOWER", label="same lower"),
    _conv((2, 1, 6, 7), (1, 1, 3, 2), auto_pad="SAME_UPPER", label="one channel"),
]

#: Taken apart into phases: taps that fill the last phase or do not, and elements that no tap reaches.
STRIDED = [
    _conv((2, 3, 12, 13), (4, 3, 5, 5), strides=[2, 2], pads=[2, 2, 2, 2], label="5x5/2"),
    _conv((2, 3, 12, 11), (4, 3, 6, 5), strides=[2, 2], label="6x5/2, no pads"),
    _conv((2, 1, 23, 24), (2, 1, 11, 11), strides=[4, 4], pads=[2, 1, 0, 3], label="11x11/4"),
    _conv((1, 2, 15, 16), (3, 2, 7, 9), strides=[3, 3], pads=[0, 8, 6, 0], label="7x9/3, pads of all taps but one"),
    _conv((2, 2, 9, 8), (3, 2, 4, 3), strides=[2, 2], label="4x3/2, two taps a phase"),
    _conv((2, 2, 9, 8), (3, 2, 2, 5), strides=[3, 3], label="2x5/3, one tap a phase on an axis"),
    _conv((2, 2, 9, 8), (3, 2, 5, 5), strides=[2, 2], auto_pad="SAME_LOWER", label="same lower"),
    _conv((2, 2, 5, 5), (3, 2, 5, 5), strides=[2, 2], label="a single position"),
]


@pytest.mark.parametrize(("outputs", "taps"), [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3), (2, 5), (4, 3)])
def test_transforms_filter(outputs: int, taps: int) -> None:
    at, g, bt = transforms(outputs, taps)
    rng = np.random.default_rng([outputs, taps])
    x, w = rng.standard_normal(outputs + taps - 1), rng.standard_normal(taps)
    np.testing.assert_allclose(at @ ((g @ w) * (bt @ x)), np.correlate(x, w, "valid"), rtol=1e-12, atol=1e-12)


def test_the_transforms_of_three_taps_are_exact_in_float16() -> None:
    """Their entries are 0, 1, -1 and 1/2, so that what is rounded is sums alone."""
    assert {abs(float(x)) for made in transforms(2, 3) for x in made.flat} == {0.0, 0.5, 1.0}


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_DTYPES)
@pytest.mark.parametrize("which", ["static", "batch"])
@pytest.mark.parametrize("batched", [False, True], ids=["", "by example"])
@pytest.mark.parametrize("case", [*CASES, *STRIDED], ids=str)
def test_weight(case: Case, which: str, batched: bool, dtype: type, tolerance: float) -> None:
    def formula(op: Emitter, x: gs.Tensor, w: gs.Tensor, g: gs.Tensor, window: Window) -> gs.Tensor:
        assert fits(in_phases(window) or window)
        return weight_by_winograd(op, x, g, w, window, batched=batched)

    _same(_lower(case, which, formula, dtype), _truth(case, dtype)[1], tolerance)


@pytest.mark.parametrize("which", ["static", "batch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_image(case: Case, which: str) -> None:
    """In onnxruntime alone: the reference evaluator would loop in Python."""

    def formula(op: Emitter, x: gs.Tensor, w: gs.Tensor, g: gs.Tensor, window: Window) -> gs.Tensor:
        assert fits(window)
        return image_by_winograd(op, g, w, x, window)

    _same(_lower(case, which, formula, np.float32), _truth(case, np.float32)[0], 2e-6)


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("which", ["static", "batch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case: Case, which: str, biased: bool) -> None:
    """Conv itself."""
    bias = np.random.default_rng(2).standard_normal(np.shape(case.inputs[1])[0]).astype(np.float32)

    def formula(op: Emitter, x: gs.Tensor, w: gs.Tensor, g: gs.Tensor, window: Window) -> gs.Tensor:
        return value_by_winograd(op, x, w, op.constant(bias) if biased else None, window=window)

    inputs = [*case.inputs[:2], *([bias] if biased else [])]
    arrays = [np.asarray(a, np.float64) for a in inputs]
    truth = run(op_model("Conv", arrays, case.attrs), {f"x{k}": a for k, a in enumerate(arrays)})[0]
    _same(_lower(case, which, formula, np.float32), truth, 2e-6)


FORMS: dict[str, Any] = {
    "value": (lambda op, x, w, g, window: value_by_winograd(op, x, w, window=window), (0, 3, 5, 6)),
    "image": (lambda op, x, w, g, window: image_by_winograd(op, g, w, x, window), (0, 2, 5, 6)),
    "weight": (lambda op, x, w, g, window: weight_by_winograd(op, x, g, w, window), (3, 2, 3, 3)),
    "weight by example":
        (lambda op, x, w, g, window: weight_by_winograd(op, x, g, w, window, batched=True), (3, 2, 3, 3)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_an_open_size_may_be_empty(form: str) -> None:
    case = Case("Conv", [np.zeros((0, 2, 5, 6)), np.ones((3, 2, 3, 3))], {"pads": [1, 1, 1, 1]})
    formula, shape = FORMS[form]
    np.testing.assert_array_equal(_lower(case, "batch", formula, np.float32), np.zeros(shape))


def test_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's weight gradient is as near to float64 as PyTorch's in float32, which is off by 1e-6 to 8e-6.

    With larger tiles it would not be.
    """
    case = _conv((4, 32, 24, 24), (32, 32, 3, 3), pads=[1] * 4)
    truth = _truth(case, np.float32)[1]

    def formula(op: Emitter, x: gs.Tensor, w: gs.Tensor, g: gs.Tensor, window: Window) -> gs.Tensor:
        return weight_by_winograd(op, x, g, w, window)

    def error() -> float:
        return float(np.abs(_lower(case, "static", formula, np.float32) - truth).max() / np.abs(truth).max())

    small = error()
    assert small < 2e-6
    monkeypatch.setattr(winograd, "OUTPUTS", 4)
    assert 2 * small < error() < 2e-5


@pytest.mark.parametrize(
    "attrs",
    [{"strides": [2, 1]}, {"dilations": [1, 2]}, {"group": 2}, {"kernel_shape": [3, 4]}],
    ids=str,
)
def test_where_there_is_none(attrs: dict[str, object]) -> None:
    x, w = gs.Variable("x", np.float32, [2, 4, 9, 9]), gs.Variable("w", np.float32, [4, 4, 3, 3])
    op = Emitter(gs.Graph(opset=18))
    plain = {"auto_pad": "NOTSET", "dilations": None, "group": 1, "kernel_shape": None, "pads": None, "strides": None}
    assert fits(conv_window(op, x, w, **plain))  # type: ignore[arg-type]
    assert not fits(conv_window(op, x, w, **{**plain, **attrs}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "target", "offered"),
    [("float32", "cpu", (True, True)), ("float64", "cpu", (False, False)), ("float16", "cpu", (False, False)),
     ("float32", "cuda", (False, False))],
)  # fmt: skip
def test_where_it_is_offered(dtype: str, target: str, offered: tuple[bool, bool]) -> None:
    x, w = gs.Variable("x", np.dtype(dtype), [2, 4, 9, 9]), gs.Variable("w", np.dtype(dtype), [4, 4, 3, 3])
    op = Emitter(gs.Graph(opset=18), lowerings=Lowerings(target))
    window = Window(2, 1, [1, 1], [1, 1], [1, 1], [1, 1], [3, 3], [9, 9], [9, 9])
    found = conv._weight_forms(op, x, w, window), conv._image_forms(op, w, x, window)
    assert tuple(any(name.startswith("winograd") for name in forms) for forms in found) == offered


@pytest.mark.parametrize(
    ("kernel", "attrs", "offered"),
    [([5, 6], {}, True), ([11, 9], {"strides": [4, 4]}, True), ([3, 3], {}, False), ([5, 3], {}, False),
     ([7, 7], {}, False), ([5, 5], {"strides": [2, 3]}, False), ([5, 5], {"dilations": [2, 2]}, False),
     ([5, 5], {"group": 2}, False)],
    ids=str,
)  # fmt: skip
def test_a_strided_weight_has_it_where_each_phase_has_three_taps(
    kernel: list[int], attrs: dict[str, Any], offered: bool
) -> None:
    group = attrs.get("group", 1)
    x = gs.Variable("x", np.dtype(np.float32), [2, 4, 30, 30])
    w = gs.Variable("w", np.dtype(np.float32), [4, 4 // group, *kernel])
    op = Emitter(gs.Graph(opset=18))
    plain = {"auto_pad": "NOTSET", "dilations": None, "group": 1, "kernel_shape": None, "pads": None, "strides": [2, 2]}
    window = conv_window(op, x, w, **{**plain, **attrs})  # type: ignore[arg-type]
    found = {name for name in conv._weight_forms(op, x, w, window) if name.startswith("winograd")}
    assert found == ({"winograd alone", "winograd by example"} if offered else set())


@pytest.mark.parametrize("chosen", ["conv", "winograd"])
def test_a_weights_form_is_measured_as_the_values_form_leaves_its_operands(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lowerings, "choose", lambda *_: (chosen, "fitted"))
    x, w = gs.Variable("x", np.dtype(np.float32), [2, 4, 9, 9]), gs.Variable("w", np.dtype(np.float32), [4, 4, 3, 3])
    window = Window(2, 1, [1, 1], [1, 1], [1, 1], [1, 1], [3, 3], [9, 9], [9, 9])
    found = {name for name in conv._weight_forms(Emitter(gs.Graph(opset=18)), x, w, window) if "winograd" in name}
    assert found == {"conv": {"winograd alone", "winograd by example"}, "winograd": {"winograd"}}[chosen]


def test_what_is_measured_among_others_is_the_form_itself() -> None:
    """With the order of axes that is expected around it: of the same memory it makes the same memory."""
    x, w = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((2, 4, 6, 6), (3, 4, 3, 3)))
    made = []
    for timed in (False, True):
        graph = gs.Graph(opset=18)
        op = Emitter(graph, lowerings=Lowerings(whole=True))
        inputs = [gs.Variable(name, np.dtype(np.float32), list(a.shape)) for name, a in (("x", x), ("w", w))]
        window = Window(2, 1, [1, 1], [1, 1], [1, 1], [1, 1], [3, 3], [6, 6], [6, 6])
        candidate = conv.value_lowerings(op, *inputs, window)["winograd"]
        assert candidate.timed is not None
        result = (candidate.timed if timed else candidate.emit)(op, *inputs)
        graph.inputs, graph.outputs = inputs, [gs.Variable("y", np.dtype(np.float32))]
        graph.nodes.append(gs.Node("Identity", inputs=[result], outputs=graph.outputs))
        moved = x.transpose(2, 3, 0, 1).reshape(x.shape) if timed else x
        found = executor(ir.to_proto(graph, infer=True))({"x": np.ascontiguousarray(moved), "w": w})["y"]
        made.append(found if timed else found.transpose(2, 3, 0, 1))
    np.testing.assert_allclose(made[1], made[0], rtol=1e-6, atol=1e-6)


#: Size of the first axis, taps of it and pads around it: whole tiles or not.
FIRST_AXIS = [
    (size, taps, pads) for size in (4, 7) for taps in (2, 3) for pads in ((0, 0), (1, 1), (0, 2), (2, 0), (2, 2))
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", ["static", "batch"])
def test_examples_leave_one_another_alone(form: str, which: str) -> None:
    """Right with any pads, and what is in one example changes no bit of another's, even if it is no number."""
    for size, taps, (a, b) in FIRST_AXIS:
        case = _conv((3, 2, size, 4), (3, 2, taps, 3), pads=[a, 1, b, 1])
        x, w = (np.asarray(t, np.float32) for t in case.inputs)
        y = run(op_model("Conv", [x, w], case.attrs), {"x0": x, "x1": w})[0]
        g = np.asarray(_r(*y.shape, seed=1), np.float32)
        truth = dict(zip(("image", "weight"), _truth(case, np.float32), strict=True)) | {"value": y}
        made = _lower(case, which, FORMS[form][0], np.float32, g=g)
        _same(made, truth[form.partition(" ")[0]], 4e-6)
        if not form.startswith("weight"):
            for t in (x, g):
                t[1] = np.nan
            other = Case("Conv", [x, w], case.attrs)
            beside = _lower(other, which, FORMS[form][0], np.float32, g=g)
            assert beside[[0, 2]].tobytes() == made[[0, 2]].tobytes(), (size, taps, a, b)
            assert np.isnan(beside[1]).any()


def test_tiles() -> None:
    tiling = Tiling.over([7, 4, 5], [3, 1, 2])
    assert (tiling.outputs, tiling.counts, tiling.lengths) == ([2, 1, 2], [4, 4, 3], [4, 1, 3])
    assert tiling.elements == 12
    assert tiling.tiles == 4 * 4 * 3
    assert tiling.covered == [8, 4, 6]
    assert tiling.kronecker(0).shape == (4, 12)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_copied_for_zeros_around_an_image(form: str) -> None:
    """They are a convolution's own pads, and images of whole tiles need no cut behind."""
    op = Emitter(gs.Graph(opset=18))
    window = Window(2, 1, [1, 1], [1, 1], [1, 1], [1, 1], [3, 3], [8, 8], [8, 8])
    shapes = {"x": [2, 4, 8, 8], "w": [4, 4, 3, 3], "g": [2, 4, 8, 8]}
    FORMS[form][0](op, *(gs.Variable(name, np.dtype(np.float32), shape) for name, shape in shapes.items()), window)
    assert not {"Pad", "Slice"} & {node.op for node in op.graph.nodes}
