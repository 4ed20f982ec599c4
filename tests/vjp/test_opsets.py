"""Every version of every differentiable operator from opset 7 on: files of that opset, through the whole compiler.

A model of one node is built at the opset at which the version came, in the form that this version has.  It is compiled
to its gradients, which raises it to opset 18 or lowers it to what today's runtimes load, and they are held against
central differences of the model as it was built.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.parser
import onnx.printer
import pytest

import zilc
from tests.vjp.cases import Case
from tests.vjp.test_table import CASES as TABLE_CASES
from tools.exam_cases import FLOATS, reference_run
from tools.exam_trial import STEP, TOLERANCE, by_the_way, still
from zilc import coverage, onnx_io
from zilc.analysis import structure
from zilc.errors import ModelError
from zilc.executors import executor
from zilc.passes.precision import to_float64
from zilc.testing import op_model
from zilc.vjp.table import TABLE

OLDEST = 7
#: Random directions for each input.
DIRECTIONS = 2
NEWEST = onnx.defs.onnx_opset_version()
_FLOATS = ("tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)")
_rng = np.random.default_rng(23)


def r(*shape: int) -> np.ndarray:
    return np.asarray(_rng.standard_normal(shape))


def positive(*shape: int) -> np.ndarray:
    return np.asarray(_rng.uniform(0.4, 1.6, shape))


def i(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


# -- what has to be swept --


@functools.cache
def versions() -> dict[str, list[int]]:
    """The versions of each operator that are in force at some opset from 7 on."""
    found: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            found.setdefault(schema.name, set()).add(schema.since_version)
    kept = {}
    for name, since in sorted(found.items()):
        at_first = [max(v for v in since if v <= OLDEST)] if min(since) <= OLDEST else []
        kept[name] = [*at_first, *sorted(v for v in since if v > OLDEST)]
    return kept


def _schema(op: str, version: int) -> Any:
    return onnx.defs.get_schema(op, max(version, OLDEST), "")


def differentiable(op: str, version: int) -> bool:
    """Floating numbers come in and go out, and the table does not say that nothing flows."""
    rule = TABLE.lookup(op, NEWEST)
    return (rule is None or rule.differentiable) and _floats_pass(op, version)


def _floats_pass(op: str, version: int) -> bool:
    schema = _schema(op, version)
    if any(a.type == onnx.defs.OpSchema.AttrType.GRAPH for a in schema.attributes.values()):
        return True  # what its subgraphs read
    return all(any(any(f in kind for f in _FLOATS for kind in x.types) for x in side)
               for side in (schema.inputs, schema.outputs))  # fmt: skip


PAIRS = [(op, v) for op, since in versions().items() for v in since if differentiable(op, v)]


# -- forms that are no longer, and operators that take no tensors --


@dataclass(frozen=True)
class Form:
    """A node as the versions ``since`` to ``until`` of its operator have it."""

    case: Case
    since: int = OLDEST
    until: int = NEWEST


def _old(op: str, until: int, *inputs: np.ndarray | None, since: int = OLDEST, **attrs: Any) -> Form:
    outputs, constant = attrs.pop("outputs", 1), attrs.pop("constant", ())
    return Form(Case(op, inputs, attrs, outputs=outputs, constant=constant), since, until)


def _body(text: str) -> onnx.GraphProto:
    return onnx.parser.parse_graph(text)


_REDUCTIONS = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
               "ReduceProd", "ReduceSum", "ReduceSumSquare")  # fmt: skip
_BATCH_SCAN = """b (double[M] h, double[K] x) => (double[M] after, double[M] y) {
    s = ReduceSum <keepdims = 0> (x)  a = Mul(h, s)  after = Sin(a)  y = Exp(after) }"""
_LINEAR_ATTENTION = {"q_num_heads": 2, "kv_num_heads": 1}

FORMS: list[Form] = [
    # attributes that became operands
    *(
        _old(op, 12 if op == "ReduceSum" else 17, positive(2, 3, 4), axes=[0, 2], keepdims=keep)
        for op in _REDUCTIONS for keep in (0, 1)
    ),
    _old("Clip", 10, r(3, 4), min=-0.7, max=0.9),
    _old("Clip", 10, r(3, 4), max=0.4),
    _old("Dropout", 11, r(3, 4), ratio=0.3),
    _old("Dropout", NEWEST, r(3, 4), np.asarray(0.3), np.asarray(False), since=12, constant=[1, 2]),
    _old("Pad", 10, r(2, 3), pads=[1, 0, 0, 2], value=0.5),
    _old("Pad", 10, r(4, 3), pads=[2, 1, 3, 0], mode="reflect"),
    _old("Pad", 10, r(4, 3), pads=[0, 1, 2, 0], mode="edge"),
    _old("Pad", 17, r(2, 3), i(1, 0, 0, 2), np.asarray(0.5), since=11, constant=[1]),
    _old("Pad", 17, r(4, 3), i(2, 1, 3, 0), since=11, constant=[1], mode="reflect"),
    _old("Slice", 9, r(5, 4), starts=[1, 0], ends=[4, 2]),
    _old("Slice", 9, r(5, 4, 3), starts=[-3, 1], ends=[-1, 100], axes=[0, 2]),
    _old("Split", 12, r(2, 6), axis=1, split=[4, 2], outputs=2),
    _old("Split", 12, r(6, 2), outputs=3),
    _old("Split", 17, r(6, 2), outputs=3, since=13),
    _old("Squeeze", 12, r(1, 3, 1, 2), axes=[0, 2]),
    _old("Unsqueeze", 12, r(3, 2), axes=[0, 3]),
    _old("TopK", 9, _rng.permutation(12).reshape(3, 4) * 0.3, k=2, axis=1, outputs=2),
    _old("TopK", 10, _rng.permutation(12).reshape(3, 4) * 0.3, i(3), since=10, axis=0, outputs=2),
    _old("Upsample", 8, r(1, 2, 3, 4), mode="nearest", scales=[1.0, 1.0, 2.0, 3.0]),
    _old("Upsample", 8, r(1, 2, 3, 4), mode="linear", scales=[1.0, 1.0, 2.0, 2.0]),
    *(
        _old("Upsample", 9, r(1, 2, 3, 4), np.asarray([1, 1, 2, k], np.float32), since=9, constant=[1], mode=mode)
        for mode, k in (("nearest", 3), ("linear", 2))
    ),
    *(
        _old("Resize", 10, r(1, 2, 4, 5), np.asarray([1, 1, *k], np.float32), since=10, constant=[1], mode=mode)
        for mode, k in (
            ("nearest", (2, 3)), ("nearest", (0.6, 0.75)), ("nearest", (0.6, 1.5)), ("linear", (2, 2)),
            ("linear", (0.5, 1.5)),
        )
    ),
    *(
        _old("Resize", 12, r(1, 2, 4, 4), np.asarray([], np.float32), np.asarray([1, 1, *k], np.float32), since=11,
             constant=[1, 2], mode=mode, coordinate_transformation_mode=where)
        for mode, k, where in (
            ("nearest", (2, 3), "asymmetric"), ("linear", (2, 0.5), "half_pixel"), ("cubic", (2, 2), "align_corners"),
            ("linear", (1, 2), "pytorch_half_pixel"),
        )
    ),
    *(
        _old("Resize", 12, r(1, 1, 4, 5), np.asarray([], np.float32), np.asarray([1, 1, 1.5, 0.6], np.float32),
             since=11, constant=[1, 2], mode="nearest", coordinate_transformation_mode="tf_half_pixel_for_nn", **near)
        for near in ({}, {"nearest_mode": "floor"})
    ),
    # one axis cut the tensor in two
    *(_old(op, 12, r(2, 3, 4)) for op in ("Softmax", "LogSoftmax")),
    *(_old(op, 12, r(2, 3, 2, 2), axis=k) for op in ("Softmax", "LogSoftmax") for k in (0, 2, 3)),
    # operands of one shape, or that broadcast one way
    *(_old(op, 7, r(2, 3), r(2, 3), r(2, 3)) for op in ("Max", "Mean", "Min", "Sum")),
    _old("PRelu", 8, r(2, 3, 4), positive(3, 1)),
    _old("Gemm", 10, r(2, 3), r(4, 3), r(4), transB=1, alpha=0.7, beta=1.3),
    # what is an attribute today was not there
    _old("BatchNormalization", 8, r(2, 3, 4), positive(3), r(3), r(3), positive(3), spatial=1, momentum=0.8),
    _old("BatchNormalization", 13, r(2, 3, 4), positive(3), r(3), r(3), positive(3)),
    _old("DepthToSpace", 10, r(2, 12, 2, 3), blocksize=2),
    _old("GatherND", 11, r(3, 4, 2), np.asarray([[0, 1], [2, 3], [0, 1]])),
    _old("Scatter", 10, r(3, 4), np.asarray([[0, 2, 1], [1, 0, 2]]), r(2, 3), axis=0),
    _old("ScatterElements", 15, r(3, 4), np.asarray([[0, 2, 1], [1, 0, 2]]), r(2, 3), axis=0),
    _old("ScatterND", 15, r(4, 3), np.asarray([[1], [3]]), r(2, 3)),
    # a batch of sequences, each of its length
    _old("Scan", 8, None, r(2, 3), r(2, 4, 5), num_scan_inputs=1, body=_body(_BATCH_SCAN), outputs=2),
    _old("Scan", 8, None, r(2, 3), r(2, 4, 5), num_scan_inputs=1, body=_body(_BATCH_SCAN), outputs=2, directions=[1]),
    # modes by their newer names
    *(
        Form(Case("GridSample", [r(1, 2, 4, 5), _rng.uniform(-0.9, 0.9, (1, 2, 3, 2))], {"mode": m}), since=20)
        for m in ("linear", "cubic")
    ),
    # float32 alone
    Form(Case("Celu", [r(3, 4).astype("f")], {"alpha": 0.7})),
    Form(Case("MeanVarianceNormalization", [r(2, 3, 4).astype("f")], {"axes": [1, 2]})),
    Form(Case("DynamicQuantizeLinear", [r(3, 4).astype("f")], outputs=3)),
    Form(Case("CausalConvWithState", [x.astype("f") for x in (r(2, 3, 5), r(3, 1, 3), r(3), r(2, 3, 2))],
              {"activation": "silu"}, outputs=2)),
    Form(Case("LinearAttention", [x.astype("f") for x in (r(1, 3, 8), r(1, 3, 4), r(1, 3, 4))],
              {**_LINEAR_ATTENTION, "update_rule": "linear"}, outputs=2)),
    # by a function body
    Form(Case("CenterCropPad", [r(5, 4), i(3, 7)], constant=[1])),
    Form(Case("SwiGLU", [r(3, 4), r(3, 4)])),
]  # fmt: skip

#: Operators on sequences and optionals, in models that take and give tensors.
BODIES = {
    "SequenceConstruct": "s = SequenceConstruct (x, z)  y = ConcatFromSequence <axis = 0> (s)",
    "SequenceAt": "s = SequenceConstruct (x, z)  a = SequenceAt (s, one)  y = Mul (a, x)",
    "SequenceInsert": "e = SequenceEmpty <dtype = 11> ()  f = SequenceInsert (e, x)  s = SequenceInsert (f, z, zero)"
    "  y = ConcatFromSequence <axis = 1> (s)",
    "SequenceErase": "s = SequenceConstruct (x, z, w)  e = SequenceErase (s, one)"
    "  y = ConcatFromSequence <axis = 0> (e)",
    "SplitToSequence": "s = SplitToSequence <axis = 0, keepdims = 0> (x)  a = SequenceAt (s, one)"
    "  b = SequenceAt (s, zero)  c = Mul (a, b)  p = SplitToSequence <axis = 1> (z, pieces)"
    "  d = ConcatFromSequence <axis = 1> (p)  y = Mul (c, d)",
    "ConcatFromSequence": "s = SequenceConstruct (x, z)  y = ConcatFromSequence <axis = 1, new_axis = 1> (s)",
    "SequenceMap": "s = SequenceConstruct (x, z)  t = SequenceMap (s, w) <body = f (double[2, 3] u, double[2, 3] v)"
    " => (double[2, 3] q) { p = Mul (u, v)  q = Sin (p) }>  y = ConcatFromSequence <axis = 0> (t)",
    "Optional": "o = Optional (x)  a = OptionalGetElement (o)  y = Sin (a)",
    "OptionalGetElement": "o = Optional (x)  a = OptionalGetElement (o)  p = Optional (a)"
    "  b = OptionalGetElement (p)  y = Mul (b, z)",
}


#: Operators of which ONNX Runtime computes something else than ONNX says.
NO_JUDGE = {
    "DFT": "the inverse of a one-sided transform reads more of it than half its length",
    "MaxUnpool": "indices count places of the output as output_shape has it, not as it would be without",
}


# -- one model and its gradients --

Feeds = Mapping[str, np.ndarray]
Run = Callable[[Feeds], list[np.ndarray]]


@dataclass(frozen=True)
class Trial:
    """A model at one opset and where it stands.

    Attributes:
        model: float64 where the schema takes it, else float32.
        single: the same in float32.
        clear: inputs that stand clear of kinks; None means all.
    """

    op: str
    model: onnx.ModelProto
    single: onnx.ModelProto
    feeds: Feeds
    clear: frozenset[str] | None = None


def typed(case: Case, dtype: np.dtype) -> Case:
    """The case with floating operands, and the subgraphs' types, of another dtype."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    name = onnx.TensorProto.DataType.Name(kind).lower()

    def of(value: Any) -> Any:
        if not isinstance(value, onnx.GraphProto):
            return value
        text = onnx.printer.to_text(value).replace("double", name).replace("<to: int = 11>", f"<to: int = {kind}>")
        return onnx.parser.parse_graph(text)

    inputs = [x if x is None or x.dtype.kind != "f" else x.astype(dtype) for x in case.inputs]
    return dataclasses.replace(case, inputs=inputs, attrs={k: of(v) for k, v in case.attrs.items()})


