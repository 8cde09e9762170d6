"""A folder with the comparison: Markdown, LaTeX, JSON and plots."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ._collect import Group, Run, collect, groups_of, tasks_of
from ._plots import draw, score
from ._render import latex_table, markdown
from ._significance import Significance, significance
from ._statistics import mean_and_deviation
from ._tables import tables_of

FILES = ("comparison.md", "comparison.tex", "comparison.json")


def compare(
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    baseline: str | None = None,
    metric: str = "ndcg@10",
    say: Callable[[str], None] = print,
) -> Path:
    """Compare finished runs.

    Args:
        paths: folders of runs, or of a grid.
        out: the folder to write into.
        baseline: label of the method that the others are tested against; by default, for each task, the best one that
            is no variant of GEMS, and the best of these that trains a model.
        metric: that is tested and drawn.
        say: prints a line to the user.

    Returns:
        The Markdown file.

    Raises:
        FileNotFoundError: if a folder is not there.
        ValueError: if there is no finished run on the test split, or runs cannot be compared.
    """
    runs, left_out = collect(list(paths))
    for folder in left_out:
        say(f"left out, since it is not finished: {folder}")
    tested = [run for run in runs if run.settings.get("eval_split", "test") == "test"]
    if not tested:
        raise ValueError("all finished runs were evaluated on the validation split; a comparison needs the test split")
    known = list(dict.fromkeys(name for run in tested for task in run.tasks for name in run.metrics["final"][task]))
    if metric not in known:
        raise ValueError(f"no run has the metric {metric!r}; there are {', '.join(known)}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text, tex, numbers = ["# Comparison"], [r"% \usepackage{booktabs}"], {}
    for data in dict.fromkeys(str(run.settings["data"]) for run in tested):
        groups = _sorted(groups_of([run for run in tested if run.settings["data"] == data]), metric)
        tasks = tasks_of(groups)
        tests = {task: significance(groups, task, metric, baseline) for task in tasks}
        trials = [run for run in runs if run not in tested and run.settings["data"] == data]
        tables = tables_of(groups, tests, metric)
        name = Path(data).name
        plots = draw(groups, trials, metric, folder, f"{re.sub(r'[^A-Za-z0-9.-]', '-', name)}-")
        text += [
            f"## {name}",
            *map(markdown, tables),
            *_differences(groups),
            *(f"![{caption}]({file})" for file, caption in plots.items()),
        ]
        tex += [latex_table(table, f"{name}: ") for table in tables]
        numbers[data] = _numbers(groups, tests, folder)
    contents = ("\n\n".join(text) + "\n", "\n\n".join(tex) + "\n", json.dumps(numbers, indent=1) + "\n")
    for file, content in zip(FILES, contents, strict=True):
        (folder / file).write_text(content, encoding="utf-8")
    return folder / FILES[0]


def _sorted(groups: Sequence[Group], metric: str) -> list[Group]:
    """The best first, and last what does not serve all tasks."""
    tasks = tasks_of(groups)

    def mean(group: Group) -> float:
        values = [value for run in group.runs if (value := score(run, tasks, metric)) is not None]
        return mean_and_deviation(values)[0] if values else float("-inf")

    return sorted(groups, key=mean, reverse=True)


def _differences(groups: Sequence[Group]) -> list[str]:
    """The settings of every method that are not the same for all methods that have them."""
    keys = dict.fromkeys(key for group in groups for key in group.runs[0].settings)
    varied = []
    for key in keys:
        if key in ("method", "seed", "lr"):  # which stand in the tables
            continue
        found = {group.label: group.runs[0].settings[key] for group in groups if key in group.runs[0].settings}
        if len({json.dumps(value) for value in found.values()}) > 1:
            varied.append(f"- `{key}`: " + ", ".join(f"{label} {value}" for label, value in found.items()))
    return ["### Settings that differ", "\n".join(varied)] if varied else []


def _numbers(groups: Sequence[Group], tests: dict[str, list[Significance]], folder: Path) -> dict[str, Any]:
    def spread(runs: Sequence[Run], source: str) -> dict[str, Any]:
        gathered: dict[str, dict[str, list[float]]] = {}
        for run in runs:
            for task, values in getattr(run, source)["final"].items():
                for metric, value in values.items():
                    if isinstance(value, (int, float)):
                        gathered.setdefault(task, {}).setdefault(metric, []).append(float(value))
        return {
            task: {
                metric: dict(zip(("mean", "deviation", "runs"), (*mean_and_deviation(found), len(found)), strict=True))
                for metric, found in metrics.items()
            }
            for task, metrics in gathered.items()
        }

    return {
        "methods": {
            group.label: {
                "runs": [Path(os.path.relpath(run.folder.path, folder.resolve())).as_posix() for run in group.runs],
                "full": spread(group.runs, "metrics"),
                "sampled": spread(group.runs, "sampled"),
            }
            for group in groups
        },
        "tests": {task: [asdict(test) for test in found] for task, found in tests.items()},
    }
