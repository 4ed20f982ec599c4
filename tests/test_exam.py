"""The exam itself: a sample of it, what it must catch, and the whole of it among the long tests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tools import exam, exam_cases, exam_trial, rivals
from zilc.vjp import table

#: One case or two of every kind that the exam treats in its own way.
SAMPLE = [
    "test_gemm_all_attributes", "test_relu", "test_clip_default_inbounds", "test_maxpool_2d_ceil",
    "test_softmax_large_number",
    "test_layer_normalization_2d_axis1", "test_cast_FLOAT_to_FLOAT16", "test_castlike_BFLOAT16_to_FLOAT",
    "test_resize_upsample_sizes_nearest_not_larger", "test_reduce_max_negative_axes_keepdims_random", "test_floor",
    "test_dft_inverse", "test_roialign_mode_max", "test_split_to_sequence_2", "test_sequence_map_add_2_sequences",
    "test_causal_conv_with_state_silu", "test_attention_4d_gqa_causal_expanded", "test_dequantizelinear_blocked",
    "test_rotary_embedding_interleaved", "test_reduce_log_sum_empty_set", "test_adagrad",
    "test_nesterov_momentum", "test_adam", "test_affine_grid_2d_expanded", "test_loop16_seq_none",
    "test_ai_onnx_ml_array_feature_extractor",
]  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    return exam_cases.load_cases()


def test_there_are_as_many_as_onnx_says(cases: dict[str, Any]) -> None:
    assert len(cases) >= 1800


@pytest.mark.parametrize("name", SAMPLE)
def test_right(cases: dict[str, Any], name: str) -> None:
    verdict = exam_trial.examine(cases[name], "")
    assert (verdict.status, verdict.reason) == ("right", "")
    assert verdict.runtime in ("", "runs", exam_trial.NO_KERNEL, exam_trial.OTHERWISE)


def test_the_derivative_of_floor_is_zero(cases: dict[str, Any]) -> None:
    assert exam_trial.examine(cases["test_floor"], "").zero


def _with_rule(monkeypatch: pytest.MonkeyPatch, rule: table.Rule) -> None:
    monkeypatch.setitem(table.TABLE.rules, ("", rule.op), [rule])


def test_a_wrong_rule_is_found(cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    slightly = table.Rule("Exp", "", 1, (lambda op, g, y, x: op.Mul(op.Mul(g, y), 1.0 + 1e-4),))
    _with_rule(monkeypatch, slightly)
    verdict = exam_trial.examine(cases["test_exp"], "Exp")
    assert verdict.status == "wrong"
    assert verdict.error is not None
    assert exam_trial.TOLERANCE["float64"] < verdict.error < 1.1e-4


def test_a_gradient_that_is_denied_is_found(cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _with_rule(monkeypatch, table.Rule("Exp", "", 1))
    verdict = exam_trial.examine(cases["test_exp"], "Exp")
    assert verdict.status == "wrong"
    assert "no gradient flows, and the output moves" in verdict.reason


def test_a_missing_rule_is_refused(cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(table.TABLE.rules, ("", "Exp"))
    verdict = exam_trial.examine(cases["test_exp"], "Exp")
    assert verdict.status == "refused"
    assert "no VJP rule" in verdict.reason


def test_a_float32_graph_that_onnxruntime_lacks_is_found(
    cases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule may be right in float64 and have no kernel in float32."""

    def formula(op: Any, g: Any, y: Any, x: Any) -> Any:
        return op.Mul(g, y if op.dtype(x) == np.float64 else op.Cast(op.Exp(op.Cast(x, to=16)), to=1))

    _with_rule(monkeypatch, table.Rule("Exp", "", 1, (formula,)))
    verdict = exam_trial.examine(cases["test_exp"], "Exp")
    assert verdict.status == "wrong"
    assert verdict.reason.startswith("in onnxruntime")


