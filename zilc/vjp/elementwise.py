"""Operators that act element by element.

At kinks the choice is PyTorch's: the derivative of Relu and Abs at 0 is 0, Clip passes the cotangent at its
bounds, and tied operands of Max and Min share it.  Derivatives are written in the output wherever that saves
recomputing it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.vjp.table import broadcasting, defvjp, variadic

# -- arithmetic --

broadcasting("Add", lambda op, g, y, a, b: g, lambda op, g, y, a, b: g)
broadcasting("Sub", lambda op, g, y, a, b: g, lambda op, g, y, a, b: op.Neg(g))
broadcasting("Mul", lambda op, g, y, a, b: op.Mul(g, b), lambda op, g, y, a, b: op.Mul(g, a))
broadcasting(
    "Div",
    lambda op, g, y, a, b: op.Div(g, b),
    # d(a/b)/db = -a/b^2 = -y/b; the divisor is often the smaller tensor, so the sign goes there
    lambda op, g, y, a, b: op.Div(op.Mul(g, y), op.Neg(b)),
)


def _pow_base(op: Emitter, g: Any, y: Any, x: Any, p: Any) -> gs.Tensor:
    """d x^p / dx = p x^(p-1), and 0 where p = 0, whatever x is."""
    known = op.value(p)
    if known is not None and known.size and np.all(known == known.flat[0]):
        return _pow_base_constant(op, g, y, x, float(known.flat[0]))
    p = op.cast(p, op.dtype(x))
    slope = op.Mul(p, op.Pow(x, op.Sub(p, 1.0)))
    return op.Mul(g, op.Where(op.Equal(p, 0.0), 0.0, slope))


def _pow_base_constant(op: Emitter, g: Any, y: Any, x: Any, p: float) -> gs.Tensor:
    """The same for one known exponent; square roots and small powers without a power function."""
    if p == 0.0:
        return op.zeros_like(y)
    if p == 1.0:
        return g
    if p == 2.0:
        power = x
    elif p == 3.0:
        power = op.Mul(x, x)
    elif p == 0.5:
        return op.Div(op.Mul(g, 0.5), y)
    elif p == -0.5:
        return op.Mul(op.Mul(g, -0.5), op.Mul(y, op.Mul(y, y)))  # -1/2 x^(-3/2) = -1/2 y^3
    elif p == -1.0:
        return op.Mul(op.Mul(g, y), op.Neg(y))
    else:
        power = op.Pow(x, p - 1.0)
    return op.Mul(op.Mul(g, p), power)


def _pow_exponent(op: Emitter, g: Any, y: Any, x: Any, p: Any) -> gs.Tensor:
    """d x^p / dp = x^p ln x, and 0 where x = 0 and p >= 0: there y ln x would be 0 times infinity.

    No real derivative exists where x < 0: 0, as TensorFlow has it.  NaN would not stay where it is: a constant exponent
    that several levels share is delayed by identity vertices, and their value nodes would move by it.
    """
    flat = op.Or(op.Less(x, 0.0), op.And(op.Equal(x, 0.0), op.GreaterOrEqual(p, 0.0)))
    slope = op.Where(flat, 0.0, op.Mul(y, op.Log(x)))
    return op.cast(op.Mul(g, slope), op.dtype(p))


broadcasting("Pow", _pow_base, _pow_exponent, note="exponent's cotangent 0 at base < 0, and at base 0, exponent >= 0")


def _mod_divisor(op: Emitter, g: Any, y: Any, a: Any, b: Any, *, fmod: int) -> gs.Tensor:
    """y = a - q b with the whole number q locally constant; rounding only removes the division's error.

    Where a is infinite or b is 0 there is no such q, and no derivative: 0.
    """
    q = op.Round(op.Div(op.Sub(a, y), b))
    q = op.Where(op.Less(op.Abs(q), float("inf")), q, 0.0)
    return op.Neg(op.Mul(g, q))


broadcasting("Mod", lambda op, g, y, a, b, *, fmod: g, _mod_divisor, note="quotient held constant")

defvjp("Identity", lambda op, g, y, x: g)
defvjp("Neg", lambda op, g, y, x: op.Neg(g))
defvjp("Abs", lambda op, g, y, x: op.Mul(g, op.Sign(x)), note="0 at 0")
defvjp("Reciprocal", lambda op, g, y, x: op.Mul(op.Mul(g, y), op.Neg(y)))
defvjp("Sqrt", lambda op, g, y, x: op.Div(op.Mul(g, 0.5), y))
defvjp("Exp", lambda op, g, y, x: op.Mul(g, y))
defvjp("Log", lambda op, g, y, x: op.Div(g, x))

# -- trigonometric and hyperbolic functions, erf --

defvjp("Sin", lambda op, g, y, x: op.Mul(g, op.Cos(x)))
defvjp("Cos", lambda op, g, y, x: op.Mul(g, op.Neg(op.Sin(x))))
defvjp("Tan", lambda op, g, y, x: op.Mul(g, op.Add(op.Mul(y, y), 1.0)))
defvjp("Asin", lambda op, g, y, x: op.Div(g, op.Sqrt(op.Sub(1.0, op.Mul(x, x)))))
defvjp("Acos", lambda op, g, y, x: op.Div(op.Neg(g), op.Sqrt(op.Sub(1.0, op.Mul(x, x)))))
defvjp("Atan", lambda op, g, y, x: op.Div(g, op.Add(op.Mul(x, x), 1.0)))


def _sinh(op: Emitter, g: Any, y: Any, x: Any) -> Any:
    """y' = cosh x = (e^|x| + e^-|x|) / 2, without Cosh, which is slow on the CPU and has no CUDA kernel.

    e^|x| is a square, so that its half overflows no earlier than cosh x does.
    """
    root = op.Exp(op.Mul(op.Abs(x), 0.5))
    half = op.Mul(op.Mul(root, 0.5), root)
    return op.Mul(g, op.Add(half, op.Div(op.scalar_like(0.25, x), half)))


defvjp("Sinh", _sinh)
# y' = sinh x, which Sinh would compute, slowly on the CPU and without a CUDA kernel.
defvjp("Cosh", lambda op, g, y, x: op.Mul(g, op.Mul(y, op.Tanh(x))))
# y' = 1 - y^2; g - g y^2 saves nothing: the product form keeps the sign of g at saturation.
defvjp("Tanh", lambda op, g, y, x: op.Mul(g, op.Sub(1.0, op.Mul(y, y))))
defvjp("Asinh", lambda op, g, y, x: op.Div(g, op.Sqrt(op.Add(op.Mul(x, x), 1.0))))
defvjp("Acosh", lambda op, g, y, x: op.Div(g, op.Sqrt(op.Sub(op.Mul(x, x), 1.0))))
defvjp("Atanh", lambda op, g, y, x: op.Div(g, op.Sub(1.0, op.Mul(x, x))))
defvjp("Erf", lambda op, g, y, x: op.Mul(op.Mul(g, 2.0 / math.sqrt(math.pi)), op.Exp(op.Mul(x, op.Neg(x)))))

# -- activations --

defvjp("Relu", lambda op, g, y, x: op.Where(op.Greater(y, 0.0), g, 0.0), note="0 at 0")
defvjp("Sigmoid", lambda op, g, y, x: op.Mul(op.Mul(g, y), op.Sub(1.0, y)))
defvjp("Softplus", lambda op, g, y, x: op.Mul(g, op.Sigmoid(x)))


def _softsign(op: Emitter, g: Any, y: Any, x: Any) -> gs.Tensor:
    """y = x / (1 + |x|);  y' = 1 / (1 + |x|)^2."""
    width = op.Add(op.Abs(x), 1.0)
    return op.Div(op.Div(g, width), width)


