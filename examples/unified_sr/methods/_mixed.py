"""The ordinary way to train on several tasks, and gradient surgery on top of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..processes import current
from ._base import Diagnostics, Updater, backward
from ._conflict import cosines, gramians, mean_cosines

Surgery = Callable[[Tensor], Tensor]
"""From the K x K inner products of the tasks' gradients to their K weights in the step; see ``gradsub.surgery``."""


class MixedLossUpdater(Updater):
    """Steps on the gradient of the mixed batch, or on what a surgery makes of its parts.

    Each task's mean loss is weighted by its share of the examples, so the sum of the gradients is that of the mean
    loss over all examples; only one task's activations are in memory at a time. The tasks' gradients are kept apart
    only where a surgery needs them or the step is measured; then K gradients are in memory instead of one.

    The items' rows take no part in surgery and measurement: they are embedding and classifier of both tasks, outside
    the layers that the tasks share, and every method trains them on the plain gradient of the mixed batch.

    Args:
        optimizer: its group ``"items"`` holds the items' rows.
        notes: sentences for the report.
        grad_clip: the largest norm of the combined gradient of all weights; ``None`` does not clip.
        surgery: combines the gradients of the layers' weights; ``None`` adds them up.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        notes: Sequence[str] = (),
        grad_clip: float | None = None,
        surgery: Surgery | None = None,
    ) -> None:
        super().__init__(optimizer, notes)
        self._grad_clip = grad_clip
        self._surgery = surgery
        self._layers = _weights(group for group in optimizer.param_groups if group["name"] != "items")
        self._items = _weights(group for group in optimizer.param_groups if group["name"] == "items")
        self._found: Diagnostics | None = None

    def update(
        self, losses: Mapping[str, Iterable[Tensor]], samples: Mapping[str, int], *, measure: bool = False
    ) -> dict[str, float]:
        """Take one step of the mixed batch."""
        apart = len(losses) > 1 and (measure or self._surgery is not None)
        weights = [*self._layers, *self._items]
        total = sum(samples.values())
        values: dict[str, float] = {}
        parts: dict[str, list[Tensor | None]] = {}
        for task, shares in losses.items():
            values[task] = backward(shares, samples[task] / total)
            if apart:
                _average(weights)
                parts[task] = [weight.grad for weight in weights]
                _give(weights, [None] * len(weights))
        self._found = None
        if apart:
            self._combine(parts, measure)
        else:
            _average(weights)
        if self._grad_clip is not None:
            nn.utils.clip_grad_norm_(weights, self._grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return values

    def diagnostics(self) -> Diagnostics | None:
        """Return the conflict of the tasks in the last step, if it was measured and there were several."""
        return self._found

    @torch.no_grad()
    def _combine(self, parts: Mapping[str, list[Tensor | None]], measure: bool) -> None:
        tasks, count = list(parts), len(self._layers)
        each = gramians([part[:count] for part in parts.values()])
        gramian = each.sum(dim=0)
        if measure:
            self._found = Diagnostics(cosine=cosines(gramian, tasks), cosines=mean_cosines(each, tasks))
        plain = [1.0] * len(tasks)
        factors = plain if self._surgery is None else self._surgery(gramian).tolist()
        columns = list(zip(*parts.values(), strict=True))
        _give(self._layers, [_sum(column, factors) for column in columns[:count]])
        _give(self._items, [_sum(column, plain) for column in columns[count:]])


def _average(weights: Sequence[nn.Parameter]) -> None:
    """The gradients of all processes' examples, of which each has as many."""
    current().average_(weight.grad for weight in weights if weight.grad is not None)


def _weights(groups: Iterable[Mapping[str, Any]]) -> list[nn.Parameter]:
    return [weight for group in groups for weight in group["params"]]


def _sum(gradients: Sequence[Tensor | None], factors: Sequence[float]) -> Tensor | None:
    """The weighted sum, in the memory of the first gradient."""
    terms = [(gradient, factor) for gradient, factor in zip(gradients, factors, strict=True) if gradient is not None]
    if not terms:
        return None
    total = terms[0][0].mul_(terms[0][1])
    for gradient, factor in terms[1:]:
        total.add_(gradient, alpha=factor)
    return total


def _give(weights: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
