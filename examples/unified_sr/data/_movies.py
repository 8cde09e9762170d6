"""Text made from a movie's catalogue entry: its natural title and the query that finds it."""

from __future__ import annotations

import re

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
