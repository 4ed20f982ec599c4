"""The dynamics as they stand: every value node moves in every step, in an ONNX Loop (ZIL.md, sections 4, 5 and 7).

This is the paper's Algorithm 3, mended, and with other options inference learning and the ablations.  The equations are
those of :mod:`zilc.passes.dynamics`, carried out term by term; nothing is folded away.  A loop step reads the state of
step t (x, mu, eps of every vertex) and makes that of t + 1:

    dx    = gamma (eps - sum of pulls)        at x[.,t], mu[.,t]
    x'    = x + dx
    mu'   = g(x')
    eps'  = eps + (mu' - mu) - dx             the state is kept as errors

A leaf on level l keeps the pulls of step l - 1.  Levels that the wave has passed may overflow; they are left behind by
``Where``, never by a product with a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.graph import copy_node
from zilc.losses import LOSSES
from zilc.passes.dynamics import Difference, Dynamics, Error, Prediction, Pull, Scaled, Sum, Term
from zilc.passes.simplify import drop_dead
from zilc.passes.training import TrainingGraph
from zilc.vjp import table


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


class _Step:
    """The state of one step as tensors, and the terms of the dynamics over it.

    Args:
        x: value nodes, leaves and frozen operands by name.
        mu: predictions, optional outputs that rules read among them.
        eps: prediction errors; what is absent is zero.
    """

    def __init__(
        self, op: Emitter, dynamics: Dynamics, x: dict[str, gs.Tensor], mu: dict[str, gs.Tensor],
        eps: dict[str, gs.Tensor],
    ) -> None:  # fmt: skip
        self.op, self.dynamics, self.x, self.mu, self.eps = op, dynamics, x, mu, eps
        self._nodes: dict[int, gs.Node] = {}

    def node(self, vertex: int) -> gs.Node:
        """A vertex at this state: operands are value nodes, outputs are predictions.  It is read, never run."""
        if vertex not in self._nodes:
            node = self.dynamics.flow.vertices[vertex]
            made = gs.Node.__new__(gs.Node)
            for key, value in (("op", node.op), ("name", node.name), ("domain", node.domain)):
                object.__setattr__(made, key, value)
            object.__setattr__(made, "attrs", dict(node.attrs))
            object.__setattr__(made, "inputs", [self.x[t.name] if t.name else t for t in node.inputs])
            object.__setattr__(made, "outputs", [self.mu.get(t.name, t) for t in node.outputs])
            self._nodes[vertex] = made
        return self._nodes[vertex]

    def value(self, term: Term) -> gs.Tensor | None:
        """A term of step t as a tensor; None stands for zero."""
        op = self.op
        match term:
            case Error(tensor, _):
                return self.eps.get(tensor)
            case Prediction(tensor, _):
                return self.mu[tensor]
            case Pull(edge, _):
                node = self.dynamics.flow.vertices[edge.consumer]
                arriving = [self.eps.get(t.name) for t in node.outputs]
                if all(g is None for g in arriving):
                    return None
                return table.vjp(op, self.node(edge.consumer), edge.operand, arriving)
            case Sum(terms):
                total: gs.Tensor | None = None
                for part in map(self.value, terms):
                    if part is not None:
                        total = part if total is None else op.Add(total, part)
                return total
            case Difference(a, b):
                left, right = self.value(a), self.value(b)
                if right is None:
                    return left
                return op.Neg(right) if left is None else op.Sub(left, right)
            case Scaled(gamma, inner):
                made = self.value(inner)
                return made if made is None or gamma == 1.0 else op.Mul(made, gamma)
        raise TypeError(f"no term {term!r}")


def emit_literal(training: TrainingGraph, dynamics: Dynamics, leaves: Sequence[str], how: Literal) -> None:
    """Emit the loop, and hand each leaf's gradient to the training graph.

    Requires: every vertex of ``dynamics.flow`` has a rule.  The graph need not be levelled.
    """
    op, flow = training.op, dynamics.flow
    level_of = dynamics.levels.leaves
    moving = [t.name for node in flow.vertices for t in node.outputs if t.name in flow.readers]
    moving = [name for name in moving if name not in dynamics.clamped]
    shapes = dict(flow.tensors)
    initial = _initial(training, dynamics)
    outside = _outside(training, dynamics)
    extras = {name: t for name, t in initial.items() if name not in moving and name not in dynamics.clamped}

    with op.place("inference/start", vertex="inference", role="error", step=0):
        x0, eps0 = {}, {}
        for index, name in enumerate(moving):
            mu0 = initial[name]
            zero = op.zeros_like(mu0)
            if how.noise:
                noise = op.RandomNormalLike(mu0, scale=float(how.noise), seed=float(index + 1))
                x0[name], eps0[name] = op.Add(mu0, noise), op.Neg(noise)
            else:
                x0[name], eps0[name] = mu0, zero
        start = {name: op.zeros_like(training._tensors[name]) for name in leaves}

    body = gs.Graph(name="inference_step", opset=training.graph.opset)
    inner = Emitter(body, op.names)  # one set of names, so that the body shadows nothing outside
    inner.names = op.names
    t = gs.Variable(op.fresh("inference/t"), np.dtype(np.int64), [])
    go = gs.Variable(op.fresh("inference/go"), np.dtype(bool), [])
    body.inputs = [t, go]
    carried: list[tuple[gs.Tensor, gs.Tensor]] = []  # (initial value outside, next value inside)

    def state(label: str, name: str, outside: gs.Tensor) -> gs.Variable:
        like = shapes.get(name, outside)
        shape = like.shape if like.shape is not None else outside.shape
        made = gs.Variable(op.fresh(f"{name}.{label}"), dtype=op.dtype(outside), shape=shape)
        body.inputs.append(made)
        return made

    x = {name: state("value", name, x0[name]) for name in moving}
    eps = {name: state("error", name, eps0[name]) for name in moving}
    predicted = [*moving, *dynamics.clamped, *extras] if not how.fixed_predictions else []
    mu = {name: state("prediction", name, initial[name]) for name in predicted}
    kept = {name: state("gradient", name, start[name]) for name in leaves} if how.update_at != "after" else {}
    if how.fixed_predictions:
        mu = {name: initial[name] for name in (*moving, *dynamics.clamped, *extras)}

    def clamp(at: Emitter, predictions: dict[str, gs.Tensor]) -> dict[str, gs.Tensor]:
        """eps_out = dL/dmu_out at the prediction of this step."""
        return {
            c.tensor: LOSSES[c.loss].emit(at, predictions[c.tensor], training.target_of(c), c.class_axis)[1]
            for c in training.clamps
        }

    now = _Step(inner, dynamics, {**outside, **(initial if how.fixed_predictions else x)}, mu, eps)
    with inner.place("inference/clamp", vertex="inference", level=0, role="error"):
        now.eps = {**eps, **(clamp(inner, mu) if not how.fixed_predictions else dict(training.clamped))}

    following: dict[str, gs.Tensor] = {}
    for name in leaves if how.update_at != "after" else ():
        level = level_of[name]
        with inner.place(f"{name}.gradient", vertex=name, level=level, role="update"):
            pulled = now.value(dynamics.pulls(name, 0))
            when = level - 1 if how.update_at == "level" else how.steps - 1
            chosen = inner.Equal(t, inner.constant(np.asarray(when, np.int64)))
            following[name] = kept[name] if pulled is None else inner.Where(chosen, pulled, kept[name])

    moves: dict[str, gs.Tensor | None] = {}
    moved = dict(x)
    for name in moving:
        with inner.place(f"{name}.move", vertex=name, level=dynamics.level(name), role="error"):
            moves[name] = now.value(dynamics.move(name, 0))
            step = moves[name]
            moved[name] = x[name] if step is None else inner.Add(x[name], step)
    current = {**outside, **moved}
    later = dict(mu)
    if not how.fixed_predictions:
        for index, node in enumerate(flow.vertices):
            outputs = []
            for tensor in node.outputs:
                made = gs.Variable(op.fresh(f"{tensor.name}.next"), tensor.dtype, tensor.shape) if tensor.name else tensor
                outputs.append(made if tensor.name else gs.Variable.empty())
                later[tensor.name] = made
            made_node = copy_node(node, [current[o.name] if o.name else o for o in node.inputs], outputs)
            made_node.name = op.fresh(f"inference/{flow.names[index]}")
            made_node.metadata = {"zilc.vertex": flow.names[index], "zilc.role": "forward"}
            body.nodes.append(made_node)
    after: dict[str, gs.Tensor] = {}
    for name in moving:
        with inner.place(f"{name}.error", vertex=name, level=dynamics.level(name), role="error"):
            # eps' = eps + (mu' - mu) - dx, the drift absent where predictions are fixed
            total = eps[name] if how.fixed_predictions else inner.Add(eps[name], inner.Sub(later[name], mu[name]))
            step = moves[name]
            after[name] = total if step is None else inner.Sub(total, step)

    for name in moving:
        carried.append((x0[name], moved[name]))
    for name in moving:
        carried.append((eps0[name], after[name]))
    for name in predicted:
        carried.append((initial[name], later[name]))
    for name in kept:
        carried.append((start[name], following[name]))
    body.outputs = [_result(inner, go, op, "inference/again")]
    body.outputs += [_result(inner, tensor, op, f"{tensor.name}/out") for _, tensor in carried]

    drop_dead(body)  # the losses' values
    results = [gs.Variable(op.fresh(f"{out.name}.last"), dtype=op.dtype(first), shape=first.shape)
               for out, (first, _) in zip(body.outputs[1:], carried, strict=True)]  # fmt: skip
    count = op.constant(np.asarray(how.steps, np.int64))
    loop = gs.Node("Loop", name=op.fresh("inference"), attrs={"body": body},
                   inputs=[count, op.constant(np.asarray(True)), *[first for first, _ in carried]], outputs=results)  # fmt: skip
    loop.metadata = {"zilc.vertex": "inference", "zilc.role": "error"}
    training.graph.nodes.append(loop)

    if how.update_at == "after":
        n = len(moving)
        last_x = dict(zip(moving, results[:n], strict=True))
        last_eps = dict(zip(moving, results[n : 2 * n], strict=True))
        last_mu = dict(mu) if how.fixed_predictions else dict(zip(predicted, results[2 * n :], strict=True))
        end = _Step(op, dynamics, {**outside, **(initial if how.fixed_predictions else last_x)}, last_mu, last_eps)
        with op.place("inference/end", vertex="inference", level=0, role="error", step=how.steps):
            end.eps = {**last_eps, **(dict(training.clamped) if how.fixed_predictions else clamp(op, last_mu))}
        gradients = {}
        for name in leaves:
            with op.place(f"{name}.gradient", vertex=name, level=level_of[name], role="update", step=how.steps):
                gradients[name] = end.value(dynamics.pulls(name, how.steps))
    else:
        gradients = dict(zip(kept, results[len(results) - len(kept) :], strict=True))
    for name in sorted(leaves, key=level_of.__getitem__):
        training.gradient(name, gradients[name], level_of[name])


def _initial(training: TrainingGraph, dynamics: Dynamics) -> dict[str, gs.Tensor]:
    """mu[.,0] of every output of an active vertex; an identity vertex holds what it delays."""
    forward = {t.name: t for node in training.graph.nodes for t in node.outputs if t.name}
    found: dict[str, gs.Tensor] = {}
    everything = training._tensors
    for node in dynamics.flow.vertices:
        for tensor in node.outputs:
            if not tensor.name:
                continue
            if tensor.name in forward:
                found[tensor.name] = forward[tensor.name]
            else:
                source = node.inputs[0].name
                found[tensor.name] = found.get(source) or everything[source]
    return found


def _outside(training: TrainingGraph, dynamics: Dynamics) -> dict[str, gs.Tensor]:
    """Operands that do not move: leaves, and values frozen in the forward pass.

    A constant gets a twin of another name: the body would otherwise be written with an initializer that shadows it.
    """
    found: dict[str, gs.Tensor] = {}
    for node in dynamics.flow.vertices:
        for tensor in node.inputs:
            if tensor.name and tensor.name in training._tensors and tensor.name not in found:
                own = training._tensors[tensor.name]
                if isinstance(own, gs.Constant):
                    own = gs.Constant(training.op.fresh(f"{own.name}/inner"), own._values)
                found[tensor.name] = own
    return found


def _result(inner: Emitter, tensor: gs.Tensor, op: Emitter, name: str) -> gs.Variable:
    """A body output of its own: never an input, nor a tensor from outside."""
    made = gs.Variable(op.fresh(name), dtype=op.dtype(tensor), shape=tensor.shape)
    node = gs.Node("Identity", name=made.name, inputs=[tensor], outputs=[made])
    node.metadata = {"zilc.role": "error"}
    inner.graph.nodes.append(node)
    return made


