"""VJP rule of Resize, against central differences: it is linear, so large steps are exact."""

from __future__ import annotations

import numpy as np
import pytest

from tests.vjp.cases import Case, both, check, label
from zilc.testing import op_model, run, vjp_model

_rng = np.random.default_rng(13)


def r(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape)


def scales(*values: float) -> np.ndarray:
    return np.asarray(values, np.float32)


def _case(
    x: np.ndarray, s: np.ndarray | None, sizes: list[int] | None, roi: np.ndarray | None = None, **attrs: object
) -> Case:
    given = None if sizes is None else np.asarray(sizes, np.int64)
    constant = [k for k, v in ((1, roi), (2, s), (3, given)) if v is not None]
    opset = int(attrs.pop("opset", 19))  # type: ignore[call-overload]
    return Case("Resize", [x, roi, s, given], attrs, opset=opset, constant=constant, operands=[0], step=0.5, rtol=1e-6,
                label=" ".join(map(str, attrs.values())))  # fmt: skip


_UP, _DOWN = scales(1, 1, 2, 3), scales(1, 1, 0.6, 0.5)
CASES = [
    # nearest: repeated pixels, and the general case
    *(
        _case(r(2, 2, 3, 4), s, None, mode="nearest", coordinate_transformation_mode=where, nearest_mode=near)
        for s in (_UP, _DOWN, scales(1, 1, 1.5, 2))
        for where, near in [
            ("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil"),
            ("align_corners", "ceil"), ("pytorch_half_pixel", "round_prefer_floor"),
        ]
    ),
    *(
        _case(r(1, 2, 4, 4), s, None, mode=mode, coordinate_transformation_mode=where)
        for mode in ("linear", "cubic")
        for s in (_UP, _DOWN)
        for where in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    ),
    _case(r(1, 2, 4, 5), None, [1, 2, 7, 3], mode="linear"),
    _case(r(1, 2, 3, 3), None, [1, 2, 6, 6], mode="nearest"),
    _case(r(1, 2, 4, 5), None, [1, 2, 4, 3], mode="linear", coordinate_transformation_mode="half_pixel_symmetric"),
    _case(r(1, 2, 4, 5), None, [7, 3], mode="linear", axes=[2, 3]),
    _case(r(1, 2, 4, 5), scales(2, 0.7), None, mode="linear", axes=[3, 2]),
    _case(r(1, 1, 6, 6), scales(1, 1, 0.5, 0.4), None, mode="linear", antialias=1),
    _case(r(1, 1, 6, 6), scales(1, 1, 0.5, 0.4), None, mode="cubic", antialias=1, cubic_coeff_a=-0.5),
    _case(r(1, 1, 4, 4), _DOWN, None, mode="cubic", exclude_outside=1),
    _case(r(1, 1, 4, 5), None, [1, 1, 3, 3], np.asarray([0, 0, 0.4, 0.6, 1, 1, 1.2, 1.7], np.float32), mode="linear",
          coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=7.0),
    _case(r(2, 3, 4), scales(2, 1, 1), None, mode="nearest", coordinate_transformation_mode="asymmetric",
          nearest_mode="floor"),
    _case(r(3, 4), scales(1.5, 2), None, mode="linear", opset=18),
    _case(r(1, 1, 2, 3, 3), scales(1, 1, 2, 1.5, 2), None, mode="nearest", coordinate_transformation_mode="asymmetric"),
    # one scale for all axes
    *(
        _case(r(1, 2, 3, 4), None, sizes, axes=[2, 3], mode=mode, keep_aspect_ratio_policy=policy)
        for sizes in ([7, 8], [8, 7], [2, 3])
        for mode in ("nearest", "linear", "cubic")
        for policy in ("not_larger", "not_smaller")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_vjp(case: Case, symbolic: bool) -> None:
    check(case, symbolic)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_onnxruntime_transposes_its_own_kernel(case: Case) -> None:
    """<g, f(x) - f(0)> = <vjp(g), x> in float32; the kernels of different runtimes differ, also in the forward pass."""
    inputs = [np.float32(x) if k == 0 else x for k, x in enumerate(case.inputs)]
    forward = op_model(case.op, inputs, case.attrs, opset=case.opset, constant=case.constant)
    x = np.asarray(inputs[0])
    y, origin = (run(forward, {"x0": v}, "onnxruntime")[0] for v in (x, np.zeros_like(x)))
    g = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    backward = vjp_model(forward, operands=[0])
    d = run(backward, {"x0": x, "g0": g}, "onnxruntime")[[o.name for o in backward.graph.output].index("d0")]
    scale = float(np.linalg.norm(d) * np.linalg.norm(x))
    assert abs(float(np.sum(g * (y - origin)) - np.sum(d * x))) <= 2e-6 * scale


def test_repeated_pixels_are_summed_without_a_matrix() -> None:
    """The nearest upsampling of U-Nets: a view and a sum."""
    case = _case(r(1, 2, 3, 4), scales(1, 1, 2, 2), None, mode="nearest", coordinate_transformation_mode="asymmetric",
                 nearest_mode="floor")  # fmt: skip
    model = vjp_model(op_model(case.op, case.inputs, case.attrs, opset=19, constant=case.constant))
    kinds = [n.op_type for n in model.graph.node if n.name.startswith("zilc")]
    assert kinds == ["Reshape", "ReduceSum"]
