"""VJP rules of TensorScatter and Range, against central differences in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.vjp.cases import Case, both, check, label

_rng = np.random.default_rng(37)


def r(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape)


def i(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def s(value: float) -> np.ndarray:
    return np.asarray(value, np.float64)


CASES = [
    Case("TensorScatter", [r(2, 3, 5, 2), r(2, 3, 2, 2), i(1, 3)], opset=24),
    Case("TensorScatter", [r(2, 5, 2), r(2, 5, 2)], opset=24),
    Case("TensorScatter", [r(2, 5, 3), r(2, 2, 3), i(4, 3)], {"axis": 1, "mode": "circular"}, opset=24),
    Case("TensorScatter", [r(3, 2, 4), r(3, 2, 1), i(0, 3, 2)], {"axis": -1}, opset=24),
    Case("Range", [s(0.3), s(2.1), s(0.5)], operands=[0, 2]),
    Case("Range", [s(1.3), s(-2.4), s(-0.7)], operands=[0, 2]),
    Case("Range", [s(1.3), s(0.2), s(0.7)], operands=[0, 2], symbolic=False, label=" empty"),
]


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_vjp(case: Case, symbolic: bool) -> None:
    check(case, symbolic)
