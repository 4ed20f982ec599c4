"""What zilc raises: every message says where, what, what was expected, and what to do.

    Exception
    ├── ZilcError                 something about the input or the request; the CLI prints one line, exit 1
    │   ├── ModelError            a model that zilc does not accept
    │   │   └── MissingRule       operators without a VJP rule on a path to a trained leaf
    │   ├── OptionError           an option or argument whose value does not fit the model
    │   ├── DataError             arrays that do not fit the training graph's inputs
    │   ├── FileError             a file that cannot be read or written
    │   ├── RuntimeMissing        a library or execution provider that is not there
    │   └── RequiresError         a pass was handed a graph outside its contract
    └── EnsuresError              a pass broke its own promise: a bug in zilc, keeps its traceback
"""

from __future__ import annotations

from collections.abc import Sequence


class ZilcError(Exception):
    """An error of the input.  ``str(error)`` is one line, ``where: what; hint``.

    Args:
        what: what is wrong, and what was expected.
        where: the place: a file, a vertex, an option.
        hint: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        text = f"{where}: {what}" if where else what
        if hint:
            text = f"{text.rstrip('.')}. {hint}"
        super().__init__(" ".join(text.split()))


class ModelError(ZilcError):
    """A model that zilc does not accept."""


class MissingRule(ModelError):
    """Operators on a path to a trained leaf that have no VJP rule; all of a model's at once.

    Args:
        places: one description a vertex, as :func:`describe_vertex` makes them.
    """

    def __init__(self, places: Sequence[str], *, where: str | None = None) -> None:
        self.places = list(places)
        shown = "; ".join(self.places[:8]) + (
            f"; and {len(self.places) - 8} more" if len(self.places) > 8 else ""
        )
        noun = "vertex has" if len(self.places) == 1 else "vertices have"
        super().__init__(
            f"{len(self.places)} {noun} no VJP rule for an operand on a path to a trained leaf: {shown}",
            where=where,
            hint="'zilc ops' lists the operators covered, --rules FILE.py adds rules of yours (docs/RULES.md); "
            "--wrt and --freeze choose the trained leaves.",
        )


class OptionError(ZilcError):
    """An option or argument whose value does not fit the model."""


class DataError(ZilcError):
    """Arrays that do not fit the inputs of the training graph."""


class FileError(ZilcError):
    """A file that cannot be read or written."""


class RuntimeMissing(ZilcError):
    """A library or an execution provider that the request needs is not there."""


class RequiresError(ZilcError):
    """A pass was handed a graph outside its contract."""


class EnsuresError(Exception):
    """A pass broke its own promise.  This is a bug in zilc."""


def describe_vertex(name: str, op: str, *, opset: int | None = None, level: int | None = None) -> str:
    """``vertex 'block2/pool' (LpPool, opset 18, level 4)``: the one way messages name a vertex."""
    facts = [op]
    if opset is not None:
        facts.append(f"opset {opset}")
    if level is not None:
        facts.append(f"level {level}")
    return f"vertex '{name}' ({', '.join(facts)})"
