"""The training graph: losses, errors, gradients and updates as nodes around a forward graph.

Schedules decide what is computed when; this module knows how the graph's interface is laid out: inputs (the model's,
targets, parameters, slots, lr, step) and outputs (loss, the model's, next values, gradients).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes, ir, scaling
from zilc.emit import Emitter
from zilc.errors import MissingRule, describe_vertex
from zilc.graph import FROZEN, INFERENCE, INSERTED, Dataflow, is_standard
from zilc.losses import LOSSES, Emitted
from zilc.lowerings import Lowerings
from zilc.optimizers import Optimizer
from zilc.passes.dynamics import Error, Pull, Sum, Term
from zilc.passes.levels import Levels
from zilc.passes.train_mode import TrainMode
from zilc.passes.wavefront import Schedule
from zilc.vjp import control_flow, table

Outputs = Literal["next", "grad", "both"]


@dataclass(frozen=True)
class Clamp:
    """One trained output: what it is called, the tensor of level 0 that is clamped, and the loss."""

    output: str
    tensor: str
    loss: str
    class_axis: int = -1


@dataclass
class LeafNames:
    """Names in the training graph that belong to one trained leaf."""

    name: str
    level: int
    grad: str | None = None
    next: str | None = None
    state: list[dict[str, str]] = field(default_factory=list)


class TrainingGraph:
    """A graph under construction.

    Args:
        graph: the forward graph; it is rewritten.
        parameters: trained initializers; they become inputs.
        inputs: model inputs whose gradient is wanted.
        clamps: the trained outputs.
        outputs: next values, gradients, or both.
        optimizer: None where only gradients are wanted.
        linear: gradients are linear in the errors of the clamped outputs, as in the wavefront and in reverse mode; the
            literal dynamics move value nodes by the errors themselves.
        mode: what the training mode turned: its running statistics become inputs and ``.next`` outputs, its seed and
            step inputs of the interface.
        mixed: some of the forward graph computes in a narrower type than its parameters.
        scaled: the errors of the clamped outputs are multiplied by a scale, which is carried (:mod:`zilc.scaling`).
        lowerings: chooses where a rule can be emitted in several ways.

    Where nothing but updates p - lr g is asked for, the learning rate scales the errors of the clamped outputs, once,
    instead of every gradient: each VJP is linear in its cotangent, so errors and gradients carry it along.  Not where
    the graph is ``mixed``: the small errors that a small rate makes are what a narrow type loses.

    Where errors are ``scaled``, parameters are updated last, once all gradients are known to be finite.  Else the
    update is skipped: what is carried stays as it was, but for the scale.  (A step that masks alone count goes on.)
    """

    def __init__(
        self,
        graph: gs.Graph,
        *,
        parameters: Sequence[str],
        inputs: Sequence[str],
        clamps: Sequence[Clamp],
        outputs: Outputs = "next",
        optimizer: Optimizer | None = None,
        linear: bool = True,
        mode: TrainMode | None = None,
        mixed: bool = False,
        scaled: bool = False,
        lowerings: Lowerings | None = None,
    ) -> None:
        self.graph = graph
        self.op = Emitter(graph, lowerings=lowerings)
        self.outputs = outputs
        self.optimizer = optimizer if outputs != "grad" and parameters else None
        self.clamped: dict[str, gs.Tensor] = {}
        self.leaves: dict[str, LeafNames] = {}
        self.targets: list[dict[str, str]] = []
        self.clamps = list(clamps)
        self._target: dict[str, gs.Variable | None] = {}
        self.mode = mode or TrainMode()
        self.seed, counted = self._take_inputs()
        self._model_inputs = [t.name for t in graph.inputs]
        self._wanted_inputs = list(inputs)
        self._tensors = ir.tensors(graph)
        self._finals: list[tuple[str, gs.Tensor, gs.Tensor]] = []
        self._slots: dict[str, dict[str, gs.Variable]] = {}
        self.losses: dict[str, gs.Tensor] = {}
        self._losses: list[Emitted] = []
        self._extra: list[tuple[str, gs.Tensor]] = []
        self._gradients: list[tuple[str, gs.Tensor, int]] = []
        self._open_parameters(parameters)
        self._open_clamps(clamps)
        self._open_optimizer(parameters, counted)
        self._open_carried()
        self.scale: gs.Variable | None = None
        self.good: gs.Variable | None = None
        if scaled:
            self._open_scale()
        else:
            self._finals += self._moved
        self.rate_in_errors = linear and not mixed and self._rate_commutes(inputs)
        self._clamp()
        # Outputs are named last but claimed first, so that an emitted tensor cannot take their names.
        self.loss = self.claim("loss")
        for name in parameters:
            self._open_leaf(name, wanted_input=False)
        for name in inputs:
            self._open_leaf(name, wanted_input=True)

    # -- the interface --

    def claim(self, name: str) -> str:
        """``name``, or ``zilc.name`` if it is taken."""
        return self.op.fresh(name if name not in self.op.names else f"zilc.{name}")

    def _open_parameters(self, parameters: Sequence[str]) -> None:
        self._parameters = [self._opened(name) for name in parameters]

    def _opened(self, name: str) -> gs.Variable:
        """An initializer as a variable."""
        tensor = self._tensors[name]
        dtype, shape = dtypes.np_dtype(tensor.dtype), [int(n) for n in tensor.shape]
        tensor.to_variable(dtype=dtype, shape=shape)
        tensor.type = "tensor_type"  # GraphSurgeon forgets it
        return tensor

    def _open_clamps(self, clamps: Sequence[Clamp]) -> None:
        """Targets and losses."""
        op = self.op
        many = len(clamps) > 1
        for clamp in clamps:
            mu = self._tensors[clamp.tensor]
            loss = LOSSES[clamp.loss]
            expected = loss.target(op, mu, clamp.class_axis)
            y = None
            if expected is not None:
                name = self.claim(f"target.{clamp.output}" if many else "target")
                y = gs.Variable(name, dtype=expected.dtype, shape=expected.shape)
                self.graph.inputs.append(y)
                self.targets.append({"name": name, "output": clamp.output, "loss": clamp.loss})
            else:
                self.targets.append({"name": "", "output": clamp.output, "loss": clamp.loss})
            with op.place(f"{clamp.output}.loss", vertex=clamp.output, level=0, role="loss", step=0):
                self._losses.append(loss.emit(op, mu, y, clamp.class_axis))
            self.losses[clamp.tensor] = self._losses[-1][0]
            self._target[clamp.tensor] = y

    def _rate_commutes(self, inputs: Sequence[str]) -> bool:
        """Whether all that is asked for are updates p - lr g, in one dtype that loses nothing to a small rate."""
        if self.optimizer is None or not self.optimizer.linear or self.outputs != "next" or inputs:
            return False
        assert self.lr is not None
        errors = {self.op.dtype(direction) for _, direction, _ in self._losses}
        return errors | {self.op.dtype(p) for p in self._parameters} == {self.lr.dtype}

    def _clamp(self) -> None:
        """eps_out = dL/dmu_out at mu_out (ZIL.md, section 6)."""
        op = self.op
        for clamp, (_, direction, factor) in zip(self.clamps, self._losses, strict=True):
            with op.place(f"{clamp.output}.loss", vertex=clamp.output, level=0, role="loss", step=0):
                rate = self.lr if self.rate_in_errors else None
                if self.scale is not None:
                    rate = self.scale if rate is None else op.Mul(rate, self.scale)
                whole = rate if factor is None else factor.times(op, rate)
                self.clamped[clamp.tensor] = direction if whole is None else op.Mul(direction, whole)

    def target_of(self, clamp: Clamp) -> gs.Variable | None:
        """The target input of a trained output; None where the output is the loss."""
        return self._target[clamp.tensor]

    def _take_inputs(self) -> tuple[gs.Variable | None, gs.Variable | None]:
        """The seed and step of the masks; they are no inputs of the model's."""
        inputs = {t.name: t for t in self.graph.inputs}
        taken = [inputs[name] if name else None for name in (self.mode.seed, self.mode.step)]
        self.graph.inputs = [t for t in self.graph.inputs if not any(t is own for own in taken)]
        return taken[0], taken[1]

    def _open_optimizer(self, parameters: Sequence[str], counted: gs.Variable | None) -> None:
        """Parameters, slots, lr and step; ``counted`` is the step that masks depend on, whatever the optimizer."""
        self.lr: gs.Variable | None = None
        self.step: gs.Variable | None = counted
        self.step_next: str | None = None
        self.graph.inputs.extend(self._parameters)
        if self.optimizer is not None:
            self._open_slots()
            if self.optimizer.counts and self.step is None:
                self.step = gs.Variable(self.claim("step"), dtype=np.dtype(np.int64), shape=[])
        if self.step is not None:
            self.graph.inputs.append(self.step)
            self.step_next = self.claim(f"{self.step.name}.next")
        if self.seed is not None:
            self.graph.inputs.append(self.seed)

    def _open_slots(self) -> None:
        assert self.optimizer is not None
        for parameter in self._parameters:
            slots = {}
            for slot in self.optimizer.slots:
                name = self.claim(f"{parameter.name}.{slot}")
                slots[slot] = gs.Variable(name, dtype=parameter.dtype, shape=parameter.shape)
            self.graph.inputs.extend(slots.values())
            self._slots[parameter.name] = slots
        double = all(dtypes.np_dtype(p.dtype) == np.float64 for p in self._parameters)
        self.lr = gs.Variable(self.claim("lr"), dtype=np.dtype(np.float64 if double else np.float32), shape=[])
        self.graph.inputs.append(self.lr)

    def _open_carried(self) -> None:
        """Running statistics become inputs, and what follows each an output."""
        self.carried: list[dict[str, str]] = []
        self._moved: list[tuple[str, gs.Tensor, gs.Tensor]] = []
        for name, following in self.mode.carried.items():
            tensor = self._opened(name)
            self.graph.inputs.append(tensor)
            self.carried.append({"name": name, "next": self.claim(f"{name}.next")})
            self._moved.append((self.carried[-1]["next"], self._tensors[following], tensor))

    def _open_scale(self) -> None:
        """The loss scale and its count; inputs, and outputs that are fed back."""
        self.scale = gs.Variable(self.claim("loss_scale"), dtype=np.dtype(np.float32), shape=[])
        self.good = gs.Variable(self.claim("good_steps"), dtype=np.dtype(np.int64), shape=[])
        for tensor in (self.scale, self.good):
            self.graph.inputs.append(tensor)
            self.carried.append({"name": tensor.name, "next": self.claim(f"{tensor.name}.next")})

    def _open_leaf(self, name: str, *, wanted_input: bool) -> None:
        names = LeafNames(name, 0)
        if wanted_input or self.outputs != "next":
            names.grad = self.claim(f"{name}.grad")
        if not wanted_input and self.optimizer is not None:
            names.next = self.claim(f"{name}.next")
            for slot, tensor in self._slots[name].items():
                names.state.append({"name": tensor.name, "next": self.claim(f"{tensor.name}.next"), "slot": slot})
        self.leaves[name] = names

    # -- what a schedule reports --

    def gradient(self, leaf: str, gradient: gs.Tensor | None, level: int) -> None:
        """A leaf's gradient is there: name it, and update the leaf at once, so that its memory is freed."""
        op, names = self.op, self.leaves[leaf]
        names.level = level
        tensor = self._tensors[leaf]
        with op.place(f"{leaf}.gradient", vertex=leaf, level=level, role="update", step=max(level - 1, 0)):
            if gradient is None:
                gradient = op.zeros_like(tensor)
            elif self.scale is not None:
                gradient = op.Div(gradient, self.scale)
        if names.grad is not None:
            self._finals.append((names.grad, gradient, tensor))
        if self.scale is not None:
            self._gradients.append((leaf, gradient, level))
        elif names.next is not None:
            self._update(leaf, gradient, level)

    def _update(self, leaf: str, gradient: gs.Tensor, level: int, finite: gs.Tensor | None = None) -> None:
        """The leaf's next value and its slots'; where ``finite`` (bool, shape []) is false, those that it has."""
        op, names, tensor = self.op, self.leaves[leaf], self._tensors[leaf]
        assert self.optimizer is not None
        assert names.next is not None
        rate = None if self.rate_in_errors else self.lr
        with op.place(f"{leaf}.optimizer", vertex=leaf, level=level, role="optimizer", step=max(level - 1, 0)):
            following, slots = self.optimizer.update(op, tensor, gradient, dict(self._slots[leaf]), rate, self.step)
            if finite is not None:
                following = op.Where(finite, following, tensor)
                slots = {slot: op.Where(finite, new, self._slots[leaf][slot]) for slot, new in slots.items()}
        self._finals.append((names.next, following, tensor))
        for entry in names.state:
            self._finals.append((entry["next"], slots[entry["slot"]], self._slots[leaf][entry["slot"]]))

    def _finish_scale(self) -> gs.Tensor | None:
        """What waited for all gradients: updates, carried values, the next scale; whether all are finite."""
        if self.scale is None or self.good is None:
            return None
        op = self.op
        with op.place("loss_scale", vertex="loss_scale", level=0, role="optimizer"):
            finite = scaling.all_finite(op, [gradient for _, gradient, _ in self._gradients])
            held = [(name, op.Where(finite, tensor, like), like) for name, tensor, like in self._moved]
            following = scaling.following_scale(op, self.scale, self.good, finite)
        self._finals += held
        for leaf, gradient, level in self._gradients:
            if self.leaves[leaf].next is not None:
                self._update(leaf, gradient, level, finite)
        for entry, tensor, like in zip(self.carried[-2:], following, (self.scale, self.good), strict=True):
            self._finals.append((entry["next"], tensor, like))
        return finite

    def output(self, name: str, tensor: gs.Tensor) -> None:
        """One more output, under a claimed name; it comes after all others."""
        self._extra.append((name, tensor))

    def finish(self) -> gs.Graph:
        """Lay out the outputs: loss, the model's, next values and gradients, traces."""
        op = self.op
        with op.place("loss", vertex="loss", level=0, role="loss", step=0):
            total, *others = self.losses.values()
            for other in others:
                total = op.Add(total, op.cast(other, op.dtype(total)))
        finals = [(self.loss, total)]
        finite = self._finish_scale()
        if self.step is not None and self.step_next is not None:
            with op.place("step", vertex="step", level=0, role="optimizer"):
                finals_step = op.Add(self.step, op.constant(np.asarray(1, np.int64)))
                if finite is not None and self.optimizer is not None and self.optimizer.counts:
                    finals_step = op.Where(finite, finals_step, self.step)
        outputs = list(self.graph.outputs)
        extra = [self._tensors[t] for t in self.clamped if t not in {o.name for o in outputs}]
        # A terminal identity on a leaf is not an output anyone asked for.
        outputs += [t for t in extra if t.name in {entry["output"] for entry in self.targets}]
        named = [self._final(name, tensor) for name, tensor in finals]
        rest = [self._final(name, tensor, like) for name, tensor, like in self._finals]
        if self.step is not None and self.step_next is not None:
            rest.append(self._final(self.step_next, finals_step))
        rest += [self._final(name, tensor) for name, tensor in self._extra]
        self.graph.outputs = named + outputs + rest
        return self.graph

    def _final(self, name: str, tensor: gs.Tensor, like: gs.Tensor | None = None) -> gs.Variable:
        """Give a result the name of an output; a copy where it already is something else with a name of its own.

        It has the shape of ``like``, which inference cannot always tell where dimensions are symbolic.
        """
        op = self.op
        own = (
            isinstance(tensor, gs.Variable)
            and bool(tensor.inputs)
            and tensor.name not in self._tensors
            and not getattr(tensor, "zilc_final", False)
        )
        if own:
            tensor.name = name
        else:
            source = tensor
            tensor = gs.Variable(name, dtype=source.dtype, shape=source.shape)
            node = gs.Node("Identity", name=f"{name}/Identity", inputs=[source], outputs=[tensor])
            node.metadata = {"zilc.vertex": name, "zilc.role": "update"}
            self.graph.nodes.append(node)
        tensor.zilc_final = True
        if like is not None and like.shape is not None:
            tensor.shape = list(like.shape)
        if tensor.shape is None:
            op.dims(tensor)
        return tensor

    @property
    def model_inputs(self) -> list[str]:
        return self._model_inputs

    @property
    def data(self) -> set[str]:
        """Inputs that hold a batch: the model's and the targets."""
        return {*self._model_inputs, *(entry["name"] for entry in self.targets)}

    @property
    def bounded(self) -> set[str]:
        """Errors of clamped outputs that are finite whatever the targets are."""
        return {self.clamped[clamp.tensor].name for clamp in self.clamps if LOSSES[clamp.loss].bounded}


