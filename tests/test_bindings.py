"""Bindings and recordings, with a session that records as onnxruntime does on CUDA, where there is no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import zilc
from zilc import models, runtime
from zilc.bindings import RECORDED, Placed
from zilc.session import TrainingSession, make_session, make_training_session

CPU = ["CPUExecutionProvider"]
HIDDEN = 8


class Recording:
    """onnxruntime on CUDA: the first run under a number is made twice, later ones once; -1 is not recorded."""

    def __init__(self, session: Any, fails: bool = False) -> None:
        self._session, self._fails = session, fails
        self.recorded: list[str] = []
        self.replayed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        number = options.get_run_config_entry("gpu_graph_id") if options is not None else "-1"
        self._session.run_with_iobinding(binding)
        if number == "-1":
            return
        if number in self.recorded:
            self.replayed += 1
            return
        self.recorded.append(number)
        self._session.run_with_iobinding(binding)
        if self._fails:
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def model() -> Any:
    return models.build("mlp2", hidden=HIDDEN)


def _feeds(model: Any, batch: int, seed: int) -> dict[str, np.ndarray]:
    return models.random_feeds(model, batch, np.random.default_rng(seed), loss="cross-entropy")


def _recording(monkeypatch: pytest.MonkeyPatch, *, over: bool, fails: bool = False) -> list[Recording]:
    """Trainers made from now on record; gives their sessions."""
    made: list[Recording] = []

    def opened(
        model: Any, providers: Any, pairs: Any, *, folder: str, where: str | None, cuda_graph: bool
    ) -> TrainingSession:
        if over:
            plain = make_training_session(model, providers, pairs)
            assert len(plain.over) == len(pairs)
        else:
            plain = TrainingSession(make_session(model, providers))
        if not cuda_graph:
            return plain
        made.append(Recording(plain.session, fails))
        return TrainingSession(made[-1], plain.over, plain.harmless, captures=True)

    monkeypatch.setattr(runtime, "make_training_session", opened)
    return made


def _same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


@pytest.mark.parametrize("over", [False, True], ids=["two sets", "over itself"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_recorded_updates_are_the_same_updates(
    model: Any, monkeypatch: pytest.MonkeyPatch, optimizer: str, over: bool
) -> None:
    """An update that onnxruntime makes twice in order to record it counts once."""
    step = zilc.emit_training(model, loss="cross-entropy", optimizer=optimizer)
    batches = [_feeds(model, batch, k) for k, batch in enumerate([4, 4, 4, 3, 3, 4, 3, 4])]
    plain = zilc.Trainer(step, lr=0.1, providers=CPU)
    losses = [plain.step(feeds) for feeds in batches]
    outputs = dict(plain.last)
    sessions = _recording(monkeypatch, over=over)
    trainer = zilc.Trainer(step, lr=0.1, providers=CPU)
    assert [trainer.step(feeds) for feeds in batches] == losses
    assert _same(trainer.state, plain.state)
    assert _same(dict(trainer.last), outputs)
    # Two shapes, each recorded once for each side, of which there is one where state is written over itself.
    assert len(sessions[0].recorded) == (2 if over else 4)
    assert sessions[0].replayed == (len(batches) if over else len(batches) - 4)


@pytest.mark.parametrize("over", [False, True], ids=["two sets", "over itself"])
def test_where_recording_fails_updates_go_on_without(
    model: Any, monkeypatch: pytest.MonkeyPatch, over: bool
) -> None:
    step = zilc.emit_training(model, loss="cross-entropy", optimizer="adam")
    batches = [_feeds(model, 4, k) for k in range(3)]
    plain = zilc.Trainer(step, lr=0.1, providers=CPU)
    losses = [plain.step(feeds) for feeds in batches]
    sessions = _recording(monkeypatch, over=over, fails=True)
    trainer = zilc.Trainer(step, lr=0.1, providers=CPU)
    assert [trainer.step(feeds) for feeds in batches] == losses
    assert _same(trainer.state, plain.state)
    assert len(sessions[0].recorded) == 1
    assert trainer.updates == 3


def test_more_shapes_than_are_recorded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = zilc.emit_training(model, loss="cross-entropy")
    batches = [_feeds(model, 1 + k % (RECORDED + 3), k) for k in range(2 * (RECORDED + 3))]
    plain = zilc.Trainer(step, lr=0.1, providers=CPU)
    losses = [plain.step(feeds) for feeds in batches]
    sessions = _recording(monkeypatch, over=False)
    trainer = zilc.Trainer(step, lr=0.1, providers=CPU)
    assert [trainer.step(feeds) for feeds in batches] == losses
    assert _same(trainer.state, plain.state)
    assert len(sessions[0].recorded) <= 2 * RECORDED


def test_it_can_be_left_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = _recording(monkeypatch, over=False)
    trainer = zilc.Trainer(zilc.emit_training(model, loss="cross-entropy"), lr=0.1, providers=CPU, cuda_graph=False)
    trainer.step(_feeds(model, 4, 0))
    assert not sessions


def test_a_batch_on_the_device(model: Any) -> None:
    """On the CPU it is the converted batch; fed twice it gives the losses of the batch itself."""
    step = zilc.emit_training(model, loss="cross-entropy")
    feeds = _feeds(model, 4, 0)
    plain, trainer = (zilc.Trainer(step, lr=0.1, providers=CPU) for _ in range(2))
    placed = trainer.place({**feeds, "target": feeds["target"].astype(np.int32)})
    assert not isinstance(placed, Placed)
    assert placed["target"].dtype == np.int64
    assert [trainer.step(placed) for _ in range(3)] == [plain.step(feeds) for _ in range(3)]


def test_a_placed_batch_is_copied_once(model: Any) -> None:
    """As on CUDA, where a recorded run reads the same memory whatever it is fed."""
    step = zilc.emit_training(model, loss="cross-entropy")
    one, two = _feeds(model, 4, 0), _feeds(model, 4, 1)
    plain, trainer = (zilc.Trainer(step, lr=0.1, providers=CPU) for _ in range(2))
    copies: list[str] = []

    class Memory:
        def __init__(self, name: str, array: np.ndarray) -> None:
            self.name, self.array = name, array

    bindings = trainer._bindings

    def feed(side: int, arrays: Any, placed: Placed | None = None) -> None:
        """Bindings.feed on a device, whose memory is arrays here."""
        now = bindings._bound
        assert placed is not None
        if placed is not now.placed:
            for name, memory in placed.values.items():
                copies.append(name)
                now.feeds[name].write(memory.array)
                for binding in now.bindings:
                    binding.bind_ortvalue_input(name, now.feeds[name].value)
            now.placed = placed

    bindings.feed = feed  # type: ignore[method-assign]
    batches = [Placed({n: Memory(n, a) for n, a in feeds.items()}, feeds) for feeds in (one, two)]
    order = [0, 0, 1, 1, 0]
    assert [trainer.step(batches[k]) for k in order] == [plain.step((one, two)[k]) for k in order]
    assert len(copies) == 3 * len(one)
