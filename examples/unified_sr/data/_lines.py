"""Text files read line by line, compressed or not, so that a file may be larger than the memory."""

from __future__ import annotations

import ast
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHOWN = 80
"""Characters of a bad line that an error message quotes."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line.

    Args:
        path: UTF-8, with or without a byte-order mark, either kind of line end; compressed if the name ends in .gz.

    Raises:
        ValueError: naming the line that is not UTF-8, or a compressed file that is damaged or cut off.
    """
    number = 0
    try:
        # Binary, because a text file splits lines at characters that JSON allows inside strings, and cannot say in
        # which line a byte is not UTF-8.
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 text ({error.reason}); convert the file first") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut off after line {number} ({error}); fetch it again") from error


@dataclass(frozen=True, slots=True)
class Record:
    """The object of one line, with its place for error messages."""

    path: Path
    line: int
    fields: Mapping[str, Any]

    @property
    def where(self) -> str:
        """The place as messages spell it."""
        return f"{self.path}, line {self.line}"

    def text(self, name: str) -> str:
        """Return a field that must be text or a whole number and not empty.

        Raises:
            ValueError: naming the place, the field and what was found.
        """
        value = self.fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value:
            raise ValueError(f"{self.where}: {self._lacks(name)} text that is not empty")
        return value

    def number(self, name: str) -> float:
        """Return a field that must be a finite number.

        Raises:
            ValueError: naming the place, the field and what was found.
        """
        value = self.fields.get(name)
        try:
            number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        except OverflowError:  # an integer beyond all floats
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{self.where}: {self._lacks(name)} a finite number")
        return number

    def _lacks(self, name: str) -> str:
        found = f"{name!r} is {self.fields[name]!r}" if name in self.fields else f"the field {name!r} is missing"
        return f"{found}; it must be"


def read_records(path: Path, *, literals: bool = False) -> Iterator[Record]:
    """Yield the object of each line that is not empty.

    Args:
        path: see ``read_lines``.
        literals: whether a line may also be a Python literal, as in Amazon's metadata of 2014.

    Raises:
        ValueError: naming the line that is no object.
    """
    for number, line in read_lines(path):
        if not line or line.isspace():
            continue
        try:
            fields = _parse(line, literals)
        except (ValueError, SyntaxError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error}): {line[:SHOWN]!r}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{path}, line {number}: no JSON object with named fields: {line[:SHOWN]!r}")
        yield Record(path, number, fields)


def _parse(line: str, literals: bool) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        if not literals:
            raise
    return ast.literal_eval(line.strip())
