"""From a model as an exporter wrote it to the graph that levels are found in.

The order is that of :func:`prepare`: functions inlined, opset settled, dimensions fixed, shapes inferred, constants
lifted, control flow of known course written out, sequences taken apart, recurrences unrolled, Identity nodes removed,
ties made; then the trained outputs are chosen and given a terminal vertex where they need one.  The caller's
ModelProto is never changed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.inliner
import onnx.shape_inference
import onnx_graphsurgeon as gs

from zilc import dtypes, foreign, ir, onnx_io
from zilc.errors import ModelError, OptionError
from zilc.graph import INSERTED, Dataflow, Rebuild, fresh_name, is_standard
from zilc.onnx_io import Source
from zilc.passes.identities import flow_of
from zilc.passes.inline import inline_control_flow, lift_inner_constants
from zilc.passes.opset import first_line, opset_of, settle_opset
from zilc.passes.ranks import scalar_bounds, settle_ranks
from zilc.passes.sequences import resolve_sequences
from zilc.passes.shape_values import infer_through_values
from zilc.passes.unroll import unroll


@dataclass
class Prepared:
    """A graph ready for levels, and what was learned on the way.

    Attributes:
        graph: constants lifted, the file's Identity nodes removed.
        source: the model as it came.
        ties: names made one leaf: {B: (A, transposed)}.
        notes: facts for the user, one line each.
    """

    graph: gs.Graph
    source: Source
    ties: dict[str, tuple[str, bool]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def prepare(
    source: Source,
    *,
    opset: int | None = None,
    dims: Mapping[str, int] | None = None,
    ties: Sequence[tuple[str, str]] = (),
    keep: Collection[str] = (),
) -> Prepared:
    """Run the steps in order.

    Args:
        keep: tensors that will be asked for by name, though they may be outputs of Identity nodes.

    Raises:
        ModelError: shapes contradict each other, or the opset cannot be settled.
        OptionError: a dimension or a tie does not fit.
    """
    proto, aside = onnx_io.set_aside(source.proto)
    proto = inline_functions(Source(proto, source.path, source.base_dir))
    proto = settle_opset(proto, opset, source.name)
    proto = fix_dims(proto, dims or {}, source.name)
    proto = spell_out_defaults(proto)
    notes: list[str] = []
    proto = infer_shapes(proto, source.name, notes)
    graph = ir.to_graph(proto, source.base_dir, aside)
    graph.opset = opset_of(proto)
    lift_inner_constants(graph)
    graph = lift_constants(graph)
    graph = name_casts(graph)
    while True:
        graph = resolve_sequences(graph)  # a loop over a sequence then has a known trip count
        said: list[str] = []
        straight = inline_control_flow(graph, said)
        notes += [line for line in said if line not in notes]
        if straight is graph:
            break
        graph = reinfer(straight)  # branches and bodies may hold sequences, whose length decides about others
    settled = settle_ranks(scalar_bounds(graph))
    graph = graph if settled is graph else reinfer(settled)
    graph = unroll(graph, notes)
    graph = remove_identities(graph, keep=keep)
    prepared = Prepared(graph, source, notes=notes)
    if ties:
        prepared.graph = tie_leaves(graph, ties, prepared.ties)
    return prepared


def inline_functions(source: Source) -> onnx.ModelProto:
    """Local functions become the nodes of their bodies."""
    proto = source.proto
    if not proto.functions:
        return proto
    try:
        return onnx.inliner.inline_local_functions(proto)
    except RuntimeError as error:
        raise ModelError(f"a local function cannot be inlined ({error})", where=source.name) from error


def spell_out_defaults(proto: onnx.ModelProto) -> onnx.ModelProto:
    """MeanVarianceNormalization with its axes: onnx's inference looks into its body, and misses defaults there."""
    if not any(n.op_type == "MeanVarianceNormalization" and not n.attribute for n in proto.graph.node):
        return proto
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for node in made.graph.node:
        if node.op_type == "MeanVarianceNormalization" and not node.attribute:
            node.attribute.append(onnx.helper.make_attribute("axes", [0, 2, 3]))
    return made


