"""Several ways to emit one VJP, or one convolution, and the choice among them.

A costly rule offers candidates.  Each says what its time is made of, as counts of work (multiply-adds, elements copied,
kernel calls); what an item of work costs was fitted to measurements by tools/fit_lowerings.py, for each target, and is
kept in ``lowerings.json``.  The candidate of the least predicted time is taken, one that rounds less well only if it
saves a tenth.  With ``--tune`` the candidates are
measured on the user's own machine instead, and what was found is remembered in a file.

All candidates compute the same sum, in another order of its summands or (Winograd's) by other products: on finite
values they differ by rounding.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.helper
import onnx_graphsurgeon as gs

from zilc.errors import FileError, OptionError, RuntimeMissing

if TYPE_CHECKING:
    from zilc.emit import Emitter
    from zilc.providers import Providers

#: Where a training graph's metadata say which lowerings were taken.
KEY = "zilc.lowerings"
#: Counted up when what a lowering's name stands for changes: what was measured before is measured again.
_FORMS = 2
#: Examples in a batch whose size is open when the choice is made.
BATCH = 16


@dataclass(frozen=True)
class Lowering:
    """One way to emit a VJP or a convolution.

    Attributes:
        emit: called with an emitter and the operands; gives the cotangent or the value.
        work: how much of what it does, by name, for the sizes at hand.
        erratic: its time does not follow from counts of work, so it is taken only where it was measured.
        handicap: its time is multiplied by this in the choice: what rounds less well has to save as much.
        timed: what is measured in its place, where it begins or ends with something that its neighbours are expected to
            take away.
    """

    emit: Callable[..., gs.Tensor]
    work: Mapping[str, float]
    erratic: bool = False
    handicap: float = 1.0
    timed: Callable[..., gs.Tensor] | None = None


@dataclass(frozen=True)
class Taken:
    """A choice that was made: at which vertex, for what, which, and how (``fitted`` costs or ``measured``)."""

    vertex: str
    kind: str
    lowering: str
    how: str


@dataclass
class Lowerings:
    """Chooses for one emission.

    Attributes:
        target: what the costs were fitted for.
        tuner: measures instead, if there is one.
        taken: the choices so far.
        whole: candidates are all that there are, those that are not expected to fit in included: to fit their costs.
    """

    target: str = "cpu"
    tuner: Tuner | None = None
    taken: list[Taken] = field(default_factory=list)
    whole: bool = False

    def emit(
        self, op: Emitter, kind: str, site: str, operands: Sequence[gs.Tensor], candidates: Mapping[str, Lowering]
    ) -> gs.Tensor:
        """Emit the candidate that is expected to be the fastest; its nodes carry ``zilc.lowering``.

        Args:
            kind: operator and operand, such as ``Conv.weight``; costs are kept by it.
            site: what besides the operands' shapes and dtypes matters to the time, as text.
            operands: what the candidates take.
            candidates: by name, the one to take where no costs are known first.
        """
        name = self.take(op, kind, site, operands, candidates)
        with op.noting(lowering=f"{kind}: {name}"):
            return candidates[name].emit(op, *operands)

    def take(
        self, op: Emitter, kind: str, site: str, operands: Sequence[gs.Tensor], candidates: Mapping[str, Lowering]
    ) -> str:
        """The candidate to emit, which is noted as taken."""
        name, how = self.choose(op, kind, site, operands, candidates)
        self.taken.append(Taken(op.metadata.get("zilc.vertex", ""), kind, name, how))
        return name

    def choose(
        self, op: Emitter, kind: str, site: str, operands: Sequence[gs.Tensor], candidates: Mapping[str, Lowering]
    ) -> tuple[str, str]:
        """The candidate to take, and how it was found."""
        if len(candidates) == 1:
            return next(iter(candidates)), "only"
        if self.tuner is not None:
            fastest = self.tuner.fastest(op, kind, site, operands, candidates)
            if fastest is not None:
                return fastest, "measured"
        candidates = {name: one for name, one in candidates.items() if not one.erratic}
        known = self._costs(op, operands).get(kind, {})
        if any(name not in known for name in candidates):
            return next(iter(candidates)), "default"

        def time(name: str) -> float:
            return predicted(known[name], candidates[name].work) * candidates[name].handicap

        return min(candidates, key=time), "fitted"

    def _costs(self, op: Emitter, operands: Sequence[gs.Tensor]) -> Mapping[str, Any]:
        """For the target, and for half precision if that was fitted apart: on a GPU other units compute it."""
        made: Mapping[str, Any] = costs().get(self.target, {})
        if any(op.dtype(x).itemsize == 2 for x in operands):
            made = costs().get(f"{self.target}, half", made)
        return made

    def data(self) -> dict[str, Any]:
        """What was taken, and how it was found, as data."""
        how = "measured" if self.tuner is not None else "fitted"
        return {"target": self.target, "costs": how, "taken": self.summary()}

    def summary(self) -> dict[str, dict[str, int]]:
        """How often each lowering was taken, by kind."""
        counts: dict[str, dict[str, int]] = {}
        for one in self.taken:
            if one.how != "only":
                row = counts.setdefault(one.kind, {})
                row[one.lowering] = row.get(one.lowering, 0) + 1
        return {kind: dict(sorted(row.items())) for kind, row in sorted(counts.items())}


def predicted(cost: Mapping[str, float], work: Mapping[str, float]) -> float:
    """Milliseconds: cost of an item times number of items, and a constant."""
    return cost.get("constant", 0.0) + sum(cost.get(name, 0.0) * amount for name, amount in work.items())


@functools.cache
def costs() -> dict[str, Any]:
    """Milliseconds an item of work, by target, kind, lowering and name of the work."""
    text = resources.files("zilc").joinpath("lowerings.json").read_text(encoding="utf-8")
    made: dict[str, Any] = json.loads(text)["costs"]
    return made


def assumed(op: Emitter, x: gs.Tensor) -> tuple[int, ...] | None:
    """Shape with :data:`BATCH` for an open first dimension; None where anything else is open."""
    dims = op.dims(x)
    if dims is None:
        return None
    sizes = [BATCH if k == 0 and not isinstance(n, (int, np.integer)) else n for k, n in enumerate(dims)]
    if not all(isinstance(n, (int, np.integer)) for n in sizes):
        return None
    return tuple(int(n) for n in sizes)  # type: ignore[arg-type]


# --- measuring --------------------------------------------------------------------------------------------------


class Tuner:
    """Measures lowerings on this machine and remembers the times.

    Args:
        path: the file of what was measured; made at the first measurement.
        target: ``cpu`` or ``cuda``.
        seconds: at most about this long for one site.

    Raises:
        FileError: the file is there and is not one of ours.
        RuntimeMissing: there is no CUDA.
    """

    def __init__(self, path: str | os.PathLike[str], target: str = "cpu", *, seconds: float = 1.0) -> None:
        from zilc.machine import gpu, processor
        from zilc.providers import choose_providers, import_onnxruntime

        self.path, self.seconds = Path(path), seconds
        try:
            self.providers = choose_providers(target)[0]
        except RuntimeMissing as error:
            hint = "Tune where it will run, or leave --tune out: then costs decide that zilc brings along."
            raise RuntimeMissing(error.what, where=f"--tune --target {target}", hint=hint) from error
        where = gpu().get("GPU", "") if target == "cuda" else f"{processor()}, {os.cpu_count()} processors"
        self.machine = f"{where}, onnxruntime {import_onnxruntime().__version__}, forms {_FORMS}"
        self._known: dict[str, Any] = self._read()
        #: How many sites were measured, not remembered.
        self.measured = 0

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise self._unreadable() from error
        if not isinstance(found, dict) or found.get("format") != "zilc lowerings 1":
            raise self._unreadable()
        machines: dict[str, Any] = found["machines"]
        return machines

    def _unreadable(self) -> FileError:
        return FileError(
            "is no file of measured lowerings", where=str(self.path), hint="Remove it; --tune makes a new one."
        )

    def fastest(
        self, op: Emitter, kind: str, site: str, operands: Sequence[gs.Tensor], candidates: Mapping[str, Lowering]
    ) -> str | None:
        """The candidate of the least measured time (with its handicap); None where none runs, or a size is open."""
        shapes = [assumed(op, x) for x in operands]
        if any(shape is None for shape in shapes):
            return None
        facts = [f"{op.dtype(x).name}{list(shape or ())}" for x, shape in zip(operands, shapes, strict=True)]
        key = f"{kind}: {' '.join(facts)} {site}"
        mine = self._known.setdefault(self.machine, {})
        times = mine.get(key, {})
        if any(name not in times for name in candidates):
            times = measure(op, operands, candidates, self.providers, seconds=self.seconds)
            self.measured += 1
            if any(ms is not None for ms in times.values()):
                mine[key] = {**mine.get(key, {}), **times}
                self._write()
        ran = {name: times[name] for name in candidates if times.get(name) is not None}
        return min(ran, key=lambda name: ran[name] * candidates[name].handicap) if ran else None

    def _write(self) -> None:
        from zilc.files import together

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"cannot be written ({error.strerror})", where=str(self.path)) from error
        content = {"format": "zilc lowerings 1", "machines": self._known}
        with together(self.path) as (stand_in,):
            stand_in.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def memory() -> Path:
    """Where ``--tune`` remembers: ``lowerings.json`` in the user's folder for zilc, which ZILC_HOME can replace."""
    import click

    return Path(os.environ.get("ZILC_HOME") or click.get_app_dir("zilc")) / "lowerings.json"


