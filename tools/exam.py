"""The exam: every node test of ONNX whose model has a floating path, its emitted gradients held against differences.

For each case the gradient of every floating input is emitted through the public path, on the model in float64, and
compared by inner products along random directions with central differences of the original model.  Then the gradient
graph of the model as it is must run in ONNX Runtime's CPU provider wherever that runs the model itself, and agree.

    python tools/exam.py                     the whole exam; writes docs/OPERATORS.md
    python tools/exam.py --only Resize       cases of some operators (repeatable; a name of a case will do, too)
    python tools/exam.py --json              one JSON document on stdout
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import multiprocessing.connection
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.inliner
import onnx.numpy_helper
import onnx.reference
import onnx.shape_inference
from onnx.reference.op_run import OpRun

ROOT = Path(__file__).resolve().parent.parent

#: Seconds that one case may take.
LIMIT = 60.0
#: The newest opset that onnxruntime-training 1.19.2 takes: tools/rivals.py lowers to it.
TRAINING_OPSET = 21
#: Random directions for each input.
DIRECTIONS = 3

FLOATS = frozenset(
    (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
)

#: Relative step of the differences and largest error accepted, relative to |gradient| |direction|, by what the
#: executor of the original computes in.  float64: truncation h^2 and rounding 2^-53 / h are both near 1e-10, and
#: a third derivative of 1e3 is still allowed for.  float32: rounding 2^-24 / h, h^2 truncation.
STEP = {"float64": 1e-5, "float32": 1e-2}
TOLERANCE = {"float64": 1e-6, "float32": 2e-2}
#: How far the gradients of the model as it is, in ONNX Runtime, may be from those in float64: |a - b| / |b|.
RUNTIME_TOLERANCE = {"float64": 1e-6, "float32": 2e-3, "float16": 5e-2, "bfloat16": 2e-1}

#: Why ONNX Runtime is not asked.
NO_KERNEL, OTHERWISE = "has no kernel for the original", "computes the original otherwise than ONNX says"

#: Operators whose output is drawn, not computed: there is no path to differentiate.
RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
#: Operands that are constants of the derivative by convention, though the output moves with them: what ONNX's schemas
#: tag as not differentiable is added to these.
FROZEN: dict[str, frozenset[int]] = {
    "BatchNormalization": frozenset({3, 4}),  # running statistics
    "Range": frozenset({1}),  # the limit decides the number of elements
    "Resize": frozenset({1, 2}),  # so do the region and the scales
    "Upsample": frozenset({1}),
}
#: Outputs that are not trained: running statistics.
BY_THE_WAY = {"BatchNormalization": slice(1, None)}


@dataclass
class Verdict:
    """What the exam found on one case.

    Attributes:
        status: right, wrong, refused (zilc declined), or unexamined.
        reason: why, where it is not right.
        error: the largest relative error of a directional derivative.
        executor: who ran the original.
        runtime: what became of the emitted graph of the model as it is in ONNX Runtime.
        zero: every derivative is zero, and zilc says that none flows.
    """

    case: str
    operator: str
    status: str
    reason: str = ""
    error: float | None = None
    executor: str = ""
    runtime: str = ""
    zero: bool = False
    seconds: float = 0.0
    inputs: dict[str, float] = field(default_factory=dict)


class Unexamined(Exception):
    """The case has no floating path, or nothing runs its model."""


# --- cases ----------------------------------------------------------------------------------------------------


def load_cases() -> dict[str, Any]:
    """onnx's node tests by name."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for case in load_model_tests(kind="node")}


def operators_of(cases: Mapping[str, Any]) -> dict[str, str]:
    """The operator that each case is about: expanded function bodies count for their function."""
    return {name: _operator(name, cases) for name in cases}


def _base(name: str, cases: Mapping[str, Any]) -> str:
    """The case whose function body this one is, or itself."""
    base = name
    while "_expanded" in base:
        base = base[: base.rindex("_expanded")]
        if base in cases:
            return base
    return name


def _operator(name: str, cases: Mapping[str, Any]) -> str:
    nodes = cases[_base(name, cases)].model.graph.node
    kinds = [n.op_type if n.domain in ("", "ai.onnx") else f"{n.domain}.{n.op_type}" for n in nodes]
    others = [k for k in kinds if k not in ("Constant", "Identity")]
    return Counter(others or kinds or ["none"]).most_common(1)[0][0] if len(set(others)) > 1 else (others or kinds)[0]


def _is_float(kind: onnx.TypeProto) -> bool:
    if kind.HasField("tensor_type"):
        return kind.tensor_type.elem_type in FLOATS
    if kind.HasField("sequence_type"):
        return _is_float(kind.sequence_type.elem_type)
    if kind.HasField("optional_type"):
        return _is_float(kind.optional_type.elem_type)
    return False


def floating_path(model: onnx.ModelProto) -> str:
    """Why no floating path leads from an input to an output; empty where one does.

    By types alone: a node passes from its floating operands to its floating outputs.
    """
    if not any(_is_float(i.type) for i in model.graph.input):
        return "no floating input"
    if not any(_is_float(o.type) for o in model.graph.output):
        return "no floating output"
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:
        inferred = model
    kinds = {i.name: i.type for i in (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info)}
    reached = {i.name for i in model.graph.input if _is_float(i.type)}
    drawn = False
    for node in model.graph.node:
        captured = {n for a in node.attribute for n in _names(a)}
        if not reached & {*node.input, *captured}:
            continue
        if node.op_type in RANDOM:
            drawn = True
            continue
        reached |= {name for name in node.output if name and (name not in kinds or _is_float(kinds[name]))}
    if any(o.name in reached and _is_float(o.type) for o in model.graph.output):
        return ""
    return "the output is drawn at random" if drawn else "integers or booleans lie on every path"


