"""AlexNet in its single-tower form (Krizhevsky 2014): five convolutions, three fully connected layers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx

from zilc.models.network import Batch, Network, at_least_one, window, windows


def build(
    *,
    image: int = 224,
    width: int = 64,
    hidden: int = 4096,
    classes: int = 1000,
    dropout: bool = False,
    batch: Batch = "N",
    seed: int = 0,
    opset: int = 18,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """AlexNet on ``image`` x ``image`` pictures, with ``width`` channels in its first layer.

    At 224 pixels the last pooling leaves 6 x 6, so the adaptive pooling of some implementations is the
    identity and is left out; other sizes are flattened as they are.

    Args:
        dropout: put the two Dropout operators of training (ratio one half, training_mode true) before the
            first two fully connected layers; by default the network has its evaluation form, without them.
            ONNX Runtime drops such operators as well where nothing reads their masks, unless it is told to
            leave out its optimizer "EliminateDropout".

    Input ``image`` (batch, 3, image, image), output ``logits`` (batch, classes), parameters ``conv1.weight``
    to ``conv5.bias`` and ``fc6.weight`` to ``fc8.bias``.
    """
    sizes = {"image": image, "width": width, "hidden": hidden, "classes": classes}
    options = {**sizes, "dropout": dropout}
    net = Network("alexnet", seed=seed, opset=opset, dtype=dtype, options=options)
    op = net.op
    h = net.input("image", [batch, 3, image, image])
    channels, size = 3, image
    # features, kernel, stride, pad, pooled
    convolutions = [
        (width, 11, 4, 2, True),
        (3 * width, 5, 1, 2, True),
        (6 * width, 3, 1, 1, False),
        (4 * width, 3, 1, 1, False),
        (4 * width, 3, 1, 1, True),
    ]
    for index, (features, kernel, stride, pad, pooled) in enumerate(convolutions, 1):
        name = f"conv{index}"
        h = net.conv(h, name, channels, features, kernel, stride=stride, pad=pad)
        channels, size = features, at_least_one("alexnet", name, windows(size, kernel, stride, pad))
        with op.place(name):
            h = op.Relu(h)
            if pooled:
                h = op.MaxPool(h, **window(3, 2))
                size = at_least_one("alexnet", f"the pooling after {name}", windows(size, 3, 2))
    with op.place("flatten"):
        h = op.Flatten(h)
    widths = [channels * size * size, hidden, hidden, classes]
    for index, (fan_in, fan_out) in enumerate(pairwise(widths), 6):
        name = f"fc{index}"
        with op.place(name):
            if dropout and index < 8:
                h = op.Dropout(h, np.float32(0.5), np.True_, seed=seed + index)
        h = net.linear(h, name, fan_in, fan_out)
        with op.place(name):
            if index < 8:
                h = op.Relu(h)
    return net.finish("logits", h, [batch, classes])
