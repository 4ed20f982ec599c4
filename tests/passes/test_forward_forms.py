"""Convolutions of the forward part in another form: which, and what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import pytest

import zilc
from tests.graphs import model
from zilc import lowerings
from zilc.executors import executor
from zilc.lowerings import Lowerings

#: A Conv that is an output too and has two readers, one whose weight is frozen, one that no form suits.
NET = """
<ir_version: 10, opset_import: ["" : 18]>
net (float[N,2,6,6] x) => (float[N,3,6,6] a, float[N,2,3,3] y)
<float[3,2,3,3] u, float[3] b, float[3,3,3,3] v, float[2,3,3,3] w> {
  [first] a = Conv<pads = [1, 1, 1, 1]>(x, u, b)
  c = Tanh(a)
  d = Add(a, c)
  [second] e = Conv<pads = [1, 1, 1, 1]>(d, v)
  [third] y = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(e, w)
}
"""


@pytest.fixture
def net() -> onnx.ModelProto:
    made = model(NET)
    for node in made.graph.node:
        for key, value in {"namespace": "theirs", "prefix": "p", "self": "s"}.items():
            node.metadata_props.add(key=key, value=value)
    return made


def _facts(node: onnx.NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def _feeds(batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": (batch, 2, 6, 6), "target": (batch, 2, 3, 3)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def _run(step: zilc.TrainingStep, batch: int) -> dict[str, np.ndarray]:
    trainer = zilc.Trainer(step, lr=0.1, providers=["CPUExecutionProvider"])
    loss = trainer.step(_feeds(batch))
    return {"loss": np.asarray(loss), **trainer.last, **trainer.state}


def test_values_stay(net: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zilc.passes.forward_forms.value_lowerings", lambda *_: {})
        plain = zilc.emit_training(net, output="y", freeze="v")
    monkeypatch.setattr(Lowerings, "choose", lambda self, op, kind, site, operands, candidates: (
        "winograd" if kind == "Conv" else next(iter(candidates)), "fitted"))  # fmt: skip
    step = zilc.emit_training(net, output="y", freeze="v")
    assert [o.name for o in step.model.graph.output] == [o.name for o in plain.model.graph.output]
    expected, got = _run(plain, 4), _run(step, 4)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5)


def test_which_are_replaced(net: onnx.ModelProto, forced: None) -> None:
    step = zilc.emit_training(net, output="y", freeze="v")
    assert step.report["lowerings"]["taken"]["Conv"] == {"winograd": 1}
    forward = [node for node in step.model.graph.node if _facts(node).get("zilc.role") == "forward"]
    assert [node.name for node in forward if node.op_type == "Conv" and "/" not in node.name] == ["second", "third"]
    replaced = [_facts(node) for node in forward if node.name.startswith("first/")]
    assert len(replaced) > 3
    level = {facts["zilc.level"] for facts in replaced}
    assert len(level) == 1
    for facts in replaced:
        assert facts["zilc.vertex"] == "first"
        assert facts["zilc.lowering"] == "Conv: winograd"
        # What others wrote stays as they wrote it.
        assert (facts["namespace"], facts["prefix"], facts["self"]) == ("theirs", "p", "s")


def test_one_that_stays_says_so(net: onnx.ModelProto) -> None:
    """So small a layer is fastest as it stands."""
    step = zilc.emit_training(net, output="y", freeze="v")
    assert step.report["lowerings"]["taken"]["Conv"] == {"conv": 1}
    facts = next(_facts(node) for node in step.model.graph.node if node.name == "first")
    assert facts["zilc.lowering"] == "Conv: conv"


@pytest.mark.parametrize("algorithm", ["zil", "bp"])
def test_the_literal_dynamics_are_equal_to_the_bit(net: onnx.ModelProto, forced: None, algorithm: str) -> None:
    gradients = []
    feeds = _feeds(3)
    for options in ({"schedule": "literal"}, {"algorithm": algorithm}):
        step = zilc.emit_training(net, output="y", outputs="grad", **options)  # type: ignore[arg-type]
        found = executor(step.model)({**feeds, **{name: step.state[name] for name in step.state}})
        gradients.append({p["name"]: found[p["grad"]] for p in step.signature["parameters"]})
        assert step.report["lowerings"]["taken"]["Conv.image"] == {"winograd": 1}
        assert step.report["lowerings"]["taken"]["Conv.weight"] == {"winograd": 2}
    assert [n for n in gradients[0] if gradients[0][n].tobytes() != gradients[1][n].tobytes()] == []


def test_the_literal_dynamics_take_what_was_measured_too(
    net: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Though inference does not tell the sizes of errors in a Loop."""
    monkeypatch.setattr(lowerings, "measure", lambda op, operands, candidates, *_, **__: {
        name: float(len(candidates) - k) for k, name in enumerate(candidates)})  # fmt: skip
    taken = []
    for options in ({"schedule": "literal"}, {"algorithm": "bp"}):
        step = zilc.emit_training(net, output="y", tune=tmp_path / "times.json", **options)  # type: ignore[arg-type]
        taken.append(step.report["lowerings"]["taken"])
    assert taken[0] == taken[1]
    assert taken[0]["Conv.image"] == {"winograd": 1}
    assert taken[0]["Conv.image, strided"] == {"conv": 1}


