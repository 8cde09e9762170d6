"""The one table: before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import read_config
from ..run_folder import CONFIG, METRICS, SAMPLED, RunFolder

Rows = list[tuple[str, float, float]]

DASH = "–"


def result_rows(folder: RunFolder, *, sampled: bool = False) -> Rows:
    """Return (name, zero-shot, final) of Hit@10 and NDCG@10 per task; where nothing was there before, final twice."""
    metrics: dict[str, Any] = folder.read_json(SAMPLED if sampled else METRICS)
    names = {"hit@10": "Hit@10", "ndcg@10": "NDCG@10"}
    return [
        (f"{task} {label}", metrics["zero_shot"].get(task, values)[key], values[key])
        for task, values in metrics["final"].items()
        if task != "general"
        for key, label in names.items()
    ]


def perplexities(folder: RunFolder) -> tuple[float, float] | None:
    """Return perplexity on general text before and after training; ``None`` if there is no language model."""
    metrics = folder.read_json(METRICS)
    if "general" not in metrics["final"]:
        return None
    return metrics["zero_shot"]["general"]["perplexity"], metrics["final"]["general"]["perplexity"]


def change(before: float, after: float) -> str:
    """Return a relative change.

    Example:
        >>> change(40.0, 41.0)
        '+2.5 %'
    """
    return f"{100 * (after / before - 1):+.1f} %"


def result_table(folder: RunFolder) -> str:
    """Return the table of a finished run as aligned Markdown.

    The ranking columns are zero-shot against the method, over the full catalogue; perplexity is that of general text
    that the null space was not fitted on.
    """
    method = read_config(folder.file(CONFIG))["method.name"]
    trained = folder.read_json(METRICS)["zero_shot"] and method != "zero-shot"
    cells = [["", "zero-shot", method, "change"] if trained else ["", method]]
    cells += [[name, f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}"] for name, old, new in result_rows(folder)]
    found = perplexities(folder)
    if found is not None:
        old, new = found
        cells.append(["general perplexity", f"{old:.2f}", f"{new:.2f}", change(old, new)])
    return markdown_table(cells if trained else [row[:2] for row in cells])


def comparison_table(folders: Sequence[RunFolder]) -> str:
    """Return one table of finished runs, as aligned Markdown; a dash is what a method does not serve or has not.

    Args:
        folders: of runs that evaluated alike, and whose language models, where they have one, are the same. The first
            one with a model tells what the intact one scores; without any there is no such column.
    """
    found = {folder: dict(map(_named, result_rows(folder))) for folder in folders}
    measured = [folder for folder in folders if folder.read_json(METRICS)["zero_shot"]]
    intact = {name: before for name, (before, _) in found[measured[0]].items()} if measured else {}
    columns = [{name: after for name, (_, after) in rows.items()} for rows in found.values()]
    methods = [read_config(folder.file(CONFIG))["method.name"] for folder in folders]
    cells = [["", *(["zero-shot"] if measured else []), *methods]]
    for name in dict.fromkeys(name for rows in found.values() for name in rows):
        values = [*([intact.get(name)] if measured else []), *(column.get(name) for column in columns)]
        cells.append([name, *(DASH if value is None else f"{value:.4f}" for value in values)])
    if measured:
        pairs = [perplexities(folder) for folder in folders]
        first = next(pair for pair in pairs if pair is not None)
        afters = [DASH if pair is None else f"{pair[1]:.2f}" for pair in pairs]
        cells.append(["general perplexity", f"{first[0]:.2f}", *afters])
        cells.append(["its change", "", *(DASH if pair is None else change(*pair) for pair in pairs)])
    return markdown_table(cells)


def _named(row: tuple[str, float, float]) -> tuple[str, tuple[float, float]]:
    name, before, after = row
    return name, (before, after)


def markdown_table(cells: list[list[str]]) -> str:
    """Return rows, the first of which is the header, with aligned columns."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in cells
    ]
    rule = "|" + "|".join(
        "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":" for column, width in enumerate(widths)
    )
    return "\n".join([lines[0], rule + "|", *lines[1:]])
