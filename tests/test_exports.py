"""BERT, GPT-2, ViT and ResNet-50 as PyTorch exports them, with PyTorch's own gradients beside zilc's."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import zilc
from tests import exporting
from tests.exporting import FAMILIES, Export
from zilc import onnx_io
from zilc.executors import executor
from zilc.passes.precision import to_float64
from zilc.verification import bits_equal

#: float64: relative to a parameter's gradient, or to 1e-6 of the largest one (ZIL.md, section 8, point 4).
EXACT = 1e-12
#: float32, times sqrt(K): each of K levels rounds by an ulp or two, this way or that.  Some parameters are lucky in
#: PyTorch, which adds in another order than onnxruntime; below this, twice PyTorch's error says nothing.
FLOOR = 2 * 2.0**-23
#: A gradient below this share of the largest one is zero: attention's key biases cancel in the softmax.
ZERO = 1e-12

UNFOLDED = (("training", torch.onnx.TrainingMode.PRESERVE), ("do_constant_folding", False))
UNOPTIMIZED = (("optimize", False),)
#: Each network by both exporters; opset 18, the default, the newest; symbolic batches; graphs left as traced.
CASES = [
    Export("bert", dynamo=False, dynamic=True, double=True),
    Export("bert", dynamo=True, dynamic=True),
    Export("gpt2", dynamo=False, opset=18),
    Export("gpt2", dynamo=True, dynamic=True),
    Export("gpt2", dynamo=True, options=UNOPTIMIZED),
    Export("vit", dynamo=False),
    Export("vit", dynamo=True, opset=23),
    Export("resnet50", dynamo=False, double=True, options=UNFOLDED),
    Export("resnet50", dynamo=False),
    Export("resnet50", dynamo=True, opset=18, dynamic=True, options=UNOPTIMIZED),
    Export("resnet50", dynamo=True),
]


def emitted(model: onnx.ModelProto, case: Export, algorithm: str = "zil", **options: Any) -> zilc.TrainingStep:
    return zilc.emit_training(
        model, loss=FAMILIES[case.family].loss, outputs="grad", algorithm=algorithm, **options
    )


def double(case: Export) -> onnx.ModelProto:
    """The same export in float64: of the module in float64, or the file converted, which is the same graph."""
    if case.double:
        return exporting.export(case)
    return to_float64(exporting.export(case))


def run(step: zilc.TrainingStep, case: Export) -> dict[str, np.ndarray]:
    """Gradients by parameter, on onnxruntime where it has the kernels."""
    kinds = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in step.model.graph.input}
    feeds = {**exporting.inputs(case.family), step.signature["targets"][0]["name"]: exporting.target(case.family)}
    feeds.update({n: np.asarray(step.state[n]) for n in step.state})
    names = {p["grad"]: p["name"] for p in step.signature["parameters"]}
    made = executor(step.model)({n: feeds[n].astype(kind) for n, kind in kinds.items()}, list(names))
    return {names[key]: g for key, g in made.items()}


def errors(made: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> dict[str, float]:
    """ZIL.md, section 8, point 4."""
    norms = {n: float(np.linalg.norm(g)) for n, g in truth.items()}
    floor = 1e-6 * max(norms.values())
    return {n: float(np.linalg.norm(made[n] - g)) / max(norms[n], floor) for n, g in truth.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_pytorchs(case: Export) -> None:
    """Every parameter is trained; float64 to 1e-12, float32 at most twice as wrong as PyTorch; zil is bp in bits."""
    model = exporting.export(dataclasses.replace(case, double=False))
    made, steps = {}, {}
    for dtype, file in ((torch.float32, model), (torch.float64, double(case))):
        zil, bp = emitted(file, case), emitted(file, case, "bp")
        onnx_io.check_full(zil.model)
        assert {entry.domain for entry in zil.model.opset_import} == {""}
        made[dtype], other = run(zil, case), run(bp, case)
        for name, g in made[dtype].items():
            assert bits_equal(g, other[name]), name
        steps[dtype] = zil

    step, step64 = steps[torch.float32], steps[torch.float64]
    arrays = {p["name"]: np.asarray(step.state[p["name"]]) for p in step.signature["parameters"]}
    found = exporting.match(case.family, arrays)
    assert set(found) == set(arrays), "a trained tensor that the module does not have"
    missing = set(dict(exporting.network(case.family).named_parameters())) - {m.parameter for m in found.values()}
    # A folded BatchNormalization's scale is part of the weight; everything else is trained under a name of its own.
    folded = {m.parameter for m in found.values() if m.form == "folded"}
    assert missing == {n for n in missing if n.replace(".weight", ".bias") in folded}

    # A file in float64 may have other names for tensors that the exporter made.
    wide = {p["name"]: np.asarray(step64.state[p["name"]]) for p in step64.signature["parameters"]}
    names = {m: n for n, m in found.items()}
    made[torch.float64] = {names[m]: made[torch.float64][n] for n, m in exporting.match(case.family, wide).items()}
    assert set(made[torch.float64]) == set(arrays)
    truth = exporting.gradients(case.family, arrays, found, torch.float64)
    theirs = exporting.gradients(case.family, arrays, found, torch.float32)
    largest = max(np.linalg.norm(g) for g in truth.values())
    zero = {n for n, g in truth.items() if np.linalg.norm(g) < ZERO * largest}
    assert all("key.bias" in found[n].parameter or "k_proj.bias" in found[n].parameter for n in zero)

    exact = errors(made[torch.float64], truth)
    rest = set(truth) - zero
    assert max(exact[n] for n in rest) <= EXACT, max(rest, key=exact.__getitem__)
    for n in zero:
        assert np.linalg.norm(made[torch.float64][n]) < ZERO * largest
        assert np.linalg.norm(made[torch.float32][n]) < 1e-6 * largest
    ours, twins = errors(made[torch.float32], truth), errors(theirs, truth)
    assert max(ours[n] for n in rest) <= 2 * max(twins[n] for n in rest)
    floor = FLOOR * math.sqrt(step.signature["levels"])
    worse = {n: (ours[n], twins[n]) for n in rest if ours[n] > 2 * twins[n] + floor}
    assert not worse


@pytest.mark.parametrize("case", CASES, ids=str)
def test_onnxruntime_has_nothing_to_say(case: Export, capfd: pytest.CaptureFixture[str]) -> None:
    """No warning on stderr when a session is made, at the default log level."""
    model = exporting.export(dataclasses.replace(case, double=False))
    step = zilc.emit_training(model, loss=FAMILIES[case.family].loss)
    capfd.readouterr()
    onnxruntime.InferenceSession(step.model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_a_tied_head_is_found_and_tied(dynamo: bool) -> None:
    """GPT-2's head is its word table, which both exporters write twice, the second time transposed."""
    case = Export("gpt2", dynamo=dynamo, opset=None if dynamo else 18, dynamic=dynamo)
    file = to_float64(exporting.export(case))
    hints = [line for line in emitted(file, case).report["notes"] if "--tie" in line]
    assert len(hints) == 1
    a, b = hints[0].rpartition("--tie ")[2].split("=")
    step = emitted(file, case, tie=[(a, b)])
    arrays = {p["name"]: np.asarray(step.state[p["name"]]) for p in step.signature["parameters"]}
    assert (a in arrays) + (b in arrays) == 1
    (kept, gone) = (a, b) if a in arrays else (b, a)
    everything = {t.name: onnx.numpy_helper.to_array(t) for t in file.graph.initializer if t.name in {*arrays, gone}}
    found = exporting.match(case.family, everything)
    truth = exporting.gradients(case.family, arrays, found, torch.float64, {gone: kept})
    assert max(errors(run(step, case), truth).values()) <= EXACT


def test_slopes_of_a_folded_resnet() -> None:
    """Directional central differences of the exported file itself, apart from any twin."""
    case = Export("resnet50", dynamo=False)
    feeds = {**exporting.inputs(case.family), "target": exporting.target(case.family)}
    found = zilc.verify(
        exporting.export(case), loss="cross-entropy", precision="float64", inputs=feeds, directions=1,
        wrt=["model.classifier*", "onnx::Conv_5?[05]"],
    )  # fmt: skip
    assert found.passed
    assert len(found.data["parameters"]) >= 10
