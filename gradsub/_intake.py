"""What has come in since the last step: gradients by task, with the samples and the losses they stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from gradsub._finite import find_nonfinite, largest_entry
from gradsub.capture import (
    MIXED,
    Captured,
    FusedCapture,
    GenericCapture,
    LossWatcher,
    Part,
    ScaleWitness,
    clip_captured,
    loss_scale,
    scale_captured,
)
from gradsub.distributed import Exchange
from gradsub.subspace import Layer, SubspaceBank


class Intake:
    """Collects until the step, and makes of what this rank captured what all ranks did.

    Args:
        bank: the bases that gradients are projected on.
        exchange: sums over ranks.
        name: what errors call a parameter.
    """

    def __init__(self, bank: SubspaceBank, exchange: Exchange, name: Callable[[Tensor], str]) -> None:
        self._bank = bank
        self._exchange = exchange
        self._witness = ScaleWitness()
        self._outside = _Outside(self._witness, exchange)
        self.capture = GenericCapture(bank, name, self._outside)
        self.fused = FusedCapture(bank, self.capture)
        self.samples: dict[int, float] = {}
        self.mixed_samples = 0.0
        self.losses: dict[int, Tensor] = {}
        self._scale: Tensor | None = None
        self._open = False
        self._warned = False

    @property
    def gradients(self) -> Mapping[int, dict[Tensor, Captured]]:
        """By task, what was captured."""
        return self.capture.gradients

    @contextmanager
    def open(self, parts: list[Part], samples: Mapping[int, float], what: str) -> Iterator[None]:
        """Everything that is captured in here belongs to the parts' tasks.

        Args:
            parts: the rows of each task.
            samples: by task, what they count.
            what: how errors call this block.

        Raises:
            RuntimeError: another block is open; or no gradient arrived although a loss was seen.
        """
        if self._open:
            raise RuntimeError(f"{what} inside another task: a backward pass belongs to one, close it first")
        if self._witness.lost():
            # The scaler skipped the step and only model.zero_grad() was called: what was captured is of that step.
            self.clear()
        self._open = True
        self.capture.open(MIXED if len(parts) > 1 else parts[0].task)
        self.fused.open(parts)
        seen = set(self.losses)
        try:
            with self._exchange.quiet():
                yield
        finally:
            self.fused.close()
            arrived = self.capture.close()
            if arrived:
                for task, count in samples.items():
                    self.samples[task] = self.samples.get(task, 0.0) + count
                self.mixed_samples += sum(samples.values()) if len(parts) > 1 else 0.0
                self._bear_witness()
            else:
                self._outside.emptied = what
            self._open = False
        if not arrived and self.losses.keys() != seen:
            self._exchange.check_nothing_kept_back()

    def watch(self, task: int | None) -> LossWatcher:
        """A context that notes the scale of each loss that ``backward()`` is called on.

        Args:
            task: whose loss it is, to be noted as well; None: of nobody in particular.
        """
        return LossWatcher(self._saw_scale if task is None else partial(self.saw_loss, task))

    def saw_loss(self, task: int, loss: Tensor) -> None:
        """Add to the task's loss of this step."""
        self._saw_scale(loss)
        loss = loss.detach().to(torch.promote_types(loss.dtype, torch.float32)).sum()
        self.losses[task] = self.losses[task] + loss if task in self.losses else loss

    def _saw_scale(self, loss: Tensor) -> None:
        if self._scale is None:
            self._scale = loss_scale(loss)

    def _bear_witness(self) -> None:
        """Let a `GradScaler` know what was captured, if the loss was scaled."""
        if self._scale is not None:
            held = [captured.tensors()[0] for found in self.gradients.values() for captured in found.values()]
            with torch.no_grad():
                self._witness.place(self.capture.watched, largest_entry(held))

    def announce(self) -> None:
        """Let a `GradScaler` know what `reduce` has made of the gradients."""
        self._witness.refresh()
        self._bear_witness()

    def unscale(self) -> None:
        """Divide captured gradients by the loss scale, if a `GradScaler` was at work."""
        factor = self._witness.withdraw(self._scale)
        if factor is not None:
            self._exchange.check_unscaled(factor)
            for held in self.gradients.values():
                scale_captured(held, factor)

    def reduce(self, merge: bool) -> None:
        """Make of this rank's gradients, samples and losses those of all ranks.

        Args:
            merge: whether the tasks' gradients of parameters without subspaces are only needed as a sum.
        """
        carrier = self._witness.carrier
        agreed = self._exchange.reduce(
            self.capture.gradients, self.samples, self.mixed_samples, self.losses, self._scale, carrier, merge
        )
        if agreed is not None:
            if carrier is not None and any(parameter is carrier for parameter in agreed.outside):
                self._witness.joined(carrier)  # another rank has a gradient there
            self.samples, self.mixed_samples = agreed.samples, agreed.mixed
            self.losses, self._scale = agreed.losses, agreed.scale

    def clip(self, max_norm: float, layers: Mapping[Tensor, Layer]) -> dict[int, Tensor]:
        """Scale each task's gradient to a norm of at most ``max_norm``; the norms before, by task."""
        return {
            task: clip_captured(held, max_norm, layers, self._exchange.in_common)
            for task, held in self.gradients.items()
        }

    def find_nonfinite(self, tasks: Sequence[str], outside: Sequence[Tensor]) -> str | None:
        """What is NaN or Inf, in words, or None; waits for the device once.

        Args:
            tasks: their names.
            outside: gradients that were not captured.
        """
        return find_nonfinite(self.losses, self.gradients, tasks, outside, self._exchange.in_common)

    def check_dense(self, parameters: Iterable[Tensor]) -> None:
        """Raise if one of the parameters has a sparse gradient from outside any task."""
        for parameter in parameters:
            if parameter.grad is not None:
                self.capture.check_dense(parameter, parameter.grad)

    def check_strays(self) -> None:
        """At a step: warn once if a task was closed without a gradient, and one of no task came after it."""
        # Not at zero_grad, which may stand between the two.
        strayed, self._outside.emptied, self._outside.strayed = self._outside.strayed, None, None
        if strayed is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{strayed} was closed before any backward pass, and then a gradient arrived outside of "
                "it: that belongs to no task, so no gate weighs it and the task's subspace never sees it. Call "
                "backward() inside the block of its task",
                stacklevel=5,
            )

    def clear(self) -> None:
        """Forget all that has come in."""
        self._witness.withdraw(None)
        self.capture.clear()
        self._bank.forget_directions()
        self.losses.clear()
        self.samples.clear()
        self.mixed_samples = 0.0
        self._scale = None
        self._exchange.reset()


class _Outside:
    """Is told of every gradient of no task.

    Attributes:
        emptied: how errors call a block of this step that was closed without a gradient, or None.
        strayed: the same, once a gradient has arrived after it.
    """

    def __init__(self, witness: ScaleWitness, exchange: Exchange) -> None:
        self._witness = witness
        self._exchange = exchange
        self.emptied: str | None = None
        self.strayed: str | None = None

    def __call__(self, parameter: Tensor) -> None:
        self._exchange.check_open()
        self._witness.joined(parameter)
        self.strayed = self.emptied
