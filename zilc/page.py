"""One self-contained HTML page: a picture of the levelled graph, and the energies of traces.

The page's HTML, style and script are files of the package (``zilc/web``), with D3 beside them; the data goes in as
JSON.  The page asks for nothing from anywhere, and its content security policy forbids it to.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from zilc.tracing import Trace

#: Marker in page.html -> the file that takes its place.
_PARTS = {"style": "page.css", "library": "d3.min.js", "script": "page.js"}


def page(picture: Mapping[str, Any], traces: Sequence[Trace] = ()) -> str:
    """The page as text.

    Args:
        picture: what :func:`zilc.picture.draw` gives.
        traces: runs of the dynamics on the same model and batch, the one of interest first.
    """
    data = {**picture, "traces": [wave(t) for t in traces]}
    title = f"{'Traces' if traces else 'Levels'} of {picture['model']}"
    filled = {"title": html.escape(title), "data": as_script(data)}
    template = read("page.html")
    # Split first, fill afterwards: what is filled in is never searched for markers.
    pieces = re.split(r"<!--\s*zilc:(\w+)\s*-->", template)
    for k in range(1, len(pieces), 2):
        name = pieces[k]
        pieces[k] = filled[name] if name in filled else read(_PARTS[name])
    return "".join(pieces)


def read(name: str) -> str:
    """A file of ``zilc/web``."""
    return resources.files("zilc").joinpath("web", name).read_text("utf-8")


def as_script(data: Any) -> str:
    """JSON that may stand in a script element: no name can end it or open another."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def wave(trace: Trace) -> dict[str, Any]:
    """What the page shows of a trace: each quantity by step and level.

    Numbers are given to four digits; ``null`` is what has overflowed.
    """
    learning: dict[int, list[str]] = {}
    for name, (_, t) in trace.parameters.items():
        learning.setdefault(t, []).append(name)
    return {
        "algorithm": trace.algorithm,
        "steps": trace.steps,
        "gamma": trace.gamma,
        "update_at": trace.update_at,
        "identities": trace.identities,
        "losses": trace.losses,
        "energy": _rows(trace.by_level("energy")),
        "error": _rows(trace.by_level("error")),
        "movement": _rows(trace.by_level("movement")),
        "learning": [[t, len(names)] for t, names in sorted(learning.items())],
        "parameters": {name: t for name, (_, t) in trace.parameters.items()},
        "notes": trace.notes,
    }


def _rows(values: np.ndarray) -> list[list[float | None]]:
    return [[_short(float(v)) for v in row] for row in values]


def _short(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return 0 if value == 0 else float(f"{value:.3e}")
