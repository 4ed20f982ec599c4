"""What was tried instead of what is emitted: forms of one computation in turns, and steps under other settings.

A part of tools/profile_step.py.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import bench
import numpy as np
import onnx.parser
import onnxruntime

import zilc
from zilc import models, pipeline
from zilc.lowerings import Lowerings
from zilc.passes.layouts import settle_layouts
from zilc.providers import Providers
from zilc.session import make_session, stop_spinning
from zilc.vjp import winograd

CPU: Providers = ["CPUExecutionProvider"]
HEAD = '<ir_version: 8, opset_import: ["": 17]> g'
CONSTANTS = "<float z = {0}, int64[1] first = {0}, int64[1] last = {-1}, int64[3] others = {0, 2, 3}>"


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


def runner(text: str, feeds: Mapping[str, np.ndarray], over: str = "") -> Callable[[], object]:
    """A graph in ONNX's text form, its inputs bound; its output is written over the input ``over``."""
    session = make_session(onnx.parser.parse_model(text), CPU, spinning=False)
    binding, (made,) = session.io_binding(), session.get_outputs()
    for given in session.get_inputs():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(feeds[given.name])
        binding.bind_ortvalue_input(given.name, value)
        if given.name == over:
            binding.bind_ortvalue_output(made.name, value)
    if not over:
        binding.bind_output(made.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


@dataclass(frozen=True)
class Forms:
    """Several ways to compute one thing.

    Attributes:
        operands: shapes of the inputs, float32.
        result: shape of the output ``o``.
        forms: nodes in ONNX's text form, the emitted ones first.
        over: the input that the output is written over.
        rounds, inner: rounds, and runs in each.
    """

    operands: Mapping[str, tuple[int, ...]]
    result: tuple[int, ...]
    forms: Mapping[str, str]
    over: str = ""
    rounds: int = 21
    inner: int = 10

    def runner(self, text: str) -> Callable[[], object]:
        rng = np.random.default_rng(0)
        feeds = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in self.operands.items()}
        given = ", ".join(f"float{list(shape)} {name}" for name, shape in self.operands.items())
        return runner(f"{HEAD} ({given}) => (float{list(self.result)} o) {CONSTANTS} {{ {text} }}", feeds, self.over)


def update(rows: int, into: int, out: int, *, apart: bool, rounds: int = 41, inner: int = 20) -> Forms:
    """Of a weight [out, into], which is what its gradient is subtracted from or its product's addend."""
    forms = {
        "Sub(W, Gemm(e, x))": "d = Gemm <transA = 1> (e, x)  o = Sub(w, d)",
        "Gemm(e, x, W), alpha = -1": "o = Gemm <transA = 1, alpha = -1.0> (e, x, w)",
    }
    operands = {"w": (out, into), "e": (rows, out), "x": (rows, into)}
    return Forms(operands, (out, into), forms if apart else dict(reversed(forms.items())), "w", rounds, inner)


def row_sum(rows: int, columns: int) -> Forms:
    forms = {
        "a product with ones": "o = MatMul(u, g)",
        "ReduceSum": "o = ReduceSum <keepdims = 0> (g, first)",
    }
    return Forms({"g": (rows, columns), "u": (rows,)}, (columns,), forms, rounds=41, inner=20)


def biased(rows: int, into: int, out: int) -> Forms:
    forms = {"MatMul, Add": "p = MatMul(x, w)  o = Add(p, b)", "Gemm": "o = Gemm(x, w, b)"}
    return Forms({"x": (rows, into), "w": (into, out), "b": (out,)}, (rows, out), forms)


def attended(batch: int, heads: int, keys: int, width: int, *, values: bool) -> Forms:
    """Softmax's derivative within an attention, whose sum is over keys, or over the elements of a head."""
    shapes = {"p": (batch, heads, keys, keys), **dict.fromkeys("vyg", (batch, heads, keys, width))}
    before = "t = Transpose <perm = [0, 1, 3, 2]> (v)  d = MatMul(g, t)"
    behind = "s = ReduceSum(q, last)  c = Sub(d, s)  o = Mul(p, c)"
    forms = {"sum of dY Y": f"{before}  q = Mul(g, y)  {behind}", "sum of P dP": f"{before}  q = Mul(d, p)  {behind}"}
    return Forms(shapes, shapes["p"], forms if values else dict(reversed(forms.items())))


