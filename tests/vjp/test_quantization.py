"""The VJP rule of dequantisation, against central differences."""

from __future__ import annotations

import numpy as np
import pytest

from tests.vjp.cases import Case, both, check, label

_rng = np.random.default_rng(31)


def codes(*shape: int, dtype: type = np.int8) -> np.ndarray:
    return _rng.integers(0, 100, shape).astype(dtype)


def one(*shape: int) -> np.ndarray:
    return _rng.uniform(0.5, 1.5, shape).astype(np.float32)


# Scales are float32, and the output is linear in them: a large step.
CASES = [
    Case("DequantizeLinear", inputs, attrs, opset=opset, operands=[1], rtol=1e-4, step=0.5)
    for opset, inputs, attrs in [
        (19, [codes(2, 3), one(), codes()], {}),
        (19, [codes(2, 3, 4), one(3), codes(3)], {"axis": 1}),
        (19, [codes(2, 3, dtype=np.int32), one()], {}),
        (21, [codes(2, 3), one(3)], {"axis": -1}),
        (
            21,
            [codes(2, 5, 2, dtype=np.uint8), one(2, 3, 2), codes(2, 3, 2, dtype=np.uint8)],
            {"axis": 1, "block_size": 2},
        ),
        (21, [codes(5, dtype=np.uint8), one(5)], {"axis": 0}),
    ]
]


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_vjp(case: Case, symbolic: bool) -> None:
    check(case, symbolic)
