"""Plain reverse mode on the graph without identity vertices: the yardstick.

It shares with Z-IL the rules, the order in which contributions are summed, and clean-up, and nothing else: no steps,
no errors, no dynamics.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from zilc.graph import Dataflow
from zilc.passes.levels import Levels, sum_order
from zilc.passes.training import TrainingGraph
from zilc.vjp.table import vjp


def reverse_mode(training: TrainingGraph, flow: Dataflow, levels: Levels, leaves: Sequence[str]) -> None:
    """Emit the cotangent of every vertex on a path from ``leaves``, and the gradient of each leaf.

    Requires: ``flow`` and ``levels`` are those of ``training.graph``, whose outputs are clamped.
    """
    op = training.op
    order = sum_order(flow, levels)
    live = flow.upstream_of(leaves)
    cotangent: dict[str, gs.Tensor | None] = dict(training.clamped)

    def accumulate(name: str) -> gs.Tensor | None:
        total: gs.Tensor | None = None
        for edge in sorted(flow.readers.get(name, ()), key=order.__getitem__):
            node = flow.vertices[edge.consumer]
            arriving = [cotangent.get(t.name) for t in node.outputs]
            if all(g is None for g in arriving):
                continue
            part = vjp(op, node, edge.operand, arriving)
            if part is not None:
                total = part if total is None else op.Add(total, part)
        return total

    by_level: dict[int, list[str]] = {}
    for leaf in leaves:
        by_level.setdefault(levels.leaves[leaf], []).append(leaf)
    vertices: dict[int, list[int]] = {}
    for v in live:
        vertices.setdefault(levels.vertices[v], []).append(v)
    for level in range(1, levels.depth + 1):
        for leaf in by_level.get(level, ()):
            with op.place(f"{leaf}.gradient", vertex=leaf, level=level, role="update", step=level - 1):
                gradient = accumulate(leaf)
            training.gradient(leaf, gradient, level)
        for v in sorted(vertices.get(level, ()), reverse=True):
            for tensor in flow.vertices[v].outputs:
                if tensor.name in flow.readers and tensor.name not in cotangent:
                    with op.place(f"{tensor.name}.cotangent", vertex=flow.names[v], level=level, role="error"):
                        cotangent[tensor.name] = accumulate(tensor.name)
