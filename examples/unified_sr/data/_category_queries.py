"""The queries of product search: the words of a product's category paths, each word once."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

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
