"""Control flow whose course is known beforehand: the branch taken, and the iterations run, become vertices.

An If whose condition follows from known shapes and constants is its branch.  A Scan over a known number of slices, and
a Loop whose trip count or condition can be told at every turn, are their bodies in a row.  What stays is one vertex.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx_graphsurgeon as gs

from zilc import ir, onnx_io
from zilc.emit import Emitter
from zilc.errors import describe_vertex
from zilc.graph import Rebuild, is_standard
from zilc.passes.unroll import LIMIT, settle_shapes
from zilc.reference import evaluator
from zilc.vjp.inner import instantiate

_KINDS = frozenset({"If", "Scan", "Loop"})
#: Values of more elements than this are not computed beforehand.
_SMALL = 64


def inline_control_flow(graph: gs.Graph, notes: list[str], *, limit: int = LIMIT) -> gs.Graph:
    """Write out If, Scan and Loop where their course is known; nested ones too.

    Args:
        notes: receives a line on each.
        limit: the largest number of iterations to write out.
    """
    while True:
        said: list[str] = []
        made, changed = _once(graph, said, limit)
        notes.extend(said if not changed else [line for line in said if "unrolled" in line])
        if not changed:
            return graph
        graph = made


def _once(graph: gs.Graph, notes: list[str], limit: int) -> tuple[gs.Graph, bool]:
    if not any(_controls(node) for node in graph.nodes):
        return graph, False
    rebuild, changed = Rebuild(graph), False
    shell = gs.Graph(nodes=rebuild.nodes, opset=graph.opset)
    op = Emitter(shell, Emitter(graph).names)
    values: dict[str, np.ndarray | None] = {}
    for node in graph.nodes:
        if not _controls(node):
            rebuild.add(node)
            continue
        copy = rebuild.add(node)  # its subgraphs now read the new graph's tensors
        rebuild.nodes.pop()
        first = len(rebuild.nodes)
        label = describe_vertex(node.name or node.outputs[0].name, node.op)
        op.forget()
        with op.place(node.name or node.outputs[0].name):
            results, what = _write_out(op, copy, values, limit, iterations_read(node))
            if results is None:
                for discarded in rebuild.nodes[first:]:
                    discarded.inputs.clear()
                    discarded.outputs.clear()
                del rebuild.nodes[first:]
                rebuild.nodes.append(copy)
                notes.append(f"{label} is one vertex: {what}")
                continue
            copy.inputs.clear()
            outputs = list(copy.outputs)
            copy.outputs.clear()
            _name(op, rebuild, outputs, results, first)
        settle_shapes(op, rebuild.nodes[first:])
        changed = True
        if what:
            notes.append(f"{label} is unrolled over {what}")
    return rebuild.finish(), changed


def _controls(node: gs.Node) -> bool:
    return node.op in _KINDS and is_standard(node)


def _name(
    op: Emitter, rebuild: Rebuild, outputs: Sequence[gs.Tensor], results: Sequence[gs.Tensor], first: int
) -> None:
    """What was made takes the names of the node's outputs; a tensor that is something else already is copied."""
    fresh = {t.name for node in rebuild.nodes[first:] for t in node.outputs if t.name}
    for old, made in zip(outputs, results, strict=False):
        if not old.name:
            continue
        if made.name in fresh:
            fresh.discard(made.name)
        else:
            source = made
            made = gs.Variable(old.name, source.dtype, source.shape)
            node = gs.Node("Identity", op.fresh(f"{op.prefix}/Identity"), inputs=[source], outputs=[made])
            node.metadata, node.doc_string = {}, ""
            rebuild.nodes.append(node)
        made.name = old.name
        if made.dtype is None:
            made.dtype = old.dtype
        if old.shape is not None and all(isinstance(n, (int, np.integer)) for n in old.shape):
            made.shape = list(old.shape)
        rebuild.tensors[old.name] = made


