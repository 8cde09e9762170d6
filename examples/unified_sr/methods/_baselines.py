"""Methods that train no language model, under the same metrics: the model as it is, popularity, EASE and BM25."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..baselines import Bm25, ease_weights, histories, interactions
from ..data import Dataset, Example
from ..settings import MethodSettings, Number, Settings
from ._base import Fitted, Method

NO_MODEL = {"model.name": "none", "training.steps": 0}
"""Defaults without a language model; the sections `model` and `training` mean nothing but by histories and tasks."""


class EaseSettings(MethodSettings):
    """The regularisation; on the development data its validation NDCG@10 is flat between 200 and 1000."""

    regularisation: Number = Field(500.0, gt=0, description="lambda, in units of users per item")


class Bm25Settings(MethodSettings):
    """The constants, with the values that most implementations start from."""

    k1: Number = Field(1.5, ge=0, description="how slowly repeated words saturate")
    b: Number = Field(0.75, ge=0, le=1, description="how much long titles are held back")


def fit_popularity(settings: Settings[MethodSettings], dataset: Dataset, train: Sequence[Example]) -> Fitted:
    """Rank by the number of users who took an item in training, for every example of both tasks alike."""
    counts = torch.from_numpy(interactions(train, len(dataset.items)).sum(axis=0))

    def scores(examples: Sequence[Example]) -> Tensor:
        return counts.expand(len(examples), -1).clone()

    note = "Items are ranked by the number of users who took them in training; equal ones by their place in the data."
    return Fitted(dict.fromkeys(dataset.tasks, scores), [note])


def fit_ease(settings: Settings[EaseSettings], dataset: Dataset, train: Sequence[Example]) -> Fitted:
    """Rank recommendations by EASE."""
    n_items = len(dataset.items)
    weights = ease_weights(interactions(train, n_items), settings.method.regularisation)

    def scores(examples: Sequence[Example]) -> Tensor:
        return torch.from_numpy(histories(examples, n_items) @ weights)

    note = (
        f"EASE (lambda = {settings.method.regularisation:g}) is fitted on the items of each user's training examples "
        "and reads the same histories as the language models, as sets; it knows no queries, so it serves "
        "recommendation alone."
    )
    return Fitted({"rec": scores}, [note])


def fit_bm25(settings: Settings[Bm25Settings], dataset: Dataset, train: Sequence[Example]) -> Fitted:
    """Rank searches by BM25."""
    index = Bm25(dataset.items, settings.method.k1, settings.method.b)

    def scores(examples: Sequence[Example]) -> Tensor:
        return torch.from_numpy(index([example.query for example in examples]))

    note = (
        f"BM25 (k1 = {settings.method.k1:g}, b = {settings.method.b:g}) looks for the query's words in the items' "
        "titles and learns nothing from examples; it serves search alone."
    )
    return Fitted({"search": scores}, [note])


METHODS = (
    Method("zero-shot", "the language model as it is", MethodSettings, None, defaults={"training.steps": 0}),
    Method(
        "popularity", "most popular items; no language model", MethodSettings, None, fit_popularity, defaults=NO_MODEL
    ),
    Method(
        "ease",
        "EASE, a linear autoencoder of histories; no language model",
        EaseSettings,
        None,
        fit_ease,
        defaults=NO_MODEL,
    ),
    Method("bm25", "BM25 of queries and titles; no language model", Bm25Settings, None, fit_bm25, defaults=NO_MODEL),
)
