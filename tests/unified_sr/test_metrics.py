"""The metrics equal independent definitions, and rankings are deterministic."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from examples.unified_sr.metrics import (
    CUTOFFS,
    mean_metrics,
    query_metrics,
    sampled_candidates,
    sampled_ranks,
    target_ranks,
    top_items,
)


@st.composite
def score_matrices(draw: st.DrawFn) -> tuple[torch.Tensor, list[list[int]]]:
    """Integer scores with many ties, some excluded items, and one to four targets a row."""
    rows, items = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    values = draw(st.lists(st.lists(st.integers(-3, 3), min_size=items, max_size=items), min_size=rows, max_size=rows))
    scores = torch.tensor(values, dtype=torch.float32)
    targets = []
    for row in range(rows):
        target = draw(st.lists(st.integers(0, items - 1), min_size=1, max_size=4, unique=True))
        hidden = draw(st.sets(st.integers(0, items - 1), max_size=items)) - set(target)
        scores[row, sorted(hidden)] = -math.inf
        targets.append(target)
    return scores, targets


@given(score_matrices())
def test_ranks_are_positions_in_the_sorted_list(problem: tuple[torch.Tensor, list[list[int]]]) -> None:
    scores, targets = problem
    lists = top_items(scores, scores.shape[1])
    for row, (ranking, target, ranks) in enumerate(zip(lists, targets, target_ranks(scores, targets), strict=True)):
        values = scores[row].tolist()
        expected = sorted((i for i, v in enumerate(values) if v > -math.inf), key=lambda i: (-values[i], i))
        assert ranking == expected
        assert ranks == tuple(sorted(expected.index(item) + 1 for item in target))


@given(score_matrices(), st.integers(1, 50))
def test_top_items_is_a_prefix(problem: tuple[torch.Tensor, list[list[int]]], k: int) -> None:
    scores, _ = problem
    assert top_items(scores, k) == [row[:k] for row in top_items(scores, scores.shape[1])]


@settings(max_examples=50)
@given(st.sets(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 4), st.integers(1, 30))
def test_ndcg_equals_scikit_learn(ranks: set[int], unranked: int, k: int) -> None:
    length = 40
    relevance = [[float(rank in ranks) for rank in range(1, length + 1)] + [1.0] * unranked]
    falling = [[float(-rank) for rank in range(length + unranked)]]
    ours = query_metrics(sorted(ranks), len(ranks) + unranked, cutoffs=[k])[f"ndcg@{k}"]
    assert ours == pytest.approx(ndcg_score(relevance, falling, k=k), abs=1e-12)


@given(st.sets(st.integers(1, 60), max_size=12), st.integers(0, 5))
def test_bounds_and_monotony(ranks: set[int], unranked: int) -> None:
    relevant = len(ranks) + unranked
    if relevant == 0:
        return
    values = query_metrics(list(ranks), relevant)
    for name in ("hit", "ndcg", "mrr", "map"):
        series = [values[f"{name}@{k}"] for k in CUTOFFS]
        assert all(0 <= value <= 1 + 1e-12 for value in series)
        if name != "ndcg":  # NDCG's ideal grows with k
            assert series == sorted(series)
    perfect = query_metrics(range(1, relevant + 1), relevant)
    assert all(perfect[f"ndcg@{k}"] == pytest.approx(1) for k in CUTOFFS)
    if relevant <= CUTOFFS[0]:
        assert all(perfect[f"map@{k}"] == pytest.approx(1) for k in CUTOFFS)


def test_one_click_of_five_is_not_a_perfect_answer() -> None:
    values = query_metrics([1], relevant=5)
    assert values["map@5"] == pytest.approx(0.2)
    assert values["ndcg@5"] == pytest.approx(1 / sum(1 / math.log2(1 + rank) for rank in range(1, 6)))


def test_mean_is_over_all_queries() -> None:
    mean = mean_metrics([query_metrics([1]), query_metrics([30])])
    assert mean["hit@20"] == 0.5
    assert mean["mrr@10"] == 0.5


@given(
    st.integers(1, 300), st.sets(st.integers(0, 299), max_size=200), st.integers(1, 99), st.text(max_size=8), st.data()
)
def test_negatives_are_distinct_allowed_and_reproducible(
    n_items: int, exclude: set[int], negatives: int, qid: str, data: st.DataObject
) -> None:
    excluded = {item for item in exclude if item < n_items}
    drawn = sampled_candidates(n_items, excluded, qid=qid, negatives=negatives)
    assert len(drawn) == len(set(drawn)) == min(negatives, n_items - len(excluded))
    assert not excluded.intersection(drawn)
    assert all(0 <= item < n_items for item in drawn)
    order = data.draw(st.permutations(sorted(excluded)))
    assert sampled_candidates(n_items, order, qid=qid, negatives=negatives) == drawn


def test_negatives_are_uniform_and_differ_between_queries() -> None:
    n_items, draws, excluded = 50, 2000, {0, 7}
    counts = [0] * n_items
    for number in range(draws):
        for item in sampled_candidates(n_items, excluded, qid=f"rec-{number}", negatives=12):
            counts[item] += 1
    assert counts[0] == counts[7] == 0
    expected = draws * 12 / 48
    spread = math.sqrt(expected * (1 - 12 / 48))
    assert all(abs(count - expected) < 5 * spread for item, count in enumerate(counts) if item not in excluded)
    assert sampled_candidates(500, (), qid="a") != sampled_candidates(500, (), qid="a", seed=1)


@given(score_matrices(), st.integers(1, 10))
def test_sampled_ranks_never_exceed_full_ranks(problem: tuple[torch.Tensor, list[list[int]]], negatives: int) -> None:
    scores, targets = problem
    n_items = scores.shape[1]
    drawn = [sampled_candidates(n_items, t, qid=str(row), negatives=negatives) for row, t in enumerate(targets)]
    full = target_ranks(scores, targets)
    for sampled, ranks in zip(sampled_ranks(scores, targets, drawn), full, strict=True):
        assert all(few <= many for few, many in zip(sampled, ranks, strict=True))
    everything = [[item for item in range(n_items) if item not in t] for t in targets]
    assert sampled_ranks(scores, targets, everything) == full


SCORES = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_items(torch.tensor([[1.0, math.nan]]), 1), "row 0"),
        (lambda: top_items(torch.tensor([[1.0], [math.inf]]), 1), "row 1"),
        (lambda: top_items(torch.zeros(3), 1), r"shape \(3,\)"),
        (lambda: top_items(SCORES, 0), "k must be"),
        (lambda: target_ranks(SCORES, [[0]]), "1 rows where scores has 2"),
        (lambda: target_ranks(SCORES, [[0], []]), "row 1"),
        (lambda: target_ranks(SCORES, [[3], [0]]), "row 0"),
        (lambda: target_ranks(SCORES, [[-1], [0]]), "row 0"),
        (lambda: target_ranks(SCORES, [[0], [1, 1]]), "row 1"),
        (lambda: target_ranks(torch.tensor([[0.0, -math.inf]]), [[1]]), "target 1 is excluded"),
        (lambda: query_metrics([]), "at least 1"),
        (lambda: query_metrics([1, 2], relevant=1), "relevant"),
        (lambda: query_metrics([2, 2]), "distinct"),
        (lambda: query_metrics([0]), "count from 1"),
        (lambda: query_metrics([1], cutoffs=[0]), "cutoffs"),
        (lambda: mean_metrics([]), "no query"),
        (lambda: mean_metrics([{"a": 1.0}, {"b": 1.0}]), "same metrics"),
        (lambda: sampled_candidates(9, (), qid="q", negatives=0), "negatives"),
        (lambda: sampled_ranks(SCORES, [[0], [1]], [[1], [1]]), "row 1"),
        (lambda: sampled_ranks(SCORES, [[0], [1]], [[1], [3]]), "row 1"),
        (lambda: sampled_ranks(SCORES, [[0], [1]], [[1]]), "1 rows where targets has 2"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
