"""A package is entered by its door: no module takes a private name of the library, or of another package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The dotted names that a module imports, from the root of the repository."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def foreign(path: Path) -> list[str]:
    """The private names among them whose package the module does not lie in."""
    package = path.relative_to(ROOT).parts[:-1]
    found = []
    for name in imported(path):
        parts = tuple(name.split("."))
        private = [place for place, part in enumerate(parts) if part.startswith("_") and not part.startswith("__")]
        if parts[0] in ("gradsub", "examples", "benchmarks") and any(parts[:n] != package[:n] for n in private):
            found.append(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_takes_a_private_name_of_another_package(path: Path) -> None:
    assert foreign(path) == []


def test_such_a_name_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    module = tmp_path / "examples" / "room" / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text("from ._own import x\nfrom ..other._their import y\nfrom gradsub import _z\n", encoding="utf-8")
    assert foreign(module) == ["examples.other._their.y", "gradsub._z"]
