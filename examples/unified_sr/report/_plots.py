"""The plots of a run, as PNG files beside its report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..config import read_yaml
from ..run_folder import CONFIG, METRICS, RunFolder

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's colours, distinguishable without full colour vision."""

Record = Mapping[str, Any]


def draw_plots(folder: RunFolder) -> dict[str, str]:
    """Draw what there is to see of a trained run.

    Returns:
        File name -> caption; empty if nothing was trained.
    """
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in folder.file("steps.jsonl").read_text(encoding="utf-8").splitlines()]
    if not records:
        return {}
    reported = [record for record in records if record.get("diagnostics")]
    protected: dict[str, float] = folder.read_json("run.json")["protected"]
    plots: list[tuple[str, str, bool, Callable[[Figure], None]]] = [
        ("loss.png", "Loss per task", True, lambda figure: _losses(figure, records)),
        ("metrics.png", "Ranking metrics before and after", True, lambda figure: _metrics(figure, folder)),
        ("cosine.png", "Cosine of the tasks' gradients", _has(reported, "cosines"), lambda f: _cosines(f, reported)),
        ("gates.png", "Gates of the task subspaces", _has(reported, "gates"), lambda f: _gates(f, reported)),
        ("protected.png", "Protected fraction per layer", any(protected.values()), lambda f: _protected(f, protected)),
    ]
    drawn: dict[str, str] = {}
    for name, caption, present, draw in plots:
        folder.file(name).unlink(missing_ok=True)
        if present:
            figure = Figure(figsize=(7.2, 4.0), layout="constrained")
            draw(figure)
            figure.suptitle(caption, fontsize=12)
            figure.savefig(folder.file(name), dpi=130)
            drawn[name] = caption
    return drawn


def _has(reported: list[Record], key: str) -> bool:
    return any(record["diagnostics"][key] for record in reported)


def _losses(figure: Any, records: list[Record]) -> None:
    axes = figure.subplots()
    steps = [record["step"] for record in records]
    width = max(1, len(records) // 10)
    for colour, task in zip(COLOURS, records[0]["loss"], strict=False):
        values = np.array([record["loss"][task] for record in records])
        axes.plot(
            steps, values, color=colour, alpha=0.35 if width > 1 else 1.0, linewidth=1, marker="." if width == 1 else ""
        )
        if width > 1:
            axes.plot(steps, _smooth(values, width), color=colour, linewidth=2)
        axes.plot([], [], color=colour, linewidth=2, label=task)
    suffix = f" (bold: mean of the last {width} steps)" if width > 1 else ""
    axes.set(xlabel="step", ylabel=f"cross-entropy over the catalogue\n{suffix}".strip())
    finish(axes)


def _metrics(figure: Any, folder: RunFolder) -> None:
    metrics = folder.read_json(METRICS)
    method = read_yaml(folder.file(CONFIG))["method"]
    names = {"hit@10": "Hit@10", "ndcg@10": "NDCG@10", "mrr@10": "MRR@10"}
    tasks = [task for task in metrics["final"] if task != "general"]
    for axes, task in zip(np.atleast_1d(figure.subplots(1, len(tasks))), tasks, strict=True):
        places = np.arange(len(names))
        for side, (part, label) in enumerate((("zero_shot", "zero-shot"), ("final", method))):
            values = [metrics[part][task][key] for key in names]
            bars = axes.bar(places + (side - 0.5) * 0.4, values, 0.38, color=("#9aa5b1", COLOURS[0])[side], label=label)
            axes.bar_label(bars, [f"{value:.3f}" for value in values], fontsize=8, padding=2)
        axes.set_xticks(places, list(names.values()))
        axes.set_title(task, fontsize=11)
        highest = max(metrics[part][task][key] for part in ("zero_shot", "final") for key in names)
        axes.set_ylim(0, 1.25 * max(highest, 0.004))  # all values may be 0
        finish(axes, grid="y")


def _cosines(figure: Any, reported: list[Record]) -> None:
    axes = figure.subplots()
    pairs = sorted({pair for record in reported for pair in record["diagnostics"]["cosines"]})
    for colour, pair in zip(COLOURS, pairs, strict=False):
        found = [
            (r["step"], r["diagnostics"]["cosines"][pair]) for r in reported if pair in r["diagnostics"]["cosines"]
        ]
        axes.plot(*zip(*found, strict=True), color=colour, marker="o", markersize=3, label=pair.replace("|", " and "))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="step", ylabel="cosine, mean over the layers\n(below 0: conflict)")
    finish(axes)


def _gates(figure: Any, reported: list[Record]) -> None:
    axes = figure.subplots()
    tasks = sorted({task for record in reported for task in record["diagnostics"]["gates"]})
    for colour, task in zip(COLOURS, tasks, strict=False):
        found = [(r["step"], r["diagnostics"]["gates"][task]) for r in reported if task in r["diagnostics"]["gates"]]
        axes.plot(*zip(*found, strict=True), color=colour, marker="o", markersize=3, label=task)
    axes.set(xlabel="step", ylabel="gate, mean over the layers", ylim=(0, 1))
    finish(axes)


def _protected(figure: Any, protected: Mapping[str, float]) -> None:
    """Draw a map of block and kind of layer, where names have the form ``...N...``; each layer is one cell."""
    cells = {name: re.match(r"(?P<stack>.*?)\.?(?P<block>\d+)\.(?P<kind>.+)", name) for name in protected}
    kinds: dict[str, dict[int, float]] = {}
    stacks = {match["stack"] for match in cells.values() if match}
    for name, match in cells.items():
        kind = name if match is None else match["kind"] if len(stacks) == 1 else f"{match['stack']} {match['kind']}"
        kinds.setdefault(kind, {})[int(match["block"]) if match else 0] = protected[name]
    blocks = 1 + max(block for values in kinds.values() for block in values)
    grid = np.full((len(kinds), blocks), np.nan)
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


def _smooth(values: np.ndarray[Any, Any], width: int) -> np.ndarray[Any, Any]:
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    smooth: np.ndarray[Any, Any] = (sums[ends] - sums[starts]) / (ends - starts)
    return smooth


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