def _write_out(
    op: Emitter, node: gs.Node, values: dict[str, np.ndarray | None], limit: int, read: int | None
) -> tuple[list[gs.Tensor] | None, str]:
    """The node's outputs in nodes of its subgraph and how often that ran; or None, and why not."""
    if node.op == "If":
        condition = _value(op, node.inputs[0], values)
        if condition is None:
            return None, "which branch it takes is known only at run time"
        branch = "then_branch" if bool(np.all(condition)) else "else_branch"
        return instantiate(op, node.attrs[branch], {})[0], ""
    if node.op == "Scan":
        return _scan(op, node, limit)
    return _loop(op, node, values, limit, read)


def _scan(op: Emitter, node: gs.Node, limit: int) -> tuple[list[gs.Tensor] | None, str]:
    body, scans = node.attrs["body"], int(node.attrs["num_scan_inputs"])
    count = len(node.inputs) - scans
    outputs = len(body.outputs) - count

    def places(attribute: str, size: int) -> list[int]:
        return [int(n) for n in node.attrs.get(attribute) or [0] * size]

    axes, ways = places("scan_input_axes", scans), places("scan_input_directions", scans)
    out_axes, out_ways = places("scan_output_axes", outputs), places("scan_output_directions", outputs)
    lengths = [_dim(op, x, axis) for x, axis in zip(node.inputs[count:], axes, strict=True)]
    steps = next((n for n in lengths if n is not None), None)
    if steps is None:
        return None, "the number of iterations is known only at run time"
    if not 0 < steps <= limit:
        return None, f"it has more than {limit} iterations" if steps else "it has no iterations"
    slices = [
        op.Split(x, axis=axis, num_outputs=steps, outputs=steps) if steps > 1 else (x,)
        for x, axis in zip(node.inputs[count:], axes, strict=True)
    ]
    states = list(node.inputs[:count])
    made: list[list[gs.Tensor]] = [[] for _ in range(outputs)]
    base = op.prefix
    for t in range(steps):
        op.forget()
        with op.place(f"{base}/t{t + 1}"):
            now = [
                op.Squeeze(parts[steps - 1 - t if way else t], [axis])
                for parts, axis, way in zip(slices, axes, ways, strict=True)
            ]
            given = {t.name: x for t, x in zip(body.inputs, [*states, *now], strict=True)}
            results, nodes = instantiate(op, body, given)
            settle_shapes(op, nodes)
        states = results[:count]
        for into, result in zip(made, results[count:], strict=True):
            into.append(result)
    stacked = [
        _stack(op, ys[::-1] if way else ys, axis) for ys, axis, way in zip(made, out_axes, out_ways, strict=True)
    ]
    return [*states, *stacked], f"{steps} iteration{'s' if steps > 1 else ''}"


def _loop(
    op: Emitter, node: gs.Node, values: dict[str, np.ndarray | None], limit: int, read: int | None = None
) -> tuple[list[gs.Tensor] | None, str]:
    """``read``: how many iterations made what is read of sequences that grow, where no more can be told."""
    body = node.attrs["body"]
    trips = _value(op, node.inputs[0], values) if node.inputs[0].name else np.asarray(limit + 1)
    condition = node.inputs[1] if len(node.inputs) > 1 and node.inputs[1].name else None
    going = np.asarray(True) if condition is None else _value(op, condition, values)
    if trips is None or going is None:
        if read is None:
            return None, "the number of iterations is known only at run time"
        # Whoever reads an element that is not there fails: so far the loop has come, whatever its condition says.
        trips, going, condition = np.asarray(read), np.asarray(True), None
    else:
        read = None
    most, carried = int(np.squeeze(trips)), list(node.inputs[2:])
    made: list[list[gs.Tensor]] = [[] for _ in range(len(body.outputs) - 1 - len(carried))]
    base, t = op.prefix, 0
    while going is not None and bool(np.all(going)) and t < most:
        if t == limit:
            return None, f"it has more than {limit} iterations"
        op.forget()
        with op.place(f"{base}/t{t + 1}"):
            start = [op.constant(np.asarray(t, np.int64)), op.constant(np.asarray(True)), *carried]
            results, nodes = instantiate(op, body, {i.name: x for i, x in zip(body.inputs, start, strict=True)})
            settle_shapes(op, nodes)
        going = going if read is not None else _value(op, results[0], values)
        carried = results[1 : 1 + len(carried)]
        for into, result in zip(made, results[1 + len(carried) :], strict=True):
            into.append(result)
        t += 1
    if going is None and t < most:
        return None, "its condition is known only at run time"
    if not t and made:
        return None, "it has no iterations"
    return [*carried, *(_stack(op, ys, 0) for ys in made)], f"{t} iteration{'' if t == 1 else 's'}"


