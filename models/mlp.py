"""The paper's multi-layer perceptron: tanh hidden layers and a linear output, on flat 28 x 28 images."""

from __future__ import annotations

import onnx

from zilc.models.network import Batch, Network


def build(
    *,
    layers: int = 3,
    inputs: int = 784,
    hidden: int = 128,
    classes: int = 10,
    batch: Batch = "N",
    seed: int = 0,
    opset: int = 18,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """``layers`` fully connected layers: h ← tanh(W h + b), the last without tanh.

    Input ``input`` (batch, inputs), output ``logits`` (batch, classes), parameters ``layer1.weight``
    (out, in), ``layer1.bias`` and so on.
    """
    options = {"layers": layers, "inputs": inputs, "hidden": hidden, "classes": classes}
    net = Network(f"mlp{layers}", seed=seed, opset=opset, dtype=dtype, options=options)
    h = net.input("input", [batch, inputs])
    widths = [inputs, *[hidden] * (layers - 1), classes]
    for index in range(1, layers + 1):
        h = net.linear(h, f"layer{index}", widths[index - 1], widths[index])
        if index < layers:
            with net.op.place(f"layer{index}"):
                h = net.op.Tanh(h)
    return net.finish("logits", h, [batch, classes])
