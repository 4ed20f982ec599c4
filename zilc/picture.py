"""The levelled graph with a place for every vertex, as data that a page or a figure draws.

A column is a level, which the graph itself gives; a lane is a place within it.  Lanes are dealt to whole paths, longest
first, as near to their neighbours as there is room, so that the longest path runs straight, other paths run beside it,
and a chain of identity vertices is one straight line from the vertex that it delays to the one that waits.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, pairwise
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes
from zilc.graph import INSERTED, Dataflow
from zilc.passes.levels import Levels, find_levels

VERTEX, IDENTITY, PARAMETER, INPUT, OUTPUT = range(5)
KINDS = ("vertex", "identity", "parameter", "input", "output")
#: The fewest levels in a block, what blocks between skips are joined up to, and the most in a graph of some size.
FEW, SOME, MOST = 4, 16, 48


def draw(flow: Dataflow, report: Mapping[str, Any]) -> dict[str, Any]:
    """A picture of a levelled graph (of one that is not, with its skips drawn straight through).

    Args:
        flow: the graph, identity vertices included.
        report: its :func:`~zilc.report.level_report`.

    Returns:
        ``nodes``: vertices, then leaves, as lists by field: kind (index into ``kinds``), name, op, level, column, lane,
        block, shape, bytes, reads (names of operands), t (the update step of a trained parameter), why (it is not
        trained), chain (of an identity vertex);
        ``edges``: [operand's node, consumer's node] flattened; ``chains``: origin, identities, waiting consumers;
        ``delayed``: edges of a graph without identities that span more than a level;
        ``blocks``: label and the columns it spans; facts of the report.
    """
    levels = find_levels(flow)
    leaf_number = {name: len(flow.vertices) + k for k, name in enumerate(flow.leaves)}
    edges = [(e.source if e.source is not None else leaf_number[e.tensor], e.consumer) for e in flow.edges]
    kinds = [_kind(flow, v) for v in range(len(flow.vertices))]
    kinds += [PARAMETER if isinstance(flow.tensors[n], gs.Constant) else INPUT for n in flow.leaves]
    level = [*levels.vertices, *(levels.leaves[n] for n in flow.leaves)]
    readers: list[list[int]] = [[] for _ in level]
    operands: list[list[int]] = [[] for _ in level]
    for source, target in edges:
        readers[source].append(target)
        operands[target].append(source)
    column = [
        n - 1 if kind == PARAMETER and all(level[r] == n - 1 and kinds[r] != IDENTITY for r in readers[i]) else n
        for i, (n, kind) in enumerate(zip(level, kinds, strict=True))
    ]
    chains = _chains(kinds, operands, readers)
    lane = _lanes(kinds, level, column, operands, readers, chains)
    names = [*flow.names, *flow.leaves]
    blocks, block_of = _blocks(flow, levels, kinds, column, lane, names)
    chain_of = {i: c for c, chain in enumerate(chains) for i in chain["identities"]}
    leaves = {entry["name"]: entry for entry in report["leaves"]}
    tensors = [node.outputs[0] for node in flow.vertices] + [flow.tensors[n] for n in flow.leaves]
    own = [leaves.get(name) for name in names[len(flow.vertices) :]]
    aside: list[dict[str, Any] | None] = [*[None] * len(flow.vertices), *own]
    return {
        "model": report["model"],
        "outputs": report["outputs"],
        "levels": report["levels"],
        "placement": report["placement"],
        "counts": {
            "vertices": sum(kind in (VERTEX, OUTPUT) for kind in kinds),
            "identities": kinds.count(IDENTITY),
            "delayed": len(report["skips"]),
            "parameters": sum(1 for entry in own if entry and entry["trained"] and entry["kind"] == "parameter"),
            "frozen": report["frozen_vertices"],
        },
        "identities": report["identities"],
        "kinds": list(KINDS),
        "nodes": {
            "kind": kinds,
            "name": names,
            "op": [*(node.op for node in flow.vertices), *[""] * len(flow.leaves)],
            "level": level,
            "column": column,
            "lane": lane,
            "block": [block_of[c] for c in column],
            "shape": [_shape(t) for t in tensors],
            "bytes": [_bytes(t) for t in tensors],
            "t": [entry["update_step"] if entry and entry["trained"] else None for entry in aside],
            "why": [(entry["reason"] or None) if entry else None for entry in aside],
            "chain": [chain_of.get(i) for i in range(len(kinds))],
        },
        "edges": [n for pair in edges for n in pair],
        "chains": chains,
        "delayed": sorted(
            {i for e, i in zip(flow.edges, range(len(edges)), strict=True) if levels.gap(e) > 0}
        ),
        "skips": report["skips"],
        "blocks": blocks,
        "notes": report["notes"],
    }  # fmt: skip


def _kind(flow: Dataflow, v: int) -> int:
    node = flow.vertices[v]
    if any(t.name in flow.outputs for t in node.outputs):
        return OUTPUT
    return IDENTITY if getattr(node, INSERTED, False) else VERTEX


def _chains(kinds: Sequence[int], operands: list[list[int]], readers: list[list[int]]) -> list[dict[str, Any]]:
    """Runs of identity vertices: where they come from, and which vertices wait at which of them."""
    made = []
    for i, kind in enumerate(kinds):
        if kind != IDENTITY or kinds[operands[i][0]] == IDENTITY:
            continue
        run = [i]
        while following := [r for r in readers[run[-1]] if kinds[r] == IDENTITY]:
            run.append(following[0])
        waiting = [[r, n + 1] for n, step in enumerate(run) for r in readers[step] if kinds[r] != IDENTITY]
        made.append({"origin": operands[i][0], "identities": run, "waiting": waiting})
    return made


# --- lanes ----------------------------------------------------------------------------------------------------


def _lanes(
    kinds: Sequence[int], level: Sequence[int], column: Sequence[int], operands: list[list[int]],
    readers: list[list[int]], chains: list[dict[str, Any]],
) -> list[int]:  # fmt: skip
    """A lane for each node: no two in one column share one; 0 is the longest path, below it is positive."""
    lane: dict[int, int] = {}
    taken: dict[int, np.ndarray] = {}
    width = max(column, default=0) + 3

    def free(at: int, low: int, high: int) -> bool:
        return at not in taken or not taken[at][low : high + 1].any()

    def put(nodes: Sequence[int], prefer: float, *, above: bool, margin: int = 0) -> None:
        low, high = min(column[i] for i in nodes), max(column[i] for i in nodes)
        low, high = max(low - margin, 0), high + margin
        start, sign = round(prefer), -1 if above else 1
        at = next(at for at in _outwards(start, sign) if free(at, low, high))
        taken.setdefault(at, np.zeros(width, bool))[low : high + 1] = True
        lane.update(dict.fromkeys(nodes, at))

    def near(nodes: Sequence[int], ends: Sequence[int]) -> float:
        known = [lane[n] for i in ends for n in (*operands[i], *readers[i]) if n in lane]
        return float(np.mean(known)) if known else 0.0

    for path in _paths(kinds, level, operands, readers):
        put(path, near(path, [path[0], path[-1]]), above=True)
    # Leaves of a vertex hang below it; inputs come from the left, in line with what reads them.
    leaves = [i for i, kind in enumerate(kinds) if kind in (PARAMETER, INPUT)]
    for i in sorted(leaves, key=lambda i: (kinds[i] != INPUT, i)):
        own = [lane[r] for r in readers[i] if r in lane and level[r] == level[i] - 1]
        put([i], own[0] if own else near([i], [i]), above=False)
    # Short chains nearest, so that a skip around a skip goes around it.  They keep to the upper side, with a free
    # column at both ends, where the line bends.
    top = min((n for n in lane.values()), default=0)
    for chain in sorted(chains, key=lambda c: (len(c["identities"]), c["origin"])):
        run = chain["identities"]
        high = max((-lane[i] for i in lane if column[run[-1]] - 1 <= column[i] <= column[run[0]] + 1), default=-top)
        put(run, -high - 1 if len(run) > 1 else near(run, run), above=True, margin=0 if len(run) == 1 else 1)
    return [lane[i] for i in range(len(kinds))]


def _outwards(start: int, sign: int) -> Iterator[int]:
    """Lanes from the nearest to the farthest; those on the other side count three times as far."""
    yield start
    for away in count(1):
        yield start + sign * away
        if away % 3 == 0:
            yield start - sign * (away // 3)


def _paths(
    kinds: Sequence[int], level: Sequence[int], operands: list[list[int]], readers: list[list[int]]
) -> list[list[int]]:
    """The vertices, identities aside, cut into paths, the longest first: each vertex is on one of them."""
    real = [i for i, kind in enumerate(kinds) if kind in (VERTEX, OUTPUT)]
    length: dict[int, int] = {}
    follow: dict[int, int | None] = {}
    used: set[int] = set()
    # From the outputs upwards: the most vertices that a path from here can still take.
    for i in sorted(real, key=lambda i: (level[i], i)):
        best = max((r for r in readers[i] if r in length), key=lambda r: (length[r], -r), default=None)
        length[i] = 1 + (length[best] if best is not None else 0)
        follow[i] = best
    made = []
    for i in sorted(real, key=lambda i: (-length[i], i)):
        if i in used:
            continue
        path = []
        at: int | None = i
        while at is not None and at not in used:
            path.append(at)
            used.add(at)
            at = follow[at]
            if at in used:
                at = max((r for r in readers[path[-1]] if r in length and r not in used),
                         key=lambda r: (length[r], -r), default=None)  # fmt: skip
        made.append(path)
    return sorted(made, key=lambda path: (-len(path), path[0]))


# --- blocks ---------------------------------------------------------------------------------------------------


def _scope(node: gs.Node, name: str) -> list[str]:
    """The modules that a vertex lies in, outermost first, from the exporter's metadata or from its name."""
    scopes = getattr(node, "metadata", {}).get("pkg.torch.onnx.name_scopes")
    if scopes:
        try:
            found = [str(s) for s in ast.literal_eval(scopes) if s]
        except (ValueError, SyntaxError):
            found = []
        if found:
            return found[-2].split(".") if len(found) > 1 else []
    # Nodes without a name of their own: what they make may tell.
    return _parts(name) or _parts(node.outputs[0].name)


