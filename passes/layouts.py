"""In which order the axes of a value lie: Transposes are moved to where the fewest elements are transposed.

Some lowerings compute with spatial axes first, [H, W, N, C] where the model has [N, C, H, W]
(:mod:`zilc.vjp.winograd`), and say so at the Transposes that they begin and end with.  What is computed element by
element can follow in either order, so which values lie how is a choice.  A value costs its size where some of the nodes
that make and read it want it in one order and some in the other.  The labels of least cost are a minimum cut of a graph
that joins each node to the values it touches: the ends of the cut are the nodes that take one order only.

onnxruntime's optimizer moves Transposes too, and is as fast with those left where they were (docs/PROFILE.md).  But
where it moves one past a sum, that adds up in another order, and whether it does hangs on what stands around: within
a memory budget updates would have other bits than without.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.graph import INFERENCE, SPATIAL_FIRST, captured, is_standard, known_axes, name_anew
from zilc.lowerings import assumed
from zilc.vjp.window import channels_first_order, spatial_first_order

#: Computed element by element, operands broadcast to one another.
_ELEMENTWISE = frozenset(
    {"Abs", "Add", "And", "Cast", "Ceil", "Clip", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater",
     "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean",
     "Min", "Mish", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign",
     "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Where", "Xor"}
)  # fmt: skip
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"})
#: Which operand holds axes.
_AXES = {**dict.fromkeys(_REDUCTIONS, 1), "Slice": 3}
#: Places in the cut's graph of the nodes that take one order only.
_PLAIN, _TURNED = 0, 1
#: Of an edge that is never cut; those of values are half of it together, so that scipy can add all up in 32 bits.
_CAPACITY = 1 << 29


def settle_layouts(graph: gs.Graph) -> gs.Graph:
    """Lay values out so that the fewest elements are transposed (in place).

    Requires: topological order; :data:`zilc.graph.SPATIAL_FIRST` at the Transposes that may move.
    Ensures: same outputs with the same names, but for the order in which a reduction adds up.
    """
    layouts = _Layouts(graph, Emitter.among(graph))
    if layouts.wanted or layouts.native:
        rewriting = _Rewriting(layouts, layouts.turned())
        for node in graph.nodes:
            rewriting.add(node)
        graph.nodes = rewriting.nodes
    return graph


@dataclass
class _Layouts:
    """The values of a graph under the names that they have with the model's order of axes.

    Attributes:
        wanted: what someone reads with spatial axes first, by name.
        native: what is made with spatial axes first, by name.
    """

    graph: gs.Graph
    op: Emitter
    wanted: dict[str, gs.Tensor] = field(default_factory=dict)
    native: dict[str, gs.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        held = self.kept | self.captured
        for node in self.graph.nodes:
            way = getattr(node, SPATIAL_FIRST, None)
            if way is True and node.outputs[0].name in held:
                delattr(node, SPATIAL_FIRST)  # a Transpose of the model's is the same node, and has to stay
            elif way is True:
                self.wanted[node.inputs[0].name] = node.inputs[0]
            elif way is False:
                self.native[node.outputs[0].name] = node.outputs[0]

    # -- which nodes could take either order --

    @cached_property
    def kept(self) -> set[str]:
        """Names that have to be there with what they mean now, whoever reads them."""
        named = {facts["shape_of"] for facts in map(_inference, self.graph.nodes) if "shape_of" in facts}
        return {tensor.name for tensor in self.graph.outputs} | named

    @cached_property
    def captured(self) -> set[str]:
        """Names that subgraphs read."""
        return {tensor.name for node in self.graph.nodes if node.attrs for tensor in captured(node)}

    @cached_property
    def numbers(self) -> set[str]:
        """Values that in inference form are a number each, and have no axes there to put in order."""
        found: set[str] = set()
        for node in self.graph.nodes:
            if "value" in _inference(node):
                found.add(node.outputs[0].name)
            elif node.op in _ELEMENTWISE and any(t.name in found for t in node.inputs):
                others = [t for t in node.inputs if t.name and t.name not in found]
                if all(self.op.rank(t) == 0 for t in others):
                    found.add(node.outputs[0].name)
        return found

    @cached_property
    def readers(self) -> dict[str, list[gs.Node | None]]:
        """Who reads a value with the model's order; None stands for subgraphs, and for what has to be there."""
        found: dict[str, list[gs.Node | None]] = {}
        for node in self.graph.nodes:
            if getattr(node, SPATIAL_FIRST, None) is None:
                for tensor in node.inputs:
                    found.setdefault(tensor.name, []).append(node)
        for name in self.kept | self.captured:
            found.setdefault(name, []).append(None)
        return found

    def _is_free(self, node: gs.Node) -> bool:
        """Whether a node can compute in either order: its result, if it has one of several axes, is then in that."""
        if not is_standard(node) or len(node.outputs) != 1:
            return False
        if any(t.name in self.numbers for t in (*node.inputs, *node.outputs)):
            return False
        dims = [self.op.dims(t) for t in node.inputs if t.name]
        made = self.op.dims(node.outputs[0])
        if made is None or any(d is None for d in dims):
            return False
        ranks = [len(d) for d in dims if d is not None]
        if node.op in _ELEMENTWISE:
            return len(made) in (3, 4) and max(ranks) == len(made)
        if not dims or ranks[0] not in (3, 4):
            return False
        if node.op in _REDUCTIONS:
            axes = _axes(node, ranks[0])
            return axes is not None and bool(node.attrs.get("keepdims", 1) or ranks[0] - len(axes) <= 1)
        return node.op == "Concat" or (node.op == "Slice" and _axes(node, ranks[0]) is not None)

    def _touched(self, node: gs.Node) -> list[gs.Tensor]:
        """Values that are in the order a free node computes in."""
        operands = node.inputs[:1] if node.op in _AXES else node.inputs
        rank = max(self.op.rank(t) or 0 for t in operands if t.name)
        return [t for t in (*operands, *node.outputs) if t.name and self.op.rank(t) == rank]

    # -- the choice --

    def turned(self) -> set[int]:
        """Ids of the free nodes that compute with spatial axes first."""
        free: dict[int, int] = {}
        places: dict[str, set[int]] = {}  # of a value: the nodes of the cut's graph that touch it
        sizes: dict[str, float] = {}
        queue = [*self.wanted.values(), *self.native.values()]
        while queue:
            value = queue.pop()
            if value.name in places:
                continue
            members = places[value.name] = set()
            shape = assumed(self.op, value)
            sizes[value.name] = float(np.prod(shape)) if shape is not None else 0.0
            if value.name in self.native or value.name in self.wanted:
                members.add(_TURNED)
            makers: list[gs.Node | None] = [] if value.name in self.native else [*(value.inputs or [None])]
            for node in (*makers, *self.readers.get(value.name, ())):
                if node is not None and self._is_free(node):
                    members.add(free.setdefault(id(node), 2 + len(free)))
                    queue += self._touched(node)
                elif node is None or not _is_of_sizes(node):
                    members.add(_PLAIN)
        labels = _cut(len(free), [(sizes[name], members) for name, members in places.items()])
        return {node for node, place in free.items() if place in labels}


