"""Data of the unified search and recommendation example: a source in, a split ``Dataset`` out.

A reader for each format (``_sources`` names them) turns files into events and items; ``_filters`` removes repeats and
sparse users and items; ``_split`` and ``_examples`` make examples that never look into the future. The formats are
described in ``README.md`` beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..settings import DatasetSettings
from ._atomic import read_atomic
from ._events import SPLITS, Event
from ._filters import drop_repeats, k_core, mentioned
from ._queries import natural_title
from ._recbole import MOVIELENS, movielens_folder
from ._sources import read_source
from ._split import make_split
from ._types import TASKS, Dataset, Example, Item, Timeline, Turn, format_statistics

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


def load_dataset(source: str, **settings: Any) -> Dataset:
    """Load, filter and split a source.

    The order of a user's events is that of their timestamps; equal timestamps keep the file's order. Where the source
    has no split of its own, the last event per user and task is the test example and the one before it the validation
    example, where there are three or more; training examples are the user's events before the first of those of either
    task. So no history holds its own or a later event, and no held-out event is in a training history or target of its
    user. Of several events of a user with one item the first one stays: ranking excludes the items seen before, and a
    repeated target would be the only one of them left to choose.

    Args:
        source: ``"movielens-100k"`` (read out of the installed package recbole), or a folder, whose format its files
            tell: see ``README.md`` beside this module.
        settings: the others of ``DatasetSettings``.

    Raises:
        FileNotFoundError: if the source, one of its files, or the package with MovieLens-100K is not there.
        ImportError: if the format needs a package that is not installed, naming the extra.
        ValueError: if a file cannot be used, a setting is unknown or out of range, or nothing is left to test on.
    """
    wanted = DatasetSettings(source=source, **settings)
    raw = read_source(source, wanted.searches)
    once = drop_repeats(raw.events)
    kept = k_core(once, wanted)
    used = mentioned(kept, wanted.item_counts)
    items = tuple(item for item in raw.items if item.id in used or wanted.min_item_events == 0)
    by_user = _group(kept)
    index = {item.id: number for number, item in enumerate(items)}
    own = wanted.split == "source" and any(event.split for event in raw.events)
    made = make_split(by_user, index, wanted, own)
    if not any(made.parts["test"].values()):
        raise ValueError(
            f"{source!r} leaves nothing to test on: {_pairs(kept)} of {_pairs(raw.events)} events remain with "
            f"min_user_events={wanted.min_user_events}, min_task_events={wanted.min_task_events} and "
            f"min_item_events={wanted.min_item_events}, and "
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
        requests={task: sum(event.task == task for event in kept) for task in TASKS},
        removed={
            **raw.left_out,
            "repeated_events": _pairs(raw.events) - _pairs(once),
            "events_by_k_core": _pairs(once) - _pairs(kept),
            "users_by_k_core": len({event.user for event in once}) - len(by_user),
            "items_by_k_core": len(raw.items) - len(items),
            "events_after_a_held_out_one": made.after_held_out,
            "recommendations_without_history": made.without_history,
        },
    )


def _pairs(events: Sequence[Event]) -> int:
    return sum(len(event.items) for event in events if not event.derived)


def _group(events: Sequence[Event]) -> Mapping[str, list[Event]]:
    by_user: dict[str, list[Event]] = {}
    for event in events:
        by_user.setdefault(event.user, []).append(event)
    return by_user
