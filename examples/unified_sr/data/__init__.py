"""Data of the unified search and recommendation example: a source in, a split ``Dataset`` out.

A source's text files (``_atomic``) become events and items (``_sources``, with the text of ``_movies``); ``_filters``
removes repeats and sparse users and items; ``_split`` makes examples that never look into the future.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ._filters import drop_repeats, k_core
from ._sources import MOVIELENS, Event, read_source
from ._split import leave_one_out
from ._statistics import format_statistics
from ._types import TASKS, Dataset, Example, Item

__all__ = ["MOVIELENS", "TASKS", "Dataset", "Example", "Item", "format_statistics", "load_dataset"]


def load_dataset(
    source: str,
    *,
    min_user_events: int = 5,
    min_item_events: int = 5,
    max_history: int = 20,
    seed: int = 0,
    repeats: str = "drop",
) -> Dataset:
    """Load, filter and split a source.

    The order of a user's events is that of their timestamps; equal timestamps keep the file's order. Per user and
    task the last event is the test example and the one before it the validation example, where there are three or
    more; training examples are the user's events before the first of those of either task. So no history holds its
    own or a later event, and no held-out event is in a training history or target of its user.

    Args:
        source: ``"movielens-100k"`` (read out of the installed package recbole), or a folder with one ``*.inter``
            (columns ``user_id:token``, ``item_id:token``, ``timestamp:float``, optionally ``query:token_seq``) and
            one ``*.item`` file (``item_id:token`` and a ``token_seq`` column ``title``, ``item_title``,
            ``movie_title``, ``name`` or ``class``). An event with a query is a search, one with an empty query a
            recommendation. Without a query column, but with a genre and a year column in the ``.item`` file, a hash
            of ``seed``, user and item makes half of the events searches for "genres + decade"; otherwise all events
            are recommendations and the task ``"search"`` is empty.
        min_user_events: users with fewer events, of both tasks together, are removed (at least 1).
        min_item_events: items with fewer events are removed (0 keeps items without any event). Both rules are
            repeated until nothing changes.
        max_history: the longest history, in events (at least 1).
        seed: decides which events are searches where the data does not say.
        repeats: ``"drop"`` keeps only a user's first event with an item: ranking excludes the items seen before, and
            a repeated target would be the only one of them left to choose. ``"keep"`` keeps all.

    Raises:
        FileNotFoundError: if the source, one of its files, or the package with MovieLens-100K is not there.
        ValueError: if a file cannot be used, an argument is out of range, or nothing is left to test on.
    """
    for name, value, low in (
        ("min_user_events", min_user_events, 1),
        ("min_item_events", min_item_events, 0),
        ("max_history", max_history, 1),
    ):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    if repeats not in ("drop", "keep"):
        raise ValueError(f"repeats must be 'drop' or 'keep', got {repeats!r}")
    raw = read_source(source, seed)
    once = drop_repeats(raw.events) if repeats == "drop" else list(raw.events)
    kept = k_core(once, min_user_events, min_item_events)
    used = {event.item for event in kept}
    items = tuple(item for item in raw.items if item.id in used or min_item_events == 0)
    by_user = _group(kept)
    index = {item.id: number for number, item in enumerate(items)}
    split = leave_one_out(by_user, index, max_history)
    if not any(split.test.values()):
        raise ValueError(
            f"{source!r} leaves nothing to test on: {len(kept)} of {len(raw.events)} events remain with "
            f"min_user_events={min_user_events} and min_item_events={min_item_events}, and no user has three of one "
            "task; lower these limits or pass more data"
        )
    return Dataset(
        name=raw.name,
        items=items,
        train=_frozen(split.train),
        valid=_frozen(split.valid),
        test=_frozen(split.test),
        events={user: tuple(index[event.item] for event in events) for user, events in by_user.items()},
        positions=split.positions,
        counts={
            **{f"{task}_events": sum(event.task == task for event in kept) for task in TASKS},
            "repeated_events": len(raw.events) - len(once),
            "k_core_events": len(once) - len(kept),
            "k_core_users": len({event.user for event in once}) - len(by_user),
            "k_core_items": len(raw.items) - len(items),
            "after_held_out": split.after_held_out,
            "without_history": split.without_history,
        },
    )


def _group(events: Sequence[Event]) -> dict[str, list[Event]]:
    by_user: dict[str, list[Event]] = {}
    for event in events:
        by_user.setdefault(event.user, []).append(event)
    return by_user


def _frozen(part: Mapping[str, Sequence[Example]]) -> dict[str, tuple[Example, ...]]:
    return {task: tuple(examples) for task, examples in part.items()}
