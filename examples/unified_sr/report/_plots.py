"""The plots of a run, as PNG files beside its report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from gradsub import plots

from ..config import read_config
from ..run_folder import CONFIG, METRICS, RunFolder

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
    history = history_of(records)
    protected: dict[str, float] = folder.read_json("run.json")["protected"]
    loss = "cross-entropy over the catalogue"
    cosine = "cosine, mean over the layers\n(below 0: conflict)"
    wanted: list[tuple[str, str, bool, Callable[[Figure], Any]]] = [
        ("loss.png", "Loss per task", True, lambda figure: plots.losses(history, figure, ylabel=loss)),
        ("metrics.png", "Ranking metrics before and after", True, lambda f: plots.bars(_metrics(folder), f)),
        (
            "cosine.png",
            "Cosine of the tasks' gradients",
            bool(history.names("cosine")),
            lambda figure: plots.cosines(history, figure, ylabel=cosine),
        ),
        ("gates.png", "Gates of the task subspaces", bool(history.names("gate")), lambda f: plots.gates(history, f)),
        (
            "protected.png",
            "Protected fraction per layer",
            any(protected.values()),
            lambda figure: plots.protected(protected, figure),
        ),
    ]
    drawn: dict[str, str] = {}
    for name, caption, present, draw in wanted:
        folder.file(name).unlink(missing_ok=True)
        if present:
            figure = Figure(figsize=(7.2, 4.0), layout="constrained")
            draw(figure)
            figure.suptitle(caption, fontsize=12)
            figure.savefig(folder.file(name), dpi=130)
            drawn[name] = caption
    return drawn


def history_of(records: list[Record]) -> plots.History:
    """The losses and, of measured steps, the diagnostics of a run's steps."""
    history = plots.History()
    for record in records:
        found = record.get("diagnostics") or {}
        kinds = {"loss": record["loss"], "cosine": found.get("cosines", {}), "gate": found.get("gates", {})}
        scalars = {f"{kind}/{name}": value for kind, values in kinds.items() for name, value in values.items()}
        history.add(scalars, record["step"])
    return history


def _metrics(folder: RunFolder) -> dict[str, dict[str, dict[str, float]]]:
    """Task -> the model before and after -> metric -> number."""
    metrics = folder.read_json(METRICS)
    method = read_config(folder.file(CONFIG))["method.name"]
    names = {"hit@10": "Hit@10", "ndcg@10": "NDCG@10", "mrr@10": "MRR@10"}
    return {
        task: {
            label: {name: metrics[part][task][key] for key, name in names.items()}
            for part, label in (("zero_shot", "zero-shot"), ("final", method))
        }
        for task in metrics["final"]
        if task != "general"
    }
