"""Methods without a language model, in the same run and under the same metrics: popularity, EASE and BM25."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..baselines import Bm25, ease_weights, histories, interactions
from ..data import Dataset, Example
from ..settings import Settings, setting
from ._base import Fitted, Method


@dataclass(frozen=True, kw_only=True)
class BaselineSettings(Settings):
    """``train_tasks`` chooses the examples that count; everything about language models and steps means nothing."""

    model: str = setting("none", "ignored: there is no language model")
    steps: int = setting(0, "ignored: there are no steps", minimum=0)


@dataclass(frozen=True, kw_only=True)
class PopularitySettings(BaselineSettings):
    """Nothing of its own."""

    method: str = setting("popularity", "name of the training method")


@dataclass(frozen=True, kw_only=True)
class EaseSettings(BaselineSettings):
    """The regularisation; on the development data its validation NDCG@10 is flat between 200 and 1000."""

    method: str = setting("ease", "name of the training method")
    regularisation: float = setting(500.0, "lambda, in units of users per item", above=0)


@dataclass(frozen=True, kw_only=True)
class Bm25Settings(BaselineSettings):
    """The constants, with the values that most implementations start from."""

    method: str = setting("bm25", "name of the training method")
    k1: float = setting(1.5, "how slowly repeated words saturate", minimum=0)
    b: float = setting(0.75, "how much long titles are held back", minimum=0, maximum=1)


def fit_popularity(settings: PopularitySettings, dataset: Dataset, train: Sequence[Example]) -> Fitted:
    """Rank by the number of users who took an item in training, for every example of both tasks alike."""
    counts = torch.from_numpy(interactions(train, len(dataset.items)).sum(axis=0))

    def scores(examples: Sequence[Example]) -> Tensor:
        return counts.expand(len(examples), -1).clone()

    note = "Items are ranked by the number of users who took them in training; equal ones by their place in the data."
    return Fitted(dict.fromkeys(dataset.tasks, scores), [note])


def fit_ease(settings: EaseSettings, dataset: Dataset, train: Sequence[Example]) -> Fitted:
    """Rank recommendations by EASE."""
    n_items = len(dataset.items)
    weights = ease_weights(interactions(train, n_items), settings.regularisation)

    def scores(examples: Sequence[Example]) -> Tensor:
        return torch.from_numpy(histories(examples, n_items) @ weights)

    note = (
        f"EASE (lambda = {settings.regularisation:g}) is fitted on the items of each user's training examples and reads"
        " the same histories as the language models, as sets; it knows no queries, so it serves recommendation alone."
    )
    return Fitted({"rec": scores}, [note])


def fit_bm25(settings: Bm25Settings, dataset: Dataset, train: Sequence[Example]) -> Fitted:
    """Rank searches by BM25."""
    index = Bm25(dataset.items, settings.k1, settings.b)

    def scores(examples: Sequence[Example]) -> Tensor:
        return torch.from_numpy(index([example.query for example in examples]))

    note = (
        f"BM25 (k1 = {settings.k1:g}, b = {settings.b:g}) looks for the query's words in the items' titles and learns "
        "nothing from examples; it serves search alone."
    )
    return Fitted({"search": scores}, [note])


POPULARITY = Method("popularity", "most popular items; no language model", PopularitySettings, None, fit_popularity)
EASE = Method("ease", "EASE, a linear autoencoder of histories; no language model", EaseSettings, None, fit_ease)
BM25 = Method("bm25", "BM25 of queries and titles; no language model", Bm25Settings, None, fit_bm25)
