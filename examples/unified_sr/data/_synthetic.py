"""Searches for data that records none: an interaction is turned into one by a query that describes its item."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ._events import Event, Reading


def with_searches(event: Event, queries: Sequence[str], reading: Reading) -> Iterator[Event]:
    """Yield what becomes of an interaction with one item that these queries describe.

    With ``searches="half"`` one event, which ``searched`` makes a search for one of the queries or leaves a
    recommendation. With ``"every"`` a derived search for each query and then the recommendation: the searches come
    first, so that the item itself is in none of the histories.
    """
    if not queries:
        yield event
    elif reading.searches == "every":
        for query in queries:
            yield replace(event, query=query, derived=True)
        yield event
    elif searched(event.user, event.items[0], reading.seed):
        yield replace(event, query=queries[_draw(event.user, event.items[0], reading.seed, len(queries))])
    else:
        yield event


def searched(user: str, item: str, seed: int) -> bool:
    """Tell whether this user found this item by a search, for data that records no searches.

    One bit of a hash of the three arguments: half of the events each, the same on every machine, and independent of
    the other events, so that filtering the data moves no event from one task to the other.
    """
    key = f"{seed}\t{user}\t{item}".encode()
    return bool(hashlib.blake2b(key, digest_size=1).digest()[0] & 1)


def _draw(user: str, item: str, seed: int, count: int) -> int:
    key = f"{seed}\t{user}\t{item}\tquery".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % count
