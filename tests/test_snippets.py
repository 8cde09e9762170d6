"""Everything that the documentation shows as code runs: fenced Python blocks and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import io
import pkgutil
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gradsub

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = ["gradsub", *sorted(info.name for info in pkgutil.walk_packages(gradsub.__path__, prefix="gradsub."))]

# A fence may be indented (inside a list) and carry attributes after the language.
FENCE = re.compile(
    r"^(?P<indent>[ \t]*)```(?P<language>python|diff|text)(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```[ \t]*$",
    re.M | re.S,
)
# What the site's Markdown understands; after anything else it prints the fence and its code as running text.
INFO = re.compile(r"( title=(['\"]).*\2| \{( ?\.[a-z][a-z0-9_-]*)+ ?\})?")
# The comment above a block of text that the last program printed.
PRINTED = re.compile(r"<!-- printed by the program above, within (?P<percent>\d+) % -->\n*\Z")
NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?", re.I)
SIDES = (("before", "-"), ("after", "+"))
WIDTH = 88  # characters of code that the site shows in a line


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    code: str
    classes: frozenset[str]
    within: float | None = None  # of a block of text: it was printed, and its numbers are right within this share

    @property
    def missing(self) -> list[str]:
        """The packages that the block needs (``{.needs-peft}``) and that are not installed."""
        needs = [name.removeprefix("needs-").replace("-", "_") for name in self.classes if name.startswith("needs-")]
        return [name for name in needs if importlib.util.find_spec(name) is None]

    @property
    def run(self) -> bool:
        return self.language != "text" and "no-run" not in self.classes and not self.missing

    def sides(self) -> dict[str, str]:
        """The programs in it: a Python block is one, a diff the one before and the one after."""
        if self.language == "python":
            return {"": self.code}
        lines = self.code.splitlines()
        return {side: "\n".join(line[1:] if line[:1] in (" ", sign) else "" for line in lines) for side, sign in SIDES}


def blocks_of(text: str) -> Iterator[Block]:
    for match in FENCE.finditer(text):
        lines = match["code"].splitlines()
        code = "\n".join(line.removeprefix(match["indent"]) for line in lines)
        printed = PRINTED.search(text, 0, match.start())
        yield Block(
            text.count("\n", 0, match.start("code")),
            match["language"],
            code,
            frozenset(re.findall(r"\.([a-z][a-z0-9_-]*)", match["info"])),
            int(printed["percent"]) / 100 if printed else None,
        )


def run_page(page: Path) -> int:
    """Run a page's blocks in order in one namespace, as a reader would paste them; the number of blocks run.

    Both sides of a diff run, each in a copy of the namespace. What a program printed is held against the text below it.
    """
    namespace: dict[str, Any] = {"__name__": "__snippet__"}
    count, output = 0, ""
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.within is not None:
            compare(output, block.code, block.within, f"{page.name}:{block.line}")
        if not block.run:
            continue
        count += 1
        for side, code in block.sides().items():
            with redirect_stdout(io.StringIO()) as stream:
                # The empty lines make a traceback point at the line of the page.
                program = compile("\n" * block.line + code, f"{page} {side}".strip(), "exec")
                exec(program, {**namespace} if side else namespace)
            output = stream.getvalue()
    return count


def compare(output: str, shown: str, within: float, where: str) -> None:
    """Hold what a page shows against what its program printed: the words are equal, the numbers within that share."""

    def parts(text: str) -> tuple[list[str], list[float]]:
        words = NUMBER.sub("#", text).split()
        return words, [float(number.replace(",", "")) for number in NUMBER.findall(text)]

    words, numbers = parts(output)
    shown_words, shown_numbers = parts(shown)
    assert words == shown_words, f"{where} shows other words than its program prints:\n{output}"
    for found, expected in zip(numbers, shown_numbers, strict=True):
        assert found == pytest.approx(expected, rel=within), f"{where} shows {expected}, its program prints:\n{output}"


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


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/howto-two-tasks.md", "docs/coming-from.md"])
def test_pages_that_teach_have_snippets(name: str) -> None:
    assert [block for block in blocks_of((ROOT / name).read_text(encoding="utf-8")) if block.run]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name: str) -> None:
    run_doctests(importlib.import_module(name))


def page_of(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


def test_a_broken_block_fails_and_names_its_line(tmp_path: Path) -> None:
    page = page_of(tmp_path, "Text\n\n```python\nx = 1\n```\n\n```python\nx + 1\nundefined_name\n```\n")
    with pytest.raises(NameError, match="undefined_name") as error:
        run_page(page)
    assert error.traceback[-1].lineno + 1 == 9  # lineno counts from 0


def test_blocks_share_a_namespace_and_only_an_explicit_mark_skips(tmp_path: Path) -> None:
    text = (
        "```python {.no-run}\nraise RuntimeError\n```\n"
        "- a list\n\n    ```python title='first'\n    x = 1\n    if x:\n        y = 2\n    ```\n"
        "```bash\nexit 1\n```\n"
        "```python {.needs-no_such_package}\nraise RuntimeError\n```\n"
        "```python\nassert (x, y) == (1, 2)\n```\n"
    )
    assert run_page(page_of(tmp_path, text)) == 2


def test_both_sides_of_a_diff_run_and_leave_nothing_behind(tmp_path: Path) -> None:
    text = "```python\nran = []\n```\n```diff\n-x = 1\n+x = 2\n ran.append(x)\n```\n"
    assert run_page(page_of(tmp_path, text + "```python\nassert ran == [1, 2] and 'x' not in globals()\n```\n")) == 3
    with pytest.raises(NameError):
        run_page(page_of(tmp_path, text + "```diff\n-1\n+undefined\n```\n"))


@pytest.mark.parametrize(
    ("prints", "shows", "right"),
    [
        ("loss 1.05 of 1,000", "loss 1.00 of 1000", True),
        ("loss 1.25 of 1,000", "loss 1.00 of 1000", False),
        ("gain 1.05 of 1,000", "loss 1.00 of 1000", False),
        ("loss 1.05", "loss 1.00 of 1000", False),
        ("loss -1.00", "loss 1.00", False),
        ("1e-7", "1.1e-7", True),
    ],
)
def test_what_a_page_shows_is_what_its_program_prints(prints: str, shows: str, right: bool, tmp_path: Path) -> None:
    comment = "<!-- printed by the program above, within 10 % -->"
    page = page_of(tmp_path, f"```python\nprint({prints!r})\n```\n\nThis prints\n\n{comment}\n```text\n{shows}\n```\n")
    if right:
        assert run_page(page) == 1
    else:
        with pytest.raises(AssertionError, match=r"page.md:8 shows"):
            run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_site_shows_every_block_as_code(page: Path) -> None:
    """An attribute that its Markdown does not know turns the fence, and the page behind it, into running text."""
    text = page.read_text(encoding="utf-8")
    assert [match[0] for match in FENCE.finditer(text) if not INFO.fullmatch(match["info"])] == []
    printed = [block for block in blocks_of(text) if block.within is not None]
    assert len(printed) == len(re.findall(r"<!-- printed", text)), "a comment above no block of text compares nothing"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_no_line_of_code_is_wider_than_a_page(page: Path) -> None:
    fences = re.findall(r"^```.*?^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = [line for fence in fences for line in fence.splitlines()]
    assert [line for line in lines if len(line) > WIDTH] == []


def test_a_wrong_docstring_example_fails() -> None:
    module = ModuleType("wrong")
    module.__doc__ = "An example.\n\n>>> 1 + 1\n3\n"
    with pytest.raises(pytest.fail.Exception, match="Expected:"):
        run_doctests(module)
