"""A folder with the comparison: Markdown, LaTeX, a plot a data set, and the answer in one small file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..tables import gather
from ._groups import group_runs, tasks_of, with_data_apart
from ._plot import chosen_methods, draw, trade
from ._render import latex_table, markdown
from ._tables import tables_of, title_of
from ._tests import LANGUAGE_MODEL, against, baselines_of, values_of

FILES = ("comparison.md", "comparison.tex", "summary.json")
SUMMARY_METRIC = "ndcg@10"


def compare(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    baseline: str | None = None,
    metric: str = SUMMARY_METRIC,
    drawn: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """Compare finished runs.

    Args:
        paths: folders of runs, of a grid, or of what ``pack`` wrote.
        out: the folder to write into.
        baseline: the method that the others are tested against; by default those of ``baselines_of`` for each task.
        metric: that is tested and drawn; ``summary.json`` always has NDCG@10.
        drawn: labels of the methods in the plots, as far as a data set has them; by default those of
            ``chosen_methods``.
        say: prints a line to the user.

    Returns:
        The Markdown file.

    Raises:
        FileNotFoundError: if a folder is not there.
        ValueError: if there is no finished run on the test split, or runs cannot be compared.
    """
    runs, steps, queries = gather(paths, say=say)
    runs = with_data_apart(runs, queries)
    tested, trials = runs[runs["split"] == "test"], runs[runs["split"] != "test"]
    if tested.empty:
        raise ValueError("all finished runs were evaluated on the validation split; a comparison needs the test split")
    known = [name for name in queries.columns if name not in ("run", "task", "query")]
    if metric not in known:
        raise ValueError(f"no run has the metric {metric!r}; there are {', '.join(known)}")
    unknown = [name for name in drawn if name not in set(tested["label"])]
    if unknown:
        raise ValueError(
            f"there is no method {unknown[0]!r} to draw; there are {', '.join(sorted(set(tested['label'])))}"
        )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text, tex, rows = ["# Comparison"], [r"% \usepackage{booktabs}"], []
    for name, members in tested.groupby("data", sort=True):
        groups = group_runs(members, metric)
        tests = {task: _tests(groups, queries, task, metric, baseline) for task in tasks_of(groups)}
        mine = steps[steps["run"].isin(groups["run"])]
        tables = tables_of(groups, mine, trials[trials["data"] == name], tests, metric)
        text += [f"## {name}", *map(markdown, tables)]
        tex += [latex_table(table, f"{name}: ") for table in tables]
        file = folder / f"{re.sub(r'[^A-Za-z0-9.-]', '-', str(name))}.png"
        found = trade(groups, metric)
        title = f"{name}: {title_of(metric)} against what general text has lost"
        if draw(found, chosen_methods(found, drawn), metric, title, file):
            text.append(f"![{title}]({file.name})")
        if metric != SUMMARY_METRIC or baseline is not None:
            tests = {task: _tests(groups, queries, task, SUMMARY_METRIC, None) for task in tests}
        rows += summary_of(groups, queries, tests)
    contents = ("\n\n".join(text) + "\n", "\n\n".join(tex) + "\n", _json(rows))
    for file_name, content in zip(FILES, contents, strict=True):
        (folder / file_name).write_text(content, encoding="utf-8")
    return folder / FILES[0]


def _tests(groups: pd.DataFrame, queries: pd.DataFrame, task: str, metric: str, baseline: str | None) -> pd.DataFrame:
    values = values_of(groups, queries, task, metric)
    if baseline is not None and baseline not in values:
        raise ValueError(f"there is no method {baseline!r} to compare with; there are {', '.join(values)}")
    best = baselines_of(groups, values, tasks_of(groups)).values() if baseline is None else [baseline]
    return against(values, list(dict.fromkeys(best)))


def summary_of(groups: pd.DataFrame, queries: pd.DataFrame, tests: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Return the answer for one data set, an entry a method.

    ``p_rec`` and ``p_search`` are of the paired t-test over queries against the best group that trains a language model
    on all tasks and is no variant of GEMS, with Holm's correction over all methods; ``None`` for that group itself and
    for what does not serve the task. ``perplexity_ratio`` is after / before.

    Args:
        groups: of ``group_runs``.
        queries: rows of ``queries.parquet``.
        tests: task -> tests of NDCG@10 against the best baselines.
    """
    p_values: dict[str, dict[str, float]] = {}
    for task, found in tests.items():
        values = values_of(groups, queries, task, SUMMARY_METRIC)
        family = found[found["baseline"] == baselines_of(groups, values, list(tests)).get(LANGUAGE_MODEL)]
        p_values[task] = dict(zip(family["group"], family["t_test_holm"], strict=True))
    rows = []
    for group, runs in groups.groupby("group", sort=False):
        measured = {task: _known(runs.get(f"{task}_{SUMMARY_METRIC}")) for task in ("rec", "search")}
        rows.append(
            {
                "data": runs["data"].iloc[0],
                "method": group,
                "seeds": len(runs),
                **{f"{task}_{SUMMARY_METRIC}": value for task, value in measured.items()},
                "perplexity_ratio": _known(runs["perplexity"] / runs["perplexity_before"]),
                **{f"p_{task}": _known(p_values.get(task, {}).get(group)) for task in ("rec", "search")},
            }
        )
    return rows


def _known(values: Any) -> float | None:
    """The mean of what was measured, with six digits."""
    known = pd.Series([] if values is None else values, dtype=float).dropna()
    return None if known.empty else float(f"{known.mean():.6g}")


def _json(rows: Sequence[dict[str, Any]]) -> str:
    lines = ",\n".join(f" {json.dumps(row, ensure_ascii=False, allow_nan=False)}" for row in rows)
    return f"[\n{lines}\n]\n"
