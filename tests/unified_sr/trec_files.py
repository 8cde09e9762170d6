"""TREC files read and evaluated by ``ir_measures``: the independent check of ``metrics`` and of what is written."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import ir_measures

from examples.unified_sr.metrics import CUTOFFS

MEASURES = {
    f"{ours}@{k}": ir_measures.parse_measure(f"{theirs}@{k}")
    for k in CUTOFFS
    for ours, theirs in (("hit", "Success"), ("ndcg", "nDCG"), ("mrr", "RR"), ("map", "AP"))
}
"""Names of ``metrics.query_metrics`` -> the same measures of ``ir_measures``."""


def read_qrels(path: Path) -> dict[str, list[str]]:
    """Query -> its relevant items, names decoded."""
    relevant: dict[str, list[str]] = {}
    for row in ir_measures.read_trec_qrels(str(path)):
        relevant.setdefault(unquote(row.query_id), []).append(unquote(row.doc_id))
    return relevant


def read_run(path: Path) -> dict[str, list[str]]:
    """Query -> its items by falling scores, names decoded."""
    found = sorted(ir_measures.read_trec_run(str(path)), key=lambda row: -row.score)
    ranked: dict[str, list[str]] = {}
    for row in found:
        ranked.setdefault(unquote(row.query_id), []).append(unquote(row.doc_id))
    return ranked


def evaluate_files(run: Path, qrels: Path) -> dict[str, float]:
    """The metrics, averaged over the queries in ``qrels``."""
    judged, ranked = list(ir_measures.read_trec_qrels(str(qrels))), list(ir_measures.read_trec_run(str(run)))
    values = ir_measures.calc_aggregate(list(MEASURES.values()), judged, ranked)
    return {name: float(values[measure]) for name, measure in MEASURES.items()}
