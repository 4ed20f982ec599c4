"""State written over itself: an order of a graph's nodes in which that is safe.

An update reads a parameter and makes its next value.  If the next value may be written where the parameter lies, a
training step needs one buffer for each instead of two; with Adam that is half of all state.  onnxruntime does not
forbid to bind one buffer to an input and to an output, but neither does it look after it: nobody may read the old value
once the new one is written.  So the graph that is left after onnxruntime's own optimisation is put into an order in
which all readers of a value come before the node that replaces it, and is run in that order.

onnxruntime's PRIORITY_BASED order takes, of the nodes whose operands are there, the one that the file names first: a
file in a topological order is run in the file's order.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

#: Operators whose kernel may write over an operand of the result's shape, and which operand: those for which
#: onnxruntime's CPU provider itself declares it (``MayInplace`` in its kernel definitions), and ScatterND, whose kernel
#: looks whether both are the same memory and copies only if not.
_OVER = {
    "Add": (0, 1), "Sub": (0, 1), "Mul": (0, 1), "Div": (0, 1), "Identity": (0,), "Gemm": (2,), "ScatterND": (0,)
}  # fmt: skip
#: On CUDA: those whose kernels compute an element from the operands' elements of the same place alone, and Gemm, which
#: copies its addend into the result (here onto itself) and adds to that.
CUDA_OVER = {
    "Add": (0, 1), "Sub": (0, 1), "Mul": (0, 1), "Div": (0, 1), "Where": (1, 2), "Identity": (0,), "Gemm": (2,)
}  # fmt: skip


#: Operators whose result is their first operand's memory under another name: who reads the one reads the other.  Those
#: for which onnxruntime declares it (``Alias``), Dropout's inference form among them.
_ALIAS = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Optional", "OptionalGetElement"}
)


@dataclass(frozen=True)
class Ordered:
    """A graph in an order that allows to write over state.

    Attributes:
        model: the nodes in the order in which they run.
        over: inputs that their ``next`` may be written over.
        through: what is written over them on the way there, and which of them; outputs of the graph now.
        harmless: names of nodes that run before anything is written over; a run that fails in one of them has changed
            no state.
    """

    model: onnx.ModelProto
    over: frozenset[str]
    through: Mapping[str, str]
    harmless: frozenset[str]


def in_place(
    optimised: onnx.ModelProto,
    original: onnx.ModelProto,
    pairs: Sequence[tuple[str, str]],
    *,
    may: Mapping[str, tuple[int, ...]] = _OVER,
    partly: bool = True,
    chains: bool = True,
) -> Ordered:
    """Order an optimised graph so that as much of the state as possible can be written over itself.

    Args:
        optimised: what onnxruntime made of ``original``; its nodes are put in order (in place).
        original: the training graph, whose order of nodes is kept where nothing speaks against it: an update follows
            its gradient, so that the gradient's memory is free at once.
        pairs: (input, output) that is fed back to it.
        may: operators that may write over an operand, and over which.
        partly: whether some of the state may be written over where not all of it can.
        chains: whether a state may be written over twice: what its ``next`` is made over is made over the state first.
    """
    graph = optimised.graph
    nodes = list(graph.node)
    producer = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    readers: dict[str, set[int]] = {}
    before: list[set[int]] = [set() for _ in nodes]
    for i, node in enumerate(nodes):
        for name in operands(node):
            readers.setdefault(name, set()).add(i)
            if name in producer:
                before[i].add(producer[name])
    rank = _ranks(nodes, before, original)
    writers = {name: producer[made] for name, made in pairs if made in producer}
    over = {name for name, i in writers.items() if _may_write_over(nodes[i], _names(name, nodes, readers), may)}
    if not partly and len(over) < len(pairs):
        over = set()
    reading = {name: _readers(name, nodes, readers) for name, _ in pairs}
    between = _between(nodes, {o.name for o in graph.output}, over, writers, producer, readers, may) if chains else {}
    # What the loss and the predictions need comes first: there, and only there, data can be at fault (an index out of
    # range), and then nothing has been written over yet.
    fed_back = {made for _, made in pairs}
    results = (o.name for o in graph.output if o.name in producer and o.name not in fed_back)
    forward = _ancestors((producer[name] for name in results), before)
    # One more node, which is none, stands between them and all updates: an edge to each side instead of to each pair.
    done = len(nodes)
    while True:
        waits = [*map(set, before), set(forward)]
        for name in over:
            writer = writers[name]
            if name in between:
                last, writer = writer, producer[between[name]]
                waits[last] |= _readers(between[name], nodes, readers) - {last}
            waits[writer] |= reading[name] - {writer}
            if writer not in forward:
                waits[writer].add(done)
        order = _topological(waits, [*rank, -1])
        if len(order) == len(waits):
            break
        # Two updates that read each other's parameter: whatever is left could not be ordered.
        left = set(range(len(nodes))) - set(order)
        chained = {name for name in between if writers[name] in left}
        if chained:
            between = {name: made for name, made in between.items() if name not in chained}
            continue
        over -= {name for name in over if writers[name] in left}
        if not partly:
            over = set()
    order.remove(done)
    between = {name: made for name, made in between.items() if name in over}
    writing = {producer[between[name]] if name in between else writers[name] for name in over}
    first = next((position for position, i in enumerate(order) if i in writing), len(order))
    taken = {node.name for node in nodes}
    for i, node in enumerate(nodes):
        if not node.name:  # onnxruntime's messages tell nodes by their names
            name = next(filter(None, node.output), node.op_type)
            node.name = name if name not in taken else f"{name}/{i}"
            taken.add(node.name)
    names = [nodes[i].name for i in order]
    harmless = set(names[:first]) - set(names[first:]) - {""}
    del graph.node[:]
    graph.node.extend(nodes[i] for i in order)
    infos = {info.name: info for info in graph.input}
    for name, made in between.items():
        graph.output.add().CopyFrom(infos[name])
        graph.output[-1].name = made
    return Ordered(optimised, frozenset(over), {made: name for name, made in between.items()}, frozenset(harmless))


def _between(
    nodes: Sequence[onnx.NodeProto],
    results: Collection[str],
    over: Iterable[str],
    writers: Mapping[str, int],
    producer: Mapping[str, int],
    readers: Mapping[str, set[int]],
    may: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """By state, what is made over it and is then written over by its ``next``.

    It has the state's shape: a result has at least as many elements as what it is made over, and ``next`` as many as
    the state.

    Args:
        results: the graph's outputs, which have memory of their own.
    """
    found = {}
    for name in over:
        last, names = nodes[writers[name]], _names(name, nodes, readers)
        if names.intersection(operands(last)):
            continue
        for made in dict.fromkeys(last.input[k] for k in may.get(last.op_type, ()) if k < len(last.input)):
            if made not in producer or made in results or name not in nodes[producer[made]].input:
                continue
            first, others = nodes[producer[made]], _names(made, nodes, readers)
            if _may_write_over(first, names, may) and _may_write_over(last, others, may):
                found[name] = made
                break
    return found


def _names(name: str, nodes: Sequence[onnx.NodeProto], readers: Mapping[str, set[int]]) -> set[str]:
    """All names that a value's memory has."""
    found: set[str] = set()
    stack = [name]
    while stack:
        one = stack.pop()
        if one not in found:
            found.add(one)
            for i in readers.get(one, ()):
                if nodes[i].op_type in _ALIAS:
                    stack.extend(filter(None, nodes[i].output))
    return found


