"""VJP rules of Fourier transforms, against central differences in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.vjp.cases import Case, both, check, label

_rng = np.random.default_rng(29)


def r(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape)


def n(value: int) -> np.ndarray:
    return np.asarray(value, np.int64)


_OLD = [
    *(
        Case("DFT", [r(2, 5, 3, parts)], {"axis": axis, "inverse": inverse}, opset=18, label=f" {axis} {inverse}")
        for parts in (1, 2)
        for axis in (1, 2, -2)
        for inverse in (0, 1)
    ),
    *(Case("DFT", [r(2, size, 1)], {"onesided": 1}, opset=18) for size in (5, 6)),
    *(Case("DFT", [r(2, 5, 1), n(length)], {"onesided": 1}, opset=19, constant=[1]) for length in (3, 8)),
]
_NEW = [
    *(
        Case("DFT", [r(2, 5, 2), n(length), n(1)], {"inverse": inverse}, opset=20, constant=c, symbolic=bool(c))
        for length in (3, 5, 8)
        for inverse in (0, 1)
        for c in ([1, 2], [])
    ),
    *(
        Case("DFT", [r(2, 4, 2), n(length), n(-2)], {"inverse": 1, "onesided": 1}, opset=20, constant=[1, 2])
        for length in (5, 6, 7, 9)
    ),
    Case("DFT", [r(2, 4, 2)], {"inverse": 1, "onesided": 1}, opset=20, symbolic=False),
    Case("DFT", [r(3, 6, 1), None, n(0)], {"onesided": 1}, opset=20, constant=[2]),
    Case("DFT", [r(3, 6, 1), None, n(0)], {"onesided": 1}, opset=20, symbolic=False, label=" axis at run time"),
]
_STFT = [
    Case("STFT", [r(1, 12, 1), n(3), r(4)], {"onesided": 1}, constant=[1], symbolic=False),
    Case("STFT", [r(2, 11, 1), n(2), r(5), n(5)], {"onesided": 0}, constant=[1, 3], symbolic=False),
    Case("STFT", [r(2, 11, 2), n(4), None, n(3)], {"onesided": 0}, constant=[1, 3], symbolic=False),
]


CASES = [*_OLD, *_NEW, *_STFT]


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_vjp(case: Case, symbolic: bool) -> None:
    check(case, symbolic)
