"""The nine image networks that ship with onnx without their weights, given random ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
#: Small ones first.
NAMES = (
    "shufflenet", "squeezenet", "inception_v1", "inception_v2", "bvlc_alexnet", "zfnet512", "densenet121", "resnet50",
    "vgg19",
)  # fmt: skip
#: What a constant is, by the operator and operand that read it.
_ROLES = {
    ("Conv", 1): "weight", ("Conv", 2): "bias", ("Gemm", 1): "weight", ("Gemm", 2): "bias",
    ("BatchNormalization", 1): "scale", ("BatchNormalization", 2): "bias", ("BatchNormalization", 3): "bias",
    ("BatchNormalization", 4): "variance", ("Mul", 1): "scale", ("Add", 1): "bias",
}  # fmt: skip


def network(name: str, seed: int = 0, *, embed: bool = True) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A network, and a random value for each of its floating constants; the file's own are one number a tensor.

    Weights have He's variance 2 / fan-in, so that activations keep their size through Relu; biases and means are
    small, scales and variances lie about 1.

    Args:
        embed: write the values into the model.  Without it, weights stay the ConstantOfShape nodes of the file, to
            be fed as parameters, and only initializers (of which some are never trained) get their values.
    """
    model = onnx.load(FOLDER / f"light_{name}.onnx")
    graph = model.graph
    rng = np.random.default_rng(seed)
    held = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    shapes = {n: a.shape for n, a in held.items() if a.dtype == np.float32}
    filled = {n.output[0]: n for n in graph.node if n.op_type == "ConstantOfShape"}
    shapes.update({key: tuple(held[n.input[0]].tolist()) for key, n in filled.items()})
    roles = dict(_roles(graph, set(shapes)))
    values = {key: _draw(role, shapes[key], rng) for key, role in sorted(roles.items())}
    # Running statistics are no parameters: they are always written.
    inside = {key for key in values if embed or key not in filled or values[key].ndim == 1}
    nodes = [n for n in graph.node if n.output[0] not in inside]
    read = {name for n in nodes for name in n.input}
    kept = [t for t in graph.initializer if t.name in read and t.name not in inside]
    kept += [onnx.numpy_helper.from_array(values[key], key) for key in sorted(inside)]
    inputs = [i for i in graph.input if i.name not in held]
    for entries, chosen in ((graph.node, nodes), (graph.initializer, kept), (graph.input, inputs)):
        del entries[:]
        entries.extend(chosen)
    model.ir_version = 8  # initializers need not be inputs
    return model, values


def _roles(graph: onnx.GraphProto, names: set[str]) -> Iterator[tuple[str, str]]:
    """(constant, role), looked at through Reshape and Unsqueeze."""
    moved = {n.output[0]: n.input[0] for n in graph.node if n.op_type in ("Reshape", "Unsqueeze")}
    for node in graph.node:
        for index, name in enumerate(node.input):
            while name in moved:
                name = moved[name]
            if name in names and (node.op_type, index) in _ROLES:
                yield name, _ROLES[node.op_type, index]


def _draw(role: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if role == "weight":
        return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2.0 / np.prod(shape[1:])))
    if role == "bias":
        return np.float32(0.1) * rng.standard_normal(shape, np.float32)
    return rng.uniform(0.5, 1.0 if role == "scale" else 1.5, shape).astype(np.float32)


def logits(model: onnx.ModelProto) -> str:
    """The tensor that the classes' probabilities are made of: the last Softmax's operand, or the output itself."""
    last = model.graph.node[-1]
    return last.input[0] if last.op_type == "Softmax" else last.output[0]


def image(model: onnx.ModelProto, seed: int = 1) -> dict[str, np.ndarray]:
    """Feeds: standard normal pixels, in the one fixed size that each file has."""
    (entry,) = model.graph.input
    shape = [d.dim_value for d in entry.type.tensor_type.shape.dim]
    return {entry.name: np.random.default_rng(seed).standard_normal(shape, np.float32)}
