"""tools/cuda_check.py, with the CPU provider in CUDA's place: what is found, what is survived, and the page."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from tools import cuda_check as tool
from zilc.providers import CPU

CASES = tool.all_cases()
#: The case that takes its process with it, and the one without an end.
FATAL, ENDLESS = 3, 5


def fragile(case: Any, symbolic: bool, providers: Any) -> tool.Verdict:
    """Right, but for two cases; the worker processes import it from here."""
    here = next(n for n, (known, how) in enumerate(CASES) if known is case and how == symbolic)
    if here == FATAL:
        os._exit(7)
    if here == ENDLESS:
        time.sleep(600)
    return tool.Verdict(str(case), case.op, case.opset, symbolic, "right", difference=0.0)


def first(op: str, symbolic: bool = False, label: str = "") -> tuple[Any, bool]:
    """The first case of an operator."""
    return next(c for c in CASES if c[0].op == op and c[1] == symbolic and label in c[0].label)


# -- one case --


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("op", ["Softmax", "Conv", "Gather", "Scan", "Gelu", "MaxPool"])
def test_a_case_is_right_on_the_cpu(op: str, symbolic: bool) -> None:
    found = tool.examine(*first(op, symbolic), [CPU])
    assert (found.status, found.note, found.cpu_only) == ("right", "", True)
    assert found.difference is not None
    assert found.difference <= 1e-5
    assert found.emitted


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda y: y * (1 + 1e-3), "differs"),
        (lambda y: y * (1 + 1e-6), "right"),
        (lambda y: y + np.float32(np.nan), "differs"),
        (lambda y: y[..., :0], "differs"),
        (lambda y: y.astype(np.float64), "differs"),
    ],
)
def test_a_wrong_output_is_found(change: Any, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run is the device's."""
    run, count = tool.run_on, [0]

    def changed(session: Any, feeds: Any) -> dict[str, np.ndarray]:
        count[0] += 1
        got = run(session, feeds)
        return got if count[0] == 1 else {**got, "d0": np.asarray(change(got["d0"]))}

    monkeypatch.setattr(tool, "run_on", changed)
    found = tool.examine(*first("Softmax"), [CPU])
    assert (found.status, count) == (status, [2])
    assert found.note.startswith("d0 by ") == (status == "differs")


def test_differences_are_relative_to_the_largest() -> None:
    expected = np.asarray([1e-6, -100.0])
    assert tool.difference(expected + np.asarray([0.5, 0.0]), expected) == pytest.approx(5e-3)
    assert tool.difference(np.asarray([0.25]), np.zeros(1)) == 0.25  # of nothing: itself
    strange = np.asarray([np.nan, np.inf, 2.0])
    assert tool.difference(strange.copy(), strange) == 0
    assert tool.difference(np.asarray([np.nan, -np.inf, 2.0]), strange) == np.inf
    assert tool.difference(np.asarray([np.nan, np.inf, np.nan]), strange) == np.inf
    assert tool.difference(np.zeros((0, 2)), np.zeros((0, 2))) == 0
    # What counts is equal or not.
    assert tool.hold({"y0": np.asarray([1000001])}, {"y0": np.asarray([1000000])})[1]
    assert not tool.hold({"y0": np.asarray([True])}, {"y0": np.asarray([True])})[1]


def test_what_is_drawn_is_not_compared() -> None:
    assert tool.examine(*first("Dropout", label="training"), [CPU]).status == "random"
    assert tool.examine(*first("Dropout"), [CPU]).status == "right"


def test_errors_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    case, make = first("Softmax"), tool.session_of

    def refusing(text: str, plain: bool) -> Any:
        def made(model: Any, providers: Any, **how: Any) -> Any:
            if how.get("plain", False) == plain:
                raise RuntimeError(text)
            return make(model, providers, **how)

        return made

    said = "NOT_IMPLEMENTED : Could not find an implementation for Det(11) node"
    lacking = f"[ONNXRuntimeError] : 9 : {said} with name 'x'"
    for text, plain, status, note in (
        (lacking, False, "no kernel", "Det(11)"),
        (lacking, True, "no CPU", said),
        ("\n out of memory\nmore", False, "fails", "out of memory"),
    ):
        monkeypatch.setattr(tool, "session_of", refusing(text, plain))
        found = tool.examine(*case, [CPU])
        assert (found.status, found.note) == (status, note)


def test_of_an_error_what_says_something_is_kept() -> None:
    text = (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Conv node. Name:'zilc/Conv_1' "
        "Status Message: /onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:129 std::conditional_t<X> "
        "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=here ; file=a.cc ; line=3"
    )
    assert tool.first_line(RuntimeError(text)) == (
        "Conv: CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; file=a.cc ; line=3"
    )
    assert len(tool.first_line(RuntimeError("x" * 9000))) < 300
    assert tool.first_line(KeyError()) == "KeyError"


def test_nodes_on_the_cpu_by_whose_they_are() -> None:
    """What shapes alone decide belongs there; a function's body, written out, is the function's."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[N] x, float[M] g0) => (float[N] y0, float[K] d0) <int64[1] two = {2}> {
            y0 = Mish(x)
            shape = Shape(x)
            twice = Mul(shape, two)
            e = Expand(g0, twice)
            d0 = Neg(e)
        }"""
    )
    for node, name in zip(model.graph.node, ("node", "zilc/Shape", "zilc/Mul", "zilc/Expand", "d0"), strict=True):
        node.name = name
    assert tool.shape_nodes(model.graph) == {"zilc/Shape", "zilc/Mul"}
    session = tool.session_of(model, [CPU], plain=True)
    assert tool.placed(session, model) == (["Expand", "Neg"], ["Mul", "Softplus", "Tanh"], 2, True)