def normalized(rows: int, width: int) -> Forms:
    """LayerNormalization's derivative, of the normalized x and of 1/deviation."""
    last = "c = Sub(h, m)  k = Mul(x, n)  e = Sub(c, k)  o = Mul(e, r)"
    forms = {
        "means by ReduceMean":
            f"h = Mul(g, s)  t = Mul(h, x)  m = ReduceMean <axes = [-1]> (h)  n = ReduceMean <axes = [-1]> (t)  {last}",
        "means as products with the scale":
            f"a = Unsqueeze(q, last)  t = Mul(g, x)  m = MatMul(g, a)  n = MatMul(t, a)  h = Mul(g, s)  {last}",
    }  # fmt: skip
    shapes = {"g": (rows, width), "x": (rows, width), "r": (rows, 1), "s": (width,), "q": (width,)}
    return Forms(shapes, (rows, width), forms)


FORMS: dict[str, Forms] = {
    "Relu's derivative on [20, 64, 112, 112]": Forms(
        {"y": (20, 64, 112, 112), "g": (20, 64, 112, 112)}, (20, 64, 112, 112),
        {
            "g Cast(y > 0)": "c = Greater(y, z)  s = Cast <to = 1> (c)  o = Mul(g, s)",
            "Where(y > 0, g, 0)": "c = Greater(y, z)  o = Where(c, g, z)",
            "g Sign(Relu(y))": "r = Relu(y)  s = Sign(r)  o = Mul(g, s)",
        }, rounds=9, inner=1,
    ),
    "update of a weight of [128, 128], 20 rows": update(20, 128, 128, apart=False),
    "update of a weight of [128, 784], 20 rows": update(20, 784, 128, apart=True),
    "update of a weight of [512, 512], 64 rows": update(64, 512, 512, apart=True),
    "update of a weight of [4096, 4096], 20 rows": update(20, 4096, 4096, apart=False, rounds=9, inner=2),
    "product of [512, 256] and [256, 1024] with a bias": biased(512, 256, 1024),
    "product of [4096, 64] and [64, 256] with a bias": biased(4096, 64, 256),
    "sum over the rows of [20, 128] (biases, LayerNormalization's scale)": row_sum(20, 128),
    "sum over the rows of [512, 256]": row_sum(512, 256),
    "sum over the rows of [4096, 768]": row_sum(4096, 768),
    "Softmax's derivative on [4, 8, 128, 128]": Forms(
        {"y": (4, 8, 128, 128), "g": (4, 8, 128, 128)}, (4, 8, 128, 128),
        {
            "y (g - sum(g y))": "p = Mul(g, y)  s = ReduceSum(p, last)  d = Sub(g, s)  o = Mul(y, d)",
            "g y - y sum(g y)": "p = Mul(g, y)  s = ReduceSum(p, last)  q = Mul(y, s)  o = Sub(p, q)",
            "the sum as g y^T, row by row":
                "k = Constant <value_ints = [-2]> ()  a = Unsqueeze(g, k)  b = Unsqueeze(y, last)  s = MatMul(a, b)  "
                "t = Squeeze(s, last)  "
                "d = Sub(g, t)  o = Mul(y, d)",
        },
    ),
    "softmax in an attention, 4 x 8 heads, 64 keys, 32 elements": attended(4, 8, 64, 32, values=False),
    "softmax in an attention, 12 heads, 512 keys, 64 elements": attended(1, 12, 512, 64, values=True),
    "LayerNormalization's derivative on [256, 256]": normalized(256, 256),
    "LayerNormalization's derivative on [1024, 768]": normalized(1024, 768),
    "sum over a map's places on [20, 64, 56, 56] (BatchNormalization)": Forms(
        {"g": (20, 64, 56, 56), "x": (20, 64, 56, 56)}, (1, 64, 1, 1),
        {
            "ReduceSum(g x)": "p = Mul(g, x)  o = ReduceSum(p, others)",
            "ReduceSum over places, then examples":
                "p = Mul(g, x)  w = Constant <value_ints = [2, 3]> ()  q = ReduceSum(p, w)  o = ReduceSum(q, first)",
        }, rounds=9, inner=1,
    ),
}  # fmt: skip


def tried() -> dict[str, dict[str, float]]:
    """Milliseconds of what is emitted, first, and of what was tried instead."""
    made: dict[str, dict[str, float]] = {}
    for what, one in FORMS.items():
        runs = {form: one.runner(text) for form, text in one.forms.items()}
        made[what] = paired(runs, one.rounds, one.inner)
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
