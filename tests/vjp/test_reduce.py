"""Reductions, softmax, cumulative operators, losses: central differences, float32, masked rows."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper
import onnx_graphsurgeon as gs
import pytest

from tests.vjp.cases import Case, both, check, label
from tests.vjp.single import case_id, check_float32, cotangents_of
from zilc import ir
from zilc.emit import Emitter
from zilc.testing import run
from zilc.vjp import table

_rng = np.random.default_rng(11)


def _apart(*shape: int) -> np.ndarray:
    """Distinct values of both signs, at least 0.1 from each other and from 0."""
    size = int(np.prod(shape))
    values = 0.1 * (_rng.permutation(size) - size // 2) + 0.05
    return np.asarray(values, np.float64).reshape(shape)


def _positive(*shape: int) -> np.ndarray:
    return np.asarray(_rng.uniform(0.3, 2.0, shape))


def _i64(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def _reductions() -> list[Case]:
    cases = []
    for op in (
        "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
        "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp",
    ):  # fmt: skip
        make = _positive if op == "ReduceLogSum" else _apart
        for keepdims in (0, 1):
            for axes in ([1], [-1, 0], [0, 1, 2]):
                x = make(2, 3, 4)
                attrs = {"keepdims": keepdims}
                cases.append(
                    Case(op, [x, _i64(*axes)], attrs, constant=[1], operands=[0], label=f"{axes}{keepdims}")
                )
            run_time = Case(
                op, [make(2, 3), _i64(-1)], {"keepdims": keepdims}, operands=[0], label=f"run{keepdims}"
            )
            cases += [
                run_time,
                Case(op, [make(2, 3)], {"keepdims": keepdims}, operands=[0], label=f"all{keepdims}"),
                Case(
                    op, [make(2, 3), _i64()], {"keepdims": keepdims}, constant=[1], label=f"empty{keepdims}"
                ),
            ]
            noop = {"keepdims": keepdims, "noop_with_empty_axes": 1}
            cases += [
                Case(op, [make(2, 3)], noop, operands=[0], label=f"noop{keepdims}"),
                Case(op, [make(2, 3), _i64()], noop, constant=[1], label=f"noop empty{keepdims}"),
                Case(op, [make(2, 3), _i64(0)], noop, constant=[1], label=f"noop given{keepdims}"),
            ]
        cases.append(Case(op, [make(3, 1), _i64(1)], constant=[1], label="size 1"))
        if op != "ReduceLogSumExp":  # onnx's reference evaluator takes no scalar there
            cases.append(Case(op, [make()], label="scalar"))
    cases += [
        Case(op, [np.zeros((0, 3)), _i64(1)], {"keepdims": k}, constant=[1], label=f"size 0 {k}")
        for op in ("ReduceSum", "ReduceMean", "ReduceSumSquare")
        for k in (0, 1)
    ]
    with_zeros = np.asarray([[2.0, 0.0, 3.0], [0.0, 0.0, 5.0], [1.5, -2.0, 4.0]])
    cases.append(Case("ReduceProd", [with_zeros, _i64(1)], constant=[1], label="zeros"))
    cases.append(Case("ReduceMean", [_apart(2, 3, 4), _i64(0, 2)], operands=[0], label="run time, two axes"))
    cases.append(Case("ReduceLogSumExp", [_apart(2, 3), _i64(1)], opset=28, constant=[1], label="opset 28"))
    cases.append(Case("ReduceLogSum", [_positive(2, 3), _i64(1)], opset=28, constant=[1], label="opset 28"))
    cases.append(Case("ReduceMax", [_apart(2, 3), _i64(1)], opset=20, constant=[1], label="opset 20"))
    return cases


_ROWS = [
    *(
        Case(op, [_apart(2, 3, 4)], {"axis": axis}, label=str(axis))
        for op in ("Softmax", "LogSoftmax")
        for axis in (0, 1, 2, -1, -2)
    ),
    *(Case(op, [x]) for op in ("Softmax", "LogSoftmax") for x in (_apart(3), _apart(4, 1), np.zeros((0, 3)))),
]


def _cumulative() -> list[Case]:
    cases = []
    for exclusive in (0, 1):
        for reverse in (0, 1):
            attrs = {"exclusive": exclusive, "reverse": reverse}
            tag = f" {exclusive}{reverse}"
            for axis in (0, -1):
                where = np.asarray(axis, np.int64)
                cases.append(
                    Case("CumSum", [_apart(3, 4), where], attrs, constant=[1], label=f"{tag} {axis}")
                )
                cases.append(
                    Case(
                        "CumProd",
                        [_positive(3, 4), where],
                        attrs,
                        opset=26,
                        constant=[1],
                        label=f"{tag} {axis}",
                    )
                )
            zeros = np.asarray(
                [[2.0, 0.0, 3.0, 1.5], [0.0, 2.0, 0.0, 5.0], [1.5, -2.0, 4.0, 0.0], [-1.0, 2.0, 0.5, 3.0]]
            )
            one = np.asarray(1, np.int64)
            cases.append(Case("CumProd", [zeros, one], attrs, opset=26, constant=[1], label=f"{tag} zeros"))
            cases.append(Case("CumSum", [_apart(2, 3), one], attrs, operands=[0], label=f"{tag} run time"))
    return cases


def _losses() -> list[Case]:
    cases = []
    labels = np.asarray([2, 0, 1, 2], np.int64)
    spatial = np.asarray([[[0, 2, 1], [1, 1, 0]], [[2, 2, 0], [0, 1, 2]]], np.int64)
    weights = np.asarray([0.5, 2.0, 1.25])
    for reduction in ("mean", "sum", "none"):
        for ignore in ({}, {"ignore_index": 2}, {"ignore_index": -100}):
            for weighted in (False, True):
                attrs = {"reduction": reduction, **ignore}
                tail = [weights] if weighted else []
                operands = [0, 2] if weighted else [0]
                tag = f" {reduction}{list(ignore.values())}"
                for shape, target in (((4, 3), labels), ((2, 3, 2, 3), spatial)):
                    target = (
                        np.where(target == 1, -100, target) if ignore.get("ignore_index") == -100 else target
                    )
                    cases += [
                        Case(op, [_apart(*shape), target, *tail], attrs, operands=operands, label=tag)
                        for op in ("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss")
                    ]
    cases += [
        Case(
            "SoftmaxCrossEntropyLoss", [_apart(4, 3), labels], outputs=2, operands=[0], label=" both outputs"
        ),
        Case(
            "SoftmaxCrossEntropyLoss", [_apart(4, 3), labels.astype(np.int32)], operands=[0], label=" int32"
        ),
        Case("NegativeLogLikelihoodLoss", [_apart(4, 3), labels], opset=22, operands=[0], label=" opset 22"),
    ]
    return cases


CASES: list[Case] = [*_reductions(), *_ROWS, *_cumulative(), *_losses()]


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_central_differences(case: Case, symbolic: bool) -> None:
    check(case, symbolic)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_float32_in_onnxruntime(case: Case) -> None:
    check_float32(case)


@pytest.mark.parametrize(
    ("op", "x", "expected"),
    [
        ("ReduceMax", [[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]], [[0, 0.5, 0.5], [1, 0, 0]]),
        ("ReduceMin", [[1.0, 1.0, 1.0], [2.0, 1.0, 0.0]], [[1 / 3, 1 / 3, 1 / 3], [0, 0, 1]]),
        ("ReduceL1", [[0.0, -2.0, 3.0]], [[0, -1, 1]]),
        ("ReduceL2", [[0.0, 0.0, 0.0], [0.0, 3.0, 4.0]], [[0, 0, 0], [0, 0.6, 0.8]]),
        ("ReduceProd", [[0.0, 0.0, 3.0], [0.0, 2.0, 4.0]], [[0, 0, 0], [8, 0, 0]]),
        ("ReduceLogSumExp", [[-np.inf, 0.0, 0.0], [0.0, -3.4e38, 0.0]], [[0, 0.5, 0.5], [0.5, 0, 0.5]]),
        ("Softmax", [[-3.4e38, -3.4e38, 0.0], [-np.inf, 0.0, 0.0]], [[0, 0, 0], [0, 0, 0]]),
        ("LogSoftmax", [[-np.inf, 0.0]], [[1, -1]]),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("executor", ["reference", "onnxruntime"])
def test_conventions(op: str, x: list, expected: list, executor: str) -> None:
    inputs = [np.asarray(x, np.float32)]
    if op.startswith("Reduce"):
        inputs.append(_i64(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        got = cotangents_of(op, inputs, {}, constant=[1], executor=executor)[0]
    np.testing.assert_allclose(got, np.asarray(expected, np.float32), rtol=1e-6, atol=1e-7)


def test_logsumexp_of_nothing_but_minus_infinity() -> None:
    x = np.full((1, 3), -np.inf, np.float32)
    got = cotangents_of("ReduceLogSumExp", [x, _i64(1)], {}, constant=[1])[0]
    np.testing.assert_array_equal(got, [[0, 0, 0]])


def _attention_tail(guarded: bool) -> onnx.ModelProto:
    """Softmax, then Where(IsNaN(y), 0, y) as exporters of attention write it, and the VJP of the scores."""
    make = onnx.helper.make_node
    nodes = [make("Softmax", ["x"], ["p"], name="softmax", axis=-1)]
    if guarded:
        nodes += [
            make("IsNaN", ["p"], ["nan"], name="isnan"),
            make("Where", ["nan", "zero", "p"], ["y"], name="where"),
        ]
    info = onnx.helper.make_tensor_value_info
    out = "y" if guarded else "p"
    graph = onnx.helper.make_graph(
        nodes, "tail", [info("x", 1, [2, 3])], [info(out, 1, [2, 3])],
        [onnx.numpy_helper.from_array(np.zeros((), np.float32), "zero")],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    built = ir.to_graph(onnx.shape_inference.infer_shapes(model))
    op = Emitter(built)
    g = gs.Variable("g", dtype=np.float32, shape=[2, 3])
    built.inputs.append(g)
    d = g
    if guarded:
        where = next(n for n in built.nodes if n.op == "Where")
        d = table.vjp(op, where, 2, [d])
    d = table.vjp(op, next(n for n in built.nodes if n.op == "Softmax"), 0, [d])
    d.shape = [2, 3]
    built.outputs = [d]
    return ir.to_proto(built)


def test_a_fully_masked_row_gets_zero_where_the_model_guards_it() -> None:
    feeds = {
        "x": np.asarray([[-np.inf, -np.inf, -np.inf], [1.0, -np.inf, 1.0]], np.float32),
        "g": np.asarray([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], np.float32),
    }
    got = run(_attention_tail(guarded=True), feeds, "onnxruntime")[0]
    np.testing.assert_allclose(got, [[0, 0, 0], [-0.5, 0, 0.5]], rtol=1e-6)
    unguarded = run(_attention_tail(guarded=False), feeds, "onnxruntime")[0]
    assert np.isnan(unguarded[0]).all()
    assert np.isfinite(unguarded[1]).all()


def test_hardmax_has_no_cotangent() -> None:
    rule = table.TABLE.lookup("Hardmax", 18)
    assert rule is not None
    assert not rule.differentiable
