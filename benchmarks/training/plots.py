"""Step time against rank, number of tasks and tokens; a panel a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .config import Case, Config
from .derived import Result
from .methods import METHODS

_MARKERS: Final = "osv^D<>ph*XdP8H+"


@dataclass(frozen=True)
class Axis:
    """What varies, the case's value of it (None: the number of tasks), and which cases differ in nothing else."""

    name: str
    value: Callable[[Case], int] | None
    belongs: Callable[[Case, Config], bool]


AXES: Final = (
    Axis("rank", lambda case: case.rank, lambda case, config: _single(case, config) and _at(case, config, "tokens")),
    Axis("tokens", lambda case: case.tokens, lambda case, config: _single(case, config) and _at(case, config, "rank")),
    Axis(
        "tasks",
        None,
        lambda case, config: len(case.tasks) > 1 and _at(case, config, "tokens") and _at(case, config, "rank"),
    ),
)


def draw_plots(config: Config, results: Mapping[str, Result], folder: Path) -> list[Path]:
    """Write a picture for every axis along which some method was measured twice; the files."""
    drawn = []
    for axis in AXES:
        panels = {model: series for model in config.models if (series := _series(axis, model, config, results))}
        if panels:
            path = folder / f"step-time-by-{axis.name}.png"
            _draw(axis.name, panels, path)
            drawn.append(path)
    return drawn


Series = dict[str, dict[int, float]]


def _series(axis: Axis, model: str, config: Config, results: Mapping[str, Result]) -> Series:
    """Seconds a step by method and value, of the methods that have at least two."""
    series: Series = {name: {} for name in METHODS}
    for case in config.cases:
        if case.model == model and case.name in results and axis.belongs(case, config):
            result = results[case.name]
            for key in result.keys:
                value = axis.value(case) if axis.value else key.tasks
                series[key.method][value] = result.step_seconds(key)
    return {name: points for name, points in series.items() if len(points) > 1}


def _single(case: Case, config: Config) -> bool:
    return case.tasks == (config.centre.tasks,)


def _at(case: Case, config: Config, name: str) -> bool:
    return getattr(case, name) == getattr(config.centre, name)


def _draw(axis: str, panels: Mapping[str, Series], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels) + 2.5, 4.5), layout="constrained")
    plots: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    names = [name for name in METHODS if any(name in series for series in panels.values())]
    style = {
        name: {"marker": _MARKERS[index % len(_MARKERS)], "color": f"C{index % 10}", "label": name}
        for index, name in enumerate(names)
    }
    handles: dict[str, Any] = {}
    for plot, (model, series) in zip(plots, panels.items(), strict=True):
        for name, points in series.items():
            places = sorted(points)
            (handles[name],) = plot.plot(places, [points[place] for place in places], **style[name])
        values = sorted({value for points in series.values() for value in points})
        plot.set_xscale("log", base=2)
        plot.set_xticks(values, [str(value) for value in values])
        plot.set_xticks([], minor=True)
        plot.set_ylim(bottom=0)
        plot.set_title(model)
        plot.set_xlabel({"rank": "rank", "tasks": "number of tasks", "tokens": "tokens in a step"}[axis])
        plot.set_ylabel("seconds a step (median)")
        plot.grid(alpha=0.3)
    figure.legend(handles=[handles[name] for name in names], loc="outside right center")
    figure.savefig(path, dpi=120)
