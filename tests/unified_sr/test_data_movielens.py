"""MovieLens-100K itself, where the package that carries it is installed."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from examples.unified_sr.data import MOVIELENS, TASKS, Dataset, load_dataset

pytestmark = pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="needs the package recbole")


@pytest.fixture(scope="module")
def movielens() -> Dataset:
    return load_dataset(MOVIELENS)


def test_it_is_the_whole_data_set(movielens: Dataset) -> None:
    statistics = movielens.statistics()
    assert statistics["events"] + statistics["removed"]["events_by_k_core"] == 100_000
    assert statistics["users"] == 943
    assert statistics["items"] + statistics["removed"]["items_by_k_core"] == 1682
    assert "recbole" not in sys.modules, "it is installed without its dependencies: importing it would fail"


def test_every_user_is_tested_on_both_tasks_and_training_keeps_almost_all(movielens: Dataset) -> None:
    for task in TASKS:
        assert len(movielens.test[task]) == len(movielens.valid[task]) == 943
    lost = movielens.statistics()["removed"]["events_after_a_held_out_one"]
    assert lost < 0.02 * sum(len(movielens.train[task]) for task in TASKS)


def test_no_held_out_item_is_in_the_training_data_of_its_user(movielens: Dataset) -> None:
    held_out: dict[str, set[int]] = {}
    for part in (movielens.valid, movielens.test):
        for task in TASKS:
            for example in part[task]:
                held_out.setdefault(example.user, set()).update(example.target)
    for task in TASKS:
        for example in movielens.train[task]:
            assert not held_out[example.user].intersection(example.history + example.target)


def test_examples_are_ordered_and_never_seen_before(movielens: Dataset) -> None:
    for part in (movielens.valid, movielens.test):
        for task in TASKS:
            for example in part[task]:
                seen = movielens.seen(example)
                assert not seen.intersection(example.target)
                assert seen.issuperset(example.history)
                assert len(example.history) == min(20, len(seen))


def test_titles_are_natural(movielens: Dataset) -> None:
    titles = {item.id: item.title for item in movielens.items}
    assert titles["12"] == "The Usual Suspects"
    assert not [title for title in titles.values() if title.endswith((", The", ", A", ", An"))]
