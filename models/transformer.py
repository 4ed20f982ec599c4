"""The encoder of "Attention Is All You Need" (Vaswani et al. 2017) as a language model of one layer."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from zilc.errors import OptionError
from zilc.models.network import Batch, Network


def build(
    *,
    vocabulary: int = 28782,
    length: int = 35,
    d_model: int = 512,
    heads: int = 8,
    d_ff: int = 2048,
    layers: int = 1,
    causal: bool = True,
    batch: Batch = "N",
    seed: int = 0,
    opset: int = 18,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """√d · embedding + sinusoidal positions, ``layers`` encoder layers, a projection to the vocabulary.

    An encoder layer is h ← norm(h + attention(h)), h ← norm(h + W₂ relu(W₁ h + b₁) + b₂).

    Args:
        causal: a position attends to itself and to earlier ones only, as a language model must.

    Input ``tokens`` int64 (batch, length), output ``logits`` (batch, length, vocabulary).  Parameters:
    ``embedding.weight``; in layer 1 ``layer1.attention.query.weight`` (in, out) with its bias, likewise
    ``key``, ``value`` and ``output``, ``layer1.feedforward1`` and ``layer1.feedforward2``, and the scales and
    biases ``layer1.norm1`` and ``layer1.norm2``; ``head.weight``, ``head.bias``.
    """
    if d_model % heads or d_model % 2:
        what = f"d_model is {d_model}, expected an even multiple of heads ({heads})"
        raise OptionError(what, where="transformer")
    sizes = {"vocabulary": vocabulary, "length": length, "d_model": d_model, "heads": heads, "d_ff": d_ff}
    options = {**sizes, "layers": layers, "causal": causal}
    net = Network("transformer", seed=seed, opset=opset, dtype=dtype, options=options)
    op = net.op
    tokens = net.input("tokens", [batch, length], np.int64)
    # Scaled by √d below, embeddings start with unit variance.
    table = net.normal("embedding.weight", (vocabulary, d_model), 1 / math.sqrt(d_model))
    with op.place("embedding"):
        h = op.Mul(op.Gather(table, tokens), math.sqrt(d_model))
        h = op.Add(h, _positions(net, length, d_model))
    for index in range(1, layers + 1):
        name = f"layer{index}"
        mixed = attention(net, h, f"{name}.attention", length, d_model, heads, causal=causal)
        h = _add_and_norm(net, h, mixed, f"{name}.norm1", d_model)
        inner = net.projection(h, f"{name}.feedforward1", d_model, d_ff)
        with op.place(f"{name}.feedforward1"):
            inner = op.Relu(inner)
        inner = net.projection(inner, f"{name}.feedforward2", d_ff, d_model)
        h = _add_and_norm(net, h, inner, f"{name}.norm2", d_model)
    logits = net.projection(h, "head", d_model, vocabulary)
    return net.finish("logits", logits, [batch, length, vocabulary])


def _positions(net: Network, length: int, d_model: int) -> gs.Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i + 1) = cos(the same); (length, d).

    Made in the graph, from integers alone: a float table would be a leaf, and would be trained like a bias.
    """
    op = net.op
    with op.place("positions"):
        position = op.cast(_range(net, 0, length, 1, [1]), net.dtype)  # (length, 1)
        exponent = op.Div(op.cast(_range(net, 0, d_model, 2, [0]), net.dtype), _number(net, d_model))
        angle = op.Div(position, op.Pow(_number(net, 10000), exponent))  # (length, d / 2)
        pairs = op.Concat(op.Unsqueeze(op.Sin(angle), [2]), op.Unsqueeze(op.Cos(angle), [2]), axis=2)
        return op.Reshape(pairs, [length, d_model])


def attention(
    net: Network, x: gs.Tensor, name: str, length: int, d_model: int, heads: int, *, causal: bool = True
) -> gs.Tensor:
    """softmax(Q Kᵀ / √d_k) V in ``heads`` heads; a masked score counts as the lowest float32, not as -∞."""
    op, d_head = net.op, d_model // heads
    parts = [net.projection(x, f"{name}.{part}", d_model, d_model) for part in ("query", "key", "value")]
    with op.place(name):
        query, key, value = (op.Reshape(part, [0, length, heads, d_head]) for part in parts)
        query = op.Transpose(query, perm=[0, 2, 1, 3])  # (batch, heads, length, d_k)
        key = op.Transpose(key, perm=[0, 2, 3, 1])  # (batch, heads, d_k, length)
        value = op.Transpose(value, perm=[0, 2, 1, 3])
        scores = op.Mul(op.MatMul(query, key), 1 / math.sqrt(d_head))
        if causal:
            seen = op.GreaterOrEqual(_range(net, 0, length, 1, [1]), _range(net, 0, length, 1, [0]))
            scores = op.Where(seen, scores, np.asarray(np.finfo(np.float32).min, net.dtype))
        mixed = op.MatMul(op.Softmax(scores, axis=-1), value)
        mixed = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), [0, length, d_model])
    return net.projection(mixed, f"{name}.output", d_model, d_model)


def _add_and_norm(net: Network, x: gs.Tensor, h: gs.Tensor, name: str, d_model: int) -> gs.Tensor:
    scale = net.full(f"{name}.weight", (d_model,), 1.0)
    bias = net.full(f"{name}.bias", (d_model,), 0.0)
    with net.op.place(name):
        return net.op.LayerNormalization(net.op.Add(x, h), scale, bias, axis=-1, epsilon=1e-5)


def _range(net: Network, start: int, stop: int, step: int, axes: list[int]) -> gs.Tensor:
    """int64 start, start + step … with axes of length one put in."""
    op = net.op
    return op.Unsqueeze(op.Range(np.int64(start), np.int64(stop), np.int64(step)), axes)


def _number(net: Network, value: int) -> gs.Tensor:
    """A float scalar cast from an integer."""
    return net.op.cast(net.op.constant(np.asarray(value, np.int64)), net.dtype)