def _model(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("g (float[2] x) => (float[2] y) { y = Floor(x) }", ""),
        ("g (int64[2] x) => (float[2] y) { y = Cast<to = 1>(x) }", "no floating input"),
        ("g (float[2] x) => (bool[2] y) { y = IsNaN(x) }", "no floating output"),
        (
            "g (float[2] x) => (float[2] y) { i = Cast<to = 7>(x) y = Cast<to = 1>(i) }",
            "integers or booleans lie on every path",
        ),
        ("g (float[2] x) => (float[2] y) { y = Bernoulli(x) }", "the output is drawn at random"),
    ],
)
def test_floating_path(text: str, expected: str) -> None:
    assert exam_cases.floating_path(_model(text)) == expected


def test_inputs_are_moved_off_ties() -> None:
    x = np.asarray([0.0, 1.0, 1.0, -np.inf, 0.001, 3.0])
    moved = exam_cases.moved(x, np.random.default_rng(0), 0.02)
    assert len(set(moved)) == len(x)
    assert moved[3] == -np.inf
    assert moved[4] > 0
    assert (np.abs(moved - x)[np.isfinite(x)] <= 0.02).all()


def test_cases_are_handed_to_processes(cases: dict[str, Any]) -> None:
    names = ["test_exp", "test_sigmoid"]
    verdicts = exam.sit(names, exam_cases.operators_of(cases), processes=1, limit=60.0)
    assert [(v.case, v.operator, v.status) for v in verdicts] == [
        ("test_exp", "Exp", "right"), ("test_sigmoid", "Sigmoid", "right")
    ]  # fmt: skip
    count = exam.totals(verdicts)
    assert count["right"] == count["examined"] == count["node tests"] == 2
    page = exam.markdown(verdicts)
    assert "| Exp | rule | 1 | 1 | 0 | 1 | 0 |  |" in page


def test_the_page_has_a_column_for_other_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: dict[str, Any] = {
        name: {"operator": op, "some-tool": {"status": status, "reason": reason}}
        for name, op, status, reason in (
            ("a", "Exp", "right", ""), ("b", "Exp", "wrong", "x: error 1"), ("c", "Exp", "refused", "no"),
            ("d", "Log", "right", ""),
        )
    }  # fmt: skip
    monkeypatch.setattr(rivals.Rival, "versions", lambda self: {self.name: "1.0"})
    monkeypatch.setitem(rivals.RIVALS, "some-tool", (".venv-none", ("some-tool",)))
    path = tmp_path / "rivals.json"
    path.write_text(rivals.dumps(rivals.report(cases, ["some-tool"], 4)), "utf-8")
    assert rivals.load(path) == cases
    versions, counts = exam.rivals_of(path)
    assert versions == {"some-tool": "some-tool 1.0"}
    assert exam._rival_cell(counts["some-tool"], "Exp") == "1 of 3, 1 wrong"
    assert exam._rival_cell(counts["some-tool"], "Log") == "1 of 1"
    assert exam._rival_cell(counts["some-tool"], "Abs") == ""
    assert "| some-tool 1.0 | 2 | 1 | 1 |" in exam._rival_lines(versions, counts)


def test_messages_to_other_tools() -> None:
    """What a tool prints between two answers is not taken for one."""
    stream = io.BytesIO()
    arrays = {"g:x/y": np.arange(3.0), "model": np.frombuffer(b"abc", np.uint8)}
    rivals.send(stream, {"inputs": ["x"]}, arrays)
    stream.seek(0)
    facts, got = rivals.receive(stream)
    assert facts == {"inputs": ["x"]}
    assert list(got) == list(arrays)
    np.testing.assert_array_equal(got["g:x/y"], arrays["g:x/y"])
    with pytest.raises(EOFError):
        rivals.receive(io.BytesIO(b"warning: a line that its C++ part prints\n" + stream.getvalue()))


def test_the_page_is_of_the_tools_that_the_file_holds() -> None:
    page = (exam.ROOT / "docs" / "OPERATORS.md").read_text("utf-8")
    for line in exam._rival_lines(*exam.rivals_of()):
        assert line in page


@pytest.mark.long
def test_the_whole_exam(cases: dict[str, Any]) -> None:
    verdicts = exam.sit(list(cases), exam_cases.operators_of(cases))
    inside = [v for v in verdicts if not exam.no_path(v)]
    assert {v.case: v.reason for v in inside if v.status in ("wrong", "refused")} == {}
    unexamined = sum(v.status == "unexamined" for v in inside)
    assert unexamined <= 0.02 * len(inside)
