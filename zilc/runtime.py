"""Runs a training graph in onnxruntime; its state stays on the device.

On the CPU a step writes parameters, slots and step over themselves (:mod:`zilc.in_place`).  What cannot be written
over, and all state elsewhere, lives in two sets of buffers: a step reads one set and writes the other, then they change
places.  Nothing is copied, and no weight crosses to the host unless asked for.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from zilc import checkpoint, dtypes, onnx_io
from zilc import signature as signatures
from zilc.bindings import Bindings, Placed, RecordingFailed
from zilc.data import (
    PREFETCHED,
    DataSource,
    Examples,
    Spec,
    check_names,
    check_shape,
    convert,
    examples,
    fed,
    prefetched,
    shown,
    specs,
)
from zilc.errors import DataError, OptionError
from zilc.huge_pages import Gatherer
from zilc.metrics import Meter, accuracies
from zilc.onnx_io import ModelSource, Source
from zilc.pipeline import TrainingStep
from zilc.providers import CUDA, Providers, choose_providers, provider_names
from zilc.session import (
    Buffer,
    Outputs,
    forward_part,
    holds_batched_kernel,
    inference_form,
    make_session,
    make_training_session,
    run_error,
)
from zilc.trained import Ties, export_trained, without_values

__all__ = ["Evaluation", "Progress", "Trainer", "choose_providers"]


Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """Loss and predictions without an update; predictions by output name."""

    loss: float
    predictions: dict[str, np.ndarray]


@dataclass(frozen=True)
class Progress:
    """Where :meth:`Trainer.fit` stands after a batch; counts start at 1."""

    epoch: int
    epochs: int
    batch: int
    batches: int
    examples: int
    loss: float


class Trainer:
    """Trains by running a training graph, one update a step.

    Args:
        step: what :func:`zilc.emit_training` returned, or the path of a training graph; its state is then read
            from ``STEP.safetensors`` beside it.
        lr: learning rate; ``trainer.lr = x`` changes it between steps.
        providers: onnxruntime's execution providers; by default CUDA where it runs, else the CPU.
        state: initial state instead: a mapping, or the path of a safetensors file.
        seed: fed to graphs that take a seed: the same in every step where they count steps, else plus the number of
            updates done.  Who resumes gives the same seed again: it is no part of the state.
        cuda_graph: on CUDA, record the first update for each shape of the inputs and replay it from then on, where
            onnxruntime can (see :mod:`zilc.bindings`).

    Attributes:
        signature: the training graph's interface.
        inputs: what the model's inputs and the targets expect, by name.
        providers: the execution providers in use.
        digest: of the training graph, for :func:`zilc.checkpoint.save_state`.
        last: predictions of the last step (and gradients, where the graph gives them), read when looked up.

    Raises:
        OptionError: the training graph has no updates, or lr is no number.
        ZilcError: see :mod:`zilc.errors`.
    """

    def __init__(
        self,
        step: TrainingStep | str | os.PathLike[str],
        *,
        lr: float,
        providers: Sequence[Any] | None = None,
        state: Mapping[str, np.ndarray] | str | os.PathLike[str] | None = None,
        seed: int = 0,
        cuda_graph: bool = True,
    ) -> None:
        self._open(step, state)
        self._pairs = signatures.carried_pairs(self.signature)
        if not any(p["next"] for p in self.signature["parameters"]):
            raise OptionError(
                "the training graph gives no updates ('.next'), only gradients",
                where="--outputs",
                hint="Emit it with --outputs next or both, and with a trained parameter.",
            )
        self.inputs = fed(self._model.graph, self.signature)
        self._carried = self._specs([name for name, _ in self._pairs])
        self._endless = holds_batched_kernel(self._model)
        self._requested: Providers = list(choose_providers("auto")[0] if providers is None else providers)
        self._torn = ""
        self._reopen(cuda_graph=cuda_graph)
        self.providers: list[str] = self._session.get_providers()
        self._device = ("cpu", 0)
        if CUDA in self.providers:
            self._device = ("cuda", int(self._session.get_provider_options()[CUDA].get("device_id", 0)))
        self._evaluator: Any = None
        self._seed, self.updates, self._token = seed, 0, object()
        self._make_buffers()
        self._bind()
        self.lr = lr
        initial, where = self._initial
        self._load(initial, where)
        del self._initial

    # -- construction --

    def _open(self, step: Any, state: Any) -> None:
        """The model, its signature and digest, and the state to begin with."""
        self._path: Path | None = None
        self._original: Source | None = None
        self._ties: Ties = {}
        where = "state"
        if isinstance(step, TrainingStep):
            # The step is not kept: with it would be a second copy of all weights.
            self._ties = step.ties
            self._original = without_values(step.source, self._exported(step.signature), step.ties)
            self._model, self.signature, self._folder = step.model, step.signature, step.source.base_dir
            self.digest = checkpoint.graph_digest(onnx_io.serialize(step.model))
            state = step.state if state is None else state
        else:
            self._path = Path(step)
            source = onnx_io.load(step)
            self._model, self._folder = source.proto, source.base_dir
            self.signature = signatures.read(source.proto, str(step))
            self.digest = checkpoint.graph_digest(onnx_io.read_bytes(step))
            state = checkpoint.state_path(step) if state is None else state
        if not isinstance(state, Mapping):
            where = str(state)
            # A state written beside a file is bound to that file's bytes, which an emission in memory need not have.
            state = checkpoint.load_state(state, self.digest if self._path else None)
        self._initial = (state, where)

    def _specs(self, names: Sequence[str]) -> dict[str, Spec]:
        return specs(self._model.graph, names)

    @property
    def _name(self) -> str | None:
        return str(self._path) if self._path else self._original.name if self._original else None

    @staticmethod
    def _exported(signature: dict[str, Any]) -> list[str]:
        """State that goes back into the original model."""
        return [e["name"] for e in (*signature["parameters"], *signatures.of_the_model(signature))]

    def _reopen(self, *, cuda_graph: bool) -> None:
        self._memory = Gatherer(on=CUDA not in provider_names(self._requested))
        with self._memory:
            self._opened = make_training_session(
                self._model, self._requested, self._pairs, folder=self._folder, where=self._name, cuda_graph=cuda_graph
            )
        self._session = self._opened.session

    def _open_session(self, model: onnx.ModelProto) -> Any:
        return make_session(model, self._requested, folder=self._folder, where=self._name)

    def _make_buffers(self) -> None:
        fixed = {n: ([d for d in s.dims or () if isinstance(d, int)], s.dtype) for n, s in self._carried.items()}
        first = {name: Buffer(shape, dtype, self._device) for name, (shape, dtype) in fixed.items()}
        second = {
            name: first[name] if name in self._opened.over else Buffer(shape, dtype, self._device)
            for name, (shape, dtype) in fixed.items()
        }
        self._sides: list[dict[str, Buffer]] = [first, second]
        self._side = 0
        made = {t.name: t for t in self._model.graph.output}
        loss = dtypes.np_dtype(made[self.signature["loss"]].type.tensor_type.elem_type)
        self._loss = Buffer((), np.dtype(loss), self._device)
        self._scalars = {
            name: Buffer((), self._specs([name])[name].dtype, self._device)
            for name in (self.signature["lr"], self.signature["seed"])
            if name
        }
        carried = {following for _, following in self._pairs}
        # "both" gives gradients too; predictions first.
        self._others = [n for n in made if n != self.signature["loss"] and n not in carried]
        self.last = Outputs(self._others)

    def _bind(self) -> None:
        loss = (self.signature["loss"], self._loss)
        self._bindings = Bindings(
            self._opened, self._sides, self._scalars, self._pairs, loss, self._others, self._device
        )

    # -- state --

    @property
    def lr(self) -> float:
        """The learning rate of the next steps."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        if isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise OptionError(f"learning rate {value!r}, expected a finite number of 0 or more", where="--lr")
        self._lr = float(value)
        buffer = self._scalars[self.signature["lr"]]
        buffer.write(np.asarray(value, self._specs([self.signature["lr"]])[self.signature["lr"]].dtype))

    @property
    def state(self) -> dict[str, np.ndarray]:
        """Copies of parameters, slots, step and the rest that is fed back, by name.

        Raises:
            DataError: an update failed while it was written.
        """
        self._ensure_whole()
        return {name: buffer.read() for name, buffer in self._sides[self._side].items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a state, bit for bit.

        Raises:
            DataError: names, dtypes or shapes differ from those of ``state``; nothing is changed.
        """
        self._load(state, "state")

    def _load(self, state: Mapping[str, np.ndarray], where: str) -> None:
        check_names(self._carried, state, where=where, extra=False)
        # Looked at first and written then, one by one: a state may be read from a file, and all of it is much.
        for name, spec in self._carried.items():
            array = np.asarray(state[name])
            if array.dtype != spec.dtype or array.shape != spec.dims:
                found = f"{array.dtype.name} {shown(array.shape)}"
                expected = f"{spec.dtype.name} {shown(spec.dims or ())}"
                raise DataError(f"'{name}' is {found}, expected {expected}", where=where)
        self._torn = "the new state could not be read"
        for name in self._carried:
            self._sides[self._side][name].write(np.asarray(state[name]))
        self._torn = ""
        step = self.signature["step"]
        self.updates = int(self._sides[self._side][step["name"]].read()) if step else 0

    # -- running --

    def step(self, feeds: Mapping[str, Any] | Placed) -> float:
        """One update; returns the loss before it.

        Args:
            feeds: arrays for the model's inputs and the targets, by name; dtypes are converted where nothing is lost.
                Or a batch on the device, from :meth:`place`.

        Raises:
            DataError: names, dtypes or shapes do not fit, or the graph cannot compute with the values.  The state is
                then that of before; only if onnxruntime fails in the middle of the update itself (out of memory) is
                it lost, and every call says so until :meth:`load_state`.
        """
        self._ensure_whole()
        batch = self._feed(feeds)
        if self.signature["seed"]:
            seed = self.signature["seed"]
            value = self._seed if self.signature["step"] else self._seed + self.updates
            self._scalars[seed].write(np.asarray(value, self._specs([seed])[seed].dtype))
        on_cpu = self._loss.array is not None
        if on_cpu:
            self._loss.array[...] = math.nan  # type: ignore[index]
        try:
            try:
                with self._memory:
                    binding = self._bindings.run(self._session, self._side)
            except RecordingFailed:
                binding = None
            if binding is None:  # out of the handler, which holds on to the session that failed and its memory
                binding = self._run_unrecorded(*batch)
        except Exception as error:
            failure = run_error(error)
            if not self._opened.unharmed(error):
                self._torn = str(failure)
            raise failure from error
        except BaseException:  # Ctrl-C is noticed before the run or after it, never within
            if on_cpu and not np.isnan(self._loss.view()):
                self._count(self._bindings.last)
            elif self._opened.over and self.signature["step"]:
                # On a device all state is written over itself, or none is; how far it is, it says itself.
                self.updates = int(self._sides[self._side][self.signature["step"]["name"]].read())
            raise
        self._count(binding)
        return float(self._loss.view())

    def _run_unrecorded(self, arrays: Mapping[str, np.ndarray], placed: Placed | None) -> Any:
        """Run a session that records nothing in place of one that could not, from now on.

        If that fails as well, it was not for the recording, and what comes next is recorded again.
        """
        try:
            self._reopen(cuda_graph=False)
            self._bind()
            self._bindings.turn(arrays)
            self._bindings.feed(self._side, arrays, placed)
            return self._bindings.run(self._session, self._side)
        except Exception:
            self._reopen(cuda_graph=True)
            self._bind()
            raise

    def _count(self, binding: Any) -> None:
        """An update was made."""
        self._side = 1 - self._side
        self.updates += 1
        self.last.binding = binding

    def _ensure_whole(self) -> None:
        if self._torn:
            raise DataError(
                f"it was being written when that failed, and is neither old nor new: {self._torn}",
                where="state",
                hint="Load a state, or make the trainer anew.",
            )

    def place(self, feeds: Mapping[str, Any] | Placed) -> Placed:
        """A batch on the device, which :meth:`step` takes as often as wanted without copying it there again.

        On the CPU it is the arrays themselves, where their dtypes are those that the graph takes: what is written into
        them later is then seen.

        Raises:
            DataError: as :meth:`step`.
        """
        return self._bindings.place(self._checked(feeds), self._token)

    def _placed(self, batches: Iterable[tuple[int, Feeds]]) -> Iterator[tuple[int, Feeds, Feeds | Placed]]:
        """Batches, and what to feed of each: on a device a copy there, made while the batch before is in use.

        The copies of one shape lie in two sets of buffers in turns, which costs less than memory of their own.
        """
        if self._bindings.on_host:
            yield from ((count, feeds, feeds) for count, feeds in batches)
            return
        kept: dict[tuple[tuple[int, ...], ...], list[dict[str, Buffer]]] = {}
        for count, feeds in batches:
            arrays = self._checked(feeds)
            key = tuple(array.shape for _, array in sorted(arrays.items()))
            with self._bindings.recording:
                sets = kept.setdefault(key, []) or [self._bindings.buffers(arrays) for _ in (0, 1)]
            kept[key] = sets[::-1]
            yield count, feeds, self._bindings.place(arrays, self._token, sets[0])

    def _feed(self, feeds: Mapping[str, Any] | Placed) -> tuple[Mapping[str, np.ndarray], Placed | None]:
        """A batch to where the next run reads it; new bindings where a shape is not that of the step before."""
        placed = None
        if isinstance(feeds, Placed):
            # Another trainer's is like any arrays: it was not checked for this graph.
            placed, feeds = feeds if feeds.owner is self._token else None, feeds.arrays
        shapes, inputs = self._bindings.shapes, self.inputs
        fast = len(feeds) == len(inputs) == len(shapes)
        if fast:
            for name, array in feeds.items():
                # What had this shape and needs no conversion was checked then.
                if type(array) is np.ndarray and array.shape == shapes.get(name) and array.dtype == inputs[name].dtype:
                    continue
                fast = False
                break
        arrays: Mapping[str, np.ndarray] = feeds if fast or placed is not None else self._checked(feeds)
        if not fast and any(a.shape != shapes.get(n) for n, a in arrays.items()):
            empty = next((name for name, array in arrays.items() if not array.size), None)
            if empty is not None and self._endless:
                raise DataError(
                    f"'{empty}' has shape {shown(arrays[empty].shape)}: no examples, on which onnxruntime computes the "
                    "gradient of a Conv's weight without end",
                    where="feeds",
                    hint="Leave empty batches out.",
                )
            self._bindings.turn(arrays)
        self._bindings.feed(self._side, arrays, placed)
        return arrays, placed

    def _checked(self, feeds: Mapping[str, Any] | Placed) -> dict[str, np.ndarray]:
        feeds = feeds.arrays if isinstance(feeds, Placed) else feeds
        check_names(self.inputs, feeds, where="feeds", extra=False)
        sizes: dict[str, tuple[int, str]] = {}
        arrays = {}
        for name, spec in self.inputs.items():
            array = convert(spec, feeds[name], "feeds")
            check_shape(spec, array.shape, sizes, where="feeds")
            arrays[name] = array
        return arrays

    def evaluate(self, feeds: Mapping[str, Any] | Placed) -> Evaluation:
        """Loss and predictions with the present parameters; nothing is updated, and only the forward pass is run.

        It is in inference form whatever the mode: with the present running statistics, and without masks.

        Raises:
            DataError: as :meth:`step`.
        """
        self._ensure_whole()
        arrays = self._checked(feeds)
        placed = feeds.values if isinstance(feeds, Placed) and feeds.owner is self._token else {}
        if self._evaluator is None:
            self._evaluator = _Evaluator(self)
        return self._evaluator.run(arrays, placed, self._sides[self._side])

    # -- loops and files --

    def fit(
        self,
        data: DataSource | Examples,
        *,
        epochs: int,
        batch_size: int,
        val: DataSource | Examples | None = None,
        seed: int = 0,
        shuffle: bool = True,
        class_axis: int | None = None,
        on_batch: Callable[[Progress], None] | None = None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Train for some epochs.

        Examples lie along axis 0.  The order of epoch e is drawn by ``numpy.random.default_rng([seed, e])``.  A short
        last batch is used, unless the model's batch dimension is fixed: then it is left out.

        The loss of an entry is the mean over examples of what the training graph computes: for energies, which are
        sums, the energy per example; for means, each batch weighs as many as its examples.  Training figures are
        those of the steps, before each update; ``val_`` figures are of the epoch's end.  Accuracy (cross-entropy:
        the greatest logit is the label's; bce-with-logits: its sign is the target's) has the output's name after it
        where several outputs have one.

        Args:
            data: npz file or mapping, arrays by input name and target name.
            val: looked at after each epoch.
            class_axis: of cross-entropy, as in emit_training; by default read from the shapes.
            on_batch: called after each update.
            on_epoch: called with each entry of the history.

        Returns:
            One entry an epoch: epoch, loss, accuracy, val_loss, val_accuracy, seconds.

        Raises:
            DataError: data that do not fit, or a loss that is not finite.
            OptionError: no epochs, or a batch size that the model does not take.
        """
        if epochs < 1:
            raise OptionError(f"{epochs} epochs", where="--epochs", hint="Take at least 1.")
        train = data if isinstance(data, Examples) else examples(self.inputs, data, batch_size)
        held_out = val if isinstance(val, Examples) or val is None else examples(self.inputs, val, batch_size)
        batches = train.batch_count(batch_size)
        history = []
        for epoch in range(1, epochs + 1):
            begun = time.perf_counter()
            order = np.random.default_rng([seed, epoch]).permutation(train.count) if shuffle else None
            meter = Meter(self.signature)
            cut = self._placed(train.batches(batch_size, order))
            if not self._bindings.on_host or train.batch_bytes(batch_size) >= PREFETCHED:
                cut = prefetched(cut)
            for batch, (count, feeds, placed) in enumerate(cut, 1):
                loss = self.step(placed)
                if not math.isfinite(loss):
                    raise _diverged(f"epoch {epoch}, batch {batch}", loss, self.lr)
                meter.add(count, loss, accuracies(self.signature, self.last, feeds, class_axis))
                if on_batch is not None:
                    on_batch(Progress(epoch, epochs, batch, batches, count, loss))
            entry: dict[str, Any] = {"epoch": epoch, **meter.result()}
            if held_out is not None:
                entry.update({f"val_{k}": v for k, v in self._assess(held_out, batch_size, class_axis, epoch).items()})
            entry["seconds"] = time.perf_counter() - begun
            history.append(entry)
            if on_epoch is not None:
                on_epoch(entry)
        return history

    def _assess(self, data: Examples, batch_size: int, class_axis: int | None, epoch: int) -> dict[str, float]:
        meter = Meter(self.signature)
        for count, feeds in data.batches(batch_size):
            found = self.evaluate(feeds)
            if not math.isfinite(found.loss):
                raise _diverged(f"epoch {epoch}, validation", found.loss, self.lr)
            meter.add(count, found.loss, accuracies(self.signature, found.predictions, feeds, class_axis))
        return meter.result()

    def export(
        self, path: str | os.PathLike[str], *, model: ModelSource | None = None, ties: Ties | None = None
    ) -> None:
        """Write the original model with the trained weights and running statistics; all else stays as it was.

        What the training mode turned is in the form that the file gave it, as a rule that of inference.

        Args:
            path: the file; it may be the original's own.
            model: the original, where the trainer was made from a file and so does not know it.
            ties: with ``model``: leaves that follow another one, {B: (A, B is A's transpose)}.

        Raises:
            OptionError: the original is not known.
            ZilcError: see :func:`zilc.trained.export_trained`.
        """
        self._ensure_whole()
        if model is not None:
            source, tied = onnx_io.load(model), ties or {}
        elif self._original is not None:
            source, tied = self._original, self._ties
        else:
            raise OptionError(
                "a training graph's file does not name the model that it was made from",
                where=str(self._path),
                hint="Pass it: trainer.export(path, model='MODEL.onnx').",
            )
        now = self._sides[self._side]
        export_trained(source, {name: now[name].view() for name in self._exported(self.signature)}, tied, path)


class _Evaluator:
    """The forward part of a training graph, in a session of its own, on the trainer's parameters."""

    def __init__(self, trainer: Trainer) -> None:
        signature = trainer.signature
        self._predictions = [n for n in signature["predictions"] if n in {o.name for o in trainer._model.graph.output}]
        self._loss = signature["loss"]
        model = forward_part(inference_form(trainer._model), [self._loss, *self._predictions])
        self._session = trainer._open_session(model)
        self._inputs = [i.name for i in model.graph.input]
        self._device, self._scalars = trainer._device, trainer._scalars

    def run(
        self, arrays: Mapping[str, np.ndarray], placed: Mapping[str, Any], state: Mapping[str, Buffer]
    ) -> Evaluation:
        """With ``arrays`` as inputs, but for those that are ``placed`` on the device."""
        binding = self._session.io_binding()
        held = []
        for name in self._inputs:
            if name in placed:
                binding.bind_ortvalue_input(name, placed[name])
                continue
            buffer = state.get(name) or self._scalars.get(name)
            if buffer is None:
                buffer = Buffer(arrays[name].shape, arrays[name].dtype, self._device)
                buffer.write(arrays[name])
                held.append(buffer)
            binding.bind_ortvalue_input(name, buffer.value)
        for name in (self._loss, *self._predictions):
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise run_error(error) from error
        loss, *predictions = (np.array(value.numpy()) for value in binding.get_outputs())
        return Evaluation(float(loss), dict(zip(self._predictions, predictions, strict=True)))


def _diverged(where: str, loss: float, lr: float) -> DataError:
    return DataError(
        f"the loss is {loss}",
        where=where,
        hint=f"Try a learning rate below {lr:g}, and look for values in the data that are not finite.",
    )