def model_of(case: Case, opset: int) -> onnx.ModelProto:
    return op_model(case.op, case.inputs, case.attrs, opset=opset, outputs=case.outputs, constant=case.constant,
                    executor=case.executor)  # fmt: skip


def _trial_of_case(case: Case, opset: int) -> Trial:
    feeds = {f"x{k}": x for k, x in enumerate(case.inputs) if x is not None and k not in case.constant}
    clear = None if case.operands is None else frozenset(f"x{k}" for k in case.operands)
    return Trial(case.op, model_of(case, opset), model_of(typed(case, np.dtype("f")), opset), feeds, clear)


def body_of(op: str, opset: int, dtype: np.dtype) -> onnx.ModelProto:
    """The model of a sequence operator."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    text = f'''<ir_version: 10, opset_import: ["" : {opset}]>
        g (double[2, 3] x, double[2, 3] z, double[2, 3] w) => (double[M, N] y)
        <int64 zero = {{0}}, int64 one = {{1}}, int64[2] pieces = {{1, 2}}> {{ {BODIES[op]} }}'''
    if "new_axis" in text:
        text = text.replace("double[M, N]", "double[M, N, K]")
    name = onnx.TensorProto.DataType.Name(kind).lower()
    return onnx.parser.parse_model(text.replace("double", name).replace("dtype = 11", f"dtype = {kind}"))


def trials(op: str, version: int) -> list[Trial]:
    """Models of one version: the forms written for it, else a case of the operator's family that it takes as it is."""
    opset = max(version, OLDEST)
    if op in BODIES:
        rng = np.random.default_rng(0)
        double, single = (body_of(op, opset, np.dtype(kind)) for kind in "df")
        return [Trial(op, double, single, {n: rng.standard_normal((2, 3)) for n in "xzw"})]
    forms, cases = cases_of(op, version)
    for case in cases if not forms else ():
        try:
            return [_trial_of_case(case, opset)]
        except INVALID:
            continue  # a form of another version
    return [_trial_of_case(case, opset) for case in forms]


