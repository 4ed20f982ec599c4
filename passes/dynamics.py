"""Predictive coding on a levelled graph, as equations (ZIL.md, sections 1, 4 and 5).

Signs are fixed here, once: the prediction error is  eps = mu - x,  the energy  F = 1/2 sum eps^2,  and one inference
step moves every value node but leaves and clamped outputs by

    dx[i,t]    = gamma (eps[i,t] - sum_j  eps[j,t] d mu[j,t] / d x[i])              (the mended Eq. 7)
    eps[i,t+1] = eps[i,t] + (mu[i,t+1] - mu[i,t]) - dx[i,t]                          (state kept as errors)
    grad[z]    = sum_j  eps[j,t] d mu[j,t] / d z      at  t = l(z) - 1               (the mended Eqs. 8 and 16)

Everything on a right-hand side is the state of step t.  A tensor name stands for its vertex's output; a clamped output
has  eps[out,t] = dL/d mu_out  at  mu[out,t], which its loss emits.

The equations are data: schedules are made from them by rewriting, never written a second time.  ``wavefront`` removes
what the theorem says is zero, unchanged or dead; the literal schedule carries them out as they stand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from zilc.graph import Dataflow, Edge
from zilc.passes.levels import Levels, SumOrder, sum_order


@dataclass(frozen=True, slots=True)
class Error:
    """eps[tensor, t]."""

    tensor: str
    t: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """mu[tensor, t]."""

    tensor: str
    t: int


@dataclass(frozen=True, slots=True)
class Pull:
    """eps[j,t] d mu[j,t] / d x[i] along one edge i -> j: a vector-Jacobian product of one operator.

    Taken at the operands' value nodes x[.,t]; where a rule reads the operator's output, that is mu[j,t].
    """

    edge: Edge
    t: int


@dataclass(frozen=True, slots=True)
class Sum:
    """Terms added from left to right: ((a + b) + c) + …; the order is part of the meaning (bits)."""

    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """a - b."""

    a: Term
    b: Term


@dataclass(frozen=True, slots=True)
class Scaled:
    """gamma times a term."""

    gamma: float
    term: Term


Term = Error | Prediction | Pull | Sum | Difference | Scaled

#: Nothing to add: the empty sum.
ZERO = Sum(())


@dataclass(frozen=True)
class Dynamics:
    """The equations of a levelled graph.

    Attributes:
        flow, levels: the active part and its levels.
        order: the place of each edge's contribution in its sum.
        gamma: the integration step; 1 for Z-IL.
    """

    flow: Dataflow
    levels: Levels
    order: SumOrder
    gamma: float = 1.0

    @classmethod
    def of(
        cls, flow: Dataflow, levels: Levels, *, gamma: float = 1.0, longest: tuple[int, ...] | None = None
    ) -> Dynamics:
        """``longest`` as for :func:`~zilc.passes.levels.sum_order`."""
        return cls(flow, levels, sum_order(flow, levels, longest), gamma)

    @cached_property
    def clamped(self) -> frozenset[str]:
        return frozenset(self.flow.outputs)

    def level(self, tensor: str) -> int:
        """Level of the vertex that makes a tensor."""
        return self.levels.vertices[self.flow.producer[tensor]]

    def pulls(self, tensor: str, t: int) -> Sum:
        """sum_j eps[j,t] d mu[j,t] / d x over the consumers of a tensor, in the fixed order."""
        edges = sorted(self.flow.readers.get(tensor, ()), key=self.order.__getitem__)
        return Sum(tuple(Pull(edge, t) for edge in edges))

    def move(self, tensor: str, t: int) -> Term:
        """dx[i,t]: how a value node moves in inference step t."""
        return Scaled(self.gamma, Difference(Error(tensor, t), self.pulls(tensor, t)))

    def error(self, tensor: str, t: int) -> Term:
        """eps[i,t] from the state of step t - 1."""
        if t == 0 or tensor in self.clamped:
            return Error(tensor, t)  # the initial state: zero, and the loss's derivative at a clamped output
        drift = Difference(Prediction(tensor, t), Prediction(tensor, t - 1))
        return Difference(Sum((Error(tensor, t - 1), drift)), self.move(tensor, t - 1))

    def gradient(self, leaf: str) -> Term:
        """dF/dz of a leaf, from the errors of step l(z) - 1."""
        return self.pulls(leaf, self.levels.leaves[leaf] - 1)

    def feeding(self, leaves: Iterable[str]) -> set[int]:
        """Vertices whose errors the gradients of ``leaves`` depend on."""
        return self.flow.upstream_of(leaves)
