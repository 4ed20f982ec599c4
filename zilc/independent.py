"""Reverse mode by another hand: onnx-ad differentiates the user's model, by rules and a graph walk of its own.

Nothing of zilc takes part in the derivative: the model as it came is opened (its trained leaves become inputs), its
symbolic dimensions are settled, onnx-ad makes the adjoint model, and the losses' derivatives are written out here in
NumPy.  What is shared is the runtime that runs both graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

import numpy as np
import onnx
import onnx.helper
import onnx.shape_inference

from zilc.analysis import Structure
from zilc.errors import RuntimeMissing, ZilcError
from zilc.executors import Executor, executor
from zilc.verification import opened

#: Before the names of seeds and adjoints.
PREFIX = "independent."

Arrays = dict[str, np.ndarray]


class NotCovered(ZilcError):
    """The independent reverse mode does not take this model; ``what`` is its own reason."""


def library() -> str:
    """Name and version of the independent reverse mode.

    Raises:
        RuntimeMissing: it is not installed.
    """
    try:
        return f"onnx-ad {metadata.version('onnx-ad')}"
    except metadata.PackageNotFoundError as error:
        raise RuntimeMissing(
            "onnx-ad, the independent reverse mode, is not installed",
            where="--certificate",
            hint="pip install 'zilc[certificate]'",
        ) from error


class Independent:
    """The adjoint of a model with respect to some of its leaves.

    Args:
        found: the structure of the model, in the precision asked for.
        parameters: values of the trained parameters, by name.
        inputs: model inputs whose gradients are wanted, too.
        feeds: the model's inputs; their shapes settle symbolic dimensions.

    Raises:
        RuntimeMissing: onnx-ad is not installed.
        NotCovered: it has no rule for an operator of the model, or refuses it otherwise.
    """

    def __init__(
        self, found: Structure, parameters: Mapping[str, np.ndarray], inputs: list[str], feeds: Mapping[str, np.ndarray]
    ) -> None:
        self.name = library()
        import onnx_ad

        self.outputs = list(found.outputs)
        self.ties = {b: tie for b, tie in found.prepared.ties.items() if tie[0] in parameters}
        self.parameters = dict(parameters)
        for follower, (leaf, transposed) in self.ties.items():
            self.parameters[follower] = parameters[leaf].T if transposed else parameters[leaf]
        self.leaves = [*self.parameters, *inputs]
        dtype = next((v.dtype for v in self.parameters.values()), np.dtype(np.float32))
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        model = opened(found.prepared.source.proto, self.parameters, self.outputs, kind)
        _settle(model, feeds)
        try:
            self.forward: Executor = executor(model)
            adjoint = onnx_ad.reverse(
                onnx.shape_inference.infer_shapes(model), inputs=self.leaves, outputs=self.outputs,
                prefix=PREFIX, layout="onnx",
            )  # fmt: skip
            self.executor: Executor = executor(adjoint)
        except Exception as error:  # whatever it raises is its reason not to take the model
            raise NotCovered(" ".join(f"{type(error).__name__}: {error}".split())) from error

    def gradients(
        self, feeds: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray | None], losses: Mapping[str, str],
        class_axis: int,
    ) -> Arrays:  # fmt: skip
        """dL/dz of every leaf, in the precision of the parameters.

        Args:
            targets: by output name; None for an output that is a loss itself.

        Raises:
            NotCovered: the adjoint model does not run.
        """
        given = {**feeds, **self.parameters}
        try:
            mu = self.forward(given, self.outputs)
            seeds = {}
            for name in self.outputs:
                g = loss_gradient(losses[name], mu[name], targets[name], class_axis)
                seeds[PREFIX + name] = g[..., None]  # onnx-ad's seeds have one more axis: how many there are
            made = self.executor({**given, **seeds}, [PREFIX + n for n in self.leaves])
        except ZilcError:
            raise
        except Exception as error:
            raise NotCovered(" ".join(f"{type(error).__name__}: {error}".split())) from error
        found = {name: made[PREFIX + name][..., 0] for name in self.leaves}
        for follower, (leaf, transposed) in self.ties.items():
            g = found.pop(follower)
            found[leaf] = found[leaf] + (g.T if transposed else g)
        return found


def _settle(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> None:
    """Write the shapes of ``feeds`` into the model's inputs; what its outputs say of theirs is inferred anew."""
    for info in model.graph.input:
        if info.name in feeds:
            shape = info.type.tensor_type.shape
            del shape.dim[:]
            for n in np.shape(feeds[info.name]):
                shape.dim.add().dim_value = n
    del model.graph.value_info[:]
    for info in model.graph.output:
        info.type.tensor_type.ClearField("shape")


def loss_gradient(kind: str, mu: np.ndarray, y: np.ndarray | None, axis: int) -> np.ndarray:
    """dL/dmu of each loss by its definition, in mu's precision.

    Args:
        kind: ``energy``, ``mse``, ``cross-entropy``, ``bce-with-logits`` or ``none``.
        mu: the output.
        y: the target: of mu's shape, or labels without the class axis; absent for ``none``.
        axis: of the classes.
    """
    if kind == "none":
        return np.ones_like(mu)
    assert y is not None
    if kind == "cross-entropy":
        odds = np.exp(mu - mu.max(axis=axis, keepdims=True))
        odds /= odds.sum(axis=axis, keepdims=True)
        labels = np.expand_dims(y.astype(np.int64), axis)
        right = np.take_along_axis(odds, labels, axis) - mu.dtype.type(1)
        np.put_along_axis(odds, labels, right, axis)
        return odds / mu.dtype.type(y.size)
    y = y.astype(mu.dtype)
    if kind == "energy":
        return mu - y
    if kind == "mse":
        return (mu - y) * mu.dtype.type(2 / mu.size)
    if kind == "bce-with-logits":
        return (0.5 * (np.tanh(0.5 * mu) + 1) - y).astype(mu.dtype) / mu.dtype.type(mu.size)
    raise ZilcError(f"no loss '{kind}'")
