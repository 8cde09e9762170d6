"""Tables as Markdown and as LaTeX."""

from __future__ import annotations

import re

from ..report import markdown_table
from ._tables import DASH, Table

_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", DASH: "--"}
)


def escape(text: str) -> str:
    """Return text whose characters LaTeX prints instead of obeying them.

    Example:
        >>> print(escape("50 % of a_b & {c}"))
        50 \\% of a\\_b \\& \\{c\\}
    """
    return text.translate(_ESCAPES)


def markdown(table: Table) -> str:
    """Return a table with its title and note as Markdown; the first column is flush left."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in _rows(table)]
    return f"### {table.title}\n\n{table.note}\n\n{markdown_table(cells)}"


def latex_table(table: Table, caption: str = "") -> str:
    """Return a table in the style of the package booktabs.

    Args:
        table: the table.
        caption: text before the title in the caption.
    """
    head, *lines = (" & ".join(map(_latex_cell, row)) for row in _rows(table))
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{escape(f'{caption}{table.title}. {table.note}')}}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(table.cells.columns) - 1)}}}",
            r"    \toprule",
            rf"    {head} \\",
            r"    \midrule",
            *(rf"    {line} \\" for line in lines),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )


def _rows(table: Table) -> list[list[str]]:
    return [list(table.cells.columns), *table.cells.to_numpy().tolist()]


def _latex_cell(text: str) -> str:
    bold = re.fullmatch(r"\*\*(.*)\*\*", text)
    inner = re.sub(r"^[+-](?=\d)", lambda sign: f"${sign[0]}$", escape(bold[1] if bold else text))
    return rf"\textbf{{{inner}}}" if bold else inner
