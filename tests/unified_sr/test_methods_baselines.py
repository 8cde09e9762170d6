"""Methods without a language model against slow twins."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from examples.unified_sr.config import resolve
from examples.unified_sr.data import Example, Item, load_dataset
from examples.unified_sr.evaluation import rank_catalogue
from examples.unified_sr.methods import METHODS, Fitted
from examples.unified_sr.methods._baselines import Bm25, ease_weights, interactions
from examples.unified_sr.settings import EvaluationSettings

TITLES = ("Red chair", "red lamp", "The lamp of the sea", "M", "Glass & glass chair", "***", "Blue chair 1990")
ITEMS = [Item(str(number), title) for number, title in enumerate(TITLES)]


def test_ease_is_a_ridge_regression_of_each_item_on_the_others() -> None:
    """The slow twin solves one least-squares problem per item, in which the item itself is no regressor."""
    X = (np.random.default_rng(0).random((40, 9)) < 0.3).astype(float)
    expected = np.zeros((9, 9))
    for item in range(9):
        others = [other for other in range(9) if other != item]
        A = X[:, others]
        expected[others, item] = np.linalg.solve(A.T @ A + 3.5 * np.eye(8), A.T @ X[:, item])
    found = ease_weights(sparse.csr_array(X), 3.5)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert not found.diagonal().any()


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 1e4))
def test_ease_is_the_optimum_of_its_objective(seed: int, regularisation: float) -> None:
    """Where the gradient of the objective is not zero, only the constraint on the diagonal holds it."""
    X = (np.random.default_rng(seed).random((12, 6)) < 0.4).astype(float)
    B = ease_weights(sparse.csr_array(X), regularisation)
    gradient = X.T @ (X @ B - X) + regularisation * B
    np.testing.assert_allclose(gradient - np.diag(gradient.diagonal()), 0, atol=1e-9 * (1 + regularisation))


def test_interactions_are_what_training_examples_hold(data_folder: str) -> None:
    dataset = load_dataset(data_folder, min_user_events=3, max_history=2)
    train = [example for task in dataset.tasks for example in dataset.train[task]]
    found = interactions(train, len(dataset.items)).toarray()
    users = list(dict.fromkeys(example.user for example in train))
    assert found.shape == (len(users), len(dataset.items))
    assert set(np.unique(found)) == {0.0, 1.0}
    for user, row in zip(users, found, strict=True):
        first = min(
            dataset.positions[example.qid]
            for part in (dataset.valid, dataset.test)
            for task in dataset.tasks
            for example in part[task]
            if example.user == user
        )
        # Short histories lose nothing: each event of training is in the history or the target of some example.
        assert set(np.flatnonzero(row)) <= set(dataset.events[user][:first])
        assert set(np.flatnonzero(row)) >= set(dataset.events[user][1:first])


def fitted(method: str, folder: str, *pairs: str) -> tuple[Fitted, list[Example]]:
    dataset = load_dataset(folder, min_user_events=3)
    train = [example for task in dataset.tasks for example in dataset.train[task]]
    fit = METHODS[method].fit
    assert fit is not None
    return fit(resolve(pairs=pairs, flags={"method.name": method}), dataset, train), list(dataset.test["rec"])


def test_popularity_counts_users(data_folder: str) -> None:
    found, test = fitted("popularity", data_folder)
    dataset = load_dataset(data_folder, min_user_events=3)
    taken = {
        (example.user, item)
        for task in dataset.tasks
        for example in dataset.train[task]
        for item in (*example.history, *example.target)
    }
    counts = Counter(item for _, item in taken)
    expected = [counts[item] for item in range(len(dataset.items))]
    assert set(found.scores) == {"rec", "search"}
    scores = found.scores["rec"](test)
    assert scores.tolist() == [expected] * len(test)
    scores[0, 0] = -torch.inf  # belongs to the caller: the next ranking must not see it
    assert found.scores["rec"](test).tolist() == [expected] * len(test)


def test_ease_scores_the_sum_of_a_historys_rows(data_folder: str) -> None:
    found, test = fitted("ease", data_folder, "method.regularisation=2.0")
    dataset = load_dataset(data_folder, min_user_events=3)
    train = [example for task in dataset.tasks for example in dataset.train[task]]
    B = ease_weights(interactions(train, len(dataset.items)), 2.0)
    expected = np.stack([B[sorted(set(example.history))].sum(axis=0) for example in test])
    assert set(found.scores) == {"rec"}
    np.testing.assert_allclose(found.scores["rec"](test).numpy(), expected, atol=1e-12)


def test_bm25_ranks_the_exact_title_first() -> None:
    index = Bm25(ITEMS, k1=1.5, b=0.75)
    scores = index([title for title in TITLES if title != "***"])
    assert scores.argmax(axis=1).tolist() == [0, 1, 2, 3, 4, 6]


def test_bm25_follows_its_formula() -> None:
    """Lucene's variant, without the factor (k1 + 1) that changes no ranking."""
    words = [title.lower().replace("&", " ").replace("***", "").split() for title in TITLES]
    mean = sum(map(len, [found or [""] for found in words])) / len(words)
    k1, b = 1.2, 0.6
    expected = np.zeros((1, len(TITLES)))
    for word in ("chair", "glass"):
        holding = sum(word in found for found in words)
        idf = math.log(1 + (len(words) - holding + 0.5) / (holding + 0.5))
        for number, found in enumerate(words):
            count = found.count(word)
            expected[0, number] += idf * count / (count + k1 * (1 - b + b * len(found or [""]) / mean))
    np.testing.assert_allclose(Bm25(ITEMS, k1=k1, b=b)(["Glass CHAIR"]), expected, rtol=1e-5)


def test_bm25_without_a_known_word_scores_nothing() -> None:
    scores = Bm25(ITEMS, k1=1.5, b=0.75)(["unheard of", "", "***", "?! zebra"])
    assert scores.shape == (4, len(TITLES))
    assert not scores[1:].any()
    assert np.flatnonzero(scores[0]).tolist() == [2]


@pytest.mark.parametrize(("method", "task"), [("popularity", "search"), ("ease", "rec"), ("bm25", "search")])
def test_rankings_are_the_same_every_time_and_ties_go_to_the_earlier_item(
    data_folder: str, method: str, task: str
) -> None:
    dataset = load_dataset(data_folder, min_user_events=3)
    place = {item.id: number for number, item in enumerate(dataset.items)}
    found = []
    for size in (1, 100):
        fit, _ = fitted(method, data_folder)
        examples = dataset.test[task]
        batches = [range(at, min(at + size, len(examples))) for at in range(0, len(examples), size)]
        scored = ((batch, fit.scores[task]([examples[index] for index in batch])) for batch in batches)
        result = rank_catalogue(dataset, examples, scored, EvaluationSettings(negatives=9))
        found.append((result.rankings, result.per_query, result.sampled_per_query))
        if method != "ease":
            scores = dict(zip([example.qid for example in examples], fit.scores[task](examples).tolist(), strict=True))
            for qid, ranking in result.rankings.items():
                keys = [(-scores[qid][place[item]], place[item]) for item in ranking]
                assert keys == sorted(keys)
    assert found[0] == found[1]