# --- dimensions and shapes ------------------------------------------------------------------------------------


def fix_dims(proto: onnx.ModelProto, dims: Mapping[str, int], where: str) -> onnx.ModelProto:
    """Symbolic dimensions replaced by numbers."""
    if not dims:
        return proto
    known = {
        d.dim_param for i in proto.graph.input for d in i.type.tensor_type.shape.dim if d.HasField("dim_param")
    }
    for name, size in dims.items():
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise OptionError(
                f"no symbolic dimension '{name}' among the inputs",
                where="--dim",
                hint=f"The model's symbolic dimensions: {listed}.",
            )
        if size < 0:
            raise OptionError(f"dimension '{name}' cannot be {size}", where="--dim")
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for info in (*made.graph.input, *made.graph.output, *made.graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.HasField("dim_param") and dim.dim_param in dims:
                dim.dim_value = dims[dim.dim_param]
    del made.graph.value_info[:]
    return made


def infer_shapes(proto: onnx.ModelProto, where: str, notes: list[str] | None = None) -> onnx.ModelProto:
    """onnx's shape inference with data propagation; what a file says wrongly of inner tensors is inferred anew.

    Args:
        notes: gets a line for each tensor of which the file says something else than its operators.

    What operators of custom domains make is told by their registered inference (:mod:`zilc.rules`), one row of them
    after the other, since what follows each hangs on it.
    """
    made = _infer(proto, where, notes)
    while foreign.add_types(made):
        made = _infer(made, where)
    return infer_through_values(made)


def _infer(proto: onnx.ModelProto, where: str, notes: list[str] | None = None) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        pass
    try:
        return _infer_anew(proto, [] if notes is None else notes)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"shapes or types contradict each other: {first_line(error)}",
            where=where,
            hint="Export the model again.",
        ) from error


