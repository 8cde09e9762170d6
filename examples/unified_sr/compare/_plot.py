"""The trade at a glance: what the methods that matter rank, against what general text has lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gradsub.plots import COLOURS, finish

from ..data import TASKS
from ._groups import OWN, perplexity_change, tasks_of
from ._labels import leader, place_labels
from ._tables import title_of

MOST = 8
"""Methods in a picture; more cannot be told apart in it."""

KEPT = 2.0
"""Change of perplexity, %, within which a model counts as kept."""


def trade(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return group -> what a picture shows of it: method, score, ``change`` of perplexity, each task, and deviations.

    Args:
        runs: with the columns ``group`` and ``score``.
        metric: of the tasks.
    """
    wanted = {task: f"{task}_{metric}" for task in tasks_of(runs)}
    runs = runs.assign(change=perplexity_change(runs))
    by_group = runs.groupby("group", sort=False)
    found = by_group[["method", "label", "trained_parameters"]].first()
    for name, column in {"score": "score", "change": "change", **wanted}.items():
        found[name], found[f"{name}_deviation"] = by_group[column].mean(), by_group[column].std()
    return found


def chosen_methods(found: pd.DataFrame, wanted: Sequence[str] = ()) -> list[str]:
    """Return which groups a picture shows, at most ``MOST``.

    Those that are wanted, or else by this rule: of the variants of GEMS the one that ranks best, and the one that ranks
    best within ``KEPT`` per cent of perplexity; of the other methods that train a language model the four best, each
    with its best entry; and for each task the best without a language model. What ranks best has the largest mean over
    the tasks.

    Args:
        found: of ``trade``.
        wanted: labels.

    Raises:
        ValueError: if they are too many.
    """
    if wanted:
        chosen = [group for group, label in found["label"].items() if label in wanted]
        if len(chosen) > MOST:
            raise ValueError(f"a plot shows at most {MOST} methods, got {', '.join(chosen)}; name fewer to draw")
        return chosen
    models = found[found["change"].notna() & (found["trained_parameters"] > 0)].dropna(subset="score")
    models = models.sort_values("score", ascending=False, kind="stable")
    own = models["method"].str.startswith(OWN)
    variants, others = models[own], models[~own].drop_duplicates("method")
    best = [*variants.index[:1], *variants.index[variants["change"] <= KEPT][:1], *others.index[:4]]
    without = found[found["change"].isna()]
    lines = [without[task].idxmax() for task in TASKS if task in without and without[task].notna().any()]
    return list(dict.fromkeys([*best, *lines]))


def draw(found: pd.DataFrame, shown: Sequence[str], metric: str, title: str, file: Path) -> bool:
    """Draw the picture, a panel a task, each method labelled at its point; error bars are deviations over the seeds.

    What has no language model can lose nothing and is a line.

    Args:
        found: of ``trade``.
        shown: groups.
        metric: of the tasks.
        title: of the picture.
        file: gets it, 1,400 pixels wide.

    Returns:
        Whether there is anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = found.loc[list(shown)]
    tasks = [name for name in TASKS if name in rows and rows[name].notna().any()]
    file.unlink(missing_ok=True)
    if not tasks or rows["change"].isna().all():
        return False
    figure = Figure(figsize=(7, 0.8 + 2.7 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tasks), 1, squeeze=False, sharex=True)[:, 0]
    for axes, task in zip(panels, tasks, strict=True):
        _points(axes, rows, task)
        axes.set_ylabel(f"{task} {title_of(metric)}")
    _across(panels[-1], rows)
    for axes in panels:
        axes.axvline(0, color="black", linewidth=0.6)
        finish(axes, legend=False)
    figure.suptitle(title, fontsize=12)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed for these very axes
    for axes, task in zip(panels, tasks, strict=True):
        _labels(figure, axes, rows, task)
    figure.savefig(file, dpi=200)
    return True


def _colour(method: str, line: bool) -> str:
    return "#666666" if line else COLOURS[0] if method.startswith(OWN) else COLOURS[1]


def _points(axes: Any, rows: pd.DataFrame, task: str) -> None:
    for _, row in rows.dropna(subset=[task]).iterrows():
        line = pd.isna(row["change"])
        colour = _colour(row["method"], line)
        if line:
            axes.axhline(row[task], color=colour, linestyle="--", linewidth=1)
            continue
        bars = {side: None if pd.isna(row[name]) else row[name] for side, name in _bars(task).items()}
        axes.errorbar(row["change"], row[task], **bars, color=colour, marker="o", markersize=6, capsize=2, linewidth=1)
    top = rows[task].add(rows[f"{task}_deviation"].fillna(0)).max()
    axes.set_ylim(0, 1.15 * top)


def _bars(task: str) -> dict[str, str]:
    return {"xerr": "change_deviation", "yerr": f"{task}_deviation"}


def _across(axes: Any, rows: pd.DataFrame) -> None:
    """Methods that keep the language model differ by tenths of a per cent, others by hundreds."""
    change = rows["change"].dropna()
    most = float(change.abs().max())
    if most > 10:
        axes.set_xscale("symlog", linthresh=1, linscale=0.6)
        ticks = [tick for tick in (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000) if tick <= 3 * most]
        axes.set_xlim(min(-0.5, 1.5 * float(change.min())), 4 * most)
        axes.set_xticks(ticks, [f"{tick:+,} %" if tick else "0" for tick in ticks])
        axes.minorticks_off()
    else:
        axes.set_xlim(min(0.0, float(change.min())) - 0.1 * max(most, 1), 1.4 * max(most, 1))
    axes.set_xlabel("change of the perplexity of general text, % (further left: kept more)")


def _labels(figure: Any, axes: Any, rows: pd.DataFrame, task: str) -> None:
    shown = rows.dropna(subset=[task])
    renderer = figure.canvas.get_renderer()
    panel = axes.get_window_extent(renderer)
    origin = axes.transData.transform((0, 0))[0]
    points, texts, taken = [], [], [(origin - 1, panel.y0, origin + 1, panel.y1)]
    for group, row in shown.iterrows():
        line = pd.isna(row["change"])
        x, y = axes.transData.transform((0 if line else row["change"], row[task]))
        points.append((panel.x1 - 4, y) if line else (x, y))
        texts.append(axes.text(0, 0, str(group), fontsize=9, color=_colour(row["method"], line), va="bottom"))
        if line:
            taken.append((panel.x0, y - 1, panel.x1, y + 1))
            continue
        spans = [0.0 if pd.isna(row[name]) else row[name] for name in _bars(task).values()]
        left, low = axes.transData.transform((row["change"] - spans[0], row[task] - spans[1]))
        right, high = axes.transData.transform((row["change"] + spans[0], row[task] + spans[1]))
        taken += [(left - 4, y - 3, right + 4, y + 3), (x - 3, low - 4, x + 3, high + 4)]
    sizes = [(box.width, box.height) for box in (text.get_window_extent(renderer) for text in texts)]
    bounds = (panel.x0 + 2, panel.y0 + 2, panel.x1 - 2, panel.y1 - 2)
    back = axes.transData.inverted()
    for point, text, box in zip(points, texts, place_labels(points, sizes, bounds, taken), strict=True):
        text.set_position(back.transform(box[:2]))
        line = leader(point, box)
        if line is not None:
            ends = back.transform(line)
            axes.plot(ends[:, 0], ends[:, 1], color=text.get_color(), linewidth=0.6)
