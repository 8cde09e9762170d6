"""gradsub's `GemsOptimizer` around AdamW."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from gradsub import GemsOptimizer, NullSpace

from ..data import Batch, join, make_batches
from ..models import mean_loss, trained_weights
from ..problem import Problem
from ..protection import ENERGY, fit
from ._training import Method, Training, adamw, tensor_bytes

GENERIC = "generic"


class GemsTraining(Training):
    """Counts as state what is on the device between refreshes, so not the protected directions."""

    optimizer: GemsOptimizer

    def state_bytes(self) -> int:
        states = self.optimizer.state.values()
        return tensor_bytes([{k: v for k, v in state.items() if k not in ("protected", "free")} for state in states])


class TaskByTask(GemsTraining):
    """A forward and a backward pass a task, inside ``optimizer.task``."""

    def step(self, batches: Sequence[Batch]) -> float:
        total = 0.0
        for name, batch in zip(self.optimizer.tasks, batches, strict=True):
            with self.optimizer.task(name, samples=batch.rows):
                loss = mean_loss(self.model, batch)
                loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / len(batches)


class Mixed(GemsTraining):
    """One forward and one backward pass of all tasks' rows, inside ``optimizer.mixed``."""

    def step(self, batches: Sequence[Batch]) -> float:
        task_ids = [index for index, batch in enumerate(batches) for _ in range(batch.rows)]
        with self.optimizer.mixed(task_ids):
            loss = mean_loss(self.model, join(batches))
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Gems(Method):
    """Args: how gradients are captured; the side of the bases; whether one pass serves all tasks; a null space."""

    warm_up_steps = 6
    refreshes = "cycle"

    def __init__(self, capture: str, side: str = "input", mixed: bool = False, protected: bool = False) -> None:
        self._capture = capture
        self._side = side
        self._mixed = mixed
        self._protected = protected
        passes = "one pass for all tasks" if mixed else "a pass a task"
        null_space = f", with a null space of energy {ENERGY}" if protected else ""
        self.summary = f"GemsOptimizer(AdamW), capture {capture}, side {side}, {passes}{null_space}"

    def unavailable(self) -> str | None:
        if self._capture != GENERIC and not _has_capture():
            return f"this version of GemsOptimizer has no argument capture, and so no capture={self._capture!r}"
        if self._mixed and not hasattr(GemsOptimizer, "mixed"):
            return "this version of GemsOptimizer has no mixed()"
        return None

    def build(self, model: nn.Module, problem: Problem) -> Training:
        null_space, mapped = self._null_space(model, problem) if self._protected else (None, 0)
        optimizer = GemsOptimizer(
            adamw(trained_weights(model), problem),
            tasks=problem.task_names,
            rank=problem.rank,
            update_proj_gap=problem.update_proj_gap,
            side=self._side,
            model=model,
            null_space=null_space,
            **({"capture": self._capture} if _has_capture() else {}),
        )
        return (Mixed if self._mixed else TaskByTask)(model, optimizer, mapped)

    def _null_space(self, model: nn.Module, problem: Problem) -> tuple[NullSpace, int]:
        few = replace(problem, tokens=2 * problem.sequence_length, tasks=1)  # a row of either kind of model
        config: Any = model.config
        (batch,) = make_batches(few, config.vocab_size, config.is_encoder_decoder)
        return fit(model, batch.inputs, self._side, problem.seed)


def _has_capture() -> bool:
    return "capture" in inspect.signature(GemsOptimizer).parameters
