"""What has come in since the last step: gradients by task, with the samples and the losses they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradsub._finite import find_nonfinite
from gradsub._missed import Missed
from gradsub.capture import (
    MIXED,
    ClippingWatcher,
    FusedCapture,
    Gathered,
    GenericCapture,
    Held,
    LossWatcher,
    MixedRows,
    Part,
    Unscaling,
    clip_captured,
    leaves,
    scale_captured,
    scale_norms,
    watch_through,
)
from gradsub.distributed import Exchange
from gradsub.subspace import SubspaceBank, is_distributed, local


class Intake:
    """Collects until the step, and makes of what this rank captured what all ranks did.

    Args:
        parameters: all that the optimizer has; the capture adds those that it watches.
    """

    def __init__(
        self,
        bank: SubspaceBank,
        exchange: Exchange,
        name: Callable[[Tensor], str],
        parameters: list[Tensor],
        tasks: bool,
    ) -> None:
        self._bank = bank
        self._exchange = exchange
        self._unscaling = Unscaling()
        self._missed = Missed(tasks)
        outside = partial(_see_outside, self._unscaling, exchange, self._missed)
        self.capture = GenericCapture(bank, name, outside, parameters)
        self.fused = FusedCapture(bank, self.capture)
        self.samples: dict[int, float] = {}
        self.mixed_samples = 0.0
        self.losses: dict[int, Tensor] = {}
        self._clipped = False
        self._open: str | None = None
        self._cleared = 0
        self._clipping = ClippingWatcher(self._saw_clipping)

    @property
    def held(self) -> Held:
        """What was captured."""
        return self.capture.held

    @property
    def rounding(self) -> float:
        """Epsilon of the coarsest format in which a gradient was computed."""
        return self.capture.rounding

    @contextmanager
    def open(self, parts: list[Part], samples: Mapping[int, float], what: str, mixed: bool = False) -> Iterator[None]:
        """Everything that is captured in here belongs to the parts' tasks.

        Args:
            samples: by task, what they count.
            what: how errors call this block.
            mixed: parameters without subspaces take the gradient of the block's loss as it is, whosever it is.

        Raises:
            RuntimeError: another block is open; the gradients of this step were divided by the scale of the loss; or
                no gradient arrived although a loss was seen.
        """
        if self._open is not None:
            raise RuntimeError(f"{what} inside another task: a backward pass belongs to one, close it first")
        self.forget_skipped()
        if self.unscaled:
            raise RuntimeError(
                f"{what} after this step's gradients were divided by the scale of the loss, which would not reach "
                "those captured now: unscale after the last backward pass, and call step() or zero_grad() first"
            )
        self._open = what
        alone = parts[0] if len(parts) == 1 else None
        seen, cleared = dict(self.losses), self._cleared
        try:
            if mixed:
                self.capture.open(MIXED, None if alone is None else (alone.task, alone.share))
            else:
                self.capture.open(parts[0].task)
            self.fused.open(parts)
            with self._exchange.quiet():
                yield
        except BaseException:
            if not self.capture.arrived and cleared == self._cleared:
                self.losses = seen  # the block brought nothing, and may be tried again
            raise
        finally:
            self._open = None
            try:
                self.fused.close()
            finally:
                arrived = self.capture.close()
            if arrived:
                self._clipping.listen()
                for task, count in samples.items():
                    self.samples[task] = self.samples.get(task, 0.0) + count
                self.mixed_samples += sum(samples.values()) if mixed else 0.0
            else:
                self._missed.emptied = what
        if not arrived and self.losses.keys() != seen.keys():
            self._exchange.check_nothing_kept_back()

    def watch(self, task: int, loss: Tensor | None) -> AbstractContextManager[object]:
        """Note the task's loss while its backward passes run.

        Args:
            loss: the loss, if ``backward()`` itself may be called on something else.
        """
        if loss is None:
            return LossWatcher(partial(self.saw_loss, task))
        return watch_through(loss, partial(self._saw_at_end, self._cleared, task))

    @contextmanager
    def watch_rows(self, rows: MixedRows) -> Iterator[None]:
        """Note the loss of a mixed batch of one task, where neither ``rows.loss`` nor ``rows.tell`` tells it."""
        task = rows.alone
        if task is None:
            yield
            return
        seen: list[tuple[int, Tensor]] = []
        try:
            with LossWatcher(lambda loss: seen.append((self._cleared, loss))):
                yield
        finally:
            # Only now: it may be told after the backward pass, and must count once.
            for cleared, loss in seen:
                if cleared == self._cleared and not rows.told:
                    self.saw_loss(task, loss / rows.shares[task])

    def _saw_at_end(self, cleared: int, task: int, loss: Tensor) -> None:
        # What zero_grad() has dropped inside of the block has no loss either.
        if cleared == self._cleared or self.capture.arrived:
            self.saw_loss(task, loss)

    def saw_loss(self, task: int, loss: Tensor) -> None:
        """Add to the task's loss of this step."""
        loss = loss.detach().to(torch.promote_types(loss.dtype, torch.float32)).sum()
        self.losses[task] = self.losses[task] + loss if task in self.losses else loss

    @property
    def expects(self) -> bool:
        """Whether something may have to be divided by the scale of the loss; the same on every rank."""
        return bool(self.held) or self._exchange.size > 1

    def show(self, scaler: dict[str, Any]) -> list[Tensor]:
        """Leaves with the captured gradients in ``.grad``, which a `GradScaler` is about to divide and to check.

        They are summed over the ranks before, so that all ranks find the same Inf.

        Raises:
            RuntimeError: gradients were clipped before.
        """
        self._check_unclipped()
        self.forget_skipped()
        self.reduce(merge=False)  # clipping may follow, and is by task
        shown = [tensor for task in self.held.tasks() for tensor in self.held.tensors(task)]
        if not shown:
            return []
        sharded = next((parameter for parameter in self.capture.watched if is_distributed(parameter)), None)
        factor = self._unscaling.begin(scaler, local(shown[0]).device)
        return leaves([*shown, factor], sharded)

    def settle(self) -> None:
        """Have losses and norms follow the gradients that a `GradScaler` has divided."""
        self.forget_skipped()
        factor = self._unscaling.take()
        if factor is not None:
            for task in self.held.tasks():
                scale_norms(self.held, task, factor)
            self._scale_losses(factor)

    def unscale(self, scale: Tensor) -> None:
        """Divide what was captured by the scale of the loss (0-dim).

        Raises:
            RuntimeError: gradients were clipped before.
        """
        self._check_unclipped()
        for task in self.held.tasks():
            scale_captured(self.held, task, scale.reciprocal())
        self._scale_losses(scale.reciprocal())
        self._unscaling.done = True

    @property
    def unscaled(self) -> bool:
        """Whether what was captured was divided by the scale of the loss."""
        return self._unscaling.done

    def _scale_losses(self, factor: Tensor) -> None:
        self.losses = {task: loss * factor.to(loss) for task, loss in self.losses.items()}

    def _check_unclipped(self) -> None:
        if self._clipped and not self.unscaled:
            raise RuntimeError(
                "clip_grad_norm_() before the gradients were divided by the scale of the loss has clipped scaled ones: "
                "call scaler.unscale_(optimizer), or optimizer.unscale_(scale), before it"
            )

    def forget_skipped(self) -> None:
        """Forget what was captured if a `GradScaler` has left out the step of it and nobody cleared it since."""
        if self._unscaling.skipped:
            self.clear()

    def reduce(self, merge: bool) -> None:
        """Make of this rank's gradients, samples and losses those of all ranks.

        Args:
            merge: whether the tasks' gradients of parameters without subspaces are only needed as a sum.
        """
        self.check_closed("summing or reading gradients")
        agreed = self._exchange.reduce(
            self.held,
            self.samples,
            self.mixed_samples,
            self.losses,
            merge,
            self.capture.rounding,
            self._bank,
            self.capture.layers,
        )
        if agreed is not None:
            self.samples, self.mixed_samples, self.losses = agreed.samples, agreed.mixed, agreed.losses
            self.capture.rounding = agreed.rounding

    def clip(self, max_norm: float) -> dict[int, Tensor]:
        """Scale each task's gradient to a norm of at most ``max_norm``; the norms before, by task."""
        self._clipped = True
        return {
            task: clip_captured(self.held, task, max_norm, self.capture.layers, self._exchange.in_common)
            for task in self.held.tasks()
        }

    def find_nonfinite(
        self, tasks: Sequence[str], gathered: Sequence[Gathered], plain: Iterable[Tensor], outside: Sequence[Tensor]
    ) -> str | None:
        """What is NaN or Inf, in words, or None; waits for the device once."""
        others = {
            task: [captured.tensors()[0] for each in plain if (captured := held.get(each)) is not None]
            for task, held in self.held.single.items()
        }
        return find_nonfinite(self.losses, gathered, others, tasks, outside, self._exchange.in_common)

    @contextmanager
    def put_aside(self) -> Iterator[None]:
        """In here nothing seems to be captured: the state is that of the last step."""
        self.forget_skipped()  # or what a scaler has found infinite would come back, as if it were new
        held, self.capture.held = self.capture.held, Held()
        try:
            yield
        finally:
            self.capture.held = held

    def check_dense(self) -> None:
        """Raise if one of the layers has a sparse gradient from outside any task."""
        for parameter in self.capture.layers:
            if parameter.grad is not None:
                self.capture.check_dense(parameter, parameter.grad)

    def _saw_clipping(self, parameters: Sequence[Tensor]) -> None:
        """Torch's own clipping is called with these."""
        self._missed.clipping = self._missed.clipping or self.held.any_of(parameters)

    def say_missed(self) -> None:
        """At a step: warn once of each kind of gradient that went another way than its user may think."""
        # Not at zero_grad, which may stand between a block and a gradient after it.
        self._missed.say(bool(self.held), self._clipped)

    def check_closed(self, what: str) -> None:
        """Raise a RuntimeError inside of a task, whose samples are not counted before its block is closed."""
        if self._open is not None:
            raise RuntimeError(
                f"{what} inside of {self._open}: what belongs to a task is complete once its block is closed; call it "
                "after the `with` block, which may hold nothing but the forward and the backward pass"
            )

    def clear(self) -> None:
        """Forget all that has come in, also of an open block."""
        self._cleared += 1
        self._unscaling.reset()
        self._clipped = self._missed.clipping = False
        self._clipping.rest()
        self.capture.clear()
        self.fused.clear()
        self._bank.forget_directions()
        self.losses.clear()
        self.samples.clear()
        self.mixed_samples = 0.0
        self._exchange.reset()


def _see_outside(unscaling: Unscaling, exchange: Exchange, missed: Missed, parameter: Tensor) -> None:
    """A gradient of no task has arrived."""
    if unscaling.skipped:
        exchange.reset()  # what the ranks had summed is of a step that a scaler has left out
    exchange.check_open()
    missed.see_outside()
