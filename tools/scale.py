"""Compile time and memory by size: ``python tools/scale.py [--models chain-1000,gpt2] [--write]``.

Each model is compiled in a process of its own: protobuf loads the file and saves it again, then ``levelize`` and
``emit_training`` read the same file, the clocks around each; the peak of the resident memory is the process's.  A run
on a small model first leaves imports out of the figures.  Writes docs/SCALE.md and docs/scale.json with ``--write``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx_graphsurgeon as gs

from zilc import onnx_io
from zilc.machine import processor
from zilc.models import decoder, resnet18
from zilc.models.network import Network, window

HERE = Path(__file__).resolve().parent
CHAINS = (1_000, 10_000, 100_000)
#: What is measured; a run that takes longer than ``TIMEOUT`` seconds is reported as such.
MODELS = ("chain-1000", "chain-10000", "resnet152", "gpt2", "decoder-2b", "chain-100000")
TIMEOUT = 1500
#: The targets: seconds for ``emit_training``, and levelize in times of protobuf's load and save.
EMIT_SECONDS, LEVELIZE_TIMES = 5.0, 5.0


# --- models -----------------------------------------------------------------------------------------------------


def chain(vertices: int, width: int = 4) -> onnx.ModelProto:
    """MatMul, Relu, Relu, Add over and over, one vertex after the other.

    Each Add reads the vertex before and the one three further up; every eighth one sixteen further up.  Every tenth
    MatMul has a parameter of its own, small and positive; the rest read a constant, cast from int8: minus the identity,
    whose products the Relu behind cuts off, so that positive values neither grow nor die along the chain.
    """
    nodes: list[onnx.NodeProto] = []
    weights = [onnx.numpy_helper.from_array(-np.eye(width, dtype=np.int8), "mix.int8")]
    nodes.append(onnx.helper.make_node("Cast", ["mix.int8"], ["mix"], name="mix", to=onnx.TensorProto.FLOAT))
    names = ["x"]
    for k in range(vertices):
        out, last = "y" if k == vertices - 1 else f"v{k}", names[-1]
        if k % 4 == 0:
            factor = "mix"
            if k % 40 == 0:
                factor = f"w{k}"
                weights.append(onnx.numpy_helper.from_array(np.full((width, width), 1e-3, np.float32), factor))
            op, operands = "MatMul", [last, factor]
        elif k % 4 == 3:
            op, operands = "Add", [last, names[-min(len(names), 16 if k % 32 == 31 else 4)]]
        else:
            op, operands = "Relu", [last]
        nodes.append(onnx.helper.make_node(op, operands, [out], name=f"n{k}"))
        names.append(out)
    made = onnx.helper.make_graph(
        nodes, "chain",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", width])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", width])],
        weights,
    )  # fmt: skip
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


class Quick(Network):
    """Parameters of one value, float32 at once: compile time does not hang on values, and drawing them is slow."""

    def normal(self, name: str, shape: Any, std: float) -> gs.Constant:
        return gs.Constant(self.op.fresh(name), np.full(tuple(shape), std, self.dtype))

    def uniform(self, name: str, shape: Any, bound: float) -> gs.Constant:
        return gs.Constant(self.op.fresh(name), np.full(tuple(shape), bound, self.dtype))


def resnet152(image: int = 224, width: int = 64, classes: int = 1000) -> onnx.ModelProto:
    """ResNet-152 (He et al. 2016): bottleneck blocks 3, 8, 36, 3; BatchNormalization kept; 60.2 million parameters."""
    net = Quick("resnet152", seed=0, opset=18, dtype="float32")
    op = net.op
    h: gs.Tensor = net.input("image", ["N", 3, image, image])
    h = resnet18._norm(net, resnet18._conv(net, h, "conv1", 3, width, 7, 2), "bn1", width)
    with op.place("stem"):
        h = op.MaxPool(op.Relu(h), **window(3, 2, 1))
    channels = width
    for stage, count in enumerate((3, 8, 36, 3)):
        inner = width * 2**stage
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            h = _bottleneck(net, h, f"layer{stage + 1}.{block}", channels, inner, stride)
            channels = 4 * inner
    with op.place("head"):
        h = op.Flatten(op.GlobalAveragePool(h))
    return net.finish("logits", net.linear(h, "fc", channels, classes), ["N", classes])


def _bottleneck(net: Network, x: gs.Tensor, name: str, channels: int, inner: int, stride: int) -> gs.Tensor:
    """relu(x' + bn(conv1x1(relu(bn(conv3x3(relu(bn(conv1x1(x)))))))))."""
    op, h, before = net.op, x, channels
    for k, (features, kernel, step) in enumerate(((inner, 1, 1), (inner, 3, stride), (4 * inner, 1, 1)), 1):
        h = resnet18._conv(net, h, f"{name}.conv{k}", before, features, kernel, step)
        h = resnet18._norm(net, h, f"{name}.bn{k}", features)
        before = features
        if k < 3:
            with op.place(name):
                h = op.Relu(h)
    if stride != 1 or channels != 4 * inner:
        x = resnet18._conv(net, x, f"{name}.downsample.0", channels, 4 * inner, 1, stride)
        x = resnet18._norm(net, x, f"{name}.downsample.1", 4 * inner)
    with op.place(name):
        return op.Relu(op.Add(h, x))


def gpt2(layers: int = 12) -> onnx.ModelProto:
    """GPT-2 small (Radford et al. 2019): 124 million parameters, the embedding tied to the head."""
    return decoder.build(vocabulary=50257, length=1024, d_model=768, heads=12, layers=layers)


class ByShape:
    """Names of files, and parameters that are nothing but a place in one of them."""

    def __init__(self, location: str) -> None:
        self.location, self.size = location, 0
        self.tensors: list[onnx.TensorProto] = []

    def parameter(self, name: str, shape: tuple[int, ...]) -> None:
        """Append a float32 tensor to the file."""
        length = 4 * int(np.prod(shape, dtype=np.int64))
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", self.size), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        self.size += length + -length % 4096


def sparse_decoder(
    folder: Path, *, d_model: int = 2560, layers: int = 28, heads: int = 32, vocabulary: int = 50304, length: int = 2048
) -> tuple[Path, int]:
    """A decoder whose weights are a file of holes: its size is that of the weights, and nothing lies in it.

    The graph is that of a small decoder, its initializers replaced by larger ones by name.

    Returns: the model's file, and how many parameters it has (2.3 billion by default).
    """
    small = 2 * heads
    proto = decoder.build(vocabulary=small + 1, length=length, d_model=small, heads=heads, layers=layers)
    place, sizes = ByShape("weights.bin"), {small: d_model, 4 * small: 4 * d_model, small + 1: vocabulary}
    kept, body = [], proto.graph
    for tensor in body.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or not tensor.dims or not tensor.name.startswith(_PARAMETERS):
            kept.append(_enlarged(tensor, sizes))
        else:
            # The first axis of the positions is the length, whatever else has its size.
            shape = [sizes.get(n, n) for n in tensor.dims]
            if tensor.name == "positions.weight":
                shape = [length, d_model]
            place.parameter(tensor.name, tuple(shape))
    del body.initializer[:], body.value_info[:]
    body.initializer.extend(kept)
    body.initializer.extend(place.tensors)
    body.output[0].type.tensor_type.shape.dim[2].dim_value = vocabulary
    with open(folder / place.location, "wb") as handle:
        os.truncate(handle.fileno(), place.size)
    path = folder / "decoder.onnx"
    path.write_bytes(onnx_io.serialize(proto))
    return path, sum(int(np.prod(t.dims, dtype=np.int64)) for t in place.tensors)


_PARAMETERS = ("embedding.", "positions.", "block", "norm.")


def _enlarged(tensor: onnx.TensorProto, sizes: dict[int, int]) -> onnx.TensorProto:
    """A small constant of the graph; in the target of a Reshape the model's width grows, and the heads' with it."""
    array = onnx.numpy_helper.to_array(tensor)
    if array.dtype != np.int64 or array.shape not in ((3,), (4,)):
        return tensor
    small, large = min(sizes), sizes[min(sizes)]
    made = array.copy()
    if array.shape == (3,) and array[-1] == small:
        made[-1] = large
    elif array.shape == (4,) and array[0] == 0 and array[2] * array[3] == small:
        made[-1] = large // array[2]
    return onnx.numpy_helper.from_array(made, tensor.name)


def build(name: str, folder: Path) -> Path:
    """The file of a model, made if it is not there."""
    if name == "decoder-2b":
        return sparse_decoder(folder)[0]
    path = folder / f"{name}.onnx"
    makers: dict[str, Callable[[], onnx.ModelProto]] = {"resnet152": resnet152, "gpt2": gpt2}
    made = chain(int(name.removeprefix("chain-"))) if name.startswith("chain-") else makers[name]()
    path.write_bytes(onnx_io.serialize(made))
    return path


# --- measuring --------------------------------------------------------------------------------------------------


def bytes_read() -> int:
    """Bytes that this process asked the kernel for; pages of a mapped file show in the resident memory instead."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line.split()[1] for line in lines if line.startswith("rchar:")))


def peak_mib() -> float:
    """The largest resident memory so far; getrusage's would start from that of the parent process."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(path: Path) -> dict[str, Any]:
    """Seconds of protobuf's load and save, GraphSurgeon's way in and out, nodes alone, levelize and emit_training.

    ``*_s`` are of the processor, which a busy machine stretches least; ``*_wall_s`` are on the wall.
    """
    import zilc

    zilc.levelize(chain(40))
    zilc.emit_training(chain(40))
    found: dict[str, Any] = {"file_bytes": path.stat().st_size}
    data = path.with_name("weights.bin")
    outside = path.name == "decoder.onnx" and data.exists()
    found["external_bytes"] = data.stat().st_size if outside else 0
    saved = path.with_suffix(".again")

    with clock(found, "protobuf"):
        proto = onnx.load(str(path), load_external_data=False)
        saved.write_bytes(proto.SerializeToString())
    saved.unlink()
    found["nodes"] = len(proto.graph.node)
    found["parameters"] = sum(
        int(np.prod(t.dims, dtype=np.int64)) for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT
    )
    with clock(found, "graphsurgeon"):
        gs.export_onnx(gs.import_onnx(proto), do_type_check=False)
    names = _only_nodes(proto)
    del proto

    before, base = bytes_read(), peak_mib()
    with clock(found, "levelize"):
        levelled = zilc.levelize(path)
    found["levels"], found["vertices"] = levelled.report["levels"], levelled.report["vertices"]
    found["identities"] = levelled.report["identities"]["shared"]["vertices"]
    del levelled
    gc.collect()
    with clock(found, "nodes"):
        write_nodes(names, found["identities"])
    del names
    with clock(found, "emit"):
        step = zilc.emit_training(path)
    found["training_nodes"] = len(step.model.graph.node)
    found["read_bytes"], found["peak_mib"], found["peak_before_mib"] = bytes_read() - before, peak_mib(), base
    return found


def _only_nodes(proto: onnx.ModelProto) -> onnx.GraphProto:
    """A copy without weights, which would count as memory of what is measured after it."""
    made = onnx.GraphProto()
    made.node.extend(proto.graph.node)
    return made


def write_nodes(graph: onnx.GraphProto, identities: int) -> onnx.GraphProto:
    """The least that levelling comes to in Python: each node read and written again, and so many Identity nodes.

    Operators and names alone, by protobuf's own interface; no shape, no level, no check.
    """
    made = onnx.GraphProto()
    for node in graph.node:
        inputs, outputs = list(node.input), list(node.output)
        entry = made.node.add()
        entry.op_type, entry.name = node.op_type, node.name
        entry.input.extend(inputs)
        entry.output.extend(outputs)
    for k in range(identities):
        entry = made.node.add()
        entry.op_type, entry.name = "Identity", f"identity{k}"
        entry.input.append(outputs[0])
        entry.output.append(entry.name)
    return made


@contextlib.contextmanager
def clock(found: dict[str, Any], what: str) -> Iterator[None]:
    """Note the seconds that the block takes, on the wall and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    yield
    found[f"{what}_s"], found[f"{what}_wall_s"] = time.process_time() - processor, time.perf_counter() - wall


def in_process(name: str, folder: Path) -> dict[str, Any]:
    """Measure one model in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--folder", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"model": name, "failed": f"not done after {TIMEOUT} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["the process ended"]
        return {"model": name, "failed": last[0][:200]}
    return {"model": name, **json.loads(done.stdout.splitlines()[-1])}


# --- the page ---------------------------------------------------------------------------------------------------

HEADER = [
    "model", "vertices", "identities", "parameters", "protobuf s", "GraphSurgeon s", "nodes alone s", "levelize s",
    "emit-training s",
    "levelize / protobuf", "levelize µs a vertex", "emit µs a vertex", "peak MiB",
]  # fmt: skip


def row(entry: dict[str, Any]) -> list[str]:
    """One line of the table."""
    if "failed" in entry:
        return [entry["model"], *["-"] * (len(HEADER) - 2), entry["failed"]]
    count = entry["vertices"]
    return [
        entry["model"], f"{count:,}", f"{entry['identities']:,}", f"{entry['parameters']:,}",
        f"{entry['protobuf_s']:.2f}", f"{entry['graphsurgeon_s']:.2f}", f"{entry['nodes_s']:.2f}",
        f"{entry['levelize_s']:.2f}",
        f"{entry['emit_s']:.2f}", f"{entry['levelize_s'] / entry['protobuf_s']:.0f}",
        f"{1e6 * entry['levelize_s'] / count:.0f}", f"{1e6 * entry['emit_s'] / count:.0f}", f"{entry['peak_mib']:.0f}",
    ]  # fmt: skip


def verdicts(results: list[dict[str, Any]]) -> list[str]:
    """The targets, and whether this run met them."""
    by_name = {r["model"]: r for r in results if "failed" not in r}
    lines = []
    for name in ("resnet152", "gpt2"):
        if name in by_name:
            took, wall = by_name[name]["emit_s"], by_name[name]["emit_wall_s"]
            word = "met" if wall < EMIT_SECONDS else "missed"
            lines.append(
                f"`emit_training` of {name} in under {EMIT_SECONDS:.0f} s: {word} "
                f"({wall:.2f} s on the wall, {took:.2f} s of the processor)"
            )
    largest = by_name.get(f"chain-{CHAINS[-1]}")
    if largest:
        times = largest["levelize_s"] / largest["protobuf_s"]
        own = largest["levelize_s"] / largest["graphsurgeon_s"]
        word = "met" if times <= LEVELIZE_TIMES else "missed"
        lines.append(
            f"levelize of {CHAINS[-1]:,} vertices within {LEVELIZE_TIMES:.0f} times protobuf's load and save: {word} "
            f"({times:.0f} times; {own:.1f} times GraphSurgeon's import and export, which read and write no file; "
            f"reading and writing the nodes alone in Python is {largest['nodes_s'] / largest['protobuf_s']:.0f} times)"
        )
        smallest = by_name.get(f"chain-{CHAINS[0]}")
        if smallest:
            for what, key in (("levelize", "levelize_s"), ("emit_training", "emit_s")):
                low, high = (1e6 * r[key] / r["vertices"] for r in (smallest, largest))
                lines.append(
                    f"time a vertex of {what}, {CHAINS[0]:,} to {CHAINS[-1]:,} vertices: {low:.0f} to {high:.0f} µs"
                )
    outside = by_name.get("decoder-2b")
    if outside:
        lines.append(
            f"{outside['parameters']:,} parameters in a file of {outside['external_bytes'] / 2**30:.1f} GiB: "
            f"{outside['read_bytes'] / 2**20:.1f} MiB were read while levelling and emitting, "
            f"and the process peaked at {outside['peak_mib']:.0f} MiB"
        )
    return lines


def markdown(results: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The page."""
    return "\n".join(
        [
            "# Compile time and scale",
            "",
            "Made by `python tools/scale.py --write` (`make scale`); every model is compiled in a process of its own.",
            "",
            ", ".join(f"{k} {v}" for k, v in facts.items()) + ".",
            "",
            "| " + " | ".join(HEADER) + " |",
            "|" + "---|" * len(HEADER),
            *("| " + " | ".join(row(entry)) + " |" for entry in results),
            "",
            textwrap.fill(COLUMNS, 118),
            "",
            "## Targets",
            "",
            *(f"- {line}" for line in verdicts(results)),
            "",
            "## What limits it",
            "",
            textwrap.fill(LIMITS, 118),
            "",
        ]
    )


COLUMNS = """*protobuf* parses the file and writes it again; *GraphSurgeon* turns the parsed file into its graph and
back; *nodes alone* reads each node's operator and names and writes as many nodes as the levelled model has, by
protobuf's Python interface, and does nothing else. Seconds are of the processor; `docs/scale.json` has those on the
wall too. The chains alternate MatMul, Relu, Relu and Add with skips over 3 and over 15 vertices, and are as deep as
they are long. `decoder-2b` keeps its weights in a sparse file beside it."""
LIMITS = """Passes are linear in vertices, edges and identity vertices, and none of them recurses over the graph. The
time is that of making Python objects: a compilation rebuilds the graph, node by node, a few times, and the levelled
graph holds the identity vertices besides. Protobuf's load and save run in C: *nodes alone*, without a level or a shape,
is above five times as long already, so that no program that handles nodes in Python meets that target. Large
initializers are set aside while onnx checks and infers, and are copied only into a levelled model that embeds them; a
model in one file is read whole, so reading it is part of the time of ResNet-152 and GPT-2."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--write", action="store_true", help="write docs/SCALE.md and docs/scale.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.folder / options.worker)))
        return
    facts = {
        "date": date.today().isoformat(), "machine": f"{processor()}, {os.cpu_count()} cores",
        "load before": f"{os.getloadavg()[0]:.1f}", "Python": platform.python_version(),
        **{name: version(name) for name in ("zilc", "onnx", "onnx-graphsurgeon", "protobuf", "numpy")},
    }  # fmt: skip
    results: list[dict[str, Any]] = []
    docs = HERE.parent / "docs"
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = build(name, Path(folder))
            results.append({**in_process(path.name, Path(folder)), "model": name})
        print(" | ".join(row(results[-1])), flush=True)
        if options.write:  # after each, since the largest takes minutes
            (docs / "SCALE.md").write_text(markdown(results, facts))
            (docs / "scale.json").write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")
    for line in verdicts(results):
        print(line)


if __name__ == "__main__":
    main()