# -- all cases --


def test_cases_run_in_processes() -> None:
    numbers = [n for n, (case, _) in enumerate(CASES) if case.op in ("Relu", "Transpose")]
    told: list[tool.Verdict] = []
    found, stopped = tool.check(CASES, numbers, device="cpu", processes=2, progress=told.append)
    assert [(v.case, v.symbolic) for v in found] == [(str(CASES[n][0]), CASES[n][1]) for n in numbers]
    assert {v.status for v in found} == {"right"}
    assert (stopped, len(told)) == ("", len(numbers))


def test_a_crash_and_a_case_without_end_are_survived() -> None:
    found, stopped = tool.check(CASES, range(10), device="cpu", processes=2, case_limit=3.0, judge=fragile)
    assert [v.case for v in found] == [str(case) for case, _ in CASES[:10]]
    assert {n: v.note for n, v in enumerate(found) if v.status != "right"} == {
        FATAL: "crashes: the process died (7)",
        ENDLESS: "takes more than 3 s",
    }
    assert (stopped, found[FATAL].status, found[ENDLESS].status) == ("", "fails", "fails")


def test_a_limit_leaves_the_rest() -> None:
    found, stopped = tool.check(CASES, range(50), device="cpu", processes=1, limit=0.5)
    assert len(found) < 50
    assert stopped == "the limit of 0 s"


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from zilc.providers import has_gpu

    if has_gpu():
        pytest.skip("there is one")
    assert tool.main(["--only", "Relu", "--processes", "1"]) == 1
    assert "no case ran: a process does not start: --device cuda: CUDA cannot be had" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_broken_device_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tool.still_runs([CPU])
    monkeypatch.setattr(tool, "run_on", lambda session, feeds: 1 / 0)
    assert not tool.still_runs([CPU])


# -- the page --


def made(*verdicts: tool.Verdict, **more: Any) -> dict[str, Any]:
    """What a measurement gives."""
    return {
        "facts": {"date": "2026-01-02", "machine": "a processor (16 cores)", "GPU": "a card", "onnxruntime": "1.31.1"},
        "device": "cuda", "cases": len(verdicts), "stopped": "", "seconds": 50.0,
        "verdicts": [dataclasses.asdict(v) for v in verdicts], **more,
    }  # fmt: skip


def det(status: Any, note: str = "", **more: Any) -> tool.Verdict:
    return tool.Verdict("Det[2x2]", "Det", 18, False, status, note, **more)


def test_the_page_of_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "made.json"
    results = made(
        det("right", difference=2e-7, emitted=["DFT", "Neg"], own=["Det"]),
        det("right", difference=3e-6, host=4),
        det("differs", "d0 by 1.0e-02 of 3", difference=1e-2),
        det("no kernel", "Det(11)"),
        *[det("fails", f"error {n}") for n in (1, 1, 2, 3, 4)],
        tool.Verdict("Abs[2]", "Abs", 13, True, "right", difference=0.0),
        cases=12, stopped="the limit of 60 s",
    )  # fmt: skip
    file.write_text(tool.dump(results), encoding="utf-8")
    assert json.loads(file.read_text()) == results
    monkeypatch.setattr(tool, "MARKDOWN", tmp_path / "page.md")
    monkeypatch.setattr(tool, "JSON", tmp_path / "page.json")
    assert tool.main(["--from-json", str(file), "--write"]) == 0
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page == tool.markdown(json.loads((tmp_path / "page.json").read_text(encoding="utf-8")))
    assert "| Det | 9 | 2 | 1 | 1 | 5 |  |  | 1 | 1 | 3.0e-06 |" in page
    assert "| Abs | 1 | 1 |  |  |  |  |  |  |  | 0.0e+00 |" in page
    assert "| **all** | 10 | 3 | 1 | 1 | 5 |" in page
    assert "| Det | 2 × fails: error 1; 1 × differs: d0 by 1.0e-02 of 3; 1 × fails: error 2; 3 more |" in page
    assert "| Det | 1 × DFT; 1 × Neg |" in page
    assert "2 of 12 cases were not reached" in page
    assert "2026-01-02, machine a processor (16 cores), GPU a card, onnxruntime 1.31.1." in page
    assert "10 cases in 50 s, 2 not reached: the limit of 60 s" in capsys.readouterr().out


def test_measured_in_one_go(tmp_path: Path) -> None:
    file = tmp_path / "made.json"
    assert tool.main(["--device", "cpu", "--only", "Selu", "--processes", "1", "--json", str(file)]) == 0
    results = json.loads(file.read_text(encoding="utf-8"))
    assert {v["status"] for v in results["verdicts"]} == {"right"}
    assert results["cases"] == len(results["verdicts"]) > 0
    assert tool.markdown(tool.summary(results)).startswith("# CPU, run")
    assert tool.main(["--device", "cpu", "--only", "Nothing"]) == 1
