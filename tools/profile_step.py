"""Where a training step's time goes on a CPU: ``python tools/profile_step.py [--networks mlp3] [--write]``.

ONNX Runtime's profiler times every kernel of the step as :class:`zilc.Trainer` runs it; the floating-point operations
of products and convolutions follow from the shapes that it reports.  The step itself, and PyTorch's, are timed without
the profiler, in turns (tools/bench.py).  A second table times what was tried instead of what is emitted.
``make profile`` writes docs/PROFILE.md and docs/profile.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import statistics
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import bench
import numpy as np
import onnx
import onnx.parser
import onnxruntime
from pages import grid  # type: ignore[import-not-found]
from rich.console import Console
from rich.table import Table

import zilc
from zilc import models, pipeline
from zilc.lowerings import Lowerings
from zilc.machine import processor
from zilc.passes.layouts import settle_layouts
from zilc.session import stop_spinning
from zilc.vjp import winograd

DOCS = Path(__file__).resolve().parent.parent / "docs"
NETWORKS = ("mlp3", "rnn", "transformer", "alexnet", "resnet18", "decoder")
GROUPS = {
    "products": ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"),
    "moving": ("Slice", "Concat", "Pad", "Transpose", "Expand", "Split", "Reshape", "Squeeze", "Unsqueeze", "Gather",
               "Flatten", "Tile"),
    "masks and pools": ("MaxPool", "AveragePool", "Where", "Greater", "ScatterElements", "GatherElements", "ScatterND"),
}  # fmt: skip
REST = "other"
#: Rows and columns of the product whose rate stands for what the runtime reaches at best.
LARGE = 2048
CPU = ["CPUExecutionProvider"]


# --- a step -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def session_options(change: Callable[[Any], None]) -> Iterator[None]:
    """Sessions made meanwhile have their options changed: zilc has no door for what only a measurement wants."""
    make = onnxruntime.SessionOptions

    def changed() -> Any:
        options = make()
        change(options)
        return options

    onnxruntime.SessionOptions = changed
    try:
        yield
    finally:
        onnxruntime.SessionOptions = make


def example(network: str, **options: Any) -> tuple[zilc.TrainingStep, dict[str, np.ndarray]]:
    """A network's training step and a batch, as the benchmark has them."""
    batch = bench.BATCH.get(network, 20)
    model = models.build(network, batch=batch)
    feeds = models.random_feeds(model, batch, np.random.default_rng(0), loss="cross-entropy")
    return zilc.emit_training(model, loss="cross-entropy", **options), feeds


def kernels(network: str, seconds: float) -> list[dict[str, Any]]:
    """Each kernel of a step: operator, median microseconds, floating-point operations of products."""
    step, feeds = example(network)
    constants = {t.name: list(t.dims) for t in step.model.graph.initializer}
    # The profiler does not tell of operands that onnxruntime has laid out anew before the first run.
    constant = {n.name: [constants[i] for i in n.input[1:2] if i in constants] for n in step.model.graph.node}
    with tempfile.TemporaryDirectory() as folder:

        def profiled(options: Any) -> None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")

        with session_options(profiled):
            trainer = zilc.Trainer(step, lr=1e-3, providers=CPU)
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < 4 or (time.perf_counter() < end and rounds < 1000):
            trainer.step(feeds)
            rounds += 1
        events = json.loads(Path(trainer._session.end_profiling()).read_text())
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["name"]].append(event)
    return [
        {
            "name": name.removesuffix("_kernel_time"),
            "operator": times[0]["args"]["op_name"],
            "us": statistics.median(e["dur"] for e in times[1:] or times),
            "operations": operations(times[-1]["args"], constant.get(name.removesuffix("_kernel_time"), [])),
        }
        for name, times in found.items()
    ]


def operations(kernel: dict[str, Any], constant: Sequence[list[int]] = ()) -> float:
    """Multiplications and additions of a product or convolution, by the shapes of operands and result.

    Args:
        kernel: what the profiler says.
        constant: shape of the second operand, where it is a constant that the profiler leaves out.
    """
    name = kernel["op_name"]
    if name not in GROUPS["products"]:
        return 0.0
    told = [next(iter(shape.values())) for shape in kernel["input_type_shape"][:2]]
    x, w = [told[0], *(constant or told[1:])][:2]
    y = next(iter(kernel["output_type_shape"][0].values()))
    if name in ("Conv", "FusedConv"):
        return 2.0 * math.prod(y) * math.prod(w[1:])
    if name == "ConvTranspose":
        return 2.0 * math.prod(x) * math.prod(w[1:])
    # [m, k] [k, n] -> [m, n], whichever is transposed
    inner = math.prod(x[-2:]) * math.prod(w[-2:]) / math.prod(y[-2:])
    return 2.0 * math.prod(y) * math.sqrt(inner)


