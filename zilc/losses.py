"""What clamps an output: each loss as nodes, with its derivative at the prediction (ZIL.md, section 6).

``energy`` is the paper's: 1/2 sum (mu - y)^2.  For any other loss L the error of the clamped output is dL/dmu, the
mean's factor included.  It is emitted as a direction and a factor, dL/dmu = factor * direction, so that a learning
rate can join the factor: a product of two numbers instead of one more pass over a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Dim, Emitter
from zilc.errors import OptionError


@dataclass(frozen=True)
class Factor:
    """``number / count``, the count a tensor of shape []."""

    number: float
    count: gs.Tensor

    def times(self, op: Emitter, rate: gs.Tensor | None = None) -> gs.Tensor:
        """``number rate / count`` in the fewest nodes; on a small network each of them tells."""
        if rate is None:
            return op.Div(op.scalar_like(self.number, self.count), self.count)
        return op.Div(rate if self.number == 1 else op.Mul(rate, op.scalar_like(self.number, rate)), self.count)


#: The loss of shape [], a direction of mu's shape, and its factor; None stands for 1.
Emitted = tuple[gs.Tensor, gs.Tensor, Factor | None]
#: Up to so many classes, a matrix of zeros and ones for the labels is cheaper than adding at their places.
FEW_CLASSES = 1024


@dataclass(frozen=True)
class Target:
    """The input that a loss compares with: its dtype and shape."""

    dtype: np.dtype
    shape: list[Dim] | None


@dataclass(frozen=True)
class Loss:
    """A loss.

    Attributes:
        emit: (op, mu, target, class axis) -> (loss of shape [], direction of mu's shape, its factor or None).
        labels: its target holds class indices.
        targeted: it has a target at all.
        bounded: dL/dmu is finite whatever the target is, which is NaN where the model masks a label that is missing.
    """

    name: str
    emit: Callable[[Emitter, gs.Tensor, gs.Tensor | None, int], Emitted]
    labels: bool = False
    targeted: bool = True
    bounded: bool = False

    def evaluate(
        self, op: Emitter, mu: gs.Tensor, y: gs.Tensor | None, class_axis: int
    ) -> tuple[gs.Tensor, gs.Tensor]:
        """The loss, a scalar, and dL/dmu, of mu's shape, at ``mu``."""
        value, direction, factor = self.emit(op, mu, y, class_axis)
        return value, direction if factor is None else op.Mul(direction, factor.times(op))

    def target(self, op: Emitter, mu: gs.Tensor, class_axis: int) -> Target | None:
        """dtype and shape of the target of an output ``mu``; None if the loss has no target.

        Raises:
            OptionError: the class axis is not one of mu's.
        """
        if not self.targeted:
            return None
        dims = op.dims(mu)
        if not self.labels:
            return Target(op.dtype(mu), dims)
        if dims is not None:
            axis = checked_axis(mu.name, len(dims), class_axis)
            dims = dims[:axis] + dims[axis + 1 :]
        return Target(np.dtype(np.int64), dims)


def checked_axis(name: str, rank: int, axis: int) -> int:
    """The axis counted from the front.  Raises OptionError if there is no such axis."""
    if not -rank <= axis < rank:
        raise OptionError(
            f"output '{name}' has {rank} dimensions, no axis {axis}",
            where="--class-axis",
            hint=f"Choose one from {-rank} to {rank - 1}." if rank else "A scalar output has no class axis.",
        )
    return axis % rank


def _energy(op: Emitter, mu: gs.Tensor, y: gs.Tensor | None, axis: int) -> Emitted:
    """L = 1/2 sum (mu - y)^2;  dL/dmu = mu - y."""
    eps = op.Sub(mu, y)
    return op.Mul(op.ReduceSumSquare(eps, keepdims=0), 0.5), eps, None


def _mse(op: Emitter, mu: gs.Tensor, y: gs.Tensor | None, axis: int) -> Emitted:
    """L = mean (mu - y)^2;  dL/dmu = 2 (mu - y) / n."""
    difference = op.Sub(mu, y)
    n = op.count(mu, op.dtype(mu))
    loss = op.Div(op.ReduceSumSquare(difference, keepdims=0), n)
    return loss, difference, Factor(2, n)


def _cross_entropy(op: Emitter, mu: gs.Tensor, y: gs.Tensor | None, axis: int) -> Emitted:
    """L = -mean log softmax(mu)[y];  dL/dmu = (softmax(mu) - onehot(y)) / n, n the number of targets."""
    assert y is not None
    rank = op.rank(mu)
    if rank is None:
        raise OptionError(
            f"output '{mu.name}' has an unknown number of dimensions, cross-entropy needs it known", where="--loss"
        )
    axis = checked_axis(mu.name, rank, axis)
    log_p = op.LogSoftmax(mu, axis=axis)
    index = op.Unsqueeze(y, [axis])
    n = op.count(y, op.dtype(mu))
    loss = op.Neg(op.ReduceMean(op.GatherElements(log_p, index, axis=axis), keepdims=0))
    p, classes = op.Exp(log_p), op.dims(mu)[axis]  # type: ignore[index]
    if rank == 2 and isinstance(classes, int) and classes <= FEW_CLASSES and op.dtype(mu) == np.float32:
        zero_one = op.constant(np.asarray([0, 1], np.float32))
        difference = op.Sub(p, op.OneHot(y, op.constant(np.asarray(classes, np.int64)), zero_one, axis=axis))
    else:
        minus_one = op.Expand(op.scalar_like(-1, mu), op.shape_of(index))
        difference = op.add_at(p, index, minus_one, axis=axis)
    return loss, difference, Factor(1, n)


def _bce_with_logits(op: Emitter, mu: gs.Tensor, y: gs.Tensor | None, axis: int) -> Emitted:
    """L = mean (softplus(mu) - y mu), softplus as max(mu, 0) + log(1 + e^-|mu|);  dL/dmu = (sigmoid(mu) - y) / n."""
    n = op.count(mu, op.dtype(mu))
    softplus = op.Add(op.Relu(mu), op.Log(op.Add(op.Exp(op.Neg(op.Abs(mu))), 1.0)))
    loss = op.Div(op.ReduceSum(op.Sub(softplus, op.Mul(y, mu)), keepdims=0), n)
    return loss, op.Sub(op.Sigmoid(mu), y), Factor(1, n)


def _none(op: Emitter, mu: gs.Tensor, y: gs.Tensor | None, axis: int) -> Emitted:
    """The output is the loss;  dL/dmu = 1.

    Raises:
        OptionError: the output is known to hold another number of elements than one.
    """
    dims = op.dims(mu)
    if dims is not None and any(isinstance(n, int) and n != 1 for n in dims):
        raise OptionError(
            f"output '{mu.name}' has shape {dims}, expected a scalar loss",
            where="--loss none",
            hint="Choose another loss, or an output of one element.",
        )
    loss = mu if dims == [] else op.Reshape(mu, op.constant(np.zeros(0, np.int64)))
    return loss, op.Expand(op.scalar_like(1, mu), op.shape_of(mu)), None


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("energy", _energy),
        Loss("mse", _mse),
        Loss("cross-entropy", _cross_entropy, labels=True, bounded=True),
        Loss("bce-with-logits", _bce_with_logits),
        Loss("none", _none, targeted=False, bounded=True),
    )
}
