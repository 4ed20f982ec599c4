"""zilc on random graphs, against a simulator that shares no code with it (ZIL.md, section 8: points 1, 2, 4, 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings

import zilc
from tests import random_graphs, simulator
from tests.random_graphs import Sample

EXACT = 1e-12  # float64, relative; see simulator.relative_errors
PLACEMENTS = ("edge", "shared")

moderate = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


# --- helpers ----------------------------------------------------------------------------------------


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], executor: str) -> dict[str, np.ndarray]:
    """All outputs of a model, by name."""
    names = [o.name for o in model.graph.output]
    if executor == "reference":
        values = onnx.reference.ReferenceEvaluator(model).run(names, feeds)
    else:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        values = session.run(names, feeds)
    return dict(zip(names, map(np.asarray, values), strict=True))


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two sets of arrays agree in names, dtypes, shapes and bytes."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def levelized(sample: Sample, identities: str) -> Any:
    return zilc.levelize(sample.model, identities=identities, output=sample.outputs)


def training(sample: Sample, algorithm: str, **options: Any) -> Any:
    """The training graph that gives the gradient of every leaf, inputs among them."""
    return zilc.emit_training(
        sample.model,
        output=sample.outputs,
        loss="energy",
        wrt=sample.leaves,
        outputs="grad",
        algorithm=algorithm,
        **options,
    )


def gradients(sample: Sample, step: Any, executor: str) -> tuple[dict[str, np.ndarray], float]:
    """The gradients and the loss that a training graph computes, by its signature alone."""
    signature = step.signature
    initial = {t.name: onnx.numpy_helper.to_array(t) for t in sample.model.graph.initializer}
    feeds = dict(sample.feeds)
    feeds |= {p["name"]: initial[p["name"]] for p in signature["parameters"]}
    feeds |= {t["name"]: sample.targets[t["output"]] for t in signature["targets"]}
    found = run(step.model, feeds, executor)
    both = (*signature["parameters"], *signature["input_grads"])
    return {p["name"]: found[p["grad"]] for p in both}, float(found[signature["loss"]])


def prepare(sample: Sample) -> tuple[simulator.Net, simulator.Arrays]:
    """The simulator's graph, and the gradients of its reverse mode."""
    net = simulator.network(sample.model, sample.outputs)
    values = simulator.evaluate(sample.model, sample.feeds)
    return net, simulator.reverse_mode(net, values, sample.targets)


# --- properties -------------------------------------------------------------------------------------


def clamped(sample: Sample, model: onnx.ModelProto) -> list[str]:
    """Trained outputs by their names in a levelled model, where a leaf keeps its own name beside its terminal."""
    made = {name for node in model.graph.node for name in node.output}
    return [name if name in made else f"{name}.clamped" for name in sample.outputs]


def check_levelize(sample: Sample) -> None:
    """Outputs to the bit, levelled from scratch, the simulator's levels and counts, twice the same as once."""
    net = simulator.network(sample.model, sample.outputs)
    single = sample.cast(np.float32)
    before = run(sample.model, sample.feeds, "reference")
    before32 = run(single.model, single.feeds, "onnxruntime")
    name_of = {node.output[0]: node.name for node in sample.model.graph.node}
    expected = {name_of[v.outputs[0]]: net.level[v.outputs[0]] for v in net.vertices if v.outputs[0] in name_of}
    expected |= {leaf: net.level[leaf] for leaf in net.leaves}
    for identities in PLACEMENTS:
        made = levelized(sample, identities)
        onnx.checker.check_model(made.model, full_check=True)
        assert simulator.check_levelled(made.model, clamped(sample, made.model)) == []

        after = run(made.model, sample.feeds, "reference")
        assert same_bits(before, {name: after[name] for name in before})
        after32 = run(levelized(single, identities).model, single.feeds, "onnxruntime")
        assert same_bits(before32, {name: after32[name] for name in before32})

        assert {name: n for name, n in made.levels.items() if not name.endswith(".terminal")} == expected
        assert made.report["levels"] == net.k
        terminals = count(net)
        assert made.report["identities"][identities]["vertices"] == inserted(net, identities) - terminals
        assert count_nodes(made.model) == inserted(net, identities)

        again = levelized(replaced(sample, made.model), identities)
        assert again.model.SerializeToString(deterministic=True) == made.model.SerializeToString(deterministic=True)


def check_gradients(sample: Sample) -> None:
    """Z-IL equals BP bit for bit; both equal the simulator's reverse mode and its dynamics."""
    net, truth = prepare(sample)
    values = simulator.evaluate(sample.model, sample.feeds)
    single = sample.cast(np.float32)
    for identities in PLACEMENTS:
        zil32 = training(single, "zil", identities=identities)
        bp32 = training(single, "bp", identities=identities)
        assert same_bits(gradients(single, zil32, "onnxruntime")[0], gradients(single, bp32, "onnxruntime")[0])