def _parts(name: str) -> list[str]:
    """``/layer1/layer1.0/conv1/Conv``: layer1, 0, conv1.  The last part is the operator's."""
    # PyTorch's older exporter repeats a module's path in each part: /layer1/layer1.0/conv1/Conv.
    made: list[str] = []
    for part in [p for p in name.split("/") if p][:-1]:
        if made and part.startswith(made[-1] + "."):
            made.pop()
        made.append(part)
    return [p for part in made for p in re.split(r"\.|_(?=\d+$)", part) if p]


def _blocks(
    flow: Dataflow, levels: Levels, kinds: Sequence[int], column: Sequence[int], lane: Sequence[int],
    names: Sequence[str],
) -> tuple[list[dict[str, Any]], list[int]]:  # fmt: skip
    """Columns in blocks that a page can close: by module where names tell modules, else between skips."""
    width = max(column, default=0) + 1
    main: dict[int, int] = {}
    crowd: Counter[int] = Counter()
    for i, node in enumerate(flow.vertices):
        if kinds[i] == IDENTITY:
            # A chain that carries less than a row does not hold two parts of a network together.
            crowd[column[i]] += len(node.outputs[0].shape or (1,)) > 1
        else:
            crowd[column[i]] += 1
            if column[i] not in main or abs(lane[i]) < abs(lane[main[column[i]]]):
                main[column[i]] = i
    scopes = [_scope(flow.vertices[main[c]], names[main[c]]) if c in main else [] for c in range(width)]
    if sum(map(bool, scopes)) < width / 4:
        # Vertices that tell nothing: the parameters that they read may.
        for k, leaf in enumerate(flow.leaves):
            at = column[len(flow.vertices) + k]
            scopes[at] = scopes[at] or _parts(leaf)
    cuts = _by_module(scopes, width) or _by_skips(crowd, width)
    spans: list[tuple[int, int, list[str]]] = []
    block_of = [0] * width
    for low, high in cuts:
        inside = [scopes[c] for c in range(low, high + 1) if scopes[c]]
        for c in range(low, high + 1):
            block_of[c] = len(spans)
        spans.append((low, high, _label(inside)))
    # What all have in common tells nothing.
    named = [label for *_, label in spans if label]
    shared = 0
    while named and all(len(n) > shared + 1 and n[: shared + 1] == named[0][: shared + 1] for n in named):
        shared += 1
    while shared and any(label[shared].isdigit() for label in named):
        shared -= 1  # "h.0" rather than "0"
    skipped = shared if len(named) > 1 else 0
    labels = [".".join(label[skipped:]) for *_, label in spans]
    # Parts of one module are told apart, from the input on.
    for label, several in Counter(labels).items():
        if label and several > 1:
            parts = [k for k in range(len(spans)) if labels[k] == label][::-1]
            for part, k in enumerate(parts, start=1):
                labels[k] = f"{label} ({part}/{several})"
    made = [{"low": low, "high": high, "label": labels[k]} for k, (low, high, _) in enumerate(spans)]
    return made, block_of


