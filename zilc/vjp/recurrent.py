"""Recurrent cells, one time step of RNN, LSTM and GRU each, in operators that have rules of their own.

The equations are those of ONNX's operators: gates in the order i, o, f, c (LSTM) and z, r, h (GRU), parameters
[directions, gates x hidden, ...], biases W's then R's.  Where the specification is silent, onnxruntime's kernels
decide: alphas and betas are taken, over both directions, by those activations that have any; ``clip`` bounds what
goes into f and g, not what goes into h; past its length a sequence gives zeros and keeps its state, and a sequence of
length 0 ends in zeros.  An alpha or beta that is not given is that of the ONNX operator of the same name, as the
specification says; onnxruntime's kernels take 0 for those of ThresholdedRelu, Affine and ScaledTanh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc import ir
from zilc.emit import Emitter
from zilc.graph import is_standard

#: State of a cell: h, and c of an LSTM; None is zero.
State = tuple[gs.Tensor | None, ...]

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_DEFAULT = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
#: Default alpha and beta of the activations that have them; None: it has none.  Attributes are float32.
_ARGUMENTS: dict[str, tuple[float | None, float | None]] = {
    "affine": (1.0, 0.0),
    "elu": (1.0, None),
    "hardsigmoid": (float(np.float32(0.2)), 0.5),
    "leakyrelu": (float(np.float32(0.01)), None),
    "scaledtanh": (1.0, 1.0),
    "thresholdedrelu": (1.0, None),
}


@dataclass(frozen=True)
class Activation:
    """An elementwise function of ONNX's list for recurrent operators."""

    name: str
    alpha: float | None = None
    beta: float | None = None

    def __call__(self, op: Emitter, x: gs.Tensor) -> gs.Tensor:
        match self.name:
            case "affine":
                return op.Add(op.Mul(x, self.alpha), self.beta)
            case "elu":
                return op.Elu(x, alpha=self.alpha)
            case "hardsigmoid":
                return op.HardSigmoid(x, alpha=self.alpha, beta=self.beta)
            case "leakyrelu":
                return op.LeakyRelu(x, alpha=self.alpha)
            case "relu":
                return op.Relu(x)
            case "scaledtanh":
                return op.Mul(op.Tanh(op.Mul(x, self.beta)), self.alpha)
            case "sigmoid":
                return op.Sigmoid(x)
            case "softplus":
                return op.Softplus(x)
            case "softsign":
                return op.Softsign(x)
            case "thresholdedrelu":
                return op.ThresholdedRelu(x, alpha=self.alpha)
        return op.Tanh(x)


_NAMES = frozenset({*_ARGUMENTS, "relu", "sigmoid", "softplus", "softsign", "tanh"})


#: Whether each direction goes from the last time step to the first.
_WAYS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}


@dataclass(frozen=True)
class Direction:
    """One direction of a recurrent operator.

    Attributes:
        index: its place on the axis of directions.
        reverse: from the last time step to the first.
    """

    index: int
    reverse: bool
    activations: tuple[Activation, ...]


@dataclass(frozen=True)
class Recurrence:
    """A recurrent operator's attributes, settled."""

    kind: str
    hidden: int
    directions: tuple[Direction, ...]
    clip: float | None
    batch_first: bool
    input_forget: bool
    linear_before_reset: bool

    @property
    def gates(self) -> int:
        return GATES[self.kind]

    @property
    def states(self) -> int:
        return 2 if self.kind == "LSTM" else 1


def recurrence(kind: str, attrs: dict[str, Any], operands: Sequence[gs.Tensor | None]) -> Recurrence | None:
    """What a node asks for; None if its hidden size or an activation is unknown."""
    hidden = attrs.get("hidden_size") or _hidden(kind, operands)
    ways = _WAYS[attrs.get("direction") or "forward"]
    given = list(attrs.get("activations") or _DEFAULT[kind] * len(ways))[: len(_DEFAULT[kind]) * len(ways)]
    names = [(name.decode() if isinstance(name, bytes) else name).lower() for name in given]
    if hidden is None or not _NAMES.issuperset(names) or len(names) != len(_DEFAULT[kind]) * len(ways):
        return None
    alphas, betas = iter(attrs.get("activation_alpha") or ()), iter(attrs.get("activation_beta") or ())
    made = []
    for name in names:
        alpha, beta = _ARGUMENTS.get(name, (None, None))
        made.append(
            Activation(
                name,
                None if alpha is None else float(next(alphas, alpha)),
                None if beta is None else float(next(betas, beta)),
            )
        )
    count = len(_DEFAULT[kind])
    directions = tuple(
        Direction(d, reverse, tuple(made[d * count : (d + 1) * count])) for d, reverse in enumerate(ways)
    )
    clip = attrs.get("clip")
    return Recurrence(
        kind, int(hidden), directions,
        clip=float(clip) if clip else None,
        batch_first=bool(attrs.get("layout")),
        input_forget=bool(attrs.get("input_forget")),
        linear_before_reset=bool(attrs.get("linear_before_reset")),
    )  # fmt: skip


