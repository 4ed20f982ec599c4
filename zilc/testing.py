"""Checks for tests of rules and passes: every tolerance is the caller's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.reference
import onnx_graphsurgeon as gs

from zilc import dtypes, foreign, ir, onnx_io
from zilc.emit import Emitter
from zilc.lowerings import Lowerings
from zilc.vjp import inner, table


def op_model(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    attrs: Mapping[str, Any] | None = None,
    *,
    opset: int = 18,
    outputs: int = 1,
    symbolic: bool = False,
    constant: Sequence[int] = (),
    domain: str = "",
    executor: str = "reference",
) -> onnx.ModelProto:
    """A model of one operator.

    Args:
        inputs: one array an operand; None for an absent optional one.  An operand that a subgraph among ``attrs``
            reads by its name (``x0``, ``x1`` …) is captured, not listed.
        symbolic: every dimension of every graph input is symbolic.
        constant: operands that are initializers instead of graph inputs.
        domain: a custom operator's; its version is 1.
        executor: who tells the type of an output that inference leaves open.
    """
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    infos, initializers = [], []
    for i, x in enumerate(inputs):
        if x is None:
            continue
        if i in constant:
            initializers.append(onnx.numpy_helper.from_array(np.asarray(x), names[i]))
            continue
        kind = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
        shape: Sequence[int | str] = [f"d{i}_{k}" for k in range(x.ndim)] if symbolic else x.shape
        infos.append(onnx.helper.make_tensor_value_info(names[i], kind, shape))
    results = [f"y{k}" for k in range(outputs)]
    subgraphs = [value for value in (attrs or {}).values() if isinstance(value, onnx.GraphProto)]
    captured = {name for value in subgraphs for name in _read(value) if name}
    listed = [name for name in names if name not in captured]
    node = onnx.helper.make_node(op_type, listed, results, name="node", domain=domain, **(attrs or {}))
    empty = [onnx.helper.make_empty_tensor_value_info(name) for name in results]
    graph = onnx.helper.make_graph([node], "op", infos, empty, initializers)
    versions = [onnx.helper.make_opsetid("", opset), *([onnx.helper.make_opsetid(domain, 1)] if domain else [])]
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    foreign.add_types(inferred)
    if any(not y.type.tensor_type.HasField("shape") for y in inferred.graph.output):
        # A rank that is settled at run time: graph outputs must state it, so it is taken from a run.
        feeds = {f"x{i}": x for i, x in enumerate(inputs) if x is not None and i not in constant}
        for k, (y, value) in enumerate(zip(inferred.graph.output, run(inferred, feeds, executor), strict=True)):
            kind = y.type.tensor_type.elem_type or onnx.helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype)
            dims = [f"y{k}_{axis}" for axis in range(np.ndim(value))]
            y.CopyFrom(onnx.helper.make_tensor_value_info(y.name, kind, dims))
        del inferred.graph.value_info[:]
    onnx.checker.check_model(inferred, full_check=True)
    return inferred


def _read(graph: onnx.GraphProto) -> set[str]:
    """Names that a subgraph's nodes read, at any depth."""
    found = {name for node in graph.node for name in node.input} | {y.name for y in graph.output}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found |= _read(attribute.g)
    return found


def vjp_model(
    model: onnx.ModelProto, *, operands: Sequence[int] | None = None, target: str = "cpu"
) -> onnx.ModelProto:
    """Add the VJP of every differentiable operand of a one-operator model.

    The result takes cotangents ``g0``, ``g1`` … (one a floating output) and gives ``d0``, ``d2`` … (one an operand).
    """
    graph = ir.to_graph(model)
    graph.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    op = Emitter(graph, lowerings=Lowerings(target))
    node = graph.nodes[0]
    rule = table.lookup(node, graph.opset)
    assert rule is not None, f"{node.op} has no rule"
    table.ensure_outputs(op, node, rule)
    cotangents: list[gs.Tensor | None] = []
    for k, y in enumerate(list(graph.outputs)):
        if dtypes.is_float(y):
            g = gs.Variable(f"g{k}", dtype=y.dtype, shape=y.shape)
            graph.inputs.append(g)
            cotangents.append(g)
        else:
            cotangents.append(None)
    cotangents += [None] * (len(node.outputs) - len(cotangents))
    for place, x in enumerate(inner.operands(node)):
        if place >= len(node.inputs) and isinstance(x, gs.Constant):
            continue
        # With captured operands, which come last, places are not those of the inputs.
        index = int(x.name[1:]) if rule.whole is not None and x.name else place
        if operands is not None and index not in operands:
            continue
        if not inner.passes(node, place, graph.opset):
            continue
        d = table.vjp(op, node, place, cotangents)
        if d is None:
            continue
        out = gs.Variable(f"d{index}", dtype=x.dtype, shape=x.shape)
        graph.nodes.append(gs.Node("Identity", name=f"d{index}", inputs=[d], outputs=[out]))
        graph.outputs.append(out)
    made = ir.to_proto(graph, infer=True)
    onnx_io.check_full(made)
    return made


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], executor: str = "reference") -> list[np.ndarray]:
    """Outputs of a model in ONNX's reference evaluator, or in onnxruntime on CPU."""
    if executor == "reference":
        from zilc.reference import evaluator

        return list(evaluator(model).run(None, dict(feeds)))
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {k: np.asarray(v) for k, v in feeds.items()}))


