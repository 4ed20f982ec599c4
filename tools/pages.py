"""Tables of the pages in docs/."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> list[str]:
    """A table in Markdown.

    Args:
        align: ``l`` or ``r`` by column; by default all to the left.
    """
    marks = [{"l": "---", "r": "--:"}[side] for side in align or "l" * len(header)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, marks, *rows)]
