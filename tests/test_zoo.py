"""zilc on nine published image networks: bits against BP, and slopes of the loss in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.helper
import pytest

import zilc
from tests import zoo
from zilc import onnx_io
from zilc.executors import Executor, executor
from zilc.passes.precision import to_float64
from zilc.verification import bits_equal, numpy_loss

#: Joint random directions over all parameters.
DIRECTIONS = 4
#: Each parameter's part v of a direction has |gradient| |v| / sqrt(size) = 1: a relative error e in any one
#: parameter's gradient changes the slope by e times a standard normal number.  That four such numbers all lie below
#: 0.1 has a chance of 4e-5, so an error of 1e-2 in a single parameter shows.  The gradients are those of float64: in
#: float32 units of Relu near zero switch, which alone makes differences of 1e-3 a parameter.
TOLERANCE = 1e-3
#: A step moves the loss by about its size for each parameter.  Rounding leaves an error of order 1e-14 / step.  Where
#: a Relu or a MaxPool switches within a step, its error stays however small it is, so other steps are tried, too;
#: a wrong gradient is wrong along each of them.
STEPS = (1e-9, 1e-8, 1e-10)
#: name -> (K, trained parameters), as the published networks have them.
SIZES = {
    "shufflenet": (199, 150), "squeezenet": (49, 52), "inception_v1": (61, 116), "inception_v2": (180, 347),
    "bvlc_alexnet": (23, 16), "zfnet512": (21, 16), "densenet121": (668, 606), "resnet50": (167, 161),
    "vgg19": (45, 38),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name == "vgg19" else ()) for name in zoo.NAMES]
)
def test_network(name: str) -> None:
    """Levels; Z-IL and BP in onnxruntime, float32, bit by bit; Z-IL against the loss's slopes in float64."""
    model, values = zoo.network(name, embed=False)
    options: dict[str, Any] = {
        "output": zoo.logits(model), "loss": "cross-entropy", "class_axis": 1, "outputs": "grad",
    }  # fmt: skip
    levels, parameters = SIZES[name]
    feeds = zoo.image(model)

    zil, bp = (zilc.emit_training(model, algorithm=algorithm, **options) for algorithm in ("zil", "bp"))
    assert zil.signature["levels"] == levels
    trained = [p["name"] for p in zil.signature["parameters"]]
    assert len(trained) == parameters
    # Everything random is trained but running statistics.
    assert {n for n in values if n not in trained} == {
        entry.input[k] for entry in model.graph.node if entry.op_type == "BatchNormalization" for k in (3, 4)
    }
    params = {n: values[n] for n in trained}
    gradients = []
    for step in (zil, bp):
        onnx_io.check_full(step.model)
        assert {entry.domain for entry in step.model.opset_import} == {""}
        run = executor(step.model)
        assert run.name.startswith("onnxruntime")
        gradients.append(gradient(run, step, {**feeds, **params}))
    for leaf in trained:
        assert bits_equal(gradients[0][leaf], gradients[1][leaf]), leaf
    single = gradients[0]
    del params, gradients

    wide = {n: values[n].astype(np.float64) for n in trained}
    pixels = {n: v.astype(np.float64) for n, v in feeds.items()}
    double = to_float64(model)
    exact = zilc.emit_training(double, **options)
    truth = gradient(executor(exact.model), exact, {**pixels, **wide})
    largest = max(np.linalg.norm(g) for g in truth.values())
    for leaf, g in truth.items():
        # Two runtimes, two precisions; the bound is that of units that switch (see TOLERANCE), summed up.
        assert np.linalg.norm(single[leaf] - g) <= 5e-3 * max(np.linalg.norm(g), 1e-6 * largest), leaf
    del single
    forward = opened(double, wide, zoo.logits(model))
    target = labels(zil)
    rng = np.random.default_rng(2)
    moved = {n: np.empty_like(value) for n, value in wide.items()}
    for _ in range(DIRECTIONS):
        direction = {n: rng.standard_normal(g.shape, np.float32) for n, g in truth.items()}
        for n, v in direction.items():
            v /= np.linalg.norm(truth[n])
        expected = sum(float(np.vdot(truth[n], v)) for n, v in direction.items())
        found = []
        for h in STEPS:
            sides = []
            for sign in (1, -1):
                for n, v in direction.items():
                    np.multiply(v, sign * h, out=moved[n])
                    moved[n] += wide[n]
                sides.append(loss(forward, {**pixels, **moved}, target))
            found.append((sides[0] - sides[1]) / (2 * h))
            if abs(found[-1] - expected) <= TOLERANCE:
                break
        assert min(abs(slope - expected) for slope in found) <= TOLERANCE, (expected, found)


@pytest.mark.parametrize("name", zoo.NAMES[:4])
def test_levelled_network_has_the_same_outputs(name: str) -> None:
    """Bit for bit, in onnxruntime."""
    model, _ = zoo.network(name)
    feeds = zoo.image(model)
    expected = executor(model)(feeds)
    for placement in ("edge", "shared"):
        made = executor(zilc.levelize(model, identities=placement, output=zoo.logits(model)).model)(feeds)
        for key, value in expected.items():
            assert bits_equal(made[key], value), (placement, key)


def labels(step: zilc.TrainingStep) -> np.ndarray:
    """Class 3 everywhere."""
    (entry,) = step.signature["targets"]
    (info,) = (i for i in step.model.graph.input if i.name == entry["name"])
    return np.full([d.dim_value for d in info.type.tensor_type.shape.dim], 3, np.int64)


def gradient(run: Executor, step: zilc.TrainingStep, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients by parameter."""
    names = {p["grad"]: p["name"] for p in step.signature["parameters"]}
    made = run({**feeds, step.signature["targets"][0]["name"]: labels(step)}, list(names))
    assert all(np.isfinite(g).all() for g in made.values())
    return {names[key]: g for key, g in made.items()}


def opened(model: onnx.ModelProto, values: Mapping[str, np.ndarray], output: str) -> Executor:
    """The model with its parameters as inputs, and ``output`` as its only output."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    nodes = [n for n in graph.node if n.output[0] not in values]
    kept = [t for t in graph.initializer if t.name not in values]
    for entries, chosen in ((graph.node, nodes), (graph.initializer, kept), (graph.output, [])):
        del entries[:]
        entries.extend(chosen)
    kind = onnx.TensorProto.DOUBLE
    graph.input.extend(onnx.helper.make_tensor_value_info(n, kind, v.shape) for n, v in values.items())
    graph.output.append(onnx.helper.make_tensor_value_info(output, kind, None))
    return executor(made)


def loss(forward: Executor, feeds: Mapping[str, np.ndarray], target: np.ndarray) -> float:
    """Cross-entropy of the classes along axis 1, in NumPy."""
    (mu,) = forward(feeds).values()
    return numpy_loss("cross-entropy", mu, target, 1)
