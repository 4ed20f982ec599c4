"""Rules for If, Scan and Loop: operators whose subgraphs hold the function.

The VJP of an If is an If: each branch runs its subgraph again and goes back through it.  Scan and Loop keep the values
that enter each iteration; their VJP is a Scan over the iterations in reverse, whose body runs one iteration again and
goes back through it.  Captured outer tensors are operands like the others; what all iterations give to one is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from zilc import dtypes
from zilc.emit import Emitter
from zilc.graph import captured
from zilc.vjp import table
from zilc.vjp.inner import again, finish, instantiate, operands, passes, reverse
from zilc.vjp.table import defwhole

Cotangents = list[gs.Tensor | None]


def without_rule(node: gs.Node, opset: int, live: Collection[str]) -> Iterator[gs.Node]:
    """Nodes of a vertex's subgraphs that lie on a path from a live tensor and have no rule."""
    given = [t.name for t in node.inputs]
    for inner in node.subgraphs():
        carrying = set(live)
        if any(name in live for name in given):
            carrying.update(t.name for t in inner.inputs if dtypes.is_float(t))
        for each in inner.nodes:
            if not any(t.name in carrying and passes(each, k, opset) for k, t in enumerate(operands(each))):
                continue
            carrying.update(t.name for t in each.outputs if t.name and dtypes.may_hold_floats(t))
            rule = table.lookup(each, opset)
            if rule is None:
                yield each
            elif rule.whole is not None:
                yield from without_rule(each, opset, carrying)


def _seeds(op: Emitter, outputs: Sequence[gs.Tensor], cotangents: Sequence[gs.Tensor | None]) -> dict[str, gs.Tensor]:
    """Cotangents by tensor; one that is several outputs gets their sum."""
    seeds: dict[str, gs.Tensor] = {}
    for tensor, g in zip(outputs, cotangents, strict=False):
        if g is not None and dtypes.is_float(tensor):
            seeds[tensor.name] = op.Add(seeds[tensor.name], g) if tensor.name in seeds else g
    return seeds


def _wanted(node: gs.Node) -> list[tuple[int, gs.Variable]]:
    """Captured tensors that may want a cotangent: a constant that is trained is a graph input by now."""
    base = len(node.inputs)
    return [
        (base + k, t)
        for k, t in enumerate(captured(node))
        if isinstance(t, gs.Variable) and dtypes.is_float(t)
    ]


def _append(op: Emitter, kind: str, inputs: Sequence[gs.Tensor], outputs: list[gs.Variable], **attrs: object) -> None:
    node = gs.Node(kind, op.fresh(f"{op.prefix}/{kind}"), attrs, inputs=list(inputs), outputs=outputs)
    node.metadata = op.metadata
    op.graph.nodes.append(node)


# -- If --


def _if(op: Emitter, node: gs.Node, cotangents: Cotangents) -> dict[int, gs.Tensor]:
    """Each branch: its subgraph again, then back; zeros for what only the other branch reads."""
    wanted = _wanted(node)
    emitters, found = {}, {}
    for key in ("then_branch", "else_branch"):
        inner = op.inside()
        outputs, nodes = instantiate(inner, node.attrs[key], {})
        emitters[key] = inner
        arriving = [_of_branch(inner, t, g) for t, g in zip(outputs, cotangents, strict=False)]
        found[key] = reverse(inner, nodes, _seeds(inner, outputs, arriving), [t.name for _, t in wanted])
    wanted = [(k, t) for k, t in wanted if any(t.name in got for got in found.values())]
    if not wanted:
        return {}
    branches = {}
    for key, inner in emitters.items():
        results = [found[key][t.name] if t.name in found[key] else inner.zeros_like(t) for _, t in wanted]
        branches[key] = finish(inner, [], results, f"{node.name}.{key}.vjp", [t for _, t in wanted])
    made = [gs.Variable(op.fresh(f"{op.prefix}/If.{t.name}"), op.dtype(t), op.dims(t)) for _, t in wanted]
    _append(op, "If", [node.inputs[0]], made, **branches)
    return {k: out for (k, _), out in zip(wanted, made, strict=True)}


def _of_branch(op: Emitter, output: gs.Tensor, g: gs.Tensor | None) -> gs.Tensor | None:
    """The cotangent in the shape of what this branch gives.

    Branches may differ in rank (PyTorch exports ``squeeze`` of a dimension that may be 1 so), and what was inferred
    outside fits one of them at best; in the one that is taken no element moves.
    """
    if g is None:
        return None
    ours, theirs = op.dims(output), op.dims(g)
    if ours is None or (theirs is not None and len(ours) == len(theirs)):
        return g
    made = op.Reshape(g, op.Shape(output))
    made.shape = list(ours)
    return made


# -- iterations --


