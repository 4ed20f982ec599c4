"""Runs the rules of one operator: cotangents by operand, and float32 on onnxruntime beside float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper

import zilc.vjp  # noqa: F401  (fills the table)
from tests.vjp.cases import Case
from zilc import onnx_io
from zilc.testing import op_model, run, vjp_model


def case_id(case: Case) -> str:
    return str(case)


def backward_model(
    op: str,
    inputs: Sequence[np.ndarray | None],
    attrs: Mapping[str, Any],
    *,
    opset: int = 18,
    outputs: int = 1,
    constant: Sequence[int] = (),
    symbolic: bool = False,
) -> onnx.ModelProto:
    return vjp_model(
        op_model(op, inputs, attrs, opset=opset, outputs=outputs, constant=constant, symbolic=symbolic)
    )


def cotangents_of(
    op: str,
    inputs: Sequence[np.ndarray | None],
    attrs: Mapping[str, Any],
    *,
    g: np.ndarray | None = None,
    opset: int = 18,
    outputs: int = 1,
    constant: Sequence[int] = (),
    symbolic: bool = False,
    executor: str = "onnxruntime",
) -> dict[int, np.ndarray]:
    """Cotangent of each differentiable operand; ``g`` is that of the first output, ones by default."""
    model = backward_model(
        op, inputs, attrs, opset=opset, outputs=outputs, constant=constant, symbolic=symbolic
    )
    feeds = {f"x{i}": x for i, x in enumerate(inputs) if x is not None and i not in constant}
    ys = run(op_model(op, inputs, attrs, opset=opset, outputs=outputs, constant=constant), feeds, executor)
    for k, y in enumerate(ys):
        if np.asarray(y).dtype.kind == "f":
            feeds[f"g{k}"] = np.ones_like(y) if k == 0 else np.zeros_like(y)
    if g is not None:
        feeds["g0"] = g
    names = [o.name for o in model.graph.output]
    got = dict(zip(names, run(model, feeds, executor), strict=True))
    return {int(name[1:]): value for name, value in got.items() if name.startswith("d")}


def check_float32(case: Case, rtol: float = 2e-5, seed: int = 0) -> None:
    """The rule in float32 on onnxruntime against itself in float64 on the case's executor.

    Args:
        rtol: allowed difference relative to the norm of the float64 result.
    """
    opset = case.opset if case.opset <= onnx_io.MAX_OPSET else 18  # what onnxruntime loads
    single = [_as(x, np.float32) for x in case.inputs]
    double = [_as(x, np.float64) for x in single]
    for symbolic in (False, True) if case.symbolic else (False,):
        results = []
        truth = opset if case.executor == "onnxruntime" else case.opset
        for inputs, executor, at in ((single, "onnxruntime", opset), (double, case.executor, truth)):
            rng = np.random.default_rng(seed)
            dtype = np.float32 if inputs is single else np.float64
            model = backward_model(
                case.op, inputs, case.attrs, opset=at, outputs=case.outputs, constant=case.constant,
                symbolic=symbolic,
            )  # fmt: skip
            forward = op_model(
                case.op, inputs, case.attrs, opset=at, outputs=case.outputs, constant=case.constant
            )
            feeds = {f"x{i}": x for i, x in enumerate(inputs) if x is not None and i not in case.constant}
            ys = run(forward, feeds, executor)
            for k, y in enumerate(ys):
                if np.asarray(y).dtype.kind == "f":
                    feeds[f"g{k}"] = np.asarray(rng.standard_normal(np.shape(y)).astype(np.float32), dtype)
            names = [o.name for o in model.graph.output]
            got = dict(zip(names, run(model, feeds, executor), strict=True))
            results.append({name: value for name, value in got.items() if name.startswith("d")})
        one, two = results
        assert one.keys() == two.keys()
        assert one
        for name in one:
            assert one[name].dtype == np.float32
            assert np.isfinite(one[name]).all(), f"{case}: {name} is not finite"
            difference = np.linalg.norm(np.asarray(one[name] - two[name], np.float64))
            assert difference <= rtol * max(float(np.linalg.norm(two[name])), 1e-3), f"{case}: {name}"


def vjp_of_shared(op: str, x: np.ndarray, times: int) -> list[np.ndarray]:
    """Cotangents of each edge where one tensor is every operand."""
    info = onnx.helper.make_tensor_value_info("x0", onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
    out = onnx.helper.make_tensor_value_info("y0", onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
    node = onnx.helper.make_node(op, ["x0"] * times, ["y0"], name="node")
    graph = onnx.helper.make_graph([node], "op", [info], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    made = vjp_model(model)
    names = [o.name for o in made.graph.output]
    got = dict(zip(names, run(made, {"x0": x, "g0": np.ones_like(x)}), strict=True))
    return [got[f"d{k}"] for k in range(times)]


def _as(x: np.ndarray | None, dtype: Any) -> np.ndarray | None:
    return x if x is None or x.dtype.kind != "f" else np.asarray(x, dtype)