def _names(attribute: onnx.AttributeProto) -> set[str]:
    graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
    return {name for g in graphs for n in g.node for name in (*n.input, *(k for a in n.attribute for k in _names(a)))}


def feeds_of(case: Any) -> tuple[dict[str, Any], list[Any]]:
    """The inputs of a case's first data set by name, and the outputs that onnx expects."""
    inputs, outputs = case.data_sets[0]
    names = [i.name for i in case.model.graph.input]
    return dict(zip(names, map(_array, inputs), strict=False)), [_array(v) for v in outputs]


def _array(value: Any) -> Any:
    """Types that numpy lacks come as TensorProto."""
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return [_array(v) for v in value] if isinstance(value, list) else value


def unpacked(
    model: onnx.ModelProto, feeds: dict[str, Any], expected: list[Any]
) -> tuple[onnx.ModelProto, dict[str, Any], list[Any]]:
    """A model that takes sequences and optionals, or gives them, as one that takes and gives their tensors."""
    wrapped = [i for i in (*model.graph.input, *model.graph.output) if not i.type.HasField("tensor_type")]
    if not wrapped:
        return model, feeds, expected
    made = onnx.ModelProto()
    made.CopyFrom(model)
    before: list[onnx.NodeProto] = []
    after: list[onnx.NodeProto] = []
    inputs: list[onnx.ValueInfoProto] = []
    outputs: list[onnx.ValueInfoProto] = []
    given: dict[str, Any] = {}
    results: list[Any] = []

    def take(name: str, kind: onnx.TypeProto, value: Any) -> None:
        """Nodes that build ``name`` of tensors."""
        if kind.HasField("optional_type") and value is not None:
            take(f"{name}.some", kind.optional_type.elem_type, value)
            before.append(onnx.helper.make_node("Optional", [f"{name}.some"], [name]))
        elif kind.HasField("optional_type"):
            before.append(onnx.helper.make_node("Optional", [], [name], type=kind.optional_type.elem_type))
        elif kind.HasField("sequence_type") and not value:
            element = kind.sequence_type.elem_type.tensor_type.elem_type
            before.append(onnx.helper.make_node("SequenceEmpty", [], [name], dtype=element))
        elif kind.HasField("sequence_type"):
            for k, part in enumerate(value):
                take(f"{name}.{k}", kind.sequence_type.elem_type, part)
            parts = [f"{name}.{k}" for k in range(len(value))]
            before.append(onnx.helper.make_node("SequenceConstruct", parts, [name]))
        else:
            value = np.asarray(value)
            inputs.append(onnx.helper.make_tensor_value_info(name, kind.tensor_type.elem_type, value.shape))
            given[name] = value

    def give(name: str, kind: onnx.TypeProto, value: Any) -> None:
        """Nodes that read the tensors of ``name``."""
        if kind.HasField("optional_type") and value is not None:
            after.append(onnx.helper.make_node("OptionalGetElement", [name], [f"{name}.some"]))
            give(f"{name}.some", kind.optional_type.elem_type, value)
        elif kind.HasField("sequence_type"):
            for k, part in enumerate(value):
                at = onnx.helper.make_tensor(f"{name}.at{k}", onnx.TensorProto.INT64, [], [k])
                made.graph.initializer.append(at)
                after.append(onnx.helper.make_node("SequenceAt", [name, at.name], [f"{name}.{k}"]))
                give(f"{name}.{k}", kind.sequence_type.elem_type, part)
        elif kind.HasField("tensor_type"):
            value = np.asarray(value)
            outputs.append(onnx.helper.make_tensor_value_info(name, kind.tensor_type.elem_type, value.shape))
            results.append(value)

    for info in model.graph.input:
        if info.type.HasField("tensor_type"):
            inputs.append(info)
            given[info.name] = feeds[info.name]
        else:
            take(info.name, info.type, feeds[info.name])
    for info, value in zip(model.graph.output, expected, strict=True):
        give(info.name, info.type, value)
    body = list(made.graph.node)
    del made.graph.node[:], made.graph.input[:], made.graph.output[:]
    made.graph.node.extend([*before, *body, *after])
    made.graph.input.extend(inputs)
    made.graph.output.extend(outputs)
    return made, given, results


# --- arrays ---------------------------------------------------------------------------------------------------


