"""The data set's sizes as a table."""

from __future__ import annotations

from collections.abc import Mapping

from ._types import Dataset


def format_statistics(dataset: Dataset) -> str:
    """Return ``dataset.statistics()`` as a plain-text table with one line a value and one column a task."""
    statistics = dataset.statistics()
    per_task: Mapping[str, Mapping[str, int | float]] = statistics["per_task"]
    tasks = list(per_task)
    lines = [
        f"{dataset.name}: {statistics['users']} users, {statistics['items']} items, "
        f"{statistics['events']} events, density {statistics['density']:.3%}"
    ]
    lines.append(f"{'':<22}" + "".join(f"{task:>12}" for task in tasks))
    for key in next(iter(per_task.values())):
        cells = [per_task[task][key] for task in tasks]
        texts = [f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(f"{key.replace('_', ' '):<22}" + "".join(f"{text:>12}" for text in texts))
    lines.extend(f"{task}: no events, so the task is absent" for task in tasks if not per_task[task]["events"])
    removed: Mapping[str, int] = statistics["removed"]
    lines.append("removed: " + ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in removed.items()))
    return "\n".join(lines)
