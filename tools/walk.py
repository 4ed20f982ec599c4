"""Take a small model through every pass and print what is there after each: ``python tools/walk.py MODEL.onnx``."""

from __future__ import annotations

import sys

import onnx_graphsurgeon as gs

import zilc
from zilc import analysis
from zilc.errors import ZilcError
from zilc.passes.dynamics import Difference, Dynamics, Error, Prediction, Pull, Scaled, Sum, Term
from zilc.passes.identities import flow_of, insert_identities
from zilc.passes.levels import find_levels
from zilc.passes.wavefront import wavefront


def line(node: gs.Node) -> str:
    """One node, as one would write it."""
    return f"{node.outputs[0].name} = {node.op}({', '.join(t.name or '-' for t in node.inputs)})"


def text(term: Term, dynamics: Dynamics) -> str:
    """A term of the dynamics."""
    match term:
        case Error(tensor, t):
            return f"eps[{tensor},{t}]"
        case Prediction(tensor, t):
            return f"mu[{tensor},{t}]"
        case Pull(edge, t):
            made = dynamics.flow.vertices[edge.consumer].outputs[0].name
            return f"eps[{made},{t}] d{made}/d{edge.tensor}"
        case Sum(terms):
            return " + ".join(text(x, dynamics) for x in terms) or "0"
        case Difference(a, b):
            return f"({text(a, dynamics)}) - ({text(b, dynamics)})"
        case Scaled(gamma, inner):
            return f"{gamma:g} ({text(inner, dynamics)})"


def walk(path: str) -> list[str]:
    """The whole road as lines."""
    found = analysis.structure(path)
    flow, levels = found.flow, found.levels
    lines = ["1. prepared: opset settled, constants lifted, Identity nodes removed"]
    lines += [f"   {line(node)}" for node in found.graph.nodes]

    lines += ["", f"2. levels: the longest path to the output, K = {levels.depth}"]
    places: dict[int, list[str]] = {}
    for v, node in enumerate(flow.vertices):
        places.setdefault(levels.vertices[v], []).append(node.outputs[0].name)
    for name in flow.leaves:
        places.setdefault(levels.leaves[name], []).append(f"({name})")
    lines += [f"   level {n}: {', '.join(names)}" for n, names in sorted(places.items())]

    graph = insert_identities(found.graph, flow, levels)
    delayed = flow_of(graph, found.clamped)
    added = [node for node in graph.nodes if node.outputs[0].name not in flow.producer]
    lines += ["", f"3. identities: {len(added)} inserted, every edge now spans one level"]
    lines += [f"   {line(node)}" for node in graph.nodes]

    dynamics = Dynamics.of(delayed, find_levels(delayed))
    name = next(n.outputs[0].name for n in reversed(flow.vertices) if n.outputs[0].name not in found.clamped)
    level = dynamics.level(name)
    lines += ["", f"4. dynamics: one inference step, here for '{name}' on level {level}"]
    lines += [f"   eps[{name},{level}] = {text(dynamics.error(name, level), dynamics)}"]

    schedule = wavefront(dynamics, [x for x in flow.leaves if isinstance(flow.tensors[x], gs.Constant)])
    lines += ["", "5. wavefront: what is left of it once zero errors and unchanged predictions are folded away"]
    for step in schedule.steps:
        lines.append(f"   step {step.t}")
        lines += [f"     eps[{t},{step.t + 1}] = {text(term, dynamics)}" for t, term in step.errors]
        lines += [f"     grad {leaf} = {text(term, dynamics)}" for leaf, term in step.gradients]

    emitted = zilc.emit_training(path).model
    lines += ["", f"6. training graph: {len(emitted.graph.node)} standard operators"]
    for node in emitted.graph.node:
        role = next((p.value for p in node.metadata_props if p.key == "zilc.role"), "")
        lines.append(f"   {role:10}{node.output[0]} = {node.op_type}({', '.join(x or '-' for x in node.input)})")
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/walk.py MODEL.onnx")
    try:
        print("\n".join(walk(sys.argv[1])))
    except ZilcError as error:
        sys.exit(f"error: {error}")
