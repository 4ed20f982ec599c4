"""Operators of ONNX's other domains: updates of an optimizer (ai.onnx.preview.training), and ai.onnx.ml.

Schemas of other domains are not consulted for defaults: formulas state them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.vjp.indexing import scatter_add
from zilc.vjp.shape import rank_of, reshape_like
from zilc.vjp.table import defvjp, no_gradient, variadic
from zilc.vjp.trace import through, told_apart

_TRAINING, _ML = "ai.onnx.preview.training", "ai.onnx.ml"

# -- updates: rate R, count T, then tensors X_1 ..., gradients G_1 ..., and their slots --

Update = Callable[..., list[gs.Tensor]]


def _update(name: str, groups: int, one: Update) -> None:
    """A rule for an operator that updates any number of tensors by ``one(op, r, t, x, g, *slots, **attrs)``.

    Args:
        groups: operands for each tensor: itself, its gradient, its slots.
    """

    def formula(op: Emitter, g: Any, y: Any, index: int, *operands: Any, **attrs: Any) -> gs.Tensor | None:
        apart, x = told_apart(op, operands, index)
        r, t, rest = apart[0], apart[1], apart[2:]
        count = len(rest) // groups
        result = None
        for k in range(count):
            results = one(op, r, t, *rest[k::count], **attrs)
            for slot, made in enumerate(results):
                cotangent = g[slot * count + k]
                part = None if cotangent is None else through(op, made, x, cotangent)
                if part is not None:
                    result = part if result is None else op.Add(result, part)
        return result

    variadic(name, formula, domain=_TRAINING, multi=True)


def _regularized(op: Emitter, x: Any, g: Any, norm_coefficient: float) -> gs.Tensor:
    return op.Add(op.Mul(x, norm_coefficient), g) if norm_coefficient else g


def _adagrad(
    op: Emitter, r: Any, t: Any, x: Any, g: Any, h: Any,
    *, decay_factor: float = 0.0, epsilon: float = 1e-6, norm_coefficient: float = 0.0,
) -> list[gs.Tensor]:  # fmt: skip
    """H' = H + G^2;  X' = X - R / (1 + T decay) G / (sqrt(H') + epsilon)."""
    g = _regularized(op, x, g, norm_coefficient)
    rate = op.Div(r, op.Add(op.Mul(op.cast(t, op.dtype(r)), decay_factor), 1.0))
    h = op.Add(h, op.Mul(g, g))
    return [op.Sub(x, op.Div(op.Mul(rate, g), op.Add(op.Sqrt(h), epsilon))), h]


def _momentum(
    op: Emitter, r: Any, t: Any, x: Any, g: Any, v: Any,
    *, alpha: float, beta: float, mode: str, norm_coefficient: float,
) -> list[gs.Tensor]:  # fmt: skip
    """V' = alpha V + beta G, beta 1 at the first update;  X' = X - R V', nesterov: X - R (G + alpha V')."""
    g = _regularized(op, x, g, norm_coefficient)
    weight = op.Where(op.Greater(t, 0), op.scalar_like(beta, x), op.scalar_like(1, x))
    v = op.Add(op.Mul(v, alpha), op.Mul(g, weight))
    move = op.Add(g, op.Mul(v, alpha)) if mode == "nesterov" else v
    return [op.Sub(x, op.Mul(r, move)), v]


def _adam(
    op: Emitter, r: Any, t: Any, x: Any, g: Any, v: Any, h: Any,
    *, alpha: float = 0.9, beta: float = 0.999, epsilon: float = 1e-6, norm_coefficient: float = 0.0,
    norm_coefficient_post: float = 0.0,
) -> list[gs.Tensor]:  # fmt: skip
    """V' and H' decay towards G and G^2;  X' = X - R sqrt(1 - beta^T) / (1 - alpha^T) V' / (sqrt(H') + epsilon)."""
    g = _regularized(op, x, g, norm_coefficient)
    v = op.Add(op.Mul(v, alpha), op.Mul(g, 1.0 - alpha))
    h = op.Add(op.Mul(h, beta), op.Mul(op.Mul(g, g), 1.0 - beta))
    count = op.cast(t, op.dtype(r))
    started = op.Greater(t, 0)
    power = op.Where(started, count, op.scalar_like(1, r))
    second = op.Sqrt(op.Sub(1.0, op.Pow(op.scalar_like(beta, r), power)))
    first = op.Sub(1.0, op.Pow(op.scalar_like(alpha, r), power))
    rate = op.Where(started, op.Mul(r, op.Div(second, first)), r)
    x = op.Sub(x, op.Div(op.Mul(rate, v), op.Add(op.Sqrt(h), epsilon)))
    return [op.Mul(x, 1.0 - norm_coefficient_post) if norm_coefficient_post else x, v, h]


_update("Adagrad", 3, _adagrad)
_update("Momentum", 3, _momentum)
_update("Adam", 4, _adam)

# -- ai.onnx.ml --


def _array_feature(op: Emitter, g: Any, y: Any, x: Any, index: Any) -> gs.Tensor:
    """y = x[..., index]: g is added up at the columns that were read."""
    rank = rank_of(op, x)
    if rank == 1:
        g = op.Reshape(g, [-1])
    size = op.dim_of(x, rank - 1)
    return reshape_like(op, scatter_add(op, g, op.Reshape(index, np.asarray([-1])), rank - 1, rank, size), x)


defvjp("ArrayFeatureExtractor", _array_feature, None, domain=_ML)
no_gradient(
    "Binarizer", "TreeEnsemble", "TreeEnsembleRegressor", "TreeEnsembleClassifier", domain=_ML,
    note="piecewise constant",
)  # fmt: skip
