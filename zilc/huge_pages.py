"""Memory of onnxruntime's on the CPU in huge pages (Linux), so that fewer addresses have to be looked up.

A training step reads and writes hundreds of megabytes, of which the processor's translation buffers reach a few at
4 KiB a page.  Where the system gives huge pages to those who ask (``madvise``, the default of most distributions),
onnxruntime does not ask.  See madvise(2) and Documentation/admin-guide/mm/transhuge.rst of the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS, _PAGES = Path("/proc/self/maps"), Path("/proc/self/pagemap")
#: Of include/uapi/asm-generic/mman-common.h: give huge pages from now on, and gather what is there into them.
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
#: Bytes of a huge page; where they are larger the kernel takes less, and says so.
HUGE = 1 << 21

Range = tuple[int, int]


def wanted() -> bool:
    """Whether huge pages are given to those who ask, and to no others."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return "[madvise]" in _SETTING.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False


def mapped() -> list[Range]:
    """The process's private, anonymous, writable memory, as (start, end) in ascending order."""
    found: list[Range] = []
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        # start-end perms offset device inode, and a path where there is a file or a name for it
        entry = re.fullmatch(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*(\[heap\]|\[anon:[^\]]*\])?", line)
        if entry:
            found.append((int(entry[1], 16), int(entry[2], 16)))
    return found


def since(before: list[Range], now: list[Range]) -> Iterator[Range]:
    """What of ``now`` does not lie in ``before``; both ascending and without overlaps."""
    rest = iter(before)
    old = next(rest, None)
    for start, end in now:
        while start < end:
            while old is not None and old[1] <= start:
                old = next(rest, None)
            if old is None or old[0] >= end:
                yield start, end
                break
            if old[0] > start:
                yield start, old[0]
            start = min(old[1], end)


def used(start: int, end: int) -> Iterator[Range]:
    """What of a range, in whole huge pages, is in use: runs of huge pages that have memory behind half of them.

    Raises:
        OSError: the system hides a process's pages from it.
    """
    page = mmap.PAGESIZE
    first, last = -(-start // HUGE), end // HUGE
    if first >= last:
        return
    with _PAGES.open("rb") as entries:
        entries.seek(first * HUGE // page * 8)
        words = np.fromfile(entries, np.uint64, (last - first) * HUGE // page)
    if words.size < (last - first) * HUGE // page:
        raise OSError("the process's pages cannot be read")
    half = (words.reshape(last - first, -1) >> np.uint64(63)).mean(axis=1) >= 0.5  # the last bit: present
    edges = np.flatnonzero(np.diff(half, prepend=False, append=False))
    for low, high in edges.reshape(-1, 2):
        yield (first + int(low)) * HUGE, (first + int(high)) * HUGE


def gather(ranges: Iterable[Range]) -> int:
    """Move what is used of these ranges into huge pages; bytes that were.

    A request that the kernel does not grant changes nothing.

    Raises:
        OSError: as :func:`used`.
    """
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for start, end in ranges:
        low, high = -(-start // HUGE) * HUGE, end // HUGE * HUGE
        if low >= high or madvise(low, high - low, _MADV_HUGEPAGE):
            continue
        # A call ends at the first huge page without memory, and each waits for all processors: so one a run.
        for first, last in used(low, high):
            if madvise(first, last - first, _MADV_COLLAPSE) == 0:
                moved += last - first
    return moved


class Gatherer:
    """Gathers what is mapped while it is entered: while a session is made, and in its first runs, once those are over.

    By then onnxruntime has all the memory that it computes in; moving it takes about as long as it takes to fill.
    """

    def __init__(self, runs: int = 2, *, on: bool = True) -> None:
        self._left = runs + 1 if on and wanted() else 0
        self._before: list[Range] = []
        self._own: list[Range] = []

    def __enter__(self) -> None:
        if self._left:
            self._before = mapped()

    def __exit__(self, *_: object) -> None:
        if not self._left:
            return
        self._own += since(self._before, mapped())
        self._left -= 1
        if not self._left:
            with contextlib.suppress(OSError):
                gather(self._own)
