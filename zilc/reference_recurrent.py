"""Operators that go through time, for ONNX's reference evaluator: RNN, LSTM, GRU, Scan and Loop, all of each.

The evaluator's own RNN, LSTM and GRU know no activations but the usual ones, and leave sequence_lens, clip and
input_forget aside; its Scan goes forwards along first axes alone; its Loop stacks matrices along their own first axis,
and wants a condition.  Written loop by loop from the operators' equations, with nothing of zilc.vjp.recurrent in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_loop import Loop as PlainLoop
from onnx.reference.ops.op_scan import Scan as PlainScan

Array = np.ndarray
Function = Callable[[Array], Array]


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _function(name: str, alphas: Iterator[float], betas: Iterator[float]) -> Function:
    """One activation; alphas and betas go to the functions that have them, in their order."""
    match name.lower():
        case "relu":
            return lambda x: np.maximum(x, 0)
        case "tanh":
            return np.tanh
        case "sigmoid":
            return _sigmoid
        case "softsign":
            return lambda x: x / (1 + np.abs(x))
        case "softplus":
            return lambda x: np.logaddexp(0, x)
        case "affine":
            a, b = next(alphas, 1.0), next(betas, 0.0)
            return lambda x: a * x + b
        case "leakyrelu":
            a = next(alphas, float(np.float32(0.01)))
            return lambda x: np.where(x >= 0, x, a * x)
        case "thresholdedrelu":
            a = next(alphas, 1.0)
            return lambda x: np.where(x > a, x, 0)
        case "scaledtanh":
            a, b = next(alphas, 1.0), next(betas, 1.0)
            return lambda x: a * np.tanh(b * x)
        case "hardsigmoid":
            a, b = next(alphas, float(np.float32(0.2))), next(betas, 0.5)
            return lambda x: np.clip(a * x + b, 0, 1)
        case "elu":
            a = next(alphas, 1.0)
            return lambda x: np.where(x >= 0, x, a * np.expm1(np.minimum(x, 0)))
    raise RuntimeError(f"no activation {name!r}")


class _Recurrent(OpRun):
    op_domain = ""
    usual: tuple[str, ...] = ()
    states = 1

    def _run(
        self, x: Array, w: Array, r: Array, b: Array | None = None, lengths: Array | None = None,
        *more: Array | None, activation_alpha: Sequence[float] | None = None,
        activation_beta: Sequence[float] | None = None, activations: Sequence[str] | None = None,
        clip: float | None = None, direction: str | None = None, hidden_size: int | None = None,
        layout: int | None = None, **kind: Any,
    ) -> tuple[Array, ...]:  # fmt: skip
        if layout:
            x = x.swapaxes(0, 1)
        steps, batch, _ = x.shape
        ways = {"forward": [1], "reverse": [-1], "bidirectional": [1, -1]}[direction or "forward"]
        alphas, betas = iter(activation_alpha or ()), iter(activation_beta or ())
        names = list(activations or self.usual * len(ways))[: len(self.usual) * len(ways)]
        functions = [_function(name, alphas, betas) for name in names]
        self.kind, self.bound = kind, clip
        self.peepholes = more[2] if len(more) > 2 else None
        hidden = r.shape[-1]
        y = np.zeros((steps, len(ways), batch, hidden), x.dtype)
        finals = [np.zeros((len(ways), batch, hidden), x.dtype) for _ in range(self.states)]
        lengths = np.full(batch, steps) if lengths is None else lengths
        for d, way in enumerate(ways):
            f = functions[d * len(self.usual) : (d + 1) * len(self.usual)]
            for n in range(batch):
                state = []
                for k in range(self.states):
                    given = more[k] if k < len(more) else None
                    first = np.zeros(hidden, x.dtype) if given is None else (given[n, d] if layout else given[d, n])
                    state.append(first)
                for t in range(int(lengths[n]))[::way]:
                    bias = np.zeros(2 * w.shape[1], x.dtype) if b is None else b[d]
                    of_input, of_state = np.split(bias, 2)
                    state = self._step(x[t, n], w[d], r[d], of_input, of_state, state, f, d)
                    y[t, d, n] = state[0]
                for k in range(self.states if lengths[n] else 0):
                    finals[k][d, n] = state[k]
        if layout:
            y, finals = y.transpose(2, 0, 1, 3), [s.swapaxes(0, 1) for s in finals]
        return (y, *finals)[: max(1, len(self.onnx_node.output))]

    def _step(
        self, x: Array, w: Array, r: Array, wb: Array, rb: Array, state: list[Array], f: Sequence[Function], d: int
    ) -> list[Array]:
        raise TypeError("abstract")

    def _bounded(self, x: Array) -> Array:
        return np.clip(x, -self.bound, self.bound) if self.bound else x


class RNN(_Recurrent):
    """H = f(W X + R H' + b)."""

    usual = ("Tanh",)

    def _step(
        self, x: Array, w: Array, r: Array, wb: Array, rb: Array, state: list[Array], f: Sequence[Function], d: int
    ) -> list[Array]:
        return [f[0](self._bounded(w @ x + r @ state[0] + wb + rb))]


class GRU(_Recurrent):
    """Gates z, r, h."""

    usual = ("Sigmoid", "Tanh")

    def _step(
        self, x: Array, w: Array, r: Array, wb: Array, rb: Array, state: list[Array], f: Sequence[Function], d: int
    ) -> list[Array]:
        (h,) = state
        wz, wr, wh = np.split(w @ x + wb, 3)
        rz, rr, rh = np.split(r, 3)
        bz, br, bh = np.split(rb, 3)
        z = f[0](self._bounded(wz + rz @ h + bz))
        reset = f[0](self._bounded(wr + rr @ h + br))
        inner = reset * (rh @ h + bh) if self.kind.get("linear_before_reset") else rh @ (reset * h) + bh
        return [(1 - z) * f[1](self._bounded(wh + inner)) + z * h]


class LSTM(_Recurrent):
    """Gates i, o, f, c; peepholes i, o, f."""

    usual = ("Sigmoid", "Tanh", "Tanh")
    states = 2

    def _step(
        self, x: Array, w: Array, r: Array, wb: Array, rb: Array, state: list[Array], f: Sequence[Function], d: int
    ) -> list[Array]:
        h, c = state
        pi, po, pf = np.split(np.zeros(3 * len(h), x.dtype) if self.peepholes is None else self.peepholes[d], 3)
        i, o, forget, new = np.split(w @ x + r @ h + wb + rb, 4)
        i = f[0](self._bounded(i + pi * c))
        forget = 1 - i if self.kind.get("input_forget") else f[0](self._bounded(forget + pf * c))
        c = forget * c + i * f[1](self._bounded(new))
        return [f[0](self._bounded(o + po * c)) * f[2](c), c]


class Scan(PlainScan):
    """Along any axes, either way; of opset 8 too, where each sequence of a batch has its length."""

    op_domain = ""
    body: Any
    num_scan_inputs: int
    _run_body: Any

    def __init__(self, node: Any, params: Any) -> None:
        OpRun.__init__(self, node, params)

    def _run(self, *args: Array, context: Any = None, **_: Any) -> tuple[Array, ...]:
        if len(args) == len(self.body.input_names):
            return self._check_and_fix_outputs(self._one(list(args), context))
        lengths, *batches = args
        count = len(batches) - self.num_scan_inputs
        made = []
        for n, entry in enumerate(zip(*batches, strict=True)):
            steps = entry[count].shape[0] if lengths is None else int(lengths[n])
            made.append(self._one([*entry[:count], *(x[:steps] for x in entry[count:])], context))
        return self._check_and_fix_outputs(tuple(np.stack(ys) for ys in zip(*made, strict=True)))

    def _one(self, args: list[Array], context: Any) -> tuple[Array, ...]:
        scans = self.num_scan_inputs
        count = len(args) - scans
        states, xs = args[:count], args[count:]
        names = self.body.input_names
        outputs = len(self.body.output_names) - count
        axes = getattr(self, "scan_input_axes", None) or [0] * scans
        old = getattr(self, "directions", None)
        ways = getattr(self, "scan_input_directions", None) or old or [0] * scans
        steps = xs[0].shape[axes[0]]
        made: list[list[Array]] = [[] for _ in range(outputs)]
        for t in range(steps):
            slices = [
                np.take(x, steps - 1 - t if way else t, axis) for x, axis, way in zip(xs, axes, ways, strict=True)
            ]
            given = {**(context or {}), **dict(zip(names, [*states, *slices], strict=True))}
            results = self._run_body(given)
            states = results[:count]
            for into, result in zip(made, results[count:], strict=True):
                into.append(result)
        out_axes = getattr(self, "scan_output_axes", None) or [0] * outputs
        out_ways = getattr(self, "scan_output_directions", None) or [0] * outputs
        stacked = [
            np.stack(ys[::-1] if way else ys, axis) for ys, axis, way in zip(made, out_axes, out_ways, strict=True)
        ]
        return (*states, *stacked)


class Loop(PlainLoop):
    """Scan outputs are stacked along a new axis; trip count and condition may be absent."""

    op_domain = ""
    body: Any
    _run_body: Any

    def _run(self, *operands: Any, context: Any = None, **_: Any) -> Any:
        trips, cond, *values = [*operands, None][: max(2, len(operands))]
        names = self.body.input_names
        made: list[list[Array]] = [[] for _ in range(self.K)]
        going, t = True if cond is None else bool(np.all(cond)), 0
        while going and (trips is None or t < int(np.squeeze(trips))):
            given = {**(context or {}), **dict(zip(names, [np.asarray(t), np.asarray(True), *values], strict=True))}
            condition, *results = self._run_body(given)
            going, t = bool(np.all(condition)), t + 1
            values = results[: self.N]
            for into, result in zip(made, results[self.N :], strict=True):
                into.append(result)
        if t == 0 and made:
            raise RuntimeError("a Loop of no iterations has scan outputs of unknown shape")
        return self._check_and_fix_outputs((*values, *(np.stack(ys) for ys in made)))


RECURRENT: list[type[OpRun]] = [GRU, LSTM, Loop, RNN, Scan]
