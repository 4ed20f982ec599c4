"""Command-line options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

#: Spelt out here, so that help needs none of the modules that define them.
LOSSES = ("energy", "mse", "cross-entropy", "bce-with-logits", "none")
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
PLACEMENTS = ("edge", "shared", "min", "min-bytes")
#: The options that say how the dynamics run, as keyword arguments of the library.
DYNAMICS = (
    "algorithm", "identities", "schedule", "steps", "gamma", "update_at", "init_noise", "fixed_predictions", "mode",
    "straight_through",
)  # fmt: skip


class Pair(click.ParamType):
    """``KEY=VALUE``; gives the pair."""

    name = "pair"

    def __init__(self, left: str, right: str, kind: Callable[[str], Any] = str) -> None:
        self.metavar, self.kind = f"{left}={right}", kind

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return self.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value  # click converts defaults a second time
        key, equals, text = value.rpartition("=") if self.kind is int else value.partition("=")
        if not key or not equals or not text:
            self.fail(f"'{value}' is not of the form {self.metavar}.", param, ctx)
        try:
            return key, self.kind(text)
        except ValueError:
            self.fail(f"'{value}': '{text}' is not a whole number.", param, ctx)


class LossType(click.ParamType):
    """``LOSS`` or ``NAME=LOSS``, kept as written."""

    name = "loss"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[NAME=]{'|'.join(LOSSES)}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind = value.rpartition("=")[2]
        if kind not in LOSSES:
            self.fail(f"no loss '{kind}'; choose one of {', '.join(LOSSES)}.", param, ctx)
        return value


def _apply(options: Sequence[Callable[[F], F]]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


#: Which outputs and leaves: gives ``output``, ``wrt``, ``freeze``, ``tie``, ``dims`` and ``opset``.
selection = _apply(
    [
        click.option("--output", multiple=True, metavar="NAME",
                     help="A trained output, or an interior tensor; may be repeated. Default: the only floating one."),
        click.option("--wrt", multiple=True, metavar="GLOB",
                     help="Train these parameters instead of the default set; an input needs its exact name."),
        click.option("--freeze", multiple=True, metavar="GLOB", help="Leave these parameters out."),
        click.option("--tie", multiple=True, type=Pair("A", "B"),
                     help="Make initializer B one leaf with A (equal, or its transpose)."),
        click.option("--dim", "dims", multiple=True, type=Pair("NAME", "N", int), help="Fix a symbolic dimension."),
        click.option("--opset", type=int, metavar="N",
                     help="Opset of the result. Default: the model's, within 18 to 26."),
    ]
)  # fmt: skip

_mode = click.option("--mode", type=click.Choice(["eval", "train"]), default="eval", show_default=True,
                     help="BatchNormalization and Dropout as the file has them, or turned to training: batch "
                          "statistics and masks.")  # fmt: skip

#: What the update is: gives ``loss``, ``class_axis``, ``optimizer``, ``opt``, ``outputs``, ``algorithm``, ``mode``,
#: ``identities``, and how the dynamics run: ``schedule``, ``steps``, ``gamma``, ``update_at``, ``init_noise`` and
#: ``fixed_predictions``.
training = _apply(
    [
        click.option("--loss", multiple=True, type=LossType(),
                     help="What clamps an output. Default: energy, half the sum of squares."),
        click.option("--class-axis", type=int, default=-1, show_default=True, metavar="A",
                     help="Axis of the classes, for cross-entropy."),
        click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="sgd", show_default=True,
                     help="The update, with torch.optim's options and defaults."),
        click.option("--opt", multiple=True, type=Pair("KEY", "VALUE"),
                     help="An option of the optimizer, such as weight_decay=0.01 or betas=0.9,0.99."),
        click.option("--outputs", type=click.Choice(["next", "grad", "both"]), default="next", show_default=True,
                     help="Updated parameters, gradients, or both."),
        click.option("--algorithm", type=click.Choice(["zil", "il", "bp"]), default="zil", show_default=True,
                     help="Z-IL, inference learning, or plain reverse mode."),
        click.option("--identities", type=click.Choice([*PLACEMENTS, "none"]),
                     help="One chain of identity vertices an edge, one a tensor, or the fewest vertices or bytes; "
                          "none wants --schedule literal.  [default: shared for zil]"),
        click.option("--schedule", type=click.Choice(["wavefront", "literal"]),
                     help="What is left of the dynamics at each step, or all of them in a Loop.  "
                          "[default: wavefront for zil, literal for il]"),
        click.option("--steps", type=int, metavar="T",
                     help="Inference steps of the literal schedule.  [default: K for zil, 20 for il]"),
        click.option("--gamma", type=float, metavar="G",
                     help="Integration step of the literal schedule.  [default: 1 for zil, 0.1 for il]"),
        click.option("--update-at", type=click.Choice(["level", "end"]), default="level", show_default=True,
                     help="Update each parameter at the step of its level, or all at the last (literal schedule)."),
        click.option("--init-noise", type=float, default=0.0, show_default=True, metavar="S",
                     help="Standard deviation of noise on the initial value nodes (literal schedule)."),
        _mode,
        click.option("--fixed-predictions", is_flag=True,
                     help="Keep predictions and derivatives at their forward values (literal schedule)."),
        click.option("--straight-through", is_flag=True,
                     help="Pass gradients through QuantizeLinear where it did not saturate, and DequantizeLinear."),
    ]
)  # fmt: skip

#: What an update costs, in time and memory: gives ``precision``, ``tune`` and ``memory_budget``.
costs = _apply(
    [
        click.option("--precision", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32",
                     show_default=True,
                     help="Compute costly operators of a float32 model in a narrower type; weights, gradients and the "
                          "optimizer stay float32. float16 scales the loss."),
        click.option("--tune", is_flag=True,
                     help="Measure on this machine how gradients are best computed, and remember it for the next "
                          "time."),
        click.option("--memory-budget", metavar="SIZE",
                     help="Drop predictions and compute them again, bit for bit, so that the activations alive at "
                          "once fit in SIZE: 512MiB, 1.5GB, or bytes. Every dimension needs a size (--dim)."),
    ]
)  # fmt: skip

#: How the dynamics are traced: those of ``training`` that apply, under the same names; ``schedule`` is literal.
tracing = _apply(
    [
        click.option("--algorithm", type=click.Choice(["zil", "il"]), default="zil", show_default=True,
                     help="Z-IL, or inference learning."),
        click.option("--loss", multiple=True, type=LossType(),
                     help="What clamps an output. Default: energy, half the sum of squares."),
        click.option("--class-axis", type=int, default=-1, show_default=True, metavar="A",
                     help="Axis of the classes, for cross-entropy."),
        click.option("--identities", type=click.Choice([*PLACEMENTS, "none"]),
                     help="Placement of identity vertices.  [default: shared for zil]"),
        click.option("--steps", type=int, metavar="T", help="Inference steps.  [default: K for zil, 20 for il]"),
        click.option("--gamma", type=float, metavar="G", help="Integration step.  [default: 1 for zil, 0.1 for il]"),
        click.option("--update-at", type=click.Choice(["level", "end"]), default="level", show_default=True,
                     help="Update each parameter at the step of its level, or all at the last."),
        click.option("--init-noise", type=float, default=0.0, show_default=True, metavar="S",
                     help="Standard deviation of noise on the initial value nodes."),
        _mode,
        click.option("--fixed-predictions", is_flag=True,
                     help="Keep predictions and derivatives at their forward values."),
    ]
)  # fmt: skip

full = click.option("--full", multiple=True, metavar="VERTEX",
                    help="Trace this vertex with whole tensors, not norms alone; may be repeated.")  # fmt: skip

#: Pictures: gives ``html``, ``svg`` and ``png``.
pictures = _apply(
    [
        click.option("--html", type=click.Path(), metavar="FILE",
                     help="Write one self-contained page to look at in a browser."),
        click.option("--svg", type=click.Path(), metavar="FILE", help="Write a vector figure, for a paper."),
        click.option("--png", type=click.Path(), metavar="FILE", help="Write a bitmap figure, for a slide."),
    ]
)  # fmt: skip


def _load_rules(ctx: click.Context, _param: click.Parameter, paths: Sequence[str]) -> None:
    if paths and not ctx.resilient_parsing:
        from zilc import rules

        ctx.with_resource(rules.scoped())
        for path in paths:
            rules.load(path)


rules = click.option("--rules", multiple=True, type=click.Path(), metavar="FILE.py", expose_value=False,
                     callback=_load_rules,
                     help="Run this Python file first: it registers rules (zilc.rules); may be repeated.")  # fmt: skip

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else.")

model = click.argument("model", metavar="MODEL.onnx", type=click.Path())


def selection_of(given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the library from the values of :data:`selection`; they are taken out of ``given``."""
    names = {key: list(given.pop(key)) or None for key in ("output", "wrt", "freeze")}
    return {**names, "tie": list(given.pop("tie")), "dims": dict(given.pop("dims")), "opset": given.pop("opset")}


def tracing_of(given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the library from the values of :data:`tracing`; they are taken out of ``given``."""
    # The schedule is the literal one, which has no straight-through gradients.
    plain = {key: given.pop(key) for key in ("class_axis", *DYNAMICS) if key not in ("schedule", "straight_through")}
    return {**plain, "loss": list(given.pop("loss")) or "energy"}


def training_of(given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the library from the values of :data:`training`; they are taken out of ``given``."""
    plain = {key: given.pop(key) for key in ("class_axis", "optimizer", "outputs", *DYNAMICS)}
    return {**plain, "loss": list(given.pop("loss")) or "energy", "options": dict(given.pop("opt"))}


def costs_of(given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the library from the values of :data:`costs`; they are taken out of ``given``."""
    return {key: given.pop(key) for key in ("precision", "tune", "memory_budget")}
