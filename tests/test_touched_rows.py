"""Tables that are written only at the rows of a batch: the bits of the sum over the whole table, and fewer numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import zilc
from zilc import models, session, touched_rows
from zilc import signature as signatures
from zilc.passes import products

CPU = ["CPUExecutionProvider"]
TABLE = """
<ir_version: 9, opset_import: ["" : 18]>
g (int64[N, 3] tokens) => (float[N, 3, 5] y) <float[7, 4] table, float[4, 5] w> {
  x = Gather(table, tokens)
  h = Tanh(x)
  y = MatMul(h, w)
}
"""
TIED = """
<ir_version: 9, opset_import: ["" : 18]>
g (int64[N, 3] tokens) => (float[N, 3, 7] y) <float[7, 4] table> {
  x = Gather(table, tokens)
  h = Tanh(x)
  t = Transpose <perm = [1, 0]> (table)
  y = MatMul(h, t)
}
"""


def _model(text: str) -> onnx.ModelProto:
    made, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    for info in list(made.graph.value_info):
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        values = rng.standard_normal(shape, dtype=np.float32)
        made.graph.initializer.append(onnx.numpy_helper.from_array(values, info.name))
    del made.graph.value_info[:]
    return made


def _batches(classes: int) -> list[dict[str, np.ndarray]]:
    """Rows named often, from the end, from both ends at once, all and one alone; batches of several sizes."""
    tokens = [[[0, 0, 0], [6, -1, 6], [2, 0, -7]], [[0, 1, 2], [3, 4, 5], [6, 6, -1]], [[3, 3, 3]]]
    return [
        {"tokens": np.asarray(rows), "target": np.arange(3 * len(rows)).reshape(-1, 3) % classes} for rows in tokens
    ]


def _trained(step: zilc.TrainingStep, feeds: list[dict[str, np.ndarray]]) -> tuple[dict[str, bytes], list[str]]:
    trainer = zilc.Trainer(step, lr=0.1, providers=CPU)
    for batch in feeds:
        trainer.step(batch)
    return {name: array.tobytes() for name, array in trainer.state.items()}, sorted(trainer._opened.over)


def _touched(step: zilc.TrainingStep) -> bool:
    return touched_rows.touch_rows(step.model, signatures.carried_pairs(step.signature)) is not step.model


@pytest.mark.parametrize(
    ("text", "classes", "kind", "apart"),
    [
        (TABLE, 5, "Sub", (0, 0)), (TIED, 7, "Sub", (0, 0)), (TIED, 7, "Add", (0, 28)),
        (TABLE.replace("int64[N, 3]", "int32[N, 3]"), 5, "Sub", (0, 0)),
    ],
)  # fmt: skip
def test_the_bits_are_those_of_the_whole_table(
    monkeypatch: pytest.MonkeyPatch, text: str, classes: int, kind: str, apart: tuple[int, int]
) -> None:
    monkeypatch.setattr(products, "APART", apart)
    step = zilc.emit_training(_model(text), loss="cross-entropy")
    feeds = _batches(classes)
    if "int32" in text:
        feeds = [{**batch, "tokens": batch["tokens"].astype(np.int32)} for batch in feeds]
    whole, _ = _trained(step, feeds)
    seen: list[onnx.ModelProto] = []

    def spied(model: onnx.ModelProto, pairs: Any) -> onnx.ModelProto:
        seen.append(touched_rows.touch_rows(model, pairs))
        return seen[-1]

    monkeypatch.setattr(touched_rows, "LARGE", 1)
    monkeypatch.setattr(session, "touch_rows", spied)
    rows, over = _trained(step, feeds)
    assert rows == whole
    assert "table" in over
    (made,) = seen
    onnx.checker.check_model(made, full_check=True)
    assert [n.op_type for n in made.graph.node if n.op_type in ("Unique", "ScatterND")] == ["Unique", "ScatterND"]
    assert [n.op_type for n in made.graph.node if n.name.endswith(".rows/after")] == [kind]


@pytest.mark.parametrize("network", ["transformer", "decoder"])
def test_networks_have_the_bits_of_the_whole_table(monkeypatch: pytest.MonkeyPatch, network: str) -> None:
    sizes: dict[str, Any] = {"vocabulary": 50, "length": 6, "d_model": 16, "heads": 2}
    model = models.build(network, **sizes)
    step = zilc.emit_training(model, loss="cross-entropy")
    feeds = [models.random_feeds(model, 4, np.random.default_rng(k), loss="cross-entropy") for k in range(3)]
    whole, _ = _trained(step, feeds)
    monkeypatch.setattr(touched_rows, "LARGE", 50 * 16)
    assert _touched(step)
    rows, over = _trained(step, feeds)
    assert rows == whole
    assert "embedding.weight" in over


@pytest.mark.parametrize("options", [{"optimizer": "adam"}, {"outputs": "both"}, {"freeze": "table"}])
def test_what_needs_the_whole_gradient_keeps_it(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(touched_rows, "LARGE", 1)
    assert not _touched(zilc.emit_training(_model(TABLE), loss="cross-entropy", **options))


@pytest.mark.parametrize("axis", [0, 1])
def test_indices_along_a_row_are_no_rows(monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    """The same nodes backwards, but each entry of an update goes to a row of its own where the axis is 0."""
    model = _model(f"""
        <ir_version: 9, opset_import: ["" : 18]>
        g (float[6, 6] x) => (float[6, 6] y)
        <float[6, 6] table, int64[6] to = {{5, 1, 1, 0, 2, 3}}, int64[1] axes = {{{axis}}}, int64[2] size = {{6, 6}}> {{
          u = Unsqueeze(to, axes)
          i = Expand(u, size)
          r = GatherElements <axis = 0> (table, i)
          y = Mul(r, x)
        }}""")
    step = zilc.emit_training(model, loss="energy", wrt="table")
    rng = np.random.default_rng(1)
    feeds = [{name: rng.standard_normal((6, 6), dtype=np.float32) for name in ("x", "target")} for _ in range(2)]
    whole, _ = _trained(step, feeds)
    monkeypatch.setattr(touched_rows, "LARGE", 1)
    rows, _ = _trained(step, feeds)
    assert rows == whole


def test_small_tables_stay_as_they_are() -> None:
    assert not _touched(zilc.emit_training(_model(TABLE), loss="cross-entropy"))


def test_a_row_that_is_not_there_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(touched_rows, "LARGE", 1)
    trainer = zilc.Trainer(zilc.emit_training(_model(TABLE), loss="cross-entropy"), lr=0.1, providers=CPU)
    before = {name: array.tobytes() for name, array in trainer.state.items()}
    batch = {"tokens": np.asarray([[0, 7, 1]]), "target": np.zeros((1, 3), np.int64)}
    with pytest.raises(zilc.ZilcError, match="7"):
        trainer.step(batch)
    assert {name: array.tobytes() for name, array in trainer.state.items()} == before
