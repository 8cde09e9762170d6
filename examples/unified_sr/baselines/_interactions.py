"""Who took which item, as far as training may know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import sparse

from ..data import Example


def interactions(examples: Iterable[Example], n_items: int) -> sparse.csr_array:
    """Return the users' items as a matrix (users, items) of zeros and ones.

    A user's items are those in the histories and targets of the user's examples, whatever the task was: exactly what
    the other methods read and predict.

    Args:
        examples: training examples of any task.
        n_items: size of the catalogue.
    """
    taken: dict[str, set[int]] = {}
    for example in examples:
        taken.setdefault(example.user, set()).update(example.history, example.target)
    return _indicators(list(taken.values()), n_items)


def histories(examples: Sequence[Example], n_items: int) -> sparse.csr_array:
    """Return the items of each example's history as a matrix (examples, items) of zeros and ones."""
    return _indicators([set(example.history) for example in examples], n_items)


def _indicators(rows: Sequence[Iterable[int]], n_items: int) -> sparse.csr_array:
    columns = [sorted(row) for row in rows]
    starts = np.cumsum([0, *map(len, columns)])
    indices = np.array([item for row in columns for item in row], dtype=np.int64)
    return sparse.csr_array((np.ones(len(indices)), indices, starts), shape=(len(columns), n_items))
