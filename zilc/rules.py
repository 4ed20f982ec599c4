"""The open door: VJP rules of your own, for operators of custom domains and in place of zilc's (docs/RULES.md).

    from zilc import rules

    rules.defvjp("Swoosh", lambda op, g, y, x: op.Mul(g, op.Cos(x)), domain="com.example")
    rules.operator("Swoosh", domain="com.example", infer=rules.like(0), compute=np.sin)

Rules are written with the builder that zilc's own are written with, and are read when a model is compiled.  What is
registered stays until :func:`remove`, or until the end of a :func:`scoped` block.
"""

from __future__ import annotations

import contextlib
import runpy
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zilc.vjp  # noqa: F401  (fills the table)
from zilc import foreign
from zilc.emit import Emitter
from zilc.errors import FileError, OptionError
from zilc.foreign import TensorType
from zilc.vjp import composite
from zilc.vjp.table import TABLE, Formula, Rule

__all__ = [
    "Emitter", "TensorType", "broadcasting", "defvjp", "like", "load", "no_gradient", "operator", "remove", "scoped",
    "variadic",
]  # fmt: skip

#: zilc's own rules.
_OWN = {key: tuple(entries) for key, entries in TABLE.rules.items()}


def defvjp(
    op: str,
    *formulas: Formula | None,
    domain: str = "",
    since: int = 1,
    replace: bool = False,
    multi: bool = False,
    extra_outputs: tuple[int, ...] = (),
    note: str = "",
) -> None:
    """Register one formula per operand: ``formula(op, g, y, *operands, **attributes)`` gives that operand's cotangent.

    Args:
        op: operator type; ``domain`` is empty for ONNX's own.
        formulas: ``op`` is the emitter (``op.Mul(g, x)`` appends a Mul), ``g`` the cotangent of the output, ``y`` the
            output, then the operands, None where an optional one is absent.  The result has the operand's shape and
            dtype.  None in place of a formula: no gradient reaches the operand.
        since: the opset from which the rule holds; of ONNX's own operators only.
        replace: take the place of zilc's rules from ``since`` on.
        multi: ``g`` and ``y`` are tuples, one entry an output (``g`` has None where no cotangent arrives).
        extra_outputs: indices of optional outputs that the formulas read; ``y`` is a tuple then.
        note: one line for ``zilc ops``.

    Raises:
        OptionError: the operator has a rule and ``replace`` is not set, or has none and it is; or ``since`` is given
            for a custom domain.
    """
    _register(Rule(op, domain, since, formulas, multi=multi, extra_outputs=extra_outputs, note=note), replace)


def broadcasting(
    op: str, *formulas: Formula | None, domain: str = "", since: int = 1, replace: bool = False, note: str = ""
) -> None:
    """Like :func:`defvjp` for operators that broadcast: zilc sums each cotangent down to its operand's shape."""
    _register(Rule(op, domain, since, formulas, broadcasting=True, note=note), replace)


def variadic(
    op: str, formula: Formula, *, domain: str = "", since: int = 1, replace: bool = False, broadcast: bool = False,
    multi: bool = False, note: str = "",
) -> None:  # fmt: skip
    """One formula for any number of operands: ``formula(op, g, y, index, *operands, **attributes)``."""
    _register(Rule(op, domain, since, variadic=formula, broadcasting=broadcast, multi=multi, note=note), replace)


def no_gradient(*ops: str, domain: str = "", since: int = 1, replace: bool = False, note: str = "") -> None:
    """Operators through which no gradient passes: paths through them take no part in levels."""
    for op in ops:
        _register(Rule(op, domain, since, note=note), replace)


