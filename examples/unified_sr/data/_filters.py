"""What is removed before the split: repeated interactions, and all that is outside the k-core."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ..settings import DatasetSettings
from ._events import Event
from ._types import TASKS


def drop_repeats(events: Sequence[Event]) -> list[Event]:
    """Keep each user's first interaction with each item; ``events`` are in order of time.

    An item in a recorded history was met before, too. An event that loses all its items is removed.
    """
    met: dict[str, set[str]] = {}
    kept: list[Event] = []
    for event in events:
        own = met.setdefault(event.user, set())
        own.update(event.history or ())
        new = tuple(item for item in event.items if item not in own)
        if new:
            kept.append(event if len(new) == len(event.items) else replace(event, items=new))
        if not event.derived:
            own.update(event.items)
    return kept


def k_core(events: Sequence[Event], settings: DatasetSettings) -> list[Event]:
    """Remove users and items with too little until nothing is left to remove.

    Removed items leave the events, and an event goes with the last item of its answer. The result is the largest
    subset in which every user and every item has its minimum; removing a user can push an item below its minimum and
    the other way round, so one pass over each is not enough.
    """
    kept, least = list(events), settings.min_task_events
    while True:
        interactions = [event for event in kept if not event.derived]
        users = Counter(event.user for event in interactions)
        tasks = _interactions_by_task(kept) if least else Counter()
        items = Counter(item for event in interactions for item in _mentions(event, settings.item_counts))

        def stays(item: str, items: Counter[str] = items) -> bool:
            return items[item] >= settings.min_item_events

        enough: list[Event] = []
        for event in kept:
            if users[event.user] >= settings.min_user_events and (
                not least or all(tasks[event.user, task] >= least for task in TASKS)
            ):
                left = _keep(event, stays)
                enough.extend([left] if left.items else [])
        if enough == kept:
            return enough
        kept = enough


def _interactions_by_task(events: Sequence[Event]) -> Counter[tuple[str, str]]:
    before: Counter[str] = Counter()
    found: set[tuple[str, str, int]] = set()
    for event in events:
        found.add((event.user, event.task, before[event.user]))
        before[event.user] += not event.derived
    return Counter((user, task) for user, task, _ in found)


def mentioned(events: Sequence[Event], item_counts: str) -> set[str]:
    """Return the items that the events mention in the way that ``item_counts`` says."""
    return {item for event in events for item in _mentions(event, item_counts)}


def _mentions(event: Event, item_counts: str) -> Iterator[str]:
    yield from event.items
    if item_counts == "impressions":
        yield from event.history or ()
        yield from event.shown


def _keep(event: Event, stays: Callable[[str], bool]) -> Event:
    # Nearly always all stay: no copy then, since there may be millions of events.
    if all(stays(item) for item in (*event.items, *(event.history or ()), *event.shown)):
        return event
    items, history, shown = (
        tuple(item for item in items if stays(item)) for items in (event.items, event.history or (), event.shown)
    )
    return replace(event, items=items, history=None if event.history is None else history, shown=shown)