def _infer_anew(proto: onnx.ModelProto, notes: list[str]) -> onnx.ModelProto:
    """Shapes by the operators; the file is believed only of tensors that these leave open, the first ones first."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    declared = {i.name: i for i in proto.graph.value_info if i.type.tensor_type.HasField("shape")}
    del made.graph.value_info[:]
    while True:
        found = onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=False, data_prop=True)
        held = {i.name: i for i in (*found.graph.input, *found.graph.value_info, *found.graph.output)}
        shaped = {n for n, i in held.items() if i.type.tensor_type.HasField("shape")}
        shaped |= {t.name for t in found.graph.initializer} | {""}
        open_nodes = [n for n in found.graph.node if not shaped.issuperset(n.output)]
        unsure = {name for n in open_nodes for name in n.output}
        known = {i.name for i in made.graph.value_info}
        believed = [
            declared[name]
            for n in open_nodes if not unsure.intersection(n.input)
            for name in n.output if name in declared and name not in shaped | known
        ]  # fmt: skip
        if not believed:
            break
        made.graph.value_info.extend(believed)
    for name, info in declared.items():
        ours, theirs = (_shape_of(i) for i in (held.get(name, info), info))
        if len(ours) != len(theirs) or any(
            a != b and isinstance(a, int) and isinstance(b, int) for a, b in zip(ours, theirs, strict=True)
        ):
            said, made_of = _listed(theirs), _listed(ours)
            notes.append(f"tensor '{name}': the file says its shape is {said}, its operators {made_of}")
    return found


def _shape_of(info: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in info.type.tensor_type.shape.dim]


def _listed(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def reinfer(graph: gs.Graph) -> gs.Graph:
    """Shapes of inner tensors inferred anew (in place): what a branch or a loop left open may follow now."""
    outputs = {t.name for t in graph.outputs}
    made = [t for node in graph.nodes for t in node.outputs if t.name and t.name not in outputs]
    inner = [t for t in made if getattr(t, "type", "tensor_type") in ("tensor_type", None)]
    before = {t.name: t.shape for t in inner}
    for tensor in inner:
        tensor.shape = None
    found = {}
    try:
        proto = onnx.shape_inference.infer_shapes(ir.to_proto(graph), data_prop=True)
        found = {i.name: i.type.tensor_type for i in proto.graph.value_info if i.type.HasField("tensor_type")}
    except Exception:  # GraphSurgeon cannot write every graph out, nor onnx infer it: what was known stays
        found = {}
    for tensor in inner:
        kind = found.get(tensor.name)
        shape = None if kind is None else onnx_io.stated_shape(kind)
        tensor.shape = before[tensor.name] if shape is None else shape
    return graph


# --- constants, ties, identities ------------------------------------------------------------------------------


def lift_constants(graph: gs.Graph) -> gs.Graph:
    """Constant nodes, and ConstantOfShape of a known shape, become initializers of the same name.

    Before:  shape -> ConstantOfShape -> w -> Conv
    After:   w -> Conv
    """
    if not any(node.op in ("Constant", "ConstantOfShape") or ir.subgraphs(node) for node in graph.nodes):
        return graph
    rebuild = Rebuild(graph)
    produced_outputs = {t.name for t in graph.outputs}
    for node in graph.nodes:
        held = _constant_values(node)
        name = node.outputs[0].name if node.outputs else ""
        if held is None or not name:
            rebuild.add(node)
            continue
        if name in produced_outputs:
            # A graph output must be made by a node in most runtimes; it stays one.
            rebuild.add(node)
            continue
        rebuild.tensors[name] = gs.Constant(name, held)
    return rebuild.finish()


def _constant_values(node: gs.Node) -> np.ndarray | ir.FilledValues | None:
    if not is_standard(node):
        return None
    if node.op == "Constant":
        attrs = node.attrs
        if "value" in attrs:
            return attrs["value"]._values
        for key, dtype in (
            ("value_float", np.float32), ("value_floats", np.float32),
            ("value_int", np.int64), ("value_ints", np.int64),
        ):  # fmt: skip
            if key in attrs:
                return np.asarray(attrs[key], dtype)
        return None
    if node.op == "ConstantOfShape" and isinstance(node.inputs[0], gs.Constant):
        shape = ir.values(node.inputs[0])
        value = node.attrs.get("value")
        fill = ir.values(value).reshape(-1)[0] if value is not None else np.float32(0)
        return ir.FilledValues([int(n) for n in shape], fill)
    return None


def name_casts(graph: gs.Graph) -> gs.Graph:
    """CastLike becomes Cast where the dtype is known: onnxruntime folds constants through Cast alone, and says so.

    Before:  x, like -> CastLike -> y
    After:   x -> Cast -> y
    """
    if not any(node.op == "CastLike" for node in graph.nodes):
        return graph
    rebuild = Rebuild(graph)
    for node in graph.nodes:
        dtype = node.inputs[1].dtype if node.op == "CastLike" and is_standard(node) else None
        if dtype is None:
            rebuild.add(node)
            continue
        made = rebuild.add(node, [rebuild.tensor(node.inputs[0])])
        made.op = "Cast"
        made.attrs["to"] = dtypes.onnx_dtype(dtype)
    return rebuild.finish()


def remove_identities(graph: gs.Graph, *, keep: Collection[str] = ()) -> gs.Graph:
    """Identity nodes are taken out; names of graph inputs, outputs and initializers stay, and those in ``keep``.

    Before:  a -> Identity -> b -> Relu
    After:   a -> Relu

    Where both ends of a node must keep their names, it stays, and nothing reads it.
    """
    inputs = {t.name for t in graph.inputs}
    outputs = {t.name for t in graph.outputs} | set(keep)
    target: dict[str, str] = {}  # a tensor that vanishes -> the tensor in its place
    renamed: dict[str, str] = {}  # a node's output -> the graph output it now is

    def resolve(name: str) -> str:
        while name in target:
            name = target[name]
        return name

    dropped: set[int] = set()
    for node in graph.nodes:
        if node.op != "Identity" or not is_standard(node):
            continue
        if getattr(node.inputs[0], "type", "tensor_type") != "tensor_type":
            continue
        source, made = resolve(node.inputs[0].name), node.outputs[0].name
        if made not in outputs:
            target[made] = source
            dropped.add(id(node))
        elif (
            source not in inputs and source not in outputs and source not in renamed
            and not isinstance(node.inputs[0], gs.Constant) and _made_outside_constants(graph, source)
        ):  # fmt: skip
            # The producer makes the graph output itself.
            renamed[source] = made
            target[made] = source
            dropped.add(id(node))
        else:
            target[made] = source
    if not target:
        return graph
    everything = ir.tensors(graph)
    rebuild = Rebuild(graph)
    for old, new in renamed.items():
        rebuild.tensors[old] = gs.Variable(new, everything[old].dtype, everything[old].shape)
        rebuild.tensors[new] = rebuild.tensors[old]

    def stand_in(tensor: gs.Tensor) -> gs.Tensor:
        name = resolve(tensor.name)
        return rebuild.tensor(everything[name]) if name in everything else rebuild.tensor(tensor)

    for node in graph.nodes:
        if id(node) in dropped:
            continue
        outside = {name: stand_in(everything[name]) for name in target if name in everything} if node.attrs else {}
        rebuild.add(node, [stand_in(t) for t in node.inputs], outside)
    return rebuild.finish()


def _made_outside_constants(graph: gs.Graph, name: str) -> bool:
    return any(t.name == name for node in graph.nodes for t in node.outputs)


def tie_leaves(graph: gs.Graph, ties: Sequence[tuple[str, str]], made: dict[str, tuple[str, bool]]) -> gs.Graph:
    """B is read as A, or as the transpose of A (two-dimensional, as a decoder's head ties to its embedding)."""
    constants = {t.name: t for t in ir.tensors(graph).values() if isinstance(t, gs.Constant)}
    for a, b in ties:
        for name in (a, b):
            if name not in constants:
                raise OptionError(f"no parameter '{name}'", where="--tie", hint="'zilc levelize' lists the parameters.")
        if a == b or b in made or a in made:
            raise OptionError(f"'{a}={b}' repeats or chains a tie", where="--tie", hint="Tie each to one common A.")
        x, y = ir.values(constants[a]), ir.values(constants[b])
        if x.shape == y.shape and np.array_equal(x, y):
            made[b] = (a, False)
        elif x.ndim == 2 and x.T.shape == y.shape and np.array_equal(x.T, y):
            made[b] = (a, True)
        else:
            raise OptionError(
                f"'{a}' {list(x.shape)} and '{b}' {list(y.shape)} hold different values",
                where="--tie",
                hint="Only equal tensors, or a matrix and its transpose, can become one leaf.",
            )
    rebuild = Rebuild(graph)
    for b, (a, transposed) in made.items():
        source = rebuild.tensor(constants[a])
        if transposed:
            out = gs.Variable(f"{b}.tied", constants[b].dtype, list(constants[b].shape))
            node = gs.Node("Transpose", name=f"{b}.tied", attrs={"perm": [1, 0]}, inputs=[source], outputs=[out])
            node.metadata, node.doc_string = {}, ""
            rebuild.nodes.append(node)
            rebuild.tensors[b] = out
        else:
            rebuild.tensors[b] = source
    for node in graph.nodes:
        rebuild.add(node)
    return rebuild.finish()


# --- trained outputs ------------------------------------------------------------------------------------------


def choose_outputs(graph: gs.Graph, wanted: Sequence[str] | None, where: str) -> list[str]:
    """The trained outputs: those asked for, or the only floating output.

    Raises:
        OptionError: a name is not a floating tensor, or several outputs leave the choice open.
        ModelError: the model has no floating output.
    """
    everything = ir.tensors(graph)
    floating = [t.name for t in graph.outputs if dtypes.is_float(t)]
    if wanted:
        for name in wanted:
            if name not in everything:
                raise OptionError(
                    f"no tensor '{name}' in the model",
                    where="--output",
                    hint=f"Its outputs: {', '.join(t.name for t in graph.outputs)}.",
                )
            if not dtypes.is_float(everything[name]):
                raise OptionError(
                    f"'{name}' holds {_kind(everything[name])}, expected floating-point numbers", where="--output"
                )
        return list(dict.fromkeys(wanted))
    if len(floating) == 1:
        return floating
    if not floating:
        kinds = ", ".join(f"{t.name} ({_kind(t)})" for t in graph.outputs)
        raise ModelError(
            "no floating-point output to train",
            where=where,
            hint=f"Its outputs: {kinds}. --output may name an inner tensor.",
        )
    raise OptionError(
        f"the model has {len(floating)} floating-point outputs: {', '.join(floating)}",
        where="--output",
        hint="Choose one or more with --output NAME.",
    )


def _kind(tensor: gs.Tensor) -> str:
    dtype = dtypes.np_dtype(tensor.dtype)
    return dtype.name if dtype is not None else "an unknown type"


def append_terminals(graph: gs.Graph, outputs: Sequence[str]) -> tuple[Dataflow, list[str]]:
    """A terminal identity vertex for each trained output that is a leaf or that other active vertices consume.

    Returns the active part of the new graph, and the names of the clamped tensors, one an output.

    Before:  a -> Relu -> h -> Gemm -> y,   h and y trained
    After:   a -> Relu -> h.value -> Gemm -> y,  h.value -> Identity -> h

    A leaf keeps its name (it is part of the interface), and the identity's output is called NAME.clamped.
    """
    flow = flow_of(graph, outputs)
    made = {t.name for node in graph.nodes for t in node.outputs if t.name}
    busy = {e.source for e in flow.edges if e.source is not None}
    needy = [
        name
        for name in outputs
        if name not in made or name not in flow.producer or flow.producer[name] in busy
    ]
    # An Identity node of the file that had to stay is a terminal already; nothing reads it.
    kept = {
        name: flow.vertices[flow.producer[name]]
        for name in outputs
        if name not in needy and flow.vertices[flow.producer[name]].op == "Identity"
    }
    if not needy and not kept:
        return flow, list(outputs)
    everything = flow.tensors
    names = set(everything)
    rebuild = Rebuild(graph)
    clamped = {name: name for name in outputs}
    late: list[gs.Node] = []
    for name in needy:
        if name in made:
            value = fresh_name(f"{name}.value", names)
            rebuild.tensors[name] = gs.Variable(value, everything[name].dtype, everything[name].shape)
    for name in (*needy, *kept):
        tensor = everything[name]
        if name in kept:
            source, out = rebuild.tensor(kept[name].inputs[0]), rebuild.tensor(tensor)
        elif name in made:
            source, out = rebuild.tensors[name], gs.Variable(name, tensor.dtype, tensor.shape)
        else:
            source = rebuild.tensor(tensor)
            out = gs.Variable(fresh_name(f"{name}.clamped", names), tensor.dtype, list(tensor.shape or []))
        node = gs.Node("Identity", name=fresh_name(f"{name}.terminal", names), inputs=[source], outputs=[out])
        node.metadata, node.doc_string = {}, ""
        setattr(node, INSERTED, True)
        late.append(node)
        clamped[name] = out.name
    for node in graph.nodes:
        if not any(node is terminal for terminal in kept.values()):
            rebuild.add(node)
    terminals = {n.outputs[0].name: n.outputs[0] for n in late}
    rebuild.nodes.extend(late)
    result = rebuild.finish()
    result.outputs = [terminals.get(t.name, rebuild.tensor(t)) for t in graph.outputs]
    ends = [clamped[name] for name in outputs]
    return flow_of(result, ends), ends
