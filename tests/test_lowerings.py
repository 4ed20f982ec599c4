"""Choice among lowerings: by fitted cost, by measurement, and what the metadata say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import zilc
from tests.command import spawn
from tools import fit_lowerings
from zilc import lowerings, models
from zilc.errors import FileError, OptionError, RuntimeMissing
from zilc.lowerings import Lowering, Lowerings, Tuner

CPU = ["CPUExecutionProvider"]
SMALL: dict[str, Any] = {"image": 33, "width": 8, "classes": 10}


def _noted(model: onnx.ModelProto) -> dict[str, set[str]]:
    """Lowerings by kind, as nodes' metadata have them."""
    found: dict[str, set[str]] = {}
    for node in model.graph.node:
        for entry in node.metadata_props:
            if entry.key == "zilc.lowering":
                kind, name = entry.value.split(": ")
                found.setdefault(kind, set()).add(name)
    return found


@pytest.mark.parametrize(("target", "dtype"), [("cpu", "float32"), ("cuda", "float32"), ("cuda", "float16")])
def test_costs_are_known_for_every_candidate(target: str, dtype: str) -> None:
    """What the fit tool offers is what rules offer, and all of it has costs, but what is measured or left alone."""
    known = lowerings.costs()[target if dtype == "float32" else f"{target}, half"]
    offered: dict[str, set[str]] = {}
    for _site, kind, _op, _operands, candidates in fit_lowerings.offers([], target, dtype):
        offered.setdefault(kind, set()).update(name for name, one in candidates.items() if not one.erratic)
    assert {kind: set(row) for kind, row in known.items()} == offered
    for kind, row in known.items():
        for name, cost in row.items():
            assert cost, (kind, name)
            assert all(np.isfinite(x) and x >= 0 for x in cost.values()), (kind, name)


def test_what_is_erratic_is_taken_only_where_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"a": Lowering(lambda op: "a", {"items": 10}), "b": Lowering(lambda op: "b", {"items": 1}, erratic=True)}  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(lowerings, "costs", lambda: {"cpu": {"kind": {n: {"items": 1.0} for n in made}}})
    assert Lowerings().choose(None, "kind", "", [], made) == ("a", "fitted")  # type: ignore[arg-type]
    monkeypatch.setattr(lowerings, "measure", lambda *a, **k: {"a": 2.0, "b": 1.0})
    tuned = Lowerings("cpu", Tuner(tmp_path / "t.json"))
    assert tuned.choose(None, "kind", "", [], made) == ("b", "measured")  # type: ignore[arg-type]


def test_one_lowering_everywhere_where_the_fit_is_worse() -> None:
    """Times that no count of work explains: the costs then say the steady one, whatever the work."""
    rng = np.random.default_rng(0)
    rows = [
        {"site": str(k), "ms": {"steady": 1.0, "wild": float(rng.choice([0.9, 9.0]))},
         "work": {"steady": {"items": k}, "wild": {"items": k}}}
        for k in range(24)
    ]  # fmt: skip
    costs, quality = fit_lowerings.judged({"kind": rows})
    assert {row["chosen"] for row in rows} == {"steady"}
    assert quality["kind"]["lost"][0] == pytest.approx(quality["kind"]["always"]["steady"])
    assert lowerings.predicted(costs["kind"]["wild"], {"items": 1e6}) > 1e8


def test_the_least_predicted_time_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"a": Lowering(lambda op: "a", {"items": 10}), "b": Lowering(lambda op: "b", {"items": 1, "others": 3})}
    costs = {"cpu": {"kind": {"a": {"items": 1.0}, "b": {"constant": 2.0, "items": 1.0, "others": 1.0}}}}
    monkeypatch.setattr(lowerings, "costs", lambda: costs)
    assert Lowerings().choose(None, "kind", "", [], made) == ("b", "fitted")  # type: ignore[arg-type]
    costs["cpu"]["kind"]["b"]["constant"] = 9.0
    assert Lowerings().choose(None, "kind", "", [], made) == ("a", "fitted")  # type: ignore[arg-type]
    # Without costs the first is taken.
    assert Lowerings(target="other").choose(None, "kind", "", [], made) == ("a", "default")  # type: ignore[arg-type]


def test_metadata_say_which_was_taken() -> None:
    step = zilc.emit_training(models.build("resnet18", **SMALL), loss="cross-entropy")
    data = json.loads(next(p.value for p in step.model.metadata_props if p.key == lowerings.KEY))
    assert data == step.report["lowerings"]
    assert data["costs"] == "fitted"
    taken = {kind: set(row) for kind, row in data["taken"].items()}
    assert taken == _noted(step.model)
    weights = {"Conv.weight", "Conv.weight, strided", "Conv.weight, pointwise, strided"}
    images = {"Conv.image", "Conv.image, strided", "Conv.image, pointwise, strided"}
    assert set(taken) == {"Conv", "Gemm", *weights, *images, "MaxPool.x"}
    assert sum(sum(data["taken"][kind].values()) for kind in weights) == 20


