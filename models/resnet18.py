"""ResNet18 (He et al. 2016), its BatchNormalization operators kept, in evaluation form."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from zilc.models.network import Batch, Network, window


def build(
    *,
    image: int = 224,
    width: int = 64,
    blocks: tuple[int, ...] = (2, 2, 2, 2),
    classes: int = 1000,
    batch: Batch = "N",
    seed: int = 0,
    opset: int = 18,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """ResNet18 on ``image`` x ``image`` pictures.

    Stage i, from 0, has ``blocks[i]`` basic blocks of ``width`` · 2^i channels.  Convolutions start from He's
    normal initialisation, normalizations from scale 1 and bias 0.  The running statistics are drawn (means
    from N(0, 0.1²), variances from U(0.5, 1.5)), so that the evaluation form is no identity.

    Input ``image`` (batch, 3, image, image), output ``logits`` (batch, classes).  Parameters are named as in
    PyTorch's state dictionaries: ``conv1.weight``, ``bn1.running_mean``, ``layer2.0.downsample.0.weight``.
    """
    options = {"image": image, "width": width, "blocks": list(blocks), "classes": classes}
    net = Network("resnet18", seed=seed, opset=opset, dtype=dtype, options=options)
    op = net.op
    h = net.input("image", [batch, 3, image, image])
    h = _conv(net, h, "conv1", 3, width, 7, 2)
    h = _norm(net, h, "bn1", width)
    with op.place("stem"):
        h = op.MaxPool(op.Relu(h), **window(3, 2, 1))
    channels = width
    for stage, count in enumerate(blocks):
        features = width * 2**stage
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            h = _basic_block(net, h, f"layer{stage + 1}.{block}", channels, features, stride)
            channels = features
    with op.place("head"):
        h = op.Flatten(op.GlobalAveragePool(h))
    return net.finish("logits", net.linear(h, "fc", channels, classes), [batch, classes])


def _basic_block(
    net: Network, x: gs.Tensor, name: str, channels: int, features: int, stride: int
) -> gs.Variable:
    """relu(x' + bn(conv(relu(bn(conv(x)))))), x' projected where the shape changes."""
    op = net.op
    h = _norm(net, _conv(net, x, f"{name}.conv1", channels, features, 3, stride), f"{name}.bn1", features)
    with op.place(name):
        h = op.Relu(h)
    h = _norm(net, _conv(net, h, f"{name}.conv2", features, features, 3, 1), f"{name}.bn2", features)
    if stride != 1 or channels != features:
        x = _conv(net, x, f"{name}.downsample.0", channels, features, 1, stride)
        x = _norm(net, x, f"{name}.downsample.1", features)
    with op.place(name):
        return op.Relu(op.Add(h, x))


def _conv(
    net: Network, x: gs.Tensor, name: str, channels: int, features: int, kernel: int, stride: int
) -> gs.Variable:
    """A convolution without bias, padded so that stride 1 keeps the size."""
    std = math.sqrt(2 / (features * kernel * kernel))
    weight = net.normal(f"{name}.weight", (features, channels, kernel, kernel), std)
    with net.op.place(name):
        return net.op.Conv(x, weight, **window(kernel, stride, kernel // 2))


def _norm(net: Network, x: gs.Tensor, name: str, features: int) -> gs.Variable:
    scale = net.full(f"{name}.weight", (features,), 1.0)
    bias = net.full(f"{name}.bias", (features,), 0.0)
    mean = net.normal(f"{name}.running_mean", (features,), 0.1)
    variance = net.parameter(f"{name}.running_var", np.asarray(net.rng.uniform(0.5, 1.5, features)))
    with net.op.place(name):
        return net.op.BatchNormalization(x, scale, bias, mean, variance, epsilon=1e-5)
