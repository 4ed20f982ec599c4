"""Export a network, train it by zilc, and hold the gradients against PyTorch's, twice.

1. **The file in PyTorch** (:mod:`tests.torch_graph`), in float64: every trained tensor of the export, to 1e-12.
2. **The module itself**: truth is the module in float64, holding the exported float32 values; zilc's float32 gradient
   is held against PyTorch's own float32 error.  An exported tensor may hold a parameter's numbers in any order
   (transposed, gates reordered, rows gathered, written twice): as every number of the module is its own, each is
   found by value, and zilc's gradient is summed back to where the numbers came from.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.inliner
import onnx.numpy_helper
import torch

import zilc
from tests.networks import NETWORKS
from tests.networks.common import Network
from tests.torch_graph import TorchGraph
from tests.twins import torch_loss
from zilc import onnx_io
from zilc.executors import executor
from zilc.passes.precision import to_float64
from zilc.verification import bits_equal

#: Relative to a parameter's gradient, or to 1e-6 of the largest one (ZIL.md, section 8, point 4).
EXACT = 1e-12
#: A gradient below this share of the largest one is zero: attention's key biases cancel in the softmax.
ZERO = 1e-12
#: float32: K levels round by an ulp or two each; below this, times sqrt(K), twice PyTorch's error says nothing.
FLOOR = 2 * 2.0**-23

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

EXPORTERS = ("torchscript", "dynamo", "torchscript-dynamic", "dynamo-dynamic", "dynamo-raw")


class ExporterError(Exception):
    """PyTorch's exporter fails by itself."""


@dataclasses.dataclass
class Row:
    """What was found about one export.

    Attributes:
        status: ``right``, or what went wrong and where.
        exact: the largest error against the file in PyTorch, float64.
        single, theirs: the largest float32 errors against the module in float64: zilc's, and PyTorch's own, at most
            twice which zilc's may be; where the module's own float32 run is better than that, PyTorch's is the larger
            of its and that of the exported file against that in float64.
        covered: the share of the trained numbers that were found among the module's.
        untrained: parameters of the module with a gradient that the training graph does not have.
    """

    network: str
    kind: str
    exporter: str
    status: str
    opset: int = 0
    vertices: int = 0
    levels: int = 0
    identities: int = 0
    parameters: int = 0
    exact: float | None = None
    single: float | None = None
    theirs: float | None = None
    covered: float | None = None
    untrained: tuple[str, ...] = ()
    runtime: str = ""
    seconds: float = 0.0


def cases() -> list[tuple[str, str]]:
    """(network, exporter): both exporters for each, one of each family with symbolic sizes and one as traced.

    Families take turns, so that a run that is cut off has seen all of them.
    """
    families: dict[str, list[str]] = {}
    for name, network in NETWORKS.items():
        families.setdefault(network.kind, []).append(name)
    turns = [(k, name) for names in families.values() for k, name in enumerate(names)]
    turns.sort(key=lambda turn: turn[0])
    made = [(name, exporter) for _, name in turns for exporter in EXPORTERS[:2]]
    return made + [(names[0], exporter) for names in families.values() for exporter in EXPORTERS[2:]]


def make(name: str) -> torch.nn.Module:
    """The module in evaluation mode; every number of it is its own."""
    torch.manual_seed(0)
    module = NETWORKS[name].make().eval()
    randomise(module)
    return module


def randomise(module: torch.nn.Module) -> None:
    """Distinct numbers for all parameters and statistics: exporters merge equal constants."""
    rng = np.random.default_rng(0)
    used: set[float] = set()
    owners = dict(module.named_modules())
    for key, p in module.named_parameters():
        owner, _, own = key.rpartition(".")
        scale = 0.2 if p.ndim < 3 else (2.0 / max(p[0].numel(), 1)) ** 0.5
        # What starts at 1 and is divided by (Snake's alpha), or scales what was normalised, stays near 1.
        near_one = own == "alpha" or ("norm" in type(owners[owner]).__name__.lower() and own == "weight")
        drawn = _distinct(rng, p.shape, 0.7 if near_one else 0.0, 0.2 if near_one else scale, used)
        p.data = torch.from_numpy(drawn).to(p.dtype)
    for key, buffer in module.named_buffers():
        if key.endswith("running_mean"):
            buffer.copy_(torch.from_numpy(0.2 * rng.standard_normal(buffer.shape)))
        elif key.endswith("running_var"):
            buffer.copy_(torch.from_numpy(0.8 + 0.4 * rng.random(buffer.shape)))


