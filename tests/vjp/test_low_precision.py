"""Half precision: every operator that takes float16 or bfloat16, compiled in that type, beside its own float32 graph.

Small batches, families and sizes 0 and 1 in float16 are in test_edges.py; here is each operator once, in both types.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx.defs
import pytest

import zilc
from tests.vjp.test_opsets import BODIES, INVALID, NO_JUDGE, PAIRS, body_of, cases_of, model_of, typed
from tools.exam_cases import FLOATS
from tools.exam_trial import by_the_way
from zilc import onnx_io
from zilc.analysis import structure
from zilc.executors import executor
from zilc.onnx_io import MIN_OPSET
from zilc.testing import op_model

#: By type: its dtype, and how much rounding to it changes a number at most, relatively.
TYPES = {"float16": (np.dtype(np.float16), 2.0**-11), "bfloat16": (np.dtype(ml_dtypes.bfloat16), 2.0**-8)}
SINGLE = np.dtype(np.float32)
#: The newest version of each operator that models may still hold.
NEWEST = {op: version for op, version in PAIRS if not onnx.defs.get_schema(op).deprecated}


def admits(op: str, kind: str) -> bool:
    """Whether an operand may hold numbers of this type; what control flow carries may."""
    schema = onnx.defs.get_schema(op, _opset(op), "")
    if any(a.type == onnx.defs.OpSchema.AttrType.GRAPH for a in schema.attributes.values()):
        return True
    return any(f"tensor({kind})" in t for operand in schema.inputs for t in operand.types)


def _opset(op: str) -> int:
    return max(NEWEST[op], MIN_OPSET)


#: What onnx itself cannot build or nothing runs, and why; compiled all the same where there is a model.
NO_MODEL = {
    ("MeanVarianceNormalization", "float16"): "onnx's inference meets float32 constants in the function body",
    ("MeanVarianceNormalization", "bfloat16"): "onnx's inference meets float32 constants in the function body",
    ("SequenceMap", "bfloat16"): "no operator makes a sequence of bfloat16, or reads one, but SplitToSequence",
    ("SplitToSequence", "bfloat16"): "no operator but SequenceMap reads a sequence of bfloat16",
}
NOT_RUN = {
    ("AffineGrid", "float16"): "ONNX Runtime fails in the function body, and ONNX's evaluator mixes types there",
    ("AffineGrid", "bfloat16"): "ONNX's evaluator mixes types in the function body",
    ("SoftmaxCrossEntropyLoss", "bfloat16"): "ONNX Runtime's function body is invalid in bfloat16",
}
OPERATORS = [(op, kind) for op in NEWEST for kind in TYPES if admits(op, kind)]


def models(op: str, kind: str) -> tuple[onnx.ModelProto, onnx.ModelProto, Mapping[str, np.ndarray]]:
    """One node of the type, the same in float32, and numbers that both hold.

    Raises:
        ValueError: no case of the operator is valid in the type.
    """
    dtype, opset = TYPES[kind][0], _opset(op)
    if op in BODIES:
        rng = np.random.default_rng(0)
        feeds = {n: rng.standard_normal((2, 3)).astype(dtype).astype(SINGLE) for n in "xzw"}
        model = body_of(op, opset, dtype)
        try:
            onnx_io.check_full(model)
        except INVALID as error:
            raise ValueError(f"no model of {op} in {kind}") from error
        return model, body_of(op, opset, SINGLE), feeds
    forms, cases = cases_of(op, NEWEST[op])
    for case in (*forms, *cases):
        low = typed(case, dtype)
        try:
            model = model_of(low, opset)
        except INVALID:
            continue  # onnx says that an operand of it is float32 alone
        rounded = [x.astype(SINGLE) if x is not None and x.dtype == dtype else x for x in low.inputs]
        inputs = {f"x{k}": x for k, x in enumerate(rounded) if x is not None and k not in case.constant}
        return model, model_of(dataclasses.replace(typed(case, SINGLE), inputs=rounded), opset), inputs
    raise ValueError(f"no model of {op} in {kind}")


def compiled(model: onnx.ModelProto, opset: int) -> zilc.TrainingStep:
    trained = [o.name for o in model.graph.output if o.type.tensor_type.elem_type in FLOATS]
    trained = [n for n in trained if n not in by_the_way(model)]
    leaves = set(structure(model, output=trained, opset=opset).flow.leaves)
    floats = [i.name for i in model.graph.input if i.type.tensor_type.elem_type in FLOATS and i.name in leaves]
    return zilc.emit_training(model, output=trained, wrt=floats, outputs="grad", opset=opset)


def gradients(step: zilc.TrainingStep, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By leaf, in the first executor that runs the graph, and computes what ONNX says."""
    kinds = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in step.model.graph.input}
    given = {n: np.asarray(x, kinds[n]) for n, x in feeds.items() if n in kinds}
    odd = any(n.op_type in NO_JUDGE for n in step.model.graph.node)
    try:
        made = executor(step.model, prefer="reference" if odd else "onnxruntime")(given)
    except Exception:  # onnxruntime loads some graphs that it then has no kernel for
        made = executor(step.model, prefer="reference")(given)
    return {leaf["name"]: made[leaf["grad"]] for leaf in step.signature["input_grads"]}


