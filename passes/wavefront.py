"""The dynamics with gamma = 1 on a levelled graph, specialised: at step t only level t + 1 moves (ZIL.md, section 5).

Three facts of the theorem are applied as rewrites of the terms of :mod:`zilc.passes.dynamics`, then arithmetic:

    zero_errors            eps[i,t] = 0            for t < l(i)
    unchanged_predictions  mu[i,t]  = mu[i,0]      for t <= l(i)
    dead_steps             only eps[i,l(i)] is ever read, by operands on level l(i) + 1 at step t = l(i)

What is left of  eps[i,t+1] = eps[i,t] + (mu[i,t+1] - mu[i,t]) - (eps[i,t] - sum)  at t = l(i) - 1 is the sum: the
recursion of reverse mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from zilc.graph import Dataflow
from zilc.passes.dynamics import ZERO, Difference, Dynamics, Error, Prediction, Pull, Scaled, Sum, Term


@dataclass
class Step:
    """What happens in inference step t.

    Attributes:
        t: the step.
        gradients: (leaf, term): leaves on level t + 1, read from the errors of step t.
        errors: (tensor, term): eps[tensor, t + 1] of the vertices on level t + 1.
    """

    t: int
    gradients: list[tuple[str, Term]] = field(default_factory=list)
    errors: list[tuple[str, Term]] = field(default_factory=list)


@dataclass
class Schedule:
    """Steps in order over a graph whose forward pass gives mu[.,0] = x[.,0]."""

    flow: Dataflow
    steps: list[Step]


def wavefront(dynamics: Dynamics, leaves: Sequence[str]) -> Schedule:
    """Specialise the dynamics to the steps that the gradients of ``leaves`` read.

    Requires: the graph is levelled and gamma = 1.
    """
    steps = [Step(t) for t in range(dynamics.levels.depth)]
    for tensor, t in dead_steps(dynamics, leaves):
        term = dynamics.error(tensor, t)
        steps[t - 1].errors.append((tensor, specialise(term, dynamics)))
    for leaf in leaves:
        level = dynamics.levels.leaves[leaf]
        if level > 0:
            steps[level - 1].gradients.append((leaf, specialise(dynamics.gradient(leaf), dynamics)))
    return Schedule(dynamics.flow, steps)


def dead_steps(dynamics: Dynamics, leaves: Iterable[str]) -> list[tuple[str, int]]:
    """The errors that some gradient reads: (tensor, l) on paths from ``leaves``, nearest the output first."""
    flow = dynamics.flow
    live = dynamics.feeding(leaves)
    wanted = [
        (dynamics.levels.vertices[v], v, tensor.name)
        for v in live
        for tensor in flow.vertices[v].outputs
        if tensor.name in flow.readers and tensor.name not in dynamics.clamped
    ]
    # Within a level the later vertex first: the order in which reverse mode would come by.
    wanted.sort(key=lambda entry: (entry[0], -entry[1]))
    return [(name, level) for level, _, name in wanted]


def specialise(term: Term, dynamics: Dynamics) -> Term:
    """Apply the facts, then arithmetic."""
    return arithmetic(unchanged_predictions(zero_errors(term, dynamics), dynamics))


def zero_errors(term: Term, dynamics: Dynamics) -> Term:
    """eps[i,t] is zero before the wave arrives, t < l(i)  (Lemma A.1, mended)."""
    if isinstance(term, (Pull, Prediction)):
        return term
    match term:
        case Error(tensor, t) if tensor not in dynamics.clamped and t < dynamics.level(tensor):
            return ZERO
        case Sum(terms):
            return Sum(tuple(zero_errors(x, dynamics) for x in terms))
        case Difference(a, b):
            return Difference(zero_errors(a, dynamics), zero_errors(b, dynamics))
        case Scaled(gamma, inner):
            return Scaled(gamma, zero_errors(inner, dynamics))
    return term


def unchanged_predictions(term: Term, dynamics: Dynamics) -> Term:
    """mu[i,t] is the forward value as long as t <= l(i): no operand has moved before."""
    if isinstance(term, (Pull, Error)):
        return term
    match term:
        case Prediction(tensor, t) if t <= dynamics.level(tensor):
            return Prediction(tensor, 0)
        case Sum(terms):
            return Sum(tuple(unchanged_predictions(x, dynamics) for x in terms))
        case Difference(a, b):
            return Difference(unchanged_predictions(a, dynamics), unchanged_predictions(b, dynamics))
        case Scaled(gamma, inner):
            return Scaled(gamma, unchanged_predictions(inner, dynamics))
    return term


def arithmetic(term: Term) -> Term:
    """a - a = 0;  0 + a = a;  a - 0 = a;  1 a = a;  0 - (0 - a) = a.  Each is exact in floating point."""
    if isinstance(term, (Pull, Error, Prediction)):
        return term
    match term:
        case Sum(terms):
            kept = tuple(x for x in map(arithmetic, terms) if x != ZERO)
            return kept[0] if len(kept) == 1 and not isinstance(kept[0], Pull) else Sum(kept)
        case Scaled(gamma, inner):
            inner = arithmetic(inner)
            return inner if gamma == 1.0 or inner == ZERO else Scaled(gamma, inner)
        case Difference(a, b):
            a, b = arithmetic(a), arithmetic(b)
            if a == b:
                return ZERO
            if b == ZERO:
                return a
            if a == ZERO and isinstance(b, Difference) and b.a == ZERO:
                return b.b
            return Difference(a, b)
    return term
