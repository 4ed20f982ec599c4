"""Recomputation within a memory budget: predictions are dropped after their last use in the forward pass and computed
again when the backward wave needs them.

Z-IL's wave goes from the output to the inputs, and a step reads the predictions of the level that it reaches: those of
the first layers wait longest.  Between the two passes all of them are alive, and their sum is what training needs more
than inference.  Giving some up for a second run of their operators is rematerialisation: Griewank and Walther
("Revolve", ACM TOMS 2000) for chains in reverse mode; Chen, Xu, Zhang and Guestrin ("Training deep nets with sublinear
memory cost", 2016) for layers of a network in segments; Jain et al. ("Checkmate", MLSys 2020) for any graph, as an
integer program over a schedule in which operators may occur again; Kirisame et al. ("Dynamic tensor rematerialization",
ICLR 2021) by a heuristic, the tensor of most bytes and longest idleness for the least work.  Here the schedule is
Checkmate's, a list of operators in which one may stand several times and every read means the latest run before it,
and the choice is greedy by the measure of the last, held against a simulation before it is taken.

**The simulation.**  A tensor is allocated by the node that makes it and is freed after its last reader; a node's inputs
and outputs are alive together.  Reshape and its like name the same memory.  Not counted are the graph's inputs and
outputs (parameters, slots, statistics and what follows each, data, predictions), constants and what is computed from
constants alone, nor what a kernel of the runtime needs for itself.

**A move.**  At the place of the peak some tensors are idle: read before, and read again later.  One of them is dropped
by running its producer again right before its next reader, and, where an operand of the producer is gone by then,
that one's producer too, back to what is there or is worth keeping.  A later run of the same operator may become
superfluous.  Of the most promising tensors the variants of this move are simulated, and the one is made that takes off
most bytes over budget, summed over the nodes, for the least work (operations and bytes moved).  The sum falls with each
move, so this ends: at the budget, or where no single move helps.

**The same bits.**  The same operators run on the same operands; every emitted operator is deterministic, masks too:
they are numbers of a counter.  What a runtime's optimizer makes of the graph must stay the same as well:

1. It may find that an operator stands there twice and merge the two.  It may also run the second one as soon as its
   operands are there, which is in the forward pass.  Both are ruled out by a *barrier*: an operand of a recomputed
   node goes through a Reshape to its own shape, plus a zero that is computed from the error that comes before.  No
   optimizer knows that it is zero, and no runtime can run the node before the error is there.  A Reshape moves nothing.
   Large nodes of the wave that read predictions alone, a Tanh's derivative among them, get a barrier too.
2. It fuses operators where nobody else reads what lies between.  A prediction that only the wave read beside its one
   consumer would have one reader left, and get fused where it was not before: a normalization with the sum before it
   (SkipLayerNormalization) has other bits.  Such a prediction is read through a Reshape of that kind too.
3. What had one reader may have been fused with it.  It is never kept in place of its reader, but is run again with it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from zilc import onnx_io
from zilc.emit import Emitter, names_of
from zilc.errors import OptionError
from zilc.graph import INFERENCE, captured, copy_node
from zilc.passes.simplify import drop_dead
from zilc.sizes import show_size

WHERE = "--memory-budget"
#: Roles of nodes that may run again.
_AGAIN = frozenset({"forward", "identity", "loss"})
#: Roles of the wave's nodes.
_WAVE = frozenset({"error", "update"})
#: A node of the wave that reads predictions alone is told to wait where it makes at least this part of the peak.
_MATTERS = 64
#: The output is the first input under another name and shape.
_ALIAS = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
#: Each run draws anew.
_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)
#: So many floating-point operations take about as long as moving one byte.
_FLOPS_A_BYTE = 10.0
#: Operations an element, where it is not one or two.
_COSTLY = {
    **dict.fromkeys(("Exp", "Tanh", "Sigmoid", "Erf", "Gelu", "Softplus", "Log", "Pow", "Sin", "Cos", "Mish"), 20.0),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LayerNormalization", "GroupNormalization", "RMSNormalization"), 30.0),
}  # fmt: skip
#: An operand that is gone is kept instead of computed again where it is at most this share of what is dropped.
_KEEP = (0.0, 0.3, 1.0)
#: Nodes that run again, at most, in times of the graph's: some four forward passes.
_MOST = 1.0
#: How many tensors are looked at closely for each move: fewer in large graphs, where each look takes its time.
_CLOSELY, _LEAST_CLOSELY, _LOOKS = 6, 2, 4000


@dataclass(frozen=True)
class Recomputed:
    """What the pass did.  Bytes are those of the simulation in the module's text.

    Attributes:
        budget: bytes that were asked for.
        peak_before, peak: bytes alive at most, without and with recomputation.
        nodes: how many nodes run again.
        bytes: of the tensors that they make again.
    """

    budget: int
    peak_before: int
    peak: int
    nodes: int
    bytes: int

    def data(self) -> dict[str, int]:
        """As it stands in the signature."""
        return {
            "budget": self.budget, "peak_without": self.peak_before, "peak": self.peak, "nodes": self.nodes,
            "bytes": self.bytes,
        }  # fmt: skip


def recompute(graph: gs.Graph, budget: int, shapes: Mapping[str, Sequence[int | str | None] | None]) -> Recomputed:
    """Recompute predictions until the activations that live at once fit the budget (in place).

    Args:
        graph: a training graph in the order of its schedule, whose nodes say their role in the metadata.
        budget: bytes.
        shapes: of the graph's tensors, by name.

    Requires: the dimensions of all inputs are numbers.
    Ensures: the graph's outputs are the same, bit for bit; recomputed nodes have the role ``recompute`` and the vertex
    and level of the node that they repeat.

    Raises:
        OptionError: an input has symbolic dimensions, or the budget cannot be reached.
    """
    _require_sizes(graph)
    problem = Problem(graph, shapes)
    order = list(range(len(problem.nodes)))
    before = problem.run(order).peak
    if before <= budget:
        return Recomputed(budget, before, before, 0, 0)
    found = _search(problem, order, budget)
    if found is None:
        # What is best for a budget out of reach need not lead to the least: go down step by step.
        found, least = _descend(problem, order, budget)
        if found is None:
            raise OptionError(
                f"activations of {show_size(budget)} ({budget:,} bytes) cannot be reached: recomputation gets down to "
                f"{show_size(least)} ({least:,} bytes), from {show_size(before)} ({before:,} bytes) without",
                where=WHERE,
                hint="Allow more, or take a smaller batch.",
            )
    schedule = _pruned(problem, found, budget)
    peak = problem.run(schedule).peak
    again = len(schedule) - len(problem.nodes)
    made = problem.made(schedule) - problem.made(order)
    _rewrite(graph, problem, schedule)
    return Recomputed(budget, before, peak, again, made)


def _require_sizes(graph: gs.Graph) -> None:
    """Bytes are numbers only where every dimension is one."""
    names: dict[str, None] = {}
    for tensor in graph.inputs:
        for size in tensor.shape if tensor.shape is not None else ("?",):
            if not isinstance(size, (int, np.integer)):
                names[f"{size}" if size else f"one of '{tensor.name}' without a name"] = None
    if names:
        known = [name for name in names if " " not in name and name != "?"]
        hint = f"Fix them: {' '.join(f'--dim {name}=SIZE' for name in known)}." if known else "Export with fixed sizes."
        raise OptionError(f"a budget in bytes needs sizes, and {', '.join(names)} is symbolic", where=WHERE, hint=hint)


# --- what is simulated ------------------------------------------------------------------------------------------


class Write(NamedTuple):
    """A tensor that a node makes: its number, its bytes, and the tensor whose memory it shares (-1: its own)."""

    value: int
    size: int
    source: int


@dataclass
class Life:
    """A tensor's memory from one run of its producer on.

    Attributes:
        start, last: places in the schedule.
        reads: (place, tensor): through which name it is read where.
    """

    start: int
    last: int
    size: int
    reads: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Simulated:
    """A schedule's memory.

    Attributes:
        alive: bytes at each place, int64.
        lives: every stretch of memory, where asked for.
        runs: by tensor, (place, number of the life) of each run that made it, where asked for.
    """

    alive: np.ndarray
    lives: list[Life] = field(default_factory=list)
    runs: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return int(self.alive.max(initial=0))

    def over(self, budget: int) -> float:
        """Bytes over budget, summed over the places."""
        return float(np.maximum(self.alive - budget, 0).sum())


class Problem:
    """The graph in numbers: what each node reads and makes, and what it costs to run it again.

    A schedule is a list of nodes by number; one that runs again stands there as ``~number``.
    """

    def __init__(self, graph: gs.Graph, shapes: Mapping[str, Sequence[int | str | None] | None]) -> None:
        self.nodes = list(graph.nodes)
        self.shapes = shapes
        self.names: list[str] = []
        self.number: dict[str, int] = {}
        self.dtypes: dict[str, np.dtype | None] = {}
        self.reads: list[list[int]] = []
        self.writes: list[list[Write]] = []
        self.producer: list[int] = []
        outputs = {t.name for t in graph.outputs}
        pinned = {t.name for node in self.nodes if node.attrs for t in captured(node)}
        constant: set[str] = set()
        readers: dict[str, int] = dict.fromkeys(outputs, 1)
        for i, node in enumerate(self.nodes):
            inner = captured(node) if node.attrs else []
            operands = [t for t in (*node.inputs, *inner) if t.name]
            for tensor in operands:
                readers[tensor.name] = readers.get(tensor.name, 0) + 1
            made = [t for t in node.outputs if t.name]
            fixed = all(isinstance(t, gs.Constant) or t.name in constant for t in operands)
            if fixed and node.op not in _RANDOM and node.op != "Expand":
                # Runtimes compute it once, when they load the graph; but onnxruntime leaves what grows by it.
                constant.update(t.name for t in made)
            self.reads.append(list(dict.fromkeys(self.number[t.name] for t in operands if t.name in self.number)))
            writes = []
            for tensor in made:
                if tensor.name in outputs or tensor.name in constant:
                    continue
                source = -1
                if node.op in _ALIAS and tensor is node.outputs[0]:
                    first = node.inputs[0].name
                    if first not in self.number:
                        continue  # another name for an input, an output or a constant
                    source = self.number[first]
                value = len(self.names)
                self.number[tensor.name] = value
                self.names.append(tensor.name)
                self.producer.append(i)
                writes.append(Write(value, 0 if source >= 0 else self._bytes(tensor), source))
            self.writes.append(writes)
        self.readers = [readers.get(name, 0) for name in self.names]
        self.again = [self._may_run_again(node, pinned) for node in self.nodes]
        #: Nodes whose first run may be left out where nobody reads it: they make no output of the graph.
        self.may_go = [
            self.again[i] and bool(self.writes[i]) and all(t.name in self.number for t in node.outputs if t.name)
            for i, node in enumerate(self.nodes)
        ]
        self.cost = [self._cost(node) for node in self.nodes]

    def _bytes(self, tensor: gs.Tensor) -> int:
        """0 where the size is not known before the graph runs."""
        dims = self.dims(tensor)
        dtype = onnx_io.np_dtype(tensor.dtype)
        return 0 if dims is None or dtype is None else math.prod(dims) * dtype.itemsize

    def dims(self, tensor: gs.Tensor) -> tuple[int, ...] | None:
        """Shape in numbers, if it is known."""
        known = self.shapes.get(tensor.name)
        shape = known if known is not None else tensor.shape
        if shape is None or not all(isinstance(n, (int, np.integer)) for n in shape):
            return None
        return tuple(int(n) for n in shape)  # type: ignore[arg-type]

    def _may_run_again(self, node: gs.Node, pinned: set[str]) -> bool:
        return (
            node.metadata.get("zilc.role") in _AGAIN
            and node.op not in _RANDOM
            and not onnx_io.subgraphs(node)
            and not any(t.name in pinned for t in node.outputs)  # a subgraph reads it under its one name
        )

    def _cost(self, node: gs.Node) -> float:
        """Work of a node: operations, in bytes moved in the same time, and bytes."""
        if node.op in _ALIAS:
            return 0.0
        sizes = [self.dims(t) for t in node.outputs if t.name]
        elements = float(sum(math.prod(d) for d in sizes if d is not None))
        operands = [self.dims(t) if t.name else None for t in node.inputs]
        first = operands[0] if operands else None
        second = operands[1] if len(operands) > 1 else None
        flops = elements * _COSTLY.get(node.op, 2.0)
        if node.op in ("MatMul", "Gemm") and first:
            flops = 2 * elements * first[-2 if node.attrs.get("transA") and len(first) > 1 else -1]
        elif node.op == "Conv" and second:
            flops = 2 * elements * math.prod(second[1:])
        elif node.op == "ConvTranspose" and first and second:
            flops = 2 * float(math.prod(first)) * math.prod(second[1:])
        elif node.op in ("LSTM", "GRU", "RNN") and first and second:
            flops = 2 * float(math.prod(first)) * second[1] * 2
        elif node.op == "Einsum":
            flops = 2 * max([elements, *(float(math.prod(d)) for d in operands if d)]) * 64
        moved = sum(self._bytes(t) for t in (*node.inputs, *node.outputs) if t.name)
        return flops / _FLOPS_A_BYTE + moved

    def run(self, schedule: Sequence[int], *, closely: bool = False) -> Simulated:
        """Simulate a schedule.

        Args:
            closely: also every stretch of memory with its reads.
        """
        current = [-1] * len(self.names)
        start: list[int] = []
        last: list[int] = []
        size: list[int] = []
        reads: list[list[tuple[int, int]]] = []
        runs: list[list[tuple[int, int]]] = [[] for _ in self.names] if closely else []
        for place, item in enumerate(schedule):
            i = item if item >= 0 else ~item
            for value in self.reads[i]:
                life = current[value]
                last[life] = place
                if closely:
                    reads[life].append((place, value))
            for value, count, source in self.writes[i]:
                if source >= 0:
                    life = current[source]
                else:
                    life = len(start)
                    start.append(place)
                    last.append(place)
                    size.append(count)
                    if closely:
                        reads.append([])
                current[value] = life
                if closely:
                    runs[value].append((place, life))
        change = np.zeros(len(schedule) + 1, np.int64)
        if start:
            np.add.at(change, np.asarray(start), np.asarray(size, np.int64))
            np.subtract.at(change, np.asarray(last) + 1, np.asarray(size, np.int64))
        found = Simulated(np.cumsum(change[:-1]))
        if closely:
            found.lives = [Life(*entry) for entry in zip(start, last, size, reads, strict=True)]
            found.runs = runs
        return found

    def work(self, schedule: Sequence[int]) -> float:
        """Cost of all runs."""
        return sum(self.cost[item if item >= 0 else ~item] for item in schedule)

    def made(self, schedule: Sequence[int]) -> int:
        """Bytes of all tensors that are made."""
        return sum(w.size for item in schedule for w in self.writes[item if item >= 0 else ~item] if w.source < 0)

    def without_dead(self, schedule: list[int]) -> list[int]:
        """The schedule without runs that nobody reads: a first one neither, which makes of the next one the first."""
        needed = [False] * len(self.names)
        kept = []
        for item in reversed(schedule):
            i = item if item >= 0 else ~item
            if (item < 0 or self.may_go[i]) and not any(needed[w.value] for w in self.writes[i]):
                continue
            for write in self.writes[i]:
                needed[write.value] = False
            for value in self.reads[i]:
                needed[value] = True
            kept.append(item)
        kept.reverse()
        return kept


# --- what is recomputed -----------------------------------------------------------------------------------------


def _search(problem: Problem, schedule: list[int], budget: int) -> list[int] | None:
    """Move after move until the peak fits; None where no move helps any more, or too much would run again."""
    while True:
        found = problem.run(schedule, closely=True)
        if found.peak <= budget:
            return schedule
        better = _best_move(problem, schedule, found, budget)
        if better is None or len(better) > (1 + _MOST) * len(problem.nodes):
            return None
        schedule = better


def _descend(problem: Problem, schedule: list[int], budget: int) -> tuple[list[int] | None, int]:
    """Budgets that fall step by step; returns the first schedule that fits, if any, and the least peak found.

    The steps do not depend on the budget asked for: the least that is named in an error can be reached.
    """
    least = problem.run(schedule).peak
    share = 0.7
    while least > budget:
        found = _search(problem, schedule, int(least * share))
        if found is None:
            if share > 0.98:
                return None, least
            share = 1 - (1 - share) / 2
            continue
        schedule, least = found, problem.run(found).peak
    return schedule, least


@dataclass(frozen=True)
class _Idle:
    """A tensor that could be dropped: its life, the place of its next reader, the names that are read from there on,
    and how promising it is."""

    life: int
    reader: int
    wanted: tuple[int, ...]
    promise: float


def _best_move(problem: Problem, schedule: list[int], found: Simulated, budget: int) -> list[int] | None:
    """The schedule after the move that takes off most bytes over budget for its work."""
    area, work = found.over(budget), problem.work(schedule)
    candidates = _idle(problem, schedule, found, budget)
    closely = max(_LEAST_CLOSELY, min(_CLOSELY, _LOOKS // len(problem.nodes)))
    for first in range(0, len(candidates), closely):
        best: list[int] | None = None
        best_score = 0.0
        for idle in candidates[first : first + closely]:
            for made in _variants(problem, schedule, found, idle):
                gain = area - problem.run(made).over(budget)
                # A move that takes work away is as good as one that costs next to nothing.
                score = gain / max(problem.work(made) - work, 1.0)
                if gain > 0 and score > best_score:
                    best, best_score = made, score
        if best is not None:
            return problem.without_dead(best)
    return None


def _idle(problem: Problem, schedule: list[int], found: Simulated, budget: int) -> list[_Idle]:
    """Tensors that lie idle at the place of the peak, the most promising first."""
    peak = int(np.argmax(found.alive))
    beyond = np.concatenate([[0], np.cumsum(found.alive > budget)])
    candidates = []
    for number, life in enumerate(found.lives):
        if not (life.start < peak < life.last) or not life.size:
            continue
        places = [place for place, _ in life.reads]
        following = bisect_left(places, peak)
        if places[following] == peak:
            continue  # in use
        reader = places[following]
        previous = places[following - 1] if following else life.start
        # A name that is given to this memory only later comes by itself.
        wanted = tuple(
            dict.fromkeys(value for place, value in life.reads[following:] if _made(found, value, place) < reader)
        )
        needed = _closure(problem, found, number, reader, wanted, keep=_KEEP[1])
        if needed is None:
            continue
        cost = sum(problem.cost[i] for i in needed) + 1.0
        gap = int(beyond[reader] - beyond[previous + 1])
        candidates.append(_Idle(number, reader, wanted, life.size * gap / cost))
    candidates.sort(key=lambda idle: (-idle.promise, idle.life))
    return candidates


def _made(found: Simulated, value: int, place: int) -> int:
    """Place of the latest run that made a tensor before ``place``."""
    runs = found.runs[value]
    return runs[bisect_left(runs, (place, -1)) - 1][0]


def _closure(
    problem: Problem, found: Simulated, dropped: int, place: int, wanted: Iterable[int], keep: float
) -> list[int] | None:
    """Nodes to run again before ``place`` so that the ``wanted`` names are there, in the graph's order.

    Args:
        dropped: the life that ends earlier for it.
        keep: an operand that is gone is kept instead, where it is at most this share of what is dropped.

    Returns: None where a node may not run again.
    """
    chosen: set[int] = set()
    stack = [problem.producer[value] for value in wanted]
    while stack:
        i = stack.pop()
        if i in chosen:
            continue
        if not problem.again[i]:
            return None
        chosen.add(i)
        for value in problem.reads[i]:
            source = problem.producer[value]
            if source in chosen:
                continue
            if problem.again[source] and _goes_along(problem, value):
                stack.append(source)
                continue
            runs = found.runs[value]
            earlier = bisect_left(runs, (place, -1))
            life = runs[earlier - 1][1] if earlier else dropped
            if life == dropped:
                stack.append(source)
            elif found.lives[life].last < place:
                size = found.lives[life].size
                if not problem.again[source] or size <= keep * found.lives[dropped].size:
                    continue  # kept
                stack.append(source)
    return sorted(chosen)


def _goes_along(problem: Problem, value: int) -> bool:
    """A runtime may have fused it with its reader: Transpose into a product even where others read it too."""
    return problem.readers[value] == 1 or problem.nodes[problem.producer[value]].op == "Transpose"


def _variants(problem: Problem, schedule: list[int], found: Simulated, idle: _Idle) -> list[list[int]]:
    """The ways to drop a tensor: how much to keep for it, and whether a later run of the same nodes is left out."""
    variants = []
    closures: list[list[int]] = []
    for keep in _KEEP:
        needed = _closure(problem, found, idle.life, idle.reader, idle.wanted, keep)
        if needed is None or needed in closures:
            continue
        closures.append(needed)
        rest = schedule[idle.reader :]
        put = schedule[: idle.reader] + [~i for i in needed]
        variants.append(put + rest)
        leaner = list(rest)
        for i in needed:
            if ~i in leaner:
                leaner.remove(~i)
        if len(leaner) < len(rest):
            variants.append(problem.without_dead(put + leaner))
    return variants


def _pruned(problem: Problem, schedule: list[int], budget: int) -> list[int]:
    """Leave out repeated runs that the budget does not need, the most expensive first."""
    seen: set[int] = set()
    again = []
    for place, number in enumerate(schedule):
        i = number if number >= 0 else ~number
        if i in seen:
            again.append(place)
        seen.add(i)
    again.sort(key=lambda place: -problem.cost[~schedule[place]])
    # A place keeps its meaning while others are left out: items are marked, not removed.
    marked: list[int | None] = list(schedule)
    for place in again:
        item = marked[place]
        if item is None or all(_goes_along(problem, w.value) for w in problem.writes[~item]):
            continue
        tried = [x for k, x in enumerate(marked) if x is not None and k != place]
        leaner = problem.without_dead(tried)
        if problem.run(leaner).peak <= budget:
            marked[place] = None
    return problem.without_dead([item for item in marked if item is not None])


# --- the graph --------------------------------------------------------------------------------------------------

#: Metadata that says which vertex a node belongs to.
_PLACE = ("zilc.vertex", "zilc.level")


def _rewrite(graph: gs.Graph, problem: Problem, schedule: Sequence[int]) -> None:
    """Bring the graph into the order of the schedule; what runs again has fresh names and barriers (in place)."""
    graph.nodes = Rewriting(graph, problem, schedule).nodes
    drop_dead(graph)  # a Reshape before a barrier, which reads past it


class Rewriting:
    """The nodes of a schedule, one after the other."""

    def __init__(self, graph: gs.Graph, problem: Problem, schedule: Sequence[int]) -> None:
        self.graph, self.problem, self.schedule = graph, problem, schedule
        self.op = Emitter(gs.Graph(opset=graph.opset), names_of(graph))
        #: The new order.
        self.nodes: list[gs.Node] = []
        #: What a tensor is called after its latest run, by its first name; and the reverse.
        self.latest: dict[str, gs.Tensor] = {}
        self.first: dict[str, str] = {}
        #: Outputs of this segment that wait for its barrier; and those of a Reshape that is a barrier itself, with what
        #: it reads.
        self.waiting: set[str] = set()
        self.reshaped: dict[str, gs.Tensor] = {}
        self.lonely = self._lonely()
        #: What each node reads, by its number, before its inputs are renamed.
        self.operands = [list(node.inputs) for node in problem.nodes]
        #: What is of another shape in inference form.
        self.marked = {t.name for node in problem.nodes if INFERENCE in node.metadata for t in node.outputs}
        #: Tensors that are made only when the wave has begun.
        self.late: set[str] = set()
        #: Bytes of a tensor that make a difference.
        self.matters = problem.run(schedule).peak // _MATTERS
        self.zero: gs.Tensor | None = None
        self.pace: tuple[gs.Tensor, gs.Node] | None = None
        for place, item in enumerate(schedule):
            if item < 0:
                if place == 0 or schedule[place - 1] >= 0:
                    self._open_segment()
                self._repeat(place, ~item)
            else:
                self._first(place, item)

    def _lonely(self) -> set[tuple[int, int]]:
        """(place, tensor): the only reader of one run's tensor, where the tensor had several readers before."""
        problem = self.problem
        run = [0] * len(problem.names)
        readers: dict[tuple[int, int], list[int]] = {}
        for place, item in enumerate(self.schedule):
            i = item if item >= 0 else ~item
            operands = [t.name for t in problem.nodes[i].inputs]
            for value in problem.reads[i]:
                times = max(1, operands.count(problem.names[value]))  # one that a subgraph captures is no operand
                readers.setdefault((run[value], value), []).extend([place] * times)
            for write in problem.writes[i]:
                run[write.value] = place
        found = set()
        for (_, value), places in readers.items():
            op = problem.nodes[problem.producer[value]].op
            # A Reshape is fused with no arithmetic; a Transpose is, however many readers it has.
            if len(places) == 1 < problem.readers[value] and op not in _ALIAS and op != "Transpose":
                found.add((places[0], value))
        return found

    def _first(self, place: int, number: int) -> None:
        """A node's first run, on what its operands are called now."""
        node = self.problem.nodes[number]
        operands = [self._operand(place, node, t) for t in self.operands[number]]
        role = node.metadata.get("zilc.role")
        late = role == "loss" or any(t.name in self.late for t in operands)
        if not late and role in _WAVE and self.late and self._is_large(number):
            # It reads predictions alone, and a runtime might run it in the forward pass.
            with self._place(node):
                late = self._barrier(node.op, operands, self._paced())
        for k, (tensor, read) in enumerate(zip(self.operands[number], operands, strict=True)):
            if read is not tensor:
                node.inputs[k] = read
        self.nodes.append(node)
        if late:
            self.late.update(t.name for t in node.outputs)
        for tensor in node.outputs if late or not self.late else ():
            if tensor.name in self.problem.number and self._has_elements(tensor) and self._same_shape(tensor):
                self.pace = tensor, node

    def _is_large(self, number: int) -> bool:
        """Whether a node that is run too early would hold memory that matters; a Transpose is fused as a rule."""
        made = sum(write.size for write in self.problem.writes[number])
        return made >= self.matters and self.problem.nodes[number].op != "Transpose"

    def _paced(self) -> gs.Tensor:
        """A zero that is known once the wave has come as far as this."""
        assert self.pace is not None
        return self._zero(self.pace[0])

    def _operand(self, place: int, node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
        """What a node reads for ``tensor``, behind a Reshape where it must not be fused with it."""
        read = self.latest.get(tensor.name, tensor)
        value = self.problem.number.get(tensor.name, -1)
        if (place, value) not in self.lonely or node.op in _ALIAS or not self._same_shape(tensor):
            return read
        if self.zero is None:
            # Before the first segment there is nothing to wait for; data will do.
            start = next((t for t in self.graph.inputs if self._has_elements(t)), None)
            if start is None:
                return read
            with self._place(node):
                self.zero = self._zero(start)
        with self._place(node):
            return self._behind(read, self.zero)

    def _place(self, node: gs.Node):
        """Emitted nodes belong to the vertex of ``node``."""
        facts = {k.removeprefix("zilc."): v for k, v in node.metadata.items() if k in (*_PLACE, "zilc.step")}
        return self.op.place(f"{node.name or node.op}.recompute", **{**facts, "role": "recompute"})

    def _has_elements(self, tensor: gs.Tensor) -> bool:
        dims = self.problem.dims(tensor)
        return bool(dims) and math.prod(dims or ()) > 0 and onnx_io.np_dtype(tensor.dtype) is not None

    def _same_shape(self, tensor: gs.Tensor) -> bool:
        """Whether it may be reshaped to what it is: its shape is known, and no other one in inference form."""
        first = self.first.get(tensor.name, tensor.name)
        return self.problem.dims(tensor) is not None and first not in self.marked

    def _take(self) -> None:
        """What was emitted comes next."""
        self.nodes += self.op.graph.nodes
        self.op.graph.nodes = []

    def _zero(self, tensor: gs.Tensor) -> gs.Tensor:
        """A zero, int64 [1], that is known only once ``tensor`` is: the least of 0 and a number that is 0 or 1."""
        op, dims = self.op, self.problem.dims(tensor)
        assert dims is not None
        first = op.GatherND(tensor, op.constant(np.zeros((1, len(dims)), np.int64)))
        # To a whole number by way of a truth value: what NaN becomes else is for each runtime to say.
        number = op.Cast(op.Cast(first, to=onnx.TensorProto.BOOL), to=onnx.TensorProto.INT64)
        zero = op.Min(number, op.constant(np.zeros(1, np.int64)))
        self._take()
        return zero

    def _behind(self, tensor: gs.Tensor, zero: gs.Tensor, shape: gs.Tensor | None = None) -> gs.Tensor:
        """The tensor, or in the shape of another one, once ``zero`` is known; nothing is copied."""
        dims = self.problem.dims(tensor if shape is None else shape)
        assert dims is not None
        while tensor.inputs and tensor.inputs[0].op in _ALIAS:
            # onnxruntime makes one Reshape of two, of the second's shape if it is known, and the zero would be gone.
            tensor = tensor.inputs[0].inputs[0]
        made = self.op.Reshape(tensor, self.op.Add(self.op.constant(np.asarray(dims, np.int64)), zero))
        made.shape, made.dtype = list(dims), tensor.dtype
        self._take()
        return made

    def _open_segment(self) -> None:
        self.waiting, self.reshaped = set(), {}
        if self.pace is not None:
            with self._place(self.pace[1]):
                self.zero = self._paced()

    def _repeat(self, place: int, number: int) -> None:
        """A node's further run."""
        node = self.problem.nodes[number]
        operands = [self._operand(place, node, t) for t in self.operands[number]]
        made = [self._fresh(t) for t in node.outputs]
        if not any(t.name in self.waiting for t in operands) and self.zero is not None:
            entry = operands[0]
            if node.op in _ALIAS and self.problem.dims(node.outputs[0]) is not None:
                entry = self.reshaped.get(entry.name, entry)
                with self._place(node):
                    waits = self._behind(entry, self.zero, node.outputs[0])
                self.reshaped[waits.name] = entry
                self.latest[node.outputs[0].name] = waits
                self._ran(waits)
                return
            with self._place(node):
                self._barrier(node.op, operands, self.zero)
        again = copy_node(node, operands, made)
        again.name = self.op.fresh(f"{node.name or node.op}.recompute")
        again.metadata = {**again.metadata, "zilc.role": "recompute"}
        self.nodes.append(again)
        for old, new in zip(node.outputs, made, strict=True):
            if old.name:
                self.waiting.add(new.name)
                self.first[new.name] = old.name
                self._ran(new)
            if old.name in self.problem.number:  # an output of the graph stays anyway
                self.latest[old.name] = new

    def _ran(self, tensor: gs.Tensor) -> None:
        """What runs again once the wave has begun comes late."""
        if self.late:
            self.late.add(tensor.name)

    def _fresh(self, tensor: gs.Tensor) -> gs.Tensor:
        if not tensor.name:
            return gs.Variable.empty()
        known = self.problem.dims(tensor)
        shape = tensor.shape if known is None else list(known)
        return gs.Variable(self.op.fresh(f"{tensor.name}.recompute"), tensor.dtype, shape)

    def _barrier(self, op: str, operands: list[gs.Tensor], zero: gs.Tensor) -> bool:
        """Let one operand wait for ``zero`` (in place); returns whether one does, or does already.

        A parameter if there is one: onnxruntime puts a Reshape of its own before the first factor of a product whose
        bias it fuses, and makes one of two that follow each other; before a parameter it puts none.
        """
        found = [
            k for k, t in enumerate(operands) if isinstance(t, gs.Variable) and t.name and self._same_shape(t)
        ]  # fmt: skip
        parameters = [k for k in found if not operands[k].inputs and self.problem.dims(operands[k])]
        if not parameters and any(t.name in self.reshaped for t in operands):
            return True
        chosen = next(iter([*parameters, *(k for k in found if operands[k].inputs), *found]), None)
        if chosen is not None:
            operands[chosen] = self._behind(operands[chosen], zero)
        elif op == "Expand" and self._has_elements(operands[1]):  # of a constant: its shape can wait
            operands[1] = self.op.Add(operands[1], zero)
            self._take()
        else:
            return False
        return True
