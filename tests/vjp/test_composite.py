"""Derived rules: operators differentiated through their function bodies, their written rules set aside."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from tests.vjp.cases import Case, both, check, label
from zilc import ir
from zilc.emit import Emitter
from zilc.testing import op_model, vjp_model
from zilc.vjp import composite, table

_rng = np.random.default_rng(5)


def r(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape)


def i(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


_X = np.asarray([[-1.7, -0.6, 0.2, 1.3], [0.7, -0.3, 2.1, -2.4], [0.9, 1.6, -0.8, 0.4]])
_POSITIVE = np.abs(_X)

CASES = [
    Case("Elu", [_X], {"alpha": 0.7}, opset=22),
    Case("Selu", [_X], opset=22),
    Case("LeakyRelu", [_X], {"alpha": 0.2}),
    Case("ThresholdedRelu", [_X], {"alpha": 0.5}, opset=22),
    Case("HardSigmoid", [_X], {"alpha": 0.3, "beta": 0.4}, opset=22),
    Case("HardSwish", [_X], opset=22),
    Case("Mish", [_X], opset=22),
    Case("Softplus", [_X], opset=22),
    Case("Softsign", [_X], opset=22),
    Case("Shrink", [_X], {"lambd": 0.5, "bias": 0.1}),
    Case("PRelu", [_X, r(4)], operands=[0, 1]),
    Case("Gelu", [_X], opset=20),
    Case("Gelu", [_X], {"approximate": "tanh"}, opset=20, label="tanh"),
    Case("Swish", [_X], {"alpha": 1.5}, opset=24),
    Case("SwiGLU", [_X, r(3, 4)], opset=28, operands=[0, 1]),
    Case("Clip", [_X, np.asarray(-0.5), np.asarray(1.0)]),
    Case("Clip", [_X, None, np.asarray(1.0)]),
    Case("Softmax", [_X], {"axis": 0}),
    Case("LogSoftmax", [_X]),
    Case("ReduceL1", [_X, i(1)], constant=[1]),
    Case("ReduceL2", [_X, i(0)], {"keepdims": 0}, constant=[1]),
    Case("ReduceSumSquare", [_X, i(0)], constant=[1]),
    Case("ReduceLogSum", [_POSITIVE, i(0)], constant=[1]),
    Case("ReduceLogSumExp", [_X, i(-1)], constant=[1]),
    Case("CenterCropPad", [_X, i(2, 7)], constant=[1]),
    Case("CenterCropPad", [_X, i(5)], {"axes": [1]}, constant=[1]),
    Case("SoftmaxCrossEntropyLoss", [_X, i(0, 3, 1)], symbolic=False),
    Case("NegativeLogLikelihoodLoss", [_X, i(0, 3, 1)], symbolic=False),
    Case("Attention", [r(2, 2, 3, 4), r(2, 2, 4, 4), r(2, 2, 4, 3)], {"is_causal": 1}, opset=24, operands=[0, 1, 2],
         symbolic=False),
]  # fmt: skip


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_derived_rule(case: Case, symbolic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(table.TABLE.rules, ("", case.op), raising=False)
    check(case, symbolic)


def _node(op_type: str, opset: int, *operands: np.ndarray, **attrs: object) -> tuple[gs.Node, int]:
    graph = ir.to_graph(op_model(op_type, operands, attrs, opset=opset))
    return graph.nodes[0], opset


def test_an_operator_with_a_written_rule_keeps_it() -> None:
    node, opset = _node("Softmax", 18, _X)
    rule = table.lookup(node, opset)
    assert rule is table.TABLE.lookup("Softmax", opset)


def test_operators_without_body_have_no_derived_rule() -> None:
    node, opset = _node("Cos", 22, _X)
    assert composite.derive(node, opset) is None


def test_a_missing_rule_inside_the_body_is_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a zero: HardSwish's body multiplies."""
    node, opset = _node("HardSwish", 22, _X)
    composite._derive.cache_clear()
    monkeypatch.delitem(table.TABLE.rules, ("", "Mul"))
    assert composite.derive(node, opset) is None
    monkeypatch.undo()
    composite._derive.cache_clear()
    assert composite.derive(node, opset) is not None


def test_operands_without_a_float_path_get_no_gradient() -> None:
    model = op_model("CenterCropPad", [_X, i(2, 7)], opset=18, constant=[1])
    rule = composite.derive(ir.to_graph(model).nodes[0], 18)
    assert rule is not None
    assert [rule.formula(k) is not None for k in range(2)] == [True, False]


def test_the_operator_stays_one_vertex(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward graph keeps the node; its body stands beside it, named by the emitter."""
    monkeypatch.delitem(table.TABLE.rules, ("", "Mish"), raising=False)
    model = vjp_model(op_model("Mish", [_X], opset=22))
    kinds = [n.op_type for n in model.graph.node if not n.name.startswith("zilc")]
    assert kinds == ["Mish", "Identity"]


def test_two_formulas_share_one_body() -> None:
    """The body is emitted once, however many operands ask."""
    rule = composite.derive(_node("PRelu", 18, _X, r(4))[0], 18)
    assert rule is not None
    graph = gs.Graph(opset=18)
    op = Emitter(graph)
    x, slope = (gs.Variable(n, np.float64, s) for n, s in (("x", (3, 4)), ("s", (4,))))
    g = gs.Variable("g", np.float64, (3, 4))
    before = 0
    for k, formula in enumerate(rule.formulas):
        assert formula is not None
        formula(op, (g,), (g,), x, slope)
        if k == 0:
            before = len(graph.nodes)
    assert len([n for n in graph.nodes if n.op == "Less"]) == 1
    assert len(graph.nodes) > before
