"""BatchNormalization in training form as plain operators, which every runtime has."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.graph import STATISTICS, hand_over
from zilc.vjp import table
from zilc.vjp.norm import batch_normalized, batch_statistics


def spell_out(op: Emitter, graph: gs.Graph) -> gs.Graph:
    """Those that the training mode turned, in subgraphs too (in place).

    Runtimes made for inference may have no kernel for the training form (onnxruntime's CUDA provider), or one that
    runs on a single thread (its CPU provider).

    Requires: ``op`` knows the names of ``graph``.
    Ensures:  no BatchNormalization of :func:`zilc.passes.train_mode.train_mode` is left; same outputs.

    Before:  x, scale, bias, mean, var -> BatchNormalization(training_mode = 1) -> y
    After:   x -> ReduceMean -> m;  c = x - m;  r = 1/sqrt(mean(c c) + epsilon);  y = c (r scale) + bias

    In the forward part the frozen nodes that move the running statistics have made c and r already.
    """
    made = {t.name: t for node in graph.nodes for t in node.outputs if t.name}
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        for body in node.subgraphs():
            spell_out(op, body)
        if not hasattr(node, STATISTICS):
            nodes.append(node)
            continue
        x, scale, bias = node.inputs[:3]
        shell = gs.Graph(opset=graph.opset)
        inner = Emitter(shell, set())
        inner.names = op.names
        with inner.in_place_of(node):
            centred, r = (made.get(name) for name in getattr(node, STATISTICS))
            if centred is None or r is None:
                epsilon = float(table.attributes(node, graph.opset)["epsilon"])
                own = batch_statistics(inner, x, epsilon)
                centred, r = own.centred, own.r
            result = batch_normalized(inner, x, scale, bias, centred, r)
        hand_over(node, result)
        nodes += shell.nodes
    graph.nodes = nodes
    return graph
