"""Memory in huge pages: which is asked for, that nothing in it changes, and when a trainer asks."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zilc
from zilc import huge_pages, models, runtime
from zilc.huge_pages import HUGE, Gatherer, gather, mapped, since, used


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ([], [(0, 4), (6, 8)], [(0, 4), (6, 8)]),
        ([(0, 4)], [(0, 4)], []),
        ([(2, 4)], [(0, 6)], [(0, 2), (4, 6)]),
        ([(0, 2), (3, 4), (9, 10)], [(1, 8)], [(2, 3), (4, 8)]),
        ([(0, 2), (6, 9)], [(0, 1), (5, 7), (8, 12)], [(5, 6), (9, 12)]),
        ([(5, 6)], [(0, 1), (7, 8)], [(0, 1), (7, 8)]),
    ],
)
def test_what_is_new(before: list, now: list, new: list) -> None:
    assert list(since(before, now)) == new


@pytest.mark.parametrize(
    ("text", "asks"), [("always [madvise] never\n", True), ("[always] madvise never\n", False), (None, False)]
)
def test_only_where_the_system_gives_them_to_those_who_ask(
    text: str | None, asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "_SETTING", tmp_path / "enabled")
    if text is not None:
        (tmp_path / "enabled").write_text(text)
    monkeypatch.setattr(sys, "platform", "linux")
    assert huge_pages.wanted() is asks
    monkeypatch.setattr(sys, "platform", "win32")
    assert huge_pages.wanted() is False


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _in_huge_pages(address: int) -> int:
    """Bytes of the mapping at an address that are in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's interface")
def test_what_is_used_is_moved_as_it_is() -> None:
    """Of twelve huge pages two are used, and one in a single place, which is no reason to fill it up."""
    before = mapped()
    memory = mmap.mmap(-1, 13 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -(-_address(memory) // HUGE) * HUGE
    # Beside memory that was asked for before it may be in huge pages from the beginning.
    assert memory.madvise(mmap.MADV_NOHUGEPAGE) is None
    array = np.frombuffer(memory, np.uint8)[start - _address(memory) :][: 12 * HUGE].reshape(12, HUGE)
    rng = np.random.default_rng(0)
    array[2:4] = rng.integers(0, 256, (2, HUGE), np.uint8)
    array[7, 5000] = 3
    copy = array[2:4].copy()
    assert list(used(start, start + 12 * HUGE)) == [(start + 2 * HUGE, start + 4 * HUGE)]
    moved = gather(since(before, mapped()))
    inside = _in_huge_pages(start)
    np.testing.assert_array_equal(array[2:4], copy)
    assert (array[7, 5000], array.sum()) == (3, copy.sum() + 3)
    assert inside == (2 * HUGE if moved >= 2 * HUGE else 0)  # a kernel may refuse


def test_a_trainer_asks_once_for_what_came_with_its_session_and_its_first_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What its caller maps between is none of its business."""
    calls: list[list[tuple[int, int]]] = []
    memory = [(0, 1)]
    monkeypatch.setattr(huge_pages, "wanted", lambda: True)
    monkeypatch.setattr(huge_pages, "mapped", lambda: list(memory))
    monkeypatch.setattr(huge_pages, "gather", lambda ranges: calls.append(list(ranges)))
    model = models.build("mlp2", batch=2)
    made = runtime.make_training_session

    def session(*args: Any, **options: Any) -> Any:
        memory.append((10, 11))
        return made(*args, **options)

    monkeypatch.setattr(runtime, "make_training_session", session)
    trainer = zilc.Trainer(zilc.emit_training(model), lr=0.1, providers=["CPUExecutionProvider"])
    feeds = models.random_feeds(model, 2, np.random.default_rng(0), loss="energy")
    run = trainer._bindings.run
    counts = []
    for k in range(4):
        memory.append((100 + k, 101 + k))  # the caller's

        def bound(*args: Any, k: int = k) -> Any:
            memory.append((200 + k, 201 + k))
            return run(*args)

        monkeypatch.setattr(trainer._bindings, "run", bound)
        memory.sort()
        trainer.step(feeds)
        counts.append(len(calls))
    assert counts == [0, 1, 1, 1]
    assert calls == [[(10, 11), (200, 201), (201, 202)]]


def test_nothing_is_looked_at_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "wanted", lambda: False)
    monkeypatch.setattr(huge_pages, "mapped", lambda: pytest.fail("looked"))
    monkeypatch.setattr(huge_pages, "gather", lambda ranges: pytest.fail("asked"))
    gatherer = Gatherer(1)
    for _ in range(3):
        with gatherer:
            pass


def test_a_system_that_hides_pages_is_let_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huge_pages, "wanted", lambda: True)
    monkeypatch.setattr(huge_pages, "_PAGES", tmp_path / "none")
    with Gatherer(0):
        array = np.ones(4 * HUGE, np.uint8)
    assert array.all()
