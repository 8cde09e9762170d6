"""SASRec in the same run and under the same metrics: what the order of items alone says about the next one."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..data import Dataset, Example, Timeline
from ..metrics import query_metrics, target_ranks
from ..precision import choose_precision
from ..sasrec import ItemSequence, SasRec, train_sasrec
from ..settings import MethodSettings, Number, Settings
from ._base import Fitted, Method
from ._baselines import NO_MODEL

BATCH = 256
"""Examples that are scored together."""


class SasRecSettings(MethodSettings):
    """A network and a training of its own, so that what a file says for language models does not change it."""

    width: int = Field(64, ge=1, description="of the items' rows and the hidden states, a multiple of heads")
    blocks: int = Field(2, ge=1, description="blocks of attention")
    heads: int = Field(2, ge=1, description="of each attention")
    dropout: Number = Field(0.3, ge=0, le=0.95, description="share of the hidden units dropped in training")
    learning_rate: Number = Field(3e-3, gt=0, description="of Adam")
    batch: int = Field(32, ge=1, description="sequences of at most model.max_history items in a step")
    max_epochs: int = Field(100, ge=0, description="passes over the users' sequences at most")
    patience: int = Field(
        10, ge=1, description="epochs without a better NDCG@10 on the validation split after which the training ends"
    )


def fit_sasrec(settings: Settings[SasRecSettings], dataset: Dataset, train: Sequence[Example]) -> Fitted:
    """Train SASRec on the users' training events and rank recommendations by it.

    Events of both tasks are inputs and targets: a search is answered by an item, too, and items are all that is read.
    Queries are not, so searches are not served.
    """
    own, device = settings.method, choose_precision(settings.model).device
    cuda = [device] if device.type == "cuda" else []
    tasks = list(dict.fromkeys(example.task for example in train))
    watched = dataset.valid["rec"]
    if not watched:
        warnings.warn(
            f"{settings.data.source!r} has no validation example of a recommendation, so sasrec runs all of its "
            f"{own.max_epochs} epochs; pass method.max_epochs=N that fits, or data.split=leave-one-out",
            stacklevel=2,
        )
    with torch.random.fork_rng(cuda):
        torch.manual_seed(settings.seed)
        model = SasRec(
            len(dataset.items),
            length=settings.model.max_history,
            width=own.width,
            blocks=own.blocks,
            heads=own.heads,
            dropout=own.dropout,
        ).to(device)
        values = train_sasrec(
            model,
            sequences(dataset.timelines, tasks),
            learning_rate=own.learning_rate,
            batch=own.batch,
            max_epochs=own.max_epochs,
            patience=own.patience,
            validate=_Validation(dataset, watched) if watched else None,
            seed=settings.seed,
        )
    best = max(values, default=0.0)
    chosen = f"the best of {len(values)} epochs, number {values.index(best) + 1}" if values else "of the last epoch"
    note = (
        f"SASRec ({own.blocks} blocks of width {own.width}) reads each user's training events in the order "
        f"of time and learns the items of {' and '.join(tasks)} by the cross-entropy over all items. Its weights are "
        f"{chosen}{f' (validation NDCG@10 {best:.4f})' if values else ''}. It knows no queries, so it serves "
        "recommendation alone."
    )
    weights = sum(weight.numel() for weight in model.parameters())
    return Fitted({"rec": lambda examples: _scores(model, examples)}, [note], device, weights)


def sequences(timelines: Iterable[Timeline], tasks: Collection[str]) -> list[ItemSequence]:
    """Return the items of timelines in the order of time.

    Args:
        timelines: of a data set.
        tasks: whose items are learned; those of other tasks' events are read, as in every history.
    """
    found = []
    for timeline in timelines:
        items, learned = list(timeline.context), [False] * len(timeline.context)
        for turn in timeline.turns:
            items += turn.items
            learned += [not set(tasks).isdisjoint(turn.tasks)] * len(turn.items)
        found.append(ItemSequence(tuple(items), tuple(learned)))
    return found


class _Validation:
    """NDCG@10 of full ranking without the items that the user had seen, as the evaluation has it."""

    def __init__(self, dataset: Dataset, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._seen = [sorted(dataset.seen(example)) for example in examples]

    def __call__(self, model: SasRec) -> float:
        total = 0.0
        for start in range(0, len(self._examples), BATCH):
            examples = self._examples[start : start + BATCH]
            scores = _scores(model, examples)
            for row, seen in enumerate(self._seen[start : start + BATCH]):
                scores[row, seen] = -torch.inf
            ranks = target_ranks(scores, [example.target for example in examples])
            total += sum(query_metrics(found, cutoffs=[10])["ndcg@10"] for found in ranks)
        return total / len(self._examples)


def _scores(model: SasRec, examples: Sequence[Example]) -> Tensor:
    return model.rank(example.history for example in examples)


METHODS = (
    Method(
        "sasrec",
        "SASRec, a transformer over sequences of items; no language model",
        SasRecSettings,
        None,
        fit_sasrec,
        fit_seconds=120.0,  # of one core: some 50 epochs of MovieLens-100K take 240 s, 15 to 20 of the Amazon data 30 s
        defaults={**NO_MODEL, "model.max_history": 50},
    ),
)
