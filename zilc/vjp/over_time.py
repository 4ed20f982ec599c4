"""Rules of RNN, LSTM and GRU as one vertex: for lengths that are long, or known only at run time.

The operator is written as a Scan over time, and the cotangents go back through that Scan by its own rule.  What an
iteration began with is therefore computed once more, and kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.vjp import table
from zilc.vjp.inner import between, finish, reverse
from zilc.vjp.recurrent import (
    GATES,
    Direction,
    Parameters,
    Recurrence,
    State,
    biases,
    ended,
    held,
    peepholes,
    recurrence,
    slot,
    step,
)


def _whole(op: Emitter, node: gs.Node, cotangents: list[gs.Tensor | None]) -> dict[int, gs.Tensor]:
    operands: list[gs.Tensor | None] = []
    for tensor in node.inputs:
        # One tensor in two places is two operands, each with a cotangent of its own.
        while tensor.name and any(t is not None and t.name == tensor.name for t in operands):
            tensor = op.Identity(tensor)
        operands.append(tensor if tensor.name else None)
    attrs = table.attributes(node, op.graph.opset)
    cell = recurrence(node.op, attrs, [*operands, *[None] * (8 - len(operands))])
    assert cell is not None, "a recurrence without a rule is reported before emission starts"
    outputs = scanned(op, cell, [*operands, *[None] * (8 - len(operands))])
    given = {t.name: g for t, g in zip(outputs, cotangents, strict=False) if g is not None}
    names = {k: t.name for k, t in enumerate(operands) if t is not None and k != 4}
    boundary = [t.name for t in operands if t is not None]
    nodes = between([t for t in outputs if t.name in given], boundary)
    found = reverse(op, nodes, given, names.values())
    return {k: found[name] for k, name in names.items() if name in found}


def scanned(op: Emitter, cell: Recurrence, operands: list[Any]) -> list[gs.Tensor]:
    """Y, Y_h and, of an LSTM, Y_c: one Scan a direction."""
    x, w, r, b, lengths, initial_h, initial_c, p = operands
    count = len(cell.directions)
    x = op.Transpose(x, perm=[1, 0, 2]) if cell.batch_first else x
    reached = None
    if lengths is not None:
        zero, one = (op.constant(np.asarray(n, np.int32)) for n in (0, 1))
        times = op.Range(zero, op.cast(op.Squeeze(op.dim_of(x, 0), [0]), np.int32), one)
        reached = op.Less(op.Unsqueeze(times, [1, 2]), op.Unsqueeze(lengths, [0, 2]))  # [T, N, 1]
    sequences, finals = [], []
    for direction in cell.directions:
        of_input, of_state = biases(op, cell, direction, b)
        projected = op.MatMul(x, op.Transpose(slot(op, w, direction, count), perm=[1, 0]))  # [T, N, gates x hidden]
        projected = projected if of_input is None else op.Add(projected, of_input)
        given = Parameters(slot(op, r, direction, count), of_state, peepholes(op, cell, direction, p))
        start = _start(op, cell, direction, x, (initial_h, initial_c)[: cell.states])
        sequence, *states = _scan(op, cell, direction, projected, reached, start, given)
        finals.append(ended(op, tuple(states), lengths))
        sequences.append(op.Unsqueeze(sequence, [1]))
    y = op.Concat(*sequences, axis=1) if count > 1 else sequences[0]
    results = [op.Transpose(y, perm=[2, 0, 1, 3]) if cell.batch_first else y]
    for k in range(cell.states):
        lasts = [op.Unsqueeze(state[k], [0]) for state in finals]
        last = op.Concat(*lasts, axis=0) if count > 1 else lasts[0]
        results.append(op.Transpose(last, perm=[1, 0, 2]) if cell.batch_first else last)
    return results


def _start(
    op: Emitter, cell: Recurrence, direction: Direction, x: gs.Tensor, given: tuple[gs.Tensor | None, ...]
) -> State:
    """Initial states, [N, hidden] each; a Scan wants zeros written out."""
    shape = op.Concat(op.dim_of(x, 1), op.constant(np.asarray([cell.hidden], np.int64)), axis=0)
    axis = 1 if cell.batch_first else 0
    return tuple(
        op.Expand(op.scalar_like(0, x), shape) if s is None else slot(op, s, direction, len(cell.directions), axis)
        for s in given
    )


def _scan(
    op: Emitter,
    cell: Recurrence,
    direction: Direction,
    projected: gs.Tensor,
    reached: gs.Tensor | None,
    start: State,
    given: Parameters,
) -> list[gs.Variable]:
    """H of all time steps [T, N, hidden], then the final states."""
    inner = op.inside()
    dims = op.dims(projected) or [None, None, None]
    batch, dtype, way = dims[1], op.dtype(projected), int(direction.reverse)

    def variable(name: str, shape: list[Any], kind: Any = dtype) -> gs.Variable:
        return gs.Variable(inner.fresh(f"{op.prefix}/{name}"), kind, shape)

    before = tuple(variable(name, [batch, cell.hidden]) for name in ("h", "c")[: cell.states])
    x = variable("x", [batch, cell.gates * cell.hidden])
    here = variable("reached", [batch, 1], np.dtype(bool)) if reached is not None else None
    after: State = step(inner, cell, direction, x, before, given)
    sequence = after[0]
    if here is not None:
        sequence = inner.Where(here, sequence, 0.0)
        after = held(inner, here, after, before)
    inputs = [*before, x] if here is None else [*before, x, here]
    body = finish(inner, inputs, [*after, sequence], "step")
    scans = [projected] if reached is None else [projected, reached]
    *states, all_steps = op.Scan(
        *start, *scans, outputs=cell.states + 1, body=body, num_scan_inputs=len(scans),
        scan_input_directions=[way] * len(scans), scan_output_directions=[way],
    )  # fmt: skip
    for state in states:
        state.shape = [batch, cell.hidden]
    all_steps.shape = [dims[0], batch, cell.hidden]
    return [all_steps, *states]


for _kind in GATES:
    table.defwhole(_kind, _whole, note="unrolled where the length is known; else a Scan in reverse")
