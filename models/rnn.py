"""The paper's single-layer many-to-one recurrent network, unrolled over time or as one RNN operator."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from zilc.models.network import Batch, Network


def build(
    *,
    steps: int = 28,
    inputs: int = 128,
    hidden: int = 128,
    outputs: int = 128,
    unrolled: bool = True,
    batch: Batch = "N",
    seed: int = 0,
    opset: int = 18,
    dtype: str = "float32",
) -> onnx.ModelProto:
    """h_t = tanh(W_ih x_t + b + W_hh h_{t-1}) from h_0 = 0, then output = W h_T + b.

    Args:
        unrolled: True writes every time step out: ``rnn.weight_ih`` and ``rnn.bias`` are one initializer each
            that ``steps`` vertices consume (``rnn.weight_hh`` one fewer: the first step has no state).  False
            makes one RNN operator of the same function, whose bias has two halves, the second zero.

    Input ``input`` (batch, steps, inputs), output ``output`` (batch, outputs), parameters ``rnn.weight_ih``
    (hidden, inputs), ``rnn.weight_hh`` (hidden, hidden), ``rnn.bias``, ``output.weight``, ``output.bias``;
    all drawn from U(±1/√hidden).
    """
    sizes = {"steps": steps, "inputs": inputs, "hidden": hidden, "outputs": outputs}
    options = {**sizes, "unrolled": unrolled}
    net = Network("rnn", seed=seed, opset=opset, dtype=dtype, options=options)
    x = net.input("input", [batch, steps, inputs])
    bound = 1 / math.sqrt(hidden)
    # With the leading axis of directions that the operator wants, and that the unrolled form does without.
    shapes = (1, hidden, inputs), (1, hidden, hidden), (1, hidden)
    weight_ih, weight_hh, bias = (net.rng.uniform(-bound, bound, shape) for shape in shapes)
    if unrolled:
        h = _unrolled(net, x, steps, weight_ih[0], weight_hh[0], bias[0])
    else:
        halves = np.concatenate([bias, np.zeros_like(bias)], axis=1)
        h = _operator(net, x, hidden, weight_ih, weight_hh, halves)
    return net.finish("output", net.linear(h, "output", hidden, outputs), [batch, outputs])


def _unrolled(
    net: Network, x: gs.Tensor, steps: int, weight_ih: np.ndarray, weight_hh: np.ndarray, bias: np.ndarray
) -> gs.Tensor:
    op = net.op
    w_ih, w_hh = net.parameter("rnn.weight_ih", weight_ih), net.parameter("rnn.weight_hh", weight_hh)
    b = net.parameter("rnn.bias", bias)
    h: gs.Tensor | None = None
    for t in range(steps):
        with op.place(f"t{t + 1}"):
            x_t = op.Gather(x, np.int64(t), axis=1)  # (batch, inputs)
            h_t = op.Gemm(x_t, w_ih, b, transB=1)
            if h is not None:
                h_t = op.Add(h_t, op.Gemm(h, w_hh, transB=1))
            h = op.Tanh(h_t)
    assert h is not None, "steps >= 1"
    return h


def _operator(
    net: Network, x: gs.Tensor, hidden: int, weight_ih: np.ndarray, weight_hh: np.ndarray, bias: np.ndarray
) -> gs.Tensor:
    op = net.op
    w_ih, w_hh = net.parameter("rnn.weight_ih", weight_ih), net.parameter("rnn.weight_hh", weight_hh)
    b = net.parameter("rnn.bias", bias)
    with op.place("rnn"):
        time_first = op.Transpose(x, perm=[1, 0, 2])
        _, last = op.RNN(time_first, w_ih, w_hh, b, hidden_size=hidden, outputs=2)  # last: (1, batch, hidden)
        return op.Squeeze(last, [0])
