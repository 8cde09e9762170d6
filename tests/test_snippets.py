"""Everything that the documentation shows as code runs: fenced Python blocks and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gradsub

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = ["gradsub", *sorted(info.name for info in pkgutil.walk_packages(gradsub.__path__, prefix="gradsub."))]

# A fence may be indented (inside a list) and carry an info string after the language.
FENCE = re.compile(r"^(?P<indent>[ \t]*)```python(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```[ \t]*$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    line: int
    code: str
    run: bool


def blocks_of(text: str) -> Iterator[Block]:
    for match in FENCE.finditer(text):
        lines = match["code"].splitlines()
        code = "\n".join(line.removeprefix(match["indent"]) for line in lines)
        yield Block(text.count("\n", 0, match.start("code")), code, run="no-run" not in match["info"].split())


def run_page(page: Path) -> int:
    """Run a page's blocks in order in one namespace, as a reader would paste them; the number of blocks run."""
    namespace: dict[str, Any] = {"__name__": "__snippet__"}
    blocks = [block for block in blocks_of(page.read_text(encoding="utf-8")) if block.run]
    for block in blocks:
        # The empty lines make a traceback point at the line of the page.
        exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
    return len(blocks)


def run_doctests(module: ModuleType) -> doctest.TestResults:
    """Run the examples in a module's docstrings; fails with doctest's own report of expected and got."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=report.append)
    if runner.failures:
        pytest.fail("".join(report), pytrace=False)
    return doctest.TestResults(runner.failures, runner.tries)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/howto-two-tasks.md"])
def test_pages_that_teach_have_snippets(name: str) -> None:
    assert [block for block in blocks_of((ROOT / name).read_text(encoding="utf-8")) if block.run]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name: str) -> None:
    run_doctests(importlib.import_module(name))


def test_a_broken_block_fails_and_names_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text\n\n```python\nx = 1\n```\n\n```python\nx + 1\nundefined_name\n```\n")
    with pytest.raises(NameError, match="undefined_name") as error:
        run_page(page)
    assert error.traceback[-1].lineno + 1 == 9  # lineno counts from 0


def test_blocks_share_a_namespace_and_only_an_explicit_mark_skips(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python no-run\nraise RuntimeError\n```\n"
        "- a list\n\n    ```python title='first'\n    x = 1\n    if x:\n        y = 2\n    ```\n"
        "```bash\nexit 1\n```\n"
        "```python\nassert (x, y) == (1, 2)\n```\n"
    )
    assert run_page(page) == 2


def test_a_wrong_docstring_example_fails() -> None:
    module = ModuleType("wrong")
    module.__doc__ = "An example.\n\n>>> 1 + 1\n3\n"
    with pytest.raises(pytest.fail.Exception, match="Expected:"):
        run_doctests(module)
