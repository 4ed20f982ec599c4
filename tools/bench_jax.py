"""JAX's peer in tools/bench.py: the networks as people write them there, parameters by their names in the ONNX file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from bench_task import HALVES, TARGET, Made, Task, count

Arrays = dict[str, Any]
#: Of losses in float16: fixed, for a dynamic one is no part of JAX; less than the 65536 at which ResNet18 overflows.
SCALE = 256.0


def step(task: Task, imported: Callable[[], None]) -> Made:
    """jit of value_and_grad and the update, parameters and slots donated; the loss read back.

    Raises:
        ValueError: JAX has no such device.
    """
    os.environ.setdefault("JAX_PLATFORMS", task.device)
    import jax
    import jax.numpy as jnp

    imported()
    jax.config.update("jax_enable_x64", task.precision == "float64")
    jax.config.update("jax_default_matmul_precision", "highest")
    weights, feeds = task.weights(), task.feeds()
    trained = {name: jnp.asarray(weights[name]) for name in task.parameters}
    fixed = {name: jnp.asarray(value) for name, value in weights.items() if name not in trained}
    network = partial(_mlp, int(task.network[3:])) if task.network.startswith("mlp") else _NETWORKS[task.network]
    x, y = jnp.asarray(feeds[task.inputs[0]]), jnp.asarray(feeds[TARGET].astype(np.int32))

    half = task.precision if task.precision in HALVES else None
    scale = SCALE if half == "float16" else 1.0

    def narrow(array: Any) -> Any:
        return array.astype(half) if half and jnp.issubdtype(array.dtype, jnp.floating) else array

    def loss_of(parameters: Arrays, x: Any, y: Any) -> Any:
        logits = network(jax.tree.map(narrow, {**fixed, **parameters}), narrow(x)).astype(task.weights_precision)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], axis=-1)
        return -scale * chosen.mean()

    def gradients(parameters: Arrays, x: Any, y: Any) -> tuple[Any, Arrays]:
        loss, grads = jax.value_and_grad(loss_of)(parameters, x, y)
        return loss / scale, jax.tree.map(lambda g: g / scale, grads)

    def sgd(state: Arrays, x: Any, y: Any) -> tuple[Any, Arrays]:
        loss, grads = gradients(state["p"], x, y)
        return loss, {"p": jax.tree.map(lambda p, g: p - task.lr * g, state["p"], grads)}

    def adam(state: Arrays, x: Any, y: Any) -> tuple[Any, Arrays]:
        loss, grads = gradients(state["p"], x, y)
        t = state["t"] + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], grads)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, state["v"], grads)
        rate, grown = task.lr / (1 - 0.9**t), 1 / jnp.sqrt(1 - 0.999**t)
        p = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) * grown + 1e-8), state["p"], m, v)
        return loss, {"p": p, "m": m, "v": v, "t": t}

    state: Arrays = {"p": trained}
    if task.optimizer == "adam":
        zeros = partial(jax.tree.map, jnp.zeros_like)
        state |= {"m": zeros(trained), "v": zeros(trained), "t": jnp.zeros((), task.weights_precision)}
    update = jax.jit({"sgd": sgd, "adam": adam}[task.optimizer], donate_argnums=0)

    def run() -> float:
        nonlocal state
        loss, state = update(state, x, y)
        jax.block_until_ready(state)
        return float(loss)

    return Made(run, count(weights, task.parameters), {"jax": jax.__version__}, {"provider": jax.default_backend()})


def _linear(p: Arrays, name: str, x: Any) -> Any:
    """x Wᵀ + b, W (out, in)."""
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _project(p: Arrays, name: str, x: Any) -> Any:
    """x W + b, W (in, out)."""
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def _mlp(depth: int, p: Arrays, x: Any) -> Any:
    import jax.numpy as jnp

    for index in range(1, depth):
        x = jnp.tanh(_linear(p, f"layer{index}", x))
    return _linear(p, f"layer{depth}", x)


def _rnn(p: Arrays, x: Any) -> Any:
    """lax.scan over time; the inputs' part is one product for all steps."""
    import jax
    import jax.numpy as jnp

    drive = jnp.swapaxes(x @ p["rnn.weight_ih"].T + p["rnn.bias"], 0, 1)
    first = jnp.zeros(drive.shape[1:], x.dtype)
    last, _ = jax.lax.scan(lambda h, d: (jnp.tanh(d + h @ p["rnn.weight_hh"].T), None), first, drive)
    return _linear(p, "output", last)


