"""What a method is asked to train on, besides the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One training problem.

    Args:
        tokens: N, processed in one step by all tasks together.
        rank: of LoRA, GaLore and the shared subspace; a task's own subspace has half of it.
        tasks: K, among which the rows are split equally.
        sequence_length: tokens in a sequence.
        learning_rate: of every method.
        weight_decay: of every method.
        update_proj_gap: steps between two refreshes of a subspace.
        seed: of weights and data.
    """

    tokens: int
    rank: int
    tasks: int
    sequence_length: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    update_proj_gap: int = 200
    seed: int = 0

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(f"task{index}" for index in range(self.tasks))
