"""One case of a rule's test table, and how it is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import zilc.vjp  # noqa: F401  (fills the table)
from zilc.testing import check_vjp


@dataclass(frozen=True)
class Case:
    """An operator with operands that stay clear of kinks.

    Attributes:
        inputs: float64 (or integer, boolean) arrays; None for an absent optional operand.
        operands: which operands must be checked; None means every differentiable one.
        constant: operands given as initializers (axes, shapes); they are not differentiated.
        symbolic: also check with every dimension symbolic.
        step: of the central differences; large where an operator is linear and takes float32 alone.
    """

    op: str
    inputs: Sequence[np.ndarray | None]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 18
    outputs: int = 1
    operands: Sequence[int] | None = None
    constant: Sequence[int] = ()
    symbolic: bool = True
    rtol: float = 1e-6
    step: float = 1e-5
    executor: str = "reference"
    label: str = ""

    def __str__(self) -> str:
        shapes = ",".join("-" if x is None else "x".join(map(str, np.shape(x))) or "scalar" for x in self.inputs)
        return f"{self.op}[{shapes}]{self.label}"


def check(case: Case, symbolic: bool) -> None:
    """Hold the rule against central differences in float64."""
    check_vjp(
        case.op,
        case.inputs,
        case.attrs,
        opset=case.opset,
        outputs=case.outputs,
        operands=case.operands,
        constant=case.constant,
        symbolic=symbolic,
        rtol=case.rtol,
        step=case.step,
        executor=case.executor,
    )


def both(cases: Sequence[Case]) -> list[tuple[Case, bool]]:
    """Each case with static shapes, and with symbolic ones where it allows that."""
    return [(case, symbolic) for case in cases for symbolic in ((False, True) if case.symbolic else (False,))]


def label(value: Any) -> str:
    """Test ids."""
    return ("symbolic" if value else "static") if isinstance(value, bool) else str(value)