def _label(scopes: Sequence[Sequence[str]]) -> list[str]:
    """What most of the scopes share."""
    shared: list[str] = []
    for depth in range(8):
        here = Counter(s[depth] for s in scopes if len(s) > depth and list(s[:depth]) == shared)
        if not here:
            break
        part, most = here.most_common(1)[0]
        if most < 0.6 * len(scopes):
            break
        shared.append(part)
    return shared


def _by_module(scopes: Sequence[Sequence[str]], width: int) -> list[tuple[int, int]]:
    """Runs of columns in one module, at the depth that gives blocks of a size to look at; empty if names tell none."""
    best: list[tuple[int, int]] = []
    wanted = max(3.0, min(width / 14, 16.0))
    for depth in range(1, 6):
        cuts: list[list[int]] = []
        before: Sequence[str] | None = None
        for c in range(width):
            here = scopes[c][:depth]
            if cuts and (here == before or not here):
                cuts[-1][1] = c
            else:
                cuts.append([c, c])
                before = here
        merged: list[list[int]] = []
        for low, high in cuts:
            if merged and (high - low + 1 < FEW or merged[-1][1] - merged[-1][0] + 1 < FEW):
                merged[-1][1] = high
            else:
                merged.append([low, high])
        found = [(low, high) for low, high in merged]
        if len(found) >= 3 and (not best or abs(len(found) - wanted) < abs(len(best) - wanted)):
            best = found
    return _no_longer(best, width)


