"""Normalizations: central differences in float64, and float32 on onnxruntime, which takes another path."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.vjp.cases import Case, both, check, label
from tests.vjp.single import backward_model, case_id, check_float32, cotangents_of
from zilc.testing import op_model, run

_rng = np.random.default_rng(13)


def _normal(*shape: int) -> np.ndarray:
    return np.asarray(_rng.standard_normal(shape))


def _scale(*shape: int) -> np.ndarray:
    return np.asarray(_rng.uniform(0.4, 1.6, shape))


def _batch(*shape: int, channels: int | None = None, **attrs: float) -> Case:
    c = channels or shape[1]
    inputs = [_normal(*shape), _scale(c), _normal(c), _normal(c), _scale(c)]
    return Case("BatchNormalization", inputs, attrs, operands=[0, 1, 2], label=f" {attrs}")


_BATCH = [
    _batch(2, 3, 4, 5),
    _batch(2, 3, 4, 5, epsilon=0.1),
    _batch(4, 3),
    _batch(2, 3, 4),
    _batch(1, 2, 2, 2, 2),
]


def _layer(
    shape: tuple[int, ...], scale: tuple[int, ...], bias: tuple[int, ...] | None, **attrs: float
) -> Case:
    inputs = [_normal(*shape), _scale(*scale)] + ([_normal(*bias)] if bias is not None else [])
    return Case("LayerNormalization", inputs, attrs, operands=list(range(len(inputs))), label=f" {attrs}")


_LAYER = [
    _layer((2, 3, 5), (5,), (5,)),
    _layer((2, 3, 5), (5,), None),
    _layer((2, 3, 5), (3, 5), (3, 5), axis=1),
    _layer((2, 3, 5), (3, 5), (3, 5), axis=-2, epsilon=0.1),
    _layer((2, 3, 5), (2, 3, 5), (2, 3, 5), axis=0),
    _layer((6, 4), (4,), (4,), axis=1),
    _layer((3, 1), (1,), (1,), axis=-1),
    _layer((0, 4), (4,), (4,)),
    *(
        # Mean and InvStdDev are outputs too; onnx types them float32 whatever X is, and so is this case.
        Case(
            "LayerNormalization", [x.astype(np.float32) for x in (_normal(2, 3, 5), _scale(*tail), _normal(*tail))],
            {"axis": axis}, outputs=3, operands=[0, 1, 2], rtol=2e-3, step=1e-2, label=f" {axis} of 3 outputs",
        )
        for axis, tail in ((-1, (5,)), (1, (3, 5)))
    ),
]

_RMS = [
    Case("RMSNormalization", [_normal(*x), _scale(*s)], attrs, opset=23, operands=[0, 1], label=f" {attrs}")
    for x, s, attrs in (
        ((2, 3, 5), (5,), {}),
        ((2, 3, 5), (3, 5), {"axis": 1, "epsilon": 0.1}),
        ((2, 3, 5), (2, 3, 5), {"axis": -3}),
        ((4, 3), (1,), {}),
    )
]

_INSTANCE = [
    Case("InstanceNormalization", [_normal(*x), _scale(x[1]), _normal(x[1])], attrs, opset,
         operands=[0, 1, 2], label=f" {attrs}")
    for x, attrs, opset in (((2, 3, 4, 5), {}, 18), ((2, 3, 6), {"epsilon": 0.1}, 18), ((1, 2, 3, 2), {}, 22))
]  # fmt: skip

#: The statistics are float32 whatever the input is, unless stash_type says otherwise.
_GROUP = [
    Case("GroupNormalization", [_normal(*x), _scale(x[1]), _normal(x[1])],
         {"num_groups": n, "stash_type": onnx.TensorProto.DOUBLE, **attrs}, 21,
         operands=[0, 1, 2], label=f" {n} {attrs}")
    for x, n, attrs in (((2, 4, 3, 3), 2, {}), ((2, 4, 5), 4, {"epsilon": 0.1}), ((2, 4, 3), 1, {}))
]  # fmt: skip

_BARE = [
    *(
        Case("LpNormalization", [_normal(2, 3, 4) + 0.1], {"axis": axis, "p": p}, opset, label=f" {axis} {p}")
        for axis, p, opset in ((-1, 2, 18), (1, 2, 18), (0, 1, 18), (-1, 1, 22))
    ),
    Case("MeanVarianceNormalization", [_normal(2, 3, 4, 5)], {"axes": [0, 2, 3]}),
    Case("MeanVarianceNormalization", [_normal(2, 3, 4)], {"axes": [1, -1]}),
    *(
        Case("LRN", [_normal(2, 6, 3, 2)], {"size": size, **attrs}, label=f" {size} {attrs}")
        for size, attrs in (
            (3, {"alpha": 0.5}),
            (5, {"alpha": 0.5, "beta": 0.5, "bias": 2.0}),
            (4, {"alpha": 0.7, "beta": 0.9}),
            (1, {}),
            (2, {"alpha": 0.5, "beta": 1.0}),
        )
    ),
]

CASES: list[Case] = [*_BATCH, *_LAYER, *_RMS, *_INSTANCE, *_GROUP, *_BARE]


# MeanVarianceNormalization's body holds float32 constants: float64 models of it are not valid.
@pytest.mark.parametrize(
    ("case", "symbolic"), both([c for c in CASES if c.op != "MeanVarianceNormalization"]), ids=label
)
def test_central_differences(case: Case, symbolic: bool) -> None:
    check(case, symbolic)


def _runs_in_float32(case: Case) -> bool:
    """onnxruntime refuses an even window; MeanVarianceNormalization has no float64 to compare with."""
    return case.op != "MeanVarianceNormalization" and not (case.op == "LRN" and case.attrs["size"] % 2 == 0)


@pytest.mark.parametrize("case", [c for c in CASES if _runs_in_float32(c)], ids=case_id)
def test_float32_in_onnxruntime(case: Case) -> None:
    check_float32(case)


def _mean_variance(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return (x - x.mean(axes, keepdims=True)) / (x.std(axes, keepdims=True) + 1e-9)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("case", [c for c in CASES if c.op == "MeanVarianceNormalization"], ids=case_id)
def test_mean_variance_normalization(case: Case, symbolic: bool) -> None:
    """In float32 against central differences of its definition in float64."""
    x = case.inputs[0]
    g, v = _normal(*x.shape), _normal(*x.shape)
    single = [a.astype(np.float32) for a in (x, g)]
    d = cotangents_of(case.op, single[:1], case.attrs, g=single[1], symbolic=symbolic)[0]
    axes = tuple(case.attrs["axes"])
    h = 1e-6
    numeric = np.sum(g * (_mean_variance(x + h * v, axes) - _mean_variance(x - h * v, axes))) / (2 * h)
    assert abs(np.sum(d * v) - numeric) <= 1e-5 * np.linalg.norm(d) * np.linalg.norm(v)


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("symbolic", [False, True])
def test_batch_normalization_in_training_mode(shape: tuple[int, ...], symbolic: bool) -> None:
    """Y by the batch's own statistics; the running ones are state, not a path of the derivative."""
    c = shape[1]
    inputs = [_normal(*shape), _scale(c), _normal(c), _normal(c), _scale(c)]
    attrs = {"training_mode": 1, "epsilon": 0.01}
    forward = op_model("BatchNormalization", inputs, attrs, outputs=3)
    g = _normal(*shape)
    got = cotangents_of(
        "BatchNormalization", inputs, attrs, g=g, outputs=3, symbolic=symbolic, executor="reference"
    )
    assert sorted(got) == [0, 1, 2]
    narrow = [x.astype(np.float32) for x in inputs]
    single = cotangents_of(
        "BatchNormalization", narrow, attrs, g=g.astype(np.float32), outputs=3, symbolic=symbolic
    )
    for k in got:
        assert np.linalg.norm(single[k] - got[k]) <= 1e-5 * np.linalg.norm(got[k])
    for k, d in got.items():
        v = _normal(*inputs[k].shape)
        ends = []
        for h in (1e-6, -1e-6):
            feeds = {f"x{i}": x + h * v if i == k else x for i, x in enumerate(inputs)}
            ends.append(run(forward, feeds)[0])
        numeric = np.sum(g * (ends[0] - ends[1])) / 2e-6
        assert abs(np.sum(d * v) - numeric) <= 1e-7 * np.linalg.norm(d) * np.linalg.norm(v)