#: What onnx raises of a node that has another version's form, or a type that its version does not take.
INVALID = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)


def cases_of(op: str, version: int) -> tuple[list[Case], list[Case]]:
    """Those written for a version's form, and those of the family that may have it: of this very version, and with the
    most attributes and operands, first.
    """
    opset = max(version, OLDEST)
    forms = [f.case for f in FORMS if f.case.op == op and f.since <= opset <= f.until]
    cases = [c for c in TABLE_CASES if c.op == op and _has_the_form(c, version)]
    return forms, sorted(cases, key=lambda c: (_since(op, c.opset) != version, -len(c.attrs) - len(c.inputs)))


def _since(op: str, opset: int) -> int:
    return int(_schema(op, opset).since_version)


def _has_the_form(case: Case, version: int) -> bool:
    """The version has these attributes, and negative axes, which came with opset 11."""
    backwards = [v for name, v in case.attrs.items() if name in ("axis", "axes")]
    return set(case.attrs) <= set(_schema(case.op, version).attributes) and (
        version >= 11 or not backwards or bool(np.min(backwards[0]) >= 0)
    )


def _runtime(model: onnx.ModelProto) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in model.graph.input}
    return lambda feeds: session.run(None, {n: np.asarray(x, kinds[n]) for n, x in feeds.items()})


