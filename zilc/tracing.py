"""The dynamics as arrays: prediction errors, movements and energies of every vertex, step by step."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from zilc import onnx_io
from zilc.analysis import Names
from zilc.errors import DataError, OptionError
from zilc.executors import executor
from zilc.feeds import arrays, checked_feeds, random_feeds, random_target
from zilc.onnx_io import ModelSource, Source
from zilc.passes.identities import Placement
from zilc.pipeline import Mode, TrainingStep, emit_training


@dataclass
class Trace:
    """What :func:`trace` returns: one run of the dynamics.

    ``V`` vertices, identity vertices among them, and ``T`` inference steps.  Row t of ``error`` and ``energy`` is the
    state of step t, row T the state after the last; row t of ``movement`` leads from step t to t + 1.

    Attributes:
        algorithm: ``zil`` or ``il``; ``gamma`` its integration step.
        vertices: V names; ``operators`` V ONNX operators; ``levels`` int64 [V]; ``identity`` bool [V], True for an
            identity vertex that delays an edge.
        error: norm of the prediction error, float64 [T + 1, V].
        movement: norm of the value node's movement, float64 [T, V]; zero where it is clamped.
        energy: half the squared error, the loss of a clamped output, float64 [T + 1, V].
        parameters: name -> (level, the step whose errors its update reads).
        full: ``TENSOR/error``, ``TENSOR/movement`` and ``TENSOR/value`` of the vertices asked for: [T + 1, …],
            [T, …] and [T + 1, …] in the tensor's own dtype.  A clamped output has its error alone.
        executor: which runtime ran the graph.
        step: the training graph that gave the numbers.
        notes: what the user should know about the run.
    """

    model: str
    algorithm: str
    identities: str
    gamma: float
    update_at: str
    outputs: list[str]
    losses: dict[str, str]
    vertices: list[str]
    operators: list[str]
    levels: np.ndarray
    identity: np.ndarray
    error: np.ndarray
    movement: np.ndarray
    energy: np.ndarray
    parameters: dict[str, tuple[int, int]]
    full: dict[str, np.ndarray]
    executor: str
    step: TrainingStep = field(repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.movement)

    @property
    def depth(self) -> int:
        """K."""
        return int(self.step.signature["levels"])

    def by_level(self, quantity: Literal["error", "movement", "energy"] = "energy") -> np.ndarray:
        """A quantity of whole levels, [rows, levels]: energies added, norms as the root of the sum of squares.

        What has overflowed stays infinite or not a number.
        """
        values = getattr(self, quantity)
        made = np.zeros((len(values), int(self.levels.max(initial=0)) + 1))
        with np.errstate(over="ignore", invalid="ignore"):
            np.add.at(made.T, self.levels, (values if quantity == "energy" else values**2).T)
            return made if quantity == "energy" else np.sqrt(made)

    def data(self) -> dict[str, Any]:
        """A summary as data: what ``zilc trace --json`` prints."""
        learning = Counter(t for _, t in self.parameters.values())
        reached = [int(self.levels[row != 0].max(initial=-1)) for row in self.error]
        with np.errstate(all="ignore"):
            energies = self.energy.sum(axis=1)
        return {
            "model": self.model,
            "algorithm": self.algorithm,
            "identities": self.identities,
            "identities_inserted": int(self.identity.sum()),
            "vertices": len(self.vertices),
            "levels": self.depth,
            "steps": self.steps,
            "gamma": self.gamma,
            "update_at": self.update_at,
            "outputs": self.outputs,
            "losses": self.losses,
            "executor": self.executor,
            "states": [
                {"step": t, "energy": float(energies[t]), "reached": reached[t], "learning": learning.get(t, 0)}
                for t in range(self.steps + 1)
            ],
            "parameters": [
                {"name": name, "level": level, "update_step": t} for name, (level, t) in self.parameters.items()
            ],
            "full": sorted(self.full),
            "notes": self.notes,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """What the .npz file holds, by name."""
        return {
            "algorithm": np.asarray(self.algorithm),
            "identities": np.asarray(self.identities),
            "gamma": np.asarray(self.gamma),
            "vertices": np.asarray(self.vertices, np.str_),
            "operators": np.asarray(self.operators, np.str_),
            "levels": self.levels,
            "identity": self.identity,
            "error": self.error,
            "movement": self.movement,
            "energy": self.energy,
            "parameters": np.asarray(list(self.parameters), np.str_),
            "parameter_levels": np.asarray([level for level, _ in self.parameters.values()], np.int64),
            "update_steps": np.asarray([t for _, t in self.parameters.values()], np.int64),
            **{f"full/{name}": value for name, value in self.full.items()},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file, whole or not at all.

        Raises:
            FileError: it cannot be written.
        """
        from zilc.files import together

        with together(path) as (target,):
            self.write(target)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file in place; whatever the suffix, the name is kept."""
        with open(path, "wb") as file:
            np.savez_compressed(file, **self.arrays())  # type: ignore[arg-type]


def trace(
    model: ModelSource | Source,
    *,
    data: str | os.PathLike[str] | Mapping[str, np.ndarray] | None = None,
    algorithm: Literal["zil", "il"] = "zil",
    loss: str | Mapping[str, str] | Sequence[str] = "energy",
    class_axis: int = -1,
    output: Names = None,
    wrt: Names = None,
    freeze: Names = None,
    tie: Sequence[tuple[str, str]] | Mapping[str, str] = (),
    dims: Mapping[str, int] | None = None,
    opset: int | None = None,
    identities: Placement | Literal["none"] | None = None,
    steps: int | None = None,
    gamma: float | None = None,
    update_at: Literal["level", "end"] = "level",
    init_noise: float = 0.0,
    fixed_predictions: bool = False,
    mode: Mode = "eval",
    full: Sequence[str] = (),
    seed: int = 0,
    base_dir: str | os.PathLike[str] | None = None,
) -> Trace:
    """Run the dynamics on one batch and record every step.

    The literal schedule's training graph is emitted with traces as outputs, and run once.

    Args:
        data: arrays by input name (targets too if you like), or an .npz file of them; by default random ones, drawn
            with ``seed``, as :func:`zilc.verify` draws them.
        algorithm: ``zil``, or ``il`` for inference learning.
        full: vertices or tensors whose errors, movements and value nodes are wanted whole.
        Everything else as for :func:`zilc.emit_training`.

    Raises:
        ZilcError: see :mod:`zilc.errors`.
    """
    if algorithm not in ("zil", "il"):
        raise OptionError(f"'{algorithm}' has no steps to trace", where="--algorithm", hint="Choose zil or il.")
    source = onnx_io.load(model, base_dir=base_dir)
    step = emit_training(
        source, loss=loss, class_axis=class_axis, output=output, wrt=wrt, freeze=freeze, tie=tie, dims=dims,
        opset=opset, algorithm=algorithm, identities=identities, schedule="literal", steps=steps, gamma=gamma,
        update_at=update_at, init_noise=init_noise, fixed_predictions=fixed_predictions, mode=mode, outputs="grad",
        trace=list(full) or True,
    )  # fmt: skip
    feeds = feeds_of(step, data, class_axis=class_axis, seed=seed, dims=dims)
    run = executor(step.model)
    traced = step.signature["trace"]
    wanted = [traced[q] for q in ("error", "movement", "energy")]
    wanted += [entry[key] for entry in traced["full"] for key in _PARTS if entry[key]]
    with np.errstate(all="ignore"):  # levels that the wave has passed may overflow; nothing reads them
        made = run(feeds, wanted)
    last = traced["steps"]
    learned = {
        p["name"]: (p["level"], last if algorithm == "il" else last - 1 if update_at == "end" else p["level"] - 1)
        for p in step.signature["parameters"]
    }
    notes = []
    unread = [name for name, (_, t) in learned.items() if t > last]
    if unread:
        notes.append(f"with {last} steps the errors reach {len(learned) - len(unread)} of {len(learned)} parameters")
    overflowed = int(np.count_nonzero(~np.isfinite(made[traced["error"]]).all(axis=1)))
    if overflowed:
        notes.append(f"errors overflow in {overflowed} of {last + 1} states, on levels that the wave has passed")
    return Trace(
        model=source.name,
        algorithm=algorithm,
        identities=step.signature["identities"],
        gamma=traced["gamma"],
        update_at="after" if algorithm == "il" else update_at,
        outputs=[entry["output"] for entry in step.signature["targets"]],
        losses=dict(step.report["losses"]),
        vertices=[v["name"] for v in traced["vertices"]],
        operators=[v["operator"] for v in traced["vertices"]],
        levels=np.asarray([v["level"] for v in traced["vertices"]], np.int64),
        identity=np.asarray([v["identity"] for v in traced["vertices"]], bool),
        error=made[traced["error"]],
        movement=made[traced["movement"]],
        energy=made[traced["energy"]],
        parameters=learned,
        full={
            f"{entry['tensor']}/{key}": made[entry[key]] for entry in traced["full"] for key in _PARTS if entry[key]
        },
        executor=run.name,
        step=step,
        notes=notes,
    )


_PARTS = ("error", "movement", "value")


def feeds_of(
    step: TrainingStep,
    data: str | os.PathLike[str] | Mapping[str, np.ndarray] | None,
    *,
    class_axis: int = -1,
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Every input of a training graph that computes gradients: the model's, targets, initial parameters.

    Targets that ``data`` does not hold are drawn, of the shape that the model's output has.

    Raises:
        DataError: an array is missing or does not fit.
    """
    signature = step.signature
    held = [entry["name"] for entry in (*signature["parameters"], *signature["carried"])]
    drawn = {signature["seed"]: seed, signature["step"]["name"]: 0} if signature["seed"] else {}
    leaves = [*signature["inputs"], *held, *drawn]
    # Parameters among the inputs show the Gathers' bounds; values are drawn for the model's own inputs alone.
    graph = gs.import_onnx(_only(step.model, leaves, signature["predictions"]))
    graph.inputs = [t for t in graph.inputs if t.name in set(signature["inputs"])]
    given: Mapping[str, np.ndarray] = {}
    where = "data"
    if data is None:
        feeds = random_feeds(graph, seed, dims)
    else:
        given, where = arrays(data, where)
        feeds = checked_feeds(graph.inputs, given, where)
    feeds.update({name: np.asarray(step.state[name]) for name in held})
    feeds.update({name: np.asarray(value, np.int64) for name, value in drawn.items()})
    rng = np.random.default_rng(seed + 2)
    missing = [e for e in signature["targets"] if e["name"] is not None and e["name"] not in given]
    outputs = [e["output"] for e in missing if e["output"] not in feeds]
    made = dict(feeds)
    if outputs:
        made.update(executor(_only(step.model, leaves, outputs))(feeds))
    kinds = {i.name: i.type.tensor_type for i in step.model.graph.input}
    for entry in signature["targets"]:
        name = entry["name"]
        if name is None:
            continue
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kinds[name].elem_type)
        if name in given:
            value = np.asarray(given[name])
            if (value.dtype.kind == "f") != (dtype.kind == "f"):
                raise DataError(f"array '{name}' is {value.dtype}, expected {dtype}", where=where)
            feeds[name] = value.astype(dtype)
        else:
            mu = made[entry["output"]]
            feeds[name] = np.asarray(random_target(entry["loss"], mu.shape, mu.dtype, class_axis, rng)).astype(dtype)
    return feeds


def _only(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """The part of a model that makes ``outputs``, with all of ``inputs`` as its inputs."""
    graph = model.graph
    live, nodes = set(outputs), []
    for node in reversed(graph.node):
        if live.intersection(node.output):
            nodes.append(node)
            live.update(node.input)
            live.update(_captured(node))
    made = onnx.ModelProto()
    made.ir_version = model.ir_version
    made.opset_import.extend(model.opset_import)
    made.functions.extend(model.functions)
    made.graph.name = graph.name
    made.graph.node.extend(reversed(nodes))
    made.graph.input.extend(i for i in graph.input if i.name in set(inputs))
    made.graph.output.extend(o for o in graph.output if o.name in set(outputs))
    made.graph.initializer.extend(t for t in graph.initializer if t.name in live)
    made.graph.sparse_initializer.extend(graph.sparse_initializer)
    return made


def _captured(node: onnx.NodeProto) -> set[str]:
    """Every name that a node's subgraphs read, whoever makes it."""
    found: set[str] = set()
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            for own in inner.node:
                found.update(own.input)
                found.update(_captured(own))
            found.update(o.name for o in inner.output)
    return found

