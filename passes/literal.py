"""The dynamics as they stand: every value node moves in every step, in an ONNX Loop (ZIL.md, sections 4, 5 and 7).

This is the paper's Algorithm 3, mended, and with other options inference learning and the ablations.  The equations are
the terms of :mod:`zilc.passes.dynamics`, evaluated as they are; nothing is folded away.  A loop step reads the state of
step t (x, mu, eps of every vertex) and makes that of t + 1:

    dx    = gamma (eps - sum of pulls)        at x[.,t], mu[.,t]
    x'    = x + dx
    mu'   = g(x')
    eps'  = eps + (mu' - mu) - dx             the state is kept as errors

A leaf on level l keeps the pulls of step l - 1.  Levels that the wave has passed may overflow; they are left behind by
``Where``, never by a product with a mask.

A runtime may compute g in the loop by another kernel than in the forward pass, and round otherwise.  So the drift
mu' - mu is a difference of predictions that the loop made, zero to the bit where no operand has moved; a round before
step 0 makes the first ones.  What rules and losses read as mu is the forward value plus the drifts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes
from zilc.emit import Emitter
from zilc.graph import captured, copy_node, copy_subgraph
from zilc.losses import LOSSES
from zilc.passes.dynamics import Difference, Dynamics, Error, Prediction, Pull, Scaled, Sum, Term
from zilc.passes.simplify import drop_dead
from zilc.passes.tracing import Recorder, Trace, plan_trace
from zilc.passes.training import TrainingGraph
from zilc.passes.wavefront import arithmetic
from zilc.vjp import table

Tensors = dict[str, gs.Tensor]


@dataclass(frozen=True)
class Literal:
    """How the dynamics are run.

    Attributes:
        steps: T, the number of inference steps.
        update_at: ``level`` reads each leaf's gradient at step l - 1, ``end`` reads all of them at step T - 1,
            ``after`` from the errors after step T (inference learning).
        fixed_predictions: mu and the derivatives stay at their forward values (Millidge, Tschantz and Buckley 2020).
        noise: standard deviation of what is added to the initial value nodes.
    """

    steps: int
    update_at: str = "level"
    fixed_predictions: bool = False
    noise: float = 0.0


def emit_literal(
    training: TrainingGraph,
    dynamics: Dynamics,
    leaves: Sequence[str],
    how: Literal,
    *,
    full: Sequence[str] | None = None,
) -> Trace | None:
    """Emit the loop, and hand each leaf's gradient to the training graph.

    Requires: every vertex of ``dynamics.flow`` has a rule.  The graph need not be levelled.

    Args:
        full: None for no traces; else every vertex is traced, these with whole tensors.
    """
    op, level_of = training.op, dynamics.levels.leaves
    model = _Model(training, dynamics, how.fixed_predictions)
    trace = None if full is None else plan_trace(op, dynamics, model.moving, full)
    recorder = None if trace is None else Recorder(trace)
    scanned: dict[str, gs.Tensor] = {}  # output of the training graph -> what the loop stacked
    start = _start(op, model, how)
    with op.place("inference/start", vertex="inference", role="error", step=0):
        none = {name: op.zeros_like(training._tensors[name]) for name in leaves}

    loop = _Loop(op)
    inner = loop.op
    x = {name: loop.carry(f"{name}.value", start.at[name]) for name in model.moving}
    eps = {name: loop.carry(f"{name}.error", start.eps[name]) for name in model.moving}
    mu, computed = start.mu, start.computed
    if not how.fixed_predictions:
        mu = {name: loop.carry(f"{name}.prediction", t) for name, t in mu.items()}
        computed = {name: loop.carry(f"{name}.computed", t) for name, t in computed.items()}
    read_after = how.update_at == "after"
    kept = {} if read_after else {name: loop.carry(f"{name}.gradient", none[name]) for name in leaves}
    # A round before step 0 makes the first predictions: nothing moves in it.
    before = 0 if how.fixed_predictions else 1
    with inner.place("inference/round", vertex="inference", role="error"):
        stepping = inner.Greater(loop.round, inner.constant(np.asarray(0, np.int64))) if before else None

    now = model.state(inner, x, mu, eps, computed)
    if trace is not None and recorder is not None:
        error, energy = recorder.errors(inner, now.eps, now.losses)
        scanned[trace.names["error"]] = loop.scan("trace/error", error)
        scanned[trace.names["energy"]] = loop.scan("trace/energy", energy)
        for name, names in trace.tensors.items():
            scanned[names["error"]] = loop.scan(f"{name}.trace/error", now.eps[name])
            if "value" in names:
                scanned[names["value"]] = loop.scan(f"{name}.trace/value", x[name])
    for name, tensor in kept.items():
        level = level_of[name]
        with inner.place(f"{name}.gradient", vertex=name, level=level, role="update"):
            pulled = model.value(inner, dynamics.pulls(name, 0), now)
            t = level - 1 if how.update_at == "level" else how.steps - 1
            chosen = inner.Equal(loop.round, inner.constant(np.asarray(t + before, np.int64)))
            loop.hand_on(tensor, tensor if pulled is None else inner.Where(chosen, pulled, tensor))
    moved: Tensors = {}
    moves: Tensors = {}
    for name in model.moving:
        with inner.place(f"{name}.move", vertex=name, level=dynamics.level(name), role="error"):
            move = dynamics.move(name, 0)
            step = model.value(inner, move, now)
            if step is not None and stepping is not None:
                step = now.made[move] = inner.Where(stepping, step, inner.scalar_like(0, step))
            moved[name] = x[name] if step is None else inner.Add(x[name], step)
            loop.hand_on(x[name], moved[name])
            if step is not None:
                moves[name] = step
    if trace is not None and recorder is not None:
        scanned[trace.names["movement"]] = loop.scan("trace/movement", recorder.movements(inner, moves))
        for name, names in trace.tensors.items():
            if "movement" in names:
                with inner.place(f"{name}.trace", vertex=name, role="trace"):
                    whole = moves[name] if name in moves else inner.zeros_like(x[name])
                scanned[names["movement"]] = loop.scan(f"{name}.trace/movement", whole)
    following = now
    if stepping is not None:
        later = model.predict(inner, moved)
        following = replace(now, computed=later)
        read = None if read_after else loop.read()
        for name, made in later.items():
            loop.hand_on(computed[name], made)
            with inner.place(f"{name}.prediction", vertex=name, role="forward"):
                if not how.noise:
                    # The first predictions have none before them; with noise they begin with its effect.
                    now.computed[name] = inner.Where(stepping, computed[name], made)
                if read is not None and mu[name].name not in read:
                    loop.drop(mu[name])  # no rule reads it
                elif dtypes.is_float(made):
                    loop.hand_on(mu[name], inner.Add(mu[name], inner.Sub(made, now.computed[name])))
                else:
                    loop.hand_on(mu[name], made)  # indices
    for name in model.moving:
        with inner.place(f"{name}.error", vertex=name, level=dynamics.level(name), role="error"):
            error = dynamics.error(name, 1)
            # With fixed predictions mu' is mu, and the drift mu' - mu is no term.
            error = arithmetic(fixed_predictions(error)) if how.fixed_predictions else error
            result = model.value(inner, error, now, following)
            loop.hand_on(eps[name], inner.zeros_like(eps[name]) if result is None else result)
    last = loop.finish(how.steps + before)

    if read_after or trace is not None:
        end_mu = mu if how.fixed_predictions else {name: last[t.name] for name, t in mu.items() if t.name in last}
        values, errors = ({name: last[t.name] for name, t in of.items()} for of in (x, eps))
        with op.place("inference/end", vertex="inference", role="error", step=how.steps):
            end = model.state(op, values, end_mu, errors, {})
    for name in sorted(leaves, key=level_of.__getitem__):
        gradient: gs.Tensor | None
        if read_after:
            with op.place(f"{name}.gradient", vertex=name, level=level_of[name], role="update", step=how.steps):
                gradient = model.value(op, dynamics.pulls(name, 0), end)
        else:
            gradient = last[kept[name].name]
        training.gradient(name, gradient, level_of[name])
    if trace is not None and recorder is not None:
        with op.place("trace", vertex="trace", role="trace", step=how.steps):
            ends = dict(zip((trace.names["error"], trace.names["energy"]),
                            recorder.errors(op, end.eps, end.losses), strict=True))  # fmt: skip
            for name, names in trace.tensors.items():
                ends[names["error"]] = end.eps[name]
                if "value" in names:
                    ends[names["value"]] = values[name]
            like = {names[key]: model.forward[name] for name, names in trace.tensors.items() for key in names}
            for name, stacked in scanned.items():
                # The round before step 0 saw the state of step 0, and nothing moved in it.
                rows = op.Slice(stacked, [1], [how.steps + 1], [0]) if before else stacked
                if name in ends:
                    rows = op.Concat(rows, op.Unsqueeze(ends[name], [0]), axis=0)
                training.output(name, rows)
                if name in like and like[name].shape is not None:
                    rows.shape = [how.steps + (name in ends), *like[name].shape]
    return trace


def fixed_predictions(term: Term) -> Term:
    """mu[i,t] = mu[i,0] at every t: an assumption, where ``unchanged_predictions`` is a fact."""
    match term:
        case Prediction(tensor, _):
            return Prediction(tensor, 0)
        case Sum(terms):
            return Sum(tuple(map(fixed_predictions, terms)))
        case Difference(a, b):
            return Difference(fixed_predictions(a), fixed_predictions(b))
        case Scaled(gamma, inner):
            return Scaled(gamma, fixed_predictions(inner))
    return term


@dataclass(frozen=True)
class _State:
    """One step's state as tensors.

    Attributes:
        at: operands at which derivatives are taken: value nodes, leaves.
        mu: predictions as rules and losses read them, optional outputs of vertices among them.
        eps: prediction errors; what is absent is zero.
        computed: predictions as this step computed them, which a drift is the difference of.
        losses: the loss of each clamped output.
        made: values of terms at this state, so that each is built once.
    """

    at: Tensors
    mu: Tensors
    eps: Tensors
    computed: Tensors = field(default_factory=dict)
    losses: Tensors = field(default_factory=dict)
    made: dict[Term, gs.Tensor | None] = field(default_factory=dict)
    views: dict[int, _View] = field(default_factory=dict)


@dataclass(frozen=True)
class _View:
    """A vertex at a state, as VJP rules read it: operands are value nodes, outputs are predictions."""

    op: str
    name: str
    domain: str | None
    attrs: dict[str, Any]
    inputs: list[gs.Tensor]
    outputs: list[gs.Tensor]

    def subgraphs(self) -> list[gs.Graph]:
        """Those of a control-flow operator."""
        return [value for value in self.attrs.values() if isinstance(value, gs.Graph)]


class _Model:
    """The vertices, and what their tensors are worth in the forward pass."""

    def __init__(self, training: TrainingGraph, dynamics: Dynamics, fixed: bool) -> None:
        self.training, self.dynamics, self.fixed = training, dynamics, fixed
        self.flow = dynamics.flow
        made = [t.name for node in self.flow.vertices for t in node.outputs if t.name]
        #: Value nodes that move: neither clamped nor outputs that no vertex reads.
        self.moving = [n for n in made if n in self.flow.readers and n not in dynamics.clamped]
        self.forward = self._forward()
        #: Operands with a derivative.  The others stay at their forward values, though their vertex may move.
        self._edges = {(e.consumer, e.operand) for e in self.flow.edges}

    def _forward(self) -> Tensors:
        """mu[.,0]; an identity vertex holds what it delays."""
        made = {t.name: t for node in self.training.graph.nodes for t in node.outputs if t.name}
        found: Tensors = {}
        for node in self.flow.vertices:
            for tensor in node.outputs:
                if tensor.name in made:
                    found[tensor.name] = made[tensor.name]
                elif tensor.name:
                    source = node.inputs[0].name
                    found[tensor.name] = found.get(source) or self.training._tensors[source]
        return found

    def operands(self, vertex: int, at: Mapping[str, gs.Tensor]) -> tuple[list[gs.Tensor], dict[str, Any]]:
        """Operands of a vertex at a state, and its attributes, whose subgraphs read that state too."""
        node = self.flow.vertices[vertex]

        def worth(k: int, tensor: gs.Tensor) -> gs.Tensor:
            if not tensor.name:
                return gs.Variable.empty()
            known = at if (vertex, k) in self._edges else self.forward
            return known[tensor.name] if tensor.name in known else self.training._tensors[tensor.name]

        inputs = [worth(k, tensor) for k, tensor in enumerate(node.inputs)]
        attrs = dict(node.attrs)
        if any(isinstance(value, gs.Graph) for value in attrs.values()):
            outer = {t.name: worth(len(inputs) + k, t) for k, t in enumerate(captured(node))}
            for key, value in attrs.items():
                if isinstance(value, gs.Graph):
                    attrs[key] = copy_subgraph(value, outer)
                    _rename(self.training.op, attrs[key])
        return inputs, attrs

    def predict(self, op: Emitter, x: Mapping[str, gs.Tensor]) -> Tensors:
        """mu = g(x) of every vertex, by the vertices' own operators."""
        made: Tensors = {}
        for index, node in enumerate(self.flow.vertices):
            outputs = []
            for tensor in node.outputs:
                out = gs.Variable.empty()
                if tensor.name:
                    like = self.forward[tensor.name]
                    out = gs.Variable(op.fresh(f"{tensor.name}.next"), op.dtype(like), like.shape)
                    made[tensor.name] = out
                outputs.append(out)
            inputs, attrs = self.operands(index, x)
            copied = copy_node(node, inputs, outputs)
            copied.attrs = attrs
            copied.name = op.fresh(f"inference/{self.flow.names[index]}")
            copied.metadata = {"zilc.vertex": self.flow.names[index], "zilc.role": "forward"}
            op.graph.nodes.append(copied)
        return made

    def state(self, op: Emitter, x: Tensors, mu: Tensors, eps: Tensors, computed: Tensors) -> _State:
        """A state with the errors of the clamped outputs: eps_out = dL/dmu_out at the prediction of this step."""
        clamped, losses = dict(self.training.clamped), dict(self.training.losses)
        if not self.fixed:
            with op.place("inference/clamp", vertex="inference", level=0, role="error"):
                for c in self.training.clamps:
                    target = self.training.target_of(c)
                    made = LOSSES[c.loss].evaluate(op, mu[c.tensor], target, c.class_axis)
                    losses[c.tensor], clamped[c.tensor] = made
        return _State(self.forward if self.fixed else x, mu, {**eps, **clamped}, computed, losses)

    def value(self, op: Emitter, term: Term, *states: _State) -> gs.Tensor | None:
        """A term as a tensor, its step t being the t-th of ``states``; None stands for zero."""
        made = states[0].made
        if term not in made:
            made[term] = self._value(op, term, states)
        return made[term]

    def _value(self, op: Emitter, term: Term, states: tuple[_State, ...]) -> gs.Tensor | None:
        match term:
            case Error(tensor, t):
                return states[t].eps.get(tensor)
            case Prediction(tensor, t):
                return states[t].computed[tensor]
            case Pull(edge, t):
                arriving = [states[t].eps.get(out.name) for out in self.flow.vertices[edge.consumer].outputs]
                if all(g is None for g in arriving):
                    return None
                return table.vjp(op, self._view(edge.consumer, states[t]), edge.operand, arriving)
            case Sum(terms):
                total: gs.Tensor | None = None
                for part in [self.value(op, inner, *states) for inner in terms]:
                    if part is not None:
                        total = part if total is None else op.Add(total, part)
                return total
            case Difference(a, b):
                left, right = self.value(op, a, *states), self.value(op, b, *states)
                if right is None:
                    return left
                return op.Neg(right) if left is None else op.Sub(left, right)
            case Scaled(gamma, inner):
                whole = self.value(op, inner, *states)
                return whole if whole is None or gamma == 1.0 else op.Mul(whole, gamma)
        raise TypeError(f"no term {term!r}")

    def _view(self, vertex: int, state: _State) -> _View:
        if vertex not in state.views:
            node = self.flow.vertices[vertex]
            outputs = [state.mu.get(t.name, t) for t in node.outputs]
            inputs, attrs = self.operands(vertex, state.at)
            state.views[vertex] = _View(node.op, node.name, node.domain, attrs, inputs, outputs)
        return state.views[vertex]


