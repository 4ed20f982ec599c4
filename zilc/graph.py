"""The graph as vertices and edges: the active part, through which derivatives flow (ZIL.md, section 3).

A *vertex* is a node with the tensors it makes; a *leaf* is a floating tensor that no node makes (a parameter or a
model input).  The active part keeps the vertices and leaves on a differentiable path from a leaf to a trained
output.  Everything else is frozen at its forward value and takes no part in levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import networkx as nx
import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes, ir

#: Attribute of a gs.Node: it is an identity vertex that zilc put in (a delay or a terminal), not the model's own.
INSERTED = "zilc_inserted"
#: Attribute of a gs.Node: it is held at its forward value, no derivative passes it (batch statistics that are only
#: carried, Dropout's masks).
FROZEN = "zilc_frozen"
#: Attribute of a BatchNormalization in training form: names of x - mean and of 1/sqrt(variance + epsilon), which
#: frozen nodes make.
STATISTICS = "zilc_statistics"
#: Attribute of a Cast that mixed precision put in.
PRECISION = "zilc_precision"
#: Attribute of a Transpose at which computing with spatial axes first begins (True) or ends (False): it may be moved
#: (:mod:`zilc.passes.layouts`).
SPATIAL_FIRST = "zilc_spatial_first"
#: Metadata of a node that is something else in inference form: see :func:`zilc.session.inference_form`.
INFERENCE = "zilc.inference"


@dataclass(frozen=True, slots=True)
class Edge:
    """Operand ``tensor``, made by vertex ``source`` (None: a leaf), read by ``consumer`` as its operand ``operand``.

    An operand used twice by one vertex is two edges.
    """

    tensor: str
    source: int | None
    consumer: int
    operand: int


@dataclass
class Dataflow:
    """The active part of a graph.

    Attributes:
        graph: the whole graph.
        vertices: active nodes in topological order; an edge names them by position.
        names: a unique name for each vertex.
        leaves: active leaves, model inputs first, then parameters in order of first use.
        edges: by consumer, then operand.
        outputs: the trained outputs.
    """

    graph: gs.Graph
    vertices: list[gs.Node]
    names: list[str]
    leaves: list[str]
    edges: list[Edge]
    outputs: list[str]
    tensors: dict[str, gs.Tensor] = field(repr=False, default_factory=dict)

    @cached_property
    def readers(self) -> dict[str, list[Edge]]:
        """Edges by the tensor they carry."""
        found: dict[str, list[Edge]] = {}
        for edge in self.edges:
            found.setdefault(edge.tensor, []).append(edge)
        return found

    @cached_property
    def operands(self) -> list[list[Edge]]:
        """Edges by consumer."""
        found: list[list[Edge]] = [[] for _ in self.vertices]
        for edge in self.edges:
            found[edge.consumer].append(edge)
        return found

    @cached_property
    def producer(self) -> dict[str, int]:
        """Active vertex that makes a tensor."""
        return {t.name: i for i, node in enumerate(self.vertices) for t in node.outputs if t.name}

    @cached_property
    def digraph(self) -> nx.MultiDiGraph:
        """Vertices (ints) and leaves (names) as a networkx graph; edge keys are (operand, tensor)."""
        made = nx.MultiDiGraph()
        made.add_nodes_from(range(len(self.vertices)))
        made.add_nodes_from(self.leaves)
        for edge in self.edges:
            source: int | str = edge.tensor if edge.source is None else edge.source
            made.add_edge(source, edge.consumer, key=(edge.operand, edge.tensor))
        return made

    def on(self, graph: gs.Graph) -> Dataflow:
        """The same active part of a copy of the graph, node for node."""
        place = {id(node): k for k, node in enumerate(self.graph.nodes)}
        vertices = [graph.nodes[place[id(node)]] for node in self.vertices]
        return replace(self, graph=graph, vertices=vertices, tensors=ir.tensors(graph))

    def upstream_of(self, wanted: Iterable[str]) -> set[int]:
        """Vertices that lie on a path from one of the ``wanted`` leaves."""
        reached: set[int] = set()
        live = set(wanted)
        for index, (node, edges) in enumerate(zip(self.vertices, self.operands, strict=True)):
            if any(edge.tensor in live for edge in edges):
                reached.add(index)
                live.update(t.name for t in node.outputs if t.name)
        return reached


#: Which operands of a node a derivative can flow to.
DifferentiableOperands = Callable[[gs.Node], Callable[[int], bool]]


def is_standard(node: gs.Node) -> bool:
    """Whether a node's operator is one of ONNX's own domain."""
    return node.domain in (None, "", "ai.onnx")


def is_forward(node: gs.Node) -> bool:
    """Whether a node belongs to the training graph's forward part, which is the model's own."""
    return bool(getattr(node, "metadata", {}).get("zilc.role") == "forward")


def known_axes(axes: gs.Tensor, rank: int) -> list[int] | None:
    """The axes that a tensor holds, counted from the front; None where they are known at run time only."""
    if not isinstance(axes, gs.Constant):
        return None
    return [int(axis) % rank for axis in ir.values(axes).reshape(-1)]


def captured(node: gs.Node) -> list[gs.Tensor]:
    """Outer tensors that the subgraphs of a control-flow node read, constants among them."""
    found: dict[str, gs.Tensor] = {}
    for inner in ir.subgraphs(node):
        for tensor in ir.foreign(inner):
            found.setdefault(tensor.name, tensor)
    return list(found.values())


def every_node(graph: gs.Graph) -> Iterator[gs.Node]:
    """The nodes of a graph, and of its subgraphs."""
    for node in graph.nodes:
        yield node
        for inner in ir.subgraphs(node):
            yield from every_node(inner)


def copy_subgraph(inner: gs.Graph, outer: Mapping[str, gs.Tensor]) -> gs.Graph:
    """A copy of ``inner``; what it does not make itself is read from ``outer`` by name.

    GraphSurgeon's own copy gives each subgraph constants of its own; here a constant stays one leaf.
    """
    known: dict[str, gs.Tensor] = dict(outer)

    def tensor(old: gs.Tensor) -> gs.Tensor:
        if not old.name:
            return gs.Variable.empty()
        if old.name not in known:
            known[old.name] = copy_tensor(old)
        return known[old.name]

    for local in (*inner.inputs, *(t for node in inner.nodes for t in node.outputs)):
        if local.name:
            known[local.name] = copy_tensor(local)
    nodes = []
    for node in inner.nodes:
        made = copy_node(node, [tensor(t) for t in node.inputs], [tensor(t) for t in node.outputs])
        for key, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                made.attrs[key] = copy_subgraph(value, {t.name: tensor(t) for t in ir.foreign(value)})
        nodes.append(made)
    return gs.Graph(
        nodes, [tensor(t) for t in inner.inputs], [tensor(t) for t in inner.outputs],
        name=inner.name, doc_string=inner.doc_string, opset=inner.opset, import_domains=inner.import_domains,
    )  # fmt: skip


def active_part(graph: gs.Graph, outputs: Sequence[str], differentiable: DifferentiableOperands) -> Dataflow:
    """The vertices and leaves on a differentiable path from a leaf to one of ``outputs``.

    Args:
        graph: acyclic, nodes in topological order, constants lifted to initializers.
        outputs: names of floating tensors.
        differentiable: asked once for each node: whether a derivative flows from it to one of its operands.
    """
    tensors = ir.tensors(graph)
    leaves = {t.name for t in graph.inputs if dtypes.is_float(t)}
    leaves.update(t.name for t in tensors.values() if isinstance(t, gs.Constant) and dtypes.is_float(t))
    input_names = [t.name for t in graph.inputs]

    # Forwards: what depends differentiably on a leaf.
    depends = set(leaves)
    operands: list[list[tuple[int, str]]] = []
    for node in graph.nodes:
        if getattr(node, FROZEN, False):
            operands.append([])
            continue
        candidates = [(k, t.name) for k, t in enumerate(node.inputs) if t.name in depends]
        found = []
        if candidates:
            flows = differentiable(node)
            found = [(k, name) for k, name in candidates if flows(k)]
        if ir.subgraphs(node):
            # Captured values are operands too; no rule names them by position, so they follow the listed ones.
            base = len(node.inputs)
            found += [
                (base + k, t.name)
                for k, t in enumerate(captured(node))
                if t.name in depends and dtypes.may_hold_floats(t)
            ]
        operands.append(found)
        if found:
            depends.update(t.name for t in node.outputs if t.name and dtypes.may_hold_floats(t))

    # Backwards: what a trained output depends on.
    wanted = set(outputs) & depends
    keep: list[int] = []
    for index in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[index]
        if operands[index] and any(t.name in wanted for t in node.outputs if t.name):
            keep.append(index)
            wanted.update(name for _, name in operands[index])
    keep.reverse()

    vertices = [graph.nodes[i] for i in keep]
    maker = {t.name: v for v, node in enumerate(vertices) for t in node.outputs if t.name}
    edges = [
        Edge(name, maker.get(name), v, k) for v, i in enumerate(keep) for k, name in operands[i]
    ]
    used = dict.fromkeys(e.tensor for e in edges if e.source is None)
    used.update(dict.fromkeys(name for name in outputs if name in leaves))
    among_inputs = set(input_names)
    ordered = [n for n in input_names if n in used] + [n for n in used if n not in among_inputs]
    return Dataflow(graph, vertices, _vertex_names(vertices), ordered, edges, list(outputs), tensors)


def _vertex_names(nodes: Sequence[gs.Node]) -> list[str]:
    """Node names, made unique; a nameless node is called after its first output."""
    taken: set[str] = set()
    counts: dict[str, int] = {}  # names that many nodes share are not counted from 1 each time
    names = []
    for node in nodes:
        base = node.name or next((t.name for t in node.outputs if t.name), node.op)
        name, count = base, counts.get(base, 0)
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        counts[base] = count
        taken.add(name)
        names.append(name)
    return names


def names_of(graph: gs.Graph) -> set[str]:
    """Names of tensors and nodes in use, subgraphs included."""
    names = {t.name for t in (*graph.inputs, *graph.outputs)}
    for node in graph.nodes:
        if node.name:
            names.add(node.name)
        names.update([t.name for t in node.inputs])
        names.update([t.name for t in node.outputs])
        for inner in ir.subgraphs(node):
            names |= names_of(inner)
    names.discard("")
    return names


def fresh_name(name: str, taken: set[str]) -> str:
    """``name``, or ``name_1``, ``name_2`` … if taken; taken from now on."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def copy_node(
    node: gs.Node, inputs: Sequence[gs.Tensor] | None = None, outputs: Sequence[gs.Tensor] | None = None
) -> gs.Node:
    """A node like ``node`` on other tensors, with its metadata."""
    made = gs.Node(
        op=node.op,
        name=node.name,
        attrs=dict(node.attrs),
        inputs=list(node.inputs) if inputs is None else list(inputs),
        outputs=list(node.outputs) if outputs is None else list(outputs),
        domain=node.domain,
    )
    made.metadata = dict(getattr(node, "metadata", {}))
    made.doc_string = getattr(node, "doc_string", "")
    for mark in (INSERTED, FROZEN, STATISTICS, PRECISION, SPATIAL_FIRST):
        if hasattr(node, mark):
            setattr(made, mark, getattr(node, mark))
    return made


