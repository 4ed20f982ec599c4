"""VJP rules of products of matrices and tensors, against central differences."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.vjp.cases import Case, both, check, label
from tests.vjp.single import check_float32
from zilc.testing import op_model, run, vjp_model

_rng = np.random.default_rng(7)


def r(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape)


CASES = [
    # MatMul: all pairs of ranks, batch broadcasting both ways
    *(
        Case("MatMul", [r(*a), r(*b)], operands=[0, 1])
        for a, b in [
            ((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((2, 1, 3, 4), (5, 4, 2)), ((4,), (4,)),
            ((4,), (4, 5)), ((3, 4), (4,)), ((2, 3, 4), (4,)), ((4,), (2, 4, 5)), ((4,), (3, 2, 4, 5)),
            ((1, 3, 4), (6, 4, 2)), ((6, 3, 4), (1, 4, 2)), ((3, 4), (2, 4, 5)), ((2, 2, 3, 4), (4,)),
            ((1, 1), (1, 1)), ((2, 3, 1, 4), (1, 1, 4, 2)),
        ]
    ),
    # numpy cannot flatten what is empty
    Case("MatMul", [r(2, 3, 0), r(0, 5)], operands=[0, 1], executor="onnxruntime"),
    Case("MatMul", [r(0, 3, 4), r(4, 2)], operands=[0, 1], executor="onnxruntime"),
    # Gemm: bias absent, scalar, row, column, matrix; factors; transposes
    *(
        Case(
            "Gemm",
            [r(*((4, 3) if ta else (3, 4))), r(*((5, 4) if tb else (4, 5))), c],
            {"transA": ta, "transB": tb, "alpha": 0.5, "beta": -2.0},
            label=f"t{ta}{tb}",
        )
        for ta in (0, 1)
        for tb in (0, 1)
        for c in (None, r(3, 5))
    ),
    *(
        Case("Gemm", [r(3, 4), r(4, 5), r(*c)], operands=[0, 1, 2])
        for c in [(), (1,), (5,), (1, 5), (3, 1), (3, 5), (1, 1)]
    ),
    # Einsum
    *(
        Case("Einsum", [r(*s) for s in shapes], {"equation": equation}, operands=range(len(shapes)), label=equation)
        for equation, shapes in [
            ("ij,jk->ik", [(2, 3), (3, 4)]), ("ij,jk", [(2, 3), (3, 4)]), ("ij->ji", [(2, 3)]), ("ij->", [(2, 3)]),
            ("ij->i", [(2, 3)]), ("ii->i", [(3, 3)]), ("ii", [(3, 3)]), ("iij->j", [(3, 3, 2)]),
            ("iji->ij", [(3, 2, 3)]),
            ("i,j->ij", [(2,), (3,)]), ("i,i", [(3,), (3,)]), ("bij,bjk->bik", [(2, 3, 4), (2, 4, 2)]),
            ("bid,bjd->bij", [(2, 3, 4), (2, 5, 4)]), ("...ij,...jk->...ik", [(2, 3, 2, 4), (1, 3, 4, 2)]),
            ("...ij,jk", [(2, 3, 4), (4, 2)]), ("...i->...", [(2, 3, 4)]), ("ij,jk,kl->il", [(2, 3), (3, 2), (2, 4)]),
            ("ij,kj->i", [(2, 3), (4, 3)]), ("...,...->...", [(2, 3), (1, 3)]), ("b...,b->b...", [(2, 3, 4), (2,)]),
            ("bnqd , bnkd -> bnqk", [(2, 2, 3, 4), (2, 2, 5, 4)]), ("iii->i", [(2, 2, 2)]), ("ba", [(2, 3)]),
            ("...ij->...ji", [(2, 3)]), ("ij,k->j", [(2, 3), (4,)]),
        ]
    ),
    Case("Einsum", [r(1, 3), r(4, 3)], {"equation": "ij,ij->j"}, symbolic=False, label="size 1 summed"),
    Case("Einsum", [r(2, 1, 3), r(1, 4, 3)], {"equation": "...i,...i->..."}, label="ellipsis of size 1"),
    # Det: cofactors exist for singular matrices
    Case("Det", [r(3, 3)], symbolic=False),
    Case("Det", [r(2, 1, 4, 4)], symbolic=False),
    Case("Det", [r(5, 2, 2)], symbolic=False),
    Case("Det", [r(5, 1, 1)], symbolic=False),
    Case("Det", [np.outer([1.0, 2, 3], [1.0, -1, 2]) + np.diag([1.0, 0, 0])], symbolic=False, label="singular"),
    *(
        # the reference computes it in float32
        Case("AffineGrid", [r(2, n, n + 1), np.asarray(size)], {"align_corners": a}, opset=20, constant=c,
             symbolic=bool(c), executor="onnxruntime")
        for n, size in [(2, [2, 3, 4, 5]), (3, [2, 1, 2, 3, 4])]
        for a in (0, 1)
        for c in ([1], [])
        if c or n == 2
    ),
]  # fmt: skip


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_vjp(case: Case, symbolic: bool) -> None:
    check(case, symbolic)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_in_onnxruntime(case: Case) -> None:
    check_float32(case)


def test_weight_gradient_of_a_projection_is_one_gemm() -> None:
    """X [B, S, K] @ W [K, N]: no batched product, no ReduceSum, no Shape."""
    model = vjp_model(op_model("MatMul", [r(2, 3, 4), r(4, 5)]), operands=[1])
    kinds = [n.op_type for n in model.graph.node if n.name.startswith("zilc")]
    assert sorted(kinds) == ["Flatten", "Flatten", "Gemm"]


def test_an_operand_used_twice_has_two_cotangents() -> None:
    """Y = X X: the cotangents of both edges add up to G X^T + X^T G."""
    x, g = r(3, 3), r(3, 3)
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.DOUBLE, [3, 3]) for n in ("x0", "y0")]
    node = onnx.helper.make_node("MatMul", ["x0", "x0"], ["y0"], name="node")
    graph = onnx.helper.make_graph([node], "op", info[:1], info[1:])
    model = vjp_model(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10))
    _, left, right = run(model, {"x0": x, "g0": g})
    np.testing.assert_allclose(left + right, g @ x.T + x.T @ g, rtol=1e-12, atol=1e-13)
