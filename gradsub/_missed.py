"""Gradients that went another way than their user may think: each kind is said once."""

from __future__ import annotations

import warnings

# Steps in a row without any task. One or two may be a warm-up, or a checkpoint that wants the state.
_SEVERAL = 3
_STACKLEVEL = 7  # of who called step()


class Missed:
    """Says it at a step.

    Attributes:
        clipping: whether torch's own clipping was called with parameters whose gradients were captured.
    """

    def __init__(self, tasks: bool) -> None:
        self.clipping = False
        self._expects_tasks = tasks
        self._untasked = 0
        self._said: set[str] = set()

    def say_strayed(self, block: str | None) -> None:
        """Of a block that was closed without a gradient, after which one of no task came."""
        if block is not None:
            self._warn(
                "strayed",
                f"{block} was closed before any backward pass, and then a gradient arrived outside of "
                "it: that belongs to no task, so no gate weighs it and the task's subspace never sees it. Call "
                "backward() inside the block of its task",
            )

    def say_unclipped(self, clipped: bool) -> None:
        """Of a step in which torch's clipping was called, and the optimizer's was not."""
        if self.clipping and not clipped:
            self._warn(
                "unclipped",
                "torch.nn.utils clips what is in p.grad, where the gradients of optimizer.task are not: they were not "
                "clipped. Call optimizer.clip_grad_norm_(max_norm) between backward and step, which clips each "
                "task's gradient; in a trainer, set its own clipping (max_grad_norm, gradient_clip_val) to 0",
            )

    def say_untasked(self, captured: bool, outside: bool, emptied: str | None) -> None:
        """Of several first steps that all had gradients, but none of a task.

        Args:
            captured: whether this step has some of a task.
            outside: whether it has some of none.
            emptied: a block of it that was closed without a gradient.
        """
        if captured:
            self._expects_tasks = False
        if not self._expects_tasks or not outside or "strayed" in self._said:
            return
        self._untasked += 1
        if self._untasked >= _SEVERAL:
            why = f"{emptied} was closed before any backward pass" if emptied else "no optimizer.task(...) was open"
            self._warn(
                "untasked",
                f"{self._untasked} steps had gradients, and none of them a task: {why}. They moved the shared "
                "subspace alone; gates and the tasks' subspaces have seen nothing. Run forward and backward pass "
                "inside `with optimizer.task(name):`, or pass tasks=() if no task is meant",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(message, UserWarning, stacklevel=_STACKLEVEL)
