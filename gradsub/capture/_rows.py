from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradsub._kinds import check_kind
from gradsub.capture._fused import Part
from gradsub.capture._losses import weighted, when_weighted
from gradsub.capture._products import Rows


class MixedRows:
    """Which rows of a batch belong to which task; what ``optimizer.mixed`` gives its block.

    Args:
        tasks: the names of all tasks.
        task_ids: (B,) the task of every row, by name or index.
        samples: task -> what it counts in the shared gradient; None: its number of rows.
        other_rows: the same as ``task_ids`` for inputs of layers with other numbers of rows.
        shares: task -> its share of the samples of a step that this batch is a part of; None: the batch is all of it.
        observe: told a task's index and mean loss.

    Attributes:
        told: whether `loss` was called.

    Raises:
        ValueError: there is no row, a task was never declared, ``samples`` does not name exactly the tasks present,
            ``shares`` lacks one of them, or ``other_rows`` has rows of other tasks, or two accounts of equally many
            rows.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        task_ids: Sequence[str | int] | Tensor,
        samples: Mapping[str, float] | None,
        other_rows: Sequence[Sequence[str | int] | Tensor],
        shares: Mapping[str, float] | None,
        observe: Callable[[int, Tensor], None],
    ) -> None:
        self.size, self.rows = _by_task(tasks, "task_ids", task_ids)
        if not self.size:
            raise ValueError("task_ids is empty: name the task of every row of the batch")
        self._tasks = tasks
        self._observe = observe
        self.told = False
        self._layouts = {self.size: self.rows}
        check_kind("other_rows", other_rows, Iterable, "a sequence of sequences of tasks")
        for ids in other_rows:
            length, rows = _by_task(tasks, "other_rows", ids)
            if not rows.keys() <= self.rows.keys():
                absent = sorted(tasks[task] for task in rows.keys() - self.rows.keys())
                raise ValueError(f"other_rows names {absent}, of which task_ids has no row")
            if self._layouts.setdefault(length, rows) != rows:
                raise ValueError(
                    f"other_rows has two accounts of {length} rows (task_ids is one): which is meant cannot be told"
                )
        present = {tasks[task] for task in self.rows}
        if samples is not None and samples.keys() != present:
            raise ValueError(
                f"samples names {sorted(samples)}, but task_ids has rows of {sorted(present)}: pass exactly those"
            )
        self.samples = {
            task: float(len(rows) if samples is None else samples[tasks[task]]) for task, rows in self.rows.items()
        }
        self._partial = shares is not None
        if shares is not None and not present <= shares.keys():
            raise ValueError(
                f"shares names {sorted(shares)}, but task_ids has rows of {sorted(present)}: pass those of all tasks "
                "in the step"
            )
        total = sum(self.samples.values())
        self.shares = {
            task: count / total if shares is None else float(shares[tasks[task]])
            for task, count in self.samples.items()
        }

    @property
    def alone(self) -> int | None:
        """The task of all rows, if there is one."""
        return next(iter(self.rows)) if len(self.rows) == 1 else None

    def parts(self, device: torch.device) -> list[Part]:
        """The parts of the batch for the capture: rows, and the task's share of the samples."""
        if self.alone is not None:
            return [Part(self.alone, {}, self.shares[self.alone])]
        return [
            Part(
                task,
                {size: _located(rows.get(task, []), device) for size, rows in self._layouts.items()},
                self.shares[task],
            )
            for task in self.rows
        ]

    def loss(self, losses: Tensor) -> Tensor:
        """The loss to call ``backward()`` on: sum_k w_k L_k, with L_k the mean over the task's rows.

        Each L_k is also reported to the gate, which does not learn the tasks' losses otherwise, as the backward pass
        weighs it: a loss scale reaches it, and so does a division by a number of parts.

        Args:
            losses: (B,) the loss of every row.

        Raises:
            ValueError: ``losses`` has another shape, or the batch is a part of a step (``shares``), of which it cannot
                know the whole.
        """
        if self._partial:
            raise ValueError(
                "rows.loss(losses) of a batch with shares=: the loss of a part of a step is divided by the samples of "
                "all of it, which only you know; call backward() on that, and rows.tell({task: loss})"
            )
        if losses.shape != (self.size,):
            raise ValueError(f"losses has shape {tuple(losses.shape)}, expected one loss a row: ({self.size},)")
        total = sum(self.samples.values())
        means = {
            task: losses[torch.tensor(rows, dtype=torch.int64, device=losses.device)].mean()
            for task, rows in self.rows.items()
        }
        loss = torch.stack([mean * (self.samples[task] / total) for task, mean in means.items()]).sum()
        values = {task: mean.detach() for task, mean in means.items()}
        self.told = True
        if loss.requires_grad:
            when_weighted(loss, partial(self._report, values))
        else:
            self._report(values, torch.ones_like(loss))
        return loss

    def tell(self, losses: Mapping[str, Tensor]) -> None:
        """Report the tasks' losses to the gate, where ``backward()`` runs on a loss that was computed elsewhere.

        Inside of the block, before or after ``backward()``.

        Args:
            losses: task -> its mean loss (0-dim) in this batch, times the loss scale if there is one; of a batch that
                is a part of a step, this part's contribution to the task's mean over the step.

        Raises:
            ValueError: ``losses`` names a task without rows.
        """
        unknown = sorted(losses.keys() - {self._tasks[task] for task in self.rows})
        if unknown:
            raise ValueError(f"losses names {unknown}, of which the batch has no row: leave them out")
        self.told = True
        for name, loss in losses.items():
            self._observe(self._tasks.index(name), loss.detach())

    def _report(self, means: Mapping[int, Tensor], weight: Tensor) -> None:
        for task, mean in means.items():
            self._observe(task, weighted(mean, weight))


def _by_task(
    tasks: Sequence[str], argument: str, given: Sequence[str | int] | Tensor
) -> tuple[int, dict[int, list[int]]]:
    """The number of rows, and the rows of each task."""
    ids: Any = given.tolist() if isinstance(given, Tensor) else given
    check_kind(argument, ids, Iterable, "the task of each row: names or indices, or a tensor of indices")
    rows: dict[int, list[int]] = {}
    for row, task in enumerate(ids := list(ids)):
        rows.setdefault(_index(tasks, argument, task), []).append(row)
    return len(ids), dict(sorted(rows.items()))


def _located(rows: list[int], device: torch.device) -> Rows:
    """Neighbouring rows are cut out of the batch, others are copied."""
    if not rows:
        return 0, 0
    if rows[-1] - rows[0] + 1 == len(rows):
        return rows[0], rows[-1] + 1
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _index(tasks: Sequence[str], argument: str, task: str | int) -> int:
    if isinstance(task, str) and task in tasks:
        return tasks.index(task)
    if isinstance(task, numbers.Integral) and not isinstance(task, bool) and 0 <= task < len(tasks):
        return int(task)
    raise ValueError(f"{argument} holds {task!r}: pass names of {tuple(tasks)}, or their indices from 0")
