"""Elementwise rules: central differences in float64, float32 on onnxruntime, and the conventions at kinks."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from tests.vjp.cases import Case, both, check, label
from tests.vjp.single import case_id, check_float32, cotangents_of
from zilc.testing import run

_rng = np.random.default_rng(7)


def _away(*shape: int, lowest: float = 0.2, highest: float = 2.0) -> np.ndarray:
    """Values of both signs that keep a distance from 0."""
    size = _rng.uniform(lowest, highest, shape)
    return np.asarray(size * _rng.choice([-1.0, 1.0], shape))


def _between(low: float, high: float, *shape: int) -> np.ndarray:
    return np.asarray(_rng.uniform(low, high, shape))


def _i64(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


#: Pairs of shapes that broadcast: neither, either way, both at once, scalars, and to nothing.
BROADCASTS = [
    ((2, 3), (2, 3)),
    ((2, 3), (3,)),
    ((3,), (2, 3)),
    ((2, 1, 3), (4, 1)),
    ((), (2, 3)),
    ((2, 3), ()),
    ((), ()),
    ((1,), (1, 1)),
    ((0, 3), (1, 3)),
]

_BINARY = [
    Case(op, [_away(*a), _away(*b)], operands=[0, 1])
    for op in ("Add", "Sub", "Mul", "Div")
    for a, b in BROADCASTS
]

_POW = [
    *(Case("Pow", [_between(0.3, 2, *a), _away(*b)], operands=[0, 1]) for a, b in BROADCASTS),
    *(
        Case("Pow", [_between(0.3, 2, 2, 3), np.asarray(p)], constant=[1], operands=[0], label=f"^{p}")
        for p in (0.0, 1.0, 2.0, 3.0, 0.5, -0.5, -1.0, 1.7, 5.0)
    ),
    Case("Pow", [_away(2, 3), np.asarray([2, 3, 4], np.int64)], constant=[1], operands=[0], label="int"),
    Case("Pow", [_away(2, 3), np.asarray([2, 3, 0], np.int64)], operands=[0], label="run-time int"),
    Case("Pow", [_away(1), np.full((2, 3), 2.0)], constant=[1], operands=[0], label="base broadcast"),
    Case("Pow", [_between(0.3, 2, 2, 3), np.full((3,), 1.5, np.float32)], operands=[0], label="mixed"),
]

_UNARY = [
    *(
        Case(op, [x])
        for op in (
            "Identity", "Neg", "Abs", "Exp", "Reciprocal", "Erf", "Sigmoid", "Tanh", "Relu", "Softplus",
            "Softsign",
            "Sin", "Cos", "Tan", "Sinh", "Cosh", "Atan", "Asinh", "LeakyRelu", "Elu", "Selu", "Mish",
            "HardSigmoid", "HardSwish",
        )
        for x in (_away(2, 3, highest=1.4), np.asarray([[0.7]]), _away(0, 3))
    ),
    *(Case(op, [np.asarray(-0.7)]) for op in ("Exp", "Tanh", "Relu", "Elu", "HardSwish", "Mish")),
    *(Case(op, [_between(0.3, 3, 2, 3)]) for op in ("Log", "Sqrt")),
    *(Case(op, [_between(-0.9, 0.9, 2, 3)]) for op in ("Asin", "Acos", "Atanh")),
    Case("Acosh", [_between(1.2, 3, 2, 3)]),
]  # fmt: skip

_ACTIVATIONS = [
    Case("LeakyRelu", [_away(2, 3)], {"alpha": 0.3}),
    Case("LeakyRelu", [_away(2, 3)], {"alpha": -0.5}, label="negative"),
    Case("PRelu", [_away(2, 3, 4), _away(2, 3, 4)], operands=[0, 1]),
    Case("PRelu", [_away(2, 3, 4), _away(3, 1)], operands=[0, 1]),
    Case("PRelu", [_away(2, 3, 4), _away(1)], operands=[0, 1]),
    Case("PRelu", [_away(2, 3), np.asarray(0.25)], operands=[0, 1]),
    Case("Elu", [_away(2, 3)], {"alpha": 1.6}),
    Case("Elu", [_away(2, 3)], {"alpha": -0.5}, label="negative"),
    Case("Selu", [_away(2, 3)], {"alpha": 1.2, "gamma": 0.8}),
    # float64 since opset 28
    *(Case("Celu", [_away(2, 3)], {"alpha": a}, opset=28, label=f" {a}") for a in (1.0, 0.5, -0.5)),
    Case("ThresholdedRelu", [_away(3, 4)]),
    Case("ThresholdedRelu", [_away(3, 4)], {"alpha": 0.11}),
    Case("HardSigmoid", [np.asarray([-4.0, -1.0, 0.3, 1.1, 5.0])], {"alpha": 0.3, "beta": 0.4}),
    Case("HardSwish", [np.asarray([-4.0, -2.9, -0.5, 0.5, 2.9, 3.5])]),
    Case("Softplus", [np.asarray([-30.0, -1.0, 0.0, 1.0, 30.0])]),
    Case("Shrink", [np.asarray([-2.0, -0.4, 0.1, 0.4, 2.0])]),
    Case("Shrink", [np.asarray([-2.0, -0.4, 0.1, 0.4, 2.0])], {"bias": 0.3, "lambd": 0.3}),
    Case("Mish", [np.asarray([-9.0, -1.0, 0.0, 1.0, 9.0])]),
    Case("Gelu", [_away(2, 3)], opset=20),
    Case("Gelu", [np.asarray([-6.0, -0.5, 0.0, 0.5, 6.0])], opset=20),
    Case("Gelu", [_away(2, 3)], {"approximate": "tanh"}, opset=20, label="tanh"),
    Case("Gelu", [np.asarray([-6.0, -0.5, 0.0, 0.5, 6.0])], {"approximate": "tanh"}, opset=20, label="tanh"),
    Case("Swish", [_away(2, 3)], opset=24),
    Case("Swish", [_away(2, 3)], {"alpha": 1.7}, opset=24),
]

_SELECTION = [
    Case("Clip", [_away(2, 3), np.asarray(-1.05), np.asarray(0.95)], operands=[0, 1, 2]),
    Case("Clip", [_away(2, 3), np.asarray(-1.05)], operands=[0, 1]),
    Case("Clip", [_away(2, 3), None, np.asarray(0.95)], operands=[0, 2]),
    Case("Clip", [_away(2, 3)], operands=[0]),
    Case("Clip", [_away(2, 3), np.asarray(0.5), np.asarray(-0.5)], operands=[0, 1, 2], label="crossed"),
    Case("Clip", [_away(2, 3), np.asarray(-1.05), np.asarray(0.95)], constant=[1, 2], operands=[0]),
    *(
        Case("Where", [_rng.random(c) < 0.5, _away(*a), _away(*b)], operands=[1, 2])
        for c, a, b in (
            ((2, 3), (2, 3), (2, 3)),
            ((2, 1), (3,), (1, 3)),
            ((3,), (), (2, 1)),
            ((), (2, 3), ()),
        )
    ),
    *(
        Case(op, [_away(*shape) for shape in shapes], operands=list(range(len(shapes))))
        for op in ("Max", "Min", "Sum", "Mean")
        for shapes in (
            [(2, 3)],
            [(2, 3), (2, 3)],
            [(2, 1), (3,)],
            [(), (2, 3), (2, 1)],
            [(3,), (3,), (2, 3), (1,)],
        )
    ),
    Case("Mod", [_away(2, 3, highest=9), _away(2, 3)], {"fmod": 1}, operands=[0, 1], label="fmod"),
    Case("Mod", [_away(2, 1, highest=9), _away(3)], {"fmod": 1}, operands=[0, 1], label="fmod"),
]

_TYPES = [
    Case("Cast", [_away(2, 3)], {"to": onnx.TensorProto.DOUBLE}),
    Case("Cast", [_away(2, 3)], {"to": onnx.TensorProto.DOUBLE, "saturate": 0}, opset=19),
    Case("Cast", [_away(2, 3)], {"to": onnx.TensorProto.DOUBLE}, opset=25),
    Case("CastLike", [_away(2, 3), _away(1)], operands=[0]),
    Case("CastLike", [_away(2, 3), _away(1)], operands=[0], opset=25),
    Case("Dropout", [_away(2, 3)], operands=[0]),
    Case("Dropout", [_away(2, 3), np.asarray(0.3)], constant=[1], operands=[0]),
    Case(
        "Dropout", [_away(2, 3), np.asarray(0.3), np.asarray(False)], constant=[1, 2], operands=[0], outputs=2
    ),
    Case(
        "Dropout", [_away(4, 6), np.asarray(0.3), np.asarray(True)], {"seed": 3}, constant=[1, 2],
        operands=[0], label="training",
    ),
    Case("Dropout", [_away(4, 6), None, np.asarray(False)], constant=[2], operands=[0], opset=22),
    Case(
        "Dropout", [_away(4, 6), np.asarray(0.3), np.asarray(True)], {"seed": 3}, operands=[0], label="run time"
    ),
]  # fmt: skip

CASES: list[Case] = [*_BINARY, *_POW, *_UNARY, *_ACTIVATIONS, *_SELECTION, *_TYPES]


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_central_differences(case: Case, symbolic: bool) -> None:
    check(case, symbolic)


# Not Dropout: each runtime draws its own mask.  Not Cast: its cases name a dtype, float64.
@pytest.mark.parametrize("case", [c for c in CASES if c.op not in ("Dropout", "Cast")], ids=case_id)
def test_float32_in_onnxruntime(case: Case) -> None:
    check_float32(case)


_INF = math.inf


@pytest.mark.parametrize(
    ("op", "attrs", "opset", "inputs", "expected"),
    [
        ("Relu", {}, 18, [[-1.0, 0.0, 2.0]], {0: [0, 0, 1]}),
        ("Abs", {}, 18, [[-1.0, 0.0, 2.0]], {0: [-1, 0, 1]}),
        ("LeakyRelu", {"alpha": 0.25}, 18, [[-1.0, 0.0, 2.0]], {0: [0.25, 0.25, 1]}),
        ("PRelu", {}, 18, [[-1.0, 0.0, 2.0], [0.25]], {0: [0.25, 0.25, 1], 1: [-1]}),
        ("Elu", {"alpha": 0.5}, 18, [[0.0, 2.0]], {0: [0.5, 1]}),
        ("Selu", {"alpha": 2.0, "gamma": 1.5}, 18, [[0.0, 2.0]], {0: [3, 1.5]}),
        ("Celu", {"alpha": 2.0}, 18, [[0.0, 2.0]], {0: [1, 1]}),
        ("ThresholdedRelu", {"alpha": 1.0}, 18, [[0.5, 1.0, 1.5]], {0: [0, 0, 1]}),
        ("HardSigmoid", {"alpha": 0.5, "beta": 0.5}, 18, [[-1.0, 0.0, 1.0]], {0: [0, 0.5, 0]}),
        ("HardSwish", {}, 18, [[-3.0, 0.0, 3.0]], {0: [0, 0.5, 1]}),
        ("Shrink", {"lambd": 0.5}, 18, [[-0.5, 0.0, 0.5, 0.75]], {0: [0, 0, 0, 1]}),
        (
            "Clip", {}, 18, [[-2.0, -1.0, 0.5, 1.0, 2.0], -1.0, 1.0],
            {0: [0, 1, 1, 1, 0], 1: 1, 2: 1},
        ),
        ("Max", {}, 18, [[1.0, 2.0, 3.0], [1.0, 3.0, 2.0]], {0: [0.5, 0, 1], 1: [0.5, 1, 0]}),
        ("Min", {}, 18, [[1.0, 2.0, 3.0], [1.0, 3.0, 2.0]], {0: [0.5, 1, 0], 1: [0.5, 0, 1]}),
        ("Max", {}, 18, [[1.0], [1.0], [0.0], [1.0]], {0: [1 / 3], 1: [1 / 3], 2: [0], 3: [1 / 3]}),
        ("Pow", {}, 18, [[0.0, 0.0, 2.0], [0.0, 2.0, 0.0]], {0: [0, 0, 0], 1: [0, 0, math.log(2)]}),
        ("Sqrt", {}, 18, [[0.0, 4.0]], {0: [_INF, 0.25]}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("executor", ["reference", "onnxruntime"])
def test_conventions(op, attrs, opset, inputs, expected, executor) -> None:
    arrays = [np.asarray(x, np.float32) for x in inputs]
    with np.errstate(divide="ignore", invalid="ignore"):
        got = cotangents_of(op, arrays, attrs, opset=opset, executor=executor)
    assert got.keys() == expected.keys()
    for index, values in expected.items():
        np.testing.assert_allclose(got[index], np.asarray(values, np.float32), rtol=1e-6, atol=0)


def test_a_masked_branch_stops_infinities() -> None:
    """Relu and Where select the cotangent; they do not multiply it by 0."""
    x = np.asarray([0.0, 4.0], np.float32)
    g = np.asarray([_INF, 1.0], np.float32)
    np.testing.assert_array_equal(cotangents_of("Relu", [x], {}, g=g)[0], [0, 1])
    got = cotangents_of("Where", [np.asarray([False, True]), x, x], {}, g=g)
    np.testing.assert_array_equal(got[1], [0, 1])
    np.testing.assert_array_equal(got[2], [_INF, 0])


def test_operand_used_twice() -> None:
    """Each edge gets its own cotangent; their sum is the derivative of x x."""
    from tests.vjp.single import vjp_of_shared

    x = np.asarray([1.5, -2.0])
    got = vjp_of_shared("Mul", x, times=2)
    np.testing.assert_allclose(sum(got), 2 * x, rtol=1e-15)
    got = vjp_of_shared("Max", x, times=3)
    np.testing.assert_allclose(sum(got), np.ones(2), rtol=1e-15)


def test_cast_returns_to_the_operands_dtype() -> None:
    x = np.asarray([1.0, 2.0], np.float32)
    got = cotangents_of("Cast", [x], {"to": onnx.TensorProto.DOUBLE}, g=np.asarray([3.0, 4.0]))[0]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [3, 4])
    half = cotangents_of("CastLike", [x, np.zeros(1, np.float16)], {}, g=np.asarray([3.0, 4.0], np.float16))[
        0
    ]
    assert half.dtype == np.float32


def test_cast_to_integers_has_no_cotangent() -> None:
    with pytest.raises(AssertionError, match="no operand"):
        check(Case("Cast", [_away(2)], {"to": onnx.TensorProto.INT64}), False)


@pytest.mark.parametrize("ratio", [0.25, None])
def test_dropout_uses_the_drawn_mask(ratio: float | None) -> None:
    """In onnxruntime the mask is random; the cotangent is 0 exactly where the output is."""
    from tests.vjp.single import backward_model

    x = np.full((8, 8), 2.0, np.float32)
    inputs = [x, None if ratio is None else np.asarray(ratio, np.float32), np.asarray(True)]
    model = backward_model("Dropout", inputs, {"seed": 5}, constant=[1, 2])
    names = [o.name for o in model.graph.output]
    got = dict(zip(names, run(model, {"x0": x, "g0": np.ones_like(x)}, "onnxruntime"), strict=True))
    assert 0 < np.count_nonzero(got["y0"] == 0) < x.size
    np.testing.assert_allclose(got["d0"], got["y0"] / 2.0, rtol=1e-6)
