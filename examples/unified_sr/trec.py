"""TREC run and qrels files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

DEPTH = 100


def write_run(path: str | Path, rankings: Mapping[str, Sequence[str]], *, tag: str, depth: int = DEPTH) -> None:
    """Write ``qid -> item ids, best first`` as ``qid Q0 docid rank score tag``, at most ``depth`` lines a query."""
    raise NotImplementedError


def read_run(path: str | Path) -> dict[str, list[str]]:
    """Read what ``write_run`` wrote: ``qid -> item ids, best first``."""
    raise NotImplementedError


def write_qrels(path: str | Path, relevant: Mapping[str, Sequence[str]]) -> None:
    """Write ``qid -> relevant item ids`` as ``qid 0 docid 1``."""
    raise NotImplementedError


def read_qrels(path: str | Path) -> dict[str, list[str]]:
    """Read what ``write_qrels`` wrote: ``qid -> relevant item ids``."""
    raise NotImplementedError