def _is_of_sizes(node: gs.Node) -> bool:
    """Whether a node looks at a value's sizes alone."""
    return is_standard(node) and node.op in ("Shape", "Size")


def _inference(node: gs.Node) -> dict[str, Any]:
    """What a node is in inference form, see :func:`zilc.session.inference_form`."""
    said = node.metadata.get(INFERENCE)
    return {} if said is None else json.loads(said)


def _axes(node: gs.Node, rank: int) -> list[int] | None:
    """The axes that an operand of a node says, where they are known."""
    return known_axes(node.inputs[_AXES[node.op]], rank) if len(node.inputs) > _AXES[node.op] else None


def _cut(free: int, values: Sequence[tuple[float, set[int]]]) -> set[int]:
    """The places of free nodes on the side of :data:`_TURNED` in a minimum cut.

    A value is two more nodes, a and b, and an edge from a to b of its size: what touches it leads to a and is led to by
    b, so that the edge is cut where the touching nodes are on both sides.

    Args:
        free: how many places there are behind the two ends.
        values: size of each, and the places that touch it.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    values = [(size, touching) for size, touching in values if len(touching) > 1]
    total = sum(size for size, _ in values)
    scale = min(1.0, _CAPACITY / max(total, 1.0) / 2)
    rows, columns, capacities = [], [], []
    for number, (size, touching) in enumerate(values):
        a = 2 + free + 2 * number
        edges = [(a, a + 1, int(size * scale) + 1)]
        edges += [edge for place in touching for edge in ((place, a, _CAPACITY), (a + 1, place, _CAPACITY))]
        for start, end, capacity in edges:
            rows.append(start)
            columns.append(end)
            capacities.append(capacity)
    count = 2 + free + 2 * len(values)
    edges_ = csr_array((np.array(capacities, np.int32), (rows, columns)), shape=(count, count))
    flow = maximum_flow(edges_, _PLAIN, _TURNED).flow
    # From whom the end is reached where there is room left.
    room = edges_ - flow
    room.data[room.data < 0] = 0
    room.eliminate_zeros()
    reached = breadth_first_order(csr_array(room.T), _TURNED, directed=True, return_predecessors=False)
    return {int(place) for place in reached}


# --- the graph in the chosen layouts --------------------------------------------------------------------------------


class _Rewriting:
    """The nodes of a graph once more, some of them with spatial axes first.

    Attributes:
        nodes: those made so far.
    """

    def __init__(self, layouts: _Layouts, turned: set[int]) -> None:
        self.op, self.turned = layouts.op, turned
        self.nodes: list[gs.Node] = []
        self._kept = layouts.kept
        #: Values with spatial axes first, by the names they have with the model's order, and by how many axes they have
        #: there: one of fewer is broadcast to others.
        self._first: dict[tuple[str, int], gs.Tensor] = {}
        #: Of these the ones that are not there with the model's order.
        self._missing: set[str] = set()
        #: What takes the place of what a Transpose to spatial axes first gave.
        self._instead: dict[str, gs.Tensor] = {}

    def add(self, node: gs.Node) -> None:
        """The node, or what takes its place, behind what it needs."""
        way = getattr(node, SPATIAL_FIRST, None)
        with self.op.in_place_of(node):
            if way is True:
                self._instead[node.outputs[0].name] = self._spatial(node.inputs[0])
                node.outputs.clear()
            elif way is False:
                result = node.outputs[0]
                self._leave(node, node.inputs[0])
                self._plain_if_kept(result)
            else:
                if any(t.name in self._instead for t in node.inputs):
                    node.inputs = [self._instead.get(t.name, t) for t in node.inputs]
                if id(node) in self.turned:
                    self._turn(node)
                elif _is_of_sizes(node) and node.inputs[0].name in self._missing:
                    self._sizes(node)
                else:
                    for tensor in (*node.inputs, *(captured(node) if node.attrs else ())):
                        self._plain(tensor)
                    self.nodes.append(node)

    def _plain(self, tensor: gs.Tensor) -> gs.Tensor:
        """The value with the model's order of axes."""
        if tensor.name in self._missing:
            self._missing.remove(tensor.name)
            rank = self._rank(tensor)
            self._name(self._turned_over(self._first[tensor.name, rank], rank - 2, channels_first_order(rank)), tensor)
        return tensor

    def _spatial(self, tensor: gs.Tensor, rank: int | None = None) -> gs.Tensor:
        """The value with spatial axes first, as one of ``rank`` axes."""
        dims = self.op.dims(tensor) or []
        rank = len(dims) if rank is None else rank
        if all(n == 1 for n in dims):
            return self._plain(tensor)
        if (tensor.name, rank) not in self._first:
            whole = self._plain(tensor)
            if len(dims) < rank:
                whole = self._emit("Unsqueeze", whole, list(range(rank - len(dims))))
            self._first[tensor.name, rank] = self._turned_over(whole, 2, spatial_first_order(rank))
        return self._first[tensor.name, rank]

    def _turn(self, node: gs.Node) -> None:
        """The node computes with spatial axes first."""
        result, first = node.outputs[0], node.inputs[0]
        if node.op in _ELEMENTWISE or node.op == "Concat":
            rank = self._rank(result)
            node.inputs = [self._spatial(t, rank) if t.name else t for t in node.inputs]
        else:
            rank = self._rank(first)
            node.inputs[0] = self._spatial(first)
        order = spatial_first_order(rank)
        if node.op == "Concat":
            node.attrs["axis"] = order.index(node.attrs["axis"] % rank)
        elif node.op in _AXES:
            axes = [order.index(axis) for axis in _axes(node, rank) or ()]
            node.inputs[_AXES[node.op]] = self.op.constant(np.array(axes, np.int64))
        facts = _inference(node)
        if "axes" in facts:  # of running statistics, that are there of the batch's
            facts["axes"] = sorted(order.index(axis) for axis in facts["axes"])
            node.metadata = {**node.metadata, INFERENCE: json.dumps(facts)}
        dims = self.op.dims(result) or []
        if len(dims) == rank and any(n != 1 for n in dims):  # else it is the same in either order
            made = gs.Variable(self.op.fresh(f"{result.name}/spatial_first"), result.dtype, [dims[a] for a in order])
            self._leave(node, made)
            node.outputs = [made]
        self.nodes.append(node)
        self._plain_if_kept(result)

    def _leave(self, node: gs.Node, made: gs.Tensor) -> None:
        """What ``node`` gave is ``made``, with spatial axes first."""
        result = node.outputs[0]
        rank = self._rank(result)  # inferred while its maker is known
        node.outputs.clear()
        self._first[result.name, rank] = made
        self._missing.add(result.name)

    def _plain_if_kept(self, tensor: gs.Tensor) -> None:
        if tensor.name in self._kept:
            self._plain(tensor)

    def _sizes(self, node: gs.Node) -> None:
        """The shape or size of a value that is there with spatial axes first only."""
        source, rank = node.inputs[0], self._rank(node.inputs[0])
        if node.op == "Size":
            node.inputs[0] = self._first[source.name, rank]
            self.nodes.append(node)
            return
        order = channels_first_order(rank)[slice(node.attrs.get("start", 0), node.attrs.get("end", rank))]
        made = self._emit("Gather", self._emit("Shape", self._first[source.name, rank]), order)
        result = node.outputs[0]
        node.outputs.clear()
        self._name(made, result)

    def _name(self, made: gs.Tensor, result: gs.Tensor) -> None:
        """What was emitted last is ``result``."""
        name_anew(made, result)
        self.op.forget()  # it would give ``made`` again

    def _turned_over(self, x: gs.Tensor, front: int, order: list[int]) -> gs.Tensor:
        """``x`` with its first ``front`` axes behind the others.

        As the transpose of a matrix, of however many axes, which runtimes copy block by block.
        """
        dims = self.op.dims(x) or []
        known = [int(n) if isinstance(n, (int, np.integer)) else -1 for n in dims]
        if known.count(-1) > 1 or 0 in known:
            return self._emit("Transpose", x, perm=order)
        matrix = self._emit("Reshape", x, [max(math.prod(known[:front]), -1), max(math.prod(known[front:]), -1)])
        return self._emit("Reshape", self._emit("Transpose", matrix, perm=[1, 0]), [known[axis] for axis in order])

    def _emit(self, kind: str, *operands: Any, **attrs: Any) -> gs.Tensor:
        self.op.graph.nodes = []
        made: gs.Tensor = self.op.emit(kind, *operands, **attrs)
        for node in self.op.graph.nodes:
            node.metadata.pop(INFERENCE, None)  # of the node that it is emitted for
        self.nodes += self.op.graph.nodes
        return made

    def _rank(self, tensor: gs.Tensor) -> int:
        rank = self.op.rank(tensor)
        assert rank is not None, "a value of known rank"
        return rank
