"""The ordered passes behind each command: ``levelize`` and ``emit_training``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import metadata
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

import zilc.vjp  # noqa: F401  (fills the table)
from zilc import collector, cuda_forms, dtypes, ir, onnx_io, optimizers, scaling
from zilc import signature as signatures
from zilc.analysis import Names, Structure, name_list, placed, structure
from zilc.errors import EnsuresError, ModelError, OptionError
from zilc.graph import FROZEN, INSERTED, Dataflow
from zilc.losses import LOSSES
from zilc.lowerings import KEY as LOWERINGS
from zilc.lowerings import Lowerings, tuner_of
from zilc.onnx_io import ModelSource, Source
from zilc.passes import contracts, parameters
from zilc.passes.dynamics import Dynamics
from zilc.passes.fold_batch_norm import finish_folds, fold_batch_norms
from zilc.passes.forward_forms import take_forms
from zilc.passes.identities import Placement, flow_of, levelled_flow
from zilc.passes.layouts import settle_layouts
from zilc.passes.levels import find_levels
from zilc.passes.literal import Literal as LiteralRun
from zilc.passes.literal import emit_literal
from zilc.passes.mixed_precision import LOW
from zilc.passes.parameters import Selection
from zilc.passes.prepare import Prepared
from zilc.passes.recompute import WHERE as BUDGET
from zilc.passes.recompute import recompute
from zilc.passes.reverse import reverse_mode
from zilc.passes.simplify import simplify
from zilc.passes.spell_out import spell_out
from zilc.passes.sums import multiply_row_sums
from zilc.passes.training import (
    Clamp,
    Outputs,
    TrainingGraph,
    annotate_forward,
    emit_schedule,
    ensure_rules,
    make_extra_outputs,
)
from zilc.passes.wavefront import wavefront
from zilc.report import level_report
from zilc.sizes import parse_size

Algorithm = Literal["zil", "il", "bp"]
ScheduleName = Literal["wavefront", "literal"]
Mode = Literal["eval", "train"]
Precision = Literal["float32", "float16", "bfloat16"]
PLACEMENTS: tuple[Placement, ...] = ("edge", "shared", "min", "min-bytes")
#: Inference learning by default: the paper's T for its MLP, and a small integration step.
IL_STEPS, IL_GAMMA = 20, 0.1


def version() -> str:
    """zilc's version."""
    try:
        return metadata.version("zilc")
    except metadata.PackageNotFoundError:
        return "unknown"


# --- levelize -------------------------------------------------------------------------------------------------


@dataclass
class Levelized:
    """What :func:`levelize` returns.

    Attributes:
        model: the levelled model; with ``identities="none"``, the prepared model without them.
        levels: level of each vertex, leaf levels under their tensors' names.
        report: the level structure as data (what ``zilc levelize --json`` prints).
        picture: the levelled graph with a place for every vertex, as data (:mod:`zilc.picture`).
    """

    model: onnx.ModelProto
    levels: dict[str, int]
    report: dict[str, Any]
    flow: Dataflow = field(repr=False)

    @cached_property
    def picture(self) -> dict[str, Any]:
        from zilc import picture

        return picture.draw(self.flow, self.report)

    def html(self, traces: Sequence[Any] = ()) -> str:
        """One self-contained page: the graph level by level, and the energies of ``traces`` if there are any."""
        from zilc import page

        return page.page(self.picture, traces)

    def figure(self, kind: Literal["svg", "png"] = "svg") -> bytes:
        """The graph level by level as a figure.

        Raises:
            RuntimeMissing: matplotlib is not installed.
        """
        from zilc import figures

        return figures.levels(self.picture, kind)


