"""Is the emitted update right?  Z-IL against emitted BP bit by bit, and against central differences of the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx

from zilc import ir, onnx_io
from zilc.analysis import Names, Structure, name_list, structure
from zilc.errors import DataError, OptionError, ZilcError
from zilc.executors import Executor, executor
from zilc.feeds import BATCH, STATISTICS_BATCH, arrays, checked_feeds, random_feeds, random_target
from zilc.onnx_io import ModelSource, Source
from zilc.passes.precision import to_float64
from zilc.passes.prepare import inline_functions
from zilc.passes.train_mode import TrainMode
from zilc.pipeline import Mode, TrainingStep, emit_training, settle_losses

#: Largest directional error accepted, relative to |gradient| |direction|.  Central differences in float64 with a
#: relative step of 1e-5 are good to about 1e-8; float32 gradients of deep networks reach 1e-3 (ZIL.md, section 8).
TOLERANCE = {"float64": 1e-5, "float32": 5e-3}
#: Sizes of a step relative to the parameter's norm.  Where a Relu or a MaxPool switches within a step, an error stays
#: that is not the gradient's: then a shorter step is taken.  Where the gradient is next to zero beside the others', as
#: that of a bias whose mean the batch takes away again, the loss's rounding swamps a short step: then a longer one is
#: taken.  A wrong gradient is wrong along each of them.
STEPS = (1e-5, 1e-3, 1e-7, 1e-9)
_TRAINING_FORM = "the model in training form: batch statistics, masks held"


@dataclass
class Verification:
    """What :func:`verify` found.

    Attributes:
        data: the report as data.
        passed: bits agree everywhere, and every directional difference is within tolerance.
    """

    data: dict[str, Any]

    @property
    def passed(self) -> bool:
        return bool(self.data["passed"])


def verify(
    model: ModelSource | Source,
    *,
    loss: str | Mapping[str, str] | Sequence[str] = "energy",
    class_axis: int = -1,
    output: Names = None,
    wrt: Names = None,
    freeze: Names = None,
    tie: Sequence[tuple[str, str]] | Mapping[str, str] = (),
    dims: Mapping[str, int] | None = None,
    opset: int | None = None,
    mode: Mode = "eval",
    precision: Literal["float32", "float64"] = "float32",
    inputs: str | os.PathLike[str] | Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    directions: int = 3,
    base_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **dynamics: Any,
) -> Verification:
    """Compare the emitted Z-IL with the emitted BP, and with the model itself, on the same feeds.

    Args:
        mode: with ``train``, differences are of the model in training form, with batch statistics and with the masks
            of ``seed`` and step 0 held: a function that the file itself does not compute.
        precision: of the training graphs; central differences are always taken in float64.
        inputs: arrays by input name (and targets), or an .npz file of them; by default random ones.
        directions: random directions a parameter.
        progress: called with (done, total) forward passes; those that a shorter step repeats are not counted.
        straight_through (among ``dynamics``): differences are those of the straight-through line
            (:mod:`zilc.surrogate`), never of the rounding function.
        dynamics: how the gradient is computed: ``algorithm``, ``identities``, ``schedule`` and so on; by default Z-IL's
            wavefront.  Of the literal schedule no equal bits are asked: it may give a zero another sign.
        Everything else as for :func:`zilc.emit_training`.

    Raises:
        ZilcError: see :mod:`zilc.errors`.
    """
    if precision not in TOLERANCE:
        raise OptionError(f"no precision '{precision}'", where="--precision", hint="Choose float32 or float64.")
    source = onnx_io.load(model, base_dir=base_dir)
    straight = bool(dynamics.pop("straight_through", False))
    unrounded = source
    if straight:
        if precision != "float32":
            raise OptionError("quantised models have no float64 form", where="--precision", hint="Choose float32.")
        if mode == "train":
            raise OptionError(
                "the straight-through line is that of the inference form", where="--mode", hint="Leave it out."
            )
        unrounded = _unrounded(source, inputs, seed, output, dims or {}, wrt)
    double = Source(to_float64(inline_functions(unrounded), source.base_dir), source.path)
    chosen = double if precision == "float64" else source
    shared: dict[str, Any] = {
        "loss": loss, "class_axis": class_axis, "output": output, "wrt": wrt, "freeze": freeze, "tie": tie,
        "dims": dims, "opset": opset, "outputs": "grad", "mode": mode, "straight_through": straight,
    }  # fmt: skip
    zil = emit_training(chosen, **dynamics, **shared)
    bp = emit_training(chosen, algorithm="bp", **shared)
    found = structure(double, output=output, dims=dims, tie=tie, opset=opset, mode=mode)
    losses = settle_losses(found, loss)
    forward = Forward(found, zil)
    feeds = feeds_of(found, inputs, seed, dims or {})
    targets = targets_of(zil, forward, feeds, inputs, losses, class_axis, seed)

    run = executor(zil.model)
    got = gradients_of(run, zil, {**feeds, **targets}, precision)
    other = gradients_of(executor(bp.model, prefer=kind_of(run)), bp, {**feeds, **targets}, precision)

    leaves = [*zil.signature["parameters"], *zil.signature["input_grads"]]
    rng = np.random.default_rng(seed + 1)
    largest = max((float(np.linalg.norm(np.asarray(g, np.float64))) for g in got.values()), default=0.0)
    theirs = max((float(np.linalg.norm(np.asarray(g, np.float64))) for g in other.values()), default=0.0)
    rows, done, total = [], 0, 2 * directions * len(leaves)
    for leaf in leaves:
        name, g = leaf["name"], got[leaf["name"]]
        norm = float(np.linalg.norm(np.asarray(g, np.float64)))
        worst = 0.0
        for _ in range(directions):
            v = rng.standard_normal(g.shape)
            exact = float(np.sum(np.asarray(g, np.float64) * v))
            scale = max(norm, 1e-6 * largest) * float(np.linalg.norm(v)) / np.sqrt(max(v.size, 1))
            error = float("inf")
            for size in STEPS:
                slope = forward.slope(name, v, size, feeds, targets, losses, class_axis)
                error = min(error, abs(exact - slope) / scale if scale else abs(exact - slope))
                if error <= TOLERANCE[precision]:
                    break
            worst = max(worst, error)
            done += 2
            if progress:
                progress(done, total)
        rows.append(
            {
                "name": name,
                "level": leaf["level"],
                "bits_equal": bits_equal(g, other[name]),
                "max_ulp": max_ulp(g, other[name]),
                "divergence": divergence(g, other[name], 1e-6 * theirs),
                "gradient_norm": norm,
                "directions": directions,
                "max_error": worst,
            }
        )
    tolerance = TOLERANCE[precision]
    equal = all(r["bits_equal"] for r in rows)
    literal = zil.signature["schedule"] == "literal"
    return Verification(
        {
            "model": source.name,
            "precision": precision,
            "algorithm": zil.signature["algorithm"],
            "schedule": zil.signature["schedule"],
            "mode": mode,
            "differences_of": _TRAINING_FORM if found.mode and found.mode.turned else "the model",
            "levels": zil.signature["levels"],
            "executor": {"training": run.name, "differences": forward.executor.name},
            "straight_through": straight,
            "zil_equals_bp": equal,
            "divergence": overall(got, other),
            "tolerance": tolerance,
            "max_error": max((r["max_error"] for r in rows), default=0.0),
            "passed": (equal or literal) and all(r["max_error"] <= tolerance for r in rows),
            "parameters": rows,
        }
    )


def bits_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Same dtype, shape and bytes (a NaN equals itself, +0 differs from -0)."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def divergence(found: np.ndarray, truth: np.ndarray, floor: float = 0.0) -> float:
    """|found - truth| / max(|truth|, floor), in float64; infinite where ``found`` is not finite (ZIL.md, section 8).

    Args:
        floor: a gradient that is zero but for rounding has no relative error: a share of the largest one's norm.
    """
    a, b = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    with np.errstate(all="ignore"):
        off = float(np.linalg.norm(a - b))
    scale = max(float(np.linalg.norm(b)), floor)
    if not np.isfinite(off):
        return float("inf")
    return off / scale if scale else (0.0 if off == 0.0 else float("inf"))


def overall(found: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> float:
    """:func:`divergence` of all parameters laid end to end: how far one update is from another, as a share of it."""
    with np.errstate(all="ignore"):
        off = sum(float(np.sum((np.asarray(found[n], "d") - np.asarray(g, "d")) ** 2)) for n, g in truth.items())
        whole = sum(float(np.sum(np.asarray(g, "d") ** 2)) for g in truth.values())
    if not np.isfinite(off):
        return float("inf")
    return float(np.sqrt(off / whole)) if whole else (0.0 if off == 0.0 else float("inf"))


def max_ulp(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance between entries in units in the last place."""
    if a.size == 0:
        return 0.0
    with np.errstate(invalid="ignore"):
        return float(np.max(np.abs(a - b) / np.spacing(np.maximum(np.abs(a), np.abs(b)))))


