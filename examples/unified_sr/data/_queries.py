"""Text that a catalogue's entry makes: a natural title, and the queries of data that records no searches."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ._events import Event

# The name, a trailing article behind a comma, and optionally an alternative title in brackets behind both.
_INVERTED = re.compile(
    r"^(?P<name>[^()]+), (?P<article>The|An|A|Les|Le|La|L'|Il|El|Der|Die|Das|Det|O)(?P<rest>\s*\(.*)?$",
)
_BRACKETS = re.compile(r"\(([^()]+)\)")


def natural_title(title: str) -> str:
    """Move articles that a catalogue sorts behind the title back to its front, in the brackets too.

    Example:
        >>> natural_title("Usual Suspects, The")
        'The Usual Suspects'
        >>> natural_title("Star Maker, The (Uomo delle stelle, L')")
        "The Star Maker (L'Uomo delle stelle)"
    """
    title = _BRACKETS.sub(lambda match: f"({natural_title(match[1])})", title)
    match = _INVERTED.match(title)
    if match is None:
        return title
    gap = "" if match["article"].endswith("'") else " "
    return f"{match['article']}{gap}{match['name']}{match['rest'] or ''}"


def movie_query(genres: str, year: str) -> str:
    """Return the synthetic query for a movie: its genres in lower case, each word once, and its decade.

    This follows the synthetic queries of product search (Ai et al., SIGIR 2017), which are the words of a product's
    category path, each word once. A year that is no number of four digits gives no decade, and "unknown" is no genre:
    where nothing is left the query is empty, and nobody can search for the movie.

    Example:
        >>> movie_query("Animation Children's Comedy", "1995")
        "animation children's comedy 1990s"
    """
    words = [word for word in genres.lower().replace("|", " ").replace(",", " ").split() if word != "unknown"]
    if re.fullmatch(r"[0-9]{4}", year):
        words.append(f"{year[:3]}0s")
    return " ".join(dict.fromkeys(words))


_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")

STOP_WORDS = frozenset({"a", "an", "and", "as", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"})
"""Words of category names that say nothing about a product. The literature does not print its list; this is our own."""


def category_query(path: Sequence[str]) -> str:
    """Return the query that a category path makes, empty for a path with one level only.

    The rules are those of Ai et al. (SIGIR 2017) after Van Gysel et al. (CIKM 2016): the names on the path are joined
    from the first level to the last, stop words go, and of a repeated word only the last occurrence stays. Words are
    neither stemmed nor stripped of digits, since a language model reads them.

    Example:
        >>> category_query(["Camera & Photo", "Digital Camera Lenses"])
        'photo digital camera lenses'
        >>> category_query(["Electronics"])
        ''
    """
    if len(path) < 2:
        return ""
    words = [word for word in _WORD.findall(" ".join(path).lower()) if word not in STOP_WORDS]
    return " ".join(reversed(dict.fromkeys(reversed(words))))


def category_paths(fields: Mapping[str, Any]) -> list[list[str]]:
    """Return the category paths of a product's metadata.

    Args:
        fields: of one product. ``categories`` is a list of paths in the files of 2014 and one path in those of 2023;
            in those of 2018 the one path is called ``category``.

    Raises:
        ValueError: if there is something else there.
    """
    name = "categories" if "categories" in fields else "category"
    found = fields.get(name) or []
    if isinstance(found, list) and all(isinstance(entry, str) for entry in found):
        found = [found]
    if not isinstance(found, list) or not all(
        isinstance(path, list) and all(isinstance(entry, str) for entry in path) for path in found
    ):
        raise ValueError(f"{name!r} is {found!r}; it must be a list of names or a list of such lists")
    return [[html.unescape(entry) for entry in path] for path in found]


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
