"""Ranking metrics with the standard denominators, per query and averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

CUTOFFS = (5, 10, 20)


def top_items(scores: torch.Tensor, k: int) -> list[list[int]]:
    """Indices of each row's ``k`` best items; ties go to the smaller index, items at ``-inf`` are left out."""
    raise NotImplementedError


def target_ranks(scores: torch.Tensor, targets: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Ranks (from 1, ascending) of each row's targets among all items, in the order of ``top_items``."""
    raise NotImplementedError


def query_metrics(
    ranks: Sequence[int], relevant: int | None = None, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, float]:
    """``hit@k``, ``ndcg@k``, ``mrr@k``, ``map@k`` of one query from the ranks of its relevant items.

    ``relevant`` is the number of relevant items, ranked or not; ``None`` means ``len(ranks)``.
    """
    raise NotImplementedError


def mean_metrics(per_query: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average of per-query metrics over the queries."""
    raise NotImplementedError


def sampled_candidates(
    n_items: int, exclude: Sequence[int] | frozenset[int], *, qid: str, negatives: int = 99, seed: int = 0
) -> list[int]:
    """Uniform negatives of one query, without repetition, without ``exclude`` (pass seen items and targets).

    Depends on ``seed`` and ``qid`` alone.
    """
    raise NotImplementedError


def sampled_ranks(
    scores: torch.Tensor, targets: Sequence[Sequence[int]], negatives: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """Ranks of each row's targets among these and the row's own sampled negatives."""
    raise NotImplementedError
