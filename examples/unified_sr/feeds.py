"""What training reads, and for how many steps.

A row is an example, a prompt of one target, or a window of a user's events, a sequence of many.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .data import Dataset, Example, Timeline, Turn
from .model import Batch, Collator, PromptBuilder, SequenceBuilder
from .settings import Settings


@dataclass(frozen=True)
class Window:
    """Neighbouring turns of one timeline, short enough for one sequence.

    Args:
        context: items that precede them.
        turns: in order of time.
    """

    context: tuple[int, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Pool:
    """What an epoch goes through.

    Args:
        name: of the stream, for the seed and for errors.
        units: examples, or timelines that are cut into windows.
        length: the most turns of a window; None where the units are examples.
    """

    name: str
    units: Sequence[Any]
    length: int | None = None

    def __len__(self) -> int:
        """How many rows of a batch an epoch has; the cuts differ from epoch to epoch, their number does not."""
        if self.length is None:
            return len(self.units)
        return sum(-(-len(unit.turns) // self.length) for unit in self.units)

    def epoch(self, generator: np.random.Generator) -> list[Any]:
        """Return the rows of an epoch in a new order."""
        rows = self.units if self.length is None else self._windows(self.length, generator)
        return [rows[int(index)] for index in generator.permutation(len(rows))]

    def batches(self, size: int, seed: int) -> Iterator[list[Any]]:
        """Yield batches for ever, in an order that depends on the seed, the pool's name and the epoch alone."""
        if not self.units:
            raise ValueError(f"the task {self.name!r} has no training example")
        generator = np.random.default_rng([seed, *self.name.encode()])
        waiting: list[Any] = []
        while True:
            while len(waiting) < size:
                waiting.extend(self.epoch(generator))
            yield waiting[:size]
            del waiting[:size]

    def _windows(self, length: int, generator: np.random.Generator) -> list[Window]:
        """Cut each timeline anew: the first and the last window take what the others leave over."""
        found = []
        for timeline in self.units:
            count = len(timeline.turns)
            spare = -count % length
            first = length - int(generator.integers(spare + 1)) if count > length else count
            bounds = [0, *range(first, count, length), count]
            for start, end in itertools.pairwise(bounds):
                context = timeline.context if start == 0 else timeline.turns[start - 1].items
                found.append(Window(context[-length:], timeline.turns[start:end]))
        return found


def training_pools(dataset: Dataset, settings: Settings, tasks: Sequence[str]) -> dict[str, Pool]:
    """Return what is trained on, by the name of its stream.

    Args:
        dataset: of the run.
        settings: whose ``format`` decides, and whose ``title_searches`` says how often an epoch asks for each title.
        tasks: those that are trained; in sequences the others' events only lead to later ones. All time lines stay, so
            that a task's targets come in the order of joint training.

    Raises:
        ValueError: if titles are to be searched for, but searches are not trained or no item has a title.
    """
    titles = _title_searches(dataset, settings, tasks)
    if settings.model.format == "prompt":
        return {task: Pool(task, [*dataset.train[task], *(titles if task == "search" else ())]) for task in tasks}
    timelines = [_only(timeline, tasks) for timeline in dataset.timelines]
    asked = [Timeline("", (), (Turn(each.target, (each.query,), ("search",)),)) for each in titles]
    return {"sequences": Pool("sequences", [*timelines, *asked], settings.model.max_history)}


def _title_searches(dataset: Dataset, settings: Settings, tasks: Sequence[str]) -> list[Example]:
    """Searches by title without a history, whose answers are the items of that title."""
    times, each = settings.training.title_searches, settings.training.targets == "each"
    if not times:
        return []
    named: dict[str, list[int]] = {}
    for number, item in enumerate(dataset.items):
        if item.title != item.id:  # where the source has no title
            named.setdefault(item.title, []).append(number)
    if not named or "search" not in tasks:
        raise ValueError(
            f"training.title_searches={times} needs items with titles ({len(named)} have one here) and the task "
            f"'search' (trained are {', '.join(tasks)}); set it to 0"
        )
    targets = [
        (title, answer)
        for title, items in named.items()
        for answer in ([(item,) for item in items] if each else [tuple(items)])
    ]
    return [Example("search", "", (), title, answer, 0.0, f"title-{answer[0]}") for title, answer in targets] * times


def _only(timeline: Timeline, tasks: Sequence[str]) -> Timeline:
    """A timeline with the targets of some tasks."""
    turns = tuple(replace(turn, tasks=tuple(task for task in turn.tasks if task in tasks)) for turn in timeline.turns)
    return replace(timeline, turns=turns)


class Feed:
    """Turns the rows of a pool into batches for the model.

    Args:
        pools: of ``training_pools``.
        collate: pads.
        builder: turns an example, or a window of a user's events, into tokens.
    """

    def __init__(self, pools: Mapping[str, Pool], collate: Collator, builder: PromptBuilder) -> None:
        self.pools = dict(pools)
        self._collate = collate
        self._builder = builder

    def batch(self, rows: Sequence[Any]) -> Batch:
        """Return the batch of some rows, without those that have nothing to predict; one stays if all are so."""
        every = [self._builder.row(row) for row in rows]
        made = [(ids, places) for ids, places in every if places] or every[:1]
        return self._collate.sequences([ids for ids, _ in made], [places for _, places in made])

    def arranged(self, rows: Sequence[Any]) -> list[Any]:
        """Return rows as they are cut into micro-batches: windows by length, so that little is padding."""
        if not isinstance(self._builder, SequenceBuilder):
            return list(rows)
        return sorted(rows, key=lambda row: len(self._builder.row(row)[0]))

    def size(self, row: Any) -> tuple[int, int]:
        """Return how many tokens a row has, and how many targets."""
        batch = self.batch([row])
        return batch.tokens, len(batch.targets)


def cut(rows: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Cut a batch into parts whose sizes differ by one at most.

    Raises:
        ValueError: if there are fewer rows than parts.
    """
    if not 1 <= count <= len(rows):
        raise ValueError(
            f"accumulation must lie between 1 and batch_size, got accumulation={count} for {len(rows)} rows"
        )
    limits = [part * len(rows) // count for part in range(count + 1)]
    return [rows[start:end] for start, end in itertools.pairwise(limits)]


@dataclass(frozen=True)
class Plan:
    """How long training is.

    Args:
        steps: optimizer steps, if nothing ends it earlier.
        per_epoch: steps in which the largest stream of joint training is read once.
    """

    steps: int
    per_epoch: int


def plan_training(settings: Settings, pools: Mapping[str, Sized]) -> Plan:
    """Settle the number of steps.

    Args:
        settings: of the run.
        pools: what an epoch of all tasks goes through, by stream, whichever are trained.

    Raises:
        ValueError: if ``early_stop`` is set without ``epochs``, or ``accumulation`` exceeds ``batch_size``.
    """
    training = settings.training
    if training.early_stop is not None and training.epochs is None:
        raise ValueError(
            f"training.early_stop={training.early_stop} counts epochs, but training.epochs is null; set it to the most "
            "wanted, or early_stop to null"
        )
    if training.accumulation > training.batch_size:
        raise ValueError(
            f"training.accumulation={training.accumulation} parts cannot be cut from training.batch_size="
            f"{training.batch_size} examples; lower it"
        )
    per_epoch = max(math.ceil(len(rows) / training.batch_size) for rows in pools.values())
    return Plan(training.steps if training.epochs is None else training.epochs * per_epoch, per_epoch)
