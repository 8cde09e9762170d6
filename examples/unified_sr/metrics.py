"""Ranking metrics with the standard denominators, per query and averaged.

Ranks count from 1. With R relevant items, of which some stand at the ranks r_1 < r_2 < ..., and binary gains:

* ``hit@k``  = 1 if r_1 <= k, else 0                                                  (``Success@k``)
* ``mrr@k``  = 1 / r_1 if r_1 <= k, else 0                                            (``RR@k``)
* ``ndcg@k`` = sum over r_i <= k of 1 / log2(1 + r_i), over the same sum for the ideal ranks 1 ... min(R, k)
* ``map@k``  = (sum over r_i <= k of i / r_i) / R                                      (``AP@k``)

The denominators count all R relevant items, retrieved or not, as trec_eval's do: one of five clicks at rank 1 scores
NDCG@5 = 0.34 and AP@5 = 0.20, not 1. Note that AP divides by R even where R > k. The names in brackets are those of
``ir_measures``, whose values on the written TREC files are the same.

``compat="gems"`` adds ``gems_ndcg@k`` and ``gems_map@k``, whose denominators count only the relevant items *retrieved*
within k, as in the code released with arXiv 2601.09496. They are never below the standard values, equal for NDCG only
where nothing relevant is missed, and one click of five at rank 1 scores 1: only to compare with that code's numbers.

Sampled metrics rank the target among a few random negatives. They inflate every number and can reverse comparisons
(Krichene and Rendle, KDD 2020): report them beside the full ranking, never instead of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

CUTOFFS = (5, 10, 20)
"""The depths at which every metric is reported."""


def top_items(scores: torch.Tensor, k: int) -> list[list[int]]:
    """Return the indices of each row's ``k`` best items, best first.

    Equal scores go to the smaller index, so a ranking never depends on the machine. Items at ``-inf`` are excluded
    (seen items, for example) and appear nowhere, so a row may be shorter than ``k``.

    Args:
        scores: (queries, items), higher is better.
        k: at least 1.

    Raises:
        ValueError: if ``scores`` is no matrix or holds NaN or ``+inf``, or ``k < 1``.

    Example:
        >>> top_items(torch.tensor([[0.5, 2.0, 2.0, -torch.inf]]), 3)
        [[1, 2, 0]]
    """
    _check_scores(scores)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    values, order = torch.sort(scores, dim=1, descending=True, stable=True)
    lengths = (values[:, :k] > -math.inf).sum(dim=1).tolist()
    return [row[:length] for row, length in zip(order[:, :k].tolist(), lengths, strict=True)]


def target_ranks(scores: torch.Tensor, targets: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the ranks of each row's targets among all items, ascending, in the order of ``top_items``.

    Args:
        scores: (queries, items), higher is better; ``-inf`` excludes an item.
        targets: for each row the distinct indices of its relevant items, at least one.

    Raises:
        ValueError: if ``scores`` is no matrix or holds NaN or ``+inf``, the lengths differ, or a row's targets are
            empty, repeated, out of range or excluded.

    Example:
        >>> target_ranks(torch.tensor([[0.5, 2.0, 2.0, 1.0]]), [[2, 0]])
        [(2, 4)]
    """
    _check_scores(scores)
    _check_targets(targets, *scores.shape)
    rows = torch.tensor([row for row, target in enumerate(targets) for _ in target], dtype=torch.long)
    columns = torch.tensor([item for target in targets for item in target], dtype=torch.long)
    rows, columns = rows.to(scores.device), columns.to(scores.device)
    own = scores[rows, columns].unsqueeze(1)
    excluded = torch.isneginf(own).flatten()
    if excluded.any():
        first = int(excluded.nonzero()[0])
        raise ValueError(f"row {int(rows[first])}: the target {int(columns[first])} is excluded by the score -inf")
    candidates = scores[rows]
    earlier = torch.arange(scores.shape[1], device=scores.device) < columns.unsqueeze(1)
    ranks = ((candidates > own) | ((candidates == own) & earlier)).sum(dim=1).add(1).tolist()
    grouped: list[list[int]] = [[] for _ in targets]
    for row, rank in zip(rows.tolist(), ranks, strict=True):
        grouped[row].append(rank)
    return [tuple(sorted(row)) for row in grouped]