defvjp("Softsign", _softsign)


def _leaky_relu(op: Emitter, g: Any, y: Any, x: Any, *, alpha: float) -> gs.Tensor:
    return op.Where(op.Greater(x, 0.0), g, op.Mul(g, alpha))


defvjp("LeakyRelu", _leaky_relu, note="slope alpha at 0")
broadcasting(
    "PRelu",
    lambda op, g, y, x, slope: op.Where(op.Greater(x, 0.0), g, op.Mul(g, slope)),
    lambda op, g, y, x, slope: op.Mul(g, op.Min(x, 0.0)),
    note="the slope's at 0",
)


def _elu(op: Emitter, g: Any, y: Any, x: Any, *, alpha: float) -> gs.Tensor:
    """y = alpha (e^x - 1) below 0, so y' = y + alpha there and 1 above."""
    if alpha == 1.0:
        return op.Mul(g, op.Add(op.Min(y, 0.0), 1.0))
    return op.Where(op.Greater(x, 0.0), g, op.Mul(g, op.Add(y, alpha)))


def _selu(op: Emitter, g: Any, y: Any, x: Any, *, alpha: float, gamma: float) -> gs.Tensor:
    """y = gamma alpha (e^x - 1) below 0, so y' = y + gamma alpha there and gamma above."""
    return op.Mul(g, op.Where(op.Greater(x, 0.0), gamma, op.Add(y, gamma * alpha)))


