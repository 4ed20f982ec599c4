"""A decoder like GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, the embedding as head."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from zilc.errors import OptionError
from zilc.models.network import Batch, Network
from zilc.models.transformer import attention


def build(
    *,
    vocabulary: int = 8192,
    length: int = 64,
    d_model: int = 256,
    heads: int = 8,
    layers: int = 4,
    batch: Batch = "N",
    seed: int = 0,
    opset: int = 18,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """Token and position embeddings, ``layers`` blocks, a last norm, logits by the embedding's transpose.

    A block is h ← h + attention(norm(h)), h ← h + W₂ gelu(W₁ norm(h) + b₁) + b₂, gelu by its tanh formula.

    Input ``tokens`` int64 (batch, length), output ``logits`` (batch, length, vocabulary).  Parameters:
    ``embedding.weight``, read by the first vertex and by the last but one; ``positions.weight``; in block 1
    ``block1.attention.query.weight`` (in, out) with its bias, likewise ``key``, ``value`` and ``output``,
    ``block1.feedforward1`` and ``block1.feedforward2``, ``block1.norm1`` and ``block1.norm2``; ``norm``.
    """
    if d_model % heads:
        raise OptionError(f"d_model is {d_model}, expected a multiple of heads ({heads})", where="decoder")
    sizes = {"vocabulary": vocabulary, "length": length, "d_model": d_model, "heads": heads, "layers": layers}
    net = Network("decoder", seed=seed, opset=opset, dtype=dtype, options=sizes)
    op = net.op
    tokens = net.input("tokens", [batch, length], np.int64)
    table = net.normal("embedding.weight", (vocabulary, d_model), 0.02)
    places = net.normal("positions.weight", (length, d_model), 0.02)
    with op.place("embedding"):
        h = op.Add(op.Gather(table, tokens), places)
    for index in range(1, layers + 1):
        name = f"block{index}"
        mixed = attention(net, _norm(net, h, f"{name}.norm1", d_model), f"{name}.attention", length, d_model, heads)
        with op.place(f"{name}.attention"):
            h = op.Add(h, mixed)
        inner = net.projection(_norm(net, h, f"{name}.norm2", d_model), f"{name}.feedforward1", d_model, 4 * d_model)
        with op.place(f"{name}.feedforward1"):
            inner = _gelu(net, inner)
        inner = net.projection(inner, f"{name}.feedforward2", 4 * d_model, d_model)
        with op.place(f"{name}.feedforward2"):
            h = op.Add(h, inner)
    h = _norm(net, h, "norm", d_model)
    with op.place("head"):
        logits = op.MatMul(h, op.Transpose(table, perm=[1, 0]))
    return net.finish("logits", logits, [batch, length, vocabulary])


def _norm(net: Network, x: gs.Tensor, name: str, d_model: int) -> gs.Tensor:
    scale, bias = net.full(f"{name}.weight", (d_model,), 1.0), net.full(f"{name}.bias", (d_model,), 0.0)
    with net.op.place(name):
        return net.op.LayerNormalization(x, scale, bias, axis=-1, epsilon=1e-5)


def _gelu(net: Network, x: gs.Tensor) -> gs.Tensor:
    """x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))), operator by operator, as GPT-2's code is exported."""
    op = net.op
    inner = op.Mul(op.Add(x, op.Mul(op.Pow(x, 3.0), 0.044715)), math.sqrt(2 / math.pi))
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))
