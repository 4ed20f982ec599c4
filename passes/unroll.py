"""Unrolling: recurrences whose length is known become one group of vertices a time step, before levels are found.

A parameter that is shared over time is then one leaf with many consumers.  Of a recurrent operator these are R, and
the initial states; W and the biases that need not be inside are applied to all time steps in one product of
[T x N, input] rows, which is split by time step: they have one consumer, and their gradient is one product too.

What is too long, or of a length known only at run time, stays one vertex: the operator itself, or a Scan over time
where onnxruntime has no kernel for it (of float32 with time first it has one, and of nothing else).

The operators compute the same function as the fused one with other roundings: outputs agree to a few units in the
last place (times the number of steps, at worst), not in bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.errors import describe_vertex
from zilc.graph import Rebuild, captured, is_standard
from zilc.vjp import table
from zilc.vjp.over_time import scanned
from zilc.vjp.recurrent import (
    GATES,
    Direction,
    Parameters,
    Recurrence,
    State,
    biases,
    ended,
    held,
    is_zero,
    peepholes,
    recurrence,
    slot,
    step,
)

#: A recurrence over more time steps than this stays one vertex: identities grow with the square of their number.
LIMIT = 128


def unroll(graph: gs.Graph, notes: list[str], *, limit: int = LIMIT) -> gs.Graph:
    """Recurrent operators of known length, written out.

    Args:
        notes: receives a line on each recurrent operator.
        limit: the longest sequence to unroll.
    """
    if not any(node.op in GATES and is_standard(node) for node in graph.nodes):
        return graph
    rebuild = Rebuild(graph)
    shell = gs.Graph(nodes=rebuild.nodes, opset=graph.opset)
    names = Emitter(graph).names
    for node in graph.nodes:
        if node.op not in GATES or not is_standard(node):
            rebuild.add(node)
            continue
        states = (5,) if node.op != "LSTM" else (5, 6)
        zero = [k for k in states if k < len(node.inputs) and node.inputs[k].name and is_zero(node.inputs[k])]
        inputs = [gs.Variable.empty() if k in zero else rebuild.tensor(t) for k, t in enumerate(node.inputs)]
        operands = [t if t.name else None for t in inputs]
        operands += [None] * (8 - len(operands))
        cell = recurrence(node.op, table.attributes(node, graph.opset), operands)
        steps = _steps(operands[0], cell)
        label = describe_vertex(node.name or node.outputs[0].name, node.op)
        op, first = Emitter(shell, names), len(rebuild.nodes)
        if cell is not None and steps is not None and 0 < steps <= limit:
            results = _write_out(op, node, cell, operands, steps)
            said = (
                f"is unrolled over {steps} time step{'s' if steps > 1 else ''}: its outputs agree with the operator's "
                "to rounding, not in bits"
            )
        elif cell is not None and (cell.batch_first or inputs[0].dtype != np.float32):
            with op.place(node.name or node.outputs[0].name):
                results = scanned(op, cell, operands)
            said = f"is a Scan, one vertex: {_why(cell, steps, limit)}"
        else:
            rebuild.add(node, inputs)
            notes.append(f"{label} is one vertex: {_why(cell, steps, limit)}")
            continue
        names = op.names
        for old, made in zip(node.outputs, results, strict=False):
            if old.name:
                made.name = old.name
                made.shape = list(old.shape) if old.shape is not None else op.dims(made)
                rebuild.tensors[old.name] = made
        _drop_unread(rebuild, first, {t.name for t in node.outputs if t.name})
        settle_shapes(op, rebuild.nodes[first:])
        notes.append(f"{label} {said}")
        if any(isinstance(node.inputs[k], gs.Constant) for k in zero):
            notes.append(f"{label} starts from zeros, which are not trained")
    return rebuild.finish()


def _steps(x: gs.Tensor | None, cell: Recurrence | None) -> int | None:
    if x is None or cell is None or x.shape is None or len(x.shape) != 3:
        return None
    length = x.shape[1 if cell.batch_first else 0]
    return int(length) if isinstance(length, (int, np.integer)) else None


def _why(cell: Recurrence | None, steps: int | None, limit: int) -> str:
    if cell is None:
        return "its attributes leave its equations open"
    if steps is None:
        return "the number of time steps is not known (--dim NAME=SIZE settles a symbolic dimension)"
    return f"{steps} time steps are more than {limit}" if steps else "it has no time steps"


def _drop_unread(rebuild: Rebuild, first: int, wanted: set[str]) -> None:
    """Of the nodes from ``first`` on, drop those behind outputs that the operator was not asked for."""
    kept = []
    for node in reversed(rebuild.nodes[first:]):
        if any(t.name in wanted for t in node.outputs):
            kept.append(node)
            wanted.update(t.name for t in (*node.inputs, *captured(node)) if t.name)
    rebuild.nodes[first:] = reversed(kept)


def settle_shapes(op: Emitter, nodes: Sequence[gs.Node]) -> None:
    """Shapes of what was emitted: levels and reports ask for them."""
    for node in nodes:
        for tensor in node.outputs:
            if tensor.name and tensor.shape is None:
                op.dims(tensor)


def _write_out(
    op: Emitter, node: gs.Node, cell: Recurrence, operands: Sequence[gs.Tensor | None], steps: int
) -> list[gs.Variable]:
    """The operator's outputs, by one group of vertices a time step."""
    name = node.name or next(t.name for t in node.outputs if t.name)
    x, w, r, b, lengths, initial_h, initial_c, p = operands
    count = len(cell.directions)
    wanted = [k < len(node.outputs) and bool(node.outputs[k].name) for k in range(3)]
    with op.place(name):
        rows = _rows(op, cell, x, w)
        masks = _masks(op, lengths, steps)
    finals: list[State] = []
    sequences: list[gs.Tensor] = []
    for direction in cell.directions:
        way = f"{name}/reverse" if direction.reverse else name
        with op.place(way):
            of_input, of_state = biases(op, cell, direction, b)
            projected = op.Gemm(rows, slot(op, w, direction, count), of_input, transB=1)  # [T x N, gates x hidden]
            inputs = op.Split(projected, axis=0, num_outputs=steps, outputs=steps) if steps > 1 else (projected,)
            looks = peepholes(op, cell, direction, p)
            state = _initial(op, cell, direction, (initial_h, initial_c)[: cell.states])
            if steps == 1 and state[0] is None:
                # Nothing else would read R, which can be trained, though its gradient is zero.
                rows_and_hidden = op.Concat(op.dim_of(rows, 0), [cell.hidden], axis=0)
                state = (op.Expand(op.scalar_like(0, rows), rows_and_hidden), *state[1:])
            shared = slot(op, r, direction, count) if count > 1 else None
        seen: dict[int, gs.Tensor] = {}
        for t in reversed(range(steps)) if direction.reverse else range(steps):
            op.forget()
            with op.place(f"{way}/t{t + 1}"):
                # One direction: every time step reads R itself.
                matrix = shared if shared is not None else op.Squeeze(r, [0])
                after = step(op, cell, direction, inputs[t], state, Parameters(matrix, of_state, looks))
                state = after if masks is None else held(op, masks[t], after, state)
                seen[t] = state[0]
        with op.place(way):
            finals.append(ended(op, state, lengths))
        if wanted[0]:
            with op.place(way):
                sequences.append(_sequence(op, [seen[t] for t in range(steps)], cell, steps, lengths))
    with op.place(name):
        results: list[gs.Variable] = []
        for k in range(3):
            if not wanted[k]:
                results.append(gs.Variable.empty())
            elif k == 0:
                y = op.Concat(*sequences, axis=1) if count > 1 else sequences[0]  # [T, directions, N, hidden]
                results.append(op.Transpose(y, perm=[2, 0, 1, 3]) if cell.batch_first else y)
            else:
                lasts = [op.Unsqueeze(state[k - 1], [0]) for state in finals]
                last = op.Concat(*lasts, axis=0) if count > 1 else lasts[0]  # [directions, N, hidden]
                results.append(op.Transpose(last, perm=[1, 0, 2]) if cell.batch_first else last)
    return results


