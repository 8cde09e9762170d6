"""Qilin: requests for search and recommendation on Xiaohongshu, with all notes that each answer showed.

Chen et al., "Qilin: A Multimodal Information Retrieval Dataset with APP-level User Sessions", arXiv 2503.00501; the
files are those of THUIR/Qilin on the Hugging Face hub.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._events import Event, Source, in_order
from ._parquet import Rows, parquet_files, read_parquet
from ._types import Item

NOTES = "notes"
REQUESTS = ("recommendation_train", "recommendation_test", "search_train", "search_test")
"""Its folders of requests: the task and the part."""


def is_qilin(folder: Path) -> bool:
    """Tell whether a folder holds one of the data set's folders with Parquet files in it."""
    return any(parquet_files(folder / name) for name in (NOTES, *REQUESTS))


def read_qilin(folder: Path, searches: str) -> Source:
    """Read the requests with at least one click, and those notes that they mention.

    Raises:
        FileNotFoundError: if the notes or all requests are not there.
        ImportError: if pyarrow is not installed.
        ValueError: if a file lacks a column, a value cannot be used, or a note is unknown.
    """
    del searches  # searches are recorded
    notes = parquet_files(folder / NOTES)
    found = [requests for requests in REQUESTS if parquet_files(folder / requests)]
    if not notes or not found:
        lacking = f"{NOTES}/*.parquet" if not notes else ", ".join(f"{each}/*.parquet" for each in REQUESTS)
        raise FileNotFoundError(f"{folder} holds no {lacking}; Qilin needs its notes and at least one of its requests")
    left_out = Counter({"requests_without_a_click": 0, "searches_without_a_query": 0})
    events = [event for requests in found for event in _read_requests(folder, requests, left_out)]
    mentioned = {note for event in events for note in (*event.items, *(event.history or ()), *event.shown)}
    items = _read_notes(notes, mentioned)
    _check_notes(mentioned, items, folder)
    return Source(folder.resolve().name, in_order(events), items, left_out)


def _read_requests(folder: Path, requests: str, left_out: Counter[str]) -> Iterator[Event]:
    task, _, split = requests.partition("_")
    searched = task == "search"
    page = f"{'search' if searched else 'rec'}_result_details_with_idx"
    time = "search_timestamp" if searched else "request_timestamp"
    columns = ["user_idx", "recent_clicked_note_idxs", *(["query"] if searched else [])]
    names: dict[int, str] = {}  # one text object a note, however often it occurs
    for rows in read_parquet(parquet_files(folder / requests), columns, {page: ("note_idx", "click", time)}):
        for row, (user, recent, details) in enumerate(
            zip(*(rows.columns[name] for name in (*columns[:2], page)), strict=True)
        ):
            query = " ".join((rows.columns["query"][row] or "").split()) if searched else ""
            entries = [each or {} for each in details or ()]
            shown = [
                (_whole(each.get("note_idx"), rows, row, "note_idx"), _whole(each.get("click"), rows, row, "click"))
                for each in entries
            ]
            clicked = tuple(dict.fromkeys(note for note, click in shown if click > 0))
            if not clicked:
                left_out["requests_without_a_click"] += 1
            elif searched and not query:
                left_out["searches_without_a_query"] += 1
            else:
                history = [_whole(note, rows, row, "recent_clicked_note_idxs") for note in recent or ()]
                rest = dict.fromkeys(note for note, _ in shown if note not in clicked)
                times = [_whole(each[time], rows, row, time) for each in entries]
                yield Event(
                    user=str(_whole(user, rows, row, "user_idx")),
                    items=_names(clicked, names),
                    timestamp=float(min(times)),
                    query=query,
                    split=split,
                    history=_names(history, names),
                    shown=_names(rest, names),
                )


def _whole(value: Any, rows: Rows, row: int, name: str) -> int:
    # The files hold whole numbers partly as floats.
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{rows.where(row)}: {name} is {value!r}; it must be a whole number") from error


def _names(notes: Any, names: dict[int, str]) -> tuple[str, ...]:
    return tuple(names.setdefault(note, str(note)) for note in notes)


def _read_notes(paths: list[Path], mentioned: set[str]) -> tuple[Item, ...]:
    columns = ["note_idx", "note_title", "note_content"]
    items: dict[str, Item] = {}
    for rows in read_parquet(paths, columns, within=("note_idx", {int(note) for note in mentioned})):
        for note, title, content in zip(*(rows.columns[name] for name in columns), strict=True):
            name = str(int(note))
            if name in items:
                raise ValueError(f"{rows.path} repeats the note_idx {name}; each note has a number of its own")
            text = " ".join((title or "").split()) or " ".join((content or "").split())
            items[name] = Item(name, text or name)
    return tuple(items.values())


def _check_notes(mentioned: set[str], items: tuple[Item, ...], folder: Path) -> None:
    unknown = mentioned.difference(item.id for item in items)
    if unknown:
        raise ValueError(
            f"{folder / NOTES} lacks {len(unknown)} of the {len(mentioned)} notes that requests mention, for example "
            f"note_idx {min(unknown, key=int)}; is one of its parts missing?"
        )