def _by_skips(crowd: Mapping[int, int], width: int) -> list[tuple[int, int]]:
    """Between columns that one vertex has to itself after a crowded one; where there are none, in equal parts."""
    ends = [c for c in range(1, width) if crowd[c] <= 1 < crowd.get(c - 1, 0)]
    cuts: list[tuple[int, int]] = []
    low = 0
    for c in [*ends, width]:
        if c - low >= FEW or c == width:
            if c == width and cuts and c - low < FEW:
                low = cuts.pop()[0]
            cuts.append((low, c - 1))
            low = c
    joined: list[tuple[int, int]] = []
    for a, b in cuts:
        if joined and b - joined[-1][0] < max(SOME, width // 16):
            joined[-1] = (joined[-1][0], b)
        else:
            joined.append((a, b))
    return _no_longer(joined, width)


def _no_longer(cuts: Sequence[tuple[int, int]], width: int) -> list[tuple[int, int]]:
    made = []
    for low, high in cuts:
        parts = -(-(high - low + 1) // max(MOST, width // 12))
        edges = [low + (high - low + 1) * k // parts for k in range(parts + 1)]
        made += [(a, b - 1) for a, b in pairwise(edges)]
    return made


# --- tensors --------------------------------------------------------------------------------------------------


def _shape(tensor: gs.Tensor) -> str:
    from zilc.show import shape

    dtype = dtypes.np_dtype(tensor.dtype)
    return f"{dtype.name if dtype is not None else ''}{shape(tensor.shape)}"


def _bytes(tensor: gs.Tensor) -> int | str:
    """Bytes of a tensor; with symbolic dimensions as a product."""
    dtype = dtypes.np_dtype(tensor.dtype)
    size = dtype.itemsize if dtype is not None else 4
    if tensor.shape is None:
        return "?"
    symbols = [str(n) if n is not None else "?" for n in tensor.shape if not isinstance(n, (int, np.integer))]
    number = int(np.prod([int(n) for n in tensor.shape if isinstance(n, (int, np.integer))], dtype=np.int64)) * size
    return " × ".join([f"{number:,}", *symbols]) if symbols else number
