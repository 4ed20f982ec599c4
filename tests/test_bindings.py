"""Bindings and recordings, with a session that records as onnxruntime does on CUDA, where there is no GPU."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import onnxruntime
import pytest

import zilc
from zilc import models, runtime
from zilc.bindings import RECORDED, Placed
from zilc.errors import DataError
from zilc.session import Buffer, TrainingSession, make_session, make_training_session

CPU = ["CPUExecutionProvider"]
HIDDEN = 8


class Recording:
    """onnxruntime on CUDA: a thread's first run under a number is made twice, later ones once; -1 is not recorded."""

    def __init__(self, session: Any, fails: bool = False) -> None:
        self._session, self._fails = session, fails
        self.recorded: list[str] = []  # by all threads
        self.replayed = self.runs = 0
        # onnxruntime keeps recordings in memory of the thread's own: the number of a thread that has ended may be
        # given to another, which has none of its recordings.
        self._thread = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        assert options is not None  # else it would be recorded under onnxruntime's own number
        number = options.get_run_config_entry("gpu_graph_id")
        here: set[str] = self._thread.__dict__.setdefault("recorded", set())
        self.runs += 1
        self._session.run_with_iobinding(binding)
        if number == "-1":
            return
        if number in here:
            self.replayed += 1
            return
        here.add(number)
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


@pytest.mark.parametrize("over", [False, True], ids=["two sets", "over itself"])
def test_more_shapes_than_are_recorded(model: Any, monkeypatch: pytest.MonkeyPatch, over: bool) -> None:
    """What is beyond is run once a step, and what is recorded stays recorded."""
    step = zilc.emit_training(model, loss="cross-entropy", optimizer="adam")
    shapes = RECORDED + 3
    batches = [_feeds(model, 1 + k % shapes, k) for k in range(4 * shapes)]
    plain = zilc.Trainer(step, lr=0.1, providers=CPU)
    losses = [plain.step(feeds) for feeds in batches]
    sessions = _recording(monkeypatch, over=over)
    trainer = zilc.Trainer(step, lr=0.1, providers=CPU)
    assert [trainer.step(feeds) for feeds in batches] == losses
    assert _same(trainer.state, plain.state)
    recordings = RECORDED * (1 if over else 2)
    assert len(sessions[0].recorded) == recordings
    # What is written over itself is run once more after it was recorded.
    assert sessions[0].runs == len(batches) + (recordings if over else 0)


@pytest.mark.parametrize("over", [False, True], ids=["two sets", "over itself"])
def test_another_thread_records_its_own(model: Any, monkeypatch: pytest.MonkeyPatch, over: bool) -> None:
    """Three threads in turns, of which the second has ended before the third starts."""
    step = zilc.emit_training(model, loss="cross-entropy", optimizer="adam")
    batches = [_feeds(model, 4, k) for k in range(12)]
    plain = zilc.Trainer(step, lr=0.1, providers=CPU)
    losses = [plain.step(feeds) for feeds in batches]
    sessions = _recording(monkeypatch, over=over)
    trainer = zilc.Trainer(step, lr=0.1, providers=CPU)
    found = [trainer.step(feeds) for feeds in batches[:4]]
    for part in (batches[4:8], batches[8:]):
        thread = threading.Thread(target=lambda part=part: found.extend(map(trainer.step, part)))  # type: ignore[misc]
        thread.start()
        thread.join()
    assert found == losses
    assert _same(trainer.state, plain.state)
    # Each thread records once for each side; what is written over itself is run once more after that.
    assert len(sessions[0].recorded) == 3 * (1 if over else 2)
    assert sessions[0].replayed == (len(batches) if over else len(batches) - 6)


@pytest.mark.parametrize("over", [False, True], ids=["two sets", "over itself"])
def test_what_changes_between_recorded_updates(model: Any, monkeypatch: pytest.MonkeyPatch, over: bool) -> None:
    """The learning rate, the state, and an evaluation."""

    def course(trainer: zilc.Trainer) -> list[Any]:
        found: list[Any] = [trainer.step(feeds) for feeds in batches[:3]]
        kept = trainer.state
        trainer.lr = 0.5
        found += [trainer.evaluate(batches[0]).loss, trainer.step(batches[3]), trainer.step(batches[3])]
        trainer.load_state(kept)
        return [*found, trainer.step(batches[3]), trainer.evaluate(batches[2]).loss, trainer.updates]

    step = zilc.emit_training(model, loss="cross-entropy", optimizer="adam")
    batches = [_feeds(model, 4, k) for k in range(4)]
    plain = zilc.Trainer(step, lr=0.1, providers=CPU)
    expected = course(plain)
    _recording(monkeypatch, over=over)
    trainer = zilc.Trainer(step, lr=0.1, providers=CPU)
    assert course(trainer) == expected
    assert _same(trainer.state, plain.state)