def operator(
    op: str,
    *,
    domain: str,
    infer: Callable[..., Any] | None = None,
    compute: Callable[..., Any] | None = None,
) -> None:
    """What zilc cannot know of a custom operator.

    Args:
        infer: ``infer(*types, **attributes)`` gives the output's (dtype, shape), or a list of them, from those of the
            operands (:class:`TensorType`; None for an absent one).  Not needed where the file states the types of
            everything, as exporters mostly do.
        compute: ``compute(*arrays, **attributes)`` gives the output in NumPy, or a tuple.  ``zilc verify`` takes
            differences with it where ONNX Runtime has no float64 kernel.

    Raises:
        OptionError: the domain is ONNX's own.
    """
    if _domain(domain) == "":
        raise OptionError(f"'{op}' of the default domain is ONNX's own", where="domain")
    foreign.OPERATORS[domain, op] = foreign.Operator(infer, compute)


def is_own(rule: Rule | None) -> bool:
    """Whether a rule is zilc's, and not one that was registered in its place."""
    return rule is not None and any(rule is own for own in _OWN.get((rule.domain, rule.op), ()))


def like(operand: int) -> Callable[..., TensorType]:
    """For :func:`operator`: the output has the type of one operand."""
    return lambda *types, **_: types[operand]


def remove(op: str, *, domain: str = "") -> None:
    """Take back what was registered for an operator; zilc's own rules of it return."""
    key = (_domain(domain), op)
    TABLE.rules.pop(key, None)
    foreign.OPERATORS.pop(key, None)
    if key in _OWN:
        TABLE.rules[key] = list(_OWN[key])
    composite.forget()


@contextlib.contextmanager
def scoped() -> Iterator[None]:
    """What is registered inside the block is taken back at its end."""
    rules = {key: list(entries) for key, entries in TABLE.rules.items()}
    operators = dict(foreign.OPERATORS)
    try:
        yield
    finally:
        TABLE.rules.clear()
        TABLE.rules.update(rules)
        foreign.OPERATORS.clear()
        foreign.OPERATORS.update(operators)
        composite.forget()


def load(path: str | Path) -> None:
    """Run a Python file that registers rules: what ``--rules FILE.py`` does.

    Raises:
        FileError: it cannot be read.
        OptionError: it fails, or registers nothing.
    """
    file = Path(path)
    try:
        file.read_bytes()
    except OSError as error:
        raise FileError(f"cannot be read ({error.strerror})", where=str(file)) from error
    before = _state()
    try:
        runpy.run_path(str(file), run_name="zilc_rules")
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        raise OptionError(
            f"the file of rules fails: {type(error).__name__}: {error}",
            where=f"--rules {file}" + (f", line {line}" if line else ""),
            hint="It is run as Python; docs/RULES.md shows one.",
        ) from error
    if _state() == before:
        raise OptionError(
            "registers no rule", where=f"--rules {file}", hint="Call zilc.rules.defvjp; docs/RULES.md shows a file."
        )


def _state() -> Any:
    return {k: tuple(v) for k, v in TABLE.rules.items()}, dict(foreign.OPERATORS)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _register(rule: Rule, replace: bool) -> None:
    domain = _domain(rule.domain)
    rule = Rule(**{**rule.__dict__, "domain": domain})
    name = f"{domain}.{rule.op}" if domain else rule.op
    held = TABLE.rules.get((domain, rule.op), [])
    known = bool(held) or (domain == "" and _has_schema(rule.op))
    if domain and rule.since != 1:
        raise OptionError(
            "since counts ONNX's opsets; a rule of a custom domain holds for every version", where=f"rule of {name}"
        )
    if domain == "" and not _has_schema(rule.op):
        raise OptionError(
            "ONNX has no such operator", where=f"rule of {name}", hint="Name the operator's domain: domain='...'."
        )
    if known and not replace:
        raise OptionError(
            "zilc has one already", where=f"rule of {name}", hint="replace=True takes its place."
        )
    if replace and not known:
        raise OptionError("there is none to replace", where=f"rule of {name}", hint="Leave out replace=True.")
    TABLE.rules[domain, rule.op] = [r for r in held if r.since < rule.since]
    TABLE.add(rule)
    composite.forget()


def _has_schema(op: str) -> bool:
    import onnx.defs

    return bool(onnx.defs.has(op))

