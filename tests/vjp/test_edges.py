"""Sizes 0 and 1, and half precision, family by family: on onnxruntime, in the operands' own types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.vjp.cases import Case
from tests.vjp.single import cotangents_of

#: None of central differences: see the operators' families.
CASES: list[Case] = []

_rng = np.random.default_rng(17)


def normal(*shape: int) -> np.ndarray:
    return np.asarray(_rng.standard_normal(shape))


def positive(*shape: int) -> np.ndarray:
    return np.asarray(_rng.uniform(0.5, 1.5, shape))


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def _families(n: int) -> list[tuple[str, Sequence[np.ndarray], Mapping[str, Any], Sequence[int]]]:
    """Operators at batch size ``n``: inputs, attributes, operands given as initializers."""
    unary = ("Relu", "Tanh", "Sigmoid", "Exp", "Abs", "Softplus", "Erf", "Elu", "HardSwish", "Identity", "Neg")
    x = normal(n, 3)
    return [
        *((op, [x], {}, ()) for op in unary),
        *((op, [x, positive(3)], {}, ()) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
        ("Where", [np.zeros((n, 1), bool), x, normal(3)], {}, ()),
        ("Clip", [x, np.asarray(-0.5), np.asarray(0.5)], {}, (1, 2)),
        ("MatMul", [x, normal(3, 2)], {}, ()),
        ("MatMul", [normal(n, 2, 3), normal(3, 2)], {}, ()),
        ("Gemm", [x, normal(2, 3), normal(2)], {"transB": 1}, ()),
        ("Softmax", [x], {"axis": -1}, ()),
        ("LogSoftmax", [x], {"axis": -1}, ()),
        ("LayerNormalization", [x, positive(3), normal(3)], {"axis": -1}, ()),
        ("Conv", [normal(n, 2, 5, 5), normal(3, 2, 3, 3), normal(3)], {"kernel_shape": [3, 3]}, ()),
        ("AveragePool", [normal(n, 2, 4, 4)], {"kernel_shape": [2, 2], "strides": [2, 2]}, ()),
        ("GlobalAveragePool", [normal(n, 2, 4, 4)], {}, ()),
        ("ReduceSum", [x, ints(1)], {"keepdims": 0}, (1,)),
        ("ReduceMean", [x, ints(1)], {"keepdims": 1}, (1,)),
        ("ReduceL2", [x, ints(1)], {"keepdims": 0}, (1,)),
        ("Concat", [x, normal(2, 3)], {"axis": 0}, ()),
        ("Gather", [normal(4, 3), np.zeros((n,), np.int64)], {"axis": 0}, ()),
        ("Transpose", [x], {"perm": [1, 0]}, ()),
        ("Reshape", [x, ints(3, n)], {"allowzero": 1}, (1,)),
        ("Slice", [x, ints(1), ints(3), ints(1)], {}, (1, 2, 3)),
        ("Pad", [x, ints(0, 1, 0, 1)], {}, (1,)),
        ("Expand", [normal(1, 3), ints(n, 3)], {}, (1,)),
        ("Tile", [x, ints(1, 2)], {}, (1,)),
        ("Split", [x, ints(1, 2)], {"axis": 1}, (1,)),
        ("Einsum", [x, normal(3, 2)], {"equation": "ij,jk->ik"}, ()),
        ("CumSum", [x, np.asarray(1)], {}, (1,)),
    ]


def _named(n: int) -> list[Any]:
    return [pytest.param(*entry, id=f"{entry[0]}-{k}") for k, entry in enumerate(_families(n))]


def _run(
    op: str, inputs: Sequence[np.ndarray], attrs: Mapping[str, Any], constant: Sequence[int], dtype: Any, symbolic: bool
) -> dict[int, np.ndarray]:
    typed = [x.astype(dtype) if x.dtype.kind == "f" else x for x in inputs]
    outputs = 2 if op == "Split" else 1
    # onnxruntime leaves what a Conv over 0 channels makes unset: the weights' gradient of an empty batch.
    lacking = op == "Conv" and not len(inputs[0])
    executor = "reference" if lacking else "onnxruntime"
    return cotangents_of(
        op, typed, attrs, constant=constant, outputs=outputs, symbolic=symbolic, executor=executor
    )


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize(("op", "inputs", "attrs", "constant"), _named(0))
def test_of_nothing(op: str, inputs: Any, attrs: Any, constant: Any, symbolic: bool) -> None:
    """A batch of no examples: shapes as they are; what the examples share gets 0, and nothing is NaN."""
    got = _run(op, inputs, attrs, constant, np.float32, symbolic)
    assert got
    for k, g in got.items():
        assert g.shape == inputs[k].shape
        if op != "Concat":  # its other part is not empty
            np.testing.assert_array_equal(g, 0)


@pytest.mark.parametrize(("op", "inputs", "attrs", "constant"), _named(1))
def test_of_one_and_in_half_precision(op: str, inputs: Any, attrs: Any, constant: Any) -> None:
    """A batch of one; float16 beside float32, within what its rounding allows."""
    single = _run(op, inputs, attrs, constant, np.float32, False)
    half = _run(op, [x.astype(np.float16).astype(np.float64) if x.dtype.kind == "f" else x for x in inputs],
                attrs, constant, np.float16, True)  # fmt: skip
    assert single.keys() == half.keys()
    for k, g in single.items():
        assert g.shape == inputs[k].shape
        assert half[k].dtype == np.float16
        np.testing.assert_allclose(half[k].astype(np.float32), g, rtol=3e-2, atol=3e-2)
