"""A task's loss in a step, cut into micro-batches where the whole batch does not fit into memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import Example
from .model import Batch, Collator, PromptBuilder, Ranker
from .precision import Precision


def micro_batches(
    examples: Sequence[Example], count: int, prompts: PromptBuilder, collate: Collator
) -> tuple[Batch, ...]:
    """Cut a batch into parts whose sizes differ by one at most, each padded by itself.

    Args:
        examples: of one task.
        count: the number of parts.
        prompts: turns examples into tokens.
        collate: pads them.

    Raises:
        ValueError: if there are fewer examples than parts.
    """
    if not 1 <= count <= len(examples):
        raise ValueError(
            f"accumulation must lie between 1 and batch_size, got accumulation={count} for {len(examples)} examples"
        )
    limits = [part * len(examples) // count for part in range(count + 1)]
    parts = [examples[start:end] for start, end in itertools.pairwise(limits)]
    return tuple(collate([prompts(row) for row in part], [row.target for row in part]) for part in parts)


@dataclass(frozen=True)
class TaskLoss:
    """The mean loss of a task's batch, one part after the other.

    Whoever runs the backward pass of each part before taking the next one has the activations of one part in memory at
    a time, and in the end the gradient of the whole batch.

    Args:
        ranker: the model.
        task: its name, for errors.
        parts: of ``micro_batches``.
        precision: of the forward passes.
    """

    ranker: Ranker
    task: str
    parts: tuple[Batch, ...]
    precision: Precision

    def __iter__(self) -> Iterator[Tensor]:
        """Yield each part's share of the loss, with its graph; the shares sum to the mean over the batch.

        Raises:
            FloatingPointError: naming the task whose loss is NaN or infinite.
        """
        total = sum(len(part.targets) for part in self.parts)
        for part in self.parts:
            yield self._of(part) * (len(part.targets) / total)

    def _of(self, batch: Batch) -> Tensor:
        with self.precision.context():
            loss = self.ranker.loss(batch)
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"the loss of the task {self.task!r} is {float(loss.detach())}; nothing was changed by this step. "
                "Lower lr and item_lr, or set autocast=none"
            )
        return loss
