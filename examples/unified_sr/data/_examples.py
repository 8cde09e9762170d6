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

    def _history(self, event: Event, rank: int) -> tuple[int, ...]:
        if event.history is None or self._rules.histories == "events":
            return tuple(self._known[rank][-self._rules.max_history :])
        recorded = event.history[::-1] if self._rules.histories == "recorded-newest-first" else event.history
        items = [self._index[item] for item in recorded if item in self._index]
        return tuple([item for item in items if item not in self._hidden[rank]][-self._rules.max_history :])

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