def copy_tensor(tensor: gs.Tensor, name: str | None = None) -> gs.Tensor:
    """A tensor like ``tensor``, connected to nothing; constants share their values."""
    if isinstance(tensor, gs.Constant):
        return gs.Constant(name or tensor.name, tensor._values, data_location=tensor.data_location)
    made = gs.Variable(name or tensor.name, tensor.dtype, tensor.shape, getattr(tensor, "type", "tensor_type"))
    dtypes.carry_straight(tensor, made)
    return made


@dataclass
class Rebuild:
    """A new graph grown node by node from an old one; the old one is left as it is.

    GraphSurgeon rewires in place by comparing nodes, which is quadratic on large graphs; growing a copy is linear.
    """

    old: gs.Graph
    tensors: dict[str, gs.Tensor] = field(default_factory=dict)
    nodes: list[gs.Node] = field(default_factory=list)

    def tensor(self, tensor: gs.Tensor) -> gs.Tensor:
        """The new graph's tensor of that name."""
        if not tensor.name:
            return gs.Variable.empty()
        if tensor.name not in self.tensors:
            self.tensors[tensor.name] = copy_tensor(tensor)
        return self.tensors[tensor.name]

    def add(
        self, node: gs.Node, inputs: Sequence[gs.Tensor] | None = None, moved: Mapping[str, gs.Tensor] | None = None
    ) -> gs.Node:
        """Append a copy of ``node``.

        Args:
            inputs: new tensors to read, by default those of the same names.
            moved: new tensors for values that its subgraphs capture, by their old names.
        """
        made = copy_node(
            node,
            [self.tensor(t) for t in node.inputs] if inputs is None else inputs,
            [self.tensor(t) for t in node.outputs],
        )
        for key, inner in node.attrs.items():
            if isinstance(inner, gs.Graph):
                outer = {t.name: self.tensor(t) for t in ir.foreign(inner)}
                made.attrs[key] = copy_subgraph(inner, {**outer, **(moved or {})})
        self.nodes.append(made)
        return made

    def finish(self, outputs: Sequence[gs.Tensor] | None = None) -> gs.Graph:
        """The new graph, with the old one's inputs, outputs, opset and metadata."""
        old = self.old
        made = gs.Graph(
            nodes=self.nodes,
            inputs=[self.tensor(t) for t in old.inputs],
            outputs=[self.tensor(t) for t in (old.outputs if outputs is None else outputs)],
            name=old.name,
            doc_string=old.doc_string,
            opset=old.opset,
            import_domains=list(old.import_domains or []),
            producer_name=old.producer_name,
            producer_version=old.producer_version,
            ir_version=old.ir_version,
        )
        made.metadata = dict(vars(old).get("metadata", {}))
        return made


