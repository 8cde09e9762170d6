"""RecBole atomic files: tab-separated text under a header of ``name:type`` columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TYPES = frozenset({"token", "token_seq", "float", "float_seq"})


@dataclass(frozen=True)
class AtomicFile:
    """A file read whole; fields are kept as text, without surrounding blanks.

    Args:
        path: where it was read, for error messages.
        columns: name -> type, in the file's order.
        rows: one tuple of fields a data line, in the file's order.
        lines: each row's line number in the file, from 1.
    """

    path: Path
    columns: dict[str, str]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]

    def require(self, **needed: str) -> None:
        """Check that columns exist with a type.

        Args:
            needed: column name -> type.

        Raises:
            ValueError: naming every column that is missing or has another type, the file, and the columns found.
        """
        missing = [f"{name}:{kind}" for name, kind in needed.items() if self.columns.get(name) != kind]
        if missing:
            raise ValueError(
                f"{self.path} lacks the column(s) {', '.join(missing)}; its header has {self.header()}. "
                "The header must be tab-separated name:type pairs"
            )

    def header(self) -> str:
        """Return the columns as the file's header spells them, separated by commas."""
        return ", ".join(f"{name}:{kind}" for name, kind in self.columns.items())

    def first_column(self, names: Sequence[str]) -> str | None:
        """Return the first of ``names`` that the file has, or ``None``."""
        return next((name for name in names if name in self.columns), None)

    def column(self, name: str) -> Iterator[str]:
        """Iterate over one column's fields."""
        index = list(self.columns).index(name)
        return (row[index] for row in self.rows)


def read_atomic(path: Path) -> AtomicFile:
    """Read an atomic file.

    Args:
        path: the file; UTF-8, with or without a byte-order mark, either kind of line end. Empty lines are skipped.

    Raises:
        ValueError: if it is not UTF-8, its header is not ``name:type`` pairs, or a line has another number of fields.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    # str.splitlines would also split at separators such as U+0085 and U+2028, which occur inside titles.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    columns: dict[str, str] = {}
    for cell in lines[0].split("\t"):
        name, _, kind = cell.strip().rpartition(":")
        if not name or kind not in TYPES or name in columns:
            raise ValueError(
                f"{path}, line 1: {cell!r} is no unique column of the form name:type with a type of "
                f"{', '.join(sorted(TYPES))}; the header must be such pairs separated by tabs"
            )
        columns[name] = kind
    rows: list[tuple[str, ...]] = []
    numbers: list[int] = []
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        row = tuple(field.strip() for field in line.split("\t"))
        if len(row) != len(columns):
            raise ValueError(
                f"{path}, line {number}: {len(row)} tab-separated fields where the header has {len(columns)}"
            )
        rows.append(row)
        numbers.append(number)
    return AtomicFile(path, columns, tuple(rows), tuple(numbers))
