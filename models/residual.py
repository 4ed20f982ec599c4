"""The residual network of the paper's appendix: fully connected layers with a skip around each."""

from __future__ import annotations

import onnx

from zilc.models.network import Batch, Network


def build(
    *,
    layers: int = 5,
    inputs: int = 784,
    hidden: int = 256,
    classes: int = 10,
    batch: Batch = "N",
    seed: int = 0,
    opset: int = 18,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """``layers`` fully connected layers: h ← h + tanh(W h + b) wherever the layer keeps the width.

    The first layer (inputs to hidden) and the last (hidden to classes) change the width, and a skip of
    another width would need a projection that the paper does not have: they carry none, unless their widths
    happen to agree.  So h ← tanh(W h + b) first, and a linear W h + b last (h + W h + b where hidden =
    classes).

    Input ``input`` (batch, inputs), output ``logits`` (batch, classes), parameters ``layer1.weight``
    (out, in), ``layer1.bias`` and so on.
    """
    options = {"layers": layers, "inputs": inputs, "hidden": hidden, "classes": classes}
    net = Network("residual", seed=seed, opset=opset, dtype=dtype, options=options)
    h = net.input("input", [batch, inputs])
    widths = [inputs, *[hidden] * (layers - 1), classes]
    for index in range(1, layers + 1):
        name, fan_in, fan_out = f"layer{index}", widths[index - 1], widths[index]
        skip, h = h, net.linear(h, name, fan_in, fan_out)
        with net.op.place(name):
            if index < layers:
                h = net.op.Tanh(h)
            if fan_in == fan_out:
                h = net.op.Add(skip, h)
    return net.finish("logits", h, [batch, classes])
