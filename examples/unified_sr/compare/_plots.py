"""Pictures of many methods: quality against retention, conflict during training, the choice of learning rates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsub.plots import COLOURS, finish

from ._collect import Group, Run, tasks_of
from ._statistics import mean_and_deviation
from ._tables import perplexity_change

MARKERS = "osD^vP*X<>h"
"""As many as have no divisor in common with the number of colours, so that pairs of both repeat late."""


def draw(groups: Sequence[Group], trials: Sequence[Run], metric: str, folder: Path, prefix: str) -> dict[str, str]:
    """Draw what there is to see.

    Args:
        groups: the methods on one data set.
        trials: runs on the validation split, by which learning rates were chosen.
        metric: the ranking metric.
        folder: gets the files.
        prefix: of their names.

    Returns:
        File name -> caption.
    """
    from matplotlib.figure import Figure

    plots: list[tuple[str, str, Callable[[Any], bool]]] = [
        ("retention", f"{metric} against what general text has lost", lambda f: _retention(f, groups, metric)),
        ("cosine", "Cosine of the tasks' gradients in training", lambda f: _cosine(f, groups)),
        ("rates", f"{metric} on the validation split by learning rate", lambda f: _rates(f, groups, trials, metric)),
    ]
    drawn: dict[str, str] = {}
    for name, caption, paint in plots:
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        file = folder / f"{prefix}{name}.png"
        file.unlink(missing_ok=True)
        if paint(figure):
            figure.suptitle(caption, fontsize=12)
            figure.savefig(file, dpi=130)
            drawn[file.name] = caption
    return drawn


def score(run: Run, tasks: Sequence[str], metric: str) -> float | None:
    """Return the mean of a run's metric over some tasks; ``None`` if it was not measured for all of them."""
    final: Mapping[str, Mapping[str, float]] = run.metrics["final"]
    values = [final.get(task, {}).get(metric) for task in tasks]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _looks(groups: Sequence[Group]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each method; pairs repeat after 66 methods."""
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    return {group.label: pair for group, pair in zip(groups, pairs, strict=False)}


def _retention(figure: Any, groups: Sequence[Group], metric: str) -> bool:
    tasks = tasks_of(groups)
    views = {task: [task] for task in tasks} | ({"mean of the tasks": tasks} if len(tasks) > 1 else {})
    figure.set_size_inches(3.6 * len(views) + 2.2, 4.2)
    looks = _looks(groups)
    panels = figure.subplots(1, len(views), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, (title, shown) in zip(panels, views.items(), strict=True):
        for group in groups:
            colour, marker = looks[group.label]
            found = _mean([score(run, shown, metric) for run in group.runs])
            change = _mean([perplexity_change(run) for run in group.runs])
            if found is None:
                continue
            if change is None:  # no language model, so there is nothing that could be lost
                handles[group.label] = axes.axhline(found[0], color=colour, linestyle="--", linewidth=1)
                continue
            handles[group.label] = axes.errorbar(
                change[0], found[0], xerr=change[1], yerr=found[1], color=colour, marker=marker, linestyle="", capsize=2
            )
        # Methods that keep the language model differ by tenths of a per cent, others by hundreds.
        if max(map(abs, axes.get_xlim())) > 10:
            axes.set_xscale("symlog", linthresh=1)
            axes.autoscale_view()
        axes.set(xlabel="change of perplexity, %", ylabel=metric)
        axes.set_title(title, fontsize=11)
        finish(axes, legend=False)
    figure.legend(list(handles.values()), list(handles), loc="outside right center", frameon=False, fontsize=8)
    return bool(handles)


def _cosine(figure: Any, groups: Sequence[Group]) -> bool:
    axes = figure.subplots()
    looks = _looks(groups)
    for group in groups:
        by_step: dict[int, list[float]] = {}
        for run in group.runs:
            for record in run.records():
                for value in (record.get("diagnostics") or {}).get("cosines", {}).values():
                    by_step.setdefault(record["step"], []).append(value)
        if by_step:
            steps = sorted(by_step)
            means = [sum(by_step[step]) / len(by_step[step]) for step in steps]
            axes.plot(steps, means, color=looks[group.label][0], marker=looks[group.label][1], ms=3, label=group.label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="step", ylabel="cosine, mean over layers, pairs and seeds\n(below 0: conflict)")
    drawn = bool(axes.get_legend_handles_labels()[0])
    finish(axes, legend=drawn)
    return drawn


def _rates(figure: Any, groups: Sequence[Group], trials: Sequence[Run], metric: str) -> bool:
    axes = figure.subplots()
    looks = _looks(groups)
    chosen, tasks = {group.label: group.lr for group in groups}, tasks_of(groups)
    for label, (colour, marker) in looks.items():
        found = [
            (float(run.settings["lr"]), value)
            for run in trials
            if run.folder.path.parent.name == label and (value := score(run, tasks, metric)) is not None
        ]
        if not found:
            continue
        axes.plot(*zip(*sorted(found), strict=True), color=colour, marker=marker, markersize=4, label=label)
        best = [pair for pair in found if pair[0] == chosen[label]]
        axes.plot(*zip(*best, strict=True), color=colour, marker="o", markersize=12, fillstyle="none") if best else None
    axes.set_xscale("log")
    axes.set(xlabel="peak learning rate (circle: chosen)", ylabel=f"{metric}, mean of the tasks")
    drawn = bool(axes.get_legend_handles_labels()[0])
    finish(axes, legend=drawn)
    return drawn


def _mean(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    known = [value for value in values if value is not None]
    return mean_and_deviation(known) if known else None