# --- pieces -------------------------------------------------------------------------------------------------------


def paired(runs: dict[str, Callable[[], object]], rounds: int, inner: int = 1) -> dict[str, float]:
    """Median milliseconds of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(inner):
                run()
            times[name].append(1e3 * (time.perf_counter() - start) / inner)
    return {name: statistics.median(found) for name, found in times.items()}


def runner(text: str, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    """A graph in ONNX's text form, its inputs bound."""
    options = onnxruntime.SessionOptions()
    stop_spinning(options)
    options.log_severity_level = 4
    model = onnx.parser.parse_model(text)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=CPU)
    binding = session.io_binding()
    for given in session.get_inputs():
        binding.bind_cpu_input(given.name, feeds[given.name])
    for made in session.get_outputs():
        binding.bind_output(made.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


HEAD = '<ir_version: 8, opset_import: ["": 17]> g'


#: What is computed: operands, result, rounds, runs a round, and the forms as ONNX's text, the emitted one first.
TRIED_FORMS: dict[str, tuple[dict[str, tuple[int, ...]], tuple[int, ...], int, int, dict[str, str]]] = {
    "Relu's derivative on [20, 64, 112, 112]": (
        {"y": (20, 64, 112, 112), "g": (20, 64, 112, 112)}, (20, 64, 112, 112), 9, 1,
        {
            "g Cast(y > 0)": "c = Greater(y, z)  s = Cast <to = 1> (c)  o = Mul(g, s)",
            "Where(y > 0, g, 0)": "c = Greater(y, z)  o = Where(c, g, z)",
            "g Sign(Relu(y))": "r = Relu(y)  s = Sign(r)  o = Mul(g, s)",
        },
    ),
    "update of a weight of [128, 784]": (
        {"w": (128, 784), "e": (20, 128), "x": (20, 784)}, (128, 784), 41, 50,
        {
            "Gemm(e, x, W), alpha = -1": "o = Gemm <transA = 1, alpha = -1.0> (e, x, w)",
            "Sub(W, Gemm(e, x))": "d = Gemm <transA = 1> (e, x)  o = Sub(w, d)",
        },
    ),
    "Softmax's derivative on [4, 8, 128, 128]": (
        {"y": (4, 8, 128, 128), "g": (4, 8, 128, 128)}, (4, 8, 128, 128), 21, 10,
        {
            "y (g - sum(g y))": "p = Mul(g, y)  s = ReduceSum(p, last)  d = Sub(g, s)  o = Mul(y, d)",
            "g y - y sum(g y)": "p = Mul(g, y)  s = ReduceSum(p, last)  q = Mul(y, s)  o = Sub(p, q)",
            "the sum as g y^T, row by row":
                "k = Constant <value_ints = [-2]> ()  a = Unsqueeze(g, k)  b = Unsqueeze(y, last)  s = MatMul(a, b)  "
                "t = Squeeze(s, last)  "
                "d = Sub(g, t)  o = Mul(y, d)",
        },
    ),
    "sum over the rows of [1024, 256] (biases, LayerNormalization's scale)": (
        {"g": (1024, 256)}, (1, 256), 41, 20,
        {
            "ReduceSum": "o = ReduceSum(g, first)",
            "a product with ones": "n = Shape <start = 0, end = 1> (g)  i = Constant <value_ints = [1]> ()  "
                "k = Concat <axis = 0> (i, n)  u = ConstantOfShape <value = float[1] {1}> (k)  o = MatMul(u, g)",
        },
    ),
    "sum over a map's places on [20, 64, 56, 56] (BatchNormalization)": (
        {"g": (20, 64, 56, 56), "x": (20, 64, 56, 56)}, (1, 64, 1, 1), 9, 1,
        {
            "ReduceSum(g x)": "p = Mul(g, x)  o = ReduceSum(p, others)",
            "ReduceSum over places, then examples":
                "p = Mul(g, x)  w = Constant <value_ints = [2, 3]> ()  q = ReduceSum(p, w)  o = ReduceSum(q, first)",
        },
    ),
}  # fmt: skip


def large_product() -> float:
    """GFLOP/s of one large product in ONNX Runtime."""
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((LARGE, LARGE), dtype=np.float32) for name in "xw"}
    square = f"float[{LARGE},{LARGE}]"
    run = runner(f"{HEAD} ({square} x, {square} w) => ({square} y) {{ y = MatMul(x, w) }}", feeds)
    return 2.0 * LARGE**3 / paired({"": run}, 9)[""] / 1e6


