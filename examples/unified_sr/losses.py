"""The tasks' losses of a step, one forward pass after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .model import Batch, Ranker
from .precision import Precision


@dataclass(frozen=True)
class Pass:
    """One forward pass and the tasks' losses that come out of it.

    Args:
        samples: task -> how many targets it has in this pass.
        compute: runs the forward pass and returns each task's mean loss over these, with its graph.
    """

    samples: Mapping[str, int]
    compute: Callable[[], Mapping[str, Tensor]]


def passes_of(ranker: Ranker, batches: Sequence[Batch], precision: Precision) -> list[Pass]:
    """Return the passes of a step.

    Whoever runs the backward passes of each before computing the next one has the activations of one batch in memory at
    a time, and in the end the gradient of all of them.

    Args:
        ranker: the model.
        batches: of the step.
        precision: of the forward passes.
    """
    return [Pass(batch.samples, partial(_losses, ranker, batch, precision)) for batch in batches if batch.tasks]


def total_samples(passes: Sequence[Pass]) -> dict[str, int]:
    """Return how many targets each task has in all passes together."""
    total: Counter[str] = Counter()
    for each in passes:
        total.update(each.samples)
    return dict(total)


def _losses(ranker: Ranker, batch: Batch, precision: Precision) -> dict[str, Tensor]:
    with precision.context():
        losses = ranker.losses(batch)
    for task, loss in losses.items():
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"the loss of the task {task!r} is {float(loss.detach())}; nothing was changed by this step. "
                "Lower training.lr and training.item_lr, or set model.autocast=none"
            )
    return losses