def _reference(trial: Trial) -> Run:
    return reference_run(to_float64(trial.model))


def originals(trial: Trial) -> list[tuple[Run, str]]:
    """Who runs the model as it was built, and in which precision: those that agree with ONNX Runtime, which has kernels
    for each version by its own definition.

    Raises:
        RuntimeError: nothing runs it.
    """
    wide = {n: _wide(x) for n, x in trial.feeds.items()}
    own = "float64" if _is_double(trial.model) else "float32"
    attempts: list[tuple[str, Callable[[], Run]]] = [
        ("float64", lambda: _reference(trial)),
        (own, lambda: _runtime(trial.model)),
        ("float32", lambda: _runtime(trial.single)),
    ]
    found: list[tuple[Run, str, list[np.ndarray]] | None] = []
    reasons = []
    for precision, make in attempts:
        try:
            run = make()
            found.append((run, precision, [np.asarray(y) for y in run(wide)]))
        except Exception as error:
            found.append(None)
            reasons.append(f"{precision}: {str(error).strip()[:200]}")
    judge = None if trial.op in NO_JUDGE else found[1] or found[2]
    made = [one[:2] for one in found if one is not None and (judge is None or _same(one[2], judge[2]))]
    if not made:
        raise RuntimeError("; ".join(reasons))
    return made


