"""SASRec: what it may see, what it learns, and that nothing held out is in it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.unified_sr.config import resolve
from examples.unified_sr.data import Dataset, Example, load_dataset
from examples.unified_sr.evaluation import rank_catalogue
from examples.unified_sr.methods import METHODS, Fitted
from examples.unified_sr.methods._sasrec import sequences
from examples.unified_sr.sasrec import ItemSequence, SasRec, train_sasrec, windows
from examples.unified_sr.settings import EvaluationSettings

ITEMS = 40


def network(n_items: int = 12, *, length: int = 6, dropout: float = 0.0, seed: int = 0) -> SasRec:
    torch.manual_seed(seed)
    model = SasRec(n_items, length=length, width=16, blocks=2, heads=2, dropout=dropout)
    for weight in model.parameters():  # far from what it starts with, so that every part has an effect
        torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_a_later_item_changes_no_earlier_state(training: bool) -> None:
    """Without dropout, with gradients and without: torch takes different paths through its own blocks."""
    model = network().train(training)
    one = torch.tensor([[1, 2, 3, 4, 5, 6]])
    for changed in range(1, 6):
        other = one.clone()
        other[0, changed] = 11
        with torch.set_grad_enabled(training):
            found, expected = model(other), model(one)
        torch.testing.assert_close(found[:, :changed], expected[:, :changed], atol=1e-6, rtol=0)
        assert not torch.isclose(found[:, changed:], expected[:, changed:], atol=1e-4).all(dim=-1).any()


def test_padding_and_items_out_of_reach_change_nothing() -> None:
    model = network()
    histories = [(3,), (1, 2, 3, 4, 5, 6), (7, 8, 9), (11, 10, 9, 8, 7, 6, 5, 4)]
    together = model.rank(histories)
    assert together.shape == (4, 12)
    for row, history in enumerate(histories):
        torch.testing.assert_close(together[row], model.rank([history])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(together[3], model.rank([(9, 8, 7, 6, 5, 4)])[0], atol=1e-5, rtol=0)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"width must be a multiple of heads \(3\), got 16; pass width=48"):
        SasRec(5, length=4, width=16, blocks=1, heads=3, dropout=0.0)
    with pytest.raises(ValueError, match="a history is empty"):
        network().rank([(1,), ()])


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=23), min_size=1, max_size=4), st.integers(1, 7))
def test_every_learned_item_but_the_first_is_a_target_once(learned: list[list[bool]], length: int) -> None:
    whole = [ItemSequence(tuple(range(100 * n, 100 * n + len(row))), tuple(row)) for n, row in enumerate(learned)]
    cut = windows([one.rows() for one in whole], length, torch.Generator().manual_seed(len(learned)))
    targets = [int(target) for window in cut for target in window[1:, 1] if target >= 0]
    expected = [one.rows()[1:, 1] for one in whole]
    assert sorted(targets) == [int(item) for rows in expected for item in rows if item >= 0]
    for window in cut:
        assert 2 <= len(window) <= length + 1
        items = window[:, 0].tolist()
        assert items == list(range(items[0], items[0] + len(items)))


def train_chain(model: SasRec, successor: Sequence[int], seed: int = 0) -> None:
    draw = random.Random(0)
    chains = []
    for _ in range(150):
        chain = [draw.randrange(len(successor))]
        while len(chain) < 10:
            chain.append(successor[chain[-1]])
        chains.append(ItemSequence(tuple(chain), (True,) * 10))
    torch.manual_seed(seed)
    options: dict[str, Any] = {"learning_rate": 1e-2, "batch": 32, "max_epochs": 12, "patience": 1}
    train_sasrec(model, chains, **options, validate=None, seed=seed)


def test_a_markov_chain_is_learnt_where_popularity_says_nothing() -> None:
    successor = [7, 3, 0, 9, 1, 11, 2, 10, 5, 4, 6, 8]
    model = SasRec(12, length=6, width=16, blocks=1, heads=2, dropout=0.1)
    train_chain(model, successor)
    for item in range(12):
        assert int(model.rank([(item,)]).argmax()) == successor[item]
        assert int(model.rank([(2, 8, item)]).argmax()) == successor[item]


def test_the_weights_are_those_of_the_best_epoch() -> None:
    measured = iter([0.2, 0.5, 0.4, 0.5, 0.1, 0.9])
    kept: list[dict[str, torch.Tensor]] = []

    def validate(model: SasRec) -> float:
        kept.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return next(measured)

    model = network()
    chain = ItemSequence(tuple(range(12)), (True,) * 12)
    options: dict[str, Any] = {"learning_rate": 1e-2, "batch": 4, "max_epochs": 9, "patience": 3}
    values = train_sasrec(model, [chain], **options, validate=validate, seed=0)
    assert values == [0.2, 0.5, 0.4, 0.5, 0.1]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, kept[1][name])
        assert not torch.equal(weight, kept[4][name])


def walks(folder: Path, *, held_out: int | None = None, users: int = 90, train_until: int = 8) -> str:
    """Users walk through a ring of items, mostly one step at a time; recommendations and searches take turns.

    ``held_out`` replaces every event from the place ``train_until`` on by items that lie so far ahead.
    """
    draw = random.Random(1)
    rows = ["user_id:token\titem_id:token\ttimestamp:float\tquery:token_seq"]
    for user in range(users):
        place = draw.randrange(ITEMS)
        for time in range(12):
            place += 1 if draw.random() < 0.8 else 2
            item = place + (held_out if held_out is not None and time >= train_until else 0)
            rows.append(f"u{user}\ti{item % ITEMS}\t{time}\t{'thing' if time % 2 else ''}")
    folder.mkdir(exist_ok=True)
    (folder / "ring.inter").write_text("\n".join(rows) + "\n", encoding="utf-8")
    lines = ["item_id:token\ttitle:token_seq", *(f"i{number}\tthing {number}" for number in range(ITEMS))]
    (folder / "ring.item").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def load(folder: str) -> Dataset:
    return load_dataset(folder, min_user_events=1, min_item_events=0, max_history=10)


def fitted(method: str, dataset: Dataset, *pairs: str) -> Fitted:
    fit = METHODS[method].fit
    assert fit is not None
    train = [example for task in dataset.tasks for example in dataset.train[task]]
    return fit(resolve(pairs=pairs, flags={"method.name": method}), dataset, train)


def ndcg(dataset: Dataset, found: Fitted, examples: Sequence[Example]) -> float:
    scored = [(range(len(examples)), found.scores["rec"](examples))]
    return rank_catalogue(dataset, examples, scored, EvaluationSettings(negatives=5)).metrics["ndcg@10"]


SMALL = (
    "model.max_history=10",
    "method.width=16",
    "method.batch=16",
    "method.learning_rate=0.01",
    "method.max_epochs=12",
    "method.patience=3",
)


def test_it_ranks_the_ring_better_than_popularity_and_reports_what_was_validated(tmp_path: Path) -> None:
    dataset = load(walks(tmp_path / "ring"))
    found, popular = fitted("sasrec", dataset, *SMALL), fitted("popularity", dataset)
    assert set(found.scores) == {"rec"}
    best = ndcg(dataset, found, dataset.test["rec"])
    assert best > 0.7
    assert best > ndcg(dataset, popular, dataset.test["rec"]) + 0.3
    (note,) = found.notes
    assert f"(validation NDCG@10 {ndcg(dataset, found, dataset.valid['rec']):.4f})" in note
    assert found.weights == ITEMS * 16 + 10 * 16 + 2 * (4 * 16 * 17 + 2 * 16 * 17 + 2 * 2 * 16) + 2 * 16


def test_equal_seeds_give_equal_scores_and_leave_torchs_own_generator_alone(tmp_path: Path) -> None:
    dataset = load(walks(tmp_path / "ring"))
    test = dataset.test["rec"]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = fitted("sasrec", dataset, *SMALL, "method.max_epochs=2", "seed=3").scores["rec"](test)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(fitted("sasrec", dataset, *SMALL, "method.max_epochs=2", "seed=3").scores["rec"](test), one)
    other = fitted("sasrec", dataset, *SMALL, "method.max_epochs=2", "seed=4").scores["rec"](test)
    assert not torch.isclose(other, one).all(dim=1).any()


def test_held_out_events_change_nothing_but_which_epoch_is_the_best(tmp_path: Path) -> None:
    """After one epoch there is nothing to choose, so what is held out has no effect at all."""
    one, other = load(walks(tmp_path / "one")), load(walks(tmp_path / "other", held_out=17))
    assert [example.target for example in one.valid["rec"]] != [example.target for example in other.valid["rec"]]
    test = one.test["rec"]
    found = [fitted("sasrec", dataset, *SMALL, "method.max_epochs=1").scores["rec"](test) for dataset in (one, other)]
    assert torch.equal(*found)
    changed = load(walks(tmp_path / "changed", held_out=17, train_until=5))
    assert not torch.equal(fitted("sasrec", changed, *SMALL, "method.max_epochs=1").scores["rec"](test), found[0])


def test_sequences_are_the_events_before_the_first_held_out_one(data_folder: str) -> None:
    dataset = load_dataset(data_folder, min_user_events=3, max_history=2)
    first: dict[str, int] = {}
    for example in (example for part in (dataset.valid, dataset.test) for rows in part.values() for example in rows):
        at = dataset.positions[example.qid]
        first[example.user] = min(at, first.get(example.user, at))
    both = sequences(dataset.timelines, dataset.tasks)
    users = [timeline.user for timeline in dataset.timelines]
    assert [sequence.items for sequence in both] == [dataset.events[user][: first[user]] for user in users]
    assert all(all(sequence.learned[1:]) for sequence in both)
    for task in dataset.tasks:
        one = sequences(dataset.timelines, {task})
        assert [sequence.items for sequence in one] == [sequence.items for sequence in both]
        learned = [item for sequence in one for item, own in zip(sequence.items, sequence.learned, strict=True) if own]
        targets = [item for example in dataset.train[task] for item in example.target]
        assert sorted(learned) == sorted(targets)


def test_without_validation_examples_it_runs_all_epochs_and_says_so(tmp_path: Path) -> None:
    dataset = load(walks(tmp_path / "ring", users=6))
    bare = replace(dataset, valid={"rec": (), "search": ()})
    with pytest.warns(UserWarning, match="has no validation example of a recommendation, so sasrec runs all of its 2"):
        found = fitted("sasrec", bare, *SMALL, "method.max_epochs=2")
    (note,) = found.notes
    assert "of the last epoch" in note
    assert found.scores["rec"](dataset.test["rec"]).isfinite().all()
