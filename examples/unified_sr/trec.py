"""TREC run and qrels files, the exchange format of every retrieval evaluator.

trec_eval ignores the rank column, re-sorts by score and breaks ties by document number. So the score written is no
model score but ``length of the list - rank + 1``: strictly decreasing small integers, exact in any float format, and
every tool sees the ranking that was measured.

Fields are separated by blanks. In a name, a character that could break a line apart, and ``%``, is percent-encoded
(``"user 7"`` -> ``"user%207"``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

DEPTH = 100
"""Items written per query; deep enough for every cutoff."""


def write_run(path: str | Path, rankings: Mapping[str, Sequence[str]], *, tag: str) -> None:
    """Write rankings as lines of ``qid Q0 docid rank score tag``, ``DEPTH`` of them a query at most.

    Args:
        path: the file to write, by convention ``run.TASK.trec``.
        rankings: qid -> item ids, best first.
        tag: the name of the run, for example the method.

    Raises:
        ValueError: if a name is empty, or a ranking is empty or holds an item twice.
    """
    lines: list[str] = []
    for qid, ranking in rankings.items():
        _check_distinct(qid, ranking)
        best = ranking[:DEPTH]
        for rank, docid in enumerate(best, start=1):
            lines.append(f"{_encode(qid)} Q0 {_encode(docid)} {rank} {len(best) - rank + 1} {_encode(tag)}\n")
    _write(path, lines)


def write_qrels(path: str | Path, relevant: Mapping[str, Sequence[str]]) -> None:
    """Write judgements as lines of ``qid 0 docid 1``.

    Args:
        path: the file to write, by convention ``qrels.TASK.trec``.
        relevant: qid -> ids of the relevant items.

    Raises:
        ValueError: if a name is empty, or a query has no relevant item or one twice.
    """
    lines: list[str] = []
    for qid, docids in relevant.items():
        _check_distinct(qid, docids)
        lines.extend(f"{_encode(qid)} 0 {_encode(docid)} 1\n" for docid in docids)
    _write(path, lines)


def _check_distinct(qid: str, docids: Sequence[str]) -> None:
    if not docids:
        raise ValueError(f"the query {qid!r} has no items: evaluators would silently lose it")
    if len(set(docids)) != len(docids):
        twice = next(docid for position, docid in enumerate(docids) if docid in docids[:position])
        raise ValueError(f"the query {qid!r} lists the item {twice!r} twice")


def _encode(name: str) -> str:
    if not name:
        raise ValueError("query ids, item ids and tags must not be empty in a TREC file")
    return "".join(
        quote(letter, safe="") if letter == "%" or not letter.isprintable() or letter.isspace() else letter
        for letter in name
    )


def _write(path: str | Path, lines: Sequence[str]) -> None:
    Path(path).write_text("".join(lines), encoding="utf-8", newline="\n")
