"""Memory budgets: the same bits, what is alive, what a runtime makes of it, and what it takes."""

from __future__ import annotations

import collections
import json
import math
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest

import zilc
from tests.command import SKIP, Command, write
from tests.graphs import model as parsed
from zilc import ir, models, onnx_io, signature
from zilc.errors import OptionError
from zilc.models.network import Network
from zilc.passes.liveness import Problem
from zilc.session import make_session
from zilc.sizes import parse_size, show_size

CPU = ["CPUExecutionProvider"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def convolutional(dtype: str = "float32") -> onnx.ModelProto:
    """Four times Conv, BatchNormalization, Relu, Dropout around two skips, to be turned to training."""
    net = Network("convolutional", seed=0, opset=18, dtype=dtype)
    op = net.op
    h: Any = net.input("image", [4, 3, 16, 16])
    channels = 3
    for k in range(4):
        name = f"block{k}"
        x = h
        h = net.conv(x, f"{name}.conv", channels, 8, 3, pad=1)
        scale, bias = net.full(f"{name}.scale", (8,), 1.0), net.full(f"{name}.bias", (8,), 0.1)
        mean, variance = net.full(f"{name}.mean", (8,), 0.0), net.full(f"{name}.variance", (8,), 1.0)
        with op.place(name):
            h = op.BatchNormalization(h, scale, bias, mean, variance, epsilon=1e-5)
            h = op.Dropout(op.Relu(h), np.asarray(0.25, np.float32))
            if k in (1, 3):
                h = op.Add(h, x)
        channels = 8
    with op.place("head"):
        h = op.Flatten(op.GlobalAveragePool(h))
    return net.finish("logits", net.linear(h, "fc", 8, 5), [4, 5])


def decoder(dtype: str = "float32") -> onnx.ModelProto:
    """Two blocks with Gelu from its parts, and normalizations behind sums, which onnxruntime fuses where it may."""
    return models.build("decoder", batch=4, length=32, vocabulary=64, d_model=32, heads=4, layers=2, dtype=dtype)


NETWORKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mlp": (lambda dtype: models.build("mlp4", batch=2048, inputs=16, hidden=24, dtype=dtype), {}),
    "convolutional": (convolutional, {"mode": "train"}),
    "transformer": (
        lambda dtype: models.build(
            "transformer", batch=8, length=24, vocabulary=20, d_model=32, d_ff=64, heads=4, layers=2, dtype=dtype
        ),
        {},
    ),
    "decoder": (decoder, {}),
}


@cache
def built(network: str, dtype: str = "float32") -> onnx.ModelProto:
    return NETWORKS[network][0](dtype)


@cache
def emitted(network: str, budget: int | str | None = None, dtype: str = "float32", **more: Any) -> zilc.TrainingStep:
    options = {"loss": "cross-entropy", **NETWORKS[network][1], **more}
    return zilc.emit_training(built(network, dtype), memory_budget=budget, **options)


def peak(network: str, dtype: str = "float32") -> int:
    """Activations alive at most, without recomputation."""
    return emitted(network, "1TiB", dtype).signature["recompute"]["peak_without"]


def shares(network: str, dtype: str = "float32") -> list[int]:
    """Budgets: nearly all, and as little as there is."""
    return [int(0.85 * peak(network, dtype)), least(network, dtype)]


@cache
def least(network: str, dtype: str = "float32") -> int:
    """The least bytes that the error names."""
    with pytest.raises(OptionError) as caught:
        emitted(network, 1, dtype)
    return int(re.search(r"gets down to .*?\(([\d,]+) bytes\)", str(caught.value))[1].replace(",", ""))  # type: ignore[index]


def updates(step: zilc.TrainingStep, feeds: dict[str, np.ndarray], count: int = 2) -> dict[str, np.ndarray]:
    """Loss and state after some updates."""
    trainer = zilc.Trainer(step, lr=0.05, providers=CPU, seed=3)
    losses = [trainer.step(feeds) for _ in range(count)]
    return {"loss": np.asarray(losses), **trainer.state}