def _hidden(kind: str, operands: Sequence[gs.Tensor | None]) -> int | None:
    recurrent, weight = operands[2], operands[1]
    if recurrent is not None and recurrent.shape is not None and isinstance(recurrent.shape[-1], int):
        return recurrent.shape[-1]
    if weight is not None and weight.shape is not None and isinstance(weight.shape[1], int):
        return weight.shape[1] // GATES[kind]
    return None


# -- parameters of one direction --


def slot(op: Emitter, x: gs.Tensor, direction: Direction, count: int, axis: int = 0) -> gs.Tensor:
    """``x`` without its axis of directions."""
    if count == 1:
        return op.Squeeze(x, [axis])
    return op.Squeeze(op.Split(x, axis=axis, num_outputs=count, outputs=count)[direction.index], [axis])


@dataclass(frozen=True)
class Parameters:
    """What a cell reads beside its projected input.

    Attributes:
        recurrent: R [gates x hidden, hidden].
        bias: R's bias [gates x hidden], where it cannot be added to the projection.
        peepholes: P of the gates i, o, f [hidden] each.
    """

    recurrent: gs.Tensor
    bias: gs.Tensor | None = None
    peepholes: tuple[gs.Tensor, ...] = ()


def biases(
    op: Emitter, cell: Recurrence, direction: Direction, bias: gs.Tensor | None
) -> tuple[gs.Tensor | None, gs.Tensor | None]:
    """The bias of the projection and what is left for the recurrent part: B is W's bias, then R's."""
    if bias is None:
        return None, None
    ours = slot(op, bias, direction, len(cell.directions))
    of_input, of_state = op.Split(ours, axis=0, num_outputs=2, outputs=2)
    if cell.kind == "GRU" and cell.linear_before_reset:
        return of_input, of_state
    return op.Add(of_input, of_state), None


def peepholes(
    op: Emitter, cell: Recurrence, direction: Direction, p: gs.Tensor | None
) -> tuple[gs.Tensor, ...]:
    """P of the gates i, o and f; empty where the operator has none."""
    if p is None:
        return ()
    return op.Split(slot(op, p, direction, len(cell.directions)), axis=0, num_outputs=3, outputs=3)


# -- one time step --


def step(
    op: Emitter, cell: Recurrence, direction: Direction, projected: gs.Tensor, state: State, given: Parameters
) -> tuple[gs.Tensor, ...]:
    """The state after one time step.

    Args:
        projected: X_t W^T and its bias, [N, gates x hidden].
        state: before the step, [N, hidden] each.
    """
    return _STEPS[cell.kind](op, cell, direction.activations, projected, state, given)


def _rnn(
    op: Emitter, cell: Recurrence, f: Sequence[Activation], projected: gs.Tensor, state: State, given: Parameters
) -> tuple[gs.Tensor, ...]:
    """H = f(X W^T + H' R^T + b)."""
    return (f[0](op, _clip(op, cell, _product(op, state[0], given.recurrent, projected))),)


