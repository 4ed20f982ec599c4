"""Levels at which the fewest identity vertices are needed: a linear program over differences (ZIL.md, section 3).

A vertex whose edges leave it slack may sit on any level between its longest path to the outputs and K less its longest
path from a leaf.  Chains are shared, so a tensor of weight w needs w times its longest gap:

    minimise  sum_i w_i (l(i) - c(i))     over the levels l and the ends c of the chains
    with      l(i) >= l(j) + 1,   c(i) <= l(j) + 1   on every edge i -> j,   l(out) = 0,   l <= K

Every row holds a difference of two variables, so the matrix is totally unimodular and the optimum integral: this is
register minimisation in retiming (Leiserson and Saxe 1991).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes
from zilc.errors import EnsuresError
from zilc.graph import Dataflow
from zilc.passes.levels import Levels, find_levels

Measure = Literal["count", "bytes"]

#: Two distances this near to each other are one: HiGHS meets its constraints to 1e-7.
NEAR = 1e-5


def least_identities(
    flow: Dataflow, *, by: Measure = "count", dims: Mapping[str, int] | None = None
) -> Levels:
    """Levels whose shared chains hold the fewest identity vertices, or the fewest bytes.

    Args:
        by: every identity counts one, or the bytes of its tensor.
        dims: what symbolic dimensions count, by name; one where it is not said.

    Ensures: K is that of the longest path, trained outputs are on level 0, every edge spans one level or more, and no
        more is needed than on the levels of the longest path.

    Before:  a -> Exp -> Exp -> Mul,  a -> ReduceSum -> Mul       (l of ReduceSum: 1, so one identity on a's edge)
    After:   the same with ReduceSum on level 2, and an identity of one element behind it
    """
    lowest = find_levels(flow)
    highest = latest_levels(flow, lowest)
    if highest == lowest.vertices:
        return lowest
    vertices = _solve(flow, lowest, highest, by, dims or {})
    leaves = dict.fromkeys(flow.leaves, 0)
    for edge in flow.edges:
        if edge.source is None:
            leaves[edge.tensor] = max(leaves[edge.tensor], vertices[edge.consumer] + 1)
    found = Levels(vertices, leaves, lowest.depth)
    if any(found.gap(edge) < 0 for edge in flow.edges) or max([*vertices, *leaves.values()]) > lowest.depth:
        raise EnsuresError("the linear program's levels break an edge. This is a bug in zilc.")
    # Rounding can take an optimum away in theory; what shared needs is never exceeded.
    return min((lowest, found), key=lambda levels: needed(flow, levels, by=by, dims=dims))


def latest_levels(flow: Dataflow, lowest: Levels) -> tuple[int, ...]:
    """The highest level of each vertex: K less its longest path from a leaf; trained outputs stay on 0."""
    highest = [lowest.depth] * len(flow.vertices)
    for edge in flow.edges:  # by consumer, so operands come before what they feed
        above = lowest.depth if edge.source is None else highest[edge.source]
        highest[edge.consumer] = min(highest[edge.consumer], above - 1)
    for name in flow.outputs:
        if name in flow.producer:
            highest[flow.producer[name]] = 0
    return tuple(highest)


def needed(
    flow: Dataflow, levels: Levels, *, by: Measure = "count", dims: Mapping[str, int] | None = None
) -> int:
    """Identity vertices of shared chains on these levels, or their bytes."""
    return sum(
        _weight(flow.tensors[tensor], by, dims or {}) * max(levels.gap(edge) for edge in edges)
        for tensor, edges in flow.readers.items()
    )


def _weight(tensor: gs.Tensor, by: Measure, dims: Mapping[str, int]) -> int:
    if by == "count":
        return 1
    dtype = dtypes.np_dtype(tensor.dtype)
    size = dtype.itemsize if dtype is not None else 4
    for n in tensor.shape if tensor.shape is not None else ():
        size *= int(n) if isinstance(n, (int, np.integer)) else int(dims.get(str(n), 1))
    return max(size, 1)


def _solve(
    flow: Dataflow, lowest: Levels, highest: tuple[int, ...], by: Measure, dims: Mapping[str, int]
) -> tuple[int, ...]:
    """Levels of the vertices at the optimum.

    A column for each vertex with slack, one for the level of a leaf that such a vertex reads, and one for the end of
    each chain that has several candidates; vertices without slack are numbers.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    low: list[float] = []
    high: list[float | None] = []
    price: list[float] = []

    def column(least: float, most: float | None, cost: float = 0.0) -> int:
        low.append(least)
        high.append(most)
        price.append(cost)
        return len(low) - 1

    place = {
        v: column(lowest.vertices[v], highest[v]) for v in range(len(flow.vertices)) if highest[v] > lowest.vertices[v]
    }
    rows: list[tuple[int, int]] = []  # a - b <= bound, as columns (a, b)
    bounds: list[float] = []

    def below(a: int, b: int, bound: float) -> None:
        rows.append((a, b))
        bounds.append(bound)

    scale = 1.0
    if by == "bytes":  # numbers of moderate size suit the solver
        scale = max(_weight(flow.tensors[t], by, dims) for t in flow.readers)
    for tensor, edges in flow.readers.items():
        weight = _weight(flow.tensors[tensor], by, dims) / scale
        source = edges[0].source
        consumers = sorted({edge.consumer for edge in edges})
        free = [j for j in consumers if j in place]
        settled = [lowest.vertices[j] for j in consumers if j not in place]
        if source is None:
            if not free:
                continue  # the leaf sits right above its consumers, wherever the others go
            top = column(max([*settled, *(lowest.vertices[j] for j in free)]) + 1, lowest.depth, weight)
        elif source in place:
            top = place[source]
            price[top] += weight
        elif not free:
            continue
        else:
            top = -1  # without slack, and so are its consumers' upper bounds
        if top >= 0:
            for j in free:
                below(place[j], top, -1.0)
            if settled:
                low[top] = max(low[top], max(settled) + 1)
        # The chain's end: min over the consumers of l(j) + 1.
        if len(free) == 1 and not settled:
            price[place[free[0]]] -= weight
        elif free:
            end = column(0.0, min(settled) + 1 if settled else None, -weight)
            for j in free:
                below(end, place[j], 1.0)
    count = len(rows)
    data = np.tile([1.0, -1.0], count)
    matrix = csr_array((data, (np.repeat(np.arange(count), 2), np.reshape(rows, -1))), shape=(count, len(low)))
    found = linprog(price, A_ub=matrix, b_ub=bounds, bounds=list(zip(low, high, strict=True)), method="highs")
    if found.x is None:
        raise EnsuresError(f"the linear program of the placement has no solution: {found.message}")
    levels = list(lowest.vertices)
    for v, k in place.items():
        levels[v] = round(found.x[k])
        if abs(found.x[k] - levels[v]) > NEAR:
            raise EnsuresError(f"level {found.x[k]} of vertex '{flow.names[v]}' is not whole. This is a bug in zilc.")
    return tuple(levels)
