"""Methods that train no language model, under the same metrics: the model as it is, popularity, EASE and BM25."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from scipy import linalg, sparse
from torch import Tensor

from ..data import Dataset, Example, Item
from ..settings import MethodSettings, Number, Settings
from ._base import Fitted, Method

Array = np.ndarray[Any, np.dtype[Any]]

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


def interactions(examples: Iterable[Example], n_items: int) -> sparse.csr_array:
    """Return the users' items as a matrix (users, items) of zeros and ones.

    A user's items are those in the histories and targets of the user's examples, whatever the task was: exactly what
    the other methods read and predict.

    Args:
        examples: training examples of any task.
        n_items: size of the catalogue.
    """
    taken: dict[str, set[int]] = {}
    for example in examples:
        taken.setdefault(example.user, set()).update(example.history, example.target)
    return _indicators(list(taken.values()), n_items)


def histories(examples: Sequence[Example], n_items: int) -> sparse.csr_array:
    """Return the items of each example's history as a matrix (examples, items) of zeros and ones."""
    return _indicators([set(example.history) for example in examples], n_items)


def _indicators(rows: Sequence[Iterable[int]], n_items: int) -> sparse.csr_array:
    columns = [sorted(row) for row in rows]
    starts = np.cumsum([0, *map(len, columns)])
    indices = np.array([item for row in columns for item in row], dtype=np.int64)
    return sparse.csr_array((np.ones(len(indices)), indices, starts), shape=(len(columns), n_items))


def ease_weights(X: sparse.csr_array, regularisation: float) -> Array:
    r"""Return B (items, items) that minimises ||X - X B||^2 + lambda ||B||^2 subject to diag(B) = 0.

    With P = (X^T X + lambda I)^-1 the solution is B_ij = -P_ij / P_jj for i != j. It takes items^2 numbers of memory
    and items^3 operations. A user's scores are x B, with the user's items x.

    Args:
        X: (users, items), who took what.
        regularisation: lambda, in units of users per item, more than 0.

    Example:
        >>> X = sparse.csr_array(np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        >>> ease_weights(X, 2.0).round(2)
        array([[0. , 0.5, 0. ],
               [0.5, 0. , 0. ],
               [0. , 0. , 0. ]])

    Source: Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019, arXiv 1905.03375.
    """
    gramian: Array = (X.T @ X).toarray()
    gramian[np.diag_indices_from(gramian)] += regularisation
    inverse: Array = linalg.inv(gramian, overwrite_a=True)
    weights: Array = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights + 0.0  # -0.0 becomes 0.0


class Bm25:
    """Scores every title for a query.

    Words are lower-cased runs of letters and digits, without stemming and without a list of stop words: the inverse
    document frequency already makes frequent words count little, and such lists hold whole titles ("It").

    Args:
        items: the catalogue.
        k1: how slowly repeated words saturate.
        b: how much long titles are held back, between 0 and 1.
    """

    def __init__(self, items: Sequence[Item], k1: float, b: float) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ImportError("the method 'bm25' needs bm25s: pip install 'gradsub[examples]'") from error
        self._bm25s: Any = bm25s
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
        self._index.index(self._words([item.title for item in items]), show_progress=False)

    def __call__(self, queries: Sequence[str]) -> Array:
        """Return (queries, items); all zeros for a query of which no word is in any title."""
        found: list[Array] = []
        for words in self._words(queries):
            known = [word for word in words if word and word in self._index.vocab_dict]
            found.append(self._index.get_scores(known) if known else np.zeros(self._index.scores["num_docs"]))
        return np.stack(found).astype(np.float32)

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        # A text without words is one empty word: bm25s can index nothing of which all parts are empty.
        words: list[list[str]] = self._bm25s.tokenize(
            list(texts), token_pattern=r"\w+", stopwords=[], return_ids=False, show_progress=False, allow_empty=False
        )
        return words


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