def _start(op: Emitter, model: _Model, how: Literal) -> _State:
    """The state before step 0: the forward pass, its value nodes moved off it by noise if asked."""
    x, eps = {}, {}
    for index, name in enumerate(model.moving):
        mu = model.forward[name]
        with op.place(f"{name}.start", vertex=name, role="error", step=0):
            if how.noise:
                noise = op.RandomNormalLike(mu, scale=float(how.noise), seed=float(index + 1))
                x[name], eps[name] = op.Add(mu, noise), op.Neg(noise)
            else:
                x[name], eps[name] = mu, op.zeros_like(mu)
    return _State(x, dict(model.forward), eps, dict(model.forward))


def _rename(op: Emitter, inner: gs.Graph) -> None:
    """Names of its own for what a copied subgraph makes: a name stands for one tensor in the whole model."""
    for node in inner.nodes:
        for nested in node.subgraphs():
            _rename(op, nested)
    for tensor in (*inner.inputs, *(t for node in inner.nodes for t in node.outputs)):
        if tensor.name:
            tensor.name = op.fresh(tensor.name)


class _Loop:
    """An ONNX Loop under construction: each carried tensor begins outside and is handed on by the body.

    Attributes:
        op: emits into the body.
        round: how many rounds are done, inside the body.
    """

    def __init__(self, op: Emitter) -> None:
        self._outside = op
        self.op = op.inside()  # the two share their names, so that the body shadows nothing outside
        self.body = self.op.graph
        self.body.name = "inference_step"
        self.round = gs.Variable(op.fresh("inference/round"), np.dtype(np.int64), [])
        self._go = gs.Variable(op.fresh("inference/go"), np.dtype(bool), [])
        self.body.inputs = [self.round, self._go]
        self._first: Tensors = {}
        self._next: Tensors = {}
        self._scans: list[tuple[gs.Tensor, gs.Variable, str]] = []  # in the body, outside, its name in the body

    def carry(self, name: str, first: gs.Tensor) -> gs.Variable:
        """The body's tensor for what begins as ``first``."""
        op = self._outside
        op.dims(first)
        made = gs.Variable(op.fresh(name), dtype=op.dtype(first), shape=first.shape)
        self.body.inputs.append(made)
        self._first[made.name] = first
        return made

    def hand_on(self, carried: gs.Variable, following: gs.Tensor) -> None:
        """What a carried tensor is in the next step."""
        self._next[carried.name] = following

    def scan(self, name: str, tensor: gs.Tensor) -> gs.Variable:
        """A tensor of the body, stacked over all rounds on a new axis 0."""
        op, dims = self._outside, self.op.dims(tensor)
        shape = None if dims is None else [None, *dims]
        made = gs.Variable(op.fresh(name), dtype=self.op.dtype(tensor), shape=shape)
        self._scans.append((tensor, made, f"{name}.round"))
        return made

    def drop(self, carried: gs.Variable) -> None:
        """Carry it no more: the body does not read it."""
        self.body.inputs.remove(carried)
        del self._first[carried.name]

    def read(self) -> set[str]:
        """What the body's nodes read so far."""
        found = {t.name for node in self.body.nodes for t in node.inputs}
        return found.union(t.name for node in self.body.nodes if node.attrs for t in captured(node))

    def finish(self, rounds: int) -> Tensors:
        """Append the Loop; the last values, by the carried tensors' names in the body."""
        op = self._outside
        self.body.outputs = [self._result(self._go, "inference/again")]
        self.body.outputs += [self._result(self._next[name], f"{name}.next") for name in self._first]
        self.body.outputs += [self._result(tensor, name) for tensor, _, name in self._scans]
        drop_dead(self.body)  # the losses' values, for one
        last: Tensors = {
            name: gs.Variable(op.fresh(f"{name}.last"), dtype=op.dtype(first), shape=first.shape)
            for name, first in self._first.items()
        }
        for _, made, _ in self._scans:
            if made.shape is not None:
                made.shape[0] = rounds
        count, go = op.constant(np.asarray(rounds, np.int64)), op.constant(np.asarray(True))
        node = gs.Node(
            "Loop", name=op.fresh("inference"), attrs={"body": self.body},
            inputs=[count, go, *self._first.values()],
            outputs=[*last.values(), *(made for _, made, _ in self._scans)],
        )  # fmt: skip
        node.metadata = {"zilc.vertex": "inference", "zilc.role": "error"}
        op.graph.nodes.append(node)
        return last

    def _result(self, tensor: gs.Tensor, name: str) -> gs.Variable:
        """A body output of its own: never an input, nor a tensor from outside."""
        made = gs.Variable(self.op.fresh(name), dtype=self.op.dtype(tensor), shape=tensor.shape)
        node = gs.Node("Identity", name=made.name, inputs=[tensor], outputs=[made])
        node.metadata = {"zilc.role": "error"}
        self.body.nodes.append(node)
        return made
