"""From an event, at its place in a user's time line, to examples with a history that knows nothing of the future."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..settings import DatasetSettings
from ._events import SPLITS, Event
from ._types import Example, Turn


def steps(events: Sequence[Event]) -> list[int]:
    """Return how many interactions precede each event; a derived event shares the number of its interaction."""
    found, count = [], 0
    for event in events:
        found.append(count)
        count += not event.derived
    return found


def meetings(events: Sequence[Event], index: Mapping[str, int]) -> tuple[tuple[int, ...], list[int]]:
    """Return the items that a user met, in the order of the first time, and how many of them precede each event.

    An item in an event's recorded history was met before that event.
    """
    met: dict[int, None] = {}
    counts = []
    for event in events:
        met.update((index[item], None) for item in event.history or () if item in index)
        counts.append(len(met))
        if not event.derived:
            met.update((index[item], None) for item in event.items)
    return tuple(met), counts


class ExampleMaker:
    """Makes one user's examples; call it with each event, in order of time.

    No history holds its own or a later event. With ``ranked`` none holds an event of a later part either: a source's
    own split may train on events that came after held-out ones, and these must enter no training history.

    Args:
        user: the user's identifier.
        index: item id -> index in the catalogue.
        rules: how examples are made.
        ranked: whether events of a later part are hidden from the earlier ones.
    """

    def __init__(self, user: str, index: Mapping[str, int], rules: DatasetSettings, *, ranked: bool) -> None:
        self._user = user
        self._index = index
        self._rules = rules
        self._ranked = ranked
        # For each part the items met so far that its histories may hold, and those that they must not.
        self._known: list[list[tuple[int, tuple[str, ...]]]] = [[] for _ in SPLITS]
        self._hidden: list[set[int]] = [set() for _ in SPLITS]
        self._numbers: Counter[tuple[str, str]] = Counter()
        self._asked: list[str] = []  # by derived events, of the next one that is none

    def __call__(self, event: Event, part: str) -> list[Example] | None:
        """Return the examples of an event, more than one only in training, or ``None`` if it has no history to go by.

        Args:
            event: the next event.
            part: one of ``SPLITS``, or empty for an event that only adds to the histories of later ones.
        """
        rank = SPLITS.index(part) if self._ranked else 0
        history, asked = self._history(event, rank)
        items = tuple(self._index[item] for item in event.items)
        if event.derived:
            self._asked.append(event.query)
        else:
            self._add(items, self._queries(event), rank)
            self._asked.clear()
        if not part:
            return []
        if not history and event.task == "rec":
            return None
        each = part == "train" and self._rules.train_targets == "each"
        targets = [(item,) for item in items] if each else [items]
        return [
            Example(
                event.task,
                self._user,
                history,
                event.query,
                target,
                event.timestamp,
                self._qid(part, event.task),
                asked,
            )
            for target in targets
        ]

    def turn(self, event: Event) -> tuple[tuple[int, ...] | None, Turn] | None:
        """Return an event of the training part as a turn, before it is called with it.

        Args:
            event: the next event.

        Returns:
            The history that the source recorded with it, or ``None`` where it follows what came before, and the turn;
            ``None`` for a derived event, whose query is part of the turn that it was derived from.
        """
        if event.derived:
            return None
        history, _ = self._history(event, 0)
        queries = self._queries(event)
        recommended = not event.query and bool(history)
        tasks = tuple(task for task, there in (("rec", recommended), ("search", bool(queries))) if there)
        turn = Turn(tuple(self._index[item] for item in event.items), queries, tasks)
        return (history if self._recorded(event) else None), turn

    def _queries(self, event: Event) -> tuple[str, ...]:
        return (*self._asked, *([event.query] if event.query else []))

    def _recorded(self, event: Event) -> bool:
        return event.history is not None and self._rules.histories != "events"

    def _history(self, event: Event, rank: int) -> tuple[tuple[int, ...], tuple[tuple[str, ...], ...]]:
        if event.history is None or not self._recorded(event):
            known = self._known[rank][-self._rules.max_history :]
            return tuple(item for item, _ in known), tuple(asked for _, asked in known)
        recorded = event.history[::-1] if self._rules.histories == "recorded-newest-first" else event.history
        items = [self._index[item] for item in recorded if item in self._index]
        return tuple([item for item in items if item not in self._hidden[rank]][-self._rules.max_history :]), ()

    def _add(self, items: Sequence[int], queries: tuple[str, ...], rank: int) -> None:
        for reader in range(len(SPLITS)):
            if reader >= rank:
                # A query stands before the first of the items that answered it.
                self._known[reader].extend((item, () if place else queries) for place, item in enumerate(items))
            else:
                self._hidden[reader].update(items)

    def _qid(self, part: str, task: str) -> str:
        self._numbers[part, task] += 1
        number = self._numbers[part, task]
        # The user's name comes last, so that no name can make two of them equal.
        words = [*([] if part == "test" else [part]), *([] if number == 1 else [str(number)]), task, self._user]
        return "-".join(words)
