"""What every network has: a module whose forward takes the inputs in order and returns one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

BATCH, LENGTH, WORDS, LABELS = 2, 7, 53, 5
Inputs = Callable[[np.random.Generator], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Network:
    """A network of the list.

    Attributes:
        kind: what it stands for, as the page groups it.
        make: the module.
        inputs: arrays by input name, for a seed; axis 0 is the batch.
        loss: what it is trained with; classes lie on the last axis.
        sequence: inputs whose axis 1 is a length that may be symbolic.
        options: for torch.onnx.export.
        emit: for zilc.emit_training.
    """

    kind: str
    make: Callable[[], torch.nn.Module]
    inputs: Inputs
    loss: str = "energy"
    sequence: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    emit: Mapping[str, Any] = field(default_factory=dict)


class Picked(torch.nn.Module):
    """A transformers model with named inputs, reduced to one of its outputs."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...], output: str, **fixed: Any) -> None:
        super().__init__()
        self.model, self.names, self.output, self.fixed = model, names, output, fixed

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        made = self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed, return_dict=True)
        return getattr(made, self.output)


def hugging(
    kind: str, config: str, model: str, inputs: Inputs, output: str = "logits", *, loss: str = "energy",
    fixed: Mapping[str, Any] | None = None, sequence: tuple[str, ...] = (), emit: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Network:  # fmt: skip
    """A network of the transformers library by the names of its classes."""

    def make() -> torch.nn.Module:
        made = getattr(transformers, model)(getattr(transformers, config)(**settings))
        names = tuple(inputs(np.random.default_rng(0)))
        return Picked(made, names, output, **(fixed or {}))

    return Network(kind, make, inputs, loss, sequence, {}, emit or {})


def words(rng: np.random.Generator, length: int = LENGTH) -> dict[str, np.ndarray]:
    mask = np.ones((BATCH, length), np.int64)
    return {"input_ids": rng.integers(3, WORDS, mask.shape), "attention_mask": mask}


def padded(rng: np.random.Generator) -> dict[str, np.ndarray]:
    made = words(rng)
    made["attention_mask"][0, -2:] = 0
    return made


def translated(rng: np.random.Generator) -> dict[str, np.ndarray]:
    made = padded(rng)
    return {**made, "decoder_input_ids": rng.integers(3, WORDS, (BATCH, LENGTH - 2))}


def pixels(size: int = 32, channels: int = 3, name: str = "pixel_values", batch: int = BATCH) -> Inputs:
    return lambda rng: {name: rng.standard_normal((batch, channels, size, size)).astype(np.float32)}


def floats(**shapes: tuple[int, ...]) -> Inputs:
    return lambda rng: {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
