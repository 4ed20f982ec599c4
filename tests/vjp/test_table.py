"""The table as a whole: every rule has a case and every case a rule, and formulas fit the schemas."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.defs
import onnx_graphsurgeon as gs
import pytest

from tests.vjp.cases import Case
from zilc import rules as own
from zilc.onnx_io import MIN_OPSET
from zilc.testing import op_model, run, vjp_model
from zilc.vjp import composite, table
from zilc.vjp.table import TABLE, Rule

#: Modules that are no family: this one, two that sweep over the cases of all, and the derived rules, whose cases set
#: written rules aside.
_OTHERS = ("test_table", "test_composite", "test_opsets", "test_low_precision")
FAMILIES = sorted(p.stem for p in Path(__file__).parent.glob("test_*.py") if p.stem not in _OTHERS)
CASES: list[Case] = [case for family in FAMILIES for case in importlib.import_module(f"tests.vjp.{family}").CASES]
NEWEST = onnx.defs.onnx_opset_version()


def _opsets(rule: Rule) -> list[int]:
    """The opsets at which the rule is in force."""
    newer = [r.since for r in TABLE.rules[(rule.domain, rule.op)] if r.since > rule.since]
    return list(range(max(MIN_OPSET, rule.since), min([*newer, NEWEST + 1])))


def _formulas(rule: Rule) -> list[Callable[..., object]]:
    found = [rule.variadic, *rule.formulas]
    return [f for f in found if f is not None]


RULES = [rule for rule in TABLE if rule.domain == ""]


@pytest.mark.parametrize(
    "rule", [r for r in RULES if r.differentiable and _opsets(r)], ids=lambda r: f"{r.op}-{r.since}"
)
def test_every_rule_has_a_case(rule: Rule) -> None:
    in_force = set(_opsets(rule))
    assert any(c.op == rule.op and c.opset in in_force for c in CASES), f"{rule.op} since opset {rule.since}"


def _without_a_case() -> list[str]:
    """Rules of ONNX's own operators that nothing tests, by the table as it is now."""
    rules = [r for r in TABLE if r.domain == "" and r.differentiable and _opsets(r)]
    return [
        f"{r.op}-{r.since}" for r in rules if not any(c.op == r.op and c.opset in set(_opsets(r)) for c in CASES)
    ]


def _without_a_rule() -> list[str]:
    return sorted({c.op for c in CASES if TABLE.lookup(c.op, c.opset) is None})


def test_every_case_has_a_rule() -> None:
    assert _without_a_rule() == []


def test_rules_of_the_users_own_hide_nothing() -> None:
    """They come and go; what they add to ONNX's operators, or take away, is seen; other domains are theirs."""
    assert _without_a_case() == []
    with own.scoped():
        own.defvjp("Mine", lambda op, g, y, x: g, domain="com.example")
        own.defvjp("Exp", lambda op, g, y, x: op.Mul(g, y), replace=True)
        assert (_without_a_case(), _without_a_rule()) == ([], [])
        own.defvjp("Hardmax", lambda op, g, y, x, *, axis: g, since=13, replace=True)
        assert _without_a_case() == ["Hardmax-13"]
        del TABLE.rules["", "Exp"]
        assert _without_a_rule() == ["Exp"]
    assert (_without_a_case(), _without_a_rule()) == ([], [])


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.op}-{r.since}")
def test_operator_exists(rule: Rule) -> None:
    assert onnx.defs.has(rule.op), f"{rule.op} is not an ONNX operator"


@pytest.mark.parametrize("rule", [r for r in RULES if r.differentiable], ids=lambda r: f"{r.op}-{r.since}")
def test_formulas_fit_the_schema(rule: Rule) -> None:
    """Each formula takes (op, g, y, operands ...) and, by keyword, every attribute at every opset it serves."""
    for opset in _opsets(rule):
        try:
            schema = onnx.defs.get_schema(rule.op, opset, "")
        except onnx.defs.SchemaError:
            continue
        attrs = dict.fromkeys(schema.attributes)
        for formula in _formulas(rule):
            count = 3 + (1 if rule.variadic is not None else max(schema.max_input, len(rule.formulas)))
            if rule.variadic is not None:
                count += max(1, schema.min_input)
            inspect.signature(formula).bind(*range(count), **attrs)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.op}-{r.since}")
def test_indices_are_within_the_schema(rule: Rule) -> None:
    for opset in _opsets(rule):
        if not onnx.defs.has(rule.op, opset, ""):
            continue
        schema = onnx.defs.get_schema(rule.op, opset, "")
        assert len(rule.formulas) <= schema.max_input
        assert all(index < schema.max_output for index in rule.extra_outputs)


def test_newest_rule_not_above_the_opset() -> None:
    rules = table.Table()
    for since in (1, 20, 13):
        rules.add(Rule("Exp", "", since))
    found = [rules.lookup("Exp", opset) for opset in (12, 13, 19, 20, 30)]
    assert [r.since for r in found if r] == [1, 13, 13, 20, 20]
    assert rules.lookup("Exp", 13, "ai.onnx") is rules.lookup("Exp", 13)
    assert rules.lookup("Exp", 13, "com.example") is None
    assert rules.lookup("Log", 13) is None


def test_attributes_are_filled_in_from_the_schema() -> None:
    node = gs.Node("Gemm", attrs={"alpha": 2.0})
    assert table.attributes(node, 18) == {"alpha": 2.0, "beta": 1.0, "transA": 0, "transB": 0}


def test_lookup_falls_back_to_the_function_body() -> None:
    x = gs.Variable("x", np.float32, (5, 4))
    node = gs.Node(
        "CenterCropPad", inputs=[x, gs.Constant("s", np.asarray([2, 7]))], outputs=[gs.Variable("y", np.float32)]
    )
    rule = table.lookup(node, 18)
    assert rule == composite.derive(node, 18)
    assert rule is not None
    assert rule.formula(0) is not None


def test_unknown_operators_are_no_rule() -> None:
    node = gs.Node("Mystery", inputs=[gs.Variable("x", np.float32)], outputs=[gs.Variable("y", np.float32)])
    assert table.lookup(node, 18) is None
    assert table.is_differentiable_operand(node, 0, 18), "levels do not depend on what zilc can differentiate"


@pytest.mark.parametrize(
    ("x_shape", "y_shape"), [((3, 1), (2, 3, 4)), ((), (2, 3)), ((1, 1), (1, 5)), ((4,), (2, 3, 4))]
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_unbroadcast(x_shape: tuple[int, ...], y_shape: tuple[int, ...], symbolic: bool) -> None:
    rng = np.random.default_rng(1)
    model = vjp_model(op_model("Add", [rng.random(x_shape), rng.random(y_shape)], symbolic=symbolic), operands=[0])
    g = rng.random(y_shape)
    feeds = {"x0": np.zeros(x_shape), "x1": np.zeros(y_shape), "g0": g}
    got = run(model, feeds)[[o.name for o in model.graph.output].index("d0")]
    lead = len(y_shape) - len(x_shape)
    expected = g.sum(axis=tuple(range(lead)))
    expected = expected.sum(axis=tuple(k for k, n in enumerate(x_shape) if n == 1), keepdims=True)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
