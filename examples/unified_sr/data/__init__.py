"""Data of the unified search and recommendation example: a source in, a split ``Dataset`` out.

A reader for each format (``_sources`` names them) turns files into events and items; ``_filters`` removes repeats and
sparse users and items; ``_split`` and ``_examples`` make examples that never look into the future. The formats are
described in ``README.md`` beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ._atomic import read_atomic
from ._events import SPLITS, Event, Reading
from ._examples import HISTORIES, TRAIN_TARGETS, Rules
from ._filters import ITEM_COUNTS, Minima, drop_repeats, k_core, mentioned
from ._movies import natural_title
from ._recbole import MOVIELENS, movielens_folder
from ._sources import read_source
from ._split import make_split
from ._statistics import format_statistics
from ._types import TASKS, Dataset, Example, Item, Timeline, Turn

__all__ = [
    "MOVIELENS",
    "TASKS",
    "Dataset",
    "Example",
    "Item",
    "Timeline",
    "Turn",
    "format_statistics",
    "load_dataset",
    "movielens_folder",
    "natural_title",
    "read_atomic",
]

CHOICES = {
    "repeats": ("drop", "keep"),
    "split": ("source", "leave-one-out"),
    "histories": HISTORIES,
    "item_counts": ITEM_COUNTS,
    "searches": ("half", "every"),
    "train_targets": TRAIN_TARGETS,
}


def load_dataset(
    source: str,
    *,
    min_user_events: int = 5,
    min_task_events: int = 0,
    min_item_events: int = 5,
    item_counts: str = "events",
    max_history: int = 20,
    split: str = "source",
    histories: str = "recorded",
    searches: str = "half",
    train_targets: str = "share",
    repeats: str = "drop",
    seed: int = 0,
) -> Dataset:
    """Load, filter and split a source.

    The order of a user's events is that of their timestamps; equal timestamps keep the file's order. Where the source
    has no split of its own, the last event per user and task is the test example and the one before it the validation
    example, where there are three or more; training examples are the user's events before the first of those of either
    task. So no history holds its own or a later event, and no held-out event is in a training history or target of its
    user.

    Args:
        source: ``"movielens-100k"`` (read out of the installed package recbole), or a folder, whose format its files
            tell: see ``README.md`` beside this module.
        min_user_events: users with fewer events, of both tasks together, are removed (at least 1).
        min_task_events: users with fewer events in one of the two tasks are removed; 0 does not ask.
        min_item_events: items with fewer mentions are removed (0 keeps items without any event). All three rules are
            repeated until nothing changes.
        item_counts: what is a mention of an item, and so what the catalogue is made of: ``"events"`` that it was
            chosen, ``"impressions"`` also that it was displayed or is in a recorded history.
        max_history: the longest history, in items (at least 1).
        split: ``"source"`` takes the source's own split where it has one; ``"leave-one-out"`` ignores it.
        histories: where the source records a history with each event, ``"recorded"`` takes it as it stands, oldest
            first, ``"recorded-newest-first"`` reverses it, and ``"events"`` takes the user's earlier events instead.
        searches: for data without recorded searches, but with text that makes queries. ``"half"``: a hash of ``seed``,
            user and item makes half of the interactions searches. ``"every"``: each interaction is a recommendation
            and, besides, a search for each of the item's queries.
        train_targets: ``"share"``: the targets of a training example share its weight. ``"each"``: one training
            example for each target.
        repeats: ``"drop"`` keeps only a user's first event with an item: ranking excludes the items seen before, and
            a repeated target would be the only one of them left to choose. ``"keep"`` keeps all.
        seed: decides which events are searches where the data does not say.

    Raises:
        FileNotFoundError: if the source, one of its files, or the package with MovieLens-100K is not there.
        ImportError: if the format needs a package that is not installed, naming the extra.
        ValueError: if a file cannot be used, an argument is out of range, or nothing is left to test on.
    """
    chosen = {"repeats": repeats, "split": split, "histories": histories, "item_counts": item_counts}
    chosen |= {"searches": searches, "train_targets": train_targets}
    for name, choice in chosen.items():
        if choice not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}, got {choice!r}")
    limits = {"min_user_events": (min_user_events, 1), "min_task_events": (min_task_events, 0)}
    limits |= {"min_item_events": (min_item_events, 0), "max_history": (max_history, 1)}
    for name, (value, low) in limits.items():
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    raw = read_source(source, Reading(seed, searches))
    once = drop_repeats(raw.events) if repeats == "drop" else list(raw.events)
    kept = k_core(once, Minima(min_user_events, min_task_events, min_item_events, item_counts))
    used = mentioned(kept, item_counts)
    items = tuple(item for item in raw.items if item.id in used or min_item_events == 0)
    by_user = _group(kept)
    index = {item.id: number for number, item in enumerate(items)}
    own = split == "source" and any(event.split for event in raw.events)
    made = make_split(by_user, index, Rules(max_history, histories, train_targets), own)
    if not any(made.parts["test"].values()):
        raise ValueError(
            f"{source!r} leaves nothing to test on: {_pairs(kept)} of {_pairs(raw.events)} events remain with "
            f"min_user_events={min_user_events}, min_task_events={min_task_events} and "
            f"min_item_events={min_item_events}, and "
            + ("none of them is in the source's test part" if own else "no user has three of one task")
            + "; lower these limits or pass more data"
        )
    train, valid, test = ({task: tuple(examples) for task, examples in made.parts[part].items()} for part in SPLITS)
    return Dataset(
        name=raw.name,
        items=items,
        train=train,
        valid=valid,
        test=test,
        events={
            user: tuple(index[item] for event in events if not event.derived for item in event.items)
            for user, events in by_user.items()
        },
        met=made.met,
        positions=made.positions,
        timelines=tuple(made.timelines),
        counts={
            **{f"{task}_events": sum(event.task == task for event in kept) for task in TASKS},
            "left_out": dict(raw.left_out),
            "repeated_events": _pairs(raw.events) - _pairs(once),
            "k_core_events": _pairs(once) - _pairs(kept),
            "k_core_users": len({event.user for event in once}) - len(by_user),
            "k_core_items": len(raw.items) - len(items),
            "after_held_out": made.after_held_out,
            "without_history": made.without_history,
        },
    )


def _pairs(events: Sequence[Event]) -> int:
    return sum(len(event.items) for event in events if not event.derived)


def _group(events: Sequence[Event]) -> Mapping[str, list[Event]]:
    by_user: dict[str, list[Event]] = {}
    for event in events:
        by_user.setdefault(event.user, []).append(event)
    return by_user
