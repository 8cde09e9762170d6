"""Which part each event of a user belongs to: leave-one-out by time, or the source's own split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..settings import DatasetSettings
from ._events import SPLITS, Event
from ._examples import ExampleMaker, meetings, steps
from ._types import TASKS, Example, Timeline, Turn

MIN_HELD_OUT = 3
"""Events of a task that a user needs before any is held out: one each to test, validate and train on."""


@dataclass
class Split:
    """The examples of each part and task, what each user had met before, and what was left out.

    Args:
        parts: split -> task -> examples.
        met: user -> the items met, in the order of the first time.
        positions: qid -> how many of these precede the example's event.
        timelines: the training events of each user as they follow one another.
        after_held_out: events that leave-one-out neither holds out nor trains on.
        without_history: recommendations that nothing precedes.
    """

    parts: dict[str, dict[str, list[Example]]] = field(
        default_factory=lambda: {part: {task: [] for task in TASKS} for part in SPLITS}
    )
    met: dict[str, tuple[int, ...]] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    timelines: list[Timeline] = field(default_factory=list)
    after_held_out: int = 0
    without_history: int = 0


def make_split(
    by_user: Mapping[str, Sequence[Event]], index: Mapping[str, int], rules: DatasetSettings, own: bool
) -> Split:
    """Turn each user's events, in order of time, into examples.

    Leave-one-out, per user and task:

    * test: the last event of each task; valid: the one before it; both only where the user has at least
      ``MIN_HELD_OUT`` events of that task. Of one interaction that is asked for several times, all questions that are
      held out are in one part, the test part if one task's last event is among them.
    * train: the events before the user's first held-out event of *either* task. Later ones would put a held-out item
      into a training history, or train on the user's future. On MovieLens-100K this costs 1.4 % of the training
      examples.

    The source's own split: every event goes where the source says, and derived events of one user with the same query
    outside the training part are one question, whose answer is all their items.

    A recommendation without any history says nothing about its target and is no example; a search is.

    Args:
        by_user: events per user, in order of time.
        index: item id -> index in the catalogue.
        rules: how examples are made.
        own: whether the source's own split holds.
    """
    split = Split()
    for user, unmerged in by_user.items():
        events = _merge_derived(unmerged) if own else list(unmerged)
        parts = [event.split for event in events] if own else _leave_one_out(events)
        maker = ExampleMaker(user, index, rules, ranked=own)
        split.met[user], counts = meetings(events, index)
        turns: list[Turn] = []
        for event, count, part in zip(events, counts, parts, strict=True):
            found = maker.turn(event) if part == "train" else None
            if found is not None:
                recorded, turn = found
                if recorded is None:
                    turns.append(turn)
                elif turn.tasks:
                    split.timelines.append(Timeline(user, recorded, (turn,)))
            made = maker(event, part)
            split.after_held_out += not part
            split.without_history += made is None
            for example in made or ():
                split.parts[part][example.task].append(example)
                split.positions[example.qid] = count
        if any(turn.tasks for turn in turns):
            split.timelines.append(Timeline(user, (), tuple(turns)))
    return split


def _leave_one_out(events: Sequence[Event]) -> list[str]:
    # Derived events share the step of their interaction, so that all questions about it go to the same part.
    at = steps(events)
    found = {task: {step for event, step in zip(events, at, strict=True) if event.task == task} for task in TASKS}
    enough = {task: own for task, own in found.items() if len(own) >= MIN_HELD_OUT}
    held_out = {max(own): "test" for own in enough.values()}
    before = [own - held_out.keys() for own in enough.values()]
    held_out |= {max(own): "valid" for own in before if own}
    first = min(held_out, default=len(events))

    def part(event: Event, step: int) -> str:
        if step < first:
            return "train"
        return held_out.get(step, "") if event.task in enough else ""

    return [part(event, step) for event, step in zip(events, at, strict=True)]


def _merge_derived(events: Sequence[Event]) -> list[Event]:
    merged: list[Event] = []
    asked: dict[tuple[str, str], int] = {}
    for event in events:
        if event.derived and event.split != "train":
            first = asked.setdefault((event.split, event.query), len(merged))
            if first < len(merged):
                items = dict.fromkeys((*merged[first].items, *event.items))
                merged[first] = replace(merged[first], items=tuple(items))
                continue
        merged.append(event)
    return merged
