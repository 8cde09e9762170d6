"""Batches that keep the task of their rows, and what each row counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

# What cross-entropy ignores in torch, and what collators put in the place of labels that do not count.
IGNORED = -100


class TaskCollator:
    """A data collator around another one, which never sees the column of tasks.

    The batch gets one more entry: for each row ``[task, count]``, or ``[task, count, other count]``. Accelerate leaves
    lists where they are when it moves tensors to the device, so that reading them later waits for nothing.

    Args:
        collate: the collator around which this one is.
        column: the name of the rows' column of tasks, and of the batch's entry.
        count: what each row of the batch counts in the loss; None: leave tasks out of the batch, for evaluation.
        tasks: the names of all tasks, if the entry has to be a tensor (B, 2) of indices and counts: where one process
            reads the batches of all, nothing else travels. A row without a task has the index -1.
        otherwise: what each row counts if the model's loss turns out to pair logits and labels in the other way.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        column: str,
        count: Callable[[Mapping[str, Any]], Sequence[float]] | None,
        tasks: Sequence[str] | None = None,
        otherwise: Callable[[Mapping[str, Any]], Sequence[float]] | None = None,
    ) -> None:
        self.collate, self.column, self.count, self.tasks, self.otherwise = collate, column, count, tasks, otherwise

    def __call__(self, features: list[Any]) -> Any:
        """The batch.

        Raises:
            ValueError: some of the rows have a task and others have none.
        """
        rows, ids = [], []
        for row in features:
            if isinstance(row, Mapping) and self.column in row:
                ids.append(_plain(row[self.column]))
                row = {key: value for key, value in row.items() if key != self.column}
            rows.append(row)
        if ids and len(ids) != len(rows):
            raise ValueError(
                f"{len(rows) - len(ids)} of {len(rows)} rows of a batch have no column {self.column!r}: give one to all"
            )
        batch = self.collate(rows)
        if self.count is None or not isinstance(batch, MutableMapping):
            return batch
        columns = [ids, self.count(batch), *([] if self.otherwise is None else [self.otherwise(batch)])]
        # Where sequences were joined there are fewer rows than tasks, or more: whoever reads it can tell.
        entries = [list(row) for row in zip_longest(*columns)]
        batch[self.column] = entries if self.tasks is None else _as_tensor(entries, self.tasks)
        return batch


def _plain(task: Any) -> Any:
    """A number of torch or numpy as Python's."""
    item = getattr(task, "item", None)
    return task if isinstance(task, str) or not callable(item) else item()


def _as_tensor(entries: list[list[Any]], tasks: Sequence[str]) -> Tensor:
    numbers = [
        # With one task, or none, the column may mean anything, and nobody reads it.
        [
            -1 if task is None or len(tasks) < 2 else task_index(task, tasks),
            *(float("nan") if count is None else count for count in counts),
        ]
        for task, *counts in entries
    ]
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")  # which every device has


def task_index(task: Any, tasks: Sequence[str]) -> int:
    """The index of a task that a row names.

    Raises:
        ValueError: no task of that name, or of that index, was declared.
    """
    if isinstance(task, str) and task in tasks:
        return list(tasks).index(task)
    if isinstance(task, (int, float)) and not isinstance(task, bool) and task == int(task) and 0 <= task < len(tasks):
        return int(task)
    raise ValueError(f"a row has the task {task!r}: use a name of tasks={tuple(tasks)}, or an index from 0")


def count_labels(batch: Mapping[str, Any], shifted: bool) -> list[float]:
    """What each row counts in a mean over all labels: its labels that are not ignored, or 1 where it has one label.

    Args:
        batch: what the collator made.
        shifted: the model predicts the next token, so the first label of a row does not count.
    """
    labels = batch.get("shift_labels")
    shifted = shifted and labels is None
    labels = batch.get("labels") if labels is None else labels
    if not isinstance(labels, Tensor):
        first = next((value for value in batch.values() if isinstance(value, Tensor) and value.ndim), None)
        return [1.0] * (0 if first is None else len(first))
    if labels.ndim < 2 or labels.is_floating_point():
        return [1.0] * len(labels)
    counted = (labels[:, 1:] if shifted else labels) != IGNORED
    return [float(count) for count in counted.flatten(1).sum(1).tolist()]