def _conv(p: Arrays, name: str, x: Any, stride: int, pad: int) -> Any:
    """NCHW, as the batch comes."""
    import jax

    made = jax.lax.conv_general_dilated(
        x, p[f"{name}.weight"], (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    bias = p.get(f"{name}.bias")
    return made if bias is None else made + bias[:, None, None]


def _max_pool(x: Any, kernel: int, stride: int, pad: int) -> Any:
    import jax

    pads = [(0, 0), (0, 0), (pad, pad), (pad, pad)]
    return jax.lax.reduce_window(
        x, -np.inf, jax.lax.max, (1, 1, kernel, kernel), (1, 1, stride, stride), pads
    )  # fmt: skip


def _alexnet(p: Arrays, x: Any) -> Any:
    import jax

    for index, (stride, pad, pooled) in enumerate([(4, 2, 1), (1, 2, 1), (1, 1, 0), (1, 1, 0), (1, 1, 1)], 1):
        x = jax.nn.relu(_conv(p, f"conv{index}", x, stride, pad))
        if pooled:
            x = _max_pool(x, 3, 2, 0)
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(_linear(p, "fc6", x))
    return _linear(p, "fc8", jax.nn.relu(_linear(p, "fc7", x)))


def _batch_norm(p: Arrays, name: str, x: Any) -> Any:
    """In inference form, as in the ONNX network."""
    import jax

    scale = p[f"{name}.weight"] * jax.lax.rsqrt(p[f"{name}.running_var"] + 1e-5)
    shift = p[f"{name}.bias"] - p[f"{name}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def _resnet18(p: Arrays, x: Any) -> Any:
    import jax

    h = _max_pool(jax.nn.relu(_batch_norm(p, "bn1", _conv(p, "conv1", x, 2, 3))), 3, 2, 1)
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inner = jax.nn.relu(_batch_norm(p, f"{name}.bn1", _conv(p, f"{name}.conv1", h, stride, 1)))
            inner = _batch_norm(p, f"{name}.bn2", _conv(p, f"{name}.conv2", inner, 1, 1))
            if stride != 1:
                h = _batch_norm(p, f"{name}.downsample.1", _conv(p, f"{name}.downsample.0", h, stride, 0))
            h = jax.nn.relu(inner + h)
    return _linear(p, "fc", h.mean((2, 3)))


def _layer_norm(p: Arrays, name: str, x: Any) -> Any:
    import jax

    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    return centred * scale * p[f"{name}.weight"] + p[f"{name}.bias"]


def _attention(p: Arrays, name: str, x: Any, heads: int = 8) -> Any:
    """Causal, in ``heads`` heads."""
    import jax
    import jax.numpy as jnp

    batch, length, d = x.shape
    q, k, v = (_project(p, f"{name}.{part}", x).reshape(batch, length, heads, -1) for part in ("query", "key", "value"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d // heads)
    seen = jnp.tril(jnp.ones((length, length), bool))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)
    return _project(p, f"{name}.output", mixed.reshape(batch, length, d))


def _transformer(p: Arrays, ids: Any) -> Any:
    import jax

    table = p["embedding.weight"]
    length, d = ids.shape[1], table.shape[1]
    angle = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, d, 2) / d)
    places = np.stack([np.sin(angle), np.cos(angle)], axis=2).reshape(length, d).astype(table.dtype)
    h = table[ids] * math.sqrt(d) + places
    h = _layer_norm(p, "layer1.norm1", h + _attention(p, "layer1.attention", h))
    inner = _project(p, "layer1.feedforward2", jax.nn.relu(_project(p, "layer1.feedforward1", h)))
    return _project(p, "head", _layer_norm(p, "layer1.norm2", h + inner))


def _decoder(p: Arrays, ids: Any) -> Any:
    import jax

    table = p["embedding.weight"]
    h = table[ids] + p["positions.weight"]
    for index in range(1, 5):
        name = f"block{index}"
        h = h + _attention(p, f"{name}.attention", _layer_norm(p, f"{name}.norm1", h))
        inner = jax.nn.gelu(_project(p, f"{name}.feedforward1", _layer_norm(p, f"{name}.norm2", h)), approximate=True)
        h = h + _project(p, f"{name}.feedforward2", inner)
    return _layer_norm(p, "norm", h) @ table.T


_NETWORKS = {
    "rnn": _rnn, "alexnet": _alexnet, "resnet18": _resnet18, "transformer": _transformer, "decoder": _decoder,
}  # fmt: skip
