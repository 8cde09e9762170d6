from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One layer's line: k of d directions, the share of tr(C) that they hold, and what that was measured on."""

    layer: str
    dimension: int
    protected: int
    energy: float
    kind: str
    tokens: int

    def cells(self) -> tuple[str, ...]:
        fraction = f"{self.protected / self.dimension:.3f}"
        return (
            self.layer,
            str(self.dimension),
            str(self.protected),
            fraction,
            f"{self.energy:.4f}",
            self.kind,
            str(self.tokens),
        )


def render(rows: list[Row], nbytes: int) -> str:
    """A table of fixed-width columns: a header, a line per layer, and the memory of all statistics together."""
    header = ("layer", "dimension", "protected", "fraction", "energy", "kind", "tokens")
    lines = [header, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def line_of(cells: tuple[str, ...]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *numbers])

    return "\n".join([*(line_of(line) for line in lines), f"statistics: {nbytes / 1e6:.1f} MB"])