def tried() -> dict[str, dict[str, float]]:
    """Milliseconds of what is emitted, first, and of what was tried instead."""
    made: dict[str, dict[str, float]] = {}
    for what, (operands, result, rounds, inner, forms) in TRIED_FORMS.items():
        rng = np.random.default_rng(0)
        feeds = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in operands.items()}
        given = ", ".join(f"float{list(shape)} {name}" for name, shape in operands.items())
        constants = "<float z = {0}, int64[1] first = {0}, int64[1] last = {-1}, int64[3] others = {0, 2, 3}>"
        head = f"{HEAD} ({given}) => (float{list(result)} o) {constants}"
        runs = {form: runner(f"{head} {{ {text} }}", feeds) for form, text in forms.items()}
        made[what] = paired(runs, rounds, inner)
    made["mlp3 by threads"] = paired(dict(threads("mlp3")), 21, 200)
    with session_options(stop_spinning):
        made["ResNet18 by lowerings"] = paired(dict(lowerings("resnet18")), 9)
        made["ResNet18 by Winograd's tiles"] = paired(dict(tiles("resnet18")), 9)
        for title, network in {"ResNet18": "resnet18", "AlexNet": "alexnet"}.items():
            made[f"{title} by Transposes to spatial axes first and back"] = paired(dict(layouts(network)), 9)
    return made