def kind_of(run: Executor) -> str:
    return "onnxruntime" if run.name.startswith("onnxruntime") else "reference"


def gradients_of(run: Executor, step: TrainingStep, feeds: Mapping[str, np.ndarray], precision: str) -> dict[str, Any]:
    """Gradients by leaf name; floating feeds are cast to the training graph's precision."""
    signature = step.signature
    given = {name: np.asarray(value) for name, value in feeds.items()}
    held = [*signature["parameters"], *signature["carried"]]
    given.update({entry["name"]: np.asarray(step.state[entry["name"]]) for entry in held})
    if precision == "float32":
        kinds = {i.name: i.type.tensor_type.elem_type for i in step.model.graph.input}
        given = {
            n: v.astype(onnx.helper.tensor_dtype_to_np_dtype(kinds[n])) if n in kinds and v.dtype.kind == "f" else v
            for n, v in given.items()
        }
    leaves = [*signature["parameters"], *signature["input_grads"]]
    made = run(given, [leaf["grad"] for leaf in leaves])
    return {leaf["name"]: made[leaf["grad"]] for leaf in leaves}


def feeds_of(found: Structure, inputs: Any, seed: int, dims: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Inputs in float64.  float32 runs see them rounded, so they are rounded once for both."""
    mode = found.mode or TrainMode()
    drawn = {mode.seed: seed, mode.step: 0} if mode.seed else {}
    own = [t for t in found.graph.inputs if t.name not in drawn]
    if inputs is None:
        feeds = random_feeds(own, seed, dims, STATISTICS_BATCH if mode.batch_normalizations else BATCH)
    else:
        feeds = checked_feeds(own, *arrays(inputs))
    return {
        **{n: _rounded(v) for n, v in feeds.items()}, **{n: np.asarray(v, np.int64) for n, v in drawn.items() if n}
    }  # fmt: skip


def _unrounded(source: Source, inputs: Any, seed: int, output: Names, dims: Mapping[str, int], wrt: Names) -> Source:
    """The straight-through line of a quantised model at its feeds."""
    from zilc.surrogate import straight_line

    found = structure(source, output=output, dims=dims, straight_through=True)
    proto = inline_functions(source)
    kinds = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in proto.graph.input}
    feeds = {n: np.asarray(v, kinds[n]) for n, v in feeds_of(found, inputs, seed, dims).items()}
    scales = {n.inputs[1].name for n in found.graph.nodes if n.op in ("QuantizeLinear", "DequantizeLinear")}
    named = sorted(scales & set(name_list(wrt)))
    if named:
        raise OptionError(
            f"'{named[0]}' is a scale of quantisation, which the straight-through line holds fixed", where="--wrt"
        )
    return Source(straight_line(proto, feeds), source.path, source.base_dir)


def _rounded(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32).astype(np.float64) if value.dtype.kind == "f" else value


def targets_of(
    step: TrainingStep, forward: Forward, feeds: Mapping[str, np.ndarray], inputs: Any,
    losses: Mapping[str, str], class_axis: int, seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    rng = np.random.default_rng(seed + 2)
    given = arrays(inputs)[0] if inputs is not None else {}
    outputs = forward.outputs(feeds)
    targets = {}
    for entry in step.signature["targets"]:
        name, output = entry["name"], entry["output"]
        if name is None:
            continue
        if name in given:
            targets[name] = _rounded(np.asarray(given[name]))
            continue
        mu = outputs[output]
        targets[name] = _rounded(np.asarray(random_target(losses[output], mu.shape, mu.dtype, class_axis, rng)))
    return targets


class Forward:
    """The model itself in float64, in training form if asked, its trained leaves fed from outside."""

    def __init__(self, found: Structure, step: TrainingStep) -> None:
        self.outputs_wanted = list(found.outputs)
        self.step = step
        everything = found.flow.tensors
        leaves = [p["name"] for p in step.signature["parameters"]]
        self.values = {n: np.asarray(ir.values(everything[n]), np.float64) for n in leaves}
        #: A tied tensor follows its leaf.
        self.followers = {b: tie for b, tie in found.prepared.ties.items() if tie[0] in self.values}
        proto = found.prepared.source.proto
        if found.mode and found.mode.turned:
            # In training form, where ties are made already.  What the compiler emits for BatchNormalization has no
            # part in it: its training form stays one operator here.
            proto, self.followers = _whole_batch_normalization(ir.to_proto(found.graph)), {}
        self.executor = executor(opened(proto, self.fed({}), self.outputs_wanted))

    def fed(self, moved: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every opened initializer, some of them moved."""
        values = {**self.values, **{n: v for n, v in moved.items() if n in self.values}}
        for follower, (leaf, transposed) in self.followers.items():
            values[follower] = values[leaf].T if transposed else values[leaf]
        return values

    def outputs(self, feeds: Mapping[str, np.ndarray], moved: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
        """Trained outputs by name, with some parameters or inputs moved."""
        moved = moved or {}
        given = {**feeds, **{n: v for n, v in moved.items() if n in feeds}, **self.fed(moved)}
        return self.executor(given, self.outputs_wanted)

    def slope(
        self, name: str, v: np.ndarray, step: float, feeds: Mapping[str, np.ndarray],
        targets: Mapping[str, np.ndarray], losses: Mapping[str, str], class_axis: int,
    ) -> float:  # fmt: skip
        """The central difference of the loss along a direction v; the step is relative to the parameter's norm."""
        value = self.values[name] if name in self.values else feeds[name]
        size = float(np.linalg.norm(v)) or 1.0
        h = step * max(float(np.linalg.norm(value)), 1e-2 * np.sqrt(max(value.size, 1))) / size
        ahead, behind = (
            self.loss(self.outputs(feeds, {name: value + sign * h * v}), targets, losses, class_axis)
            for sign in (1.0, -1.0)
        )
        return (ahead - behind) / (2 * h)

    def loss(
        self, outputs: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], losses: Mapping[str, str], axis: int
    ) -> float:
        """The summed loss, in NumPy, apart from the emitted one."""
        total = 0.0
        for entry in self.step.signature["targets"]:
            y = targets.get(entry["name"]) if entry["name"] else None
            total += numpy_loss(losses[entry["output"]], np.asarray(outputs[entry["output"]]), y, axis)
        return total


def _whole_batch_normalization(proto: onnx.ModelProto) -> onnx.ModelProto:
    """All three outputs of the training form, which the operator must have, read or not (in place)."""
    for node in proto.graph.node:
        if node.op_type == "BatchNormalization" and len(node.output) == 1:
            node.output.extend(f"{node.output[0]}/{name}" for name in ("running_mean", "running_var"))
    return proto


def opened(
    source: onnx.ModelProto, leaves: Mapping[str, np.ndarray], outputs: Sequence[str],
    kind: int = onnx.TensorProto.DOUBLE,
) -> onnx.ModelProto:  # fmt: skip
    """The model with ``leaves`` as graph inputs instead of initializers or constants, and ``outputs`` as outputs.

    Args:
        kind: element type of the leaves and of outputs that the model has not listed.
    """
    made = onnx.ModelProto()
    made.CopyFrom(source)
    graph = made.graph
    kept = [t for t in graph.initializer if t.name not in leaves]
    nodes = [n for n in graph.node if n.op_type not in ("Constant", "ConstantOfShape") or n.output[0] not in leaves]
    held = {t.name for t in kept}
    inputs = [i for i in graph.input if i.name not in held]
    listed = {i.name for i in inputs}
    for name, value in leaves.items():
        if name not in listed:
            inputs.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))
    for name in outputs:
        if name not in {o.name for o in graph.output}:
            graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    for entries, new in ((graph.initializer, kept), (graph.node, nodes), (graph.input, inputs)):
        del entries[:]
        entries.extend(new)
    made.ir_version = max(made.ir_version, 4)  # below 4, initializers must be inputs
    return made


def numpy_loss(kind: str, mu: np.ndarray, y: np.ndarray | None, axis: int) -> float:
    """Each loss by its definition, in float64."""
    mu = mu.astype(np.float64)
    if kind == "none":
        return float(mu.reshape(-1)[0])
    assert y is not None
    if mu.shape != y.shape and kind != "cross-entropy":
        raise DataError(f"target has shape {list(y.shape)}, expected {list(mu.shape)}", where="target")
    if kind == "energy":
        return 0.5 * float(np.sum((mu - y) ** 2))
    if kind == "mse":
        return float(np.mean((mu - y) ** 2))
    if kind == "bce-with-logits":
        return float(np.mean(np.logaddexp(0.0, mu) - y * mu))
    if kind == "cross-entropy":
        top = mu.max(axis=axis, keepdims=True)
        log_z = np.log(np.sum(np.exp(mu - top), axis=axis)) + np.squeeze(top, axis=axis)
        picked = np.take_along_axis(mu, np.expand_dims(y.astype(np.int64), axis), axis=axis)
        return float(np.mean(log_z - np.squeeze(picked, axis=axis)))
    raise ZilcError(f"no loss '{kind}'")
