"""What the builders share: named parameters with their initial values, layers, and the way out to ONNX."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx_graphsurgeon as gs

from zilc import ir, onnx_io
from zilc.emit import Emitter
from zilc.errors import OptionError

#: A number of examples, or the name of a symbolic dimension.
Batch = int | str

#: What new models carry at least: older IR versions have no metadata on nodes.
MIN_IR_VERSION = 10


class Network:
    """A graph in the making.

    Parameters are drawn in the order in which they are asked for, in float64, and rounded to float32: a
    float64 model is thus the same function as the float32 model of its seed.

    Args:
        name: the network's name, and the graph's.
        seed: of the initial parameters.
        dtype: of parameters and activations, "float32" or "float64".
        options: what the network was built with; kept in the model's metadata.
    """

    def __init__(
        self, name: str, *, seed: int, opset: int, dtype: str, options: Mapping[str, Any] | None = None
    ) -> None:
        if dtype not in ("float32", "float64"):
            raise OptionError(f"dtype is {dtype!r}, expected 'float32' or 'float64'", where=name)
        self.dtype = np.dtype(dtype)
        self.rng = np.random.default_rng(seed)
        oldest = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
        version = max(MIN_IR_VERSION, oldest)
        self.graph = gs.Graph(name=name, opset=opset, ir_version=version, producer_name="zilc")
        recorded = {**(options or {}), "seed": seed, "dtype": dtype}
        self.graph.metadata = {"network": name, "options": json.dumps(recorded, sort_keys=True)}
        self.op = Emitter(self.graph)

    # -- leaves --

    def input(self, name: str, shape: Sequence[Batch], dtype: Any = None) -> gs.Variable:
        """A model input; of the network's dtype unless another is given."""
        made = gs.Variable(self.op.fresh(name), dtype=np.dtype(dtype or self.dtype), shape=list(shape))
        self.graph.inputs.append(made)
        return made

    def parameter(self, name: str, value: np.ndarray) -> gs.Constant:
        """An initializer of its own, even where another holds the same values."""
        return gs.Constant(self.op.fresh(name), value.astype(np.float32).astype(self.dtype))

    def uniform(self, name: str, shape: Sequence[int], bound: float) -> gs.Constant:
        """Drawn from U(-bound, bound)."""
        return self.parameter(name, self.rng.uniform(-bound, bound, tuple(shape)))

    def normal(self, name: str, shape: Sequence[int], std: float) -> gs.Constant:
        """Drawn from N(0, std²)."""
        return self.parameter(name, std * self.rng.standard_normal(tuple(shape)))

    def full(self, name: str, shape: Sequence[int], value: float) -> gs.Constant:
        """One value everywhere."""
        return self.parameter(name, np.full(tuple(shape), value))

    # -- layers --

    def linear(self, x: gs.Tensor, name: str, fan_in: int, fan_out: int) -> gs.Variable:
        """x Wᵀ + b on (batch, fan_in); both drawn from U(±1/√fan_in), PyTorch's default."""
        bound = 1 / math.sqrt(fan_in)
        weight = self.uniform(f"{name}.weight", (fan_out, fan_in), bound)
        bias = self.uniform(f"{name}.bias", (fan_out,), bound)
        with self.op.place(name):
            return self.op.Gemm(x, weight, bias, transB=1)

    def projection(self, x: gs.Tensor, name: str, fan_in: int, fan_out: int) -> gs.Variable:
        """x W + b on (batch, length, fan_in), with W of (fan_in, fan_out), as exporters write it."""
        bound = 1 / math.sqrt(fan_in)
        weight = self.uniform(f"{name}.weight", (fan_in, fan_out), bound)
        bias = self.uniform(f"{name}.bias", (fan_out,), bound)
        with self.op.place(name):
            return self.op.Add(self.op.MatMul(x, weight), bias)

    def conv(
        self,
        x: gs.Tensor,
        name: str,
        channels: int,
        features: int,
        kernel: int,
        *,
        stride: int = 1,
        pad: int = 0,
    ) -> gs.Variable:
        """A square convolution with bias; both drawn from U(±1/√fan_in), PyTorch's default."""
        bound = 1 / math.sqrt(channels * kernel * kernel)
        weight = self.uniform(f"{name}.weight", (features, channels, kernel, kernel), bound)
        bias = self.uniform(f"{name}.bias", (features,), bound)
        with self.op.place(name):
            return self.op.Conv(x, weight, bias, **window(kernel, stride, pad))

    # -- the way out --

    def finish(self, name: str, output: gs.Variable, shape: Sequence[Batch]) -> onnx.ModelProto:
        """The checked model of one output, under ``name``; ``shape`` is held against what is inferred."""
        output.name, output.shape = self.op.fresh(name), list(shape)
        self.graph.outputs = [output]
        for tensor in ir.tensors(self.graph).values():
            # The emitter's own constants, shapes and scalars; its prefix is for graphs that zilc emits.
            tensor.name = tensor.name.removeprefix("zilc.")
        proto = ir.to_proto(self.graph, infer=True)
        onnx_io.check_full(proto)
        return proto


def window(kernel: int, stride: int = 1, pad: int = 0) -> dict[str, list[int]]:
    """Attributes of a square convolution or pooling window."""
    return {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}


def windows(size: int, kernel: int, stride: int = 1, pad: int = 0) -> int:
    """How many windows fit along an axis."""
    return (size + 2 * pad - kernel) // stride + 1


def at_least_one(network: str, what: str, size: int) -> int:
    """``size``, or an error that says that nothing is left of the image."""
    if size < 1:
        raise OptionError(f"nothing is left of the image at {what}, expected a larger one", where=network)
    return size