def iterations_read(loop: gs.Node) -> int | None:
    """How many iterations of a Loop made the elements that are read of what it gives.

    None unless all that is read of it are elements, by constant positions from the front, of sequences that begin
    with a known length and to whose end every iteration adds one.

    Before:  s -> Loop (s -> SequenceInsert(s, x)) -> t -> SequenceAt(t, 3)
    After:   four elements less those of s are as many iterations, however many more the loop runs
    """
    if loop.op != "Loop":
        return None
    most = 0
    for k, output in enumerate(loop.outputs):
        carried = k < len(loop.inputs) - 2
        if not output.name or (carried and not output.outputs):
            continue
        if not carried or not _appends(loop.attrs["body"], k):
            return None
        length = _length(loop.inputs[2 + k])
        if length is None:
            return None
        for reader in output.outputs:
            at = reader.inputs[1] if reader.op == "SequenceAt" and len(reader.inputs) == 2 else None
            position = int(ir.values(at).reshape(-1)[0]) if isinstance(at, gs.Constant) else -1
            if position < 0:
                return None
            most = max(most, position + 1 - length)
    return most or None


def _length(sequence: gs.Tensor) -> int | None:
    """The length of a sequence, where the graph says it."""
    node = sequence.inputs[0] if isinstance(sequence, gs.Variable) and sequence.inputs else None
    if node is None or not is_standard(node):
        return None
    if node.op in ("Identity", "Optional") and node.inputs:
        return _length(node.inputs[0])
    return {"SequenceConstruct": len(node.inputs), "SequenceEmpty": 0}.get(node.op)


def _appends(body: gs.Graph, k: int) -> bool:
    """Whether an iteration gives the k-th state that it was given, one element longer at its end."""
    state, at, added = body.inputs[2 + k].name, body.outputs[1 + k], 0
    while at.name != state:
        node = at.inputs[0] if isinstance(at, gs.Variable) and at.inputs else None
        if node is None or not is_standard(node) or not node.inputs:
            return False
        if node.op == "If":
            # Whether an optional is there: it is, the state being a sequence.
            present = _is_there(node.inputs[0], state)
            if present is None:
                return False
            at = node.attrs["then_branch" if present else "else_branch"].outputs[node.outputs.index(at)]
            continue
        added += node.op == "SequenceInsert"
        if node.op not in ("SequenceInsert", "Identity", "Optional", "OptionalGetElement"):
            return False
        if node.op == "SequenceInsert" and len(node.inputs) > 2 and node.inputs[2].name:
            return False
        at = node.inputs[0]
    return added == 1


def _is_there(condition: gs.Tensor, state: str) -> bool | None:
    """A condition that asks whether ``state`` holds anything, if it holds something."""
    node = condition.inputs[0] if isinstance(condition, gs.Variable) and condition.inputs else None
    if node is None or not node.inputs:
        return None
    if node.op == "Not":
        inner = _is_there(node.inputs[0], state)
        return None if inner is None else not inner
    return True if node.op == "OptionalHasElement" and node.inputs[0].name == state else None


def _stack(op: Emitter, slices: Sequence[gs.Tensor], axis: int) -> gs.Tensor:
    parts = [op.Unsqueeze(x, [axis]) for x in slices]
    return op.Concat(*parts, axis=axis) if len(parts) > 1 else parts[0]


# -- values that are known beforehand --


def _dim(op: Emitter, x: gs.Tensor, axis: int) -> int | None:
    dims = op.dims(x)
    size = None if dims is None else dims[axis]
    return int(size) if isinstance(size, (int, np.integer)) else None


