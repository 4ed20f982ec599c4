"""PyTorch twins of the networks in zilc.models: an independent forward pass, and reverse mode by autograd.

A twin reads parameters by their names and is written from the network's definition, with PyTorch's own
layers.  It looks at none of the ONNX graph's nodes, only at its initializers and its builder's options.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import torch
import torch.nn.functional as F

#: ONNX attributes are float32: 1e-5 itself would be off by 3e-8 of its size, and a float64 network by 1e-13.
EPSILON = float(np.float32(1e-5))

Params = Mapping[str, torch.Tensor]
Inputs = Mapping[str, torch.Tensor]
Twin = Callable[[Params, Inputs], torch.Tensor]


def options(model: onnx.ModelProto) -> dict[str, Any]:
    """What the builder recorded in the model's metadata."""
    return json.loads(next(p.value for p in model.metadata_props if p.key == "options"))


def parameters(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Floating initializers of rank 1 and more, by name: all that a twin reads, statistics included."""
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.dims}
    return {name: array for name, array in arrays.items() if array.dtype.kind == "f"}


def is_statistic(name: str) -> bool:
    """BatchNormalization's running statistics: read, never trained."""
    return name.endswith((".running_mean", ".running_var"))


def twin(name: str, model: onnx.ModelProto) -> Twin:
    """The function of ``zilc.models.build(name, ...)`` in PyTorch, in the dtype of what it is given."""
    made = options(model)
    return lambda params, inputs: _TWINS[name](params, inputs, made)


def to_torch(arrays: Mapping[str, np.ndarray], dtype: Any = None) -> dict[str, torch.Tensor]:
    """Tensors of their own memory; floating ones in ``dtype``."""
    tensors = {}
    for key, array in arrays.items():
        cast = array.astype(dtype) if dtype is not None and array.dtype.kind == "f" else array
        tensors[key] = torch.from_numpy(np.array(cast, order="C"))
    return tensors


def torch_forward(
    name: str, model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], *, dtype: Any = None
) -> np.ndarray:
    """The twin's output; ``dtype`` overrides the model's."""
    with torch.no_grad():
        return twin(name, model)(to_torch(parameters(model), dtype), to_torch(feeds, dtype)).numpy()


