"""What every reader yields: events in order of time, the catalogue, and what had to be left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ._types import Item

SPLITS = ("train", "valid", "test")
"""The parts that a source may assign its events to, in the order in which one may know another's history."""


@dataclass(frozen=True, slots=True)
class Event:
    """One request of a user and the items that answered it.

    Args:
        user: the user's identifier in the source.
        items: what the user clicked, bought or rated in it, at least one item, each once.
        timestamp: in the source's unit.
        query: what the user asked for; empty for a recommendation.
        split: one of ``SPLITS`` where the source publishes a split, otherwise empty.
        history: the items met before, oldest first, where the source records them itself; ``None`` means the user's
            earlier events.
        shown: items that were displayed with the answer and not chosen.
        derived: whether its items are those of another event of the user, asked for in other words. A derived event is
            predicted, but enters no history and counts for no minimum.
    """

    user: str
    items: tuple[str, ...]
    timestamp: float
    query: str = ""
    split: str = ""
    history: tuple[str, ...] | None = None
    shown: tuple[str, ...] = ()
    derived: bool = False

    @property
    def task(self) -> str:
        """The task that the event is an example of."""
        return "search" if self.query else "rec"


@dataclass(frozen=True)
class Source:
    """What a reader found.

    Args:
        name: how reports call it.
        events: in order of time, ties in the file's order; either all have a split or none has.
        items: the catalogue in the file's order, with every item of an event, its history and what it was shown with.
        left_out: what the reader skipped, as counts for the statistics.
    """

    name: str
    events: tuple[Event, ...]
    items: tuple[Item, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


def in_order(events: Iterable[Event]) -> tuple[Event, ...]:
    """Return events in order of time; equal times keep their order."""
    return tuple(sorted(events, key=lambda event: event.timestamp))


def only(folder: Path, found: Sequence[Path], kind: str, needs: str) -> Path:
    """Return the one file of a kind that a folder must hold; ``needs`` says which files its format has."""
    if not found:
        raise FileNotFoundError(f"{folder} holds no {kind}; {needs}")
    if len(found) > 1:
        raise ValueError(f"{folder} holds {', '.join(path.name for path in found)} where one {kind} is needed")
    return found[0]


def check_known(events: Sequence[Event], items: Sequence[Item], holds: str, lacks: str, remedy: str) -> None:
    """Check that the catalogue has every item that an event answers with.

    Args:
        events: the source's.
        items: the catalogue.
        holds: names the file with the events, for the message: "FILE holds".
        lacks: names the catalogue's: "FILE lacks".
        remedy: what to do about it.

    Raises:
        ValueError: naming the first user and item, and how many there are.
    """
    known = {item.id for item in items}
    unknown = [(event.user, item) for event in events for item in event.items if item not in known]
    if unknown:
        user, item = unknown[0]
        count = len({item for _, item in unknown})
        raise ValueError(
            f"{holds} the item {item!r} in an event of user {user!r}, which {lacks} ({count} such items, "
            f"{len(unknown)} times in events); {remedy}"
        )
