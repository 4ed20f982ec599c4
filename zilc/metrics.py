"""Figures of an epoch: the mean loss, and the accuracy of outputs that classify."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Meter:
    """Means over the examples of an epoch.

    Energies are sums over a batch, so their mean is the energy per example.  The other losses are means, and each
    batch weighs as many as its examples; so does a sum of both kinds.
    """

    def __init__(self, signature: Mapping[str, Any]) -> None:
        self._sums = all(target["loss"] == "energy" for target in signature["targets"])
        self._examples = 0
        self._loss = 0.0
        self._right: dict[str, list[int]] = {}

    def add(self, examples: int, loss: float, hits: Mapping[str, tuple[int, int]]) -> None:
        """One batch: its loss, and (right, all) of each classifying output."""
        self._examples += examples
        self._loss += loss if self._sums else loss * examples
        for name, (right, total) in hits.items():
            entry = self._right.setdefault(name, [0, 0])
            entry[0] += right
            entry[1] += total

    def result(self) -> dict[str, float]:
        """``loss``; ``accuracy``, or ``accuracy.OUTPUT`` where several outputs have one."""
        figures = {"loss": self._loss / max(self._examples, 1)}
        for name, (right, total) in self._right.items():
            figures["accuracy" if len(self._right) == 1 else f"accuracy.{name}"] = right / max(total, 1)
        return figures


def accuracies(
    signature: Mapping[str, Any],
    predictions: Mapping[str, np.ndarray],
    feeds: Mapping[str, np.ndarray],
    class_axis: int | None = None,
) -> dict[str, tuple[int, int]]:
    """(right, all) by output, for cross-entropy and bce-with-logits, where the graph gives the output.

    Args:
        class_axis: of cross-entropy; by default the axis whose absence makes the output's shape the target's, the
            last one of several.
    """
    found = {}
    for target in signature["targets"]:
        output, loss = target["output"], target["loss"]
        if loss not in ("cross-entropy", "bce-with-logits") or output not in predictions:
            continue
        mu, y = predictions[output], np.asarray(feeds[target["name"]])
        if loss == "cross-entropy":
            axis = class_axis if class_axis is not None else _class_axis(mu.shape, y.shape)
            right = mu.argmax(axis) == y
        else:
            # The sigmoid of a positive logit is above one half.
            right = (mu > 0) == (y > 0.5)
        found[output] = (int(np.count_nonzero(right)), int(right.size))
    return found


def _class_axis(shape: tuple[int, ...], labels: tuple[int, ...]) -> int:
    fitting = [k for k in range(len(shape)) if shape[:k] + shape[k + 1 :] == labels]
    return fitting[-1] if fitting else -1
