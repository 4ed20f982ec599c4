"""RNN, LSTM and GRU as one vertex, whose VJP is a Scan over reversed time."""

from __future__ import annotations

import pytest

from tests.recurrent import CASES as OPERATORS
from tests.recurrent import GATES, Recurrent
from tests.vjp.cases import Case, both, check, label
from tests.vjp.single import check_float32

ORDER = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"]


def case_of(one: Recurrent) -> Case:
    given = one.operands()
    inputs = [given.get(name) for name in (ORDER if one.kind == "LSTM" else ORDER[:6])]
    while inputs[-1] is None:
        inputs.pop()
    attrs = {"hidden_size": one.hidden, **one.attrs}
    return Case(one.kind, inputs, attrs, outputs=1 + one.states, label=f" {one}")


CASES = [case_of(one) for one in OPERATORS]


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_vjp(case: Case, symbolic: bool) -> None:
    check(case, symbolic)


@pytest.mark.parametrize("kind", GATES)
def test_float32(kind: str) -> None:
    check_float32(case_of(Recurrent(kind, {"direction": "bidirectional"}, lengths=(4, 1, 2))))
