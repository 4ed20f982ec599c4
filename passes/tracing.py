"""The literal loop's state as graph outputs, step by step: prediction errors, movements, energies.

Each vertex adds one number a step; they are stacked to vectors over all vertices, which the Loop hands out as scan
outputs, so that whoever runs the graph sees the dynamics.  Sums of squares are taken in float64: on levels that the
wave has passed, errors of float32 may grow to where their squares no longer fit.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.errors import OptionError
from zilc.graph import INSERTED, Dataflow
from zilc.passes.dynamics import Dynamics

Tensors = Mapping[str, gs.Tensor]
#: What is traced of every vertex, in the order of the outputs.
QUANTITIES = ("error", "movement", "energy")


@dataclass
class Trace:
    """Which traces a training graph gives, and under which names.

    Attributes:
        flow: the graph on which the dynamics run, identity vertices included.
        full: tensors whose errors, movements and value nodes are wanted whole.
        names: output names by quantity; ``tensors`` holds those of ``full``, by tensor.
    """

    dynamics: Dynamics
    full: list[str]
    names: dict[str, str]
    tensors: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def flow(self) -> Dataflow:
        return self.dynamics.flow

    def signature(self, steps: int) -> dict[str, Any]:
        """The part of ``zilc.signature`` that says what the outputs are."""
        flow, levels = self.flow, self.dynamics.levels
        clamped = self.dynamics.clamped
        return {
            "steps": steps,
            "gamma": self.dynamics.gamma,
            **self.names,
            "vertices": [
                {
                    "name": name,
                    "operator": node.op,
                    "level": level,
                    "identity": bool(getattr(node, INSERTED, False)) and node.outputs[0].name not in clamped,
                }
                for name, node, level in zip(flow.names, flow.vertices, levels.vertices, strict=True)
            ],
            "full": [
                {
                    "vertex": flow.names[flow.producer[tensor]],
                    "tensor": tensor,
                    **{key: self.tensors[tensor].get(key) for key in ("error", "movement", "value")},
                }
                for tensor in self.full
            ],
        }


def plan_trace(op: Emitter, dynamics: Dynamics, moving: Sequence[str], full: Sequence[str]) -> Trace:
    """Choose what is traced and claim the outputs' names.

    Args:
        moving: tensors whose value nodes move.
        full: vertices or tensors by name.

    Raises:
        OptionError: no such vertex.
    """
    flow = dynamics.flow
    moves = set(moving)
    by_name = {name: v for v, name in enumerate(flow.names)}
    wanted: dict[str, None] = {}
    for name in full:
        vertex = by_name.get(name, flow.producer.get(name))
        if vertex is None:
            near = difflib.get_close_matches(name, [*flow.names, *flow.producer], n=3)
            raise OptionError(
                f"no vertex '{name}' in the graph that the dynamics run on",
                where="--full",
                hint=f"Close to it: {', '.join(near)}." if near else "'zilc levelize' writes a graph that names them.",
            )
        for tensor in flow.vertices[vertex].outputs:
            if tensor.name in moves or tensor.name in dynamics.clamped:
                wanted[tensor.name] = None

    def claim(name: str) -> str:
        return op.fresh(name if name not in op.names else f"zilc.{name}")

    made = Trace(dynamics, list(wanted), {key: claim(f"trace.{key}") for key in QUANTITIES})
    for tensor in made.full:
        # A clamped value node stays at its target: nothing to tell but its error.
        keys = ("error", "movement", "value") if tensor in moves else ("error",)
        made.tensors[tensor] = {key: claim(f"{tensor}.trace.{key}") for key in keys}
    return made


class Recorder:
    """Emits what a trace is made of, at one state at a time."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def errors(self, op: Emitter, eps: Tensors, losses: Tensors) -> tuple[gs.Tensor, gs.Tensor]:
        """Norms of prediction errors and energies, both float64 of shape [vertices].

        An energy is half a vertex's sum of squared errors; at a clamped output, its loss.
        """
        with op.place("trace/error", vertex="trace", role="trace"):
            squares = self._squares(op, eps)
            doubled = []
            for square, node in zip(squares, self.trace.flow.vertices, strict=True):
                own = [losses[t.name] for t in node.outputs if t.name in losses]
                parts = [op.Mul(self._cell(op, value), 2.0) for value in own] or [square]
                doubled.append(_added(op, parts))
            return op.Sqrt(_row(op, squares)), op.Mul(_row(op, doubled), 0.5)

    def movements(self, op: Emitter, moves: Tensors) -> gs.Tensor:
        """Norms of the value nodes' movements, float64 of shape [vertices]."""
        with op.place("trace/movement", vertex="trace", role="trace"):
            return op.Sqrt(_row(op, self._squares(op, moves)))

    def _squares(self, op: Emitter, of: Tensors) -> list[gs.Tensor]:
        """The sum of squares over each vertex's outputs, each of shape [1]."""
        made = []
        for node in self.trace.flow.vertices:
            parts = [
                self._cell(op, op.ReduceSumSquare(op.cast(of[t.name], np.float64), keepdims=0))
                for t in node.outputs
                if t.name in of
            ]
            made.append(_added(op, parts) if parts else op.constant(np.zeros(1)))
        return made

    def _cell(self, op: Emitter, value: gs.Tensor) -> gs.Tensor:
        return op.Reshape(op.cast(value, np.float64), [1])


def _added(op: Emitter, parts: Sequence[gs.Tensor]) -> gs.Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = op.Add(total, part)
    return total


def _row(op: Emitter, cells: Sequence[gs.Tensor]) -> gs.Tensor:
    return op.Concat(*cells, axis=0)