def _celu(op: Emitter, g: Any, y: Any, x: Any, *, alpha: float) -> gs.Tensor:
    """y = alpha (e^(x/alpha) - 1) below 0, so y' = y/alpha + 1 there and 1 above."""
    scaled = y if alpha == 1.0 else op.Mul(y, 1.0 / alpha)
    # y/alpha has the sign of alpha x
    side = op.Min(scaled, 0.0) if alpha > 0 else op.Max(scaled, 0.0)
    return op.Mul(g, op.Add(side, 1.0))


defvjp("Elu", _elu, note="alpha at 0")
defvjp("Selu", _selu, note="gamma alpha at 0")
defvjp("Celu", _celu)


def _thresholded_relu(op: Emitter, g: Any, y: Any, x: Any, *, alpha: float) -> gs.Tensor:
    return op.Where(op.Greater(x, alpha), g, 0.0)


def _hard_sigmoid(op: Emitter, g: Any, y: Any, x: Any, *, alpha: float, beta: float) -> gs.Tensor:
    inside = op.And(op.Greater(y, 0.0), op.Less(y, 1.0))
    return op.Where(inside, op.Mul(g, alpha), 0.0)


def _hard_swish(op: Emitter, g: Any, y: Any, x: Any) -> gs.Tensor:
    """y = x clip(x/6 + 1/2, 0, 1): slope x/3 + 1/2 on (-3, 3), 0 below and 1 above.

    ONNX's 1/6 is an attribute of its function body, so float32 in float64 too: twice that is the slope of what runs.
    """
    inner = op.Add(op.Mul(x, 2.0 * float(np.float32(1.0 / 6.0))), 0.5)
    outer = op.Clip(x, 0.0, 1.0)
    return op.Mul(g, op.Where(op.Less(op.Abs(x), 3.0), inner, outer))


def _shrink(op: Emitter, g: Any, y: Any, x: Any, *, bias: float, lambd: float) -> gs.Tensor:
    return op.Where(op.Greater(op.Abs(x), lambd), g, 0.0)


defvjp("ThresholdedRelu", _thresholded_relu, note="0 at the threshold")
defvjp("HardSigmoid", _hard_sigmoid, note="0 at both bounds")
defvjp("HardSwish", _hard_swish, note="0 at -3, 1 at 3")
defvjp("Shrink", _shrink, note="0 at both thresholds")


def _mish(op: Emitter, g: Any, y: Any, x: Any) -> gs.Tensor:
    """y = x t, t = tanh(softplus(x));  y' = t + x (1 - t^2) sigmoid(x) = t + (x - y t) sigmoid(x)."""
    t = op.Tanh(op.Softplus(x))
    return op.Mul(g, op.Add(t, op.Mul(op.Sub(x, op.Mul(y, t)), op.Sigmoid(x))))


def _swish(op: Emitter, g: Any, y: Any, x: Any, *, alpha: float) -> gs.Tensor:
    """y = x s, s = sigmoid(alpha x);  y' = s + alpha y (1 - s)."""
    scaled_x, scaled_y = (x, y) if alpha == 1.0 else (op.Mul(x, alpha), op.Mul(y, alpha))
    s = op.Sigmoid(scaled_x)
    return op.Mul(g, op.Add(s, op.Mul(scaled_y, op.Sub(1.0, s))))


