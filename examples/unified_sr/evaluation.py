"""Full ranking of the catalogue for the test examples, and the metrics of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from .data import Dataset, Example
from .metrics import mean_metrics, query_metrics, sampled_candidates, sampled_ranks, target_ranks, top_items
from .model import Collator, PromptBuilder, Ranker, length_buckets
from .precision import Precision
from .settings import EvaluationSettings, Settings
from .trec import DEPTH


@dataclass(frozen=True)
class TaskResult:
    """A task's rankings.

    Args:
        rankings: qid -> item ids, best first, as many as a TREC run lists.
        relevant: qid -> ids of the relevant items.
        per_query: qid -> metric -> value, in full ranking.
        sampled_per_query: the same among the targets and a few random negatives.
        losses: qid -> cross-entropy of the targets over the whole catalogue, in nats, as in training; it means
            something where scores are logits.
    """

    rankings: dict[str, list[str]]
    relevant: dict[str, list[str]]
    per_query: dict[str, dict[str, float]]
    sampled_per_query: dict[str, dict[str, float]]
    losses: dict[str, float]

    @classmethod
    def joined(cls, parts: Sequence[TaskResult], order: Sequence[str]) -> TaskResult:
        """Bring the results of different examples together, in the order of these qids."""

        def merged(name: str) -> dict[str, Any]:
            found = {qid: value for part in parts for qid, value in getattr(part, name).items()}
            return {qid: found[qid] for qid in order}

        return cls(**{item.name: merged(item.name) for item in fields(cls)})

    @property
    def metrics(self) -> dict[str, float]:
        """The means in full ranking."""
        return mean_metrics(list(self.per_query.values()))

    @property
    def sampled(self) -> dict[str, float]:
        """The means among sampled negatives."""
        return mean_metrics(list(self.sampled_per_query.values()))

    @property
    def loss(self) -> float:
        """The mean cross-entropy."""
        return math.fsum(self.losses.values()) / len(self.losses)


def choose_examples(
    split: Mapping[str, Sequence[Example]], tasks: Iterable[str], settings: EvaluationSettings
) -> dict[str, list[Example]]:
    """Return each task's examples that are evaluated, the same for every method and in the order given."""
    return {task: _sample(split[task], settings.users, settings.seed) for task in tasks}


def _sample(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    if not 0 < count < len(examples):
        return list(examples)
    chosen = np.random.default_rng(seed).choice(len(examples), size=count, replace=False)
    return [examples[index] for index in sorted(chosen)]


def rank_catalogue(
    dataset: Dataset,
    examples: Sequence[Example],
    scored: Iterable[tuple[Sequence[int], torch.Tensor]],
    settings: EvaluationSettings,
    progress: Callable[[int], object] = lambda done: None,
) -> TaskResult:
    """Turn scores of all items into rankings and metrics; items that the user had seen are left out.

    Args:
        dataset: the catalogue, and which items each user has seen.
        examples: of one task.
        scored: batches that cover all examples once: their indices, and scores (batch, items), which are changed.
        settings: how many negatives the sampled metrics have, by which seed, and the metrics for comparison.
        progress: is called with the number of examples done in each batch.
    """
    found = TaskResult({}, {}, {}, {}, {})
    for batch, scores in scored:
        chosen = [examples[index] for index in batch]
        targets = [example.target for example in chosen]
        seen = [dataset.seen(example) for example in chosen]
        drawn = [
            sampled_candidates(
                len(dataset.items),
                met.union(example.target),
                qid=example.qid,
                negatives=settings.negatives,
                seed=settings.seed,
            )
            for example, met in zip(chosen, seen, strict=True)
        ]
        surprise = -torch.log_softmax(scores.float(), dim=1)
        # The negatives are unseen items and targets are never excluded, so -inf can stand for "seen" below.
        for row, met in enumerate(seen):
            scores[row, sorted(met)] = -torch.inf
        best = top_items(scores, DEPTH)
        ranks = target_ranks(scores, targets)
        few = sampled_ranks(scores, targets, drawn)
        for row, example in enumerate(chosen):
            relevant, qid = len(example.target), example.qid
            found.rankings[qid] = [dataset.items[item].id for item in best[row]]
            found.relevant[qid] = [dataset.items[item].id for item in example.target]
            found.per_query[qid] = query_metrics(ranks[row], relevant, compat=settings.compat)
            found.sampled_per_query[qid] = query_metrics(few[row], relevant, compat=settings.compat)
            found.losses[qid] = float(surprise[row, list(example.target)].mean())
        progress(len(chosen))
    return TaskResult.joined([found], [example.qid for example in examples])


@dataclass(frozen=True)
class Evaluator:
    """Ranks all items for given examples.

    Args:
        dataset: the catalogue, and which items each user has seen.
        prompts: turns examples into tokens.
        collate: pads them.
        precision: of the forward passes.
        settings: of the run.
    """

    dataset: Dataset
    prompts: PromptBuilder
    collate: Collator
    precision: Precision
    settings: Settings

    @torch.no_grad()
    def __call__(
        self, ranker: Ranker, examples: Sequence[Example], progress: Callable[[int], object] = lambda done: None
    ) -> TaskResult:
        """Rank the catalogue for each example.

        Args:
            ranker: the model.
            examples: of one task.
            progress: is called with the number of examples done in each batch.

        Raises:
            FloatingPointError: if a score is NaN or infinite, as after a last step that diverged.
        """
        ranker.eval()
        return rank_catalogue(
            self.dataset, examples, self._scored(ranker, examples), self.settings.evaluation, progress
        )

    def reads(self, examples: Sequence[Example]) -> list[Any]:
        """Return what decides the result of each example but the model, as plain values."""
        return [
            [example.qid, list(self.prompts(example)), list(example.target), sorted(self.dataset.seen(example))]
            for example in examples
        ]

    def _scored(self, ranker: Ranker, examples: Sequence[Example]) -> Iterator[tuple[list[int], torch.Tensor]]:
        prompts = [self.prompts(example) for example in examples]
        for bucket in length_buckets([len(prompt) for prompt in prompts], self.settings.model.inference_tokens):
            targets = [examples[index].target for index in bucket]
            with self.precision.context():
                scores = ranker(self.collate([prompts[index] for index in bucket], targets)).cpu()
            if not bool(torch.isfinite(scores).all()):
                raise FloatingPointError(
                    "the scores after training are NaN or infinite: its last steps diverged. Lower training.lr and "
                    "training.item_lr, or set model.autocast=none"
                )
            yield bucket, scores
