"""A certificate of one model's update, to cite: what was compared with what, on which numbers, and how far apart it is.

Z-IL is held against the emitted BP bit for bit, against an independent reverse mode (:mod:`zilc.independent`) and
central differences of the model in float64; every ablation of ZIL.md, section 7, is measured the same way beside it.
The document is JSON with a published schema (``certificate.schema.json``); the page is the same document to be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from zilc import independent, onnx_io, show, verification
from zilc.analysis import Names, Structure, structure
from zilc.errors import RuntimeMissing
from zilc.executors import executor
from zilc.files import together
from zilc.machine import processor
from zilc.onnx_io import ModelSource, Source
from zilc.passes.precision import to_float64
from zilc.passes.prepare import inline_functions
from zilc.pipeline import TrainingStep, emit_training, levelize, settle_losses
from zilc.verification import Forward, bits_equal, divergence, gradients_of, kind_of, overall

VERSION = 1
PRECISIONS = ("float32", "float64")
#: Largest relative divergence that counts as rounding, where the theory says that two gradients are one.  float64
#: against an independent reverse mode: ZIL.md, section 8.  float32: some dozens of units in the last place.
ROUNDING = {"float64": 1e-12, "float32": 1e-5}
#: In float32 at most twice the independent reverse mode's own error; below two units in the last place that is luck.
TWICE, FLOOR_FLOAT32 = 2.0, 2.0**-22
#: A gradient that is zero but for rounding is looked at on the scale of the largest one.
FLOOR = 1e-6
#: Such a gradient is zero in exact arithmetic: float64 sums of numbers that cancel leave about 1e-16 of them.
ZERO = 1e-13
GAMMA, NOISE, IL_STEPS, IL_GAMMA = 0.5, 0.1, 20, 0.1


@dataclass(frozen=True)
class Variant:
    """A choice of options, and what the theory says of it.

    Attributes:
        claim: which parameters are exact: ``all``; ``level 1, all if level``, where a graph that needs no identity is
            exact as a whole; ``level K``; ``gamma``, where a leaf of level l has gamma^(l-1) of its gradient; ``none``.
    """

    name: str
    title: str
    options: Mapping[str, Any]
    claim: str


_LITERAL = {"schedule": "literal"}
ZIL = Variant("zil", "Z-IL", {}, "all")
VARIANTS = (
    Variant("literal", "Z-IL, literal schedule", _LITERAL, "all"),
    Variant(
        "unlevelled", "Z-IL without levelling", {**_LITERAL, "identities": "none"}, "level 1, all if level"
    ),
    Variant("gamma", f"Z-IL with γ = {GAMMA:g}", {**_LITERAL, "gamma": GAMMA}, "gamma"),
    Variant("init-noise", f"Z-IL with noise of {NOISE:g} at the start", {**_LITERAL, "init_noise": NOISE}, "none"),
    Variant("update-at-end", "Z-IL, all updates at the last step", {**_LITERAL, "update_at": "end"}, "level K"),
    Variant(
        "il", f"IL, T = {IL_STEPS}, γ = {IL_GAMMA:g}", {"algorithm": "il", "steps": IL_STEPS, "gamma": IL_GAMMA}, "none"
    ),
    Variant(
        "il-fixed-predictions", "IL with fixed predictions, T = K, γ = 1",
        {"algorithm": "il", "fixed_predictions": True, "gamma": 1.0, "steps": "K"}, "all",
    ),
)  # fmt: skip


@dataclass
class Certificate:
    """What :func:`certify` found.

    Attributes:
        data: the document, as the schema describes it.
    """

    data: dict[str, Any]

    @property
    def passed(self) -> bool:
        """No check failed; a check that could not be made is listed as such, and does not fail."""
        return bool(self.data["passed"])

    def html(self) -> str:
        """The page: self-contained, no script, light and dark, printable.

        Raises:
            RuntimeMissing: Jinja is not installed.
        """
        try:
            import jinja2
        except ImportError as error:
            raise RuntimeMissing(
                "Jinja, which writes the page, is not installed",
                where="--certificate",
                hint="pip install 'zilc[certificate]'",
            ) from error
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        environment.filters.update(share=_share, shape=show.shape)
        text = resources.files("zilc").joinpath("certificate.html.jinja").read_text("utf-8")
        return environment.from_string(text).render(json.loads(show.document(self.data)))

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write the page and, beside it, the document; both appear, or neither.

        Args:
            path: of the page, of the document, or of both without a suffix.

        Returns:
            The two paths, ``.html`` and ``.json``.

        Raises:
            FileError: one of them cannot be written.
            RuntimeMissing: Jinja is not installed.
        """
        page, document = places(path)
        text = self.html()
        with together(page, document) as (page_file, document_file):
            onnx_io.write_bytes(page_file, text.encode("utf-8"))
            onnx_io.write_bytes(document_file, (show.document(self.data) + "\n").encode("utf-8"))
        return page, document


