"""A model in another opset: onnx's version converter, and what it leaves undone or gets wrong."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import onnx
import onnx.defs
import onnx.helper
import onnx.inliner
import onnx.numpy_helper
import onnx.shape_inference
import onnx.version_converter

from zilc.errors import ModelError, OptionError, describe_vertex
from zilc.onnx_io import MAX_OPSET, MIN_OPSET
from zilc.passes.inline import set_scans_aside, unbatch_scans

#: Recurrences that ONNX says by a loop: what is in the loop are the vertices.
_BY_BODY = frozenset({("", "LinearAttention")})
#: From this opset on BatchNormalization says by an attribute which form it is in.
_TRAINING_MODE = 14
#: From this opset on Resize says where output pixels lie; from the next one on, one of the ways is gone.
_COORDINATES, _NN_MODE_GONE = 11, 13


def settle_opset(proto: onnx.ModelProto, wanted: int | None, where: str) -> onnx.ModelProto:
    """The model in opset ``wanted``, by default its own within [18, 26].

    An operator that did not change between the two versions is kept as it is; onnx's version converter rewrites
    the others.
    """
    current = opset_of(proto)
    newest = onnx.defs.onnx_opset_version()
    if wanted is not None and not MIN_OPSET <= wanted <= newest:
        raise OptionError(
            f"opset {wanted} is out of range", where="--opset", hint=f"Choose one from {MIN_OPSET} to {newest}."
        )
    target = wanted or min(max(current, MIN_OPSET), MAX_OPSET)
    if current > newest:
        raise ModelError(
            f"opset {current} is newer than the installed onnx package knows ({newest})",
            where=where,
            hint="Upgrade onnx, or export with a lower opset.",
        )
    proto = _inline_newer(proto, target)
    if current < _TRAINING_MODE:
        proto = _mark_training_form(proto, where)
    if current == target:
        return proto
    if current == 8 and any(node.op_type == "Scan" and not node.domain for node in proto.graph.node):
        return unbatch_scans(settle_opset(set_scans_aside(proto), target, where))
    changed = _changed_operators(proto.graph.node, current, target)
    if not changed:
        return _relabel(proto, target)
    try:
        if current < _NN_MODE_GONE and changed & {"Upsample", "Resize"}:
            if current < _COORDINATES - 1:
                proto = _convert(proto, _COORDINATES - 1)  # Upsample is a Resize there
            proto = _name_coordinates(proto, where)
        try:
            return _type_bounds(_convert(proto, target), proto)
        except Exception:
            # A type that the older operator lacks may be one that its function body's operators have.
            spelled = _inline_changed(proto, changed) if target < current else None
            if spelled is None:
                raise
            return settle_opset(spelled, target, where)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"opset {current} cannot be converted to {target}: {first_line(error)} "
            f"(operators that changed: {', '.join(sorted(changed))})",
            where=where,
            hint=f"Export the model with opset {MIN_OPSET} to {MAX_OPSET}.",
        ) from error


def _mark_training_form(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """Before opset 14 a BatchNormalization is in training form if it has more outputs than Y; then by an attribute.

    onnx's converter takes neither the two outputs that went (saved statistics), nor notes the form: the outputs are
    dropped here, and the attribute is written, which older operators ignore.

    Raises:
        ModelError: something reads the outputs that went.
    """
    old = [n for n in _all_nodes(proto.graph) if n.op_type == "BatchNormalization" and len(n.output) > 1]
    if not old:
        return proto
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    read = {name for node in _all_nodes(made.graph) for name in node.input} | {o.name for o in made.graph.output}
    for node in _all_nodes(made.graph):
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx") or len(node.output) < 2:
            continue
        gone = [name for name in node.output[3:] if name in read]
        if gone:
            raise ModelError(
                f"its saved statistics '{gone[0]}' are read, which no opset from {_TRAINING_MODE} on has",
                where=describe_vertex(node.name or node.output[0], node.op_type),
                hint="Export the model in inference form.",
            )
        del node.output[3:]
        for k, kind in ((1, "mean"), (2, "var")):
            node.output[k] = node.output[k] or f"{node.output[0]}.running_{kind}.out"  # no longer optional
        node.attribute.append(onnx.helper.make_attribute("training_mode", 1))
    return made


def _name_coordinates(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """Resize with what it meant written out, where onnx's converter leaves it to newer defaults (opsets 10 to 12).

    In opset 10 an output pixel k lies at k / scale; the nearest pixel is the one below, and above where the axis
    shrinks: then in two steps, as a Resize of today rounds all axes one way.  Opsets 11 and 12 know a way of their own,
    (k + 1/2) / scale, which is half_pixel's moved by 1/2: the nearest pixel below there is the nearest one here.

    Raises:
        ModelError: opset 11's own way with what no newer one gives.
    """
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    stack = [made.graph]
    while stack:
        graph = stack.pop()
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            stack.extend(a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
            if node.op_type != "Resize" or node.domain not in ("", "ai.onnx"):
                nodes.append(node)
            elif opset_of(proto) < _COORDINATES:
                nodes += _asymmetric(node, graph)
            else:
                _rename_nn_mode(node, where)
                nodes.append(node)
        if len(nodes) != len(graph.node):
            copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
            del graph.node[:]
            graph.node.extend(copies)
    return made


def _asymmetric(node: onnx.NodeProto, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """A Resize of opset 10, its coordinates named, as one node or as two (with what they need)."""
    make = onnx.helper.make_node

    def named(one: onnx.NodeProto, near: str) -> onnx.NodeProto:
        one.attribute.append(onnx.helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
        one.attribute.append(onnx.helper.make_attribute("nearest_mode", near))
        return one

    held = [t for t in graph.initializer if t.name == node.input[1]]
    held += [
        a.t for n in graph.node if n.op_type == "Constant" and n.output[0] == node.input[1]
        for a in n.attribute if a.name == "value"
    ]  # fmt: skip
    scales = onnx.numpy_helper.to_array(held[0]) if held else None
    linear = any(a.name == "mode" and a.s == b"linear" for a in node.attribute)
    if linear or (scales is not None and (scales >= 1).all()):
        return [named(node, "floor")]
    if scales is not None and (scales <= 1).all():
        return [named(node, "ceil")]
    one, up, down, grown = (f"{node.output[0]}.{part}" for part in ("one", "up", "down", "grown"))
    unit = onnx.helper.make_tensor(f"{one}.value", onnx.TensorProto.FLOAT, [1], [1.0])
    return [
        make("Constant", [], [one], value=unit),
        make("Max", [node.input[1], one], [up]),
        make("Min", [node.input[1], one], [down]),
        named(make("Resize", [node.input[0], up], [grown], name=f"{node.name}.up", mode="nearest"), "floor"),
        named(make("Resize", [grown, down], [node.output[0]], name=node.name, mode="nearest"), "ceil"),
    ]


def _rename_nn_mode(node: onnx.NodeProto, where: str) -> None:
    attrs = {a.name: a for a in node.attribute}
    way = attrs.get("coordinate_transformation_mode")
    if way is None or way.s != b"tf_half_pixel_for_nn":
        return
    near = attrs["nearest_mode"].s if "nearest_mode" in attrs else b"round_prefer_floor"
    moved = {b"floor": b"round_prefer_ceil", b"round_prefer_floor": b"ceil"}.get(near)
    if moved is None or ("mode" in attrs and attrs["mode"].s != b"nearest"):
        raise ModelError(
            f"coordinate_transformation_mode tf_half_pixel_for_nn, which no opset from {_NN_MODE_GONE} on has",
            where=describe_vertex(node.name or node.output[0], node.op_type),
            hint="Export the model with opset 13 or later.",
        )
    way.s = b"half_pixel"
    for a in [a for a in node.attribute if a.name == "nearest_mode"]:
        node.attribute.remove(a)
    node.attribute.append(onnx.helper.make_attribute("nearest_mode", moved))


#: Operators whose scalar attributes became operands of the data's type, and the first opset that has them so.
_BOUNDED = {"Clip": 11, "Pad": 11}


def _type_bounds(converted: onnx.ModelProto, proto: onnx.ModelProto) -> onnx.ModelProto:
    """Bounds of Clip and the value of Pad in their data's type (in place): onnx's converter makes them float32."""
    if opset_of(proto) >= max(_BOUNDED.values()):
        return converted
    wanted = [n for n in _all_nodes(converted.graph) if n.op_type in _BOUNDED and len(n.input) > 1]
    if not wanted:
        return converted
    inferred = onnx.shape_inference.infer_shapes(proto)
    kinds: dict[str, int] = {}
    stack = [inferred.graph]
    while stack:
        graph = stack.pop()
        for info in (*graph.input, *graph.value_info, *graph.output):
            kinds[info.name] = info.type.tensor_type.elem_type
        kinds.update((t.name, t.data_type) for t in graph.initializer)
        stack.extend(a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)
    constants = {n.output[0]: n for n in _all_nodes(converted.graph) if n.op_type == "Constant"}
    for node in wanted:
        kind = kinds.get(node.input[0], 0)
        for name in node.input[1 if node.op_type == "Clip" else 2 :]:
            for a in constants[name].attribute if name in constants else ():
                if kind and a.name == "value" and a.t.data_type == onnx.TensorProto.FLOAT != kind:
                    held = onnx.numpy_helper.to_array(a.t).astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
                    a.t.CopyFrom(onnx.numpy_helper.from_array(held, a.t.name))
    return converted


def _inline_changed(proto: onnx.ModelProto, changed: Collection[str]) -> onnx.ModelProto | None:
    """The model with function bodies in place of the operators that changed; None where none of them has one."""
    schemas: dict[str, Any] = {op: onnx.defs.get_schema(op, opset_of(proto), "") for op in changed}
    bodies = [("", op) for op, s in sorted(schemas.items()) if s.has_function or s.has_context_dependent_function]
    if not bodies:
        return None
    made = onnx.inliner.inline_selected_functions(proto, bodies, exclude=False, inline_schema_functions=True)
    return None if [n.op_type for n in made.graph.node] == [n.op_type for n in proto.graph.node] else made


def _inline_newer(proto: onnx.ModelProto, target: int) -> onnx.ModelProto:
    """Operators that opset ``target`` lacks, those of ONNX's preview domain, and ``_BY_BODY`` become their bodies.

    No runtime of the day has kernels for them; one without a function body stays, and is reported later.
    """
    found: set[tuple[str, str]] = set()
    for node in _all_nodes(proto.graph):
        if node.domain == "ai.onnx.preview" or (node.domain, node.op_type) in _BY_BODY:
            found.add((node.domain, node.op_type))
        elif node.domain in ("", "ai.onnx") and not _exists(node.op_type, target) and onnx.defs.has(node.op_type):
            found.add(("", node.op_type))
    if not found:
        return proto
    try:
        return onnx.inliner.inline_selected_functions(proto, sorted(found), exclude=False, inline_schema_functions=True)
    except RuntimeError:  # it wants a type for each operand, absent ones too
        return onnx.inliner.inline_local_functions(_with_functions(proto, found))


def _with_functions(proto: onnx.ModelProto, operators: Collection[tuple[str, str]]) -> onnx.ModelProto:
    """A local function for each node of these operators: the body that its schema builds for the node's types."""
    made = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    kinds = {i.name: i.type for i in (*made.graph.input, *made.graph.value_info, *made.graph.output)}
    for tensor in made.graph.initializer:
        kinds[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
    version = opset_of(proto)
    for count, node in enumerate(made.graph.node):
        if (node.domain, node.op_type) not in operators:
            continue
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        types = [kinds.get(name, onnx.TypeProto()).SerializeToString() for name in node.input]
        versions = schema.context_dependent_function_opset_versions  # type: ignore[attr-defined]
        since = [v for v in versions if v <= version]
        if not since:
            continue
        body_of = schema.get_context_dependent_function_with_opset_version  # type: ignore[attr-defined]
        body = body_of(max(since), node.SerializeToString(), types)
        function = onnx.FunctionProto.FromString(body)
        function.domain, function.name = "zilc.body", f"{node.op_type}_{count}"
        node.domain, node.op_type = function.domain, function.name
        made.functions.append(function)
    made.opset_import.append(onnx.helper.make_opsetid("zilc.body", 1))
    return made


def _exists(op: str, opset: int) -> bool:
    try:
        onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return False
    return True


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _all_nodes(attribute.g)


def _changed_operators(nodes: Sequence[onnx.NodeProto], current: int, target: int) -> set[str]:
    changed: set[str] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                stack.extend(attribute.g.node)
        if node.domain not in ("", "ai.onnx"):
            continue
        try:
            old = onnx.defs.get_schema(node.op_type, current, "").since_version
            new = onnx.defs.get_schema(node.op_type, target, "").since_version
        except onnx.defs.SchemaError:
            changed.add(node.op_type)
            continue
        if old != new:
            changed.add(node.op_type)
    return changed


def _relabel(proto: onnx.ModelProto, target: int) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    found = False
    for entry in made.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version, found = target, True
    if not found:
        made.opset_import.append(onnx.helper.make_opsetid("", target))
    made.ir_version = max(made.ir_version, 8)
    return made


def _convert(proto: onnx.ModelProto, target: int) -> onnx.ModelProto:
    """onnx's converter; large initializers were set aside before (:func:`zilc.onnx_io.set_aside`)."""
    current = onnx.ModelProto()
    current.CopyFrom(proto)
    current.ir_version = max(proto.ir_version, 8)
    converted = onnx.version_converter.convert_version(current, target)
    # Old IR versions want initializers among the inputs, and the converter keeps what it finds there.
    held = {t.name for t in converted.graph.initializer}
    real = [i for i in converted.graph.input if i.name not in held]
    del converted.graph.input[:]
    converted.graph.input.extend(real)
    converted.ir_version = max(proto.ir_version, 8)
    for attribute in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(converted, attribute, getattr(proto, attribute))
    if not converted.metadata_props:
        converted.metadata_props.extend(proto.metadata_props)
    return converted


def opset_of(proto: onnx.ModelProto) -> int:
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            return int(entry.version)
    return MIN_OPSET


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
