"""If, Scan and Loop as one vertex: branches, iterations either way along any axis, captured operands, nesting."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx.printer
import pytest

from tests.vjp.cases import Case, both, check, label
from tests.vjp.single import cotangents_of

RNG = np.random.default_rng(5)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype("f").astype("d")


def graph(text: str) -> onnx.GraphProto:
    return onnx.parser.parse_graph(text)


THEN = "t () => (double[M, K] ty) { m = MatMul(x1, x2)  h = Tanh(m)  ty = Mul(h, x3) }"
ELSE = "e () => (double[M, K] ey) { s = Sigmoid(x3)  n = MatMul(x1, x2)  ey = Add(n, s) }"
INNER = """t () => (double[M, K] ty) {
    p = ReduceSum <keepdims = 0> (x3)  zero = Constant <value = double {0.0}> ()  c = Greater(p, zero)
    ty = If(c) <then_branch = a () => (double[M, K] ay) { q = MatMul(x1, x2)  ay = Exp(q) },
                else_branch = b () => (double[M, K] by) { r = MatMul(x1, x2)  by = Mul(r, r) }> }"""
STEP = """b (double[M] h, double[K] x) => (double[M] after, double[K] y) {
    u = MatMul(x, x2)  a = Add(u, h)  after = Tanh(a)  s = ReduceSum(after)  y = Mul(x, s) }"""
TWO = """b (double[M] h, double[N] k, double[M] x, double[N] z)
         => (double[M] ho, double[N] ko, double[M] y, double[N] w) {
    a = Mul(h, x)  ho = Sin(a)  s = ReduceSum(ho)  kz = Add(k, z)  ko = Mul(kz, s)  y = Exp(ho)  w = Mul(ko, x4) }"""
LOOP = """b (int64 i, bool go, double[M, M] h) => (bool on, double[M, M] after, double[M] y) {
    on = Identity(go)  t = Cast <to = 11> (i)  m = MatMul(h, x3)  a = Tanh(m)  after = Add(a, x4)
    r = ReduceSum <keepdims = 0> (after)  d = Mul(x4, t)  rows = Mul(d, r)
    one = Constant <value_ints = [0]> ()  y = ReduceSum <keepdims = 0> (rows, one) }"""
WHILE = """b (int64 i, bool go, double[M] h) => (bool on, double[M] after) {
    after = Mul(h, x3)  s = ReduceSumSquare <keepdims = 0> (after)  bound = Constant <value = double {0.5}> ()
    on = Greater(s, bound) }"""
NESTED = """b (int64 i, bool go, double[M] h) => (bool on, double[M] after) {
    on = Identity(go)  n = Constant <value = int64 {2}> ()
    after = Loop(n, , h) <body = c (int64 j, bool gj, double[M] k) => (bool oj, double[M] kk) {
        oj = Identity(gj)  p = Mul(k, x3)  q = Add(p, h)  kk = Sin(q) }> }"""

CASES = [
    *(
        Case("If", [np.asarray(c), array(3, 4), array(4, 2), array(3, 2)],
             {"then_branch": graph(THEN), "else_branch": graph(ELSE)}, label=f" {c}")
        for c in (True, False)
    ),
    *(
        Case("If", [np.asarray(c), array(3, 4), array(4, 2), sign * np.abs(array(3, 2))],
             {"then_branch": graph(INNER), "else_branch": graph(ELSE)}, operands=[1, 2] if c else [1, 2, 3],
             symbolic=False, label=f" nested {c} {sign}")
        for c, sign in ((True, 1), (True, -1))
    ),
    *(
        Case("Scan", [array(3), array(steps, 4), array(4, 3)], {"num_scan_inputs": 1, "body": graph(STEP)}, outputs=2,
             label=f" T{steps}")
        for steps in (1, 5)
    ),
    Case("Scan", [array(3), array(5, 4), array(4, 3)],
         {"num_scan_inputs": 1, "body": graph(STEP), "scan_input_directions": [1]}, outputs=2, label=" reverse"),
    Case("Scan", [array(3), array(5, 4), array(4, 3)],
         {"num_scan_inputs": 1, "body": graph(STEP), "scan_input_directions": [1], "scan_output_directions": [1]},
         outputs=2, label=" reverse both"),
    Case("Scan", [array(3), array(4, 5), array(4, 3)],
         {"num_scan_inputs": 1, "body": graph(STEP), "scan_input_axes": [1], "scan_output_axes": [1]}, outputs=2,
         label=" last axis"),
    Case("Scan", [array(3), array(4, 5), array(4, 3)],
         {"num_scan_inputs": 1, "body": graph(STEP), "scan_input_axes": [-1], "scan_output_axes": [-1],
          "scan_output_directions": [1]}, outputs=2, label=" negative axes"),
    Case("Scan", [array(3), array(2), array(3, 4), array(4, 2), array(2)],
         {"num_scan_inputs": 2, "body": graph(TWO), "scan_input_axes": [1, 0], "scan_input_directions": [0, 1],
          "scan_output_axes": [1, 0], "scan_output_directions": [1, 0]}, outputs=4, symbolic=False, label=" two"),
    *(
        Case("Loop", [np.asarray(trips), np.asarray(True), array(3, 3), array(3, 3), array(3, 3)],
             {"body": graph(LOOP)}, outputs=2, label=f" T{trips}")
        for trips in (1, 4)
    ),
    Case("Loop", [np.asarray(50), np.asarray(True), array(4), np.asarray([0.9, -0.7, 0.8, 0.5])],
         {"body": graph(WHILE)}, label=" while"),
    Case("Loop", [np.asarray(3), np.asarray(True), array(4), array(4)], {"body": graph(NESTED)}, label=" nested"),
    Case("Loop", [np.asarray(3), None, array(4), array(4)], {"body": graph(NESTED)}, label=" no condition"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_vjp(case: Case, symbolic: bool) -> None:
    check(case, symbolic)


def in_float32(value: object) -> object:
    """A subgraph's float64 types as float32: the literals of the texts above."""
    if not isinstance(value, onnx.GraphProto):
        return value
    text = onnx.printer.to_text(value).replace("double", "float").replace("Cast <to: int = 11>", "Cast <to: int = 1>")
    return onnx.parser.parse_graph(text)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_onnxruntime_runs_it_in_float32(case: Case) -> None:
    """Beside the reference evaluator in float64; rtol 2e-5 of the cotangent's norm."""
    inputs = [x if x is None or x.dtype.kind != "f" else x.astype("f") for x in case.inputs]
    attrs = {name: in_float32(value) for name, value in case.attrs.items()}
    single = cotangents_of(case.op, inputs, attrs, outputs=case.outputs, executor="onnxruntime")
    double = cotangents_of(case.op, case.inputs, case.attrs, outputs=case.outputs, executor="reference")
    assert single.keys() == double.keys()
    for index, expected in double.items():
        assert single[index].dtype == np.float32
        difference = np.linalg.norm(single[index].astype("d") - expected)
        assert difference <= 2e-5 * max(float(np.linalg.norm(expected)), 1e-3), index
