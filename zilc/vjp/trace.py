"""Rules for operators without a function body that are best said as a forward formula in other operators.

The formula is emitted, and the cotangent goes back through it by the rules of the operators that it is made of.  What
of it the cotangent does not read is dead, and is simplified away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.vjp import table

Forward = Callable[..., gs.Tensor]


def through(op: Emitter, y: gs.Tensor, x: gs.Tensor, g: gs.Tensor) -> gs.Tensor | None:
    """The cotangent of ``x``, of which ``y`` was computed by emitted operators, where ``g`` is that of ``y``."""
    nodes = _between(y, x)
    cotangents: dict[str, gs.Tensor] = {y.name: g}
    carrying = {x.name}
    paths: list[tuple[gs.Node, list[int]]] = []
    for node in nodes:
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name:
                op.dtype(tensor)
        operands = [
            k
            for k, t in enumerate(node.inputs)
            if t.name in carrying and table.is_differentiable_operand(node, k, op.graph.opset)
        ]
        if operands:
            carrying.update(t.name for t in node.outputs)
            paths.append((node, operands))
    for node, operands in reversed(paths):
        arriving = [cotangents.get(t.name) for t in node.outputs]
        if all(a is None for a in arriving):
            continue
        for k in operands:
            passed = table.vjp(op, node, k, arriving)
            if passed is not None:
                name = node.inputs[k].name
                cotangents[name] = op.Add(cotangents[name], passed) if name in cotangents else passed
    return cotangents.get(x.name)


def told_apart(op: Emitter, operands: Sequence[Any], k: int) -> tuple[list[Any], gs.Tensor]:
    """The operands, and number ``k`` of them under a name of its own: an operand used twice is two edges."""
    found = list(operands)
    if any(t is not None and t.name == found[k].name for j, t in enumerate(found) if j != k):
        found[k] = op.Identity(found[k])
    return found, found[k]


def _between(y: gs.Tensor, x: gs.Tensor) -> list[gs.Node]:
    """The nodes that ``y`` is made by, up to ``x``, producers first."""
    ordered: list[gs.Node] = []
    seen: set[int] = set()
    stack: list[tuple[gs.Tensor, bool]] = [(y, False)]
    while stack:
        tensor, ready = stack.pop()
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or tensor.name == x.name or isinstance(tensor, gs.Constant):
            continue
        if ready:
            ordered.append(node)
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        stack.append((tensor, True))
        stack.extend((t, False) for t in node.inputs if t.name)
    return ordered


def traced(op_type: str, forward: Forward, operands: Sequence[int], *, count: int, note: str = "") -> None:
    """A rule whose formulas go back through ``forward(op, *operands, **attrs)``.

    Args:
        operands: those that a gradient reaches, of ``count``.
    """

    def formula(k: int) -> Callable[..., gs.Tensor | None]:
        def back(op: Emitter, g: Any, y: Any, *given: Any, **attrs: Any) -> gs.Tensor | None:
            operands, x = told_apart(op, given, k)
            # Places in an image, and their number, are beyond what half precision can tell apart.
            y = forward(op, *(None if t is None else op.widened(t) for t in operands), **attrs)
            return through(op, y, x, op.cast(g, op.dtype(y)))

        return back

    table.defvjp(op_type, *(formula(k) if k in operands else None for k in range(count)), note=note)