def operations(nodes: Sequence[onnx.NodeProto]) -> int:
    """Operators, those of subgraphs among them."""
    inner = [a.g for n in nodes for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    return len(nodes) + sum(operations(graph.node) for graph in inner)


def _targets(step: zilc.TrainingStep, outputs: Mapping[str, np.ndarray], dtype: np.dtype) -> dict[str, np.ndarray]:
    """Targets of the outputs' size: the cotangent, their difference, loses no digits."""
    rng = np.random.default_rng(0)
    found = {}
    for entry in step.signature["targets"]:
        y = np.asarray(outputs[entry["output"]])
        size = float(np.max(np.abs(y), initial=0.0)) or 1.0
        found[entry["name"]] = (rng.standard_normal(y.shape) * size).astype(dtype).astype(SINGLE)
    return found


@functools.cache
def _single(op: str, serialized: bytes) -> zilc.TrainingStep:
    return compiled(onnx.load_from_string(serialized), _opset(op))


def _compare(op: str, kind: str) -> None:
    dtype, unit = TYPES[kind]
    model, single, feeds = models(op, kind)
    step, beside = compiled(model, _opset(op)), _single(op, single.SerializeToString())
    onnx_io.check_full(step.model)
    feeds = {**feeds, **_targets(beside, executor(single)(feeds), dtype)}
    expected, got = gradients(beside, feeds), gradients(step, feeds)
    assert expected
    assert got.keys() == expected.keys()
    # Each operator rounds what it makes, by a unit of its largest number at most.  Roundings are independent, so N of
    # them come to sqrt(N) units where none is magnified, as with these numbers; twice that for the worst element.
    most = 2 * operations(step.model.graph.node) ** 0.5 * unit
    for name, g in expected.items():
        assert got[name].dtype == dtype
        assert got[name].shape == g.shape
        error = np.max(np.abs(got[name].astype(np.float64) - g), initial=0.0)
        assert error <= most * np.max(np.abs(g), initial=0.0), f"{name}: {error:.3g}"


@pytest.mark.parametrize(("op", "kind"), [p for p in OPERATORS if p not in NO_MODEL and p not in NOT_RUN], ids=str)
def test_half_precision(op: str, kind: str) -> None:
    _compare(op, kind)


@pytest.mark.parametrize(("op", "kind"), sorted(NOT_RUN), ids=str)
def test_what_nothing_runs_is_compiled(op: str, kind: str) -> None:
    model, _, feeds = models(op, kind)
    step = compiled(model, _opset(op))
    onnx_io.check_full(step.model)
    made = {o.name: o.type.tensor_type.elem_type for o in step.model.graph.output}
    assert step.signature["input_grads"]
    for leaf in step.signature["input_grads"]:
        assert onnx.helper.tensor_dtype_to_np_dtype(made[leaf["grad"]]) == TYPES[kind][0]
    with pytest.raises(Exception, match=r"."):
        gradients(step, feeds)


@pytest.mark.parametrize(("op", "kind"), sorted(NO_MODEL), ids=str)
def test_what_has_no_model_has_none(op: str, kind: str) -> None:
    with pytest.raises(ValueError, match="no model"):
        models(op, kind)


@pytest.mark.parametrize(("count", "operator"), [(8, "OneHot"), (5000, "ScatterElements")])
@pytest.mark.parametrize("kind", TYPES)
def test_repeated_rows_are_summed_in_single_precision(kind: str, count: int, operator: str) -> None:
    """4,096 ones on one row: a sum in half precision stands still at 2,048, or at 256."""
    dtype = TYPES[kind][0]
    rows, index = np.zeros((count, 32), dtype), np.full(4096, 7)
    model = op_model("Gather", [rows, index], {"axis": 0})
    step = compiled(model, MIN_OPSET)
    assert operator in {node.op_type for node in step.model.graph.node}
    targets = {entry["name"]: np.full((4096, 32), -1.0) for entry in step.signature["targets"]}
    got = gradients(step, {"x0": rows, "x1": index, **targets})["x0"]
    np.testing.assert_array_equal(got.astype("f"), np.where(np.arange(len(rows))[:, None] == 7, 4096, 0) * np.ones(32))
    if kind == "float16":
        assert executor(step.model).name.startswith("onnxruntime")


@pytest.mark.parametrize(("kind", "right", "first"), [("float16", 4100, 4097), ("bfloat16", 4128, 4111)])
def test_places_in_a_large_image_are_told_apart(kind: str, right: int, first: int) -> None:
    """One sample in the middle of a box from 4096 on, between two pixels: half precision cannot count that far."""
    dtype = TYPES[kind][0]
    x, boxes = np.zeros((1, 1, 1, 5000), dtype), np.asarray([[4096, 0, right, 1]], dtype)
    attrs = {"output_height": 1, "output_width": 1, "sampling_ratio": 1, "coordinate_transformation_mode": "half_pixel"}
    step = compiled(op_model("RoiAlign", [x, boxes, np.asarray([0])], attrs, opset=22), 22)
    targets = {entry["name"]: np.full((1, 1, 1, 1), -1.0) for entry in step.signature["targets"]}
    got = gradients(step, {"x0": x, "x1": boxes, "x2": np.asarray([0]), **targets})["x0"].astype("f").ravel()
    np.testing.assert_array_equal(np.flatnonzero(got), [first, first + 1])
    np.testing.assert_array_equal(got[[first, first + 1]], 0.5)
