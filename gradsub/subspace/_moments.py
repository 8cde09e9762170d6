from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOMENT_RULES = ("rotate", "keep", "reset")

FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum"})


def carry_moments(state: dict[str, Any], old: Tensor, new: Tensor, axis: int) -> None:
    r"""Express an inner optimizer's moments, in place, in a new basis.

    With C = B_old^T B_new (r x r), a first moment M (m x r, axis 1) becomes M C. A second moment v becomes
    v (C * C) + mean(v) (1 - 1^T (C * C)): coordinates are taken as uncorrelated, and the part of a new direction that
    the old subspace did not see is given the row's mean second moment; with zero there, Adam's first steps along it
    would be several times the learning rate. State of unknown meaning or other shape is left as it is. A second moment
    that has overflowed counts as the largest one that can be mixed with others: infinity times zero would be NaN.

    Source: LDAdam (arXiv 2410.16103) for the rotation; the fill-in of unseen directions is this library's.
    """
    change = old.mT @ new
    squared = change.square()
    unseen = (1.0 - squared.sum(0)).clamp_min(0.0)
    rank_axis = 1 if axis == 1 else 0
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[rank_axis] != change.shape[0]:
            continue
        if key in FIRST_MOMENTS:
            value.copy_(_right(value, change.to(value.dtype), axis))
        elif key in SECOND_MOMENTS:
            value.clamp_(max=torch.finfo(value.dtype).max / (2 * change.shape[0]))
            filled = value.mean(rank_axis, keepdim=True) * (unseen if axis == 1 else unseen[:, None]).to(value.dtype)
            value.copy_(_right(value, squared.to(value.dtype), axis) + filled)


def _right(value: Tensor, change: Tensor, axis: int) -> Tensor:
    return value @ change if axis == 1 else change.mT @ value