@pytest.mark.parametrize("batch", [1, 3])
def test_every_choice_is_right(batch: int) -> None:
    """A network's gradients with each lowering that it can have, against those with the first of each kind."""

    class First(Lowerings):
        def choose(self, op: Any, kind: str, site: str, operands: Any, candidates: Any) -> tuple[str, str]:
            offered.setdefault(kind, set()).update(candidates)
            return wanted.get(kind) if wanted.get(kind) in candidates else next(iter(candidates)), "only"  # type: ignore[return-value]

    model = models.build("resnet18", **SMALL)
    feeds = models.random_feeds(model, batch, np.random.default_rng(0), loss="cross-entropy")
    offered: dict[str, set[str]] = {}
    wanted: dict[str, str] = {}

    def gradients() -> dict[str, np.ndarray]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("zilc.pipeline.Lowerings", lambda *_: First())
            step = zilc.emit_training(model, loss="cross-entropy", outputs="grad")
        from zilc.executors import executor

        made = executor(step.model)({**feeds, **{n: np.asarray(step.state[n]) for n in step.state}})
        return {p["name"]: made[p["grad"]] for p in step.signature["parameters"]}

    truth = gradients()
    for kind, names in [(k, sorted(v)) for k, v in offered.items()]:
        for name in names:
            wanted = {kind: name}
            for leaf, gradient in gradients().items():
                size = np.abs(truth[leaf]).max()
                # Float32 sums in another order, through 20 layers.
                assert np.abs(gradient - truth[leaf]).max() <= 1e-4 * size, (kind, name, leaf)
    assert {kind: len(names) for kind, names in offered.items()} == {
        "Conv": 2, "Conv.weight": 11, "Conv.weight, strided": 6, "Conv.weight, pointwise, strided": 4, "Conv.image": 3,
        "Conv.image, strided": 2, "Conv.image, pointwise, strided": 2, "MaxPool.x": 2, "Gemm": 2,
    }  # fmt: skip


def test_tuning_measures_once_and_remembers(tmp_path: Path) -> None:
    model = models.build("resnet18", **SMALL)
    file = tmp_path / "folder" / "tuned.json"
    first = zilc.emit_training(model, loss="cross-entropy", tune=file)
    assert first.report["lowerings"]["costs"] == "measured"
    content = json.loads(file.read_text())
    (machine,) = content["machines"].values()
    assert all(ms is None or ms > 0 for times in machine.values() for ms in times.values())
    before = file.read_bytes()
    again = zilc.emit_training(model, loss="cross-entropy", tune=file)
    assert file.read_bytes() == before
    assert again.model.SerializeToString(deterministic=True) == first.model.SerializeToString(deterministic=True)
    # What is remembered decides.
    for times in machine.values():
        if "swapped" in times:
            times["swapped"] = 1e-6
    file.write_text(json.dumps(content))
    forced = zilc.emit_training(model, loss="cross-entropy", tune=file)
    assert set(forced.report["lowerings"]["taken"]["Conv.weight"]) == {"swapped"}
    assert file.read_text() == json.dumps(content)


def test_a_candidate_that_does_not_run_is_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowerings, "measure", lambda *a, **k: {"a": None, "b": 2.0, "c": 3.0})
    tuner = Tuner(tmp_path / "t.json")
    candidates = {name: Lowering(lambda op: None, {}) for name in "abc"}  # type: ignore[arg-type, return-value]
    assert tuner.fastest(None, "kind", "", [], candidates) == "b"  # type: ignore[arg-type]


def test_where_nothing_could_be_measured_costs_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first candidate, which may be an erratic one; and nothing is remembered."""
    made = {"a": Lowering(lambda op: "a", {"items": 1}, erratic=True), "b": Lowering(lambda op: "b", {"items": 9})}  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(lowerings, "costs", lambda: {"cpu": {"kind": {"b": {"items": 1.0}}}})
    monkeypatch.setattr(lowerings, "measure", lambda *a, **k: dict.fromkeys(made))
    assert Lowerings("cpu", Tuner(tmp_path / "t.json")).choose(None, "kind", "", [], made) == ("b", "fitted")  # type: ignore[arg-type]
    assert not (tmp_path / "t.json").exists()


def test_tuning_for_cuda_wants_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zilc.providers.why_no_cuda", lambda _: "no NVIDIA GPU found")
    with pytest.raises(RuntimeMissing, match=r"--tune --target cuda: CUDA cannot be had: no NVIDIA GPU found\. Tune"):
        zilc.emit_training(models.build("mlp3"), tune=True, target="cuda")


@pytest.mark.parametrize("text", ["no json", "[]", '{"format": "another"}'])
def test_another_file_is_left_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "notes.json"
    file.write_text(text)
    with pytest.raises(FileError, match="no file of measured lowerings"):
        zilc.emit_training(models.build("mlp3"), tune=file)
    assert file.read_text() == text


def test_neither_file_nor_truth_value() -> None:
    with pytest.raises(OptionError, match="neither a file"):
        zilc.emit_training(models.build("mlp3"), tune=3)  # type: ignore[arg-type]


def test_the_command_remembers_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZILC_HOME", str(tmp_path / "home"))
    onnx.save(models.build("resnet18", image=17, width=4, classes=5), tmp_path / "m.onnx")
    done = spawn("emit-training", str(tmp_path / "m.onnx"), "--loss", "cross-entropy", "--tune", "--state", "none")
    assert done.returncode == 0, done.stderr
    assert "measured costs" in done.stdout
    assert (tmp_path / "home" / "lowerings.json").exists()
