"""From a source's name to its reader: a folder's format is told by the files that it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ._amazon import is_amazon, read_amazon
from ._events import Source
from ._jsonl import is_jsonl, read_jsonl
from ._qilin import is_qilin, read_qilin
from ._recbole import MOVIELENS, is_recbole, read_movielens, read_recbole

NAMES_SHOWN = 12
"""How many of a folder's names an error message lists."""


@dataclass(frozen=True)
class Format:
    """A format of folders: how it is recognised, how it is read, and how an error message describes it."""

    name: str
    files: str
    recognise: Callable[[Path], bool]
    read: Callable[[Path, str], Source]


FORMATS = (
    Format("RecBole atomic files", "one *.inter and one *.item", is_recbole, read_recbole),
    Format("JSON lines of one's own", "items.jsonl and events.jsonl", is_jsonl, read_jsonl),
    Format("Qilin", "folders notes, search_train, ... with *.parquet", is_qilin, read_qilin),
    Format("Amazon reviews", "meta_NAME.json(l)[.gz] and the reviews NAME.json(l)[.gz]", is_amazon, read_amazon),
)


def read_source(source: str, searches: str) -> Source:
    """Read ``"movielens-100k"`` or a folder.

    Raises:
        FileNotFoundError: if there is no such source, or the folder lacks files.
        ValueError: if a folder's format cannot be told, or a file's content cannot be used.
    """
    if source == MOVIELENS:
        return read_movielens(searches)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the data source {source!r} is no folder; pass {MOVIELENS!r} or a folder in one of these formats: "
            f"{_understood()}"
        )
    found = [candidate for candidate in FORMATS if candidate.recognise(folder)]
    if not found:
        raise FileNotFoundError(
            f"the data folder {source!r} has no format that is understood. It holds {_names(folder)}. "
            f"Understood are: {_understood()}"
        )
    if len(found) > 1:
        raise ValueError(
            f"the data folder {source!r} holds files of several formats ({', '.join(each.name for each in found)}): "
            f"{_names(folder)}. Keep each format in a folder of its own"
        )
    return found[0].read(folder, searches)


def _understood() -> str:
    return "; ".join(f"{each.name} ({each.files})" for each in FORMATS)


def _names(folder: Path) -> str:
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    if not names:
        return "nothing"
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