@dataclass
class _Scanned:
    """A tensor that an iteration reads or makes a slice of."""

    tensor: gs.Tensor | None
    axis: int
    direction: int


@dataclass
class _Iterations:
    """What Scan and Loop have in common.

    Attributes:
        body: the subgraph.
        states: (place among the body's inputs and the node's operands, place among the body's and node's outputs).
        inputs: (place among the body's inputs, operand or -1, what is scanned): the values each iteration began with.
        outputs: (place among the body's outputs, cotangent).
    """

    body: gs.Graph
    states: list[tuple[int, int, int, int]]
    inputs: list[tuple[int, int, _Scanned]]
    outputs: list[tuple[int, _Scanned]]


def _backwards(op: Emitter, node: gs.Node, cotangents: Cotangents, made: _Iterations) -> dict[int, gs.Tensor]:
    """A Scan over the iterations in reverse.

    Its states are the cotangents of the states, and the sums for captured tensors; it scans what the iterations began
    with and the cotangents of what they gave, and gives the cotangents of what they scanned.
    """
    inner = op.inside()
    elements: dict[str, gs.Tensor] = {}
    scanned: list[tuple[gs.Variable, _Scanned]] = []
    for place, _, entry in made.inputs:
        element = _element(inner, entry, made.body.inputs[place].name)
        elements[made.body.inputs[place].name] = element
        scanned.append((element, entry))
    if node.op == "Loop":
        elements[made.body.inputs[1].name] = inner.constant(np.asarray(True))  # an iteration that took place
    outputs, nodes = instantiate(inner, made.body, elements)

    pulls: list[gs.Tensor | None] = [None] * len(outputs)
    states: list[tuple[int, gs.Variable, gs.Tensor]] = []  # operand, cotangent inside, and the one to start from
    for into, operand, out, result in made.states:
        initial = node.inputs[operand]
        if not dtypes.is_float(initial):
            continue
        shape = op.dims(initial)
        held = gs.Variable(inner.fresh(f"{op.prefix}/{made.body.inputs[into].name}.error"), op.dtype(initial), shape)
        g = cotangents[result] if result < len(cotangents) else None
        states.append((operand, held, g if g is not None else op.zeros_like(initial)))
        pulls[out] = held
    for out, entry in made.outputs:
        if entry.tensor is not None:
            element = _element(inner, entry, f"{made.body.outputs[out].name}.error")
            scanned.append((element, entry))
            pulls[out] = element

    outer = _wanted(node)
    slices = [(operand, elements[made.body.inputs[place].name], entry) for place, operand, entry in made.inputs]
    names = {t.name for _, t, _ in slices if dtypes.is_float(t)} | {t.name for _, t in outer}
    found = reverse(inner, nodes, _seeds(inner, outputs, pulls), names)

    carried, results, starts = [h for _, h, _ in states], [], [s for _, _, s in states]
    by_operand = {operand: element for operand, element, _ in slices}
    for operand, _, _ in states:
        element = by_operand[operand]
        results.append(found[element.name] if element.name in found else inner.zeros_like(element))
    sums = [(k, t) for k, t in outer if t.name in found]
    for _, t in sums:
        held = gs.Variable(inner.fresh(f"{op.prefix}/{t.name}.sum"), op.dtype(t), op.dims(t))
        carried.append(held)
        results.append(inner.Add(held, found[t.name]))
        starts.append(op.zeros_like(t))
    state_operands = {operand for operand, _, _ in states}
    given = [
        (operand, element, entry)
        for operand, element, entry in slices
        if operand not in state_operands and operand >= 0 and element.name in found
    ]
    results += [found[element.name] for _, element, _ in given]
    likes = [*carried, *(element for _, element, _ in given)]
    body = finish(inner, [*carried, *(e for e, _ in scanned)], results, f"{node.name}.vjp", likes)
    outs = [gs.Variable(op.fresh(f"{op.prefix}/{h.name.rsplit('/', 1)[-1]}"), op.dtype(h), op.dims(h)) for h in carried]
    for operand, _, _ in given:
        x = node.inputs[operand]
        outs.append(gs.Variable(op.fresh(f"{op.prefix}/{x.name}.vjp"), op.dtype(x), op.dims(x)))
    _append(
        op, "Scan", [*starts, *(e.tensor for _, e in scanned)], outs,
        body=body, num_scan_inputs=len(scanned),
        scan_input_axes=[e.axis for _, e in scanned],
        scan_input_directions=[1 - e.direction for _, e in scanned],
        **({"scan_output_axes": [e.axis for _, _, e in given],
            "scan_output_directions": [1 - e.direction for _, _, e in given]} if given else {}),
    )  # fmt: skip
    operands_in_order = [*(k for k, _, _ in states), *(k for k, _ in sums), *(k for k, _, _ in given)]
    return dict(zip(operands_in_order, outs, strict=True))