def test_running_statistics_get_no_cotangent() -> None:
    case = _BATCH[0]
    model = backward_model(case.op, case.inputs, case.attrs)
    assert [o.name for o in model.graph.output if o.name.startswith("d")] == ["d0", "d1", "d2"]


def test_mixed_dtypes() -> None:
    """BatchNormalization may keep its parameters in a wider type than its input."""
    x = _normal(2, 3, 4).astype(np.float16)
    rest = [v.astype(np.float32) for v in (_scale(3), _normal(3), _normal(3), _scale(3))]
    got = cotangents_of("BatchNormalization", [x, *rest], {}, executor="reference")
    assert [got[k].dtype for k in (0, 1, 2)] == [np.float16, np.float32, np.float32]


@pytest.mark.parametrize(
    ("op", "attrs"), [("LpNormalization", {"p": 2}), ("LpNormalization", {"p": 1})], ids=str
)
def test_zero_norm_gives_zero(op: str, attrs: dict) -> None:
    x = np.asarray([[0.0, 0.0], [3.0, 4.0]], np.float32)
    got = cotangents_of(op, [x], attrs, g=np.asarray([[1.0, 2.0], [1.0, 2.0]], np.float32))[0]
    np.testing.assert_array_equal(got[0], [0, 0])
    assert np.abs(got[1]).max() > 0.01


def test_constant_group_stays_finite() -> None:
    """As the definition has it; onnxruntime's forward kernel divides 0 by 0 there."""
    x = np.ones((2, 2, 2, 2), np.float32)
    got = cotangents_of("MeanVarianceNormalization", [x], {"axes": [0, 2, 3]}, executor="reference")[0]
    np.testing.assert_array_equal(got, np.zeros_like(x))


def test_single_precision_normalizes_in_one_operator() -> None:
    """float32 takes x^ and r from one LayerNormalization, which would round float64's statistics."""

    def operators(dtype: type) -> list[str]:
        inputs = [np.ones((2, 4), dtype), np.ones(4, dtype), np.ones(4, dtype)]
        model: onnx.ModelProto = backward_model("LayerNormalization", inputs, {})
        return [n.op_type for n in model.graph.node]

    assert operators(np.float32).count("LayerNormalization") == 2
    assert operators(np.float64).count("LayerNormalization") == 1


def test_large_mean_keeps_precision() -> None:
    """x^ comes from x - m: a mean of 1000 costs no more digits than x itself lacks."""
    x = (_normal(4, 64) + 1000.0).astype(np.float32)
    scale, bias = np.ones(64, np.float32), np.zeros(64, np.float32)
    g = _normal(4, 64).astype(np.float32)
    single = cotangents_of("LayerNormalization", [x, scale, bias], {}, g=g)
    wide = [v.astype(np.float64) for v in (x, scale, bias)]
    double = cotangents_of("LayerNormalization", wide, {}, g=g.astype(np.float64), executor="reference")
    for k in (0, 1, 2):
        assert np.linalg.norm(single[k] - double[k]) <= 1e-3 * np.linalg.norm(double[k])
