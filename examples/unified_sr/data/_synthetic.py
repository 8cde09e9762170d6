"""Searches for data that records none: an interaction is turned into one by a query that describes its item."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ._events import Event


def with_searches(event: Event, queries: Sequence[str], searches: str) -> Iterator[Event]:
    """Yield what becomes of an interaction with one item that these queries describe.

    With ``searches="half"`` one event, which ``searched`` makes a search for one of the queries or leaves a
    recommendation. With ``"every"`` a derived search for each query and then the recommendation: the searches come
    first, so that the item itself is in none of the histories.
    """
    if not queries:
        yield event
    elif searches == "every":
        for query in queries:
            yield replace(event, query=query, derived=True)
        yield event
    elif searched(event.user, event.items[0]):
        place = _hash(f"0\t{event.user}\t{event.items[0]}\tquery", 8) % len(queries)
        yield replace(event, query=queries[place])
    else:
        yield event


def searched(user: str, item: str) -> bool:
    """Tell whether this user found this item by a search, for data that records no searches.

    One bit of a hash of the two arguments: half of the events each, the same on every machine, and independent of the
    other events, so that filtering the data moves no event from one task to the other.
    """
    return bool(_hash(f"0\t{user}\t{item}", 1) & 1)


def _hash(key: str, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=size).digest(), "big")
