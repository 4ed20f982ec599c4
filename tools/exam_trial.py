"""One case of the exam: the emitted gradient held against differences of the original model, and in ONNX Runtime."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper

from tools.exam_cases import (
    FLOATS,
    Original,
    Run,
    Unexamined,
    difference_from,
    feeds_of,
    finite_counts,
    first_line,
    flattened,
    floating_path,
    is_floating,
    lowered,
    moved,
    originals,
    reference_run,
    runtime_run,
    to_double,
    unpacked,
    widened,
    with_bodies,
)

#: Random directions for each input.
DIRECTIONS = 3
#: Relative step of the differences and largest error accepted, relative to |gradient| |direction|, by what the
#: executor of the original computes in.  float64: truncation h^2 and rounding 2^-53 / h are both near 1e-10, and
#: a third derivative of 1e3 is still allowed for.  float32: rounding 2^-24 / h, h^2 truncation.
STEP = {"float64": 1e-5, "float32": 1e-2}
TOLERANCE = {"float64": 1e-6, "float32": 2e-2}
#: How far the gradients of the model as it is, in ONNX Runtime, may be from those in float64: |a - b| / |b|.
RUNTIME_TOLERANCE = {"float64": 1e-6, "float32": 2e-3, "float16": 5e-2, "bfloat16": 2e-1}

#: Why ONNX Runtime is not asked.
NO_KERNEL, OTHERWISE = "has no kernel for the original", "computes the original otherwise than ONNX says"

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
        verdict.reason = first_line(error) if refused else f"{type(error).__name__}: {first_line(error)}"
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
        same = [v.shape for v in flattened(values)] == [v.shape for v in flattened(first)]
        counts = zip(finite_counts(flattened(values)), finite_counts(flattened(first)), strict=True)
        if same and all(a >= b for a, b in counts):
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
        gradients = _gradients(step, emitted, either_run(emitted), feeds, y, trial.cotangents)
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


def either_run(model: onnx.ModelProto) -> Run:
    """A float64 graph in ONNX's reference evaluator, with function bodies where those lack float64, or onnxruntime."""

    def run(feeds: Mapping[str, Any]) -> list[Any]:
        errors = []
        for build in (
            lambda: reference_run(model),
            lambda: reference_run(to_double(with_bodies(model))),
            lambda: runtime_run(model),
        ):
            try:
                return build()(feeds)
            except Exception as error:
                errors.append(first_line(error))
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
        values = dict(zip([o.name for o in model.graph.output], runtime_run(lowered(model))(narrow), strict=True))
    except Exception:
        return NO_KERNEL
    if difference_from([values[n] for n in y], [np.asarray(v, np.asarray(values[n]).dtype) for n, v in y.items()]):
        return OTHERWISE
    step = _emit(_masked(model, y), active, list(y))
    try:
        got = _gradients(step, step.model, runtime_run(step.model), feeds, y, trial.cotangents)
    except Exception as error:
        return first_line(error)
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