def annotate_forward(graph: gs.Graph, flow: Dataflow, levels: Levels) -> None:
    """Vertex, level and role in the metadata of every forward node (in place)."""
    where = {id(node): v for v, node in enumerate(flow.vertices)}
    delays: dict[int, list[str]] = {}
    for edge in flow.edges:
        delays.setdefault(edge.consumer, []).append(str(levels.gap(edge)))
    for node in graph.nodes:
        v = where.get(id(node))
        role = "identity" if getattr(node, INSERTED, False) else "forward"
        name = flow.names[v] if v is not None else (node.name or next((t.name for t in node.outputs if t.name), ""))
        kept = {INFERENCE} if getattr(node, FROZEN, False) else set()
        node.metadata = {
            k: x for k, x in getattr(node, "metadata", {}).items() if k in kept or not k.startswith("zilc.")
        }
        node.metadata["zilc.vertex"] = name
        node.metadata["zilc.role"] = role
        if v is not None:
            node.metadata["zilc.level"] = str(levels.vertices[v])
            if any(n != "0" for n in delays.get(v, ())):
                # How many identity vertices lie before each differentiable operand, where the graph is not levelled.
                node.metadata["zilc.delays"] = ",".join(delays[v])


def ensure_rules(flow: Dataflow, levels: Levels, leaves: Sequence[str], where: str) -> None:
    """Every vertex on a path from a trained leaf has a rule.

    Raises:
        MissingRule: all vertices that have none, at once.
    """
    missing = []
    inside = {leaf for leaf in leaves if leaf in flow.tensors} | set(flow.producer)
    for v in sorted(flow.upstream_of(leaves)):
        node, opset = flow.vertices[v], flow.graph.opset
        rule = table.lookup(node, opset)
        captured = any(e.operand >= len(node.inputs) for e in flow.operands[v])
        if rule is None or (captured and rule.whole is None):
            missing.append(describe_vertex(flow.names[v], _operator(node), opset=opset, level=levels.vertices[v]))
            continue
        for inner in control_flow.without_rule(node, opset, inside) if rule.whole is not None else ():
            where_inside = f"{flow.names[v]}/{inner.name or inner.outputs[0].name}"
            missing.append(describe_vertex(where_inside, inner.op, opset=opset, level=levels.vertices[v]))
    if missing:
        raise MissingRule(missing, where=where)