def _element(inner: Emitter, entry: _Scanned, name: str) -> gs.Variable:
    """One slice of a scanned tensor, inside the body."""
    assert entry.tensor is not None
    dims = entry.tensor.shape
    shape = None
    if dims is not None:
        axis = entry.axis % len(dims)
        shape = [n for k, n in enumerate(dims) if k != axis]
    return gs.Variable(inner.fresh(f"{inner.prefix}/{name}"), entry.tensor.dtype, shape)


def _keep(op: Emitter, node: gs.Node, inputs: Sequence[int]) -> None:
    """The node gives, one more output each, what these inputs of its body hold in every iteration, stacked."""
    if hasattr(node, "zilc_kept"):
        return
    body, name = node.attrs["body"], node.name or node.op
    node.zilc_kept = {}
    while len(node.outputs) < len(body.outputs) - (node.op == "Loop"):
        node.outputs.append(gs.Variable.empty())
    for place in inputs:
        held = body.inputs[place]
        inside = gs.Variable(op.fresh(f"{name}/{held.name}.kept"), held.dtype, held.shape)
        body.nodes.append(gs.Node("Identity", op.fresh(f"{name}/Identity"), inputs=[held], outputs=[inside]))
        body.outputs.append(inside)
        shape = None if held.shape is None else [None, *held.shape]
        kept = gs.Variable(op.fresh(f"{name}.{held.name}.kept"), held.dtype, shape)
        node.outputs.append(kept)
        node.zilc_kept[place] = kept
    for attribute in ("scan_output_axes", "scan_output_directions"):
        if node.attrs.get(attribute):
            node.attrs[attribute] = [*node.attrs[attribute], *[0] * len(inputs)]


# -- Scan --


def _prepare_scan(op: Emitter, node: gs.Node) -> None:
    _keep(op, node, range(len(node.inputs) - int(node.attrs["num_scan_inputs"])))


def _prepared(op: Emitter, node: gs.Node, prepare: Callable[[Emitter, gs.Node], None]) -> gs.Node:
    """The vertex, or a second instance of one that did not keep what its iterations began with."""
    if hasattr(node, "zilc_kept"):
        return node
    made = again(op, node)
    prepare(op, made)
    return made


def _scan(op: Emitter, node: gs.Node, cotangents: Cotangents) -> dict[int, gs.Tensor]:
    node = _prepared(op, node, _prepare_scan)
    scans = int(node.attrs["num_scan_inputs"])
    count = len(node.inputs) - scans
    outputs = len(node.outputs) - count - len(node.zilc_kept)

    def places(attribute: str, size: int) -> list[int]:
        return [int(n) for n in node.attrs.get(attribute) or [0] * size]

    axes, ways = places("scan_input_axes", scans), places("scan_input_directions", scans)
    out_axes, out_ways = places("scan_output_axes", outputs), places("scan_output_directions", outputs)
    inputs = [(k, k, _Scanned(node.zilc_kept[k], 0, 0)) for k in range(count)]
    inputs += [(count + k, count + k, _Scanned(node.inputs[count + k], axes[k], ways[k])) for k in range(scans)]
    given = [
        (count + k, _Scanned(cotangents[count + k] if count + k < len(cotangents) else None, out_axes[k], out_ways[k]))
        for k in range(outputs)
    ]
    return _backwards(
        op, node, cotangents, _Iterations(node.attrs["body"], [(k, k, k, k) for k in range(count)], inputs, given)
    )


# -- Loop --


def _prepare_loop(op: Emitter, node: gs.Node) -> None:
    """The iteration's number too: it says how many there were."""
    _keep(op, node, [0, *range(2, len(node.attrs["body"].inputs))])


def _loop(op: Emitter, node: gs.Node, cotangents: Cotangents) -> dict[int, gs.Tensor]:
    node = _prepared(op, node, _prepare_loop)
    body = node.attrs["body"]
    count = len(body.inputs) - 2
    outputs = len(body.outputs) - 1 - count - len(node.zilc_kept)
    inputs = [(0, -1, _Scanned(node.zilc_kept[0], 0, 0))]
    inputs += [(2 + k, 2 + k, _Scanned(node.zilc_kept[2 + k], 0, 0)) for k in range(count)]
    given = [
        (1 + count + k, _Scanned(cotangents[count + k] if count + k < len(cotangents) else None, 0, 0))
        for k in range(outputs)
    ]
    states = [(2 + k, 2 + k, 1 + k, k) for k in range(count)]
    return _backwards(op, node, cotangents, _Iterations(body, states, inputs, given))


defwhole("If", _if, note="the branch runs again, and back")
defwhole("Scan", _scan, prepare=_prepare_scan, note="a Scan in reverse; states are kept")
defwhole("Loop", _loop, prepare=_prepare_loop, note="a Scan in reverse; carried values, of one shape, are kept")
