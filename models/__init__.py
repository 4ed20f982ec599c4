"""Networks as ONNX models, by name: the paper's, a decoder like GPT-2, and a small one for digits.

``build("mlp3", hidden=16)`` gives a checked ``onnx.ModelProto``; every network takes ``batch``, ``seed``,
``opset``, ``dtype`` and its own sizes.  The same options give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx

from zilc.errors import OptionError
from zilc.models import alexnet, decoder, digits, mlp, residual, resnet18, rnn, skip, transformer

_BUILDERS: dict[str, Callable[..., onnx.ModelProto]] = {
    "skip": skip.build,
    "mlp2": partial(mlp.build, layers=2),
    "mlp3": partial(mlp.build, layers=3),
    "mlp4": partial(mlp.build, layers=4),
    "residual": residual.build,
    "alexnet": alexnet.build,
    "resnet18": resnet18.build,
    "rnn": rnn.build,
    "transformer": transformer.build,
    "decoder": decoder.build,
    "digits": digits.build,
}


def names() -> tuple[str, ...]:
    """The networks that :func:`build` knows."""
    return tuple(_BUILDERS)


def build(name: str, **options: object) -> onnx.ModelProto:
    """The network ``name``, full-checked, with initial parameters.

    Args:
        options: common to all are ``batch`` (a number, or the name of a symbolic dimension; default "N"),
            ``seed``, ``opset`` (default 18) and ``dtype`` ("float32" or "float64"); the sizes are those of
            the network's own ``build``.

    Raises:
        OptionError: no network of that name, or sizes that do not fit together.
    """
    if name not in _BUILDERS:
        expected = ", ".join(_BUILDERS)
        raise OptionError(f"no network '{name}', expected one of: {expected}", where="zilc.models.build")
    return _BUILDERS[name](**options)


def random_feeds(
    model: onnx.ModelProto,
    batch: int = 2,
    rng: np.random.Generator | None = None,
    *,
    dims: Mapping[str, int] | None = None,
    loss: str | None = None,
) -> dict[str, np.ndarray]:
    """Random arrays for a model's inputs, by name, and a target where a loss is named.

    Floating inputs are standard normal; integers that a Gather reads its data with lie within that data's
    bounds; other integers, and booleans, are ones, as attention masks are.

    Args:
        batch: value of every symbolic dimension that ``dims`` does not name.
        dims: values of symbolic dimensions, by name.
        loss: "energy" or "mse" (a normal target), "cross-entropy" (labels; the classes are the last axis) or
            "bce-with-logits" (zeros and ones): adds ``target``, for the model's first output.
    """
    rng = np.random.default_rng(0) if rng is None else rng
    sizes = dict(dims or {})
    bounds = _gather_bounds(model)
    initializers = {t.name for t in model.graph.initializer}
    feeds = {}
    for info in model.graph.input:
        if info.name in initializers:
            continue
        shape = _shape(info, batch, sizes)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        if dtype.kind in "iu":
            bound = bounds.get(info.name)
            drawn = np.ones(shape) if bound is None else rng.integers(0, bound, shape)
        elif dtype.kind == "b":
            drawn = np.ones(shape)
        else:
            drawn = rng.standard_normal(shape)
        feeds[info.name] = np.asarray(drawn, dtype)
    if loss is not None:
        output = model.graph.output[0]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(output.type.tensor_type.elem_type)
        feeds["target"] = _target(loss, _shape(output, batch, sizes), dtype, rng)
    return feeds


def _target(loss: str, shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    if loss in ("energy", "mse"):
        return np.asarray(rng.standard_normal(shape), dtype)
    if loss == "cross-entropy":
        return np.asarray(rng.integers(0, shape[-1], shape[:-1]), np.int64)
    if loss == "bce-with-logits":
        return np.asarray(rng.integers(0, 2, shape), dtype)
    expected = "energy, mse, cross-entropy or bce-with-logits"
    where = "zilc.models.random_feeds"
    raise OptionError(f"no target for the loss '{loss}', expected {expected}", where=where)


def _shape(info: onnx.ValueInfoProto, batch: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(
        d.dim_value if d.HasField("dim_value") else sizes.get(d.dim_param, batch)
        for d in info.type.tensor_type.shape.dim
    )


def _gather_bounds(model: onnx.ModelProto) -> dict[str, int]:
    """For each tensor used as indices, the length of the axis that it indexes, where that is known."""
    shapes: dict[str, list[int]] = {t.name: list(t.dims) for t in model.graph.initializer}
    for info in (*model.graph.input, *model.graph.value_info):
        dims = info.type.tensor_type.shape.dim
        shapes.setdefault(info.name, [d.dim_value for d in dims])  # 0 where symbolic
    bounds: dict[str, int] = {}
    # Backwards, so that a bound passes from a cast or a reshape to what it was made of.
    for node in reversed(model.graph.node):
        if node.op_type == "Gather" and shapes.get(node.input[0]):
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            length, indices = shapes[node.input[0]][axis], node.input[1]
        elif node.op_type in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten"):
            length, indices = bounds.get(node.output[0], 0), node.input[0]
        else:
            continue
        if length:
            bounds[indices] = min(length, bounds.get(indices, length))
    return bounds
