"""What tests of several passes need."""

from __future__ import annotations

from typing import Any

import pytest

from zilc.lowerings import Lowerings


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Winograd's form wherever there is one."""
    choose = Lowerings.choose

    def winograd(self: Lowerings, op: Any, kind: str, site: str, operands: Any, candidates: Any) -> tuple[str, str]:
        found = choose(self, op, kind, site, operands, candidates)
        names = [name for name in candidates if name.startswith("winograd")]
        return (names[0], "fitted") if names else found

    monkeypatch.setattr(Lowerings, "choose", winograd)