def places(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Where the page and the document go."""
    given = Path(path)
    stem = given.with_suffix("") if given.suffix in (".html", ".json") else given
    return stem.with_name(f"{stem.name}.html"), stem.with_name(f"{stem.name}.json")


def schema() -> dict[str, Any]:
    """The JSON Schema of a certificate (draft 2020-12)."""
    return json.loads(resources.files("zilc").joinpath("certificate.schema.json").read_text("utf-8"))


def certify(
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
    identities: Literal["edge", "shared", "min", "min-bytes"] = "shared",
    inputs: str | os.PathLike[str] | Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    directions: int = 3,
    ablations: bool = True,
    base_dir: str | os.PathLike[str] | None = None,
    command: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Measure a model's update by every road, in float32 and float64, on the same feeds.

    Args:
        identities: placement of Z-IL's identity vertices.
        inputs: arrays by input name (and targets), or an .npz file of them; by default random ones of ``seed``.
        directions: random directions a parameter for the central differences.
        ablations: measure them too; each runs all inference steps, as many forward and backward passes as levels.
        command: what the document says it was made by.
        progress: called with (done, total).
        Everything else as for :func:`zilc.emit_training`.

    Raises:
        RuntimeMissing: the independent reverse mode is not installed.
        ZilcError: see :mod:`zilc.errors`.
    """
    yardstick = independent.library()
    source = onnx_io.load(model, base_dir=base_dir)
    plain = Source(inline_functions(source), source.path, source.base_dir)
    double = Source(to_float64(plain.proto, source.base_dir), source.path)
    selection: dict[str, Any] = {"output": output, "tie": tie, "dims": dims, "opset": opset}
    shared: dict[str, Any] = {
        "loss": loss, "class_axis": class_axis, "wrt": wrt, "freeze": freeze, "outputs": "grad", **selection
    }  # fmt: skip
    variants = VARIANTS if ablations else ()
    ahead = 2 * (2 + len(variants))
    count = iter(range(1, ahead + 1))

    def step_on() -> None:
        if progress:
            progress(next(count), ahead)

    rows: dict[str, dict[str, Any]] = {}
    whole: dict[str, dict[str, Any]] = {v.name: {} for v in (ZIL, *variants)}
    independents: dict[str, dict[str, Any]] = {}
    executors: dict[str, str] = {}
    truth: dict[str, np.ndarray] | None = None
    feeds: dict[str, np.ndarray] = {}
    targets: dict[str, np.ndarray] = {}
    for precision, given in (("float64", double), ("float32", source)):
        zil = emit_training(given, identities=identities, **shared)
        found = structure(double if precision == "float64" else plain, **selection)
        losses = settle_losses(found, loss)
        if not feeds:
            forward = Forward(found, zil)
            feeds = verification.feeds_of(found, inputs, seed, dims or {})
            targets = verification.targets_of(zil, forward, feeds, inputs, losses, class_axis, seed)
        run = executor(zil.model)
        executors[precision] = run.name
        everything = {**feeds, **targets}
        bp = emit_training(given, algorithm="bp", **shared)
        reference = gradients_of(executor(bp.model, prefer=kind_of(run)), bp, everything, precision)
        mine, independents[precision] = _independent(
            found, bp, feeds, targets, losses, class_axis, precision
        )
        if precision == "float64":
            truth = mine
            rows = _rows(zil, found, reference)
        elif mine is not None and truth is not None:
            for name, row in rows.items():
                row["independent_float32"] = _far(mine[name], truth, name, precision)
        step_on()
        for variant in (ZIL, *variants):
            options = dict(variant.options)
            if options.get("steps") == "K":
                options["steps"] = zil.signature["levels"]
            if variant.options.get("algorithm") != "il":
                options.setdefault("identities", identities)
            step = zil if variant is ZIL else emit_training(given, **options, **shared)
            runner = run if variant is ZIL else executor(step.model, prefer=kind_of(run))
            with np.errstate(all="ignore"):
                got = gradients_of(runner, step, everything, precision)
            for name, row in rows.items():
                row["variants"].setdefault(variant.name, {})[precision] = {
                    "bits_equal": bits_equal(got[name], reference[name]),
                    # float32 cannot tell: what cancels leaves as little as 1e-9 of the largest there, all of it noise.
                    "bp": _far(got[name], reference, name, precision, zero=row["zero_gradient"]),
                    "independent": None if truth is None else _far(got[name], truth, name, precision),
                }
            whole[variant.name][precision] = {
                "bp": overall(got, reference), "independent": None if truth is None else overall(got, truth)
            }  # fmt: skip
            step_on()

    def slopes(done: int, total: int) -> None:
        if progress:
            progress(ahead + done, ahead + total)

    slope = verification.verify(
        model, loss=loss, class_axis=class_axis, wrt=wrt, freeze=freeze, precision="float64", inputs=inputs,
        seed=seed, directions=directions, base_dir=base_dir, progress=slopes, identities=identities, **selection,
    )  # fmt: skip
    for entry in slope.data["parameters"]:
        rows[entry["name"]]["differences"] = entry["max_error"]
    report = levelize(source, identities=identities, **selection).report
    covered = {precision: entry["covered"] for precision, entry in independents.items()}
    variant_data = [
        {
            "name": v.name, "title": v.title, "claim": v.claim,
            "options": {k: zil.signature["levels"] if x == "K" else x for k, x in v.options.items()},
            "divergence": whole[v.name], **_theory(v, rows, report),
        }
        for v in (ZIL, *variants)
    ]  # fmt: skip
    checks = _checks(rows, covered, variant_data, slope.data)
    return Certificate(
        _plain({
            "version": VERSION,
            "created": _now(),
            "command": command,
            "passed": all(check["passed"] is not False for check in checks),
            "checks": checks,
            "model": _identity(model, source, zil),
            "settings": {
                "outputs": list(found.outputs), "losses": losses, "class_axis": class_axis, "identities": identities,
                "seed": seed, "feeds": _feeds_told(inputs), "directions": directions, "ablations": ablations,
                "shapes": {name: list(np.shape(value)) for name, value in {**feeds, **targets}.items()},
                "floor": FLOOR, "rounding": ROUNDING,
            },
            "structure": {
                "levels": report["levels"], "vertices": report["vertices"],
                "frozen_vertices": report["frozen_vertices"], "edges": report["edges"],
                "identities": {
                    kind: {"vertices": cost["vertices"], "bytes": cost["bytes_formula"]}
                    for kind, cost in report["identities"].items()
                },
            },
            "independent": {"library": yardstick, **independents},
            "executors": {**executors, "differences": slope.data["executor"]["differences"]},
            "variants": variant_data,
            "parameters": list(rows.values()),
            "versions": _versions(),
            "machine": _machine(),
        })
    )  # fmt: skip


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """As it reads back from the file."""
    return json.loads(show.document(data))


def _independent(
    found: Structure, bp: TrainingStep, feeds: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray],
    losses: Mapping[str, str], class_axis: int, precision: str,
) -> tuple[dict[str, np.ndarray] | None, dict[str, Any]]:  # fmt: skip
    """The independent gradients, or why there are none."""
    cast = {n: v.astype(precision) if v.dtype.kind == "f" else v for n, v in feeds.items()}
    values = {p["name"]: np.asarray(bp.state[p["name"]]) for p in bp.signature["parameters"]}
    wanted = {entry["output"]: targets.get(entry["name"]) for entry in bp.signature["targets"]}
    for name in found.outputs:
        wanted.setdefault(name, None)
    try:
        mode = independent.Independent(found, values, [e["name"] for e in bp.signature["input_grads"]], cast)
        made = mode.gradients(cast, wanted, losses, class_axis)
    except independent.NotCovered as error:
        return None, {"covered": False, "reason": error.what, "executor": None}
    return made, {"covered": True, "reason": None, "executor": mode.executor.name}