def test_a_batch_that_is_at_fault_does_not_end_recording(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = zilc.emit_training(model, loss="cross-entropy")
    good, bad = _feeds(model, 4, 0), _feeds(model, 4, 1)
    bad["target"][0] = 1000
    plain = zilc.Trainer(step, lr=0.1, providers=CPU)
    losses = [plain.step(good) for _ in range(3)]
    sessions = _recording(monkeypatch, over=True)
    trainer = zilc.Trainer(step, lr=0.1, providers=CPU)
    with pytest.raises(DataError):
        trainer.step(bad)
    assert [trainer.step(good) for _ in range(3)] == losses
    assert sessions[-1].recorded
    assert sessions[-1].replayed == 3


def test_it_can_be_left_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = _recording(monkeypatch, over=False)
    trainer = zilc.Trainer(zilc.emit_training(model, loss="cross-entropy"), lr=0.1, providers=CPU, cuda_graph=False)
    trainer.step(_feeds(model, 4, 0))
    assert not sessions


@pytest.mark.parametrize("sets", [1, 2])
def test_a_batch_on_the_host(model: Any, monkeypatch: pytest.MonkeyPatch, sets: int) -> None:
    """On the CPU it is the converted batch, bound once; fed again and again it gives the losses of the batch itself."""
    if sets == 2:
        plainly = lambda model, providers, _, **__: TrainingSession(make_session(model, providers))  # noqa: E731
        monkeypatch.setattr(runtime, "make_training_session", plainly)
    step = zilc.emit_training(model, loss="cross-entropy")
    feeds, other = _feeds(model, 4, 0), _feeds(model, 4, 1)
    plain, trainer = (zilc.Trainer(step, lr=0.1, providers=CPU) for _ in range(2))
    assert len({id(binding) for binding in trainer._bindings._plain.bindings}) == sets
    placed = trainer.place({**feeds, "target": feeds["target"].astype(np.int32)})
    assert placed.arrays["target"].dtype == np.int64
    bound: list[str] = []
    bind = onnxruntime.IOBinding.bind_cpu_input

    def counted(self: Any, name: str, array: np.ndarray) -> None:
        bound.append(name)
        bind(self, name, array)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_cpu_input", counted)
    assert [trainer.step(placed) for _ in range(4)] == [plain.step(feeds) for _ in range(4)]
    assert bound.count("target") == 4 + sets  # the plain one's, and one a set
    # Another batch in between is read, and then the placed one again, as it is now.
    assert trainer.step(other) == plain.step(other)
    for array, value in zip(placed.arrays.values(), feeds.values(), strict=True):
        array[...] = value
    assert [trainer.step(placed) for _ in range(2)] == [plain.step(feeds) for _ in range(2)]
    assert trainer.evaluate(placed).loss == plain.evaluate(feeds).loss == trainer.evaluate(trainer.place(placed)).loss


def test_what_is_made_of_an_array_after_it_was_placed(model: Any) -> None:
    """Another shape, or another array under its name, is not run; what is written into it is."""
    step = zilc.emit_training(model, loss="cross-entropy")
    feeds = _feeds(model, 4, 0)
    name = next(name for name, array in feeds.items() if array.dtype == np.float32)
    given = {key: array.copy() for key, array in feeds.items()}
    plain, trainer = (zilc.Trainer(step, lr=0.1, providers=CPU) for _ in range(2))
    placed = trainer.place(given)
    given[name].shape = (2, -1)
    assert [trainer.step(placed) for _ in range(2)] == [plain.step(feeds) for _ in range(2)]
    given[name] *= 2
    feeds[name] *= 2
    assert trainer.step(placed) == plain.step(feeds)
    with pytest.raises(TypeError):
        placed.arrays[name] = given[name]  # type: ignore[index]


def test_a_placed_batch_that_is_not_contiguous(model: Any) -> None:
    """It is copied each time, for onnxruntime reads contiguous memory only."""
    step = zilc.emit_training(model, loss="cross-entropy")
    feeds = _feeds(model, 4, 0)
    turned = {name: np.asfortranarray(array) for name, array in feeds.items()}
    plain, trainer = (zilc.Trainer(step, lr=0.1, providers=CPU) for _ in range(2))
    placed = trainer.place(turned)
    for factor in (1.0, 0.5):
        for name, array in turned.items():
            if array.dtype.kind == "f":
                array *= factor
                feeds[name] = feeds[name] * np.float32(factor)
        assert trainer.step(placed) == plain.step(feeds)


def _device(trainer: zilc.Trainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a trainer on the CPU copy its inputs as to a device; gives the sizes that were copied there."""
    trainer._bindings.on_host = False
    copied: list[int] = []
    write = Buffer.write

    def counted(self: Buffer, array: np.ndarray) -> None:
        copied.append(array.size)
        write(self, array)

    monkeypatch.setattr(Buffer, "write", counted)
    return copied


def test_a_placed_batch_is_copied_there_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = zilc.emit_training(model, loss="cross-entropy")
    batches = [_feeds(model, 4, 0), _feeds(model, 4, 1), _feeds(model, 3, 2)]
    order = [0, 0, 1, 2, 1, 1, 0, 2]
    plain, trainer = (zilc.Trainer(step, lr=0.1, providers=CPU) for _ in range(2))
    losses = [plain.step(batches[k]) for k in order]
    copied = _device(trainer, monkeypatch)
    placed = [trainer.place(feeds) for feeds in batches]
    assert all(isinstance(one, Placed) for one in placed)
    del copied[:]
    assert [trainer.step(placed[k]) for k in order] == losses
    assert [size for size in copied if size > 1] == []  # the loss alone
    # What is not placed is copied in between, and what was placed is there again after it.
    assert trainer.step(batches[0]) == plain.step(batches[0])
    assert trainer.step(placed[2]) == plain.step(batches[2])
    assert trainer.step(placed[0]) == plain.step(batches[0])


def test_a_placed_batch_is_what_it_was(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that are changed after they were placed, or after a step, change nothing."""
    step = zilc.emit_training(model, loss="cross-entropy")
    feeds, other = _feeds(model, 4, 0), _feeds(model, 4, 1)
    plain, trainer = (zilc.Trainer(step, lr=0.1, providers=CPU) for _ in range(2))
    losses = [plain.step(feeds), plain.step(other), plain.step(feeds)]
    _device(trainer, monkeypatch)
    given = {name: array.copy() for name, array in feeds.items()}
    placed = trainer.place(given)
    loss = plain.evaluate(feeds).loss
    for array in given.values():
        if array.dtype.kind == "f":
            array[...] = 0
            array.shape = (2, -1)
    assert [trainer.step(placed), trainer.step(other), trainer.step(placed)] == losses
    assert trainer.evaluate(placed).loss == loss


@pytest.mark.parametrize("over", [False, True], ids=["two sets", "over itself"])
def test_fit_copies_ahead(model: Any, monkeypatch: pytest.MonkeyPatch, over: bool) -> None:
    """Losses and state are those of a loop on the CPU, with a short last batch, and recorded runs."""
    step = zilc.emit_training(model, loss="cross-entropy", optimizer="adam")
    data = _feeds(model, 31, 0)
    plain = zilc.Trainer(step, lr=0.05, providers=CPU)
    expected = plain.fit(data, epochs=3, batch_size=4, val=data)
    _recording(monkeypatch, over=over)
    trainer = zilc.Trainer(step, lr=0.05, providers=CPU)
    _device(trainer, monkeypatch)
    found = trainer.fit(data, epochs=3, batch_size=4, val=data)
    assert [{**e, "seconds": 0} for e in found] == [{**e, "seconds": 0} for e in expected]
    assert _same(trainer.state, plain.state)


def test_a_copy_that_was_interrupted_is_made_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = zilc.emit_training(model, loss="cross-entropy")
    one, two = _feeds(model, 4, 0), _feeds(model, 4, 1)
    plain, trainer = (zilc.Trainer(step, lr=0.0, providers=CPU) for _ in range(2))
    _device(trainer, monkeypatch)
    placed = [trainer.place(feeds) for feeds in (one, two)]
    expected = [plain.step(one), plain.step(two)]
    assert trainer.step(placed[0]) == expected[0]
    update = onnxruntime.OrtValue.update_inplace
    left = [1]

    def interrupted(self: Any, value: Any) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        update(self, value)

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime.OrtValue, "update_inplace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.step(placed[1])
    assert trainer.step(placed[0]) == expected[0]
    assert trainer.step(placed[1]) == expected[1]


def test_memory_that_was_not_to_be_had_is_asked_for_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = zilc.emit_training(model, loss="cross-entropy")
    small, large = _feeds(model, 1, 0), _feeds(model, 4, 1)
    plain, trainer = (zilc.Trainer(step, lr=0.0, providers=CPU) for _ in range(2))
    assert trainer.step(small) == plain.step(small)
    with monkeypatch.context() as patch:
        patch.setattr("zilc.bindings.Buffer", _no_memory)
        with pytest.raises(MemoryError):
            trainer.step(large)
    assert trainer.step(large) == plain.step(large)
    assert trainer.step(small) == plain.step(small)


def _no_memory(*_: Any) -> None:
    raise MemoryError


def test_a_batch_that_another_trainer_placed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is taken for the arrays that it was."""
    step, feeds = zilc.emit_training(model, loss="cross-entropy"), _feeds(model, 4, 0)
    plain, trainer, other = (zilc.Trainer(step, lr=0.1, providers=CPU) for _ in range(3))
    for one in (trainer, other):
        _device(one, monkeypatch)
    assert trainer.step(other.place(feeds)) == plain.step(feeds)
    mse = zilc.Trainer(zilc.emit_training(model, loss="mse"), lr=0.1, providers=CPU)
    _device(mse, monkeypatch)
    with pytest.raises(DataError, match="target"):
        mse.step(other.place(feeds))
