from __future__ import annotations

from typing import Any

import pytest

from gradsub._probe import Probes

_SHARED: dict[type, dict[Any, Any]] = {}


@pytest.fixture(autouse=True)
def _one_trial_for_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a class's steps depend on is found out once for all tests here, not at each of their constructions."""
    build = Probes.__init__

    def shared(self: Probes, base: Any) -> None:
        build(self, base)
        self._answers = _SHARED.setdefault(type(base), {})

    monkeypatch.setattr(Probes, "__init__", shared)
