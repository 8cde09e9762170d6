from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from gradsub.capture._fused import Part
from gradsub.capture._linear import Rows
from gradsub.capture._losses import weighted, when_weighted


class MixedRows:
    """Which rows of a batch belong to which task; what ``optimizer.mixed`` gives its block.

    Args:
        tasks: the names of all tasks.
        task_ids: (B,) the task of every row, by name or index.
        samples: task -> what it counts in the shared gradient; None: its number of rows.
        observe: told a task's index and mean loss.

    Raises:
        ValueError: there is no row, a task was never declared, or ``samples`` does not name exactly the tasks present.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        task_ids: Sequence[str | int] | Tensor,
        samples: Mapping[str, float] | None,
        observe: Callable[[int, Tensor], None],
    ) -> None:
        listed = task_ids.tolist() if isinstance(task_ids, Tensor) else list(task_ids)
        indices = [_index(tasks, task) for task in listed]
        if not indices:
            raise ValueError("task_ids is empty: name the task of every row of the batch")
        self.size = len(indices)
        self._observe = observe
        self.rows = {task: [row for row, other in enumerate(indices) if other == task] for task in sorted(set(indices))}
        present = {tasks[task] for task in self.rows}
        if samples is not None and samples.keys() != present:
            raise ValueError(
                f"samples names {sorted(samples)}, but task_ids has rows of {sorted(present)}: pass exactly those"
            )
        self.samples = {
            task: float(len(rows) if samples is None else samples[tasks[task]]) for task, rows in self.rows.items()
        }

    def parts(self, device: torch.device) -> list[Part]:
        """The parts of the batch for the capture: rows, and the task's share of the samples."""
        total = sum(self.samples.values())
        return [Part(task, self._located(rows, device), self.samples[task] / total) for task, rows in self.rows.items()]

    def _located(self, rows: list[int], device: torch.device) -> Rows:
        """Neighbouring rows are cut out of the batch, others are copied; one task alone has all."""
        if len(rows) == self.size:
            return None
        if rows[-1] - rows[0] + 1 == len(rows):
            return rows[0], rows[-1] + 1
        return torch.tensor(rows, device=device)

    def loss(self, losses: Tensor) -> Tensor:
        """The loss to call ``backward()`` on: sum_k w_k L_k, with L_k the mean over the task's rows.

        Each L_k is also reported to the gate, which does not learn the tasks' losses otherwise, as the backward pass
        weighs it: a loss scale reaches it, and so does a division by a number of parts.

        Args:
            losses: (B,) the loss of every row.

        Raises:
            ValueError: ``losses`` has another shape.
        """
        if losses.shape != (self.size,):
            raise ValueError(f"losses has shape {tuple(losses.shape)}, expected one loss a row: ({self.size},)")
        total = sum(self.samples.values())
        means = {task: losses[torch.tensor(rows, device=losses.device)].mean() for task, rows in self.rows.items()}
        loss = torch.stack([mean * (self.samples[task] / total) for task, mean in means.items()]).sum()
        values = {task: mean.detach() for task, mean in means.items()}
        if loss.requires_grad:
            when_weighted(loss, partial(self._report, values))
        else:
            self._report(values, torch.ones_like(loss))
        return loss

    def _report(self, means: Mapping[int, Tensor], weight: Tensor) -> None:
        for task, mean in means.items():
            self._observe(task, weighted(mean, weight))


def _index(tasks: Sequence[str], task: str | int) -> int:
    if isinstance(task, str) and task in tasks:
        return tasks.index(task)
    if isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(tasks):
        return task
    raise ValueError(f"task_ids holds {task!r}: pass names of {tuple(tasks)}, or their indices from 0")
