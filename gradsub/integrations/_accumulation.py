"""What each batch of a step is of the whole step, so that the tasks' gradients add up to means over all batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from gradsub.integrations._collator import task_index

# A task whose rows have no counted label still has samples.
_LEAST = 1e-6
# Such rows may have a gradient all the same, as of a router's loss, which is divided by the task's share of the step:
# that is then so much of its share of the rows, or its moments would be those of a gradient a million times as large.
_UNCOUNTED = 0.1

_Rows: TypeAlias = "tuple[list[int], list[float]]"


@dataclass(frozen=True)
class Batch:
    r"""One of the batches that a step accumulates; n_b is what row b counts.

    A trainer adds up losses: with a number of items for the whole step, L = sum_b n_b l_b / sum_b n_b over all rows b
    of all batches; without one L = sum_i (sum_b n_b l_b / sum_b n_b) / I over the rows b of each of I batches i. In
    both L = sum_b u_b l_b / sum_b u_b, with u_b = n_b, or n_b over the sum of its batch's. So a task's mean loss is
    L_k = sum_b u_b l_b / U_k over its rows, U_k = sum_b u_b, and L = sum_k (U_k / sum_j U_j) L_k.

    Attributes:
        tasks: of every row, its index.
        weights: of every row, u_b.
        totals: by task, U_k over all batches of the step.
        otherwise: the same with the other counts of `TaskCollator`; None where it made none.
    """

    tasks: list[int]
    weights: list[float]
    totals: dict[int, float]
    otherwise: Batch | None = None

    @property
    def samples(self) -> dict[int, float]:
        """By task, the sum of u_b over this batch's rows."""
        found: dict[int, float] = {}
        for task, weight in zip(self.tasks, self.weights, strict=True):
            found[task] = found.get(task, 0.0) + weight
        return {task: max(weight, _LEAST) for task, weight in found.items()}

    @property
    def shares(self) -> dict[int, float]:
        """By task, U_k / sum_j U_j; of a task without any counted label a part of its share of the rows."""
        total = sum(self.totals.values())
        return {
            task: weight / total
            if weight > _LEAST
            else max(_LEAST, _UNCOUNTED * self.tasks.count(task) / max(1, len(self.tasks)))
            for task, weight in self.totals.items()
        }


def account(
    batches: Sequence[Any], tasks: Sequence[str], column: str, whole: bool, equal_ranks: bool
) -> list[Batch | None]:
    """What each batch of a step is of it, by both counts of its rows; None for a batch that no `TaskCollator` made.

    Args:
        batches: the entries of `TaskCollator`, or None.
        tasks: the names of all tasks.
        column: the rows' column of tasks, for errors.
        whole: the trainer divides by what all batches of the step count together, not each batch's loss by its own.
        equal_ranks: every process counts the same, whatever its rows do.

    Raises:
        ValueError: there are several tasks, and rows without one, or whose number differs from the batch's.
    """
    # Once: of a tensor it waits for the device.
    listed = [entry.tolist() if isinstance(entry, Tensor) else entry for entry in batches]
    parts = _parts([None if entry is None else _read(entry, tasks, column) for entry in listed], whole, equal_ranks)
    if not all(len(row) > 2 for entry in listed if entry is not None for row in entry):
        return parts
    others = [None if entry is None else _read(entry, tasks, column, 2) for entry in listed]
    return [
        None if part is None else replace(part, otherwise=other)
        for part, other in zip(parts, _parts(others, whole, equal_ranks), strict=True)
    ]


def _parts(read: Sequence[_Rows | None], whole: bool, equal_ranks: bool) -> list[Batch | None]:
    found = [rows for rows in read if rows is not None]
    everything = sum(sum(counts) for _, counts in found) or 1.0
    totals: dict[int, float] = {}
    units = []
    for ids, counts in found:
        unit = 1.0 if whole else 1.0 / (sum(counts) or 1.0)
        if equal_ranks or not whole:
            unit /= everything if whole else len(found)
        units.append(unit)
        for task, count in zip(ids, counts, strict=True):
            totals[task] = totals.get(task, 0.0) + unit * count
    totals = {task: max(total, _LEAST) for task, total in totals.items()}
    made = iter(
        Batch(ids, [unit * count for count in counts], totals) for (ids, counts), unit in zip(found, units, strict=True)
    )
    return [None if rows is None else next(made) for rows in read]


def _read(listed: list[Any], tasks: Sequence[str], column: str, place: int = 1) -> _Rows:
    """The task of every row, and the count that stands at this place."""
    # NaN and -1 stand for nothing in a tensor.
    ids = [row[0] for row in listed if row[0] is not None and row[0] != -1]
    counts = [row[place] for row in listed if row[place] is not None and row[place] == row[place]]
    if len(tasks) <= 1:
        return ([0] * len(counts), counts) if tasks else ([], [])  # whatever else a column of that name may mean
    if not ids:
        raise ValueError(
            f"the rows have no column {column!r}, which names their tasks, and tasks={tuple(tasks)} are several: add "
            "the column to the data set, or pass its name as task_column=. A library that prepares the data set may "
            "have dropped it, as TRL's packing=True does, which joins rows of several tasks: use packing=False"
        )
    if len(ids) < len(listed) == len(counts):
        raise ValueError(
            f"{len(listed) - len(ids)} of {len(listed)} rows of a batch have None in the column {column!r}: give each "
            f"row one of tasks={tuple(tasks)}"
        )
    if len(ids) != len(counts):
        raise ValueError(
            f"a batch was made of {len(ids)} rows with a task each, but has {len(counts)} rows: they were joined into "
            "sequences without padding (TRL's padding_free=True or packing=True, DataCollatorWithFlattening), where "
            "the layers cannot tell the tasks apart. Use padding_free=False and packing=False, or one task"
        )
    return [task_index(task, tasks) for task in ids], counts
