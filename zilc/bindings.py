"""What a run reads and writes: inputs of one shape and two sets of state, bound once and run many times.

A training step launches hundreds of kernels, and on a GPU a launch can take longer than the kernel.  onnxruntime
records a run as a CUDA graph and replays it in a single call, where two conditions hold that bindings see to: a
recorded run reads and writes the same memory each time, and its shapes stay.  So every shape of the inputs has
bindings, and recordings, of its own.  See "CUDA graphs" in the documentation of onnxruntime's CUDA provider.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from zilc.providers import import_onnxruntime
from zilc.session import Buffer, TrainingSession

#: Shapes of the inputs that are recorded: a recording holds on to memory for as long as its session lives.
RECORDED = 8

Shapes = dict[str, tuple[int, ...]]


class RecordingFailed(Exception):
    """onnxruntime could not record a run; the state is as it was."""


@dataclass(frozen=True, eq=False)
class Placed:
    """A checked batch, to be fed any number of times: a copy on the device, or on the host the arrays themselves.

    Attributes:
        values: onnxruntime's on the device, by name; none on the host.
        arrays: on the host.
        owner: of the trainer that checked and placed it.
    """

    values: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    owner: object = None


@dataclass(eq=False)
class Bound:
    """Bindings for inputs of one shape, one for each side: it reads that set of state and writes the other.

    Attributes:
        bindings: onnxruntime's, by side; the same twice where all state is written over itself.
        feeds: memory that inputs are copied to, by name.
        options: for a run, by side; they name the recording.  None where there is none.
        recorded: sides that have a recording, each with the thread that made it.
        placed: what was fed last, whole, if it was placed before.
    """

    bindings: list[Any]
    feeds: dict[str, Buffer] = field(default_factory=dict)
    options: list[Any] = field(default_factory=lambda: [None, None])
    recorded: set[tuple[int, object]] = field(default_factory=set)
    placed: Placed | None = None


class Bindings:
    """Binds a training session's state and inputs, and runs it.

    Args:
        opened: the session.
        sides: two sets of state; what is written over itself is the same buffer in both.
        scalars: learning rate and seed.
        pairs: (input, output) that is fed back to it.
        loss: the loss's name and buffer.
        others: outputs besides, allocated by onnxruntime in the shape of the run, and kept until that changes.
        device: kind and number.

    Attributes:
        shapes: of the inputs that are bound at present.
        on_host: whether the device is the host itself, which reads inputs where they are.
        recording: held while a run is recorded, when nothing else may be allocated on the device or copied to it.
    """

    def __init__(
        self,
        opened: TrainingSession,
        sides: Sequence[Mapping[str, Buffer]],
        scalars: Mapping[str, Buffer],
        pairs: Sequence[tuple[str, str]],
        loss: tuple[str, Buffer],
        others: Sequence[str],
        device: tuple[str, int],
    ) -> None:
        self._opened, self._sides, self._scalars, self._pairs = opened, sides, scalars, pairs
        self._loss, self._others, self._device = loss, others, device
        self.on_host = device[0] == "cpu"
        self.recording = threading.Lock()
        self.shapes: Shapes = {}
        #: Of shapes that are recorded.
        self._kept: dict[tuple[tuple[int, ...], ...], Bound] = {}
        self._numbered = 0
        # onnxruntime keeps recordings by thread: one that another thread made is none here.
        self._thread = threading.local()
        #: Whether all state is written over itself, so that both sides are one.
        self._alike = len(opened.over) == len(pairs)
        #: For all shapes that are not recorded; its inputs are bound anew where their shape changes.
        self._plain = self._bound()
        if opened.captures:
            self._plain.options = [self._named(-1)] * 2
        self._now = self._plain
        self._side = 0

    def _bound(self) -> Bound:
        if self._alike:
            return Bound([self._binding(0)] * 2)
        return Bound([self._binding(side) for side in (0, 1)])

    def _binding(self, side: int) -> Any:
        binding = self._opened.session.io_binding()
        for name, buffer in self._scalars.items():
            binding.bind_ortvalue_input(name, buffer.value)
        for name, following in self._pairs:
            binding.bind_ortvalue_input(name, self._sides[side][name].value)
            binding.bind_ortvalue_output(following, self._sides[1 - side][name].value)
        for made, name in self._opened.through.items():
            binding.bind_ortvalue_output(made, self._sides[side][name].value)
        name, buffer = self._loss
        binding.bind_ortvalue_output(name, buffer.value)
        self._bind_others(binding)
        return binding

    def _bind_others(self, binding: Any) -> None:
        for name in self._others:
            binding.bind_output(name, *self._device)

    def _named(self, number: int) -> Any:
        """Options of a run that is recorded under a number; -1: that is not recorded."""
        options = import_onnxruntime().RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        return options

    def turn(self, arrays: Mapping[str, np.ndarray]) -> None:
        """To the bindings for inputs of these shapes, which are made where there are none."""
        key = tuple(array.shape for _, array in sorted(arrays.items()))
        kept = self._kept.get(key)
        if kept is None and self._opened.captures and len(self._kept) < RECORDED:
            kept = self._bound()
            numbers = (self._numbered + 1, self._numbered + (1 if self._alike else 2))
            kept.options = [self._named(number) for number in numbers]
            self._reshape(kept, arrays)
            self._kept[key], self._numbered = kept, numbers[1]
        if kept is None:
            kept = self._plain
            self._reshape(kept, arrays)
        self._now = kept
        self.shapes = {name: array.shape for name, array in arrays.items()}

    def _reshape(self, bound: Bound, arrays: Mapping[str, np.ndarray]) -> None:
        """Memory for inputs of other shapes, and for what else is made of them."""
        bound.placed = None
        for name, array in arrays.items():
            present = bound.feeds.get(name)
            if present is None or present.shape != array.shape:
                bound.feeds[name] = made = Buffer(array.shape, array.dtype, self._device)
                for binding in bound.bindings:
                    binding.bind_ortvalue_input(name, made.value)
        for binding in bound.bindings:
            self._bind_others(binding)

    def feed(self, side: int, arrays: Mapping[str, np.ndarray], placed: Placed | None = None) -> None:
        """Copy inputs of the present shapes to where the next run reads them, or bind them where they are."""
        now = self._now
        if placed is not None and placed is now.placed:
            return
        now.placed = None  # until all of it is there
        if self.on_host:
            # What is placed stays bound, for either side, so it is bound once.
            bindings = {now.bindings[side]} if placed is None else set(now.bindings)
            copied = False
            for name, array in arrays.items():
                # onnxruntime reads the caller's own memory where it can, and holds on to it until another is bound.
                direct = array.dtype.isbuiltin == 1 and array.flags.c_contiguous
                if not direct:
                    copied = True
                    now.feeds[name].write(array)
                for binding in bindings:
                    if direct:
                        binding.bind_cpu_input(name, array)
                    else:
                        binding.bind_ortvalue_input(name, now.feeds[name].value)
            now.placed = None if copied else placed  # a copy is made again: the array may have changed
            return
        for name, array in arrays.items():
            if placed is None:
                now.feeds[name].write(array)
            else:
                now.feeds[name].value.update_inplace(placed.values[name])
        now.placed = placed

    def place(
        self, arrays: Mapping[str, np.ndarray], owner: object, buffers: Mapping[str, Buffer] | None = None
    ) -> Placed:
        """A batch on the device; on the host it is the arrays themselves.

        Args:
            buffers: where; by default in memory of its own.
        """
        # Views and no other entries: what the caller makes of its arrays' shapes, or of this, is not run.
        arrays = MappingProxyType({name: array.view() for name, array in arrays.items()})
        if self.on_host:
            return Placed({}, arrays, owner)
        with self.recording:
            if buffers is None:
                buffers = self.buffers(arrays)
            for name, array in arrays.items():
                buffers[name].write(array)
        return Placed({name: buffer.value for name, buffer in buffers.items()}, arrays, owner)

    def buffers(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Buffer]:
        """Memory on the device for a batch like this."""
        return {name: Buffer(array.shape, array.dtype, self._device) for name, array in arrays.items()}

    def run(self, session: Any, side: int) -> Any:
        """Run; gives the binding, which holds the outputs.

        Raises:
            RecordingFailed: it was to be recorded, and could not be.
        """
        now, self._side = self._now, side
        binding, options = now.bindings[side], now.options[side]
        if options is None:
            session.run_with_iobinding(binding)
        elif now is self._plain or (side, self._token()) in now.recorded:
            session.run_with_iobinding(binding, options)
        else:
            self._record(session, side)
        return binding

    @property
    def last(self) -> Any:
        """The binding that was run last."""
        return self._now.bindings[self._side]

    def _token(self) -> object:
        """What stands for this thread, for as long as there is anything of it."""
        try:
            return self._thread.token
        except AttributeError:
            self._thread.token = token = object()
            return token

    def _record(self, session: Any, side: int) -> None:
        """The first run: onnxruntime makes it plainly, for its memory, and then once more, to record it.

        What is written over itself would be updated twice, so it is put back in between.
        """
        now = self._now
        with self.recording:
            saved = {name: self._sides[side][name].read() for name in self._opened.over}
            try:
                session.run_with_iobinding(now.bindings[side], now.options[side])
            except Exception as error:
                raise RecordingFailed(str(error)) from error
            finally:
                for name, array in saved.items():
                    self._sides[side][name].write(array)
            now.recorded |= {(one, self._token()) for one in ((0, 1) if self._alike else (side,))}
        if saved:
            session.run_with_iobinding(now.bindings[side], now.options[side])