def _runs(model: onnx.ModelProto) -> bool:
    try:
        _runtime(model)
    except Exception:
        return False
    return True


def _is_double(model: onnx.ModelProto) -> bool:
    return any(i.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE for i in model.graph.input)


def _same(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> bool:
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-4 * np.max(np.abs(b), initial=1e-3))
        for a, b in zip(ours, theirs, strict=True)
    )


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) if x.dtype.kind == "f" else x


def check(trial: Trial, opset: int | None = None) -> None:
    """Emitted gradients against central differences, by inner products along random directions.

    An input that zilc passes nothing to must not move the output, unless the schema or a convention freezes it.
    """
    model = trial.model
    trained = [o.name for o in model.graph.output if o.type.tensor_type.elem_type in FLOATS]
    trained = [n for n in trained if n not in by_the_way(model)]
    floats = [n for n, x in trial.feeds.items() if x.dtype.kind == "f"]
    leaves = set(structure(model, output=trained, opset=opset).flow.leaves)
    active = [n for n in floats if n in leaves]
    step = zilc.emit_training(model, output=trained, wrt=active, outputs="grad", opset=opset)
    onnx_io.check_full(step.model)
    assert sorted(leaf["name"] for leaf in step.signature["input_grads"]) == sorted(active)
    assert active, "no gradient"
    frozen = still(model, active)
    looked_at = [n for n in floats if n not in frozen and (trial.clear is None or n in trial.clear)]
    assert looked_at
    problems = []
    for run, precision in originals(trial):
        # One that rounds to float32 inside, whatever its types are, is no truth; a wrong gradient is wrong beside all.
        problem = _difference(trial, step, trained, active, looked_at, run, precision)
        if not problem:
            return
        problems.append(f"beside {precision}: {problem}")
    raise AssertionError("; ".join(problems))


