"""The ordinary way to train on several tasks, and gradient surgery on top of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import Pass, total_samples
from ..processes import current
from ._base import Diagnostics, Updater, step_losses
from ._conflict import cosines, gramians, mean_cosines

Surgery = Callable[[Tensor], Tensor]
"""From the K x K inner products of the tasks' gradients to their K weights in the step; see ``gradsub.surgery``."""


class MixedLossUpdater(Updater):
    """Steps on the gradient of the mixed batch, or on what a surgery makes of its parts.

    Each task's mean loss is weighted by its share of the targets, so the sum of the gradients is that of the mean
    loss over all targets; only one pass's activations are in memory at a time. The tasks' gradients are kept apart
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

    def update(self, passes: Sequence[Pass], *, measure: bool = False) -> dict[str, float]:
        """Take one step of the mixed batch."""
        counts = total_samples(passes)
        processes = current()
        everywhere = processes.gather(counts)
        tasks = list(dict.fromkeys(task for each in everywhere for task in each))
        # The mean over the processes, which have fewer or more targets, is that over all targets.
        total = sum(sum(each.values()) for each in everywhere) / processes.count
        apart = len(tasks) > 1 and (measure or self._surgery is not None)
        weights = [*self._layers, *self._items]
        parts: dict[str, list[Tensor | None]] = {task: [None] * len(weights) for task in tasks}
        found: list[tuple[str, Tensor]] = []
        for each in passes:
            losses = each.compute()
            found += [(task, loss.detach() * (each.samples[task] / counts[task])) for task, loss in losses.items()]
            weighted = {task: loss * (each.samples[task] / total) for task, loss in losses.items()}
            if apart:
                self._backward_apart(weighted, parts, weights)
            else:
                sum(weighted.values()).backward()  # type: ignore[union-attr]
        self._found = None
        if apart:
            self._combine({task: _averaged(own, weights) for task, own in parts.items()}, measure)
        else:
            _give(weights, _averaged([weight.grad for weight in weights], weights))
        if self._grad_clip is not None:
            nn.utils.clip_grad_norm_(weights, self._grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return step_losses(found)

    def _backward_apart(
        self, losses: Mapping[str, Tensor], parts: dict[str, list[Tensor | None]], weights: Sequence[nn.Parameter]
    ) -> None:
        """Add each task's gradients of one pass to its own."""
        last = len(losses) - 1
        for position, (task, loss) in enumerate(losses.items()):
            _give(weights, parts[task])
            loss.backward(retain_graph=position < last)  # type: ignore[no-untyped-call]
            parts[task] = [weight.grad for weight in weights]
            _give(weights, [None] * len(weights))

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


def _averaged(gradients: list[Tensor | None], weights: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """The mean over the processes; a gradient that some of them do not have counts as zero there."""
    processes = current()
    if processes.count == 1:
        return gradients
    there = processes.gather([gradient is not None for gradient in gradients])
    found = [
        torch.zeros_like(weight) if gradient is None and any(each[place] for each in there) else gradient
        for place, (gradient, weight) in enumerate(zip(gradients, weights, strict=True))
    ]
    processes.average_(gradient for gradient in found if gradient is not None)
    return found


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
