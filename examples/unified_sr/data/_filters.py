"""What is removed before the split: repeated interactions, and all that is outside the k-core."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ._sources import Event


def drop_repeats(events: Sequence[Event]) -> list[Event]:
    """Keep each user's first event with each item; ``events`` are in order of time."""
    met: set[tuple[str, str]] = set()
    kept = []
    for event in events:
        if (event.user, event.item) not in met:
            met.add((event.user, event.item))
            kept.append(event)
    return kept


def k_core(events: Sequence[Event], min_user_events: int, min_item_events: int) -> list[Event]:
    """Remove users and items with too few events until none is left to remove.

    The result is the largest subset in which every user and every item has its minimum; removing a user can push an
    item below its minimum and the other way round, so one pass over each is not enough.
    """
    kept = list(events)
    while True:
        users = Counter(event.user for event in kept)
        items = Counter(event.item for event in kept)
        enough = [
            event for event in kept if users[event.user] >= min_user_events and items[event.item] >= min_item_events
        ]
        if len(enough) == len(kept):
            return enough
        kept = enough