def check_vjp(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    attrs: Mapping[str, Any] | None = None,
    *,
    opset: int = 18,
    outputs: int = 1,
    operands: Sequence[int] | None = None,
    symbolic: bool = False,
    constant: Sequence[int] = (),
    rtol: float = 1e-6,
    step: float = 1e-5,
    directions: int = 3,
    executor: str = "reference",
    seed: int = 0,
    domain: str = "",
) -> None:
    """Hold a rule against central differences, by inner products along random directions.

    For each differentiable operand x and random v, g: <vjp(g), v> = <g, (f(x + hv) - f(x - hv)) / 2h>.

    Args:
        op_type: the operator; ``domain`` where it is a custom one.
        inputs: one array an operand, float64 where an executor has float64 kernels; None for an absent one.
        rtol: allowed difference relative to |vjp(g)| |v|.
        step: of the differences: 1e-5 in float64; in float32 about 1e-2, with an rtol of 1e-2.
        operands: restrict to these operands; each must have a formula.
        executor: "reference" or "onnxruntime".

    Raises:
        AssertionError: an operand's VJP is off, has the wrong shape, or nothing was checked.
    """
    rng = np.random.default_rng(seed)
    forward = op_model(
        op_type, inputs, attrs, opset=opset, outputs=outputs, symbolic=symbolic, constant=constant, domain=domain,
        executor=executor,
    )  # fmt: skip
    backward = vjp_model(forward, operands=operands)
    feeds = {f"x{i}": x for i, x in enumerate(inputs) if x is not None and i not in constant}
    y = run(forward, feeds, executor)
    cotangents = {
        f"g{k}": np.asarray(rng.standard_normal(np.shape(v)), np.asarray(v).dtype)
        for k, v in enumerate(y)
        if np.asarray(v).dtype.kind == "f"
    }
    names = [o.name for o in backward.graph.output]
    got = dict(zip(names, run(backward, {**feeds, **cotangents}, executor), strict=True))
    checked = 0
    for name, d in got.items():
        if not name.startswith("d"):
            continue
        index = int(name[1:])
        x = inputs[index]
        assert x is not None
        assert d.shape == x.shape, f"{op_type} operand {index}: shape {d.shape}, expected {x.shape}"
        for _ in range(directions):
            v = np.asarray(rng.standard_normal(x.shape), x.dtype)
            if index in constant:
                raise AssertionError("a constant operand cannot be perturbed")
            plus = run(forward, {**feeds, f"x{index}": x + step * v}, executor)
            minus = run(forward, {**feeds, f"x{index}": x - step * v}, executor)
            numeric = sum(
                float(np.sum(cotangents[f"g{k}"] * (p - m))) / (2 * step)
                for k, (p, m) in enumerate(zip(plus, minus, strict=True))
                if f"g{k}" in cotangents
            )
            exact = float(np.sum(d * v))
            scale = float(np.linalg.norm(d) * np.linalg.norm(v)) + 1e-12
            assert abs(exact - numeric) <= rtol * max(scale, abs(numeric)), (
                f"{op_type} operand {index}: vjp {exact!r}, central difference {numeric!r} (scale {scale:.3g})"
            )
        checked += 1
    if operands is not None:
        assert checked == len(operands), f"{op_type}: checked {checked} operands, expected {list(operands)}"
    assert checked, f"{op_type}: no operand was checked"