def _lstm(
    op: Emitter, cell: Recurrence, f: Sequence[Activation], projected: gs.Tensor, state: State, given: Parameters
) -> tuple[gs.Tensor, ...]:
    """C = f C' + i c,  H = o h(C); with input_forget, f = 1 - i."""
    before, memory = state
    hidden = cell.hidden
    sums = _product(op, before, given.recurrent, projected)
    if given.peepholes:
        look_i, look_o, look_f = given.peepholes
        sum_i, sum_o, sum_f, sum_c = op.Split(sums, axis=1, num_outputs=4, outputs=4)
        if memory is not None:
            sum_i = op.Add(sum_i, op.Mul(look_i, memory))
            sum_f = op.Add(sum_f, op.Mul(look_f, memory))
        i, forget = (f[0](op, _clip(op, cell, x)) for x in (sum_i, sum_f))
    else:
        gates, sum_c = op.Split(sums, [3 * hidden, hidden], axis=1, outputs=2)
        i, o, forget = op.Split(f[0](op, _clip(op, cell, gates)), axis=1, num_outputs=3, outputs=3)
    candidate = f[1](op, _clip(op, cell, sum_c))
    if memory is None:
        memory = op.Mul(i, candidate)
    elif cell.input_forget:
        memory = op.Add(memory, op.Mul(i, op.Sub(candidate, memory)))
    else:
        memory = op.Add(op.Mul(forget, memory), op.Mul(i, candidate))
    if given.peepholes:
        o = f[0](op, _clip(op, cell, op.Add(sum_o, op.Mul(look_o, memory))))
    return op.Mul(o, f[2](op, memory)), memory


def _gru(
    op: Emitter, cell: Recurrence, f: Sequence[Activation], projected: gs.Tensor, state: State, given: Parameters
) -> tuple[gs.Tensor, ...]:
    """H = (1 - z) h + z H' = h + z (H' - h)."""
    (before,) = state
    two = [2 * cell.hidden, cell.hidden]
    gates, sum_h = op.Split(projected, two, axis=1, outputs=2)
    if cell.linear_before_reset:
        # The reset gate scales H' R^T + b, so that R is one product.
        inner = given.bias if before is None else _product(op, before, given.recurrent, given.bias)
        if inner is not None:
            inner_gates, inner_h = op.Split(inner, two, axis=-1, outputs=2)
            gates = op.Add(gates, inner_gates)
        z, r = op.Split(f[0](op, _clip(op, cell, gates)), axis=1, num_outputs=2, outputs=2)
        if inner is not None:
            sum_h = op.Add(sum_h, op.Mul(r, inner_h))
    else:
        of_gates, of_h = op.Split(given.recurrent, two, axis=0, outputs=2)
        gates = _product(op, before, of_gates, gates)
        z, r = op.Split(f[0](op, _clip(op, cell, gates)), axis=1, num_outputs=2, outputs=2)
        if before is not None:
            sum_h = op.Gemm(op.Mul(r, before), of_h, sum_h, transB=1)
    h = f[1](op, _clip(op, cell, sum_h))
    if before is None:
        return (op.Sub(h, op.Mul(z, h)),)
    return (op.Add(h, op.Mul(z, op.Sub(before, h))),)


_STEPS = {"RNN": _rnn, "LSTM": _lstm, "GRU": _gru}


def _product(op: Emitter, state: gs.Tensor | None, matrix: gs.Tensor, more: gs.Tensor | None) -> Any:
    """state matrix^T + more; a state of None is zero."""
    return more if state is None else op.Gemm(state, matrix, more, transB=1)


def _clip(op: Emitter, cell: Recurrence, x: gs.Tensor) -> gs.Tensor:
    return x if cell.clip is None else op.Clip(x, -cell.clip, cell.clip)


# -- sequences of different lengths --


def held(op: Emitter, mask: gs.Tensor, after: State, before: State) -> State:
    """Past its length a sequence keeps its state."""
    return tuple(op.Where(mask, new, 0.0 if old is None else old) for new, old in zip(after, before, strict=True))


def ended(op: Emitter, state: State, lengths: gs.Tensor | None) -> State:
    """The final state: zero for sequences of length 0, which never began."""
    known = op.value(lengths) if lengths is not None else np.ones(1)
    if lengths is None or (known is not None and bool((known > 0).all())):
        return state
    began = op.Unsqueeze(op.Greater(lengths, op.constant(np.asarray(0, np.int32))), [1])
    return tuple(op.Where(began, x, 0.0) for x in state)


# -- facts about operands --


def is_zero(tensor: gs.Tensor | None) -> bool:
    """Whether an initial state is absent, or zeros that were only moved or expanded."""
    while tensor is not None and tensor.name:
        if isinstance(tensor, gs.Constant):
            held = tensor._values
            if isinstance(held, ir.FilledValues):
                return bool(held.value == 0)
            return held.nbytes < 1 << 20 and not ir.values(tensor).any()
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or not is_standard(node):
            return False
        if node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            return value is None or not ir.values(value).any()
        if node.op not in _MOVES:
            return False
        tensor = node.inputs[0]
    return True


_MOVES = frozenset({"Expand", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Tile", "Identity", "Cast"})
