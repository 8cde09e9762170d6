"""SASRec in the same run and under the same metrics: what the order of items alone says about the next one."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..baselines import ItemSequence, SasRec, train_sasrec
from ..data import Dataset, Example, Timeline
from ..metrics import query_metrics, target_ranks
from ..precision import choose_precision
from ..settings import setting
from ._base import Fitted, Method
from ._baselines import BaselineSettings

BATCH = 256
"""Examples that are scored together."""

_OTHERS = "ignored: of language models; see {}"


@dataclass(frozen=True, kw_only=True)
class SasRecSettings(BaselineSettings):
    """A network and a training of its own, so that what a file says for language models does not change it."""

    method: str = setting("sasrec", "name of the training method")
    max_history: int = setting(50, "the most recent items that it reads, in training too", minimum=1)
    width: int = setting(64, "of the items' rows and the hidden states, a multiple of heads", minimum=1)
    blocks: int = setting(2, "blocks of attention", minimum=1)
    heads: int = setting(2, "of each attention", minimum=1)
    dropout: float = setting(0.3, "share of the hidden units dropped in training", minimum=0, maximum=0.95)
    learning_rate: float = setting(3e-3, "of Adam", above=0)
    batch: int = setting(32, "sequences of at most max_history items in a step", minimum=1)
    max_epochs: int = setting(50, "passes over the users' sequences at most", minimum=0)
    patience: int = setting(
        5, "epochs without a better NDCG@10 on the validation split after which the training ends", minimum=1
    )
    lr: float = setting(1e-4, _OTHERS.format("learning_rate"), above=0)
    batch_size: int = setting(32, _OTHERS.format("batch"), minimum=1)
    epochs: int | None = setting(None, _OTHERS.format("max_epochs"), minimum=1)
    early_stop: int | None = setting(None, _OTHERS.format("patience"), minimum=1)


def fit_sasrec(settings: SasRecSettings, dataset: Dataset, train: Sequence[Example]) -> Fitted:
    """Train SASRec on the users' training events and rank recommendations by it.

    Events of both tasks are inputs and targets: a search is answered by an item, too, and items are all that is read.
    Queries are not, so searches are not served.
    """
    device = choose_precision(settings).device
    cuda = [device] if device.type == "cuda" else []
    tasks = list(dict.fromkeys(example.task for example in train))
    watched = dataset.valid["rec"]
    if not watched:
        warnings.warn(
            f"{settings.data!r} has no validation example of a recommendation, so sasrec runs all of its "
            f"{settings.max_epochs} epochs; pass max_epochs=N that fits, or split=leave-one-out",
            stacklevel=2,
        )
    with torch.random.fork_rng(cuda):
        torch.manual_seed(settings.seed)
        model = SasRec(
            len(dataset.items),
            length=settings.max_history,
            width=settings.width,
            blocks=settings.blocks,
            heads=settings.heads,
            dropout=settings.dropout,
        ).to(device)
        values = train_sasrec(
            model,
            sequences(dataset.timelines, tasks),
            learning_rate=settings.learning_rate,
            batch=settings.batch,
            max_epochs=settings.max_epochs,
            patience=settings.patience,
            validate=_Validation(dataset, watched) if watched else None,
            seed=settings.seed,
        )
    best = max(values, default=0.0)
    chosen = f"the best of {len(values)} epochs, number {values.index(best) + 1}" if values else "of the last epoch"
    note = (
        f"SASRec ({settings.blocks} blocks of width {settings.width}) reads each user's training events in the order "
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


SASREC = Method(
    "sasrec",
    "SASRec, a transformer over sequences of items; no language model",
    SasRecSettings,
    None,
    fit_sasrec,
    fit_seconds=60.0,  # MovieLens-100K on two cores
)
