"""Memory in huge pages: which is asked for, that nothing in it changes, and when a trainer asks."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import zilc
from zilc import huge_pages, models
from zilc.huge_pages import HUGE, Gatherer, gather, mapped, present, since


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
def test_what_was_used_is_moved_as_it_is() -> None:
    """Of twelve huge pages three are used, one of them by a single byte; the rest stays without memory."""
    before = mapped()
    memory = mmap.mmap(-1, 13 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -(-_address(memory) // HUGE) * HUGE
    array = np.frombuffer(memory, np.uint8)[start - _address(memory) :][: 12 * HUGE].reshape(12, HUGE)
    rng = np.random.default_rng(0)
    array[2:4] = rng.integers(0, 256, (2, HUGE), np.uint8)
    array[7, 5000] = 3
    copy = array[[2, 3, 7]].copy()
    assert list(present(start, start + 12 * HUGE)) == [
        (start + 2 * HUGE, start + 4 * HUGE), (start + 7 * HUGE, start + 8 * HUGE),
    ]  # fmt: skip
    moved = gather(before)
    np.testing.assert_array_equal(array[[2, 3, 7]], copy)
    inside = _in_huge_pages(start)
    assert inside <= 3 * HUGE
    if moved >= 3 * HUGE:  # a kernel may refuse
        assert inside == 3 * HUGE


def test_a_trainer_asks_once_after_its_second_update(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[tuple[int, int]]] = []
    monkeypatch.setattr(huge_pages, "wanted", lambda: True)
    monkeypatch.setattr(huge_pages, "mapped", lambda: [(1, 2)])
    monkeypatch.setattr(huge_pages, "gather", lambda before: calls.append(before))
    model = models.build("mlp2", batch=2)
    trainer = zilc.Trainer(zilc.emit_training(model), lr=0.1, providers=["CPUExecutionProvider"])
    feeds = models.random_feeds(model, 2, np.random.default_rng(0), loss="energy")
    counts = []
    for _ in range(4):
        trainer.step(feeds)
        counts.append(len(calls))
    assert counts == [0, 1, 1, 1]
    assert calls == [[(1, 2)]]


def test_nothing_is_looked_at_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "wanted", lambda: False)
    monkeypatch.setattr(huge_pages, "mapped", lambda: pytest.fail("looked"))
    monkeypatch.setattr(huge_pages, "gather", lambda before: pytest.fail("asked"))
    gatherer = Gatherer(1)
    gatherer.ran()
    gatherer.ran()