def _distinct(rng: np.random.Generator, shape: tuple[int, ...], least: float, scale: float, used: set[float]) -> Any:
    """Normal float32 numbers, none of them twice; positive ones from ``least`` on, if that is not 0."""
    count = int(np.prod(shape))
    made = np.zeros(count, np.float32)
    look = np.arange(count)
    while len(look):
        drawn = rng.standard_normal(len(look))
        made[look] = least + scale * np.abs(drawn) if least else scale * drawn
        again = [k for k in look if made[k].item() in used or used.add(made[k].item())]  # type: ignore[func-returns-value]
        look = np.asarray(again, int)
    return made.reshape(shape)


def feeds_of(name: str) -> dict[str, np.ndarray]:
    return NETWORKS[name].inputs(np.random.default_rng(7))


def export(name: str, exporter: str) -> onnx.ModelProto:
    """The file that PyTorch writes with its defaults.

    Args:
        exporter: ``dynamo`` or ``torchscript``; ``dynamo-dynamic``, ``torchscript-dynamic`` with a symbolic batch and,
            where the network has one, length; ``dynamo-raw`` without PyTorch's optimizations.

    Raises:
        ExporterError: with PyTorch's reason.
    """
    network, feeds = NETWORKS[name], feeds_of(name)
    return _export(network, make(name), feeds, exporter)


def _export(
    network: Network, module: torch.nn.Module, feeds: Mapping[str, np.ndarray], exporter: str
) -> onnx.ModelProto:
    way, _, extra = exporter.partition("-")
    arguments = tuple(torch.from_numpy(v) for v in feeds.values())
    options: dict[str, Any] = dict(network.options, input_names=list(feeds), output_names=["output"])
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # A failing exporter prints the whole graph.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            if way == "dynamo":
                if extra == "dynamic":
                    each = tuple(_dims(network, n, torch.export.Dim.AUTO) for n in feeds)
                    options["dynamic_shapes"] = (each,) if _takes_any(module) else each
                if extra == "raw":
                    options["optimize"] = False
                program = torch.onnx.export(module, arguments, dynamo=True, verbose=False, **options)
                assert program is not None
                return program.model_proto
            if extra == "dynamic":
                options["dynamic_axes"] = {n: _dims(network, n) for n in feeds} | {"output": {0: "batch"}}
            file = io.BytesIO()
            torch.onnx.export(module, arguments, file, dynamo=False, **options)
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:  # the exporter wraps its reason in advice
            root = root.__cause__
        lines = [s for s in _COLOURS.sub("", str(root)).splitlines() if s.strip()]
        raise ExporterError(f"{type(root).__name__}: {lines[0].strip()[:160] if lines else ''}") from error
    finally:
        logging.disable(level)
    return onnx.load_from_string(file.getvalue())


def _takes_any(module: torch.nn.Module) -> bool:
    """Whether forward is written with *inputs, which torch.export sees as one argument."""
    import inspect

    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    return inspect.Parameter.VAR_POSITIONAL in kinds


def _dims(network: Network, name: str, auto: Any = None) -> dict[int, Any]:
    dims = {0: auto or "batch"}
    if name in network.sequence:
        dims[1] = auto or "length"
    return dims


def target_of(network: Network, output: np.ndarray) -> np.ndarray | None:
    rng = np.random.default_rng(8)
    if network.loss == "none":
        return None
    if network.loss == "cross-entropy":
        return rng.integers(0, output.shape[-1], output.shape[:-1])
    return rng.standard_normal(output.shape).astype(output.dtype)


