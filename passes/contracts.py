"""Predicates that passes require and ensure; each names the first offender."""

from __future__ import annotations

from typing import NoReturn

import onnx_graphsurgeon as gs

from zilc.errors import EnsuresError, RequiresError, describe_vertex
from zilc.graph import Dataflow, is_standard


def acyclic(graph: gs.Graph) -> str | None:
    """Nodes are in topological order.  Returns None, or what is wrong."""
    made = {t.name for t in graph.inputs}
    produced = {t.name for node in graph.nodes for t in node.outputs if t.name}
    for node in graph.nodes:
        for tensor in node.inputs:
            if tensor.name in produced and tensor.name not in made:
                return f"{describe_vertex(node.name, node.op)} reads '{tensor.name}' before it is made"
        made.update(t.name for t in node.outputs if t.name)
    return None


def levelled(flow: Dataflow) -> str | None:
    """All paths from a vertex to an output have one length.  Returns None, or the first edge at fault.

    Computed from shortest and longest distances, so that it does not lean on the level analysis.
    """
    shortest = [0] * len(flow.vertices)
    longest = [0] * len(flow.vertices)
    seen = [False] * len(flow.vertices)
    for edge in reversed(flow.edges):
        if edge.source is None:
            continue
        low, high = shortest[edge.consumer] + 1, longest[edge.consumer] + 1
        i = edge.source
        shortest[i] = min(shortest[i], low) if seen[i] else low
        longest[i] = max(longest[i], high)
        seen[i] = True
        if shortest[i] != longest[i]:
            return f"vertex '{flow.names[i]}' has paths of {shortest[i]} and {longest[i]} edges to the output"
    for leaf in flow.leaves:
        lengths = {longest[e.consumer] + 1 for e in flow.readers.get(leaf, [])}
        if len(lengths) > 1:
            return f"leaf '{leaf}' has paths of {sorted(lengths)} edges to the output"
    return None


def standard_operators(graph: gs.Graph, allowed: frozenset[str] = frozenset()) -> str | None:
    """Only operators of the default domain, or of a domain the model brought.  Returns None, or the first other."""
    for node in graph.nodes:
        if not is_standard(node) and node.domain not in allowed:
            return f"{describe_vertex(node.name, node.op)} is of domain '{node.domain}'"
    return None


def require(problem: str | None, contract: str) -> None:
    """Raise RequiresError if a predicate found a problem."""
    if problem:
        raise RequiresError(f"{contract} does not hold: {problem}")


def ensure(problem: str | None, contract: str) -> None:
    """Raise EnsuresError (a bug in zilc) if a predicate found a problem."""
    if problem:
        _broken(problem, contract)


def _broken(problem: str, contract: str) -> NoReturn:
    raise EnsuresError(f"{contract} does not hold: {problem}. This is a bug in zilc.")
