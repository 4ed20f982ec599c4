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

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from zilc.errors import OptionError
from zilc.passes.liveness import Problem, Simulated
from zilc.passes.rerun import rewrite
from zilc.sizes import show_size

WHERE = "--memory-budget"
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
    rewrite(graph, problem, schedule)
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
