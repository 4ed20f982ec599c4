"""VJP rules of operators that sample images, against central differences in float64."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import zilc
from tests.vjp.cases import Case, both, check, label
from zilc.testing import run

_rng = np.random.default_rng(23)


def r(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape)


def i(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def grid(*shape: int, reach: float = 1.3) -> np.ndarray:
    """Places inside and outside of [-1, 1]."""
    return _rng.uniform(-reach, reach, shape)


_COL2IM = [
    Case("Col2Im", [r(2, 12, 6), i(4, 3), i(2, 2)], constant=[1, 2]),
    Case("Col2Im", [r(1, 8, 6), i(5, 5), i(1, 4)], {"strides": [2, 2], "pads": [0, 1, 1, 0]}, constant=[1, 2]),
    Case("Col2Im", [r(1, 4, 9), i(5, 5), i(2, 2)], {"dilations": [2, 2]}, constant=[1, 2]),
    Case("Col2Im", [r(1, 6, 4), i(5,), i(2,)], constant=[1, 2]),
    Case("Col2Im", [r(1, 8, 8), i(3, 3, 3), i(2, 2, 2)], constant=[1, 2]),
    Case("Col2Im", [r(1, 4, 4), i(3, 3), i(2, 2)], symbolic=False),
]
_GRID = [
    *(
        Case(
            "GridSample",
            [r(2, 3, 4, 5), grid(2, 3, 2, 2)],
            {"mode": mode, "padding_mode": padding, "align_corners": corners},
            opset=opset,
            label=f" {mode} {padding} {corners}",
        )
        for opset, modes in ((18, ("bilinear", "nearest", "bicubic")), (20, ("linear", "nearest", "cubic")))
        for mode in modes
        for padding in ("zeros", "border", "reflection")
        for corners in (0, 1)
    ),
    Case("GridSample", [r(1, 2, 3, 4, 3), grid(1, 2, 3, 2, 3)], {"mode": "linear"}, opset=20),
    Case("GridSample", [r(1, 1, 1, 1), grid(1, 2, 2, 2)], {"padding_mode": "border"}, opset=20),
]
_BOXES = np.asarray([[0.3, 0.2, 5.1, 4.4], [1.2, 2.1, 3.3, 6.2], [-1.4, -0.7, 7.9, 2.6]])
_ROI = [
    *(
        Case(
            "RoiAlign",
            [r(2, 3, 6, 7), _BOXES, i(0, 1, 0)],
            {
                "output_height": 3, "output_width": 2, "sampling_ratio": ratio, "spatial_scale": 0.83,
                "coordinate_transformation_mode": mode, "mode": how,
            },
            operands=[0, 1],
            symbolic=False,
            label=f" {ratio} {mode} {how}",
        )
        for ratio in (0, 2)
        for mode in ("half_pixel", "output_half_pixel")
        for how in ("avg", "max")
    ),
    Case("RoiAlign", [r(2, 3, 6, 7), _BOXES, i(1, 1, 0)], {"sampling_ratio": 2}, operands=[0]),
]  # fmt: skip
_DEFORM = [
    Case("DeformConv", [r(1, 1, 3, 3), r(1, 1, 2, 2), 0.3 * r(1, 8, 2, 2)], opset=19),
    Case(
        "DeformConv",
        [r(2, 4, 5, 4), r(6, 2, 2, 2), 0.4 * r(2, 16, 3, 3), r(6), r(2, 8, 3, 3)],
        {"group": 2, "offset_group": 2, "strides": [2, 1], "pads": [1, 0, 0, 0]},
        opset=19,
        symbolic=False,
    ),
    Case(
        "DeformConv",
        [r(1, 2, 5, 5), r(2, 2, 2, 2), 0.4 * r(1, 8, 5, 5), r(2)],
        {"dilations": [2, 2], "pads": [1, 1, 1, 1], "kernel_shape": [2, 2]},
        opset=22,
    ),
]
_UNPOOL = [
    Case("MaxUnpool", [r(1, 2, 2, 2), i(5, 7, 13, 15, 16, 18, 25, 31).reshape(1, 2, 2, 2)],
         {"kernel_shape": [2, 2], "strides": [2, 2]}),
    Case("MaxUnpool", [r(1, 1, 2, 2), i(5, 7, 13, 15).reshape(1, 1, 2, 2), i(1, 1, 5, 6)],
         {"kernel_shape": [2, 2], "strides": [2, 2]}, constant=[2]),
    Case("MaxUnpool", [r(1, 1, 3), i(0, 2, 5).reshape(1, 1, 3)], {"kernel_shape": [2], "strides": [2]}),
]  # fmt: skip
# onnxruntime alone has MaxRoiPool, in float32; within a window the output is linear: a large step.
_ROI_POOL = [
    Case(
        "MaxRoiPool",
        [
            (0.1 * _rng.permutation(2 * 3 * 6 * 7).reshape(2, 3, 6, 7)).astype(np.float32),
            np.asarray([[0, 0, 0, 4, 3], [1, 2, 1, 6, 5], [0, 3, 3, 3, 3], [1, 1, 4, 9, 8]], np.float32),
        ],
        {"pooled_shape": [2, 3], "spatial_scale": scale},
        rtol=1e-4,
        step=1e-2,
        operands=[0],
        executor="onnxruntime",
        label=f" {scale}",
    )
    for scale in (1.0, 0.6)
]
CASES = [*_ROI_POOL, *_COL2IM, *_GRID, *_ROI, *_DEFORM, *_UNPOOL]


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_vjp(case: Case, symbolic: bool) -> None:
    check(case, symbolic)


def test_an_operand_used_twice() -> None:
    """GridSample(x, x): each edge carries its own part; together they are the derivative."""
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (double[1, 2, 2, 2] x) => (double[1, 2, 2, 2] y)'
        "{ y = GridSample <padding_mode = \"border\"> (x, x) }"
    )
    x = grid(1, 2, 2, 2, reach=0.9)
    step = zilc.emit_training(model, wrt=["x"], outputs="grad")
    target, v, h = r(1, 2, 2, 2), r(1, 2, 2, 2), 1e-6
    names = [o.name for o in step.model.graph.output]
    got = run(step.model, {"x": x, "target": target})[names.index("x.grad")]

    def energy(at: np.ndarray) -> float:
        return 0.5 * float(np.sum((run(model, {"x": at})[0] - target) ** 2))

    assert np.sum(got * v) == pytest.approx((energy(x + h * v) - energy(x - h * v)) / (2 * h), rel=1e-6)
