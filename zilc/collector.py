"""Python's collector of reference cycles, at rest while a graph is compiled."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def paused(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, with the collector at rest while it runs.

    Nodes and tensors name each other, so a graph is one large cycle, and all of it lives until its pass ends: the
    collector would go over every object again and again, a third of the time, and free nothing.  What passes leave
    behind is freed afterwards.  Where the collector is off already, it stays off.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not gc.isenabled():
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return run