def examine(name: str, exporter: str) -> Row:
    """One network by one exporter; never raises but for what is wrong with the examination itself."""
    network = NETWORKS[name]
    row = Row(name, network.kind, exporter, "")
    try:
        module, feeds = make(name), feeds_of(name)
        with torch.no_grad():
            module(*(torch.from_numpy(v) for v in feeds.values()))
    except Exception as error:  # of the list's own making
        row.status = f"network: {type(error).__name__}: {error}"[:200]
        return row
    try:
        file = _export(network, module, feeds, exporter)
        row.opset = next(o.version for o in file.opset_import if o.domain in ("", "ai.onnx"))
        forward = forward_of(module, file, feeds)
    except ExporterError as error:
        row.status = f"exporter: {error}"
        return row
    stage = "compile"
    try:
        start = time.perf_counter()
        step = emitted(network, file)
        row.seconds = time.perf_counter() - start
        row.levels, row.parameters = step.signature["levels"], len(step.signature["parameters"])
        row.vertices, row.identities = step.report["vertices"], step.report["identities"]["shared"]["vertices"]
        stage = "check"
        onnx_io.check_full(step.model)
        assert {o.domain for o in step.model.opset_import} == {""}, "a domain of its own"
        stage = "float32"
        mu = forward
        target = target_of(network, mu)
        made32, _, _ = run(step, feeds, target)
        stage = "float64"
        plain = onnx.inliner.inline_local_functions(file) if file.functions else file
        wide = to_float64(plain)
        zil, bp = emitted(network, wide), emitted(network, wide, algorithm="bp")
        made64, loss64, row.runtime = run(zil, feeds, target)
        again, _, _ = run(bp, feeds, target)
        stage = "twin"
        truth, loss, output = by_graph(network, wide, list(made64), zil, feeds, target)
        stage = "verdict"
        if not np.allclose(output, mu, rtol=1e-3, atol=1e-3 * np.abs(mu).max()):
            # Either the twin is no twin, or the network magnifies rounding, and float64 tells which.
            name = wide.graph.output[0].name
            mu = executor(wide)({n: v.astype(np.float64) if v.dtype.kind == "f" else v for n, v in feeds.items()})[name]
            assert np.allclose(output, mu, rtol=1e-9, atol=1e-9 * np.abs(mu).max()), "the twin's output is another"
        assert abs(loss - loss64) <= 1e-9 * abs(loss), f"loss {loss64}, PyTorch {loss}"
        assert all(np.isfinite(g).all() for g in made64.values()), "not finite"
        for leaf, g in made64.items():
            assert bits_equal(g, again[leaf]), f"zil and bp differ in {leaf}"
        largest = max(float(np.linalg.norm(g)) for g in truth.values())
        zero = {n for n, g in truth.items() if np.linalg.norm(g) <= ZERO * largest}
        for leaf in zero:
            assert np.linalg.norm(made64[leaf]) <= ZERO * largest, f"{leaf} has gradient zero in PyTorch"
        exact = {n: e for n, e in errors(made64, truth).items() if n not in zero}
        row.exact = max(exact.values())
        worst = max(exact, key=exact.__getitem__)
        assert row.exact <= EXACT, f"{row.exact:.1e} in {worst}"
        stage = "module"
        assert all(np.isfinite(g).all() for g in made32.values()), "not finite"
        compare_module(row, network, module, step, made32, feeds, target)
        stage = "float32 verdict"
        if row.single is not None and row.theirs is not None:
            floor = FLOOR * max(row.levels, 1) ** 0.5
            if row.single > 2 * row.theirs + floor:
                # The module computes other products than its file, into which BatchNormalization is folded.
                twin, _, _ = by_graph(network, plain, list(made32), step, feeds, target)
                row.theirs = max(row.theirs, *errors(twin, truth).values())
            assert row.single <= 2 * row.theirs + floor, f"{row.single:.1e}, PyTorch {row.theirs:.1e}"
        row.status = "right"
    except Exception as error:
        lines = str(error).strip().splitlines()
        row.status = f"{stage}: {type(error).__name__}: {lines[0][:300] if lines else ''}"
    return row


