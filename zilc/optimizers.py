"""The update of one leaf as nodes: torch.optim's SGD, Adam and AdamW, with its names and defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter
from zilc.errors import OptionError

Slots = dict[str, gs.Tensor]
Updated = tuple[gs.Tensor, Slots]
Update = Callable[["Optimizer", Emitter, gs.Tensor, gs.Tensor, Slots, gs.Tensor | None, gs.Tensor | None], Updated]
Option = float | bool | tuple[float, ...]


@dataclass(frozen=True)
class Optimizer:
    """An optimizer with its options settled.

    Attributes:
        slots: tensors of the parameter's shape that are carried from update to update.
        counts: it reads ``step``, the number of updates done so far.
    """

    name: str
    options: Mapping[str, Option]
    slots: tuple[str, ...]
    counts: bool
    _update: Update = field(repr=False)

    @property
    def linear(self) -> bool:
        """The update is p - lr g: what scales every error scales every update alike."""
        return self.name == "sgd" and not self.options["weight_decay"] and not self.options["maximize"]

    def update(
        self, op: Emitter, p: gs.Tensor, g: gs.Tensor, slots: Slots, lr: gs.Tensor | None, step: gs.Tensor | None
    ) -> tuple[gs.Tensor, Slots]:
        """The parameter's next value, and each slot's.

        Args:
            p, g: parameter and gradient, of one shape and dtype.
            slots: this parameter's slots by name.
            lr: learning rate, shape []; None where ``g`` holds it already (only if ``linear``).
            step: int64, shape []; None unless ``counts``.
        """
        return self._update(self, op, p, g, slots, lr, step)


def _sgd(o: Optimizer, op: Emitter, p: Any, g: Any, slots: Slots, lr: Any, step: Any) -> tuple[gs.Tensor, Slots]:
    """g += wd p;  b = m b + (1 - d) g (b = g at the first update);  p -= lr (nesterov ? g + m b : b)."""
    if o.options["maximize"]:
        g = op.Neg(g)
    if o.options["weight_decay"]:
        g = op.Add(g, op.Mul(p, float(o.options["weight_decay"])))  # type: ignore[arg-type]
    following: Slots = {}
    momentum = float(o.options.get("momentum", 0.0))  # type: ignore[arg-type]
    if "momentum_buffer" in slots:
        dampening = float(o.options["dampening"])  # type: ignore[arg-type]
        decayed = op.Mul(slots["momentum_buffer"], momentum)
        buffer = op.Add(decayed, op.Mul(g, 1.0 - dampening) if dampening else g)
        if dampening:
            # PyTorch's buffer starts as the first gradient, undamped; only with dampening does that differ from zero.
            buffer = op.Where(op.Equal(step, op.constant(np.asarray(0, np.int64))), g, buffer)
        following["momentum_buffer"] = buffer
        g = op.Add(g, op.Mul(buffer, momentum)) if o.options["nesterov"] else buffer
    return op.Sub(p, g if lr is None else op.Mul(g, op.cast(lr, op.dtype(p)))), following


def _adam(o: Optimizer, op: Emitter, p: Any, g: Any, slots: Slots, lr: Any, step: Any) -> tuple[gs.Tensor, Slots]:
    """m, v: decaying means of g, g^2;  p -= lr / (1 - b1^t)  m / (sqrt(v / (1 - b2^t)) + eps);  t = step + 1.

    With c = sqrt(1 - b2^t) the last is  p -= (lr c / (1 - b1^t))  m / (sqrt(v) + c eps), one pass over v less.  And g
    is multiplied by 1 - b1 at once, so that besides what is carried no more than two tensors of p's size are there at
    a time: v's share is then (1 - b2) / (1 - b1)^2 of its square.  Not in half precision, where the squares and c eps
    would become zero, nor where that factor would make up for squares that are too small.

    The corrections are computed in float64, as PyTorch does: 1 - 0.999^t in float32 loses four digits at t = 1.
    """
    beta1, beta2 = o.options["betas"]  # type: ignore[misc]
    decay = float(o.options["weight_decay"])  # type: ignore[arg-type]
    dtype = op.dtype(p)
    if o.options["maximize"]:
        g = op.Neg(g)
    if decay and o.name == "adam":
        g = op.Add(g, op.Mul(p, decay))
    share, factor = op.Mul(g, 1.0 - beta1), (1.0 - beta2) / (1.0 - beta1) ** 2
    wide = dtype.itemsize > 2
    # The order of these counts: nothing of p's size is there while a third is made.
    m = op.Add(op.Mul(slots["exp_avg"], beta1), share)
    if wide and factor <= 1:
        squared = op.Mul(op.Mul(share, share), factor)
    else:
        squared = op.Mul(op.Mul(g, g), 1.0 - beta2)
    v = op.Add(op.Mul(slots["exp_avg_sq"], beta2), squared)
    following = {"exp_avg": m, "exp_avg_sq": v}
    if "max_exp_avg_sq" in slots:
        v = op.Max(slots["max_exp_avg_sq"], v)
        following["max_exp_avg_sq"] = v

    lr64 = op.cast(lr, np.float64)
    t = op.cast(op.Add(step, op.constant(np.asarray(1, np.int64))), np.float64)
    correction1, correction2 = (op.Sub(1.0, op.Pow(op.constant(np.asarray(b, np.float64)), t)) for b in (beta1, beta2))
    c, eps = op.Sqrt(correction2), float(o.options["eps"])  # type: ignore[arg-type]
    if wide:
        denominator = op.Add(op.Sqrt(v), op.cast(op.Mul(c, eps), dtype))
        size = op.cast(op.Div(op.Mul(lr64, c), correction1), dtype)
    else:
        root = op.Mul(op.Sqrt(v), op.cast(op.Div(op.constant(np.asarray(1.0, np.float64)), c), dtype))
        denominator, size = op.Add(root, eps), op.cast(op.Div(lr64, correction1), dtype)
    change = op.Mul(op.Div(m, denominator), size)
    if decay and o.name == "adamw":
        p = op.Mul(p, op.cast(op.Sub(1.0, op.Mul(lr64, decay)), dtype))
    return op.Sub(p, change), following


_SGD: dict[str, Option] = {"weight_decay": 0.0, "maximize": False}
_ADAM: dict[str, Option] = {
    "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False,
}  # fmt: skip

#: Options of each optimizer with their defaults.  ``momentum`` is SGD with momentum, whose default, 0 in torch, is
#: 0.9 here: asking for it by name means wanting some.
DEFAULTS: dict[str, dict[str, Option]] = {
    "sgd": dict(_SGD),
    "momentum": {"momentum": 0.9, "dampening": 0.0, "nesterov": False, **_SGD},
    "adam": dict(_ADAM),
    "adamw": {**_ADAM, "weight_decay": 1e-2},
}


def make(name: str, options: Mapping[str, Any] | None = None) -> Optimizer:
    """An optimizer by name.

    Args:
        name: sgd, momentum, adam or adamw.
        options: torch.optim's options; strings are parsed (``"0.9,0.999"``, ``"true"``).

    Raises:
        OptionError: no such optimizer or option, or a value out of range.
    """
    if name not in DEFAULTS:
        raise OptionError(
            f"no optimizer '{name}'", where="--optimizer", hint=f"Choose one of {', '.join(DEFAULTS)}."
        )
    settled = dict(DEFAULTS[name])
    for key, value in (options or {}).items():
        if key not in settled:
            raise OptionError(
                f"{name} has no option '{key}'", where="--opt", hint=f"Its options: {', '.join(settled)}."
            )
        settled[key] = _parse(key, value, settled[key])
    _check(name, settled)
    if name in ("sgd", "momentum"):
        slots: tuple[str, ...] = ("momentum_buffer",) if name == "momentum" else ()
        return Optimizer(name, settled, slots, bool(settled.get("dampening")), _sgd)
    slots = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if settled["amsgrad"] else ("exp_avg", "exp_avg_sq")
    return Optimizer(name, settled, slots, True, _adam)


def _parse(key: str, value: Any, default: Option) -> Option:
    try:
        if isinstance(default, bool):
            if isinstance(value, str):
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
            return bool(value)
        if isinstance(default, tuple):
            parts = value.split(",") if isinstance(value, str) else list(value)
            if len(parts) != len(default):
                raise ValueError
            return tuple(float(x) for x in parts)
        return float(value)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        wanted = (
            "true or false" if isinstance(default, bool)
            else f"{len(default)} numbers with a comma between" if isinstance(default, tuple) else "a number"
        )  # fmt: skip
        raise OptionError(f"{key}={value!r} is not {wanted}", where="--opt") from error


def _check(name: str, options: Mapping[str, Any]) -> None:
    for key in ("weight_decay", "eps", "momentum"):
        if key in options and not options[key] >= 0:
            raise OptionError(f"{key}={options[key]} is negative", where="--opt")
    if "betas" in options and not all(0 <= b < 1 for b in options["betas"]):
        raise OptionError(f"betas={options['betas']} are not in [0, 1)", where="--opt")
    if options.get("nesterov") and (not options["momentum"] or options["dampening"]):
        raise OptionError("nesterov needs a momentum and no dampening", where="--opt")
