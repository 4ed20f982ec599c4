"""Levels: the length of the longest path from a vertex to a trained output (ZIL.md, section 3).

l(out) = 0 and l(i) = 1 + max over the consumers j of l(j); leaves have levels by the same law.  K is the largest.
A leaf on level l is updated at step t = l - 1, from the errors of the vertices one level nearer to the output.
"""

from __future__ import annotations

from dataclasses import dataclass

from zilc.graph import Dataflow, Edge


@dataclass(frozen=True)
class Levels:
    """Levels of a dataflow.

    Attributes:
        vertices: level of each vertex, by its position.
        leaves: level of each leaf, by name.
        depth: K, the largest level.
    """

    vertices: tuple[int, ...]
    leaves: dict[str, int]
    depth: int

    def of(self, edge: Edge) -> int:
        """Level of the operand's end of an edge."""
        return self.leaves[edge.tensor] if edge.source is None else self.vertices[edge.source]

    def gap(self, edge: Edge) -> int:
        """Identity vertices that the edge needs: l(i) - l(j) - 1."""
        return self.of(edge) - self.vertices[edge.consumer] - 1


def find_levels(flow: Dataflow) -> Levels:
    """Level of every vertex and leaf, in one sweep from the outputs.

    Requires: vertices in topological order (:class:`~zilc.graph.Dataflow` has them so).
    """
    vertices = [0] * len(flow.vertices)
    leaves = dict.fromkeys(flow.leaves, 0)
    # Edges are sorted by consumer, so backwards every consumer's level is final before its operands need it.
    for edge in reversed(flow.edges):
        level = vertices[edge.consumer] + 1
        if edge.source is None:
            leaves[edge.tensor] = max(leaves[edge.tensor], level)
        else:
            vertices[edge.source] = max(vertices[edge.source], level)
    depth = max([*vertices, *leaves.values()], default=0)
    return Levels(tuple(vertices), leaves, depth)


SumOrder = dict[Edge, tuple[int, int, int]]


def sum_order(flow: Dataflow, levels: Levels, longest: tuple[int, ...] | None = None) -> SumOrder:
    """The place of each edge's contribution in the sum at its operand (ZIL.md, section 5).

    By the consumer's level ascending, then its topological index, then the operand's index, all of the graph
    without inserted identities: a chain takes the place of the first consumer that it serves.  Thus Z-IL on the
    levelled graph and reverse mode on the original add in the same order.

    Args:
        longest: longest-path levels of the vertices that are no inserted identities, in their order, where ``levels``
            are others: a placement with fewer identities moves vertices, and must not move their terms.
    """
    from zilc.graph import INSERTED

    rank, count = [0] * len(flow.vertices), 0
    for index, node in enumerate(flow.vertices):
        rank[index] = count
        if not getattr(node, INSERTED, False):
            count += 1
    order: SumOrder = {}
    for edge in reversed(flow.edges):
        node = flow.vertices[edge.consumer]
        served = [order[e] for t in node.outputs for e in flow.readers.get(t.name, ())] if getattr(
            node, INSERTED, False
        ) else []
        own = levels.vertices[edge.consumer]
        if longest is not None and not getattr(node, INSERTED, False):
            own = longest[rank[edge.consumer]]
        order[edge] = min(served) if served else (own, rank[edge.consumer], edge.operand)
    return order