@collector.paused
def levelize(
    model: ModelSource | Source,
    *,
    identities: Placement | Literal["none"] = "shared",
    output: Names = None,
    wrt: Names = None,
    freeze: Names = None,
    tie: Sequence[tuple[str, str]] | Mapping[str, str] = (),
    dims: Mapping[str, int] | None = None,
    opset: int | None = None,
    base_dir: str | os.PathLike[str] | None = None,
) -> Levelized:
    """Find the level structure and insert identity vertices until every edge spans one level.

    Args:
        model: path, bytes or ModelProto.
        identities: one chain a tensor (``shared``), one an edge (``edge``), the fewest identity vertices or bytes
            (``min``, ``min-bytes``), or only report (``none``).
        output: trained outputs; by default the only floating output.
        wrt, freeze: which leaves the report calls trained.  Levels do not depend on them.
        tie: pairs of initializers to be one leaf.
        dims: sizes for symbolic dimensions.
        opset: of the result; by default the model's, within [18, 26].
        base_dir: folder of external data, for bytes and ModelProto.

    Raises:
        ZilcError: see :mod:`zilc.errors`.
    """
    _one_of("--identities", identities, (*PLACEMENTS, "none"))
    found = structure(model, output=output, dims=dims, tie=tie, opset=opset, base_dir=base_dir)
    found = placed(found, identities)
    try:
        chosen: Selection | None = parameters.select(
            found.graph, found.flow, wrt=name_list(wrt), freeze=name_list(freeze), where=found.where
        )
    except ModelError:
        if wrt or freeze:
            raise
        chosen = None  # nothing to train is no obstacle to looking at levels
    flow = found.flow
    if identities != "none":
        flow = levelled_flow(found.graph, flow, found.levels, placement=identities)
    annotate_forward(flow.graph, flow, find_levels(flow))
    proto = _finish(flow.graph, found.prepared)
    by_name = {**{found.flow.names[v]: n for v, n in enumerate(found.levels.vertices)}, **found.levels.leaves}
    return Levelized(proto, by_name, level_report(found, chosen, identities, PLACEMENTS), flow)


# --- emit_training --------------------------------------------------------------------------------------------


