"""Identity vertices until every edge of a graph spans one level (ZIL.md, section 3; the paper's Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes
from zilc.graph import INSERTED, Dataflow, Edge, Rebuild, active_part, captured, fresh_name, names_of
from zilc.passes import contracts
from zilc.passes.levels import Levels
from zilc.vjp.table import differentiable_operands

#: How chains are laid: one an edge, or one a tensor; ``min`` and ``min-bytes`` share chains, on levels of their own
#: (:mod:`zilc.passes.placement`).
Placement = Literal["edge", "shared", "min", "min-bytes"]


def flow_of(graph: gs.Graph, outputs: Sequence[str]) -> Dataflow:
    """The active part of a graph, by the rule table's word on which operands carry derivatives."""
    return active_part(graph, outputs, lambda node: differentiable_operands(node, graph.opset))


def insert_identities(
    graph: gs.Graph, flow: Dataflow, levels: Levels, *, placement: Placement = "shared"
) -> gs.Graph:
    """A new graph in which every edge spans exactly one level.

    Requires: acyclic(graph); ``flow`` and ``levels`` are those of ``graph``.
    Ensures:  levelled(result); outputs equal to those of graph.

    Before:  a -> Relu -> Add,  a -> Add
    After:   a -> Relu -> Add,  a -> Identity -> Add

    *edge* makes one chain an edge; any other placement makes one chain a tensor, as long as its longest gap, tapped by
    each consumer at its level.
    """
    return levelled_flow(graph, flow, levels, placement=placement).graph


def levelled_flow(graph: gs.Graph, flow: Dataflow, levels: Levels, *, placement: Placement = "shared") -> Dataflow:
    """The active part of :func:`insert_identities`'s graph, which finds it anyway to check what it ensures."""
    contracts.require(contracts.acyclic(graph), "acyclic")
    rebuild = Rebuild(graph)
    names = names_of(graph)
    position = {id(node): v for v, node in enumerate(flow.vertices)}
    taps: dict[tuple[int, int], gs.Tensor] = {}  # (consumer, operand) -> the tensor it now reads

    def chain(tensor: gs.Tensor, top: int, bottom: int, label: str) -> list[gs.Tensor]:
        """Identity vertices on the levels top - 1 down to bottom."""
        made: list[gs.Tensor] = []
        source = rebuild.tensor(tensor)
        for level in range(top - 1, bottom - 1, -1):
            name = fresh_name(f"{tensor.name}.id{level}{label}", names)
            out = gs.Variable(name, tensor.dtype, tensor.shape)
            dtypes.carry_straight(tensor, out)
            node = gs.Node("Identity", name=name, inputs=[source], outputs=[out])
            node.metadata = {}
            node.doc_string = ""
            setattr(node, INSERTED, True)
            rebuild.nodes.append(node)
            rebuild.tensors[name] = out
            made.append(out)
            source = out
        return made

    def delay(tensor: gs.Tensor, top: int, edges: Sequence[Edge]) -> None:
        gaps = [(e, levels.gap(e)) for e in edges]
        if placement != "edge":
            lowest = min((levels.vertices[e.consumer] + 1 for e, gap in gaps if gap > 0), default=top)
            made = chain(tensor, top, lowest, "")
            for e, gap in gaps:
                if gap > 0:
                    taps[e.consumer, e.operand] = made[gap - 1]
        else:
            for e, gap in gaps:
                if gap > 0:
                    label = f".{flow.names[e.consumer]}.{e.operand}"
                    taps[e.consumer, e.operand] = chain(tensor, top, top - gap, label)[-1]

    for leaf in flow.leaves:
        delay(flow.tensors[leaf], levels.leaves[leaf], flow.readers.get(leaf, []))
    for node in graph.nodes:
        vertex = position.get(id(node))
        if vertex is None:
            rebuild.add(node)
            continue
        inputs = [taps.get((vertex, k)) or rebuild.tensor(t) for k, t in enumerate(node.inputs)]
        outside = captured(node) if node.attrs else []
        moved = {
            t.name: taps[vertex, len(inputs) + k] for k, t in enumerate(outside) if (vertex, len(inputs) + k) in taps
        }
        rebuild.add(node, inputs, moved)
        for tensor in node.outputs:
            if tensor.name in flow.readers:
                delay(tensor, levels.vertices[vertex], flow.readers[tensor.name])
    result = rebuild.finish()
    found = flow_of(result, flow.outputs)
    contracts.ensure(contracts.levelled(found), "levelled")
    return found


@dataclass(frozen=True)
class Cost:
    """What a placement needs.

    Attributes:
        vertices: how many identity vertices.
        by_level: how many on each level.
        bytes: what their tensors hold, symbolic dimensions left out.
        formula: the same with symbolic dimensions, as a sum of products.
    """

    vertices: int
    by_level: dict[int, int]
    bytes: int
    formula: str


def cost(flow: Dataflow, levels: Levels, placement: Placement) -> Cost:
    """Count the identities of a placement without inserting them; ``levels`` are those that it puts vertices on."""
    change = np.zeros(levels.depth + 2, np.int64)  # how many more chains a level holds than the one below
    sizes: dict[str, int] = {}
    total = known = 0
    for tensor, edges in flow.readers.items():
        gaps = [levels.gap(e) for e in edges]
        chains = gaps if placement == "edge" else [max(gaps)]
        top = levels.of(edges[0])
        for length in chains:
            if not length:
                continue
            total += length
            change[top - length] += 1
            change[top] -= 1
            factor, number = _bytes(flow.tensors[tensor])
            if factor:
                sizes[factor] = sizes.get(factor, 0) + number * length
            else:
                known += number * length
    terms = [f"{n:,}*{factor}" for factor, n in sorted(sizes.items())]
    if known or not terms:
        terms.insert(0, f"{known:,}")
    by_level = {level: count for level, count in enumerate(np.cumsum(change).tolist()) if count}
    return Cost(total, by_level, known, " + ".join(terms))


def _bytes(tensor: gs.Tensor) -> tuple[str, int]:
    """Bytes of a tensor: the product of its symbolic dimensions ('' if none), and the number beside it."""
    dtype = dtypes.np_dtype(tensor.dtype)
    size = dtype.itemsize if dtype is not None else 4
    if tensor.shape is None:
        return f"size({tensor.name})", size
    symbols = [str(n) if n is not None else "?" for n in tensor.shape if not isinstance(n, (int, np.integer))]
    number = int(np.prod([int(n) for n in tensor.shape if isinstance(n, (int, np.integer))], dtype=np.int64))
    return "*".join(sorted(symbols)), number * size