def _difference(
    trial: Trial, step: zilc.TrainingStep, trained: Sequence[str], active: Sequence[str], looked_at: Sequence[str],
    run: Run, precision: str,
) -> str:  # fmt: skip
    """Where the gradients are not the differences of what ``run`` computes; empty if they are."""
    rng = np.random.default_rng(0)
    names = [o.name for o in trial.model.graph.output]
    feeds = {n: _wide(x) for n, x in trial.feeds.items()}
    y = dict(zip(names, run(feeds), strict=True))
    g = {n: rng.standard_normal(np.shape(y[n])) for n in trained}
    targets = {t["name"]: y[t["output"]] - g[t["output"]] for t in step.signature["targets"]}
    kinds = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type)
             for i in step.model.graph.input}  # fmt: skip
    given = {n: np.asarray(x, kinds[n]) for n, x in {**feeds, **targets, **step.state}.items() if n in kinds}
    # What ONNX Runtime refuses or computes otherwise in the model, it would in the training graph.
    trusted = trial.op not in NO_JUDGE and _runs(trial.model)
    made = executor(step.model, prefer="onnxruntime" if trusted else "reference")(given)
    grads = {leaf["name"]: made[leaf["grad"]] for leaf in step.signature["input_grads"]}
    single = precision == "float32" or not _is_double(trial.model)
    size, tolerance = STEP[precision], TOLERANCE["float32" if single else "float64"]
    for name in looked_at:
        x = feeds[name]
        d = _wide(grads[name]) if name in active else np.zeros(x.shape)
        if d.shape != x.shape:
            return f"{name} of shape {d.shape}, expected {x.shape}"
        for _ in range(DIRECTIONS):
            v = rng.standard_normal(x.shape)
            ends = [dict(zip(names, run({**feeds, name: x + h * v}), strict=True)) for h in (size, -size)]
            numeric = sum(float(np.sum(g[n] * (_wide(ends[0][n]) - _wide(ends[1][n])))) for n in trained) / (2 * size)
            exact, scale = float(np.sum(d * v)), float(np.linalg.norm(d) * np.linalg.norm(v)) + 1e-12
            if not abs(exact - numeric) <= tolerance * max(scale, abs(numeric)):
                return f"{name}: {exact!r}, central difference {numeric!r}"
    return ""


# -- the sweep --

#: Versions that no model may hold, and why.
NOT_RUN: dict[tuple[str, int], str] = {
    ("GroupNormalization", 18): "the version itself is deprecated: onnx.checker refuses every model that holds it",
    ("Scatter", 11): "deprecated in favour of ScatterElements: onnx.checker refuses it from opset 11 on",
    ("Upsample", 10): "deprecated in favour of Resize: onnx.checker refuses it from opset 10 on",
}
#: Models of those, which would be run if they could.
FORBIDDEN = {
    "GroupNormalization": ([r(2, 4, 3), positive(2), r(2)], {"num_groups": 2}),
    "Scatter": ([r(3, 4), np.asarray([[0, 2, 1]]), r(1, 3)], {}),
    "Upsample": ([r(1, 1, 2, 2), np.asarray([1, 1, 2, 2], np.float32)], {}),
}


@pytest.mark.parametrize(("op", "version"), [p for p in PAIRS if p not in NOT_RUN], ids=str)
def test_gradients(op: str, version: int) -> None:
    made = trials(op, version)
    assert made, "no case has the form of this version"
    for trial in made:
        check(trial)
        if version > onnx_io.MAX_OPSET:  # lowered above; the rule in force at this version is another
            check(trial, version)


def test_every_version_is_swept() -> None:
    """The pairs above are all versions of all operators that ``zilc ops`` says a gradient passes, and no others."""
    passed = {row["operator"] for row in coverage.operators(NEWEST)["operators"] if row["status"] != "no gradient"}
    passed -= {op for op, since in versions().items() if not any(_floats_pass(op, v) for v in since)}
    assert {op for op, _ in PAIRS} == passed
    for op in passed:
        assert {v for o, v in PAIRS if o == op} == {v for v in versions()[op] if _floats_pass(op, v)}
    assert set(NOT_RUN) <= set(PAIRS)


@pytest.mark.parametrize(("op", "version"), sorted(NOT_RUN), ids=str)
def test_what_is_not_run_cannot_be(op: str, version: int) -> None:
    inputs, attrs = FORBIDDEN[op]
    infos = [onnx.helper.make_tensor_value_info(f"x{k}", onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
             for k, x in enumerate(inputs)]  # fmt: skip
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, [None] * inputs[0].ndim)
    node = onnx.helper.make_node(op, [i.name for i in infos], ["y"], **attrs)
    graph = onnx.helper.make_graph([node], "op", infos, [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)], ir_version=8)
    with pytest.raises(onnx.checker.ValidationError, match="deprecated"):
        onnx.checker.check_model(model)
    with pytest.raises(ModelError, match="deprecated"):
        zilc.levelize(model)