class State(Mapping[str, np.ndarray]):
    """Initial parameters, slots, step and running statistics of a training graph; arrays are read when asked for."""

    def __init__(self, loaders: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self._loaders = dict(loaders)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._loaders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


@dataclass
class TrainingStep:
    """What :func:`emit_training` returns.

    Attributes:
        model: the training graph.
        signature: its interface, as in the model's metadata.
        state: initial values of everything that is fed back, by name; read when asked for.
        report: what is trained, what is left out and why, the level structure.
        source: the model it was made from.
    """

    model: onnx.ModelProto
    signature: dict[str, Any]
    state: Mapping[str, np.ndarray]
    report: dict[str, Any]
    source: Source
    ties: dict[str, tuple[str, bool]] = field(default_factory=dict)


@collector.paused
def emit_training(
    model: ModelSource | Source,
    *,
    loss: str | Mapping[str, str] | Sequence[str] = "energy",
    class_axis: int = -1,
    optimizer: str = "sgd",
    options: Mapping[str, Any] | None = None,
    output: Names = None,
    wrt: Names = None,
    freeze: Names = None,
    tie: Sequence[tuple[str, str]] | Mapping[str, str] = (),
    dims: Mapping[str, int] | None = None,
    opset: int | None = None,
    outputs: Outputs = "next",
    algorithm: Algorithm = "zil",
    identities: Placement | Literal["none"] | None = None,
    schedule: ScheduleName | None = None,
    steps: int | None = None,
    gamma: float | None = None,
    update_at: Literal["level", "end"] = "level",
    init_noise: float = 0.0,
    fixed_predictions: bool = False,
    mode: Mode = "eval",
    trace: bool | Sequence[str] = False,
    straight_through: bool = False,
    precision: Precision = "float32",
    target: Literal["cpu", "cuda"] = "cpu",
    tune: bool | str | os.PathLike[str] = False,
    memory_budget: int | str | None = None,
    base_dir: str | os.PathLike[str] | None = None,
) -> TrainingStep:
    """Emit a graph that computes one Z-IL update, in standard ONNX operators.

    The graph's inputs are the model's, ``target`` (``target.NAME`` for several outputs), ``lr``, each trained
    parameter and optimizer slot, and ``step`` where the optimizer counts; its outputs are ``loss``, the model's,
    and ``.next`` of everything fed back.  ``outputs="grad"`` gives ``PARAM.grad`` instead of updates, ``"both"``
    gives both.  Names that are taken get the prefix ``zilc.``: read them from ``signature``.

    Args:
        model: path, bytes or ModelProto.
        loss: energy, mse, cross-entropy, bce-with-logits or none; ``{output: loss}`` for several outputs.
        class_axis: the axis of the classes, for cross-entropy.
        optimizer: sgd, momentum, adam or adamw; ``options`` are torch.optim's.
        output: trained outputs (inner tensors too); by default the only floating output.
        wrt: trained leaves instead of the default set: globs of parameters, exact names of inputs.
        freeze: parameters to leave out.
        tie: pairs of initializers to be one leaf.
        dims: sizes for symbolic dimensions.
        opset: of the result; by default the model's, within [18, 26].
        outputs: ``next``, ``grad`` or ``both``.
        algorithm: ``zil``, ``bp`` for plain reverse mode, or ``il`` for inference learning.
        identities: placement of identity vertices, ``shared``, ``edge``, ``min`` or ``min-bytes``; ``none`` with the
            literal schedule.
        schedule: ``wavefront`` computes what is left of the dynamics at each step; ``literal`` runs all of them in a
            Loop (the reference, inference learning, and the ablations; costs ``steps`` forward and backward passes).
        steps: T of the literal schedule; by default K for ``zil`` and 20 for ``il``.  With less than K the leaves of
            levels above T are never reached.
        gamma: integration step of the literal schedule; by default 1 for ``zil`` and 0.1 for ``il``.
        update_at: ``level`` reads a leaf's gradient at step l - 1, ``end`` reads all at the last step.
        init_noise: standard deviation of noise on the initial value nodes.
        fixed_predictions: predictions and derivatives stay at their forward values.
        mode: ``eval`` trains the model as the file has it.  ``train`` turns BatchNormalization to batch statistics,
            its running ones carried (``carried`` in the signature), and Dropout to one mask an update, drawn from the
            inputs ``seed`` and ``step``: see :func:`zilc.passes.train_mode.train_mode`.
        trace: the literal schedule also gives, for every step and vertex, the norm of the prediction error, the norm
            of the value node's movement, and the energy; vertices named here are traced with whole tensors.  The
            signature's ``trace`` names the outputs.
        straight_through: gradients pass QuantizeLinear where it did not saturate, and DequantizeLinear, as if nothing
            were rounded; wavefront and bp only.
        precision: ``float32`` computes in the model's own types.  ``float16`` and ``bfloat16`` compute the costly
            operators of a float32 model in that type (:mod:`zilc.passes.mixed_precision`); interface, parameters,
            gradients and optimizer stay float32.  ``float16`` scales the loss (:mod:`zilc.scaling`; wavefront and bp
            only): the scale and a count are ``carried``, and an update with a gradient that is not finite is skipped.
        target: where it will run fastest: where a gradient can be emitted in several ways, the choice is by costs
            fitted for onnxruntime's provider there (:mod:`zilc.lowerings`).  It runs elsewhere as well.
        tune: measure these ways on this machine, in the target's provider, instead of trusting the costs that zilc
            brings along; what was measured is remembered in the user's folder for zilc, or in the file named here.
        memory_budget: bytes, or text such as ``512MiB`` or ``1.5GB``, that the activations alive at once may take,
            beside the graph's inputs and outputs: predictions are dropped and computed again when the wave needs them,
            with the same bits (:mod:`zilc.passes.recompute`).  Needs sizes for all dimensions; wavefront and bp only.
        base_dir: folder of external data, for bytes and ModelProto.

    Raises:
        ZilcError: see :mod:`zilc.errors`.
    """
    _one_of("--outputs", outputs, ("next", "grad", "both"))
    _one_of("--algorithm", algorithm, ("zil", "il", "bp"))
    _one_of("--mode", mode, ("eval", "train"))
    plan = _plan(algorithm, schedule, identities, steps, gamma, update_at, init_noise, fixed_predictions)
    if straight_through and plan.literal is not None:
        raise OptionError(
            "quantised value nodes cannot move by fractions", where="--straight-through", hint="Use the wavefront."
        )
    budget = None if memory_budget is None else parse_size(memory_budget, BUDGET)
    if budget is not None and plan.literal is not None:
        raise OptionError(
            "the literal schedule computes in a Loop, in which nothing is dropped",
            where=BUDGET,
            hint="Use the wavefront.",
        )
    full = None if trace is False else [] if trace is True else name_list(trace)
    if full is not None and plan.literal is None:
        raise OptionError(
            "the wavefront and reverse mode have no steps to trace", where="--trace", hint="Add --schedule literal."
        )
    _one_of("--precision", precision, ("float32", *LOW))
    if precision == "float16" and plan.literal is not None:
        raise OptionError(
            "float16 wants errors multiplied by a loss scale, and by errors the literal schedule moves its value nodes",
            where="--precision",
            hint="Use the wavefront, or bfloat16.",
        )
    _one_of("--target", target, ("cpu", "cuda"))
    chosen_optimizer = optimizers.make(optimizer, options)
    found = structure(
        model, output=output, dims=dims, tie=tie, opset=opset, mode=mode, base_dir=base_dir,
        straight_through=straight_through, precision=precision,
    )  # fmt: skip
    found = placed(found, plan.identities)
    losses = settle_losses(found, loss)
    chosen = parameters.select(found.graph, found.flow, wrt=name_list(wrt), freeze=name_list(freeze), where=found.where)
    leaves = [*chosen.parameters, *chosen.inputs]
    # In the literal schedule every value node moves, whatever is trained.
    reached = leaves if plan.literal is None else found.flow.leaves
    ensure_rules(found.flow, found.levels, reached, found.where)

    state = _state(found, chosen, chosen_optimizer if outputs != "grad" else None)
    graph = _copy(found.graph)
    flow = found.flow.on(graph)
    annotate_forward(graph, flow, found.levels)
    training = TrainingGraph(
        graph,
        parameters=chosen.parameters,
        inputs=chosen.inputs,
        clamps=[
            Clamp(name, tensor, losses[name], class_axis)
            for name, tensor in zip(found.outputs, found.clamped, strict=True)
        ],
        outputs=outputs,
        optimizer=chosen_optimizer,
        linear=plan.literal is None,
        mode=found.mode,
        mixed=found.mixed is not None,
        scaled=precision == "float16",
        lowerings=Lowerings(target, tuner_of(tune, target)),
    )
    for node in graph.nodes:
        if getattr(node, FROZEN, False):
            training.op.adopt(node)  # rules ask for batch statistics, which are there
    make_extra_outputs(training.op, flow, reached)
    updates = outputs == "next"
    folds = []
    # Gradients that are looked at are those of the literal dynamics to the bit.
    rearranged = updates and plan.literal is None
    if rearranged:
        folds = fold_batch_norms(training.op, graph, set(chosen.parameters))
    traced = None
    if algorithm == "bp":
        reverse_mode(training, flow, found.levels, leaves)
    elif plan.literal is None:
        emit_schedule(training, wavefront(_dynamics(found, found.graph, plan), leaves))
    else:
        # On the training graph's own forward part, whose vertices make the optional outputs that rules read.
        dynamics = _dynamics(found, graph, plan)
        how = plan.settled(dynamics.levels.depth)
        emitted = emit_literal(training, dynamics, leaves, how, full=full)
        traced = None if emitted is None else emitted.signature(how.steps)
    graph = training.finish()
    finish_folds(graph, folds)
    graph = take_forms(training.op, spell_out(training.op, graph))
    graph = simplify(graph, updates=updates, target=target, data=training.data, bounded=training.bounded)
    if rearranged:
        graph = settle_layouts(graph)
        if target == "cpu":
            graph = multiply_row_sums(graph)
    made = _signature(training, found, chosen, algorithm, plan)
    if traced is not None:
        made["trace"] = traced
    renamed = {training_name: name for name, training_name in _statename_list(training, chosen).items()}
    lowerings = training.op.lowerings
    graph.metadata = {**getattr(graph, "metadata", {}), signatures.KEY: signatures.dumps(made)}
    if lowerings.summary():
        graph.metadata[LOWERINGS] = json.dumps(lowerings.data(), sort_keys=True)
    contracts.ensure(contracts.standard_operators(graph, _own_domains(found)), "standard_operators")
    proto = _finish(graph, found.prepared)
    if budget is not None:
        # What inference found on the finished graph: every size is a number there.
        made["recompute"] = recompute(graph, budget, onnx_io.shapes(proto)).data()
        graph.metadata[signatures.KEY] = signatures.dumps(made)
        proto = _finish(graph, found.prepared)
    report = level_report(found, chosen, plan.identities)
    if found.mixed is not None:
        report["mixed_precision"] = found.mixed.data()
    report["trained"] = [
        {"name": n, "shape": [int(d) for d in found.flow.tensors[n].shape], "level": found.levels.leaves[n],
         "update_step": found.levels.leaves[n] - 1}
        for n in chosen.parameters
    ]  # fmt: skip
    report["lowerings"] = lowerings.data()
    if target == "cuda" and graph.opset > cuda_forms.OPSET:
        report["notes"].append(cuda_forms.newer_opset(graph.opset))
    report["losses"] = losses
    report["straight_through"] = found.straight
    report["optimizer"] = {"name": chosen_optimizer.name, **chosen_optimizer.options} if outputs != "grad" else None
    initial = State({name: state[own] for name, own in renamed.items()})
    report["mode"] = mode
    report["turned"] = {
        "BatchNormalization": list(found.mode.batch_normalizations) if found.mode else [],
        "Dropout": list(found.mode.dropouts) if found.mode else [],
    }
    return TrainingStep(proto, made, initial, report, found.prepared.source, dict(found.prepared.ties))


@dataclass(frozen=True)
class Plan:
    """How the gradient is computed, with the options settled.

    Attributes:
        identities: placement, or ``none``.
        literal: None for the wavefront and for reverse mode; its ``steps`` may still be 0, meaning K.
    """

    schedule: str
    identities: str
    gamma: float = 1.0
    literal: LiteralRun | None = None

    def settled(self, depth: int) -> LiteralRun:
        assert self.literal is not None
        return replace(self.literal, steps=self.literal.steps or depth)


def _plan(
    algorithm: str, schedule: str | None, identities: str | None, steps: int | None, gamma: float | None,
    update_at: str, init_noise: float, fixed_predictions: bool,
) -> Plan:  # fmt: skip
    """Settle the options of an algorithm.

    Raises:
        OptionError: options that contradict each other.
    """
    if schedule is not None:
        _one_of("--schedule", schedule, ("wavefront", "literal"))
    _one_of("--update-at", update_at, ("level", "end"))
    if steps is not None and steps < 1:
        raise OptionError(f"{steps} inference steps, expected at least 1", where="--steps")
    if init_noise < 0:
        raise OptionError(f"{init_noise} is negative", where="--init-noise")
    wishes = {
        "--steps": steps is not None, "--gamma": gamma is not None, "--update-at end": update_at == "end",
        "--init-noise": init_noise > 0, "--fixed-predictions": fixed_predictions,
    }  # fmt: skip
    if algorithm == "bp":
        asked = [name for name, wish in wishes.items() if wish]
        if schedule is not None or asked:
            raise OptionError(f"reverse mode has no {', '.join(asked) or 'schedule'}", where="--algorithm bp")
        return Plan("reverse", "none")
    if algorithm == "il":
        if schedule == "wavefront":
            raise OptionError("inference learning has no wavefront", where="--schedule", hint="Use literal.")
        if identities not in (None, "none"):
            raise OptionError("inference learning runs on the graph as it is", where="--identities")
        run = LiteralRun(steps or IL_STEPS, "after", fixed_predictions, init_noise)
        return Plan("literal", "none", IL_GAMMA if gamma is None else gamma, run)
    placement = identities or "shared"
    _one_of("--identities", placement, (*PLACEMENTS, "none"))
    if schedule != "literal":
        asked = [name for name, wish in wishes.items() if wish]
        if placement == "none":
            asked.append("--identities none")
        if asked:
            raise OptionError(
                f"{', '.join(asked)} changes the dynamics, which the wavefront has folded away",
                where="--schedule",
                hint="Add --schedule literal.",
            )
        return Plan("wavefront", placement)
    run = LiteralRun(steps or 0, update_at, fixed_predictions, init_noise)
    return Plan("literal", placement, 1.0 if gamma is None else gamma, run)


def _dynamics(found: Structure, graph: gs.Graph, plan: Plan) -> Dynamics:
    """The equations on the levelled graph, or on the graph as it is."""
    if plan.identities != "none":
        where: Placement = plan.identities  # type: ignore[assignment]
        own = found.flow if graph is found.graph else flow_of(graph, found.clamped)
        flow = levelled_flow(graph, own, found.levels, placement=where)
    else:
        flow = flow_of(graph, found.clamped)
    on_longest = zip(found.longest.vertices, found.flow.vertices, strict=True)
    longest = tuple(level for level, node in on_longest if not getattr(node, INSERTED, False))
    return Dynamics.of(flow, find_levels(flow), gamma=plan.gamma, longest=longest)


def _one_of(where: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise OptionError(f"no choice '{value}'", where=where, hint=f"Choose one of {', '.join(allowed)}.")


def _copy(graph: gs.Graph) -> gs.Graph:
    from zilc.graph import Rebuild

    rebuild = Rebuild(graph)
    for node in graph.nodes:
        rebuild.add(node)
    return rebuild.finish()


def _own_domains(found: Structure) -> frozenset[str]:
    return frozenset(o.domain for o in found.prepared.source.proto.opset_import)


def settle_losses(found: Structure, loss: str | Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """A loss for each trained output, from ``LOSS``, ``NAME=LOSS`` or a mapping.

    Raises:
        OptionError: no such loss or output, or cross-entropy of a Softmax's output.
    """
    entries: list[tuple[str | None, str]] = []
    if isinstance(loss, Mapping):
        entries = [(name, kind) for name, kind in loss.items()]
    else:
        for item in [loss] if isinstance(loss, str) else loss:
            before, equals, kind = item.rpartition("=")
            entries.append((before if equals else None, kind))
    settled = dict.fromkeys(found.outputs, "energy")
    for name, kind in sorted(entries, key=lambda entry: entry[0] is not None):  # general ones first
        if kind not in LOSSES:
            raise OptionError(f"no loss '{kind}'", where="--loss", hint=f"Choose one of {', '.join(LOSSES)}.")
        if name is None:
            settled = dict.fromkeys(found.outputs, kind)
        elif name not in settled:
            raise OptionError(
                f"'{name}' is not a trained output", where="--loss", hint=f"They are: {', '.join(found.outputs)}."
            )
        else:
            settled[name] = kind
    producers = {t.name: node for node in found.graph.nodes for t in node.outputs if t.name}
    for name, clamped in zip(found.outputs, found.clamped, strict=True):
        if settled[name] == "cross-entropy":
            _refuse_softmax(name, producers.get(clamped), producers)
    return settled


def _refuse_softmax(name: str, node: gs.Node | None, producers: Mapping[str, gs.Node]) -> None:
    """Cross-entropy takes logits; a Softmax is looked for behind reshapes and terminals too."""
    while node is not None and node.op in ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast"):
        node = producers.get(node.inputs[0].name)
    if node is not None and node.op == "Softmax":
        raise OptionError(
            f"cross-entropy wants logits, and output '{name}' is made by a Softmax, vertex '{node.name or name}'",
            where="--loss",
            hint=f"Train its input instead: --output {node.inputs[0].name}",
        )


def _state(
    found: Structure, chosen: Selection, optimizer: optimizers.Optimizer | None
) -> dict[str, Callable[[], np.ndarray]]:
    """Loaders by (parameter), (parameter, slot), step and (running statistic), under the names of the source model."""
    loaders: dict[str, Callable[[], np.ndarray]] = {}
    for name in chosen.parameters:
        tensor = found.flow.tensors[name]
        held, shape, dtype = tensor._values, tuple(int(n) for n in tensor.shape), dtypes.np_dtype(tensor.dtype)
        loaders[name] = _loader(held)
        for slot in optimizer.slots if optimizer else ():
            loaders[f"{name}\0{slot}"] = _zeros(shape, dtype)
    for name in found.mode.carried if found.mode else ():
        loaders[name] = _loader(found.flow.tensors[name]._values)
    if (optimizer and optimizer.counts) or (found.mode and found.mode.step):
        loaders["\0step"] = lambda: np.asarray(0, np.int64)
    loaders["\0scale"] = lambda: np.asarray(scaling.INITIAL, np.float32)
    loaders["\0good"] = lambda: np.asarray(0, np.int64)
    return loaders


def _loader(held: Any) -> Callable[[], np.ndarray]:
    return lambda: ir.load_values(held)


def _zeros(shape: tuple[int, ...], dtype: Any) -> Callable[[], np.ndarray]:
    return lambda: np.zeros(shape, dtype)


def _statename_list(training: TrainingGraph, chosen: Selection) -> dict[str, str]:
    """Key of :func:`_state` -> name in the training graph."""
    names = {}
    for name in chosen.parameters:
        leaf = training.leaves[name]
        names[name] = name
        for entry in leaf.state:
            names[f"{name}\0{entry['slot']}"] = entry["name"]
    names.update((entry["name"], entry["name"]) for entry in training.carried)
    for key, tensor in (("\0scale", training.scale), ("\0good", training.good)):
        if tensor is not None:
            del names[tensor.name]
            names[key] = tensor.name
    if training.step is not None:
        names["\0step"] = training.step.name
    return names


def _signature(
    training: TrainingGraph, found: Structure, chosen: Selection, algorithm: str, plan: Plan
) -> dict[str, Any]:
    predictions = [t.name for t in training.graph.outputs if t.name in found.flow.tensors]
    step = None
    if training.step is not None:
        step = {"name": training.step.name, "next": training.step_next}
    return {
        "version": signatures.VERSION,
        "zilc": version(),
        "algorithm": algorithm,
        "schedule": plan.schedule,
        "mode": "eval" if found.mode is None else "train",
        "identities": plan.identities,
        "levels": found.levels.depth,
        "inputs": training.model_inputs,
        "targets": [{**entry, "name": entry["name"] or None} for entry in training.targets],
        "lr": training.lr.name if training.lr is not None else None,
        "step": step,
        "seed": training.seed.name if training.seed is not None else None,
        "loss": training.loss,
        "predictions": predictions,
        "parameters": [
            {"name": n, "level": leaf.level, "grad": leaf.grad, "next": leaf.next, "state": leaf.state}
            for n in chosen.parameters
            for leaf in (training.leaves[n],)
        ],
        "input_grads": [
            {"name": n, "level": training.leaves[n].level, "grad": training.leaves[n].grad} for n in chosen.inputs
        ],
        "carried": training.carried,
        **({"straight_through": True} if found.straight else {}),
        **({"precision": found.mixed.dtype} if found.mixed is not None else {}),
        **({"loss_scale": _loss_scale(training)} if training.scale is not None else {}),
    }


def _loss_scale(training: TrainingGraph) -> dict[str, Any]:
    assert training.scale is not None
    assert training.good is not None
    return {
        "scale": training.scale.name, "good_steps": training.good.name, "initial": scaling.INITIAL,
        "growth": scaling.GROWTH, "backoff": scaling.BACKOFF, "interval": scaling.INTERVAL,
    }  # fmt: skip


def _finish(graph: gs.Graph, prepared: Prepared) -> onnx.ModelProto:
    """Write out, infer all shapes, check fully."""
    source = prepared.source.proto
    graph.producer_name, graph.producer_version = "zilc", version()
    newest = min(max(source.ir_version, 10), onnx_io.MAX_IR_VERSION)
    proto = ir.to_proto(graph, ir_version=newest, infer=True)
    try:
        onnx_io.check_full(proto)
    except Exception as error:
        raise EnsuresError(f"onnx.checker refuses the emitted graph: {error}") from error
    return proto