def measure(
    op: Emitter,
    operands: Sequence[gs.Tensor],
    candidates: Mapping[str, Lowering],
    providers: Providers,
    *,
    seconds: float = 1.0,
    rounds: int = 9,
) -> dict[str, float | None]:
    """Milliseconds of each candidate, the median of interleaved runs in onnxruntime; None for one that does not run."""
    rng = np.random.default_rng(0)
    feeds = {f"x{k}": _random(rng, _measured_as(op.dtype(x)), assumed(op, x) or ()) for k, x in enumerate(operands)}
    runs: dict[str, Callable[[], Any]] = {}
    with ThreadPoolExecutor() as pool:
        made = {name: pool.submit(_runner, op, operands, one, feeds, providers) for name, one in candidates.items()}
    for name, runner in made.items():
        try:
            runs[name] = runner.result()
            runs[name]()
        except Exception:
            runs.pop(name, None)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for count in range(rounds):
        for name, run in list(runs.items())[:: 1 if count % 2 else -1]:
            start = time.perf_counter()
            run()
            taken[name].append((time.perf_counter() - start) * 1e3)
        if time.perf_counter() - begun > seconds and count >= 2:
            break
    return {name: float(np.median(taken[name])) if name in taken else None for name in candidates}


def _measured_as(dtype: np.dtype) -> np.dtype:
    """onnxruntime's Python interface moves no bfloat16 to a device; float16 has the same size and speed."""
    return np.dtype(np.float16) if dtype.name == "bfloat16" else dtype