def feeds_of(network: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    model = built(network, dtype)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    return models.random_feeds(model, batch, np.random.default_rng(1), loss="cross-entropy")


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    differing = [name for name in a if a[name].tobytes() != b[name].tobytes()]
    assert not differing


def optimised(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """What onnxruntime runs after its own optimisation, with no option of ours."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(onnx_io.serialize(model), options, providers=CPU)
    return onnx.load(options.optimized_model_filepath)


def role(node: onnx.NodeProto) -> str:
    return next((entry.value for entry in node.metadata_props if entry.key == "zilc.role"), "")


def fact(node: onnx.NodeProto, key: str) -> str | None:
    return next((entry.value for entry in node.metadata_props if entry.key == f"zilc.{key}"), None)


# --- the same bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_updates_are_bit_identical_within_any_budget(network: str) -> None:
    feeds = feeds_of(network)
    without = updates(emitted(network), feeds)
    for budget in shares(network):
        step = emitted(network, budget)
        assert step.signature["recompute"]["nodes"] > 0
        assert_same_bits(updates(step, feeds), without)


@pytest.mark.parametrize("network", ["mlp", "transformer"])
def test_in_float64_too(network: str) -> None:
    feeds = feeds_of(network, "float64")
    step = emitted(network, least(network, "float64"), "float64")
    assert_same_bits(updates(step, feeds), updates(emitted(network, None, "float64"), feeds))


@pytest.mark.parametrize("network", NETWORKS)
def test_zil_equals_bp_within_a_budget(network: str) -> None:
    feeds, budget = feeds_of(network), int(0.85 * peak(network))
    zil, bp = emitted(network, budget), emitted(network, budget, algorithm="bp")
    assert bp.signature["recompute"]["nodes"] > 0
    assert_same_bits(updates(zil, feeds), updates(bp, feeds))


def test_gradients_and_adam_are_the_same() -> None:
    feeds = feeds_of("decoder")
    for more in ({"optimizer": "adam"}, {"outputs": "both"}):
        budget = int(0.5 * peak("decoder"))
        a, b = emitted("decoder", budget, **more), emitted("decoder", None, **more)
        assert a.signature["recompute"]["nodes"] > 0
        assert_same_bits(updates(a, feeds), updates(b, feeds))


def test_a_nan_passes_as_it_does_without() -> None:
    """The barrier reads elements of predictions and errors: what they hold must not matter."""
    feeds = feeds_of("mlp")
    feeds["input"] = feeds["input"].copy()
    feeds["input"][0] = np.nan
    feeds["input"][1] = np.inf
    found = updates(emitted("mlp", least("mlp")), feeds)
    assert np.isnan(found["loss"]).all()
    assert_same_bits(found, updates(emitted("mlp"), feeds))


def test_the_reference_evaluator_agrees() -> None:
    """No part of it depends on how onnxruntime treats a Reshape."""
    from onnx.reference import ReferenceEvaluator

    model = models.build("mlp3", batch=64, inputs=6, hidden=8, classes=3)
    whole = zilc.emit_training(model, loss="cross-entropy", memory_budget="1TiB").signature["recompute"]
    step = zilc.emit_training(model, loss="cross-entropy", memory_budget=int(0.9 * whole["peak_without"]))
    assert step.signature["recompute"]["nodes"] > 0
    feeds = models.random_feeds(model, 64, loss="cross-entropy")
    full = {**feeds, **dict(step.state), "lr": np.asarray(0.1, np.float32)}
    without = zilc.emit_training(model, loss="cross-entropy")
    for a, b in zip(
        ReferenceEvaluator(step.model).run(None, full), ReferenceEvaluator(without.model).run(None, full), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_evaluation_and_export_are_those_without(tmp_path: Path) -> None:
    """In training mode: what is recomputed has an inference form too."""
    feeds = feeds_of("convolutional")
    found = []
    for budget in (None, least("convolutional")):
        trainer = zilc.Trainer(emitted("convolutional", budget), lr=0.05, providers=CPU, seed=3)
        trainer.step(feeds)
        evaluation = trainer.evaluate(feeds)
        trainer.export(tmp_path / "trained.onnx")
        written = (tmp_path / "trained.onnx").read_bytes()
        found.append((evaluation.loss, evaluation.predictions["logits"].tobytes(), written))
    assert found[0] == found[1]


# --- what is alive ------------------------------------------------------------------------------------------------


def alive(step: zilc.TrainingStep) -> int:
    """Bytes of activations alive at most, counted from the emitted file by a loop that shares no code with the pass:
    from the node that makes a tensor to its last reader, a Reshape and its like naming the same memory."""
    graph = step.model.graph
    sizes = {}
    for info in (*graph.value_info, *graph.output):
        kind = info.type.tensor_type
        count = int(np.prod([d.dim_value for d in kind.shape.dim], dtype=np.int64))
        sizes[info.name] = count * onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    outside = {i.name for i in graph.input} | {o.name for o in graph.output}
    fixed = {t.name for t in graph.initializer}
    memory: dict[str, str] = {}
    for node in graph.node:
        if all(name in fixed for name in node.input if name) and node.op_type != "Expand":
            fixed.update(node.output)
            continue
        for name in node.output:
            if not name or name in outside:
                continue
            named = node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
            memory[name] = memory.get(node.input[0], "") if named else name
    last = {}
    for place, node in enumerate(graph.node):
        for name in (*node.input, *node.output):
            if memory.get(name):
                last[memory[name]] = place
    highest, now = 0, 0
    for place, node in enumerate(graph.node):
        now += sum(sizes[name] for name in node.output if memory.get(name) == name)
        highest = max(highest, now)
        ending = {memory[name] for name in (*node.input, *node.output) if memory.get(name)}
        now -= sum(sizes[name] for name in ending if last[name] == place)
    assert now == 0
    return highest


@pytest.mark.parametrize("network", NETWORKS)
def test_the_file_keeps_within_its_budget(network: str) -> None:
    assert alive(emitted(network)) == peak(network)
    for budget in shares(network):
        found = emitted(network, budget).signature["recompute"]
        assert found["budget"] == budget
        assert found["peak"] <= budget < found["peak_without"]
        # The zeros of the barriers, some bytes each, are not simulated.
        assert found["peak"] <= alive(emitted(network, budget)) <= found["peak"] + 1024


def test_less_memory_takes_more_recomputation() -> None:
    made = [emitted("decoder", int(share * peak("decoder"))).signature["recompute"] for share in (0.9, 0.7, 0.5)]
    assert [m["bytes"] for m in made] == sorted({m["bytes"] for m in made})


def test_a_chain_needs_memory_like_the_root_of_its_length() -> None:
    """Chen et al.: n layers in the memory of some 2 √n, for one more forward pass."""
    n, width, batch = 64, 8, 1024
    lines = [f"h{k} = MatMul (t{k}, w{k}) t{k + 1} = Tanh (h{k})" for k in range(n)]
    weights = ", ".join(f"float[{width}, {width}] w{k}" for k in range(n))
    step = zilc.emit_training(
        parsed(
            f'<ir_version: 10, opset_import: ["" : 18]> chain (float[{batch}, {width}] t0) => '
            f"(float[{batch}, {width}] t{n}) <{weights}> {{ {' '.join(lines)} }}"
        ),
        memory_budget=(2 * 8 + 6) * width * batch * 4,
    )
    found = step.signature["recompute"]
    assert found["peak_without"] >= n * width * batch * 4
    products = [n for n in step.model.graph.node if role(n) == "recompute" and n.op_type == "MatMul"]
    assert len(products) <= n


def test_a_budget_that_suffices_changes_nothing() -> None:
    step = emitted("decoder", peak("decoder"))
    assert step.signature["recompute"]["nodes"] == step.signature["recompute"]["bytes"] == 0
    assert list(step.model.graph.node) == list(emitted("decoder").model.graph.node)


def test_no_budget_no_trace_of_it() -> None:
    step = emitted("decoder")
    assert "recompute" not in step.signature
    assert not [n for n in step.model.graph.node if role(n) == "recompute"]


def test_the_same_input_gives_the_same_bytes() -> None:
    budget = int(0.5 * peak("transformer"))
    again = zilc.emit_training(built("transformer"), loss="cross-entropy", memory_budget=budget)
    assert onnx_io.serialize(again.model) == onnx_io.serialize(emitted("transformer", budget).model)


# --- what the nodes say -------------------------------------------------------------------------------------------


def test_recomputed_nodes_say_what_they_repeat() -> None:
    step = emitted("decoder", least("decoder"))
    jsonschema.validate(step.signature, signature.schema())
    assert signature.read(step.model) == step.signature
    forward = collections.defaultdict(set)
    for node in step.model.graph.node:
        if role(node) == "forward":
            forward[node.op_type, fact(node, "vertex")].add(fact(node, "level"))
    again = [n for n in step.model.graph.node if role(n) == "recompute" and n.op_type in ("MatMul", "Softmax", "Tanh")]
    assert again
    for node in again:
        assert fact(node, "level") in forward[node.op_type, fact(node, "vertex")]
        assert node.name.count(".recompute")


# --- what a runtime makes of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_onnxruntime_does_not_undo_it(network: str, tmp_path: Path) -> None:
    """By default its optimizer merges equal operators, and fuses neighbours.  What is repeated must still be there,
    made by the operator, fused or not, that makes it without a budget; and so must the first runs."""
    step, without = emitted(network, least(network)), emitted(network)
    makers = []
    for model in (step.model, without.model):
        found = optimised(model, tmp_path).graph.node
        makers.append({name: node.op_type for node in found for name in node.output if name})
    repeated = {
        name: re.sub(r"\.recompute(_\d+)?$", "", name)
        for node in step.model.graph.node
        if role(node) == "recompute" and not node.name.split("/")[-2].endswith(".recompute")
        for name in node.output
    }
    compared = 0
    for name, first in repeated.items():
        if makers[1].get(first, "Reshape") not in ("Transpose", "Reshape"):  # which onnxruntime moves about
            compared += 1
            # A first run that nobody reads any more is not there at all.
            assert makers[0].get(name) == makers[0].get(first, makers[1][first]) == makers[1][first], name
    assert compared > 2
    zeros = [n for n in step.model.graph.node if n.op_type == "GatherND"]
    assert {n.output[0] for n in zeros} <= makers[0].keys()
    # Nothing is fused that was not before.
    counts = [collections.Counter(found.values()) for found in makers]
    assert {op for op in counts[0] if op not in counts[1]} <= {"GatherND", "Cast", "Min", "Add", "Reshape"}


def executed(step: zilc.TrainingStep, feeds: dict[str, np.ndarray], folder: Path) -> list[str]:
    """Names of nodes in the order in which the trainer's session runs them, by its profile."""
    make = onnxruntime.SessionOptions

    def profiling() -> Any:
        options = make()
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
        return options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", profiling)
        session = make_session(step.model, CPU)
    session.run(None, {**feeds, **dict(step.state), "lr": np.asarray(0.1, np.float32)})
    events = [e for e in json.loads(Path(session.end_profiling()).read_text()) if e.get("cat") == "Node"]
    events.sort(key=lambda e: e["ts"])
    ran = [e["name"].removesuffix("_kernel_time") for e in events if e["name"].endswith("_kernel_time")]
    held = {node.name for node in step.model.graph.node}
    return [name for name in ran if name in held]  # fused nodes have names of onnxruntime's


def test_what_is_repeated_runs_when_the_wave_comes(tmp_path: Path) -> None:
    """In the order of the file: after the last errors before it, for which only its barrier makes it wait."""
    step, feeds = emitted("decoder", least("decoder")), feeds_of("decoder")
    ran = executed(step, feeds, tmp_path)
    place = {name: k for k, name in enumerate(ran)}
    written = {node.name: k for k, node in enumerate(step.model.graph.node)}
    roles = {node.name: role(node) for node in step.model.graph.node}
    errors = [name for name in ran if roles[name] == "error"]
    repeated = [name for name in ran if roles[name] == "recompute" and re.search(r"\.recompute(_\d+)?$", name)]
    assert len(repeated) > 20
    for name in repeated:
        before = sorted((e for e in errors if written[e] < written[name]), key=written.__getitem__)
        assert before
        assert place[name] > max(place[e] for e in before[-3:]), name


def test_the_wave_holds_nothing_in_the_forward_pass(tmp_path: Path) -> None:
    """A derivative reads predictions alone; without a budget onnxruntime runs some while it goes forward."""
    early = []
    for budget in (least("decoder"), None):
        step = emitted("decoder", budget)
        sizes = onnx_io.shapes(step.model)
        nodes = {n.name: n for n in step.model.graph.node}
        ran = executed(step, feeds_of("decoder"), tmp_path)
        forward = ran[: next(k for k, name in enumerate(ran) if role(nodes[name]) == "loss" and "LogSoftmax" in name)]
        early.append(
            {
                name for name in forward
                if role(nodes[name]) in ("error", "update") and nodes[name].op_type != "Transpose"
                and any(math.prod(sizes[t]) >= 4 * 32 * 32 for t in nodes[name].output)
                and nodes[name].op_type != "Flatten"
            }
        )  # fmt: skip
    assert not early[0]
    assert early[1]


NARROW = """
import sys
sys.path.insert(0, {tools!r})
from bench_task import peak_mib, reset_peak
import gc
import numpy as np
import zilc
from zilc.models.network import Network
net = Network("narrow", seed=0, opset=18, dtype="float32")
h = net.input("x", [32768, 16])
for k in range(24):
    h = net.linear(h, f"layer{{k}}", 16, 16)
    with net.op.place(f"layer{{k}}"):
        h = net.op.Tanh(h)
model = net.finish("y", net.linear(h, "last", 16, 2), [32768, 2])
step = zilc.emit_training(model, memory_budget={budget!r})
trainer = zilc.Trainer(step, lr=0.1, providers=["CPUExecutionProvider"])
feeds = {{"x": np.ones((32768, 16), np.float32), "target": np.zeros((32768, 2), np.float32)}}
gc.collect()
reset_peak()
before = peak_mib()
losses = [trainer.step(feeds) for _ in range(3)]
print(peak_mib() - before, losses[-1].hex())
"""


def test_a_process_takes_less_memory() -> None:
    """A narrow network, deep and on many examples: 24 activations of 2 MiB, and a budget for ten of them."""
    found = []
    for budget in (None, "20MiB"):
        code = NARROW.format(tools=str(ROOT / "tools"), budget=budget)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
        )
        growth, loss = done.stdout.split()
        found.append((float(growth), loss))
    (without, loss), (within, same) = found
    assert loss == same
    assert without > 45
    assert within <= 0.7 * without


# --- the command, and what cannot be ------------------------------------------------------------------------------


def test_the_command_says_what_it_takes(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    onnx.save(models.build("decoder", length=32, vocabulary=64, d_model=32, heads=4, layers=2), path)
    asked = ["emit-training", path, "--loss", "cross-entropy", "--dim", "N=4", "-o", tmp_path / "step.onnx"]
    budget = int(0.7 * peak("decoder"))
    done = command(*asked, "--memory-budget", str(budget), "--json")
    assert done.status == 0
    assert done.json["signature"]["recompute"] == emitted("decoder", budget).signature["recompute"]
    shown = command(*asked, "--memory-budget", "1GiB").out
    assert f"{show_size(peak('decoder'))} at most, within the budget of 1.0 GiB; nothing is recomputed" in shown
    shown = command(*asked, "--memory-budget", str(budget)).out
    assert re.search(r"activations .* at most, within the budget of .* without; \d+ nodes recompute", shown)
    assert "--memory-budget SIZE" in command("emit-training", "--help").out


def test_train_takes_a_budget(command: Command, tmp_path: Path) -> None:
    onnx.save(models.build("mlp4", inputs=16, hidden=24), tmp_path / "mlp.onnx")
    rng = np.random.default_rng(0)
    data = {"input": rng.standard_normal((4096, 16)).astype(np.float32), "target": rng.integers(0, 10, 4096)}
    np.savez(tmp_path / "data.npz", **data)
    trained = []
    for k, budget in enumerate([[], ["--memory-budget", str(least("mlp"))]]):
        done = command(
            "train", tmp_path / "mlp.onnx", "--data", tmp_path / "data.npz", "--loss", "cross-entropy", "--lr", "0.1",
            "--epochs", "1", "--batch-size", "2048", "--dim", "N=2048", "--device", "cpu", *budget,
            "-o", tmp_path / f"{k}.onnx",
        )  # fmt: skip
        assert done.status == 0, done.err
        trained.append((tmp_path / f"{k}.onnx").read_bytes())
    assert trained[0] == trained[1] != (tmp_path / "mlp.onnx").read_bytes()


def test_symbolic_sizes_are_named(command: Command, tmp_path: Path) -> None:
    done = command("emit-training", write(tmp_path / "skip.onnx", SKIP), "--memory-budget", "1MiB")
    assert done.status == 1
    assert "--memory-budget" in done.err
    assert "N is symbolic" in done.err
    assert "--dim N=SIZE" in done.err


def test_a_budget_out_of_reach_tells_the_least_and_the_most() -> None:
    with pytest.raises(OptionError) as caught:
        emitted("decoder", 1000)
    numbers = [int(n.replace(",", "")) for n in re.findall(r"\(([\d,]+) bytes\)", str(caught.value))]
    assert numbers == [1000, least("decoder"), peak("decoder")]
    assert least("decoder") < 0.5 * peak("decoder")
    # It can be reached, and is.
    assert emitted("decoder", least("decoder")).signature["recompute"]["peak"] <= least("decoder")


def test_the_least_is_no_less_than_what_one_node_needs() -> None:
    """A Tanh's gradient reads two tensors of the hidden width and makes one."""
    assert 2 * 2048 * 24 * 4 <= least("mlp") < 5 * 2048 * 24 * 4


@pytest.mark.parametrize(
    "options", [{"schedule": "literal"}, {"algorithm": "il"}], ids=["literal", "il"]
)
def test_the_literal_schedule_has_no_budget(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"Loop.*wavefront"):
        zilc.emit_training(built("mlp"), loss="cross-entropy", memory_budget="1GiB", **options)


@pytest.mark.parametrize(
    ("text", "count"),
    [("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("4096", 4096), (4096, 4096), ("2 kib", 2048), (".5 KB", 500)],
)
def test_sizes_are_read(text: int | str, count: int) -> None:
    assert parse_size(text, "here") == count


@pytest.mark.parametrize("text", ["", "MiB", "12 parsecs", "-1", "1e9", "0", "0.2", True, "1.2.3MB"])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(OptionError, match="here"):
        parse_size(text, "here")


def test_sizes_are_shown() -> None:
    assert [show_size(n) for n in (3, 2048, 3 << 20, 5 << 29)] == ["3 B", "2.0 KiB", "3.0 MiB", "2.5 GiB"]


# --- what may not run again ---------------------------------------------------------------------------------------


def test_what_the_runtime_draws_and_what_subgraphs_read_stays() -> None:
    """A RandomNormalLike makes other numbers each time; a subgraph names what it captures."""
    model = parsed(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        random (float[256, 8] x, bool c) => (float[256, 8] y) <float[8, 8] w0, float[8, 8] w1> {
            a = MatMul (x, w0)
            t = Tanh (a)
            noise = RandomNormalLike (t)
            n = Mul (t, noise)
            e = Exp (n)
            u = If (c) <
                then_branch = g1 () => (float[256, 8] p) { p = Neg (e) },
                else_branch = g2 () => (float[256, 8] q) { q = Abs (e) }
            >
            y = MatMul (u, w1)
        }
        """
    )
    step = zilc.emit_training(model, memory_budget="1GiB")
    graph = ir.to_graph(step.model)
    problem = Problem(graph, onnx_io.shapes(step.model))
    both = zip(problem.nodes, problem.again, strict=True)
    nodes = [(node.op, may) for node, may in both if node.metadata["zilc.role"] == "forward"]
    assert ("Tanh", True) in nodes
    assert ("Mul", True) in nodes
    assert {op for op, may in nodes if not may} == {"RandomNormalLike", "If", "Exp"}
