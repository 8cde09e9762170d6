"""The map of the library in the documentation: every place on it exists, and every module has a place."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([\w/]+(?:\.py|\.css|/))`", PAGE))


def test_every_place_exists() -> None:
    assert NAMED
    assert {name for name in NAMED if not (ROOT / name).exists() and not (ROOT / "gradsub" / name).exists()} == set()


def test_every_module_has_a_place() -> None:
    """A package counts as one module: its folder, or a file of it."""
    missing = set()
    for path in (ROOT / "gradsub").iterdir():
        if path.suffix == ".py" and path.name != "__init__.py":
            missing |= {path.name} - NAMED
        elif (path / "__init__.py").exists() and not any(name.startswith(f"{path.name}/") for name in NAMED):
            missing.add(f"{path.name}/")
    assert missing == set(), "docs/architecture.md: say under 'To change X, open Y' what one would change there"