def _operator(node: gs.Node) -> str:
    return node.op if is_standard(node) else f"{node.domain}.{node.op}"


def make_extra_outputs(op: Emitter, flow: Dataflow, leaves: Sequence[str]) -> None:
    """Optional outputs that rules read (MaxPool's indices, a normalization's statistics) are made by the vertices."""
    for v in sorted(flow.upstream_of(leaves)):
        node = flow.vertices[v]
        rule = table.lookup(node, flow.graph.opset)
        if rule is not None:
            table.ensure_outputs(op, node, rule)


def emit_schedule(training: TrainingGraph, schedule: Schedule) -> None:
    """Carry out a schedule: each term becomes nodes, in the order of the steps.

    The schedule's graph is levelled, the training graph's forward part is the model's own.  An identity vertex holds
    the value of the tensor that it delays (mu = x = the forward value), and its operator passes an error on as it is:
    both are names for what is there already, so no node stands for them.
    """
    op, flow = training.op, schedule.flow
    forward = {t.name: node for node in training.graph.nodes for t in node.outputs if t.name}
    errors: dict[tuple[str, int], gs.Tensor | None] = {}

    def error(tensor: str, t: int) -> gs.Tensor | None:
        if tensor in training.clamped:
            return training.clamped[tensor]
        return errors.get((tensor, t))

    def value(term: Term) -> gs.Tensor | None:
        match term:
            case Error(tensor, t):
                return error(tensor, t)
            case Pull(edge, t):
                node = flow.vertices[edge.consumer]
                arriving = [error(out.name, t) for out in node.outputs]
                if all(g is None for g in arriving):
                    return None
                real = next((forward[out.name] for out in node.outputs if out.name in forward), None)
                return arriving[0] if real is None else table.vjp(op, real, edge.operand, arriving)
            case Sum(terms):
                total: gs.Tensor | None = None
                for part in map(value, terms):
                    if part is not None:
                        total = part if total is None else op.Add(total, part)
                return total
        raise TypeError(f"a wavefront schedule has no {type(term).__name__} left")

    for step in schedule.steps:
        level = step.t + 1
        for leaf, term in step.gradients:
            with op.place(f"{leaf}.gradient.t{step.t}", vertex=leaf, level=level, role="update", step=step.t):
                gradient = value(term)
            training.gradient(leaf, gradient, level)
        for tensor, term in step.errors:
            vertex = flow.names[flow.producer[tensor]]
            with op.place(f"{tensor}.error.t{level}", vertex=vertex, level=level, role="error", step=step.t):
                errors[tensor, level] = value(term)
