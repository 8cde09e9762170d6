"""JSON lines of one's own: ``items.jsonl`` with the catalogue and ``events.jsonl`` with what users did."""

from __future__ import annotations

from pathlib import Path

from ._events import SPLITS, Event, Source, check_known, in_order, only
from ._lines import Record, read_records
from ._types import Item

FILES = {"items": ("items.jsonl", "items.jsonl.gz"), "events": ("events.jsonl", "events.jsonl.gz")}
EVENT_FIELDS = ("user", "item", "items", "timestamp", "query", "split")


def is_jsonl(folder: Path) -> bool:
    """Tell whether a folder holds one of the two files."""
    return any((folder / name).is_file() for names in FILES.values() for name in names)


def read_jsonl(folder: Path, searches: str) -> Source:
    """Read a folder.

    Raises:
        FileNotFoundError: if one of the two files is not there.
        ValueError: if a line cannot be used, an item is unknown, or only some events have a split.
    """
    del searches  # the format records its own searches and leaves nothing to choose
    catalogue, path = _file(folder, "items"), _file(folder, "events")
    items = _read_items(catalogue)
    events = [_event(record) for record in read_records(path)]
    _check_splits(events, path)
    remedy = f"add a line for it to {catalogue.name} or remove these events"
    check_known(events, items, f"{path} holds", f"{catalogue} lacks", remedy)
    return Source(folder.resolve().name, in_order(events), items)


def _file(folder: Path, kind: str) -> Path:
    found = [folder / name for name in FILES[kind] if (folder / name).is_file()]
    return only(folder, found, FILES[kind][0], "this format needs items.jsonl and events.jsonl")


def _read_items(path: Path) -> tuple[Item, ...]:
    items: dict[str, Item] = {}
    for record in read_records(path):
        name = record.text("id")
        if name in items:
            raise ValueError(f"{record.where}: the id {name!r} occurs twice; each item needs one line with its own id")
        title = record.fields.get("title", "")
        if not isinstance(title, str):
            raise ValueError(f"{record.where}: 'title' is {title!r}; it must be text")
        items[name] = Item(name, " ".join(title.split()) or name)
    return tuple(items.values())


def _event(record: Record) -> Event:
    unknown = [name for name in record.fields if name not in EVENT_FIELDS]
    if unknown:
        # A misspelt "query" would turn a search into a recommendation without a word.
        raise ValueError(
            f"{record.where}: the field {unknown[0]!r} is none of {', '.join(EVENT_FIELDS)}; remove or rename it"
        )
    query = record.fields.get("query") or ""
    if not isinstance(query, str):
        raise ValueError(f"{record.where}: 'query' is {query!r}; it must be text, or null for a recommendation")
    split = record.fields.get("split") or ""
    if split and split not in SPLITS:
        raise ValueError(f"{record.where}: 'split' is {split!r}; it must be one of {', '.join(SPLITS)}")
    return Event(record.text("user"), _items(record), record.number("timestamp"), " ".join(query.split()), split)


def _items(record: Record) -> tuple[str, ...]:
    if ("item" in record.fields) == ("items" in record.fields):
        raise ValueError(f"{record.where}: an event needs either 'item' or 'items', and not both")
    if "item" in record.fields:
        return (record.text("item"),)
    items = record.fields["items"]
    if not isinstance(items, list) or not items:
        raise ValueError(f"{record.where}: 'items' is {items!r}; it must be a list of one or more item ids")
    names = tuple(Record(record.path, record.line, {"items": item}).text("items") for item in items)
    if len(set(names)) != len(names):
        raise ValueError(f"{record.where}: 'items' is {items!r}; it must hold each item once")
    return names


def _check_splits(events: list[Event], path: Path) -> None:
    without = sum(not event.split for event in events)
    if 0 < without < len(events):
        raise ValueError(
            f"{path}: {without} of {len(events)} events have no 'split'; give it to all of them or to none"
        )
