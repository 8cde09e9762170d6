"""Tables of text, of which reports and summaries print some."""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST = 48


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[bool]) -> str:
    """Columns as wide as what stands in them, without those that are empty; the first column is of names.

    Args:
        numbers: which columns are flush right.
    """
    kept = [place for place in range(len(head)) if not rows or any(row[place] for row in rows)]
    lines = [[head[place] for place in kept], *([_cell(row, place) for place in kept] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *others = aligned(lines, [numbers[place] for place in kept])
    return "\n".join([first, "-" * (sum(widths) + 2 * (len(widths) - 1)), *others])


def aligned(lines: Sequence[Sequence[str]], numbers: Sequence[bool]) -> list[str]:
    """The lines, with columns as wide as what stands in them; those of numbers are flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in lines
    ]


def _cell(row: Sequence[str], place: int) -> str:
    """Of a long name in the first column its end, which tells layers apart."""
    text = row[place]
    return text if place or len(text) <= _LONGEST else f"...{text[3 - _LONGEST :]}"


def megabytes(count: float) -> str:
    """Bytes as a cell, in units of which there are few."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B" if count else ""


def finite_or_none(value: object) -> object:
    """The same where JSON has a token for each number in it; None in the place of NaN and Inf."""
    if isinstance(value, dict):
        return {key: finite_or_none(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(each) for each in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value
