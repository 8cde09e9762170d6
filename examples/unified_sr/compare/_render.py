"""Tables as Markdown and as LaTeX."""

from __future__ import annotations

from ..report import markdown_table
from ._tables import Cell, Table

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
}


def escape(text: str) -> str:
    """Return text whose characters LaTeX prints instead of obeying them.

    Example:
        >>> print(escape("50 % of a_b & {c}"))
        50 \\% of a\\_b \\& \\{c\\}
    """
    return "".join(_ESCAPES.get(character, character) for character in text)


def markdown(table: Table) -> str:
    """Return a table with its title and note as Markdown; the best of a column is bold, what is missing a dash."""
    cells = [[_plain(name) for name in table.header]]
    cells += [[_markdown_cell(cell) for cell in row] for row in table.rows]
    return f"### {table.title}\n\n{table.note}\n\n{markdown_table(cells)}"


def latex_table(table: Table, caption: str = "") -> str:
    """Return a table in the style of the package booktabs.

    Args:
        table: the table.
        caption: text before the title in the caption.
    """
    head = " & ".join(map(escape, table.header))
    lines = [" & ".join(map(_latex_cell, row)) + r" \\" for row in table.rows]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{escape(f'{caption}{table.title}. {table.note}')}}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
            r"    \toprule",
            rf"    {head} \\",
            r"    \midrule",
            *(f"    {line}" for line in lines),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )


def _markdown_cell(cell: Cell) -> str:
    if cell.missing:
        return "–"
    text = _plain(cell.text) if cell.text else _number(cell, " ± ")
    return f"**{text}**" if cell.best else text


def _latex_cell(cell: Cell) -> str:
    if cell.missing:
        return "--"
    text = escape(cell.text) if cell.text else _number(cell, r" $\pm$ ").replace("+", "$+$")
    if text.startswith("-"):
        text = f"${text[0]}${text[1:]}"
    return rf"\textbf{{{text}}}" if cell.best else text


def _number(cell: Cell, between: str) -> str:
    assert cell.mean is not None
    text = format(cell.mean, cell.form)
    return text if cell.deviation is None else f"{text}{between}{format(cell.deviation, cell.form.lstrip('+'))}"


def _plain(text: str) -> str:
    return text.replace("|", r"\|")