def is_floating(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and np.asarray(value).dtype.name in (
        "float64", "float32", "float16", "bfloat16",
    )  # fmt: skip


def widened(value: Any) -> Any:
    """Floating arrays (in sequences too) in float64."""
    if isinstance(value, list):
        return [widened(v) for v in value]
    return np.asarray(value, np.float64) if is_floating(value) else value


def moved(x: np.ndarray, rng: np.random.Generator, size: float) -> np.ndarray:
    """``x`` with distinct small noise on finite entries, so that it lies on no kink and in no tie."""
    noise = rng.choice([-1.0, 1.0], x.shape) * rng.uniform(0.3, 1.0, x.shape) * size
    # A small entry keeps its sign.
    noise = np.where((x != 0) & (np.abs(x) < 2 * size), 0.3 * np.abs(x) * np.sign(noise) * np.abs(noise) / size, noise)
    return np.where(np.isfinite(x) & (np.abs(x) < 1e30), x + np.where(np.isfinite(x), noise, 0), x)


def _flat(values: Iterable[Any]) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for value in values:
        found += _flat(value) if isinstance(value, list) else [] if value is None else [np.asarray(value)]
    return found


def _finite(values: Iterable[np.ndarray]) -> list[int]:
    return [int(np.isfinite(np.asarray(v, np.float64)).sum()) if is_floating(v) else 0 for v in values]


# --- executors ------------------------------------------------------------------------------------------------

Run = Callable[[Mapping[str, Any]], list[Any]]


class Optional(OpRun):
    """An optional is what it holds: the evaluator's own wraps it in a list, which only some operators take off."""

    op_domain = ""

    def _run(self, x: Any = None, type: Any = None) -> tuple[Any]:
        return (x,)


class OptionalGetElement(OpRun):
    """What the optional holds."""

    op_domain = ""

    def _run(self, x: Any) -> tuple[Any]:
        return (x,)


def _reference(model: onnx.ModelProto) -> Run:
    from zilc.executors import _FASTER, REPAIRED

    evaluator = onnx.reference.ReferenceEvaluator(model, new_ops=[*_FASTER, *REPAIRED, Optional, OptionalGetElement])

    def run(feeds: Mapping[str, Any]) -> list[Any]:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(evaluator.run(None, dict(feeds)))

    return run


def _runtime(model: onnx.ModelProto) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda feeds: list(session.run(None, dict(feeds)))


@dataclass
class Original:
    """Who runs the original model, in which precision."""

    name: str
    precision: str
    run: Run


def originals(
    model: onnx.ModelProto, double: onnx.ModelProto, feeds: Mapping[str, Any], expected: Sequence[Any]
) -> Iterator[Original]:
    """Executors that give what onnx expects of the case, the most precise first.

    Raises:
        Unexamined: there is none.
    """
    wide = {k: widened(v) for k, v in feeds.items()}
    kinds = {k: np.asarray(v).dtype for k, v in feeds.items() if is_floating(v)}
    # What is double already stays so in the model as it is.
    single = "float64" if {d.name for d in kinds.values()} == {"float64"} else "float32"

    def narrow(run: Run) -> Run:
        return lambda given: run({k: np.asarray(v, kinds[k]) if k in kinds else v for k, v in given.items()})

    notes, found = [], False
    for name, precision, build in (
        ("reference evaluator", "float64", lambda: _reference(double)),
        ("reference evaluator on the function body", "float64", lambda: _reference(to_double(_with_bodies(model)))),
        ("onnxruntime", "float64", lambda: _runtime(double)),
        ("onnxruntime", single, lambda: narrow(_runtime(model))),
        ("onnxruntime at opset 26", single, lambda: narrow(_runtime(lowered(model)))),
        ("reference evaluator", single, lambda: narrow(_reference(model))),
    ):
        try:
            run = build()
            got = run(wide)
        except Exception as error:
            notes.append(f"{name} in {precision}: {_line(error)}")
            continue
        problem = _unlike(got, expected)
        if problem:
            notes.append(f"{name} in {precision}: {problem}")
        else:
            found = True
            yield Original(name, precision, run)
    if not found:
        raise Unexamined("nothing runs the original: " + "; ".join(notes))


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at the newest opset that today's runtimes take."""
    from zilc.passes.prepare import settle_opset

    return settle_opset(model, None, "the model")


def to_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float64, whatever the types of its operators say: the reference evaluator does not ask."""
    from zilc.onnx_io import Source
    from zilc.passes.precision import to_float64
    from zilc.passes.prepare import inline_functions

    return to_float64(inline_functions(Source(model)))


def _with_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    """Operators that ONNX defines by a function body, replaced by it."""
    made = onnx.inliner.inline_selected_functions(model, [], exclude=True, inline_schema_functions=True)
    if [n.op_type for n in made.graph.node] == [n.op_type for n in model.graph.node]:
        raise ValueError("no function body")
    return made


def _unlike(got: Sequence[Any], expected: Sequence[Any]) -> str:
    """How results differ from those that onnx expects; empty where they do not."""
    ours, theirs = _flat(got), _flat(expected)
    if len(ours) != len(theirs):
        return f"{len(ours)} outputs, expected {len(theirs)}"
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape:
            return f"output {k} of shape {a.shape}, expected {b.shape}"
        if not (is_floating(b) and is_floating(a)):
            continue
        rtol = 1e-3 if b.dtype.itemsize > 2 else 5e-2
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = float(np.max(np.abs(y[np.isfinite(y)]), initial=0.0))
        if not np.allclose(x, y, rtol=rtol, atol=rtol * max(scale, 1e-3), equal_nan=True):
            return f"output {k} is not what onnx expects"
    return ""


# --- one case -------------------------------------------------------------------------------------------------


def examine(case: Any, operator: str, base: onnx.ModelProto | None = None) -> Verdict:
    """Hold zilc's gradients of one case against differences.

    Args:
        base: the model of the case whose function body this one is, if it is one.
    """
    began = time.perf_counter()
    verdict = Verdict(case.name, operator, "right")
    try:
        reason = floating_path(case.model)
        if reason:
            raise Unexamined(reason)
        _examine(case, verdict, base)
    except Unexamined as error:
        verdict.status, verdict.reason = "unexamined", str(error)
    except Exception as error:
        from zilc.errors import ZilcError

        refused = isinstance(error, ZilcError)
        verdict.status = "refused" if refused else "wrong"
        verdict.reason = _line(error) if refused else f"{type(error).__name__}: {_line(error)}"
    verdict.seconds = round(time.perf_counter() - began, 3)
    return verdict


@dataclass
class Trial:
    """One case ready to be compared: where it stands, and what the differences say there.

    Attributes:
        model, double: with the tensors of sequences as inputs and outputs; ``double`` in float64.
        feeds: inputs in float64, moved off kinks.
        active: inputs that a gradient reaches, by zilc's word.
        y: trained outputs at ``feeds``.
    """

    model: onnx.ModelProto
    double: onnx.ModelProto
    feeds: dict[str, Any]
    active: list[str]
    y: dict[str, np.ndarray]
    differences: Differences
    who: Original


def _examine(case: Any, verdict: Verdict, base: onnx.ModelProto | None = None) -> None:
    trial = trial_of(case, base)
    verdict.executor = f"{trial.who.name}, {trial.who.precision}"
    _compare(trial, verdict)


def trial_of(case: Any, base: onnx.ModelProto | None = None) -> Trial:
    """Inputs, outputs and differences of a case.

    Raises:
        Unexamined: nothing runs the original, or there is nothing to compare.
    """
    model, given, expected = unpacked(case.model, *feeds_of(case))
    double = to_double(model)
    executors = originals(model, double, given, expected)
    who = next(executors)
    names = [o.name for o in model.graph.output]
    chosen = [
        o.name
        for o in model.graph.output
        if o.type.HasField("tensor_type") and o.type.tensor_type.elem_type in FLOATS and o.name not in by_the_way(model)
    ]
    floating = [
        i.name
        for i in model.graph.input
        if i.type.HasField("tensor_type") and i.type.tensor_type.elem_type in FLOATS and i.name in given
    ]
    if not chosen or not floating:
        raise Unexamined("floating inputs or outputs are empty sequences")
    active = _active(model, floating, chosen)
    untouched = still(base or model, active)
    movable = [n for n in floating if n not in untouched]
    best = None
    for candidate in itertools.chain([who], executors):
        who = candidate
        for attempt in range(4):
            rng = np.random.default_rng(attempt)
            feeds, values = _move(given, movable, who, rng)
            y = {n: np.asarray(v, np.float64) for n, v in zip(names, values, strict=True) if n in chosen}
            trial = _differences(movable, feeds, names, y, who, rng, scaled=attempt % 2 == 0)
            best = best or (feeds, y, trial, who)
            if trial.smooth:
                break
        if trial.smooth:
            best = (feeds, y, trial, who)
            break
    assert best is not None
    feeds, y, trial, who = best
    return Trial(model, double, feeds, active, y, trial, who)


def _move(
    given: Mapping[str, Any], movable: Sequence[str], who: Original, rng: np.random.Generator
) -> tuple[dict[str, Any], list[Any]]:
    """Inputs moved off kinks, as far as outputs keep their shapes and stay finite, and the outputs there."""
    base = {k: widened(v) for k, v in given.items()}
    first = who.run(base)
    for size in (0.02, 0.002):
        feeds = {**base, **{name: moved(base[name], rng, size) for name in movable}}
        try:
            values = who.run(feeds)
        except Exception:
            continue
        same = [v.shape for v in _flat(values)] == [v.shape for v in _flat(first)]
        if same and all(a >= b for a, b in zip(_finite(_flat(values)), _finite(_flat(first)), strict=True)):
            return feeds, values
    return base, first


def still(model: onnx.ModelProto, active: Sequence[str]) -> set[str]:
    """Inputs that stay as they are and unexamined: zilc passes nothing to them, and ONNX's schemas or a convention
    say of every operator that reads them that it is not differentiable there.
    """
    held: dict[str, bool] = {}
    versions = {o.domain: o.version for o in model.opset_import}
    for node in model.graph.node:
        try:
            schema = onnx.defs.get_schema(node.op_type, versions.get(node.domain, versions.get("", 18)), node.domain)
        except onnx.defs.SchemaError:
            schema = None
        for k, name in enumerate(node.input):
            held[name] = held.get(name, True) and schema is not None and _tagged(node.op_type, schema, k)
    return {i.name for i in model.graph.input if held.get(i.name) and i.name not in active}


def by_the_way(model: onnx.ModelProto) -> set[str]:
    """Outputs that are not trained."""
    return {n for node in model.graph.node if node.op_type in BY_THE_WAY for n in node.output[BY_THE_WAY[node.op_type]]}


def _tagged(op: str, schema: Any, operand: int) -> bool:
    if operand in FROZEN.get(op, ()):
        return True
    formal = schema.inputs[min(operand, len(schema.inputs) - 1)]
    return formal.differentiation_category == onnx.defs.OpSchema.DifferentiationCategory.NonDifferentiable


@dataclass
class Differences:
    """Directional derivatives of <cotangents, outputs>, input by input.

    Attributes:
        slopes: (direction, slope) pairs by input; the direction is zero on entries that are not finite.
        cotangents: by output; zero where the output is not finite.
        smooth: slopes at two steps agree.
    """

    slopes: dict[str, list[tuple[np.ndarray, float]]]
    cotangents: dict[str, np.ndarray]
    smooth: bool


def _size(v: np.ndarray) -> float:
    """The size of an array's finite entries: a cotangent of this size survives the subtraction of a target."""
    finite = v[np.isfinite(v)]
    return float(np.sqrt(np.mean(np.square(finite)))) or 1.0 if finite.size else 1.0


def _differences(
    movable: Sequence[str], feeds: Mapping[str, Any], names: Sequence[str],
    y: Mapping[str, np.ndarray], who: Original, rng: np.random.Generator, *, scaled: bool,
) -> Differences:  # fmt: skip
    """``scaled``: steps are relative to the size of the input, not to 1."""
    cotangents = {
        n: np.where(np.isfinite(v), rng.standard_normal(v.shape) * _size(v), 0.0).reshape(v.shape) for n, v in y.items()
    }

    def along(name: str, v: np.ndarray, h: float) -> float:
        ends = []
        for sign in (1.0, -1.0):
            values = who.run({**feeds, name: feeds[name] + sign * h * v})
            ends.append({n: np.asarray(u, np.float64) for n, u in zip(names, values, strict=True) if n in y})
        total = 0.0
        for n, c in cotangents.items():
            change = np.where(np.isfinite(y[n]), ends[0][n] - ends[1][n], 0.0)
            total += float(np.sum(c * change))
        return total / (2 * h)

    slopes: dict[str, list[tuple[np.ndarray, float]]] = {}
    floor = max(1.0, *(float(np.linalg.norm(c)) for c in cotangents.values()))
    smooth = True
    for name in movable:
        x = feeds[name]
        slopes[name] = []
        if x.size == 0:
            continue
        usable = np.isfinite(x) & (np.abs(x) < 1e30)
        scale = max(1.0, float(np.sqrt(np.mean(np.square(x[usable]))))) if usable.any() else 1.0
        h = STEP[who.precision] * (scale if scaled else 1.0)
        for _ in range(DIRECTIONS):
            v = np.where(usable, rng.uniform(0.3, 1.0, x.shape) * rng.choice([-1.0, 1.0], x.shape), 0.0)
            slope = along(name, v, h)
            if who.precision == "float64":
                other = along(name, v, h / 4)
                size = max(abs(slope), abs(other), 1e-3 * floor * float(np.linalg.norm(v)))
                smooth = smooth and abs(slope - other) <= 2e-6 * size
                # Richardson: the h^2 term cancels.
                slope = (16 * other - slope) / 15
            slopes[name].append((v, slope))
    return Differences(slopes, cotangents, smooth)


def _opsets(model: onnx.ModelProto) -> tuple[int | None, ...]:
    """The opset that zilc settles on by itself, then the model's own where that is newer than today's runtimes."""
    own = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=18)
    return (None, own) if own > 26 else (None,)


