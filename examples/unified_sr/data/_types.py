"""What every source of data is turned into: items, examples and the data set that holds them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TASKS = ("rec", "search")
"""The tasks in the order in which tables show them."""


@dataclass(frozen=True)
class Item:
    """One entry of the catalogue.

    Args:
        id: the source's own identifier; unique in the data set, written to the TREC files.
        title: natural text that describes the item, used to initialise its token. Never empty in a loaded data set:
            where the source has no title, it is the id.
    """

    id: str
    title: str


@dataclass(frozen=True)
class Example:
    """One event to predict.

    Args:
        task: ``"rec"`` (from the history alone) or ``"search"`` (from the history and a query).
        user: the user's identifier in the source.
        history: indices into ``Dataset.items``, oldest first: the user's most recent events of either task that are
            strictly earlier than this one, or what the source recorded as such. Events with the same timestamp follow
            one another in the file's order.
        query: what the user asked for; empty exactly when ``task == "rec"``.
        target: indices of the relevant items, those of the event: at least one, each once.
        timestamp: the event's time in the source's unit.
        qid: unique in the data set; ``"rec-USER"`` and ``"search-USER"`` for a user's first test examples, with a
            number before them for further ones and a prefix in the other splits.
        asked: for each item of ``history`` the queries that it answered; empty where the source recorded the history.
    """

    task: str
    user: str
    history: tuple[int, ...]
    query: str
    target: tuple[int, ...]
    timestamp: float
    qid: str
    asked: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Turn:
    """One event of a timeline.

    Args:
        items: indices into ``Dataset.items`` of what was chosen, at least one.
        queries: what was asked for before, one or more exactly where ``"search"`` is among the tasks or was before
            tasks were left out.
        tasks: those for which its items are a target; none where they only lead to later ones.
    """

    items: tuple[int, ...]
    queries: tuple[str, ...]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Timeline:
    """Training events of one user, in order of time.

    Args:
        user: the user's identifier in the source.
        context: what the source recorded as met before the first of them.
        turns: the events.
    """

    user: str
    context: tuple[int, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Dataset:
    """A catalogue with training, validation and test examples per task.

    ``train``, ``valid`` and ``test`` have the same keys, the names in ``TASKS``; a task without events is absent from
    ``tasks`` and maps to an empty tuple.

    Args:
        name: how reports call it.
        items: the catalogue after filtering; examples refer to it by index.
        train: to learn from; see ``load_dataset`` for what goes where.
        valid: to choose settings by; may be empty where the source has a split of its own.
        test: to report.
        events: each user's item indices in order of time, after filtering.
        met: the same, each item once and with those that the source only recorded as met before an event.
        positions: how many of ``met[example.user]`` precede the example with a qid.
        timelines: the events of ``train`` again, as they follow one another; several of a user where the source
            recorded a history with each event.
        requests: task -> its events.
        removed: what loading left out, see ``statistics``.
    """

    name: str
    items: tuple[Item, ...]
    train: Mapping[str, tuple[Example, ...]]
    valid: Mapping[str, tuple[Example, ...]]
    test: Mapping[str, tuple[Example, ...]]
    events: Mapping[str, tuple[int, ...]] = field(repr=False)
    met: Mapping[str, tuple[int, ...]] = field(repr=False)
    positions: Mapping[str, int] = field(repr=False)
    timelines: tuple[Timeline, ...] = field(repr=False)
    requests: Mapping[str, int] = field(repr=False)
    removed: Mapping[str, int] = field(repr=False)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have events, in the order of ``TASKS``."""
        return tuple(task for task in TASKS if self.requests[task])

    @property
    def trainable(self) -> tuple[str, ...]:
        """The tasks that have training examples."""
        return tuple(task for task in self.tasks if self.train[task])

    def seen(self, example: Example) -> frozenset[int]:
        """Items the user had met before the example's event, of any task and any age; never one of its targets.

        Raises:
            ValueError: if the example is none of this data set.
        """
        position = self.positions.get(example.qid)
        if position is None:
            raise ValueError(f"the example {example.qid!r} is none of the data set {self.name!r}")
        return frozenset(self.met[example.user][:position]).difference(example.target)

    def statistics(self) -> dict[str, Any]:
        """Sizes of the data set, ready for JSON.

        Returns:
            ``users``, ``items``, ``events`` (pairs of a user and an item), ``density`` (events over users x items);
            under ``per_task`` for each of ``TASKS`` its ``events`` (requests), the number of ``train``, ``valid`` and
            ``test`` examples, the mean number of their targets, and the mean, median and maximum of their history
            lengths; under ``removed`` what loading left out and why, pairs where it says events.
        """
        total = sum(map(len, self.events.values()))
        per_task = {}
        for task in TASKS:
            parts = {"train": self.train[task], "valid": self.valid[task], "test": self.test[task]}
            examples = [example for part in parts.values() for example in part]
            lengths = [len(example.history) for example in examples] or [0]
            per_task[task] = {
                "events": self.requests[task],
                **{name: len(part) for name, part in parts.items()},
                "targets_mean": statistics.fmean([len(example.target) for example in examples] or [0]),
                "history_mean": statistics.fmean(lengths),
                "history_median": float(statistics.median(lengths)),
                "history_max": max(lengths),
            }
        return {
            "name": self.name,
            "users": len(self.events),
            "items": len(self.items),
            "events": total,
            "density": total / (len(self.events) * len(self.items)),
            "per_task": per_task,
            "removed": dict(self.removed),
        }


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
