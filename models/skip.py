"""The smallest graph that needs an identity vertex: one layer with a skip edge around it, and an output layer."""

from __future__ import annotations

import onnx

from zilc.models.network import Batch, Network


def build(
    *,
    width: int = 4,
    classes: int = 3,
    batch: Batch = "N",
    seed: int = 0,
    opset: int = 18,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """tanh(W₁ x + b₁) + x, then W₂ h + b₂.

    Input ``input`` (batch, width), output ``logits`` (batch, classes), parameters ``layer1.weight`` (out, in) and
    so on.
    """
    net = Network("skip", seed=seed, opset=opset, dtype=dtype, options={"width": width, "classes": classes})
    x = net.input("input", [batch, width])
    h = net.linear(x, "layer1", width, width)
    with net.op.place("layer1"):
        h = net.op.Tanh(h)
    with net.op.place("skip"):
        h = net.op.Add(h, x)
    return net.finish("logits", net.linear(h, "layer2", width, classes), [batch, classes])
