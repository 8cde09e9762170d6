"""Pictures of a training: losses, gates, cosines and energies over the steps, and what is protected where.

Each function draws on a figure of matplotlib's and returns it; `save` writes all that there is to see into a folder.
They read a `History`, which collects reports. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradsub._optional import optional
from gradsub.report import Report
from gradsub.summary import Summary

__all__ = [
    "COLOURS",
    "History",
    "bars",
    "cosines",
    "energies",
    "finish",
    "gates",
    "lines",
    "losses",
    "protected",
    "save",
]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's colours, distinguishable without full colour vision."""

Array = np.ndarray[Any, Any]


class History:
    """Scalars over the steps of a training, by the names that `Report.scalars` gives.

    Example:
        >>> from gradsub.plots import History
        >>> history = History()
        >>> history.add({"loss/a": 2.0, "gate/a": 0.4}, step=1)
        >>> history.add({"loss/a": 1.0}, step=2)
        >>> history.names("loss"), history.series("loss/a")
        (['a'], ([1, 2], [2.0, 1.0]))
    """

    def __init__(self) -> None:
        self._rows: list[tuple[int, dict[str, float]]] = []

    def add(self, found: Report | Mapping[str, float], step: int | None = None) -> None:
        """Take in a step.

        Args:
            found: a report, or scalars by name; what is not finite is left out.
            step: its number; None: that of the report.

        Raises:
            ValueError: scalars without a step.
        """
        if isinstance(found, Report):
            step = found.step if step is None else step
            found = found.scalars()
        if step is None:
            raise ValueError("step=None for scalars, which do not know theirs: pass step=")
        self._rows.append((step, {name: float(value) for name, value in found.items() if math.isfinite(value)}))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[int, dict[str, float]]]:
        return iter(self._rows)

    def names(self, kind: str) -> list[str]:
        """What stands behind ``kind/`` in the names, in the order of appearance."""
        found = (name.partition("/") for _, row in self._rows for name in row)
        return list(dict.fromkeys(rest for head, _, rest in found if head == kind and rest))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps that have a scalar, and its values."""
        pairs = [(step, row[name]) for step, row in self._rows if name in row]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def write(self, path: str | Path) -> None:
        """Write JSON lines, an object a step: ``{"step": 1, "loss/a": 2.0}``."""
        text = "".join(json.dumps({"step": step, **row}) + "\n" for step, row in self._rows)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> History:
        """What `write` wrote."""
        history = cls()
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            history.add(row, row.pop("step"))
        return history


def losses(history: History, figure: Any = None, *, ylabel: str = "loss") -> Any:
    """The tasks' losses; of more than 20 steps with a bold mean over a tenth of them.

    Args:
        history: with ``loss/<task>``.
        figure: of matplotlib; None: a new one.
        ylabel: what the losses are.
    """
    figure = _figure(figure)
    axes = figure.subplots()
    width = 1
    for colour, task in zip(_colours(), history.names("loss"), strict=False):
        steps, values = history.series(f"loss/{task}")
        width = max(1, len(values) // 10)
        thin = {"alpha": 0.35} if width > 1 else {"marker": "."}
        axes.plot(steps, values, color=colour, linewidth=1, **thin)
        if width > 1:
            axes.plot(steps, _smooth(np.array(values), width), color=colour, linewidth=2)
        axes.plot([], [], color=colour, linewidth=2, label=task)
    suffix = f"\n(bold: mean of the last {width} steps)" if width > 1 else ""
    axes.set(xlabel="step", ylabel=f"{ylabel}{suffix}")
    finish(axes)
    return figure


def gates(history: History, figure: Any = None, *, ylabel: str = "gate, mean over the layers") -> Any:
    """How much of each task's own step enters the update.

    Args:
        history: with ``gate/<task>``.
        figure: of matplotlib; None: a new one.
        ylabel: what the gates are.
    """
    return lines(history, "gate", figure, ylabel=ylabel, ylim=(0, 1))


def cosines(
    history: History, figure: Any = None, *, ylabel: str = "cosine of the gradients\n(below 0: conflict)"
) -> Any:
    """How far the tasks' gradients agree.

    Args:
        history: with ``cosine/<a>|<b>``.
        figure: of matplotlib; None: a new one.
        ylabel: which cosines these are.
    """
    figure = lines(history, "cosine", figure, ylabel=ylabel)
    figure.axes[0].axhline(0, color="black", linewidth=0.8)
    return figure


def energies(history: History, figure: Any = None, *, ylabel: str = "share of the gradient that is kept") -> Any:
    """What the subspaces keep of the gradients: where it falls, a smaller gap or a larger rank may help.

    Args:
        history: with ``energy/shared`` and ``energy/<task>``.
        figure: of matplotlib; None: a new one.
        ylabel: what the energies are.
    """
    return lines(history, "energy", figure, ylabel=ylabel, ylim=(0, 1))


def lines(
    history: History, kind: str, figure: Any = None, *, ylabel: str, ylim: tuple[float, float] | None = None
) -> Any:
    """All scalars of a kind over the steps.

    Args:
        history: with ``<kind>/<name>``.
        kind: what stands before the slash.
        figure: of matplotlib; None: a new one.
        ylabel: what the numbers are.
        ylim: from where to where; None: as they are.
    """
    figure = _figure(figure)
    axes = figure.subplots()
    names = history.names(kind)
    for colour, name in zip(_colours(), names, strict=False):
        label = name.replace("|", " and ")
        axes.plot(*history.series(f"{kind}/{name}"), color=colour, marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel=ylabel)
    if ylim is not None:
        axes.set_ylim(*ylim)
    finish(axes, legend=bool(names))
    return figure


def bars(values: Mapping[str, Mapping[str, Mapping[str, float]]], figure: Any = None) -> Any:
    """Metrics side by side, such as before and after: a panel for each task.

    Args:
        values: task -> bar, such as ``"before"`` -> metric -> number from 0.
        figure: of matplotlib; None: a new one.
    """
    figure = _figure(figure)
    for axes, (task, sides) in zip(np.atleast_1d(figure.subplots(1, len(values))), values.items(), strict=True):
        metrics = list(next(iter(sides.values())))
        places, width = np.arange(len(metrics)), 0.8 / len(sides)
        for side, (label, found) in enumerate(sides.items()):
            numbers = [found[metric] for metric in metrics]
            # The first is what the others are compared with.
            colour = "#9aa5b1" if side == 0 and len(sides) > 1 else COLOURS[(side - (len(sides) > 1)) % len(COLOURS)]
            middle = places + (side - (len(sides) - 1) / 2) * width
            drawn = axes.bar(middle, numbers, 0.95 * width, color=colour, label=label)
            axes.bar_label(drawn, [f"{value:.3f}" for value in numbers], fontsize=8, padding=2)
        axes.set_xticks(places, metrics)
        axes.set_title(task, fontsize=11)
        highest = max(value for found in sides.values() for value in found.values())
        axes.set_ylim(0, 1.25 * max(highest, 0.004))  # all values may be 0
        finish(axes, grid="y")
    return figure


def protected(shares: Summary | Report | Mapping[str, float], figure: Any = None) -> Any:
    """A map of block and kind of layer, where names have the form ``... .N. ...``; each layer is one cell.

    Args:
        shares: what `GemsOptimizer.summary` or `report` gave, or name -> protected share of the directions.
        figure: of matplotlib; None: a new one.
    """
    figure = _figure(figure)
    if isinstance(shares, (Summary, Report)):
        shares = {layer.name: layer.protected_fraction for layer in shares.layers}
    cells = {name: re.match(r"(?:(?P<stack>.*?)\.)?(?P<block>\d+)\.(?P<kind>.+)", name) for name in shares}
    kinds: dict[str, dict[int, float]] = {}
    stacks = {match["stack"] for match in cells.values() if match}
    for name, match in cells.items():
        kind = name if match is None else match["kind"] if len(stacks) == 1 else f"{match['stack']} {match['kind']}"
        kinds.setdefault(kind, {})[int(match["block"]) if match else 0] = shares[name]
    blocks = 1 + max((block for values in kinds.values() for block in values), default=0)
    grid = np.full((max(1, len(kinds)), blocks), np.nan)
    for row, values in enumerate(kinds.values()):
        for block, value in values.items():
            grid[row, block] = value
    figure.set_size_inches(max(7.2, 0.24 * blocks + 2.5), max(2.6, 0.3 * len(kinds) + 1.6))
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="none")
    axes.set_yticks(range(len(kinds)), list(kinds))
    axes.set_xticks(range(0, blocks, max(1, blocks // 10)))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("block")
    figure.colorbar(image, ax=axes, label="share of protected directions")
    return figure


def save(
    history: History, folder: str | Path, shares: Summary | Report | Mapping[str, float] | None = None
) -> dict[str, str]:
    """Draw what there is to see, as PNG files.

    Args:
        history: of the training.
        folder: gets the files; made if it is not there.
        shares: what is protected, see `protected`; None: no such picture.

    Returns:
        file name -> caption.
    """
    plots: list[tuple[str, str, bool, Callable[[], Any]]] = [
        ("loss.png", "Loss per task", bool(history.names("loss")), lambda: losses(history)),
        ("cosine.png", "Cosine of the tasks' gradients", bool(history.names("cosine")), lambda: cosines(history)),
        ("gates.png", "Gates of the task subspaces", bool(history.names("gate")), lambda: gates(history)),
        ("energy.png", "What the subspaces keep", bool(history.names("energy")), lambda: energies(history)),
        ("protected.png", "Protected fraction per layer", shares is not None, lambda: protected(shares or {})),
    ]
    Path(folder).mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, caption, present, draw in plots:
        if present:
            figure = draw()
            figure.suptitle(caption, fontsize=12)
            figure.savefig(Path(folder) / name, dpi=130)
            drawn[name] = caption
    return drawn


def finish(axes: Any, grid: str = "both", legend: bool = True) -> None:
    """Give axes the look that all plots share.

    Args:
        axes: of matplotlib.
        grid: which lines the grid has: ``"x"``, ``"y"`` or ``"both"``.
        legend: whether there is one.
    """
    axes.grid(axis=grid, alpha=0.25)
    if axes.get_xlabel() == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=9)


def _figure(figure: Any) -> Any:
    if figure is not None:
        return figure
    return optional("matplotlib.figure", "plots", "gradsub.plots").Figure(figsize=(7.2, 4.0), layout="constrained")


def _colours() -> Iterable[str]:
    """Again and again: there may be more tasks than colours."""
    while True:
        yield from COLOURS


def _smooth(values: Array, width: int) -> Array:
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    smooth: Array = (sums[ends] - sums[starts]) / (ends - starts)
    return smooth
