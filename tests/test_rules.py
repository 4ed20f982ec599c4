"""Rules of the user's own: custom domains through the whole loop, replaced rules, and what is said of mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import zilc
from tests.command import Command
from zilc import rules
from zilc.testing import check_vjp
from zilc.vjp.table import TABLE

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "RULES.md").read_text("utf-8")
BLOCKS = dict(re.findall(r"<!-- (\S+) -->\n```python\n(.*?)^```", PAGE, re.S | re.M))

#: Nothing states the types of what the custom operators make.
NETWORK = """<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]>
    g (float[N,4] x) => (float[N,2] y) <float[4,3] w, float[3] b, float[3,2] v>
    {
        h = MatMul(x, w) a = com.microsoft.BiasGelu(h, b)
        q = com.microsoft.QuickGelu<alpha = 1.5>(a) y = MatMul(q, v)
    }"""


@pytest.fixture(name="zilc")
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture(autouse=True)
def taken_back() -> Iterator[None]:
    with rules.scoped():
        yield


@pytest.fixture
def network(tmp_path: Path) -> Path:
    model = onnx.parser.parse_model(NETWORK)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (4, 3)), ("b", (3,)), ("v", (3, 2))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.random(shape, np.float32) - 0.5, name))
    path = tmp_path / "custom.onnx"
    onnx.save(model, path)
    (tmp_path / "my_rules.py").write_text(BLOCKS["my_rules.py"])
    return path


def test_the_page_runs(network: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS["check"]], cwd=network.parent, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def _run(model: onnx.ModelProto, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def test_a_custom_operator_is_trained(network: Path) -> None:
    """Emitted, run, and held against differences of the original, all in ONNX Runtime."""
    rules.load(network.parent / "my_rules.py")
    step = zilc.emit_training(str(network), outputs="grad", wrt=["w", "b", "v"])
    assert {n.domain for n in step.model.graph.node} == {"", "com.microsoft"}
    assert {o.domain for o in step.model.opset_import} == {"", "com.microsoft"}
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
              for i in step.model.graph.value_info}  # fmt: skip
    assert shapes["a"] == shapes["q"] == ["N", 3]
    rng = np.random.default_rng(1)
    x, target = rng.standard_normal((5, 4)).astype("f"), rng.standard_normal((5, 2)).astype("f")
    state = {name: np.asarray(step.state[name]) for name in step.state}
    got = _run(step.model, {"x": x, "target": target, **state})
    original = onnx.load(network)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in original.graph.initializer}
    del original.graph.initializer[:]
    for name, value in held.items():
        original.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape))
    session = onnxruntime.InferenceSession(original.SerializeToString(), providers=["CPUExecutionProvider"])
    for name in ("w", "b", "v"):
        v = rng.standard_normal(held[name].shape)
        ends = []
        for sign in (1, -1):
            moved = {**held, name: (held[name] + sign * 1e-2 * v).astype("f")}
            y = session.run(None, {"x": x, **moved})[0].astype(float)
            ends.append(0.5 * np.sum((y - target) ** 2))
        slope = (ends[0] - ends[1]) / 2e-2
        exact = float(np.sum(got[f"{name}.grad"] * v))
        assert abs(exact - slope) <= 2e-3 * np.linalg.norm(got[f"{name}.grad"]) * np.linalg.norm(v), name


def test_the_command_line_takes_rules(zilc: Command, network: Path) -> None:
    mine = str(network.parent / "my_rules.py")
    refused = zilc("emit-training", str(network))
    assert refused.status == 1
    assert "com.microsoft.BiasGelu" in refused.err
    assert "--rules FILE.py" in refused.err
    for command in ("levelize", "emit-training", "verify"):
        made = zilc(command, str(network), "--rules", mine, "--wrt", "[wbv]", "--json")
        assert (made.status, made.err) == (0, ""), command
    assert [p["name"] for p in made.json["parameters"]] == ["w", "b", "v"]
    assert made.json["passed"]
    assert made.json["executor"]["differences"].endswith("reference evaluator")
    assert zilc("emit-training", str(network)).status == 1, "the rules are gone after the command"


def test_verify_says_what_it_lacks(network: Path) -> None:
    rules.load(network.parent / "my_rules.py")
    rules.operator("QuickGelu", domain="com.microsoft", infer=rules.like(0))
    with pytest.raises(zilc.OptionError, match=r"com.microsoft.QuickGelu: onnxruntime does not run .* compute"):
        zilc.verify(str(network))


def test_operators_with_several_outputs_and_inputs() -> None:
    """FusedMatMul in ONNX Runtime, with attributes and a batch."""

    def left(op: Any, g: Any, y: Any, a: Any, b: Any, *, alpha: float = 1.0, transB: int = 0, **_: Any) -> Any:
        return op.emit("FusedMatMul", g, b, domain="com.microsoft", alpha=alpha, transB=1 - transB)

    def right(op: Any, g: Any, y: Any, a: Any, b: Any, *, alpha: float = 1.0, transB: int = 0, **_: Any) -> Any:
        one, two = (g, a) if transB else (a, g)
        return op.emit("FusedMatMul", one, two, domain="com.microsoft", alpha=alpha, transA=1)

    def infer(a: rules.TensorType, b: rules.TensorType, **attrs: Any) -> rules.TensorType:
        assert a.shape is not None
        assert b.shape is not None
        columns = b.shape[-2 if attrs.get("transB") else -1]
        rows = a.shape[-1 if attrs.get("transA") else -2]
        return rules.TensorType(a.dtype, [*a.shape[:-2], rows, columns])

    rules.defvjp("FusedMatMul", left, right, domain="com.microsoft")
    rules.operator("FusedMatMul", domain="com.microsoft", infer=infer)
    rng = np.random.default_rng(0)
    for trans in (0, 1):
        a, b = rng.random((2, 3, 4), np.float32), rng.random((2, 5, 4) if trans else (2, 4, 5), np.float32)
        check_vjp(
            "FusedMatMul", [a, b], {"alpha": 0.5, "transB": trans}, domain="com.microsoft",
            executor="onnxruntime", step=1e-1, rtol=1e-3,
        )  # fmt: skip


def test_a_wrong_rule_is_found() -> None:
    rules.defvjp("QuickGelu", lambda op, g, y, x, **_: g, domain="com.microsoft")
    with pytest.raises(AssertionError, match="QuickGelu operand 0"):
        check_vjp("QuickGelu", [np.ones((2, 2), np.float32)], domain="com.microsoft",
                  executor="onnxruntime", step=1e-2, rtol=1e-2)  # fmt: skip


def _grad_of(op: str, x: np.ndarray, opset: int = 18) -> np.ndarray:
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[2] x) => (float[2] y) {{ y = {op}(x) }}'
    step = zilc.emit_training(onnx.parser.parse_model(text), wrt=["x"], outputs="grad")
    got = _run(step.model, {"x": x, "target": np.zeros(2, np.float32)})
    return got["x.grad"]


@pytest.mark.parametrize(("op", "opset"), [("Exp", 18), ("Relu", 18), ("Gelu", 20), ("Mish", 18)])
def test_a_rule_takes_the_place_of_ours(op: str, opset: int) -> None:
    """Written rules, and rules derived from function bodies; those within bodies too."""
    x = np.asarray([0.5, 1.0], np.float32)
    before = _grad_of(op, x, opset)
    with rules.scoped():
        rules.defvjp(op, lambda op, g, y, x, **_: op.Mul(g, 2.0), replace=True)
        assert not np.array_equal(_grad_of(op, x, opset), before)
    np.testing.assert_array_equal(_grad_of(op, x, opset), before)
    rules.defvjp(op, lambda op, g, y, x, **_: op.Mul(g, 2.0), replace=True)
    rules.remove(op)
    np.testing.assert_array_equal(_grad_of(op, x, opset), before)


def test_a_replacement_replaces_newer_rules_too() -> None:
    """DFT took its axis as an operand from opset 20 on: a rule from 1 on holds there too, one from 20 there only."""
    assert [r.since for r in TABLE.rules["", "DFT"]] == [20, 1]
    rules.defvjp("DFT", lambda op, g, y, x, *_, **__: g, since=20, replace=True, note="mine")
    assert [(r.since, r.note == "mine") for r in TABLE.rules["", "DFT"]] == [(20, True), (1, False)]
    rules.defvjp("DFT", lambda op, g, y, x, *_, **__: g, replace=True)
    assert [r.since for r in TABLE.rules["", "DFT"]] == [1]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: rules.defvjp("Exp", None), "rule of Exp: zilc has one already. replace=True takes its place"),
        (lambda: rules.defvjp("Gelu", None), "rule of Gelu: zilc has one already"),
        (lambda: rules.defvjp("Foo", None), "rule of Foo: ONNX has no such operator. Name the operator's domain"),
        (lambda: rules.defvjp("Foo", None, domain="a.b", since=2), "rule of a.b.Foo: since counts ONNX's opsets"),
        (lambda: rules.defvjp("Foo", None, domain="a.b", replace=True), "rule of a.b.Foo: there is none to replace"),
        (lambda: rules.operator("Exp", domain="ai.onnx"), "'Exp' of the default domain is ONNX's own"),
    ],
)
def test_what_is_said_of_a_wrong_registration(call: Any, text: str) -> None:
    with pytest.raises(zilc.OptionError) as caught:
        call()
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("import zilc\n1 / 0\n", "line 2: the file of rules fails: ZeroDivisionError: division by zero"),
        ("def f(:\n", "line 1: the file of rules fails: SyntaxError"),
        ("x = 1\n", "registers no rule"),
        (None, "cannot be read"),
    ],
)
def test_what_is_said_of_a_file_that_fails(zilc: Command, network: Path, content: str | None, text: str) -> None:
    path = network.parent / "broken.py"
    if content is not None:
        path.write_text(content)
    made = zilc("levelize", str(network), "--rules", str(path))
    assert made.status == 1
    assert made.out == ""
    assert made.err.count("\n") == 1
    assert "broken.py" in made.err
    assert text in made.err


def test_an_inference_that_fails_is_named(network: Path) -> None:
    rules.load(network.parent / "my_rules.py")
    rules.operator("BiasGelu", domain="com.microsoft", infer=lambda a, b: a.nothing)
    with pytest.raises(zilc.OptionError, match=r"operator com.microsoft.BiasGelu: its infer function fails \(Attr"):
        zilc.emit_training(str(network))