def torch_gradients(
    name: str,
    model: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    target: np.ndarray,
    loss: str = "energy",
    *,
    dtype: Any = None,
    params: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The gradient of every parameter by PyTorch's reverse mode.

    Args:
        feeds: the model's inputs by name; a ``target`` among them is not looked at.
        dtype: of the whole computation; by default the model's.  np.float64 gives the truth beside a float32
            model.
        params: values that replace the model's own, by name.

    Returns:
        parameter name -> gradient, in ``dtype``; running statistics have none.
    """
    return torch_loss_and_gradients(name, model, feeds, target, loss, dtype=dtype, params=params)[1]


def torch_loss_and_gradients(
    name: str,
    model: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    target: np.ndarray,
    loss: str = "energy",
    *,
    dtype: Any = None,
    params: Mapping[str, np.ndarray] | None = None,
) -> tuple[float, dict[str, np.ndarray]]:
    """Like :func:`torch_gradients`, with the loss before it."""
    tensors = to_torch({**parameters(model), **(params or {})}, dtype)
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items() if not is_statistic(key)}
    output = twin(name, model)(tensors, to_torch(feeds, dtype))
    value = torch_loss(output, to_torch({"target": np.asarray(target)}, dtype)["target"], loss)
    gradients = torch.autograd.grad(value, list(leaves.values()))
    return value.item(), {key: g.numpy() for key, g in zip(leaves, gradients, strict=True)}


def torch_loss(output: torch.Tensor, target: torch.Tensor, loss: str) -> torch.Tensor:
    """energy is ½ Σ (μ − y)²; the others are means; cross-entropy has its classes on the last axis."""
    if loss == "energy":
        return 0.5 * (output - target).square().sum()
    if loss == "mse":
        return F.mse_loss(output, target)
    if loss == "cross-entropy":
        return F.cross_entropy(output.movedim(-1, 1) if output.ndim > 1 else output, target)
    if loss == "bce-with-logits":
        return F.binary_cross_entropy_with_logits(output, target)
    raise ValueError(f"no loss {loss!r}")


# --- the networks --------------------------------------------------------------------------------------


def _linear(p: Params, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def _mlp(p: Params, inputs: Inputs, made: Mapping[str, Any]) -> torch.Tensor:
    h = inputs["input"]
    for index in range(1, made["layers"]):
        h = torch.tanh(_linear(p, f"layer{index}", h))
    return _linear(p, f"layer{made['layers']}", h)


def _skip(p: Params, inputs: Inputs, made: Mapping[str, Any]) -> torch.Tensor:
    x = inputs["input"]
    return _linear(p, "layer2", torch.tanh(_linear(p, "layer1", x)) + x)


def _residual(p: Params, inputs: Inputs, made: Mapping[str, Any]) -> torch.Tensor:
    h = inputs["input"]
    for index in range(1, made["layers"]):
        f = torch.tanh(_linear(p, f"layer{index}", h))
        h = h + f if f.shape == h.shape else f
    f = _linear(p, f"layer{made['layers']}", h)
    return h + f if f.shape == h.shape else f


def _alexnet(p: Params, inputs: Inputs, made: Mapping[str, Any]) -> torch.Tensor:
    if made["dropout"]:
        raise ValueError("random masks have no twin: build with dropout=False")
    h = inputs["image"]
    for index, (stride, pad) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)], 1):
        name = f"conv{index}"
        h = torch.relu(F.conv2d(h, p[f"{name}.weight"], p[f"{name}.bias"], stride, pad))
        if index in (1, 2, 5):
            h = F.max_pool2d(h, 3, 2)
    h = torch.relu(_linear(p, "fc6", h.flatten(1)))
    return _linear(p, "fc8", torch.relu(_linear(p, "fc7", h)))


def _resnet18(p: Params, inputs: Inputs, made: Mapping[str, Any]) -> torch.Tensor:
    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        statistics = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        scale, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        return F.batch_norm(x, *statistics, scale, bias, training=False, eps=EPSILON)

    h = torch.relu(norm(F.conv2d(inputs["image"], p["conv1.weight"], None, 2, 3), "bn1"))
    h = F.max_pool2d(h, 3, 2, 1)
    for stage, count in enumerate(made["blocks"], 1):
        for block in range(count):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            f = torch.relu(norm(F.conv2d(h, p[f"{name}.conv1.weight"], None, stride, 1), f"{name}.bn1"))
            f = norm(F.conv2d(f, p[f"{name}.conv2.weight"], None, 1, 1), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in p:
                h = norm(F.conv2d(h, p[f"{name}.downsample.0.weight"], None, stride), f"{name}.downsample.1")
            h = torch.relu(h + f)
    return _linear(p, "fc", F.adaptive_avg_pool2d(h, 1).flatten(1))


def _rnn(p: Params, inputs: Inputs, made: Mapping[str, Any]) -> torch.Tensor:
    x, hidden = inputs["input"], made["hidden"]
    weight_ih, weight_hh = (p[f"rnn.{part}"].reshape(hidden, -1) for part in ("weight_ih", "weight_hh"))
    bias = p["rnn.bias"].reshape(-1)
    bias_ih, bias_hh = bias[:hidden], bias[hidden:] if len(bias) > hidden else torch.zeros_like(bias)
    start = x.new_zeros(1, x.shape[0], hidden)
    # has_biases, num_layers, dropout, train, bidirectional, batch_first
    settings = True, 1, 0.0, False, False, True
    _, last = torch.rnn_tanh(x, start, [weight_ih, weight_hh, bias_ih, bias_hh], *settings)
    return _linear(p, "output", last[0])


def _transformer(p: Params, inputs: Inputs, made: Mapping[str, Any]) -> torch.Tensor:
    table = p["embedding.weight"]
    length, d = made["length"], made["d_model"]
    h = F.embedding(inputs["tokens"], table) * math.sqrt(d)
    angle = torch.arange(length, dtype=table.dtype)[:, None] * torch.exp(
        -math.log(10000) * torch.arange(0, d, 2, dtype=table.dtype) / d
    )
    h = h + torch.stack([angle.sin(), angle.cos()], dim=2).reshape(length, d)
    settings = {"batch_first": True, "device": "meta"}
    mask = None
    if made["causal"]:
        mask = torch.nn.Transformer.generate_square_subsequent_mask(length, dtype=table.dtype)
    for index in range(1, made["layers"] + 1):
        # In training mode, without dropout: evaluation mode may take a fused path.
        sizes = d, made["heads"], made["d_ff"]
        layer = torch.nn.TransformerEncoderLayer(*sizes, dropout=0.0, layer_norm_eps=EPSILON, **settings)
        h = torch.func.functional_call(layer, _encoder_layer(p, f"layer{index}"), (h,), {"src_mask": mask})
    return h @ p["head.weight"] + p["head.bias"]


def _encoder_layer(p: Params, name: str) -> dict[str, torch.Tensor]:
    """torch.nn.TransformerEncoderLayer's parameters: weights are (out, in); query, key, value are one."""
    attention = f"{name}.attention"
    parts = [f"{attention}.{part}" for part in ("query", "key", "value")]
    return {
        "self_attn.in_proj_weight": torch.cat([p[f"{part}.weight"].T for part in parts]),
        "self_attn.in_proj_bias": torch.cat([p[f"{part}.bias"] for part in parts]),
        "self_attn.out_proj.weight": p[f"{attention}.output.weight"].T,
        "self_attn.out_proj.bias": p[f"{attention}.output.bias"],
        "linear1.weight": p[f"{name}.feedforward1.weight"].T,
        "linear1.bias": p[f"{name}.feedforward1.bias"],
        "linear2.weight": p[f"{name}.feedforward2.weight"].T,
        "linear2.bias": p[f"{name}.feedforward2.bias"],
        "norm1.weight": p[f"{name}.norm1.weight"],
        "norm1.bias": p[f"{name}.norm1.bias"],
        "norm2.weight": p[f"{name}.norm2.weight"],
        "norm2.bias": p[f"{name}.norm2.bias"],
    }


def _decoder(p: Params, inputs: Inputs, made: Mapping[str, Any]) -> torch.Tensor:
    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], EPSILON)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    h = p["embedding.weight"][inputs["tokens"]] + p["positions.weight"]
    for index in range(1, made["layers"] + 1):
        name = f"block{index}"
        x = norm(f"{name}.norm1", h)
        parts = [
            linear(f"{name}.attention.{part}", x).unflatten(-1, (made["heads"], -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        ]
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2)
        h = h + linear(f"{name}.attention.output", mixed)
        inner = F.gelu(linear(f"{name}.feedforward1", norm(f"{name}.norm2", h)), approximate="tanh")
        h = h + linear(f"{name}.feedforward2", inner)
    return norm("norm", h) @ p["embedding.weight"].T


def _digits(p: Params, inputs: Inputs, made: Mapping[str, Any]) -> torch.Tensor:
    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=1)

    h = torch.relu(conv("conv1", inputs["image"]))
    h = F.max_pool2d(torch.relu(h + conv("conv2", h)), 2)
    h = torch.relu(conv("conv3", h))
    h = F.max_pool2d(torch.relu(h + conv("conv4", h)), 2)
    return _linear(p, "output", h.flatten(1))


_TWINS: dict[str, Callable[[Params, Inputs, Mapping[str, Any]], torch.Tensor]] = {
    "skip": _skip,
    "mlp2": _mlp,
    "mlp3": _mlp,
    "mlp4": _mlp,
    "residual": _residual,
    "alexnet": _alexnet,
    "resnet18": _resnet18,
    "rnn": _rnn,
    "transformer": _transformer,
    "decoder": _decoder,
    "digits": _digits,
}
