"""Tables as Markdown and as LaTeX."""

from __future__ import annotations

import re

from ..report import markdown_table
from ._tables import DASH, Table

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    DASH: "--",
}


def escape(text: str) -> str:
    """Return text whose characters LaTeX prints instead of obeying them.

    Example:
        >>> print(escape("50 % of a_b & {c}"))
        50 \\% of a\\_b \\& \\{c\\}
    """
    return "".join(_ESCAPES.get(character, character) for character in text)


def markdown(table: Table) -> str:
    """Return a table with its title and note as Markdown; the first column is flush left."""
    rows = [list(table.cells.columns), *table.cells.itertuples(index=False, name=None)]
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    return f"### {table.title}\n\n{table.note}\n\n{markdown_table(cells)}"


def latex_table(table: Table, caption: str = "") -> str:
    """Return a table in the style of the package booktabs.

    Args:
        table: the table.
        caption: text before the title in the caption.
    """
    head, *lines = (
        " & ".join(map(_latex_cell, row))
        for row in [list(table.cells.columns), *table.cells.itertuples(index=False, name=None)]
    )
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


def _latex_cell(text: str) -> str:
    bold = re.fullmatch(r"\*\*(.*)\*\*", text)
    inner = re.sub(r"^[+-](?=\d)", lambda sign: f"${sign[0]}$", escape(bold[1] if bold else text))
    return rf"\textbf{{{inner}}}" if bold else inner