def _first(attempts: Sequence[Callable[[], Any]], what: type[Exception]) -> Any:
    """What the first attempt gives that does not fail; all reasons where all do."""
    errors: list[Exception] = []
    for attempt in attempts:
        try:
            return attempt()
        except what as error:
            errors.append(error)
    # The last attempt is the most willing one.
    raise errors[-1]


def _active(model: onnx.ModelProto, floating: Sequence[str], outputs: Sequence[str]) -> list[str]:
    """The inputs that a gradient reaches, by zilc's word."""
    from zilc.analysis import structure
    from zilc.errors import ModelError

    def leaves(opset: int | None) -> list[str]:
        found = structure(model, output=list(outputs), opset=opset)
        return [n for n in floating if n in set(found.flow.leaves)]

    return _first([partial(leaves, opset) for opset in _opsets(model)], ModelError)


def _emit(model: onnx.ModelProto, active: Sequence[str], outputs: Sequence[str]) -> Any:
    """The gradient graph through the public path."""
    from zilc import pipeline
    from zilc.errors import ModelError

    def emitted(opset: int | None) -> Any:
        return pipeline.emit_training(
            model, wrt=list(active), output=list(outputs), loss="energy", outputs="grad", opset=opset
        )

    return _first([partial(emitted, opset) for opset in _opsets(model)], ModelError)