def _random(rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if np.issubdtype(dtype, np.integer):
        return np.zeros(shape, dtype)
    return rng.standard_normal(shape, np.float32).astype(dtype)


def _runner(
    op: Emitter,
    operands: Sequence[gs.Tensor],
    candidate: Lowering,
    feeds: Mapping[str, np.ndarray],
    providers: Providers,
) -> Callable[[], Any]:
    """A candidate as a graph of its own, ready to run on what lies on the device; on CUDA replayed, as in training."""
    from zilc import ir
    from zilc.emit import Emitter as Fresh
    from zilc.providers import CUDA, import_onnxruntime, provider_names
    from zilc.session import Buffer, make_session, recording_session

    inputs = [gs.Variable(f"x{k}", _measured_as(op.dtype(x)), op.dims(x)) for k, x in enumerate(operands)]
    for k, x in enumerate(inputs):
        x.shape = [f"n{k}_{axis}" if isinstance(n, str) and axis else n for axis, n in enumerate(x.shape)]
    graph = gs.Graph(inputs=list(inputs), opset=op.graph.opset)
    graph.import_domains = [onnx.helper.make_opsetid("", op.graph.opset)]
    own = Fresh(graph, lowerings=Lowerings(op.lowerings.target))
    made = (candidate.timed or candidate.emit)(own, *inputs)
    result = gs.Variable("result", dtype=own.dtype(made) if made.dtype is not None else None)
    graph.nodes.append(gs.Node("Identity", inputs=[made], outputs=[result]))
    graph.outputs = [result]
    model = ir.to_proto(graph, infer=True)
    on_cuda = CUDA in provider_names(providers)
    session = recording_session(model, providers) if on_cuda else None
    session = session or make_session(model, providers, spinning=False)  # candidates run in turns
    binding, device = session.io_binding(), ("cuda" if on_cuda else "cpu", 0)
    for given in session.get_inputs():
        array = feeds[given.name]
        buffer = Buffer(array.shape, array.dtype, device)
        buffer.write(array)
        binding.bind_ortvalue_input(given.name, buffer.value)
    binding.bind_output("result", *device)
    options = import_onnxruntime().RunOptions()
    return lambda: session.run_with_iobinding(binding, options)


def tuner_of(tune: bool | str | os.PathLike[str], target: str = "cpu") -> Tuner | None:
    """The tuner that ``tune`` asks for: none, one that remembers in the user's folder, or in a file.

    Raises:
        OptionError: neither a path nor a truth value.
        FileError: the file is not one of ours.
        RuntimeMissing: the target is CUDA, and there is none.
    """
    if tune is False:
        return None
    if tune is True:
        return Tuner(memory(), target)
    if not isinstance(tune, (str, os.PathLike)):
        raise OptionError(f"{tune!r} is neither a file nor true or false", where="--tune")
    return Tuner(tune, target)