def _gelu(op: Emitter, g: Any, y: Any, x: Any, *, approximate: str) -> gs.Tensor:
    if approximate == "tanh":
        # y = x/2 (1 + t), t = tanh(u), u = k (x + c x^3);  y' = 1/2 (1 + t) + x/2 (1 - t^2) u'
        #                                                     = 1/2 (1 + t) (1 + x u' (1 - t))
        k, c = math.sqrt(2.0 / math.pi), 0.044715
        square = op.Mul(x, x)
        t = op.Tanh(op.Mul(x, op.Add(op.Mul(square, k * c), k)))
        slope = op.Mul(x, op.Add(op.Mul(square, 3.0 * k * c), k))
        return op.Mul(op.Mul(g, op.Mul(op.Add(t, 1.0), 0.5)), op.Add(op.Mul(slope, op.Sub(1.0, t)), 1.0))
    # y = x/2 (1 + erf u), u = x / sqrt 2;  y' = 1/2 (1 + erf u) + 1/2 (2 / sqrt pi) u e^(-u^2)
    u = op.Mul(x, math.sqrt(0.5))
    density = op.Mul(op.Mul(u, op.Exp(op.Mul(u, op.Neg(u)))), 2.0 / math.sqrt(math.pi))
    return op.Mul(op.Mul(g, 0.5), op.Add(op.Add(op.Erf(u), 1.0), density))


defvjp("Mish", _mish)
defvjp("Swish", _swish)
defvjp("Gelu", _gelu)

# -- selection --


def _clip_bound(lower: bool) -> Any:
    """A bound gathers from the elements that it holds; the upper one wins where they cross."""

    def formula(op: Emitter, g: Any, y: Any, x: Any, low: Any, high: Any) -> gs.Tensor:
        if lower:
            held = op.Less(x, low)
            if high is not None:
                held = op.And(held, op.Less(low, high))
        else:
            held = op.Greater(x, high)
            if low is not None:
                held = op.Or(held, op.Less(high, low))
        return op.Where(held, g, 0.0)

    return formula


broadcasting(
    "Clip",
    lambda op, g, y, x, low, high: op.Where(op.Equal(x, y), g, 0.0),
    _clip_bound(lower=True),
    _clip_bound(lower=False),
    note="passes at the bounds",
)
broadcasting(
    "Where",
    None,
    lambda op, g, y, condition, a, b: op.Where(condition, g, 0.0),
    lambda op, g, y, condition, a, b: op.Where(condition, 0.0, g),
)


def _extremum(op: Emitter, g: Any, y: Any, index: int, *operands: Any) -> gs.Tensor:
    """Operands equal to the output share its cotangent evenly."""
    if len(operands) == 1:
        return g
    held = [op.Equal(x, y) for x in operands]
    if len(operands) == 2:
        return op.Where(held[index], op.Where(held[1 - index], op.Mul(g, 0.5), g), 0.0)
    ties = op.Sum(*(op.cast(h, op.dtype(y)) for h in held))
    return op.Where(held[index], op.Div(g, ties), 0.0)


def _mean(op: Emitter, g: Any, y: Any, index: int, *operands: Any) -> gs.Tensor:
    return op.Mul(g, 1.0 / len(operands)) if len(operands) > 1 else g


variadic("Max", _extremum, broadcast=True, note="tied operands share evenly")
variadic("Min", _extremum, broadcast=True, note="tied operands share evenly")
variadic("Sum", lambda op, g, y, index, *operands: g, broadcast=True)
variadic("Mean", _mean, broadcast=True)

# -- dtype, dropout --


def _cast(op: Emitter, g: Any, y: Any, x: Any, *_: Any, **__: Any) -> gs.Tensor:
    """A cast is linear; its cotangent is cast back, whatever the rounding was."""
    return op.cast(g, op.dtype(x))


defvjp("Cast", _cast)
defvjp("CastLike", _cast, None)


def _dropout(
    op: Emitter, g: Any, y: Any, x: Any, ratio: Any, training: Any, *, seed: int | None
) -> gs.Tensor:
    """y = mask x / (1 - ratio) in training, else y = x."""
    known = op.value(training)
    if training is None or (known is not None and not known):
        return g
    keep = op.Sub(op.constant(np.ones((), op.dtype(g))), _ratio(op, ratio, g))
    # ratio = 1 drops everything: the mask is selected before it is scaled, never 0/0
    dropped = op.Where(y[1], op.Div(g, keep), 0.0)
    return dropped if known is not None else op.Where(training, dropped, g)


def _ratio(op: Emitter, ratio: Any, g: Any) -> gs.Tensor:
    return op.scalar_like(0.5, g) if ratio is None else op.cast(ratio, op.dtype(g))


defvjp("Dropout", _dropout, None, None, extra_outputs=(1,), note="the mask drawn forward")