def _emit_double(
    model: onnx.ModelProto, double: onnx.ModelProto, active: Sequence[str], outputs: Sequence[str]
) -> tuple[Any, onnx.ModelProto]:
    """The signature's owner, and the gradient graph in float64.

    Where an operator's types leave float64 out, the graph is emitted from the model as it is, and then widened: the
    reference evaluator computes it all the same.
    """
    from zilc.passes.precision import to_float64

    try:
        step = _emit(double, active, outputs)
        return step, step.model
    except Exception as error:
        if "Inference" not in str(error) and "type" not in str(error):
            raise
    step = _emit(model, active, outputs)
    return step, to_float64(step.model)


def _masked(model: onnx.ModelProto, y: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The model with a Where behind each output that is not finite everywhere: an energy needs finite numbers."""
    bad = [n for n, v in y.items() if not np.isfinite(v).all()]
    if not bad:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for info in made.graph.output:
        if info.name in bad:
            old, new = info.name, f"{info.name}.exam"
            for node in made.graph.node:
                node.output[:] = [new if n == old else n for n in node.output]
                node.input[:] = [new if n == old else n for n in node.input]
            kind = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            mask = onnx.numpy_helper.from_array(np.isfinite(y[old]), f"{new}.mask")
            zero = onnx.numpy_helper.from_array(np.zeros((), kind), f"{new}.zero")
            made.graph.initializer.extend([mask, zero])
            made.graph.node.append(onnx.helper.make_node("Where", [mask.name, new, zero.name], [old]))
    return made


def _gradients(
    step: Any, model: onnx.ModelProto, run: Run, feeds: Mapping[str, Any], y: Mapping[str, np.ndarray],
    cotangents: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Feed targets y - c, so that the error of each output is c, and collect the gradients by input."""
    kinds = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
    given = {}
    for name, value in feeds.items():
        if name in kinds:
            given[name] = (
                np.asarray(value, onnx.helper.tensor_dtype_to_np_dtype(kinds[name])) if is_floating(value) else value
            )
    for target in step.signature["targets"]:
        kind = onnx.helper.tensor_dtype_to_np_dtype(kinds[target["name"]])
        finite = np.where(np.isfinite(y[target["output"]]), y[target["output"]], 0.0)
        given[target["name"]] = np.asarray(finite - cotangents[target["output"]], kind)
    values = run(given)
    by_name = dict(zip([o.name for o in model.graph.output], values, strict=True))
    return {leaf["name"]: np.asarray(by_name[leaf["grad"]], np.float64) for leaf in step.signature["input_grads"]}


def _compare(whole: Trial, verdict: Verdict) -> None:
    model, feeds, active, y, trial = whole.model, whole.feeds, whole.active, whole.y, whole.differences
    gradients: dict[str, np.ndarray] = {}
    if active:
        step, emitted = _emit_double(_masked(model, y), _masked(whole.double, y), active, list(y))
        gradients = _gradients(step, emitted, _either(emitted), feeds, y, trial.cotangents)
    judge(whole, gradients, verdict, "zilc")
    verdict.zero = not active
    if verdict.status == "right" and active:
        verdict.runtime = _in_runtime(model, feeds, active, y, trial, gradients)
        if verdict.runtime not in ("runs", NO_KERNEL, OTHERWISE):
            verdict.status, verdict.reason = "wrong", f"in onnxruntime: {verdict.runtime}"


def judge(
    whole: Trial, gradients: Mapping[str, np.ndarray], verdict: Verdict, who: str, tolerance: float = 0.0
) -> None:
    """Hold gradients by input against the differences; an input without one is said to have none.

    ``tolerance`` may only widen the one that the differences allow: for gradients that were computed in float32.
    """
    trial, feeds, precision = whole.differences, whole.feeds, whole.who.precision
    faults = []
    # Where the derivative is 0, differences hold nothing but rounding.
    floor = 1e-2 + 1e-3 * max(float(np.linalg.norm(c)) for c in trial.cotangents.values())
    for name, slopes in trial.slopes.items():
        g = gradients.get(name)
        if g is not None and g.shape != feeds[name].shape:
            faults.append(f"{name}: gradient of shape {g.shape}, expected {feeds[name].shape}")
            continue
        if g is not None and not np.isfinite(g).all():
            faults.append(f"{name}: gradient is not finite")
            continue
        worst = 0.0
        for v, slope in slopes:
            exact = float(np.sum(g * v)) if g is not None else 0.0
            scale = max(float(np.linalg.norm(g) * np.linalg.norm(v)) if g is not None else 0.0, abs(slope), floor)
            worst = max(worst, abs(exact - slope) / scale)
        verdict.inputs[name] = worst
        if worst > max(TOLERANCE[precision], tolerance):
            said = f"{who} says that no gradient flows, and the output moves" if g is None else f"error {worst:.2g}"
            faults.append(f"{name}: {said}")
    verdict.error = max(verdict.inputs.values(), default=0.0)
    if faults:
        kink = "" if trial.smooth else " (the differences do not settle: a kink nearby)"
        verdict.status, verdict.reason = "wrong", "; ".join(faults) + kink


def _either(model: onnx.ModelProto) -> Run:
    """A float64 graph in ONNX's reference evaluator, with function bodies where those lack float64, or onnxruntime."""

    def run(feeds: Mapping[str, Any]) -> list[Any]:
        errors = []
        for build in (
            lambda: _reference(model),
            lambda: _reference(to_double(_with_bodies(model))),
            lambda: _runtime(model),
        ):
            try:
                return build()(feeds)
            except Exception as error:
                errors.append(_line(error))
        raise RuntimeError("nothing runs the emitted graph: " + "; ".join(errors))

    return run


def _in_runtime(
    model: onnx.ModelProto, feeds: Mapping[str, Any], active: Sequence[str], y: Mapping[str, np.ndarray],
    trial: Differences, gradients: Mapping[str, np.ndarray],
) -> str:  # fmt: skip
    """The gradient graph of the model as it is, in ONNX Runtime's CPU provider, beside the one in float64."""
    kinds = {i.name: i.type.tensor_type.elem_type for i in model.graph.input if i.type.HasField("tensor_type")}
    narrow = {
        k: np.asarray(v, onnx.helper.tensor_dtype_to_np_dtype(kinds[k])) if is_floating(v) else v
        for k, v in feeds.items()
    }
    try:
        values = dict(zip([o.name for o in model.graph.output], _runtime(lowered(model))(narrow), strict=True))
    except Exception:
        return NO_KERNEL
    if _unlike([values[n] for n in y], [np.asarray(v, np.asarray(values[n]).dtype) for n, v in y.items()]):
        return OTHERWISE
    step = _emit(_masked(model, y), active, list(y))
    try:
        got = _gradients(step, step.model, _runtime(step.model), feeds, y, trial.cotangents)
    except Exception as error:
        return _line(error)
    tolerance = max(
        RUNTIME_TOLERANCE[onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type).name]
        for i in (*model.graph.input, *model.graph.output)
        if i.type.tensor_type.elem_type in FLOATS
    )
    for name, g in got.items():
        truth = gradients[name]
        if not np.isfinite(g).all():
            return f"gradient of {name} is not finite"
        scale = max(float(np.linalg.norm(truth)), 1e-2)
        off = float(np.linalg.norm(g - truth)) / scale
        if off > tolerance:
            return f"gradient of {name} is off by {off:.2g}"
    return "runs"


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400]


