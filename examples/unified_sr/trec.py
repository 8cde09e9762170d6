"""TREC run and qrels files, the exchange format of every retrieval evaluator.

trec_eval ignores the rank column, re-sorts by score and breaks ties by document number. So the score written is no
model score but ``length of the list - rank + 1``: strictly decreasing small integers, exact in any float format, and
every tool sees the ranking that was measured.

Fields are separated by blanks. In a name, a character that could break a line apart, and ``%``, is percent-encoded
(``"user 7"`` -> ``"user%207"``); reading decodes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from .metrics import CUTOFFS

DEPTH = 100
"""Items written per query; deep enough for every cutoff."""

MEASURES = {"hit": "Success", "ndcg": "nDCG", "mrr": "RR", "map": "AP"}
"""This package's metric names -> those of ``ir_measures``."""


def write_run(path: str | Path, rankings: Mapping[str, Sequence[str]], *, tag: str, depth: int = DEPTH) -> None:
    """Write rankings as lines of ``qid Q0 docid rank score tag``.

    Args:
        path: the file to write, by convention ``run.TASK.trec``.
        rankings: qid -> item ids, best first.
        tag: the name of the run, for example the method.
        depth: the most items written per query, at least the deepest of ``CUTOFFS``.

    Raises:
        ValueError: if ``depth`` is too small, a name is empty, or a ranking is empty or holds an item twice.
    """
    if depth < max(CUTOFFS):
        raise ValueError(f"depth must reach the deepest cutoff {max(CUTOFFS)}, got {depth}")
    lines: list[str] = []
    for qid, ranking in rankings.items():
        _check_distinct(qid, ranking)
        best = ranking[:depth]
        for rank, docid in enumerate(best, start=1):
            lines.append(f"{_encode(qid)} Q0 {_encode(docid)} {rank} {len(best) - rank + 1} {_encode(tag)}\n")
    _write(path, lines)


def read_run(path: str | Path) -> dict[str, list[str]]:
    """Read a run as trec_eval does.

    Returns:
        qid -> item ids in the order of falling scores, ties by falling item id.

    Raises:
        ValueError: naming the line that has no six fields or no number as its score.
    """
    scored: dict[str, list[tuple[float, str]]] = {}
    for number, (qid, _, docid, _, score, _) in _fields(path, 6):
        try:
            scored.setdefault(qid, []).append((float(score), docid))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: the score {score!r} is no number") from error
    return {qid: [docid for _, docid in sorted(found, reverse=True)] for qid, found in scored.items()}


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


def read_qrels(path: str | Path) -> dict[str, list[str]]:
    """Read judgements.

    Returns:
        qid -> ids of the items judged relevant (above 0), in the file's order.

    Raises:
        ValueError: naming the line that has no four fields or no integer as its judgement.
    """
    relevant: dict[str, list[str]] = {}
    for number, (qid, _, docid, judgement) in _fields(path, 4):
        try:
            positive = int(judgement) > 0
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: the judgement {judgement!r} is no integer") from error
        if positive:
            relevant.setdefault(qid, []).append(docid)
    return relevant


def evaluate_files(run: str | Path, qrels: str | Path, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Evaluate the files with ``ir_measures``, the independent check of ``metrics``.

    Returns:
        The same names as ``metrics.query_metrics``, averaged over the queries in ``qrels``.

    Raises:
        ImportError: if ``ir_measures`` is not installed.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise ImportError("evaluate_files needs ir-measures: pip install 'gradsub[examples]'") from error
    names = {
        f"{ours}@{k}": ir_measures.parse_measure(f"{theirs}@{k}") for k in cutoffs for ours, theirs in MEASURES.items()
    }
    judged = list(ir_measures.read_trec_qrels(str(qrels)))  # type: ignore[no-untyped-call]
    ranked = list(ir_measures.read_trec_run(str(run)))  # type: ignore[no-untyped-call]
    values = ir_measures.calc_aggregate(list(names.values()), judged, ranked)
    return {name: float(values[measure]) for name, measure in names.items()}


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


def _fields(path: str | Path, count: int) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        fields = line.split()
        if fields and len(fields) != count:
            raise ValueError(f"{path}, line {number}: {len(fields)} fields where {count} are needed: {line!r}")
        if fields:
            yield number, [unquote(field) for field in fields]