def forward_of(module: torch.nn.Module, file: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the file computes.

    Raises:
        ExporterError: no runtime takes the file, or it computes something else than the module.
    """
    given = {n: v for n, v in feeds.items() if n in {i.name for i in file.graph.input}}
    output = file.graph.output[0].name
    try:
        made = executor(file)(given)[output]
    except Exception as error:
        lines = [s for s in str(error).splitlines() if s.strip()]
        raise ExporterError(f"its file does not run: {lines[0].strip()[:160] if lines else ''}") from error
    with torch.no_grad():
        truth = module(*(torch.from_numpy(v) for v in feeds.values())).numpy()
    if made.shape != truth.shape or not np.allclose(made, truth, rtol=1e-3, atol=1e-3 * np.abs(truth).max()):
        raise ExporterError("its file computes something else than the module")
    return made


def emitted(network: Network, file: onnx.ModelProto, **options: Any) -> zilc.TrainingStep:
    return zilc.emit_training(file, loss=network.loss, outputs="grad", **{**network.emit, **options})


def run(
    step: zilc.TrainingStep, feeds: Mapping[str, np.ndarray], target: np.ndarray | None
) -> tuple[dict[str, np.ndarray], float, str]:
    """Gradients by parameter, the loss, and who computed them."""
    kinds = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in step.model.graph.input}
    given: dict[str, Any] = {**feeds, **{n: np.asarray(step.state[n]) for n in step.state}}
    if target is not None:
        given[step.signature["targets"][0]["name"]] = target
    names = {p["grad"]: p["name"] for p in step.signature["parameters"]}
    runtime = executor(step.model)
    chosen = {n: np.asarray(given[n]).astype(kind) for n, kind in kinds.items()}
    made = runtime(chosen, [*names, step.signature["loss"]])
    loss = float(made.pop(step.signature["loss"]))
    return {names[key]: g for key, g in made.items()}, loss, runtime.name


def by_graph(
    network: Network, file: onnx.ModelProto, names: list[str], step: zilc.TrainingStep,
    feeds: Mapping[str, np.ndarray], target: np.ndarray | None,
) -> tuple[dict[str, np.ndarray], float, np.ndarray]:  # fmt: skip
    """Gradient by exported tensor, loss and output of the file in PyTorch, in the file's precision."""
    leaves = {n: torch.from_numpy(np.array(step.state[n])).requires_grad_() for n in names}
    kinds = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in file.graph.input}
    given = {n: v.astype(kinds[n]) if v.dtype.kind == "f" and n in kinds else v for n, v in feeds.items()}
    output = file.graph.output[0].name
    (mu,) = TorchGraph(file)(given, leaves, [output])
    value = _loss(network, mu, target)
    made = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), made, strict=True)
    gradients = {n: np.zeros(x.shape) if g is None else g.numpy() for (n, x), g in pairs}
    return gradients, value.item(), mu.detach().numpy()


def _loss(network: Network, mu: torch.Tensor, target: np.ndarray | None) -> torch.Tensor:
    if target is None:
        return mu
    y = torch.from_numpy(target)
    return torch_loss(mu, y.to(mu.dtype) if y.is_floating_point() else y, network.loss)