def _value(op: Emitter, tensor: gs.Tensor, values: dict[str, np.ndarray | None]) -> np.ndarray | None:
    """What a small tensor holds, if it follows from constants and known shapes."""
    stack = [tensor]
    while stack:
        x = stack[-1]
        if x.name in values:
            stack.pop()
            continue
        node = x.inputs[0] if isinstance(x, gs.Variable) and x.inputs else None
        if isinstance(x, gs.Constant):
            values[x.name] = ir.values(x) if x._values.nbytes <= 8 * _SMALL else None
        elif node is None or not is_standard(node) or any(True for _ in node.subgraphs()):
            values[x.name] = None
        elif node.op in ("Shape", "Size"):
            values[x.name] = _shape(op, node)
        else:
            waiting = [t for t in node.inputs if t.name and t.name not in values]
            if waiting:
                stack.extend(waiting)
                continue
            values[x.name] = _compute(node, op.graph.opset, values, x)
    return values[tensor.name]


def _shape(op: Emitter, node: gs.Node) -> np.ndarray | None:
    dims = op.dims(node.inputs[0])
    if dims is None:
        return None
    if node.op == "Shape":
        dims = dims[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
    known = [int(n) for n in dims if isinstance(n, (int, np.integer))]
    if len(known) < len(dims):
        return None
    return np.asarray(np.prod(known, dtype=np.int64) if node.op == "Size" else known, np.int64)


def _compute(
    node: gs.Node, opset: int, values: dict[str, np.ndarray | None], wanted: gs.Tensor
) -> np.ndarray | None:
    given = {t.name: values[t.name] for t in node.inputs if t.name}
    arrays = {name: x for name, x in given.items() if x is not None}
    if len(arrays) < len(given) or node.op.startswith("Random"):
        return None
    shell = gs.Graph([], [], [], opset=opset)
    inputs = [gs.Variable(name, x.dtype, list(x.shape)) for name, x in arrays.items()]
    operand = {t.name: t for t in inputs}
    outputs = [gs.Variable(t.name, t.dtype) if t.name else gs.Variable.empty() for t in node.outputs]
    operands = [operand[t.name] if t.name else gs.Variable.empty() for t in node.inputs]
    shell.nodes.append(gs.Node(node.op, "known", dict(node.attrs), operands, outputs))
    shell.inputs, shell.metadata = inputs, {}
    shell.outputs = [t for t in outputs if t.name == wanted.name]
    try:
        (found,) = evaluator(ir.to_proto(shell, ir_version=10)).run(None, arrays)
    except Exception:  # whatever the evaluator cannot do is not known beforehand
        return None
    result = np.asarray(found)
    return result if result.size <= _SMALL else None


# -- constants inside subgraphs --


def lift_inner_constants(graph: gs.Graph) -> None:
    """Constant nodes of subgraphs become constants, read like any other from outside (in place)."""
    names = Emitter(graph).names
    for node in graph.nodes:
        for inner in node.subgraphs(recursive=True):
            _lift(inner, names)


def _lift(inner: gs.Graph, names: set[str]) -> None:
    results = {id(t) for t in inner.outputs}
    kept = []
    for node in inner.nodes:
        held = _held(node)
        if held is None or id(node.outputs[0]) in results:
            kept.append(node)
            continue
        old = node.outputs[0]
        name, count = old.name, 0
        while name in names:
            count += 1
            name = f"{old.name}_{count}"
        names.add(name)
        constant = gs.Constant(name, held)
        for reader in list(old.outputs):
            for k, tensor in enumerate(reader.inputs):
                if tensor is old:
                    reader.inputs[k] = constant
    inner.nodes = kept


def _held(node: gs.Node) -> np.ndarray | None:
    if node.op != "Constant" or not is_standard(node):
        return None
    for key in ("value_float", "value_floats", "value_int", "value_ints"):
        if key in node.attrs:
            return np.asarray(node.attrs[key], np.float32 if "float" in key else np.int64)
    return ir.values(node.attrs["value"]) if "value" in node.attrs else None


# -- Scan as opset 8 had it --


_ASIDE = "zilc.scan"


def set_scans_aside(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Scan of opset 8 in a domain of its own: onnx's converter would change the shapes of the model's inputs for it."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for node in made.graph.node:
        if node.op_type == "Scan" and node.domain in ("", "ai.onnx"):
            node.domain = _ASIDE
    made.opset_import.append(onnx.helper.make_opsetid(_ASIDE, 1))
    return made


def unbatch_scans(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Scan of opset 8, which has a batch, as a Scan over the batch of today's Scan over time (in place).

    Before:  Scan-8 ("", states [B, ...], xs [B, T, ...])
    After:   Scan (states, xs) of  states, xs [T, ...] -> Scan -> states, ys [T, ...]
    """
    kept = [entry for entry in proto.opset_import if entry.domain != _ASIDE]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    for node in proto.graph.node:
        if node.domain != _ASIDE:
            continue
        node.domain = ""
        given = {a.name: a for a in node.attribute}
        body, scans = given["body"].g, given["num_scan_inputs"].i
        lengths, operands = node.input[0], list(node.input)[1:]
        count = len(operands) - scans
        inner_inputs = [_one_of_batch(info, k >= count, f"{node.name}.in.") for k, info in enumerate(body.input)]
        inner_outputs = [_one_of_batch(info, k >= count, f"{node.name}.out.") for k, info in enumerate(body.output)]
        inner = onnx.helper.make_node(
            "Scan", [i.name for i in inner_inputs], [o.name for o in inner_outputs], body=body, num_scan_inputs=scans
        )
        if "directions" in given:
            inner.attribute.append(onnx.helper.make_attribute("scan_input_directions", list(given["directions"].ints)))
        nodes = [inner]
        if lengths:
            ranks = [len(onnx_io.stated_shape(info.type.tensor_type) or ()) for info in body.output]
            nodes, length = _of_length(inner, count, ranks)
            inner_inputs.append(length)
            operands.append(lengths)
        outer = onnx.helper.make_graph(nodes, f"{node.name}.batch", inner_inputs, inner_outputs)
        del node.attribute[:], node.input[:]
        node.input.extend(operands)
        node.attribute.append(onnx.helper.make_attribute("body", outer))
        node.attribute.append(onnx.helper.make_attribute("num_scan_inputs", len(operands)))
    return proto


def _of_length(
    scan: onnx.NodeProto, count: int, ranks: Sequence[int]
) -> tuple[list[onnx.NodeProto], onnx.ValueInfoProto]:
    """A Scan over the first steps of what it is given, and what says how many; behind them its results are 0.

    As onnxruntime has it: the other direction begins at the last of these steps.

    Args:
        scan: changed (in place).
        count: of its states.
        ranks: of what the body gives.
    """
    name = f"{scan.output[0]}.length"
    nodes: list[onnx.NodeProto] = []

    def made(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(onnx.helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def numbers(output: str, values: list[int]) -> str:
        return made("Constant", [], output, value=onnx.numpy_helper.from_array(np.asarray(values, np.int64)))

    zero, one = numbers(f"{name}.0", [0]), numbers(f"{name}.1", [1])
    steps = made("Reshape", [name, one], f"{name}.steps")
    whole = made("Shape", [scan.input[count]], f"{name}.shape")
    rest = made("Sub", [made("Gather", [whole, zero], f"{name}.most"), steps], f"{name}.rest")
    for k in range(count, len(scan.input)):
        scan.input[k] = made("Slice", [scan.input[k], zero, steps, zero], f"{scan.input[k]}.steps")
    nodes.append(scan)
    for k in range(count, len(scan.output)):
        result, scan.output[k] = scan.output[k], f"{scan.output[k]}.steps"
        before = numbers(f"{result}.before", [0] * (1 + ranks[k]))
        after = numbers(f"{result}.after", [0] * ranks[k])
        pads = made("Concat", [before, rest, after], f"{result}.pads", axis=0)
        made("Pad", [scan.output[k], pads], result)
    return nodes, onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [])


def _one_of_batch(info: onnx.ValueInfoProto, stacked: bool, prefix: str) -> onnx.ValueInfoProto:
    """What one entry of the batch holds: a state as the body has it, or that along time."""
    kind = info.type.tensor_type
    dims = onnx_io.stated_shape(kind) or []
    shape = [None, *dims] if stacked else dims
    return onnx.helper.make_tensor_value_info(f"{prefix}{info.name}", kind.elem_type, shape)
