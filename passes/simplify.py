"""Clean-up after emission: what no output reads is dropped.

Repeated work is never emitted (the emitter reuses what it made), so dead nodes are all that is left to remove: the
forward vertices of a tensor that only a loss's other branch read, or statistics that no rule used after all.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from zilc.graph import captured


def simplify(graph: gs.Graph) -> gs.Graph:
    """Drop dead nodes (in place).

    Ensures: outputs are unchanged; every node lies on a path to an output.
    """
    live = {t.name for t in graph.outputs}
    kept = []
    for node in reversed(graph.nodes):
        if not any(t.name in live for t in node.outputs if t.name):
            continue
        kept.append(node)
        live.update(t.name for t in node.inputs if t.name)
        if node.attrs:
            live.update(t.name for t in captured(node))
    kept.reverse()
    graph.nodes = kept
    return graph