def _rows(zil: TrainingStep, found: Structure, reference: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    leaves = [*zil.signature["parameters"], *zil.signature["input_grads"]]
    longest, largest = found.longest.leaves, _largest(reference)
    return {
        leaf["name"]: {
            "name": leaf["name"],
            "shape": list(reference[leaf["name"]].shape),
            "level": leaf["level"],
            "longest_path": longest[leaf["name"]],
            "update_step": leaf["level"] - 1,
            "gradient_norm": float(np.linalg.norm(reference[leaf["name"]])),
            "zero_gradient": _is_zero(reference[leaf["name"]], largest),
            "independent_float32": None,
            "differences": None,
            "variants": {},
        }
        for leaf in leaves
    }


def _far(
    found: np.ndarray, truths: Mapping[str, np.ndarray], name: str, precision: str, *, zero: bool | None = None
) -> dict[str, float | None]:
    """How far one gradient is from another: relative, and its largest entry in units in the last place.

    A unit is that of the truth's largest entry: entries that are small by cancellation have no precision to lose.
    A gradient that is zero but for rounding is held against the largest one.  None stands for what is not finite.

    Args:
        truths: gradients of all parameters, that of ``name`` among them.
        zero: whether it is zero but for rounding; by default as its own numbers say, which takes float64.
    """
    truth = truths[name]
    largest = _largest(truths)
    zero = _is_zero(truth, largest) if zero is None else zero
    floor = (1.0 if zero else FLOOR) * largest
    relative = divergence(found, truth, floor)
    with np.errstate(all="ignore"):
        off = np.max(np.abs(np.asarray(found, np.float64) - np.asarray(truth, np.float64)), initial=0.0)
        # Units of zero are denormal: then those of the floor, spread over the entries, are taken.
        top = max(float(np.max(np.abs(truth), initial=0.0)), floor / np.sqrt(max(truth.size, 1)))
        unit = float(np.spacing(np.asarray(top, precision)))
        units = float(off) / unit
    return {
        "relative": relative if np.isfinite(relative) else None, "ulp": units if np.isfinite(units) else None
    }  # fmt: skip


def _largest(gradients: Mapping[str, np.ndarray]) -> float:
    return max((float(np.linalg.norm(np.asarray(g, np.float64))) for g in gradients.values()), default=0.0)


def _is_zero(truth: np.ndarray, largest: float) -> bool:
    """Zero but for rounding, as the key bias of attention is."""
    return truth.dtype == np.float64 and float(np.linalg.norm(truth)) <= ZERO * largest


def _theory(variant: Variant, rows: Mapping[str, dict[str, Any]], report: Mapping[str, Any]) -> dict[str, Any]:
    """Whether each parameter is where the theory says, in both precisions, against BP."""
    level_graph = report["identities"]["edge"]["vertices"] == 0
    depth = report["levels"]
    exact, wrong, worst = [], [], dict.fromkeys(PRECISIONS, 0.0)
    for name, row in rows.items():
        place = row["longest_path"] if variant.options.get("identities") == "none" else row["level"]
        share = 0.0
        if variant.claim == "gamma":
            share = 1.0 - GAMMA ** (place - 1)
        elif variant.claim == "none":
            continue
        elif variant.claim == "level 1, all if level":
            if place != 1 and not level_graph:
                continue
        elif variant.claim == "level K" and place != depth:
            continue
        if share == 0.0:
            exact.append(name)
        for precision in PRECISIONS:
            relative = row["variants"][variant.name][precision]["bp"]["relative"]
            # A share of a gradient that is zero but for rounding says nothing.
            off = float("inf") if relative is None else 0.0 if share and row["zero_gradient"] else abs(relative - share)
            worst[precision] = max(worst[precision], off)
            if off > ROUNDING[precision] and name not in wrong:
                wrong.append(name)
    return {
        "exact": exact,
        "against_theory": wrong,
        "off_theory": {p: x if np.isfinite(x) else None for p, x in worst.items()},
    }


def _checks(
    rows: Mapping[str, dict[str, Any]], covered: Mapping[str, bool], variants: Sequence[Mapping[str, Any]],
    slope: Mapping[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """What the verdict is made of.  ``passed`` is None where a check could not be made."""

    def worst(precision: str) -> float | None:
        found = [row["variants"]["zil"][precision]["independent"]["relative"] for row in rows.values()]
        return None if None in found else max(found, default=0.0)

    def check(name: str, text: str, measured: Any, bound: Any, passed: bool | None) -> dict[str, Any]:
        return {"name": name, "text": text, "measured": measured, "bound": bound, "passed": passed}

    checks = []
    for precision in PRECISIONS:
        unequal = sum(not row["variants"]["zil"][precision]["bits_equal"] for row in rows.values())
        text = f"{precision}: parameters whose Z-IL gradient differs from emitted BP in any bit"
        checks.append(check(f"bits-{precision}", text, unequal, 0, unequal == 0))
    text = "float64: largest divergence of Z-IL from the independent reverse mode, relative"
    if covered["float64"]:
        far = worst("float64")
        most = ROUNDING["float64"]
        checks.append(check("independent-float64", text, far, most, far is not None and far <= most))
    else:
        checks.append(check("independent-float64", text, None, ROUNDING["float64"], None))
    text = "float32: the same, against float64; bound: twice the independent reverse mode's own float32 error"
    if all(covered.values()):
        far32, own = worst("float32"), [row["independent_float32"]["relative"] for row in rows.values()]
        bound = None if None in own else max(TWICE * max(own, default=0.0), FLOOR_FLOAT32)
        passed = far32 is not None and bound is not None and far32 <= bound
        checks.append(check("independent-float32", text, far32, bound, passed))
    else:
        checks.append(check("independent-float32", text, None, None, None))
    text = "float64: largest error against central differences of the model, relative, along random directions"
    passed = slope["max_error"] <= slope["tolerance"]
    checks.append(check("differences", text, slope["max_error"], slope["tolerance"], passed))
    text = "ablations: parameters that are not where the theory says"
    if len(variants) > 1:
        wrong = sum(len(v["against_theory"]) for v in variants[1:])
        checks.append(check("ablations", text, wrong, 0, wrong == 0))
    else:
        checks.append(check("ablations", text, None, 0, None))
    return checks


# --- where, when, with what -----------------------------------------------------------------------------------


def _identity(model: Any, source: Source, step: TrainingStep) -> dict[str, Any]:
    """Which model it was: digests of its bytes and of its external data."""
    path = getattr(source, "path", None)
    data = Path(path).read_bytes() if path else source.proto.SerializeToString(deterministic=True)
    external = sorted({_location(t) for t in onnx_io.external_tensors(source.proto)})
    return {
        "name": Path(path).name if path else source.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "external_data": {name: _digest(Path(source.base_dir) / name) for name in external},
        "opset": next((o.version for o in source.proto.opset_import if o.domain in ("", "ai.onnx")), None),
        "ir_version": source.proto.ir_version,
        "producer": f"{source.proto.producer_name} {source.proto.producer_version}".strip() or None,
        "parameters": len(step.signature["parameters"]),
        "numbers": sum(int(np.prod(entry["shape"])) for entry in step.report["trained"]),
    }


def _location(tensor: Any) -> str:
    return next(entry.value for entry in tensor.external_data if entry.key == "location")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _feeds_told(inputs: Any) -> dict[str, Any]:
    if inputs is None:
        return {"kind": "random", "name": None, "sha256": None}
    if isinstance(inputs, Mapping):
        return {"kind": "arrays", "name": None, "sha256": None}
    return {"kind": "file", "name": Path(inputs).name, "sha256": _digest(Path(inputs))}


def _now() -> str:
    """UTC; SOURCE_DATE_EPOCH, where it is set, makes a document reproducible."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    return moment.isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    import onnxruntime

    names = ("zilc", "onnx", "onnx-graphsurgeon", "onnx-ad", "numpy", "scipy")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
        "onnxruntime": onnxruntime.__version__,
    }


def _machine() -> dict[str, Any]:
    return {"processor": processor(), "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}


def _share(value: Any) -> str:
    """A divergence on the page: 0 is exact, None is not finite."""
    if value is None:
        return "not finite"
    return "0" if value == 0 else f"{value:.1e}" if isinstance(value, float) else str(value)