def errors(made: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> dict[str, float]:
    """ZIL.md, section 8, point 4."""
    norms = {n: float(np.linalg.norm(g)) for n, g in truth.items()}
    floor = 1e-6 * max(norms.values())
    return {n: float(np.linalg.norm(made[n] - g)) / max(norms[n], floor) for n, g in truth.items()}


# -- against the module --


def compare_module(
    row: Row, network: Network, module: torch.nn.Module, step: zilc.TrainingStep, made: Mapping[str, np.ndarray],
    feeds: Mapping[str, np.ndarray], target: np.ndarray | None,
) -> None:  # fmt: skip
    """Fills in ``single``, ``theirs``, ``covered`` and ``untrained``."""
    truth = by_module(network, module, feeds, target, torch.float64)
    theirs = by_module(network, module, feeds, target, torch.float32)
    ours = {n: np.zeros(g.shape) for n, g in truth.items()}
    reached = {n: np.zeros(g.shape, bool) for n, g in truth.items()}
    places = Places(module)
    known = total = 0
    for name, g in made.items():
        array = np.asarray(step.state[name])
        total += array.size
        for parameter, index, chosen, factor in places.find(array):
            np.add.at(ours[parameter].reshape(-1), index, g.reshape(-1)[chosen].astype(np.float64) * factor)
            reached[parameter].reshape(-1)[index] = True
            known += len(index)
    row.covered = known / max(total, 1)
    largest = max(float(np.linalg.norm(g)) for g in truth.values())
    moved = {n for n, g in truth.items() if np.linalg.norm(g) > 1e-6 * largest}
    whole = {n for n in moved if reached[n][truth[n] != 0].all()}
    row.untrained = tuple(sorted(moved - whole))
    if not whole:
        return
    single, other = ({n: e for n, e in errors(x, truth).items() if n in whole} for x in (ours, theirs))
    row.single, row.theirs = max(single.values()), max(other.values())


def by_module(
    network: Network, module: torch.nn.Module, feeds: Mapping[str, np.ndarray], target: np.ndarray | None,
    dtype: torch.dtype,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Gradient by parameter of the module, zero where none reaches it."""
    module = copy.deepcopy(module).to(dtype)
    given = [torch.from_numpy(v) for v in feeds.values()]
    parameters = dict(module.named_parameters())
    for p in parameters.values():
        p.requires_grad_()
    mu = module(*(v.to(dtype) if v.is_floating_point() else v for v in given))
    made = torch.autograd.grad(_loss(network, mu, target), list(parameters.values()), allow_unused=True)
    return {
        n: np.zeros(p.shape) if g is None else g.double().numpy()
        for (n, p), g in zip(parameters.items(), made, strict=True)
    }


class Places:
    """Where a module's numbers are."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.parameters = [(n, p.detach().numpy()) for n, p in module.named_parameters()]
        self.module = module
        every = np.concatenate([p.reshape(-1) for _, p in self.parameters])
        self.order = np.argsort(every, kind="stable")
        self.sorted = every[self.order]
        self.starts = np.cumsum([0, *(p.size for _, p in self.parameters)])

    def find(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray, Any]]:
        """(parameter, places in it, places in the array, derivative of the array's number by the parameter's)."""
        flat = array.reshape(-1)
        at = np.searchsorted(self.sorted, flat).clip(max=len(self.sorted) - 1)
        same = self.sorted[at] == flat
        # Some of many computed numbers are a parameter's by chance.
        if same.any() and (same | (flat == 0)).mean() > 0.5:
            places, chosen = self.order[at[same]], np.flatnonzero(same)
            owner = np.searchsorted(self.starts, places, side="right") - 1
            for k in np.unique(owner):
                mine = owner == k
                yield self.parameters[k][0], places[mine] - self.starts[k], chosen[mine], 1.0
            return
        for name, value, slope in self._derived():
            for form in (value, value.T):
                if form.size != array.size or not np.allclose(form.reshape(-1), flat, rtol=1e-5, atol=1e-7):
                    continue
                index = np.arange(value.size).reshape(value.shape)
                index, slopes = (index, slope) if form is value else (index.T, slope.T)
                yield name, index.reshape(-1), np.arange(array.size), slopes.reshape(-1)
                return

    def _derived(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Numbers that an exporter computes beforehand: (parameter, them, their derivatives)."""
        for name, p in self.parameters:
            one = np.ones(p.shape)
            yield name, -np.exp(p), -np.exp(p)
            yield name, 1 + p, one
            yield name, 1 - p, -one
            yield name, -p, -one
        modules = list(self.module.named_modules())
        norms = [(n, m) for n, m in modules if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        for name, norm in norms:
            scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().numpy()
            yield f"{name}.bias", (norm.bias - norm.running_mean * torch.from_numpy(scale)).detach().numpy(), np.ones(
                scale.shape
            )
            yield f"{name}.weight", scale, scale / norm.weight.detach().numpy()
            for other, layer in modules:
                kernel = getattr(layer, "weight", None)
                if not isinstance(layer, torch.nn.modules.conv._ConvNd) or layer.out_channels != len(scale):
                    continue
                if layer.transposed and layer.groups > 1:
                    continue
                shape = [1] * kernel.ndim  # type: ignore[union-attr]
                shape[1 if layer.transposed else 0] = -1
                wide = scale.reshape(shape) * np.ones(kernel.shape)  # type: ignore[union-attr]
                yield f"{other}.weight", kernel.detach().numpy() * wide, wide  # type: ignore[union-attr]
                if layer.bias is not None:
                    folded = norm.bias + (layer.bias - norm.running_mean) * torch.from_numpy(scale)
                    yield f"{name}.bias", folded.detach().numpy(), np.ones(scale.shape)