# --- all cases ------------------------------------------------------------------------------------------------


def _worker(pipe: Any) -> None:
    warnings.simplefilter("ignore")
    cases = load_cases()
    operators = operators_of(cases)
    while True:
        name = pipe.recv()
        if name is None:
            return
        base = cases[_base(name, cases)].model
        pipe.send(asdict(examine(cases[name], operators[name], base)))


def sit(
    names: Sequence[str], operators: Mapping[str, str], *, processes: int = 2, limit: float = LIMIT,
    progress: Callable[[Verdict], None] | None = None,
) -> list[Verdict]:  # fmt: skip
    """Examine cases in worker processes; one that takes too long, or takes its process with it, is wrong."""
    context = multiprocessing.get_context("spawn")
    todo = list(reversed(names))
    done: dict[str, Verdict] = {}
    at_work: dict[Any, tuple[Any, str, float]] = {}

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        hand_out(ours, process, grace=60.0)

    def hand_out(pipe: Any, process: Any, grace: float = 0.0) -> None:
        if todo:
            name = todo.pop()
            pipe.send(name)
            at_work[pipe] = (process, name, time.monotonic() + limit + grace)
        else:
            pipe.send(None)

    def settle(verdict: Verdict) -> None:
        done[verdict.case] = verdict
        if progress:
            progress(verdict)

    for _ in range(min(processes, len(todo))):
        start()
    while at_work:
        ready: list[Any] = multiprocessing.connection.wait(list(at_work), timeout=1.0)
        for pipe in ready:
            process, name, _ = at_work.pop(pipe)
            try:
                verdict = Verdict(**dict(pipe.recv()))
            except (EOFError, OSError):
                process.join()
                settle(Verdict(name, operators[name], "wrong", f"the process died ({process.exitcode})"))
                start()
                continue
            settle(verdict)
            hand_out(pipe, process)
        for pipe, (process, name, until) in list(at_work.items()):
            if time.monotonic() > until:
                del at_work[pipe]
                process.terminate()
                settle(Verdict(name, operators[name], "wrong", f"took more than {limit:.0f} s", seconds=limit))
                if todo:
                    start()
    return [done[name] for name in names if name in done]