def _rows(op: Emitter, cell: Recurrence, x: gs.Tensor, w: gs.Tensor) -> gs.Tensor:
    """X as [T x N, input], time by time."""
    time_first = op.Transpose(x, perm=[1, 0, 2]) if cell.batch_first else x
    width = next((t.shape[2] for t in (x, w) if t.shape is not None and isinstance(t.shape[2], int)), None)
    if width is not None:
        return op.Reshape(time_first, [-1, int(width)])
    return op.Reshape(time_first, op.Concat([-1], op.dim_of(x, 2), axis=0))


def _initial(op: Emitter, cell: Recurrence, direction: Direction, given: Sequence[gs.Tensor | None]) -> State:
    axis = 1 if cell.batch_first else 0
    return tuple(None if x is None else slot(op, x, direction, len(cell.directions), axis) for x in given)


def _masks(op: Emitter, lengths: gs.Tensor | None, steps: int) -> tuple[gs.Tensor, ...] | None:
    """For each time step, which sequences of the batch reach it, [N, 1]; None where all are of full length."""
    if lengths is None:
        return None
    known = op.value(lengths)
    if known is not None and bool((known >= steps).all()):
        return None
    masks = _within(op, lengths, steps)
    return op.Split(masks, axis=0, num_outputs=steps, outputs=steps) if steps > 1 else (masks,)


def _within(op: Emitter, lengths: gs.Tensor, steps: int) -> gs.Tensor:
    """t < length for all time steps and sequences, [T x N, 1]."""
    times = op.constant(np.arange(steps, dtype=np.int32).reshape(-1, 1))
    return op.Reshape(op.Less(times, op.Unsqueeze(lengths, [0])), [-1, 1])


def _sequence(
    op: Emitter, states: Sequence[gs.Tensor], cell: Recurrence, steps: int, lengths: gs.Tensor | None
) -> gs.Tensor:
    """H of all time steps, [T, 1, N, hidden], zero past a sequence's length."""
    rows = op.Concat(*states, axis=0) if steps > 1 else states[0]
    if lengths is not None:
        known = op.value(lengths)
        if known is None or not bool((known >= steps).all()):
            rows = op.Where(_within(op, lengths, steps), rows, 0.0)
    batch = op.dims(states[0])
    size = batch[0] if batch and isinstance(batch[0], int) else -1
    return op.Reshape(rows, [steps, 1, size, cell.hidden])


