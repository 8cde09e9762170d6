"""From groups of runs to tables of cells: a number with its spread, or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ._collect import Group, Run, tasks_of
from ._significance import Significance
from ._statistics import mean_and_deviation

SHOWN = ("hit@10", "ndcg@10", "mrr@10", "gems_ndcg@10", "gems_map@10")
"""Metrics of the tables, those of ``compat: gems`` where a run has them; ``comparison.json`` holds all."""

NAMES = {"hit": "Hit", "ndcg": "NDCG", "mrr": "MRR", "map": "MAP", "gems_ndcg": "NDCG gems", "gems_map": "MAP gems"}


@dataclass(frozen=True)
class Cell:
    """What stands in a table.

    Args:
        text: that is no number.
        mean: a number.
        deviation: its standard deviation over the seeds, if there are several.
        form: format of both.
        best: whether no other of its column is better.
    """

    text: str = ""
    mean: float | None = None
    deviation: float | None = None
    form: str = ".4f"
    best: bool = False

    @property
    def missing(self) -> bool:
        """Whether there is nothing to show; never shown as 0."""
        return not self.text and self.mean is None


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: what it shows.
        note: what a reader must know.
        header: of the columns.
        rows: one a method.
    """

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class _Column:
    """A column: its header, what a run contributes (``None``: nothing), the format; whether the largest is best, and
    whether all runs of a group contribute the same.
    """

    header: str
    value: Callable[[Run], float | None]
    form: str = ".4f"
    ranked: bool = False
    constant: bool = False


def tables_of(groups: Sequence[Group], tests: dict[str, list[Significance]], metric: str) -> list[Table]:
    """Return the tables of one data set.

    Args:
        groups: the methods.
        tests: task -> comparisons with its baselines.
        metric: that was tested.
    """
    tasks = tasks_of(groups)
    spread = "Mean and standard deviation over the seeds; a dash is a value that was not measured."
    ranking = _table(
        "Full ranking",
        f"All items of the catalogue but those seen before. {spread}",
        groups,
        _ranking_columns(groups, tasks, "metrics"),
    )
    sampled = _table(
        "Sampled ranking",
        f"The target among 1 + {groups[0].runs[0].settings['negatives']} random items: inflated, only for comparison "
        f"with literature. {spread}",
        groups,
        _ranking_columns(groups, tasks, "sampled"),
    )
    cost = _table(
        "Retention and cost", f"On general text, and of the training. {spread}", groups, _cost_columns(groups)
    )
    families = [
        _tests(task, [test for test in found if test.baseline == baseline], metric)
        for task, found in tests.items()
        for baseline in dict.fromkeys(test.baseline for test in found)
    ]
    return [ranking, cost, *families, sampled]


def _table(title: str, note: str, groups: Sequence[Group], columns: Sequence[_Column]) -> Table:
    filled = [_cells(column, groups) for column in columns]
    kept = [place for place, cells in enumerate(filled) if not all(cell.missing for cell in cells)]
    return Table(
        title,
        note,
        ("method", "seeds", *(columns[place].header for place in kept)),
        tuple(
            (Cell(group.label), Cell(str(len(group.runs))), *(filled[place][row] for place in kept))
            for row, group in enumerate(groups)
        ),
    )


def _cells(column: _Column, groups: Sequence[Group]) -> list[Cell]:
    cells = []
    for group in groups:
        values = [value for run in group.runs if (value := column.value(run)) is not None and math.isfinite(value)]
        mean, deviation = mean_and_deviation(values) if values else (None, None)
        cells.append(Cell("", mean, None if column.constant else deviation, column.form))
    known = [cell.mean for cell in cells if cell.mean is not None]
    if not column.ranked or not known:
        return cells
    return [replace(cell, best=cell.mean == max(known)) for cell in cells]


def _ranking_columns(groups: Sequence[Group], tasks: Sequence[str], source: str) -> list[_Column]:
    def value(task: str, metric: str) -> Callable[[Run], float | None]:
        return lambda run: getattr(run, source)["final"].get(task, {}).get(metric)

    return [_Column(f"{task} {_title(metric)}", value(task, metric), ranked=True) for task in tasks for metric in SHOWN]


def _cost_columns(groups: Sequence[Group]) -> list[_Column]:
    measured = dict.fromkeys(
        key for group in groups for run in group.runs for key in run.metrics["final"].get("general", {})
    )
    return [
        _Column("perplexity", lambda run: _general(run, "final", "perplexity"), ".2f"),
        _Column("change, %", perplexity_change, "+.1f"),
        *(_general_column(key) for key in measured if key != "perplexity"),
        _Column("leak", _leak, ".1e"),
        _Column("lr", lambda run: run.settings["lr"] if run.summary["throughput"] else None, "g", constant=True),
        *_speed_columns([run for group in groups for run in group.runs]),
        _Column("peak GiB", _peak, ".2f"),
    ]


def _speed_columns(runs: Sequence[Run]) -> list[_Column]:
    """One of seconds per step, or one for each machine: times of different ones have no common mean."""

    def on(machine: str) -> Callable[[Run], float | None]:
        return lambda run: _seconds(run) if run.machine == machine else None

    machines = sorted({run.machine for run in runs if _seconds(run) is not None})
    if len(machines) < 2:
        return [_Column("s/step", _seconds, ".2f")]
    return [_Column(f"s/step ({machine})", on(machine), ".2f") for machine in machines]


def _seconds(run: Run) -> float | None:
    found = run.summary["throughput"].get("seconds_per_step")
    return None if found is None else float(found)


def _general_column(key: str) -> _Column:
    return _Column(key.replace("_", " "), lambda run: _general(run, "final", key))


def perplexity_change(run: Run) -> float | None:
    """Return by how many per cent training has changed the perplexity of general text."""
    before, after = _general(run, "zero_shot", "perplexity"), _general(run, "final", "perplexity")
    return None if before is None or after is None else 100 * (after / before - 1)


def _general(run: Run, part: str, key: str) -> float | None:
    found = run.metrics[part].get("general", {}).get(key)
    return float(found) if isinstance(found, (int, float)) else None


def _leak(run: Run) -> float | None:
    """The mean over the layers of what a run has measured of the change inside the protected directions."""
    layers: dict[str, Any] = run.summary.get("leak") or {}
    known = [float(value) for value in layers.values() if value is not None]
    return sum(known) / len(known) if known else None


def _peak(run: Run) -> float | None:
    peak = run.summary.get("peak_memory") or {}
    found = peak.get("device") or peak.get("resident")
    return None if found is None else found / 2**30


def _tests(task: str, tests: Sequence[Significance], metric: str) -> Table:
    rows = []
    for test in tests:
        found = test.test
        rows.append(
            (
                Cell(test.label),
                Cell(str(found.queries)) if found else Cell(),
                Cell("", found.difference if found else None, None, "+.4f"),
                *(Cell("", value, None, ".2g") for value in (found.t_test if found else None, test.t_test)),
                *(Cell("", value, None, ".2g") for value in (found.permutation if found else None, test.permutation)),
            )
        )
    return Table(
        f"{task}: {_title(metric)} against {tests[0].baseline}",
        "Two-sided paired tests over queries, whose values are averaged over the seeds first; Holm's correction counts "
        "all methods of this table.",
        ("method", "queries", "difference", "p (t-test)", "with Holm", "p (permutation)", "with Holm"),
        tuple(rows),
    )


def _title(metric: str) -> str:
    name, at, depth = metric.partition("@")
    return f"{NAMES.get(name, name)}{at}{depth}"