def hand_over(node: gs.Node, made: gs.Variable) -> None:
    """``node``'s first output, with its readers, becomes that of the node that makes ``made``; ``node`` has none left.

    What ``node`` reads goes on naming it as a reader: taking it off a constant that many nodes read is a search.
    """
    output = node.outputs[0]
    node.outputs.clear()
    name_anew(made, output)


def name_anew(made: gs.Variable, output: gs.Variable) -> None:
    """The node that makes ``made`` makes ``output`` instead, which no node makes."""
    maker = made.inputs[0]
    maker.outputs.clear()
    maker.outputs.append(output)


class Users:
    """Who makes and who reads each tensor, by name; an output of the graph counts as read, a capture too."""

    def __init__(self, graph: gs.Graph) -> None:
        self.maker: dict[str, gs.Node] = {}
        self._readers: dict[str, list[gs.Node | None]] = {}
        for node in graph.nodes:
            read = [*node.inputs, *captured(node)] if ir.subgraphs(node) else node.inputs
            for tensor in read:
                self._readers.setdefault(tensor.name, []).append(node)
            for tensor in node.outputs:
                self.maker[tensor.name] = node
        for tensor in graph.outputs:
            self._readers.setdefault(tensor.name, []).append(None)

    def count(self, tensor: gs.Tensor) -> int:
        """How often a tensor is read."""
        return len(self._readers.get(tensor.name, ()))

    def readers(self, tensor: gs.Tensor) -> list[gs.Node | None]:
        """Who reads a tensor, as often as it does; None stands for the graph's output."""
        return list(self._readers.get(tensor.name, ()))

    def only(self, tensor: gs.Tensor) -> gs.Node | None:
        """The one node that reads a tensor, if there is just one reader."""
        readers = self._readers.get(tensor.name, ())
        return readers[0] if len(readers) == 1 else None


def size(tensor: gs.Tensor) -> float:
    """Elements, symbolic dimensions counted as one; infinite where the shape is unknown."""
    if tensor.shape is None:
        return float("inf")
    return float(math.prod(int(n) for n in tensor.shape if isinstance(n, (int, np.integer))))
