"""From an event, at its place in a user's time line, to examples with a history that knows nothing of the future."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ._events import SPLITS, Event
from ._types import Example

HISTORIES = ("recorded", "recorded-newest-first", "events")
TRAIN_TARGETS = ("share", "each")


@dataclass(frozen=True)
class Rules:
    """How examples are made.

    Args:
        max_history: the number of most recent items kept in a history.
        histories: one of ``HISTORIES``, see ``load_dataset``.
        train_targets: one of ``TRAIN_TARGETS``, see ``load_dataset``.
    """

    max_history: int
    histories: str = "recorded"
    train_targets: str = "share"


def places(events: Sequence[Event]) -> list[int]:
    """Return how many items of the user's time line precede each event; derived events add none."""
    found, count = [], 0
    for event in events:
        found.append(count)
        count += 0 if event.derived else len(event.items)
    return found


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

    def __init__(self, user: str, index: Mapping[str, int], rules: Rules, *, ranked: bool) -> None:
        self._user = user
        self._index = index
        self._rules = rules
        self._ranked = ranked
        # For each part the items met so far that its histories may hold, and those that they must not.
        self._known: list[list[int]] = [[] for _ in SPLITS]
        self._hidden: list[set[int]] = [set() for _ in SPLITS]
        self._numbers: Counter[tuple[str, str]] = Counter()

    def __call__(self, event: Event, part: str) -> list[Example] | None:
        """Return the examples of an event, more than one only in training, or ``None`` if it has no history to go by.

        Args:
            event: the next event.
            part: one of ``SPLITS``, or empty for an event that only adds to the histories of later ones.
        """
        rank = SPLITS.index(part) if self._ranked else 0
        history = self._history(event, rank)
        items = tuple(self._index[item] for item in event.items)
        if not event.derived:
            self._add(items, rank)
        if not part:
            return []
        if not history and event.task == "rec":
            return None
        each = part == "train" and self._rules.train_targets == "each"
        targets = [(item,) for item in items] if each else [items]
        return [
            Example(event.task, self._user, history, event.query, target, event.timestamp, self._qid(part, event.task))
            for target in targets
        ]

    def recorded(self, event: Event) -> tuple[int, ...]:
        """Return an event's recorded history, oldest first, without the items that are not in the catalogue."""
        found = tuple(self._index[item] for item in event.history or () if item in self._index)
        return found[::-1] if self._rules.histories == "recorded-newest-first" else found

    def _history(self, event: Event, rank: int) -> tuple[int, ...]:
        if event.history is None or self._rules.histories == "events":
            return tuple(self._known[rank][-self._rules.max_history :])
        allowed = [item for item in self.recorded(event) if item not in self._hidden[rank]]
        return tuple(allowed[-self._rules.max_history :])

    def _add(self, items: Sequence[int], rank: int) -> None:
        for reader in range(len(SPLITS)):
            if reader >= rank:
                self._known[reader].extend(items)
            else:
                self._hidden[reader].update(items)

    def _qid(self, part: str, task: str) -> str:
        self._numbers[part, task] += 1
        number = self._numbers[part, task]
        # The user's name comes last, so that no name can make two of them equal.
        words = [*([] if part == "test" else [part]), *([] if number == 1 else [str(number)]), task, self._user]
        return "-".join(words)
