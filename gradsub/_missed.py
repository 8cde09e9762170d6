"""Gradients that went another way than their user may think: each kind is said once."""

from __future__ import annotations

import warnings

# Steps in a row without any task. One or two may be a warm-up, or a checkpoint that wants the state.
_SEVERAL = 3
_STACKLEVEL = 7  # of who called step()


class Missed:
    """Notes them as they go, and says it at a step.

    Attributes:
        clipping: whether torch's own clipping was called with parameters whose gradients were captured.
        emptied: how errors call a block of this step that was closed without a gradient, or None.
    """

    def __init__(self, tasks: bool) -> None:
        self.clipping = False
        self.emptied: str | None = None
        self._strayed: str | None = None
        self._outside = False
        self._expects_tasks = tasks
        self._untasked = 0
        self._said: set[str] = set()

    def see_outside(self) -> None:
        """A gradient of no task has arrived."""
        self._outside = True
        self._strayed = self.emptied

    def say(self, captured: bool, clipped: bool) -> None:
        """Warn once of each kind.

        Args:
            captured: whether this step has gradients of a task.
            clipped: whether the optimizer itself has clipped them.
        """
        if self._strayed is not None:
            self._warn(
                "strayed",
                f"{self._strayed} was closed before any backward pass, and then a gradient arrived outside of "
                "it: that belongs to no task, so no gate weighs it and the task's subspace never sees it. Call "
                "backward() inside the block of its task",
            )
        if self.clipping and not clipped:
            self._warn(
                "unclipped",
                "torch.nn.utils clips what is in p.grad, where the gradients of optimizer.task are not: they were not "
                "clipped. Call optimizer.clip_grad_norm_(max_norm) between backward and step, which clips each "
                "task's gradient; in a trainer, set its own clipping (max_grad_norm, gradient_clip_val) to 0",
            )
        self._expects_tasks &= not captured
        if self._expects_tasks and self._outside and "strayed" not in self._said:
            self._untasked += 1
            if self._untasked >= _SEVERAL:
                block = self.emptied
                why = f"{block} was closed before any backward pass" if block else "no optimizer.task(...) was open"
                self._warn(
                    "untasked",
                    f"{self._untasked} steps had gradients, and none of them a task: {why}. They moved the shared "
                    "subspace alone; gates and the tasks' subspaces have seen nothing. Run forward and backward pass "
                    "inside `with optimizer.task(name):`, or pass tasks=() if no task is meant",
                )
        self.emptied = self._strayed = None
        self._outside = False

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(message, UserWarning, stacklevel=_STACKLEVEL)
