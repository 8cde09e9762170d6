"""RecBole atomic files: a folder with one ``*.inter`` and one ``*.item`` file, and MovieLens-100K in that form."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ._atomic import AtomicFile, read_atomic
from ._events import Event, Source, check_known, in_order, only
from ._queries import movie_query, natural_title, with_searches
from ._types import Item

MOVIELENS = "movielens-100k"
TITLE_COLUMNS = ("title", "item_title", "movie_title", "name", "class")
GENRE_COLUMNS = ("genres", "genre", "class")
YEAR_COLUMNS = ("release_year", "year")


def is_recbole(folder: Path) -> bool:
    """Tell whether a folder holds an atomic file."""
    return any(path.suffix in (".inter", ".item") for path in folder.iterdir())


def read_recbole(folder: Path, searches: str) -> Source:
    """Read a folder.

    Raises:
        FileNotFoundError: if one of the two files is not there.
        ValueError: if a file's content cannot be used, or there is a second file of a kind.
    """
    needs = "a data folder needs one *.inter and one *.item"
    interactions, catalogue = (
        read_atomic(only(folder, sorted(folder.glob(name)), f"{name} file", needs)) for name in ("*.inter", "*.item")
    )
    items = _read_items(catalogue)
    events = _read_events(interactions, catalogue, searches)
    check_known(
        events,
        items,
        f"{interactions.path} holds",
        f"{catalogue.path} lacks",
        "add a line with its title to the .item file or remove these events from the .inter file",
    )
    return Source(folder.resolve().name, in_order(events), items)


def read_movielens(searches: str) -> Source:
    """Read MovieLens-100K out of the installed package recbole.

    Raises:
        FileNotFoundError: if the package or its copy of the data is not there.
    """
    return replace(read_recbole(movielens_folder(), searches), name=MOVIELENS)


def movielens_folder() -> Path:
    """The folder of the installed package recbole that holds MovieLens-100K.

    Raises:
        FileNotFoundError: if the package or its copy of the data is not there.
    """
    # find_spec does not run the package, whose own dependencies are not installed.
    spec = importlib.util.find_spec("recbole")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "dataset_example" / "ml-100k"
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"{MOVIELENS!r} is read out of the package recbole, which {'lacks it' if spec else 'is not installed'}: "
        "pip install --no-deps recbole==1.2.1"
    )


def _read_items(catalogue: AtomicFile) -> tuple[Item, ...]:
    catalogue.require(item_id="token")
    title_column = _title_column(catalogue)
    titles = list(catalogue.column(title_column))
    if title_column == "movie_title":
        titles = [natural_title(title) for title in titles]
    year_column = catalogue.first_column(YEAR_COLUMNS)
    if year_column is not None:
        # The year tells remakes apart; elsewhere its digits, which all titles share, would only blur the mean.
        uses = Counter(titles)
        years = list(catalogue.column(year_column))
        titles = [
            f"{title} ({year})" if uses[title] > 1 and title and year else title
            for title, year in zip(titles, years, strict=True)
        ]
    items: dict[str, Item] = {}
    for line, item_id, title in zip(catalogue.lines, catalogue.column("item_id"), titles, strict=True):
        if not item_id or item_id in items:
            problem = f"the item_id {item_id!r} occurs twice" if item_id else "the item_id is empty"
            raise ValueError(f"{catalogue.path}, line {line}: {problem}; each item needs one line with its own id")
        items[item_id] = Item(item_id, title or item_id)
    return tuple(items.values())


def _title_column(catalogue: AtomicFile) -> str:
    column = catalogue.first_column([name for name in TITLE_COLUMNS if catalogue.columns.get(name) == "token_seq"])
    if column is None:
        raise ValueError(
            f"{catalogue.path} lacks a title column: one of {', '.join(TITLE_COLUMNS)} with the type token_seq; "
            f"its header has {catalogue.header()}"
        )
    return column


def _read_events(interactions: AtomicFile, catalogue: AtomicFile, searches: str) -> list[Event]:
    interactions.require(user_id="token", item_id="token", timestamp="float")
    fields = [interactions.column(name) for name in ("user_id", "item_id", "timestamp")]
    recorded, by_item = _recorded_queries(interactions), _synthetic_queries(catalogue)
    events: list[Event] = []
    for row, (user, item_id, stamp) in enumerate(zip(*fields, strict=True)):
        where = f"{interactions.path}, line {interactions.lines[row]}"
        if not user or not item_id:
            raise ValueError(f"{where}: user_id and item_id must not be empty")
        try:
            timestamp = float(stamp)
        except ValueError:
            timestamp = math.nan
        if not math.isfinite(timestamp):
            raise ValueError(f"{where}: the timestamp {stamp!r} is no finite number")
        if recorded is not None:
            events.append(Event(user, (item_id,), timestamp, recorded[row]))
            continue
        query = by_item.get(item_id)
        events.extend(with_searches(Event(user, (item_id,), timestamp), [query] if query else [], searches))
    return events


def _recorded_queries(interactions: AtomicFile) -> list[str] | None:
    if "query" not in interactions.columns:
        return None
    interactions.require(query="token_seq")
    return [" ".join(query.split()) for query in interactions.column("query")]


def _synthetic_queries(catalogue: AtomicFile) -> dict[str, str]:
    title, year = _title_column(catalogue), catalogue.first_column(YEAR_COLUMNS)
    genre = catalogue.first_column([name for name in GENRE_COLUMNS if name != title])
    if genre is None or year is None:
        return {}
    columns = (catalogue.column("item_id"), catalogue.column(genre), catalogue.column(year))
    return {item_id: movie_query(genres, when) for item_id, genres, when in zip(*columns, strict=True)}
