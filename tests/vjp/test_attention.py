"""VJP rules of Attention and RotaryEmbedding, against central differences."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest

from tests.vjp.cases import Case, both, check, label
from tests.vjp.single import check_float32
from zilc.testing import op_model, run, vjp_model

_rng = np.random.default_rng(3)


def r(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape)


def f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def _qkv(b: int = 2, heads: int = 2, kv: int = 2, s: int = 3, n: int = 4, d: int = 4, dv: int = 3) -> list[np.ndarray]:
    return [r(b, heads, s, d), r(b, kv, n, d), r(b, kv, n, dv)]


def _flat(b: int = 2, heads: int = 2, kv: int = 2, s: int = 3, n: int = 4, d: int = 4, dv: int = 3) -> list[np.ndarray]:
    return [r(b, s, heads * d), r(b, n, kv * d), r(b, n, kv * dv)]


_TWO_HEADS = {"q_num_heads": 2, "kv_num_heads": 2}
_GROUPED = {"q_num_heads": 4, "kv_num_heads": 2}
_BOOLEAN = np.asarray([[True, False, True, True], [True, True, True, True], [False, False, False, True]])
_DEAD_ROW = np.asarray([[True, False, True, True], [False, False, False, False], [False, False, False, True]])
_INFINITE = np.where(_DEAD_ROW, 0.3, -np.inf)
_HUGE = np.where(_BOOLEAN, 0.0, -3e38)

CASES = [
    *(
        case
        for opset in (23, 24, 25)
        for case in (
            Case("Attention", _qkv(), opset=opset, operands=[0, 1, 2]),
            Case("Attention", _qkv(n=3), {"is_causal": 1, "scale": 0.7}, opset=opset, label="causal"),
            # onnx infers a last dimension of 0 for a symbolic hidden size
            Case("Attention", _flat(), _TWO_HEADS, opset=opset, operands=[0, 1, 2], symbolic=False),
            Case("Attention", _flat(heads=4), _GROUPED, opset=opset, symbolic=False, label="grouped"),
            Case("Attention", _qkv(heads=6), {"softcap": 1.5}, opset=opset, label="grouped softcap"),
            Case("Attention", _qkv(heads=3, kv=1), {"is_causal": 1}, opset=opset, label="one key head"),
            Case("Attention", [*_qkv(), r(3, 4)], opset=opset, operands=[0, 1, 2, 3], label="bias"),
            Case("Attention", [*_qkv(), r(2, 1, 3, 4)], {"softcap": 2.0}, opset=opset, operands=[0, 1, 2, 3]),
            Case("Attention", [*_qkv(), r(1, 4)], opset=opset, operands=[0, 1, 2, 3], label="bias row"),
            Case("Attention", [*_qkv(), _BOOLEAN], opset=opset, label="boolean"),
            Case("Attention", [*_qkv(), _BOOLEAN], {"is_causal": 1}, opset=opset, label="boolean causal"),
            Case("Attention", [*_qkv(), _DEAD_ROW], opset=opset, label="query without keys"),
            Case("Attention", [*_qkv(), _INFINITE], opset=opset, operands=[0, 1, 2], label="-inf"),
            Case("Attention", [*_qkv(), _HUGE], opset=opset, operands=[0, 1, 2], label="-3e38"),
            Case("Attention", [*_qkv(n=5), r(3, 4)], opset=opset, operands=[0, 1, 2, 3], label="short bias"),
            Case("Attention", [*_qkv(n=5), _BOOLEAN], opset=opset, operands=[0, 1, 2], label="short boolean"),
            Case("Attention", [*_qkv(), None, r(2, 2, 2, 4), r(2, 2, 2, 3)], {"is_causal": 1}, opset=opset, outputs=3,
                 operands=[0, 1, 2, 4, 5], symbolic=False, label="past"),
            Case("Attention", [*_flat(heads=4), r(3, 6), r(2, 2, 2, 4), r(2, 2, 2, 3)],
                 _GROUPED, opset=opset, outputs=3, operands=range(6), symbolic=False, label="past grouped"),
            Case("Attention", _qkv(), {"softmax_precision": 11}, opset=opset, label="softmax_precision"),
            # The reference caps the output of mode 0 too, against the specification; symbols are not inferred.
            *(
                Case("Attention", [*_qkv(heads=4), r(3, 4), r(2, 2, 0, 4), r(2, 2, 0, 3)],
                     {"qk_matmul_output_mode": mode, "softcap": 1.2 if mode else 0.0}, opset=opset, outputs=4,
                     operands=[0, 1, 2, 3], symbolic=False, label=f"mode {mode}")
                for mode in range(4)
                if opset == 25 or mode in (0, 3)
            ),
        )
    ),
    *(
        Case("Attention", [*_qkv(), None, None, None, np.asarray([4, 2])], {"is_causal": c}, opset=o,
             label=f"nonpad{c}")
        for o in (24, 25)
        for c in (0, 1)
    ),
    *(
        Case("Attention", _qkv(s=4), {"left_window_size": a, "right_window_size": b, "is_causal": c}, opset=25,
             label=f"window {a},{b},{c}")
        for a, b, c in [(1, -1, 0), (-1, 1, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0)]
    ),
    *(
        Case("RotaryEmbedding", [f32(x), f32(r(*cache)), f32(r(*cache)), p], {"interleaved": i, **attrs}, opset=23,
             operands=[0, 1, 2], rtol=1e-5, step=0.5, label=f"{i}{attrs}")  # linear in each, float32 at most
        for i in (0, 1)
        for x, cache, p, attrs in [
            (r(2, 2, 3, 4), (5, 2), np.asarray([[0, 1, 4], [2, 2, 3]]), {}),
            (r(2, 2, 3, 4), (2, 3, 2), None, {}),
            (r(2, 3, 8), (5, 2), np.asarray([[0, 1, 4], [2, 2, 3]]), {"num_heads": 2}),
            (r(2, 3, 12), (2, 3, 2), None, {"num_heads": 2, "rotary_embedding_dim": 4}),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("case", "symbolic"), both(CASES), ids=label)
def test_vjp(case: Case, symbolic: bool) -> None:
    check(case, symbolic)


#: What onnxruntime's own kernel of the forward operator does not take.
_NOT_IN_ONNXRUNTIME = ("window", "short", "bias row", "softmax_precision")


@pytest.mark.parametrize("case", [c for c in CASES if not c.label.startswith(_NOT_IN_ONNXRUNTIME)], ids=str)
def test_float32_in_onnxruntime(case: Case) -> None:
    if case.op == "RotaryEmbedding":  # there is no float64 to compare with
        check(dataclasses.replace(case, executor="onnxruntime"), symbolic=True)
    else:
        check_float32(case)


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_hidden_sizes_known_and_the_rest_symbolic(past: bool, mask: bool) -> None:
    """The way exporters write it.  The same numbers as with static shapes."""
    inputs: list[np.ndarray | None] = list(_flat(heads=4))
    total = 4 + 2 * past
    inputs.append(r(3, total) if mask else None)
    inputs += [r(2, 2, 2, 4), r(2, 2, 2, 3)] if past else []
    attrs = {"q_num_heads": 4, "kv_num_heads": 2, "is_causal": 1}
    static = op_model("Attention", inputs, attrs, opset=23, outputs=3 if past else 1)
    symbolic = onnx.ModelProto()
    symbolic.CopyFrom(static)
    del symbolic.graph.value_info[:]
    names = {"x0": "bs_", "x1": "bn_", "x2": "bn_", "x3": "st", "x4": "b_p_", "x5": "b_p_"}
    names |= {"y0": "bs_", "y1": "b_t_", "y2": "b_t_"}
    for value in (*symbolic.graph.input, *symbolic.graph.output):
        for dim, name in zip(value.type.tensor_type.shape.dim, names[value.name], strict=True):
            if name != "_":
                dim.dim_param = name
    feeds = {f"x{k}": x for k, x in enumerate(inputs) if x is not None}
    feeds |= {"g0": r(2, 3, 12), **({"g1": r(2, 2, 6, 4), "g2": r(2, 2, 6, 3)} if past else {})}
    for expected, got in zip(run(vjp_model(static), feeds), run(vjp_model(symbolic), feeds), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
