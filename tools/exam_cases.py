"""What the exam asks: node tests, their arrays, and who runs their models as they are."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.inliner
import onnx.numpy_helper
import onnx.reference
import onnx.shape_inference

FLOATS = frozenset(
    (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
)

#: Operators whose output is drawn, not computed: there is no path to differentiate.
RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


class Unexamined(Exception):
    """The case has no floating path, or nothing runs its model."""


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400]


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


def base_of(name: str, cases: Mapping[str, Any]) -> str:
    """The case whose function body this one is, or itself."""
    base = name
    while "_expanded" in base:
        base = base[: base.rindex("_expanded")]
        if base in cases:
            return base
    return name


def _operator(name: str, cases: Mapping[str, Any]) -> str:
    nodes = cases[base_of(name, cases)].model.graph.node
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


def flattened(values: Iterable[Any]) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for value in values:
        found += flattened(value) if isinstance(value, list) else [] if value is None else [np.asarray(value)]
    return found


def finite_counts(values: Iterable[np.ndarray]) -> list[int]:
    return [int(np.isfinite(np.asarray(v, np.float64)).sum()) if is_floating(v) else 0 for v in values]


# --- executors ------------------------------------------------------------------------------------------------

Run = Callable[[Mapping[str, Any]], list[Any]]


def reference_run(model: onnx.ModelProto) -> Run:
    from zilc.executors import _FASTER, REPAIRED

    evaluator = onnx.reference.ReferenceEvaluator(model, new_ops=[*_FASTER, *REPAIRED])

    def run(feeds: Mapping[str, Any]) -> list[Any]:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(evaluator.run(None, dict(feeds)))

    return run


def runtime_run(model: onnx.ModelProto) -> Run:
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
        ("reference evaluator", "float64", lambda: reference_run(double)),
        ("reference evaluator on the function body", "float64", lambda: reference_run(to_double(with_bodies(model)))),
        ("onnxruntime", "float64", lambda: runtime_run(double)),
        ("onnxruntime", single, lambda: narrow(runtime_run(model))),
        ("onnxruntime at opset 26", single, lambda: narrow(runtime_run(lowered(model)))),
        ("reference evaluator", single, lambda: narrow(reference_run(model))),
    ):
        try:
            run = build()
            got = run(wide)
        except Exception as error:
            notes.append(f"{name} in {precision}: {first_line(error)}")
            continue
        problem = difference_from(got, expected)
        if problem:
            notes.append(f"{name} in {precision}: {problem}")
        else:
            found = True
            yield Original(name, precision, run)
    if not found:
        raise Unexamined("nothing runs the original: " + "; ".join(notes))


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at the newest opset that today's runtimes take."""
    from zilc.passes.opset import settle_opset

    return settle_opset(model, None, "the model")


def to_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float64, whatever the types of its operators say: the reference evaluator does not ask."""
    from zilc.onnx_io import Source
    from zilc.passes.precision import to_float64
    from zilc.passes.prepare import inline_functions

    return to_float64(inline_functions(Source(model)))


def with_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    """Operators that ONNX defines by a function body, replaced by it."""
    made = onnx.inliner.inline_selected_functions(model, [], exclude=True, inline_schema_functions=True)
    if [n.op_type for n in made.graph.node] == [n.op_type for n in model.graph.node]:
        raise ValueError("no function body")
    return made


def difference_from(got: Sequence[Any], expected: Sequence[Any]) -> str:
    """How results differ from those that onnx expects; empty where they do not."""
    ours, theirs = flattened(got), flattened(expected)
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