def query_metrics(
    ranks: Sequence[int], relevant: int | None = None, cutoffs: Sequence[int] = CUTOFFS, compat: str = "none"
) -> dict[str, float]:
    """Return ``hit@k``, ``ndcg@k``, ``mrr@k`` and ``map@k`` of one query.

    Args:
        ranks: the distinct ranks, from 1 and in any order, of those relevant items that were ranked.
        relevant: the number of relevant items, ranked or not; ``None`` means all of them were ranked.
        cutoffs: the depths k, each at least 1.
        compat: ``"gems"`` adds ``gems_ndcg@k`` and ``gems_map@k``; ``"none"`` adds nothing.

    Raises:
        ValueError: if a rank or cutoff is below 1, a rank occurs twice, there are more ranks than relevant items,
            nothing is relevant, or there is no such ``compat``.

    Example:
        >>> {name: round(value, 2) for name, value in query_metrics([1], relevant=5, cutoffs=[5]).items()}
        {'hit@5': 1.0, 'ndcg@5': 0.34, 'mrr@5': 1.0, 'map@5': 0.2}
    """
    relevant = len(ranks) if relevant is None else relevant
    if relevant < max(1, len(ranks)):
        raise ValueError(f"relevant must be at least 1 and the {len(ranks)} ranked relevant items, got {relevant}")
    if len(set(ranks)) != len(ranks) or min(ranks, default=1) < 1:
        raise ValueError(f"ranks must be distinct and count from 1, got {list(ranks)}")
    if min(cutoffs, default=1) < 1:
        raise ValueError(f"cutoffs must be at least 1, got {list(cutoffs)}")
    if compat not in ("none", "gems"):
        raise ValueError(f"compat must be 'none' or 'gems', got {compat!r}")
    ordered = sorted(ranks)
    values: dict[str, float] = {}
    for k in cutoffs:
        within = [rank for rank in ordered if rank <= k]
        ideal = sum(_discount(rank) for rank in range(1, min(relevant, k) + 1))
        values[f"hit@{k}"] = float(bool(within))
        values[f"ndcg@{k}"] = sum(map(_discount, within)) / ideal
        values[f"mrr@{k}"] = 1 / within[0] if within else 0.0
        precisions = sum(count / rank for count, rank in enumerate(within, start=1))
        values[f"map@{k}"] = precisions / relevant
        if compat == "gems":
            retrieved = sum(_discount(rank) for rank in range(1, len(within) + 1))
            values[f"gems_ndcg@{k}"] = sum(map(_discount, within)) / retrieved if within else 0.0
            values[f"gems_map@{k}"] = precisions / len(within) if within else 0.0
    return values


def mean_metrics(per_query: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the average of each metric over the queries.

    Raises:
        ValueError: if there is no query, or the queries do not all have the same metrics.
    """
    if not per_query:
        raise ValueError("per_query is empty: there is no query to average over")
    names = list(per_query[0])
    if any(set(query) != set(names) for query in per_query):
        raise ValueError("per_query must hold the same metrics for every query")
    return {name: math.fsum(query[name] for query in per_query) / len(per_query) for name in names}


def sampled_candidates(
    n_items: int, exclude: Collection[int], *, qid: str, negatives: int = 99, seed: int = 0
) -> list[int]:
    """Draw one query's negatives uniformly, each at most once.

    The draw depends on the arguments alone: every query has its own negatives, the same in every run and for every
    model, in whatever order and batches queries are evaluated. Where fewer than ``negatives`` items are left, all of
    them are returned, which makes the sampled ranking the full one.

    Args:
        n_items: size of the catalogue.
        exclude: indices that must not be drawn: pass the seen items and the targets.
        qid: the query's name.
        negatives: how many to draw, at least 1.
        seed: changes every query's draw.

    Returns:
        Indices in ascending order.

    Raises:
        ValueError: if ``negatives < 1``.
    """
    if negatives < 1:
        raise ValueError(f"negatives must be at least 1, got {negatives}")
    left = np.setdiff1d(np.arange(n_items), np.fromiter(exclude, dtype=np.int64, count=len(exclude)))
    if len(left) <= negatives:
        return [int(item) for item in left]
    digest = hashlib.blake2b(f"{seed}\t{qid}".encode(), digest_size=16).digest()
    drawn = np.random.default_rng(int.from_bytes(digest, "big")).choice(left, size=negatives, replace=False)
    return sorted(int(item) for item in drawn)


def sampled_ranks(
    scores: torch.Tensor, targets: Sequence[Sequence[int]], negatives: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """Return the ranks of each row's targets among these targets and the row's own negatives, ascending.

    Args:
        scores: (queries, items), higher is better.
        targets: for each row the distinct indices of its relevant items, at least one.
        negatives: for each row the indices of ``sampled_candidates``, none of them a target.

    Raises:
        ValueError: as ``target_ranks``, and if a row's negatives hold one of its targets or an index out of range.
    """
    if len(negatives) != len(targets):
        raise ValueError(f"negatives has {len(negatives)} rows where targets has {len(targets)}")
    _check_scores(scores)
    kept = torch.full_like(scores, -math.inf)
    for row, (target, drawn) in enumerate(zip(targets, negatives, strict=True)):
        if common := set(target).intersection(drawn):
            raise ValueError(f"row {row}: the negatives hold the target(s) {sorted(common)}; exclude them when drawing")
        if drawn and not 0 <= min(drawn) <= max(drawn) < scores.shape[1]:
            raise ValueError(f"row {row}: the negatives must lie in [0, {scores.shape[1]})")
        if row < len(scores):
            candidates = [item for item in (*target, *drawn) if 0 <= item < scores.shape[1]]
            kept[row, candidates] = scores[row, candidates]
    return target_ranks(kept, targets)


def _discount(rank: int) -> float:
    return 1 / math.log2(1 + rank)


def _check_scores(scores: torch.Tensor) -> None:
    if scores.ndim != 2:
        raise ValueError(f"scores must be (queries, items), got the shape {tuple(scores.shape)}")
    bad = (torch.isnan(scores) | torch.isposinf(scores)).any(dim=1)
    if bad.any():
        raise ValueError(f"scores of row {int(bad.nonzero()[0])} hold NaN or +inf: the model's output cannot be ranked")


def _check_targets(targets: Sequence[Sequence[int]], n_rows: int, n_items: int) -> None:
    if len(targets) != n_rows:
        raise ValueError(f"targets has {len(targets)} rows where scores has {n_rows}")
    for row, target in enumerate(targets):
        if not target or len(set(target)) != len(target) or min(target) < 0 or max(target) >= n_items:
            raise ValueError(
                f"row {row}: targets must be one or more distinct indices in [0, {n_items}), got {list(target)}"
            )
