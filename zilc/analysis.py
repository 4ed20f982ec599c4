"""What is found in a model before anything is emitted: its prepared graph, trained outputs and levels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_graphsurgeon as gs

import zilc.vjp  # noqa: F401  (fills the table)
from zilc import onnx_io
from zilc.graph import Dataflow
from zilc.onnx_io import ModelSource, Source
from zilc.passes import contracts, placement, prepare
from zilc.passes.levels import Levels, find_levels
from zilc.passes.mixed_precision import MixedPrecision, mixed_precision
from zilc.passes.prepare import Prepared
from zilc.passes.straight import pass_through
from zilc.passes.train_mode import TrainMode, train_mode

Names = str | Sequence[str] | None


def name_list(names: Names) -> list[str]:
    if names is None:
        return []
    return [names] if isinstance(names, str) else list(names)


@dataclass
class Structure:
    """A prepared model with its trained outputs, levels and parameters.

    Attributes:
        prepared: the graph (terminals appended) and where it came from.
        outputs: trained outputs as the user names them; ``clamped`` are the tensors of level 0.
        levels: where the placement of identities puts vertices; by default those of the longest path.
        longest: levels of the longest path, which fix the order of sums.
        mode: what the training mode turned; None in inference form.
        straight: vertices of QuantizeLinear through which the gradient passes.
        mixed: what computes in a narrower type than float32; None where the model's own types stand.
    """

    prepared: Prepared
    graph: gs.Graph
    outputs: list[str]
    clamped: list[str]
    flow: Dataflow
    levels: Levels
    longest: Levels
    mode: TrainMode | None = None
    straight: list[str] = field(default_factory=list)
    mixed: MixedPrecision | None = None

    @property
    def where(self) -> str:
        return self.prepared.source.name


def structure(
    model: ModelSource | Source,
    *,
    output: Names = None,
    dims: Mapping[str, int] | None = None,
    tie: Sequence[tuple[str, str]] | Mapping[str, str] = (),
    opset: int | None = None,
    mode: str = "eval",
    base_dir: str | os.PathLike[str] | None = None,
    straight_through: bool = False,
    precision: str = "float32",
) -> Structure:
    """Load, prepare, turn to training form and to mixed precision if asked, choose outputs, find levels."""
    source = onnx_io.load(model, base_dir=base_dir)
    ties = list(tie.items()) if isinstance(tie, Mapping) else list(tie)
    prepared = prepare.prepare(source, opset=opset, dims=dims, ties=ties, keep=name_list(output))
    straight: list[str] = []
    if straight_through:
        prepared.graph, straight = pass_through(prepared.graph, prepared.graph.opset, source.name)
    turned: TrainMode | None = None
    if mode == "train":
        prepared.graph, turned = train_mode(prepared.graph)
    mixed: MixedPrecision | None = None
    if precision != "float32":
        prepared.graph, mixed = mixed_precision(
            prepared.graph, precision, keep=name_list(output), where=source.name
        )
    outputs = prepare.choose_outputs(prepared.graph, name_list(output), source.name)
    flow, clamped = prepare.append_terminals(prepared.graph, outputs)
    contracts.require(contracts.acyclic(flow.graph), "acyclic")
    longest = find_levels(flow)
    return Structure(prepared, flow.graph, outputs, clamped, flow, longest, longest, turned, straight, mixed)


def placed(found: Structure, where: str) -> Structure:
    """The structure with its vertices on the levels of a placement."""
    if where not in ("min", "min-bytes"):
        return found
    by: placement.Measure = "bytes" if where == "min-bytes" else "count"
    return replace(found, levels=placement.least_identities(found.flow, by=by))