def test_within_a_memory_budget(net: onnx.ModelProto, forced: None) -> None:
    """Predictions that are computed again have the same bits."""
    options: dict[str, Any] = {"output": "y", "dims": {"N": 16}}
    without = zilc.emit_training(net, **options)
    most = zilc.emit_training(net, memory_budget="1TiB", **options).signature["recompute"]["peak_without"]
    for share in (0.99, 0.95, 0.9, 0.85, 0.8, 0.7):
        try:
            step = zilc.emit_training(net, memory_budget=int(share * most), **options)
        except zilc.errors.OptionError:
            break
        if step.signature["recompute"]["nodes"]:
            again = [node for node in step.model.graph.node if _facts(node).get("zilc.role") == "recompute"]
            expected, got = _run(without, 16), _run(step, 16)
            assert [n for n in expected if expected[n].tobytes() != got[n].tobytes()] == []
            assert again
            return
    pytest.fail("nothing was computed again")


#: Operators that have the other form, and those that do not: of one row or many, transposed otherwise, scaled.
PRODUCTS = """
<ir_version: 10, opset_import: ["" : 18]>
net (float[{rows},5] x) => (float[{rows},2] y)
<float[4,5] u, float[4] b, float[4,4] v, float[4,4] w, float[2,4] t> {{
  [first] a = Gemm<transB = 1>(x, u, b)
  [second] c = Gemm<transB = 1>(a, v)
  [third] d = Gemm(c, w, b)
  e = Tanh(d)
  [fourth] y = Gemm<transB = 1, alpha = 0.5>(e, t)
}}
"""


@pytest.mark.parametrize(("rows", "turned"), [("N", 2), ("3", 2), ("1", 0), ("65", 0)])
def test_products_with_the_weight_first(rows: str, turned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = model(PRODUCTS.format(rows=rows))
    count = 3 if rows == "N" else int(rows)
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((count, 5), np.float32), "target": rng.standard_normal((count, 2), np.float32)}
    found = []
    for name in ("gemm", "turned"):
        monkeypatch.setattr(Lowerings, "choose", lambda self, op, kind, site, operands, candidates, name=name: (
            name if kind == "Gemm" else next(iter(candidates)), "fitted"))  # fmt: skip
        step = zilc.emit_training(proto)
        assert step.report["lowerings"]["taken"].get("Gemm", {}) == ({name: turned} if turned else {})
        trainer = zilc.Trainer(step, lr=0.1, providers=["CPUExecutionProvider"])
        trainer.step(feeds)
        found.append({**trainer.last, **trainer.state})
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, atol=1e-6)
    kinds = [node.op_type for node in step.model.graph.node if node.name.startswith(("first", "second"))]
    assert ("Gemm" in kinds) == (not turned)