# --- reports --------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One operator's cases."""

    operator: str
    right: int = 0
    examined: int = 0
    unexamined: int = 0
    reasons: Counter = field(default_factory=Counter)
    zero: int = 0


def rows_of(verdicts: Iterable[Verdict]) -> list[Row]:
    rows: dict[str, Row] = {}
    for v in verdicts:
        row = rows.setdefault(v.operator, Row(v.operator))
        if v.status == "unexamined":
            row.unexamined += 1
        else:
            row.examined += 1
            row.right += v.status == "right"
            row.zero += v.status == "right" and v.zero
        if v.status != "right":
            row.reasons[f"{v.status}: {v.reason}"] += 1
    return [rows[k] for k in sorted(rows, key=lambda k: ("." in k, k))]


def no_path(v: Verdict) -> bool:
    """Whether a case stays outside because nothing in it is differentiable."""
    return v.status == "unexamined" and not v.reason.startswith("nothing runs")


def totals(verdicts: Sequence[Verdict]) -> dict[str, int]:
    inside = [v for v in verdicts if not no_path(v)]
    return {
        "node tests": len(verdicts),
        "no floating path": len(verdicts) - len(inside),
        "floating path": len(inside),
        "unexamined": sum(v.status == "unexamined" for v in inside),
        "examined": sum(v.status != "unexamined" for v in inside),
        "right": sum(v.status == "right" for v in inside),
        "refused": sum(v.status == "refused" for v in inside),
        "wrong": sum(v.status == "wrong" for v in inside),
        "run in onnxruntime": sum(v.runtime == "runs" for v in inside),
    }


def environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.machine()} {_cpu()}".strip()}
    for package in ("zilc", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def print_table(verdicts: Sequence[Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="ONNX's node tests", title_justify="left")
    for title, justify in (("operator", "left"), ("right", "right"), ("of", "right"), ("why not the rest", "left")):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows_of(verdicts):
        if not row.examined and all(not r.startswith("unexamined: nothing") for r in row.reasons):
            continue
        why = "\n".join(f"{count} × {reason}" for reason, count in row.reasons.most_common())
        style = None if row.right == row.examined else "red"
        table.add_row(row.operator, str(row.right), str(row.examined), why, style=style)
    console.print(table)
    for key, count in totals(verdicts).items():
        console.print(f"{key:<20}{count:>6}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", action="append", default=[], metavar="OP", help="an operator, or a case")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for each case")
    parser.add_argument("--failures", action="store_true", help="list the cases that are not right, one a line")
    parser.add_argument("--verdicts", type=Path, help="print and write what an exam gave as JSON, without another one")
    parser.add_argument("--write", type=Path, help="where the table goes (docs/OPERATORS.md after a whole exam)")
    args = parser.parse_args(argv)

    wanted = set(args.only)
    if args.verdicts:
        verdicts = [Verdict(**v) for v in json.loads(args.verdicts.read_text("utf-8"))["cases"]]
        return _report(verdicts, args, None if wanted else ROOT / "docs" / "OPERATORS.md")
    operators = operators_of(load_cases())
    names = [n for n, op in operators.items() if not wanted or op in wanted or n in wanted]
    if not names:
        print(f"no node test of {', '.join(args.only)}", file=sys.stderr)
        return 2
    began, count = time.perf_counter(), 0

    def progress(verdict: Verdict) -> None:
        nonlocal count
        count += 1
        if sys.stderr.isatty() or count % 100 == 0 or count == len(names):
            print(f"\r{count}/{len(names)} {time.perf_counter() - began:.0f} s", end="", file=sys.stderr, flush=True)

    verdicts = sit(names, operators, processes=args.processes, limit=args.limit, progress=progress)
    print(file=sys.stderr)
    return _report(verdicts, args, None if wanted else ROOT / "docs" / "OPERATORS.md")


def _report(verdicts: Sequence[Verdict], args: argparse.Namespace, page: Path | None) -> int:
    """The page and what is printed; the exit status."""
    target = args.write or page
    if target is not None:
        target.parent.mkdir(exist_ok=True)
        target.write_text(markdown(verdicts))
    if args.json:
        document = {"environment": environment(), "totals": totals(verdicts), "cases": [asdict(v) for v in verdicts]}
        print(json.dumps(document, indent=1))
    elif args.failures:
        for v in verdicts:
            if v.status != "right" and not no_path(v):
                print(f"{v.operator}\t{v.case}\t{v.status}\t{v.reason}")
        print(totals(verdicts))
    else:
        print_table(verdicts)
    return 0 if all(v.status == "right" or no_path(v) for v in verdicts) else 1


def rivals_of(path: Path = ROOT / "docs" / "rivals.json") -> tuple[dict[str, str], dict[str, Counter]]:
    """Other tools with their versions, and (operator, status) counts of each, as tools/rivals.py left them.

    Both are empty where the file is not there.
    """
    if not path.is_file():
        return {}, {}
    document = json.loads(path.read_text("utf-8"))
    versions = {tool: f"{tool} {facts['versions'][tool]}" for tool, facts in document["tools"].items()}
    counts: dict[str, Counter] = {tool: Counter() for tool in versions}
    for operator, *answers in document["cases"].values():
        for tool, k in zip(document["columns"][1:], answers, strict=True):
            counts[tool][operator, document["answers"][k][0]] += 1
    return versions, counts


def _rival_cell(count: Counter, operator: str) -> str:
    """Right of all, and how many are wrong: to refuse is no fault."""
    right, refused, wrong = (count[operator, status] for status in ("right", "refused", "wrong"))
    if not right + refused + wrong:
        return ""
    return f"{right} of {right + refused + wrong}" + (f", {wrong} wrong" if wrong else "")


def _rival_lines(versions: Mapping[str, str], counts: Mapping[str, Counter]) -> list[str]:
    """What the page says of the other tools."""
    if not versions:
        return []
    lines = [
        "",
        "**Other tools** (`make rivals`) get the same cases, inputs, directions and tolerances; what computes in",
        f"float32 is allowed {TOLERANCE['float32']:g}. A column says how many gradients are right, how many wrong;",
        "the others are refused, by case and with the reason in [rivals.json](rivals.json). They were made for other",
        "ends: onnx-ad needs axes, indices and sizes as constants, which the node tests give as inputs;",
        "onnxruntime-training has gradients for the operators that PyTorch's exporter emitted, up to opset "
        f"{TRAINING_OPSET}.",
        "",
        "| tool | right | refused | wrong |",
        "| --- | ---: | ---: | ---: |",
    ]
    for tool, name in versions.items():
        total: Counter[str] = Counter()
        for (_, status), n in counts[tool].items():
            total[status] += n
        lines.append(f"| {name} | {total['right']} | {total['refused']} | {total['wrong']} |")
    return lines


def markdown(verdicts: Sequence[Verdict]) -> str:
    """docs/OPERATORS.md."""
    from zilc.coverage import operators
    from zilc.onnx_io import MAX_OPSET

    count = totals(verdicts)
    status = {row["operator"]: row["status"] for row in operators(onnx.defs.onnx_opset_version())["operators"]}
    lines = [
        "# Operators",
        "",
        "`make exam` writes this page: every node test of ONNX whose model has a floating path from an input to an",
        "output. The gradient of every floating input is emitted, computed in float64, and compared by inner products",
        f"along {DIRECTIONS} random directions an input with central differences of the original model.",
        "",
        f"| {' | '.join(count)} |",
        f"|{' ---: |' * len(count)}",
        f"| {' | '.join(map(str, count.values()))} |",
        "",
        "Machine and versions: " + ", ".join(f"{key} {value}" for key, value in environment().items()) + ".",
        "",
        "- **Tolerances**, relative to |gradient| |direction|: "
        + ", ".join(f"{TOLERANCE[k]:g} where the original runs in {k} (steps of {STEP[k]:g})" for k in TOLERANCE) + ".",
        "- **Inputs** are moved by up to 0.02, each entry differently, off kinks and ties; entries that are not",
        "  finite stay as they are. Integers and booleans stay. Directions along which the differences do not settle",
        "  are drawn again.",
        "- **The original** is run by ONNX's reference evaluator (repaired where it is wrong or rounds to float32), or",
        "  by ONNX Runtime; who runs it must first give what ONNX expects of the case.",
        "- **In ONNX Runtime**: wherever its CPU provider runs the original (lowered to opset "
        f"{MAX_OPSET} where it is newer), the",
        "  emitted graph must run in the model's own types, and its gradients agree with those in float64 to "
        + ", ".join(f"{v:g} ({k})" for k, v in RUNTIME_TOLERANCE.items()) + ".",
        "- **zero**: right, and the derivative is zero everywhere: zilc says that none flows, the differences agree.",
        "- Expanded function bodies count for their function. Running statistics of BatchNormalization, regions and",
        "  scales of Resize and the limit of Range carry no gradient by convention.",
    ]
    versions, counts = rivals_of()
    lines += _rival_lines(versions, counts)
    heads = "".join(f" {name} |" for name in versions.values())
    lines += [
        "",
        f"| operator | in zilc | right | of | zero | in ONNX Runtime | no floating path | why not the rest |{heads}",
        f"| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |{' --- |' * len(versions)}",
    ]
    runs = Counter(v.operator for v in verdicts if v.runtime == "runs")
    outside = Counter(v.operator for v in verdicts if no_path(v))
    for row in rows_of(verdicts):
        missing = sum(n for r, n in row.reasons.items() if r.startswith("unexamined: nothing"))
        if not row.examined and not missing:
            continue
        kept = [(r, n) for r, n in row.reasons.most_common() if not r.startswith("unexamined") or "nothing runs" in r]
        why = "; ".join(f"{n} × {_cell(r)}" for r, n in kept)
        lines.append(
            f"| {row.operator} | {status.get(row.operator, 'other domain')} | {row.right} | {row.examined + missing} "
            f"| {row.zero} | {runs[row.operator]} | {outside[row.operator]} | {why} |"
            + "".join(f" {_rival_cell(counts[tool], row.operator)} |" for tool in versions)
        )
    reasons = Counter(v.reason for v in verdicts if no_path(v))
    outside_of = ", ".join(f"{r} {n}" for r, n in reasons.most_common())
    lines += ["", f"Node tests without a floating path: {outside_of}."]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if len(text) <= 160 else text[:157] + "..."


if __name__ == "__main__":
    sys.exit(main())
