"""Adam's update alone, in every precision, against the formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from zilc import ir, optimizers
from zilc.emit import Emitter
from zilc.executors import executor

LR, EPS = 2.0**-6, 1e-4


def graph_of(dtype: type, options: dict[str, Any]) -> gs.Graph:
    """One update of p by g: the next p and slots, from the slots, lr and step."""
    optimizer = optimizers.make("adam", options)
    names = ("p", "g", *optimizer.slots)
    tensors = {name: gs.Variable(name, np.dtype(dtype), [4]) for name in names}
    lr, step = gs.Variable("lr", np.dtype(np.float32), []), gs.Variable("step", np.dtype(np.int64), [])
    graph = gs.Graph(inputs=[*tensors.values(), lr, step], opset=18)
    graph.import_domains = [onnx.helper.make_opsetid("", 18)]
    slots = {name: tensors[name] for name in optimizer.slots}
    following, moved = optimizer.update(Emitter(graph), tensors["p"], tensors["g"], slots, lr, step)  # type: ignore[arg-type]
    for name, tensor in {"p": following, **moved}.items():
        out = gs.Variable(f"{name}.next", np.dtype(dtype), [4])
        graph.nodes.append(gs.Node("Identity", inputs=[tensor], outputs=[out]))
        graph.outputs.append(out)
    return graph


def test_adam_needs_room_for_two_tensors() -> None:
    """Of p's size, besides what is carried; the gradient is a node's, and is freed as soon as all have read it."""
    graph = graph_of(np.float32, {})
    shaped = {t.name for t in graph.inputs if t.shape == [4]}
    carried = {"p", "exp_avg", "exp_avg_sq"}
    nodes = [node for node in graph.nodes if node.op != "Identity"]
    last = {t.name: k for k, node in enumerate(nodes) for t in node.inputs}
    # What is made of p, m and v is written over them.
    kept = {t.name for node in graph.nodes if node.op == "Identity" for t in node.inputs}
    alive, most = {"g"}, 1
    for k, node in enumerate(nodes):
        (made,) = node.outputs
        if any(t.name in shaped for t in node.inputs):
            shaped.add(made.name)
            if made.name not in kept:
                alive.add(made.name)
        most = max(most, len(alive))
        alive = {name for name in alive if last[name] > k and name not in carried}
    assert most == 2


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.99, 0.99), (0.999, 0.9), (0.9999, 0.99)])
@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [
        (np.float16, 0.3, 0.02),
        (np.float16, 3.0, 0.02),
        (np.float32, 1e-3, 1e-5),
        (np.float32, 3.0, 1e-5),
        (np.float64, 1e-3, 1e-12),
        (np.float64, 3.0, 1e-12),
    ],
)
def test_adam_moves_as_the_formula_says(
    dtype: type, scale: float, tolerance: float, betas: tuple[float, float]
) -> None:
    """Small and large gradients, and one that is always zero; the error in units of the learning rate."""
    made_of = ir.to_proto(graph_of(dtype, {"betas": betas, "eps": EPS}), infer=True)
    run = executor(made_of, prefer="reference")
    rng = np.random.default_rng(0)
    made = {"p": np.zeros(4, dtype), "exp_avg": np.zeros(4, dtype), "exp_avg_sq": np.zeros(4, dtype)}
    m, v = np.zeros(4), np.zeros(4)
    for step in range(5):
        g = (scale * rng.standard_normal(4) * [1, 1, 1, 0]).astype(dtype)
        before = made["p"].astype(np.float64)
        after = run({**made, "g": g, "lr": np.float32(LR), "step": np.int64(step)})
        made = {name: after[f"{name}.next"] for name in made}
        m, v = (b * s + (1 - b) * g.astype(np.float64) ** k for b, s, k in zip(betas, (m, v), (1, 2), strict=True))
        corrected = m / (1 - betas[0] ** (step + 1)), v / (1 - betas[1] ** (step + 1))
        wanted = -LR * corrected[0] / (np.sqrt(corrected[1]) + EPS)
        moved = made["p"].astype(np.float64) - before
        spacing = float(np.spacing(np.abs(before).max().astype(dtype)))
        assert np.abs(moved - wanted).max() <= tolerance * LR + spacing, (step, moved, wanted)
        assert moved[3] == 0