def _readers(name: str, nodes: Sequence[onnx.NodeProto], readers: Mapping[str, set[int]]) -> set[int]:
    """Nodes that read a value's memory, under whatever name."""
    return set().union(*(readers.get(one, set()) for one in _names(name, nodes, readers)))


def _may_write_over(node: onnx.NodeProto, names: Collection[str], may: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the node that makes a value's successor can do so in the value's own memory, which has these names."""
    mine = [k for k, operand in enumerate(node.input) if operand in names]
    if not mine:
        # Then it must not read inside a subgraph either; what it does read is there and stays.
        return not set(names).intersection(operands(node))
    # As another operand than those it would be read while it is written.
    return node.domain in ("", "ai.onnx") and set(mine) <= set(may.get(node.op_type, ()))


def _ranks(nodes: list[onnx.NodeProto], before: list[set[int]], original: onnx.ModelProto) -> list[int]:
    """Where each node stood in the original; a node that is new there stands just before the first that needs it."""
    stood = {name: i for i, node in enumerate(original.graph.node) for name in node.output if name}
    last = len(stood)
    rank = [min((stood[name] for name in node.output if name in stood), default=last) for node in nodes]
    for i in reversed(_topological(before, rank)):
        for j in before[i]:
            if not any(name in stood for name in nodes[j].output):
                rank[j] = min(rank[j], rank[i])
    return rank


def _topological(before: list[set[int]], rank: list[int]) -> list[int]:
    """Kahn's algorithm, the lowest rank first; short of nodes where there is a cycle."""
    after: list[list[int]] = [[] for _ in before]
    waiting = [len(them) for them in before]
    for i, them in enumerate(before):
        for j in them:
            after[j].append(i)
    ready = [(rank[i], i) for i, n in enumerate(waiting) if n == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        _, i = heapq.heappop(ready)
        order.append(i)
        for j in after[i]:
            waiting[j] -= 1
            if waiting[j] == 0:
                heapq.heappush(ready, (rank[j], j))
    return order


def _ancestors(ends: Iterable[int], before: list[set[int]]) -> set[int]:
    """Nodes that ``ends`` need, themselves among them."""
    found: set[int] = set()
    stack = list(ends)
    while stack:
        i = stack.pop()
        if i not in found:
            found.add(i)
            stack.extend(before[i])
    return found


def operands(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, in its subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            for nested in inner.node:
                yield from operands(nested)
            yield from (o.name for o in inner.output)
