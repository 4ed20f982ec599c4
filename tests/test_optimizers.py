"""Adam's update alone, in every precision, against the formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from zilc import onnx_io, optimizers
from zilc.emit import Emitter
from zilc.executors import executor

LR, EPS = 2.0**-6, 1e-4


def update(dtype: type, options: dict[str, Any]) -> Any:
    """One update as a function of p, g, the slots, lr and step by name, in ONNX's reference evaluator."""
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
    return executor(onnx_io.to_proto(graph, infer=True), prefer="reference")


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
    run = update(dtype, {"betas": betas, "eps": EPS})
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
