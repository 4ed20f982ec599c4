"""Numbers of bytes, as people write and read them."""

from __future__ import annotations

import re

from zilc.errors import OptionError

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip


def parse_size(size: int | str, where: str) -> int:
    """Bytes from a number, or from text such as ``512MiB`` (2^20 bytes each) or ``1.5GB`` (10^9 bytes each).

    Args:
        where: the option, for the message.

    Raises:
        OptionError: not a size, or less than one byte.
    """
    text = str(size).strip()
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)", text)
    factor = _UNITS.get(found[2].lower()) if found else None
    if isinstance(size, bool) or found is None or factor is None:
        raise OptionError(
            f"'{text}' is no size", where=where, hint="Write bytes, or a number with a unit: 512MiB, 1.5GB."
        )
    value = int(found[1]) if found[1].isdigit() else float(found[1])  # large whole numbers stay exact
    settled = int(value * factor)
    if settled < 1:
        raise OptionError(f"'{text}' is less than one byte", where=where)
    return settled


def show_size(count: float) -> str:
    """``17.3 MiB``; below one KiB ``512 B``."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
