"""What every source of data is turned into: items, examples and the data set that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
            strictly earlier than this one.
        query: what the user asked for; empty exactly when ``task == "rec"``.
        target: indices of the relevant items, here the event's own item.
        timestamp: the event's time in the source's unit.
        qid: unique in the data set; ``"rec-USER"`` for the test example, with a suffix for the other splits.
    """

    task: str
    user: str
    history: tuple[int, ...]
    query: str
    target: tuple[int, ...]
    timestamp: float
    qid: str


@dataclass(frozen=True)
class Dataset:
    """A catalogue with training, validation and test examples per task.

    ``train``, ``valid`` and ``test`` have the same keys, the names in ``tasks``; a task without events is absent from
    ``tasks`` and maps to an empty tuple.

    Args:
        name: how reports call it.
        items: the catalogue after filtering; examples refer to it by index.
        train: examples before the user's first held-out event.
        valid: the last event but one of each user and task.
        test: the last event of each user and task.
        events: each user's item indices in order of time, after filtering.
        positions: where in ``events[example.user]`` the example with a qid stands.
        counts: what loading counted, see ``statistics``.
    """

    name: str
    items: tuple[Item, ...]
    train: Mapping[str, tuple[Example, ...]]
    valid: Mapping[str, tuple[Example, ...]]
    test: Mapping[str, tuple[Example, ...]]
    events: Mapping[str, tuple[int, ...]] = field(repr=False)
    positions: Mapping[str, int] = field(repr=False)
    counts: Mapping[str, int] = field(repr=False)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have events, in the order of ``TASKS``."""
        raise NotImplementedError

    def seen(self, example: Example) -> frozenset[int]:
        """Items the user had met before the example's event, of any task and any age; never one of its targets."""
        raise NotImplementedError

    def statistics(self) -> dict[str, object]:
        """Sizes of the data set, ready for JSON."""
        raise NotImplementedError