def threads(network: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Steps with ONNX Runtime's own number of threads, and with one."""
    for name, count in {"one a core": 0, "one": 1}.items():
        step, feeds = example(network)
        with session_options(functools.partial(limit_threads, count)):
            trainer = zilc.Trainer(step, lr=1e-3, providers=CPU)
        yield name, functools.partial(trainer.step, feeds)


def limit_threads(count: int, options: Any) -> None:
    """0 leaves their number to ONNX Runtime."""
    options.intra_op_num_threads = count


def lowerings(network: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Steps with lowerings by fitted costs, and with those that --tune measures here."""
    with tempfile.TemporaryDirectory() as folder:
        for name, tune in {"by fitted costs": False, "measured here (--tune)": Path(folder) / "costs.json"}.items():
            step, feeds = example(network, tune=tune)
            trainer = zilc.Trainer(step, lr=1e-3, providers=CPU)
            yield name, functools.partial(trainer.step, feeds)


def tiles(network: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Steps with Winograd's tiles of different sizes, in the same places: where the fitted costs take the smaller."""
    taken: list[tuple[str, str]] = []
    choose = Lowerings.choose

    def first(self: Lowerings, *facts: Any) -> tuple[str, str]:
        taken.append(choose(self, *facts))
        return taken[-1]

    def again(self: Lowerings, *facts: Any) -> tuple[str, str]:
        return taken.pop(0)

    for outputs, way in ((winograd.OUTPUTS, first), (4, again)):
        with mock.patch.object(winograd, "OUTPUTS", outputs), mock.patch.object(Lowerings, "choose", way):
            step, feeds = example(network)
        trainer = zilc.Trainer(step, lr=1e-3, providers=CPU)
        yield f"{outputs} × {outputs} outputs", functools.partial(trainer.step, feeds)


def layouts(network: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Steps with Transposes moved to where the fewest elements are transposed, and left where lowerings put them."""
    for name, settle in {"moved": settle_layouts, "where forms begin and end": lambda graph: graph}.items():
        with mock.patch.object(pipeline, "settle_layouts", settle):
            step, feeds = example(network)
        trainer = zilc.Trainer(step, lr=1e-3, providers=CPU)
        yield name, functools.partial(trainer.step, feeds)


# --- the page -----------------------------------------------------------------------------------------------------

HEADER = [
    "network", "zilc, ms", "PyTorch, ms", "nodes", *(f"{name}, ms" for name in (*GROUPS, REST)), "GFLOP",
    "GFLOP/s in products", "of a large product's", "products / PyTorch's step",
]  # fmt: skip


READING = """Made by `make profile`: a training step (SGD, cross-entropy, the benchmark's batches) on a CPU, kernel by
kernel, by ONNX Runtime's profiler. The profiler adds some microseconds to each kernel, so that on small networks the
parts are more than the whole, which is timed without it, in turns with PyTorch's eager step. *products* are
convolutions and matrix products; *moving* is copies, pads, slices and transposes, most of it for the gradients of
convolutions' weights. One product of {large} x {large} matrices reaches {best:.0f} GFLOP/s here. The last column is
what zilc would take beside PyTorch if everything but the products cost nothing: where that is near 1 or above, no other
graph is faster than PyTorch, only other kernels."""
TRIED = """What is emitted comes first. Relu's derivative as a product would turn an infinite error at a dead unit into
NaN: where errors can be infinite by rights, Where is emitted. A product with ones would save some microseconds a bias,
next to nothing of a step. Lowerings of convolutions and pools are in [LOWERINGS.md](LOWERINGS.md)."""


def row(network: str, found: list[dict[str, Any]], entry: dict[str, Any], best: float) -> dict[str, Any]:
    """The figures of a network."""
    groups = dict.fromkeys((*GROUPS, REST), 0.0)
    for kernel in found:
        group = next((name for name, operators in GROUPS.items() if kernel["operator"] in operators), REST)
        groups[group] += kernel["us"] / 1e3
    work = sum(kernel["operations"] for kernel in found) / 1e9
    peers = entry["peers"]
    return {
        "network": network, "ms": peers["zilc"]["ms"], "torch_ms": peers["torch"]["ms"],
        "ratio": peers["torch"]["zilc_ratio"], "nodes": len(found), "groups": groups, "gflop": work,
        "rate": work / groups["products"] * 1e3, "share": work / groups["products"] * 1e3 / best,
        "slowest": sorted(found, key=lambda kernel: -kernel["us"])[:10],
    }  # fmt: skip


def cells(entry: dict[str, Any]) -> list[str]:
    """A row for people."""
    return [
        entry["network"], f"{entry['ms']:.3g}", f"{entry['torch_ms']:.3g}", str(entry["nodes"]),
        *(f"{x:.3g}" for x in entry["groups"].values()), f"{entry['gflop']:.3g}", f"{entry['rate']:.0f}",
        f"{entry['share']:.0%}", f"{entry['groups']['products'] / entry['torch_ms']:.2f}",
    ]  # fmt: skip


def markdown(made: dict[str, Any]) -> str:
    """docs/PROFILE.md."""
    facts = made["facts"]
    lines = [
        "# Where a step's time goes", "",
        textwrap.fill(READING.format(large=LARGE, best=made["best"]), 110), "",
        f"{facts['date']}, machine {facts['machine']}, Python {facts['Python']}, onnxruntime {facts['onnxruntime']}, "
        f"torch {facts['torch']}.", "",
        *grid(HEADER, [cells(entry) for entry in made["rows"]]), "",
        "## The slowest kernels", "",
        *grid(
            ["network", "kernel", "ms", "of all"],
            [
                [entry["network"], f"{k['operator']} `{k['name']}`", f"{k['us'] / 1e3:.3g}",
                 f"{k['us'] / 1e3 / sum(entry['groups'].values()):.1%}"]
                for entry in made["rows"] for k in entry["slowest"][:5]
            ],
        ), "",
    ]  # fmt: skip
    if made["tried"]:
        lines += [
            "## What was tried", "",
            textwrap.fill(TRIED, 110), "",
            *grid(
                ["what", "how", "ms"],
                [[what, how, f"{ms:.3g}"] for what, forms in made["tried"].items() for how, ms in forms.items()],
            ), "",
        ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=8.0, help="of profiled steps, and of each side's rounds")
    parser.add_argument("--no-tried", action="store_true", help="leave out what was tried")
    parser.add_argument("--write", action="store_true", help="write docs/PROFILE.md and docs/profile.json")
    options = parser.parse_args()
    console = Console()
    side = bench.parse(["--seconds", str(options.seconds), "--rounds", str(options.rounds)])
    best, measured = large_product(), []
    for network in options.networks.split(","):
        console.print(f"{network} …", markup=False)
        entry = bench.measure(network, ["zilc", "torch"], options.rounds, side, "sgd", console)
        measured.append((network, kernels(network, options.seconds), entry))
        best = max(best, large_product())  # the machine's speed varies
    rows = [row(*each, best) for each in measured]
    made: dict[str, Any] = {
        "facts": {
            "date": date.today().isoformat(), "machine": f"{processor()} ({os.cpu_count()} cores)",
            "Python": platform.python_version(), "onnxruntime": onnxruntime.__version__, "torch": version("torch"),
        },
        "best": best, "rows": rows, "tried": {} if options.no_tried else tried(),
    }  # fmt: skip
    table = Table(*HEADER)
    for entry in rows:
        table.add_row(*cells(entry))
    console.print(table)
    for what, forms in made["tried"].items():
        console.print(f"{what}: " + ", ".join(f"{how} {ms:.3g} ms" for how, ms in forms.items()), markup=False)
    if options.write:
        (DOCS / "PROFILE.md").write_text(markdown(made))
        (DOCS / "profile.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
