from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import product

MOMENT_RULES = ("rotate", "keep", "reset")


def carry_moments(
    state: Mapping[str, Any], kinds: Mapping[str, str], rows: Sequence[int] | None, rotation: Tensor, axis: int
) -> list[str]:
    r"""Express an inner optimizer's moments, in place, in new bases.

    With the rotation C = B_old^T B_new (r x r), a first moment M (m x r, axis 1) becomes M C. A second moment v becomes
    v (C * C) + mean(v) (1 - 1^T (C * C)): coordinates are taken as uncorrelated, and the part of a new direction that
    the old subspace did not see is given the row's mean second moment; with zero there, Adam's first steps along it
    would be several times the learning rate. Of the root of a second moment, as Adamax keeps it, the square is carried.
    State of unknown meaning or other shape is left as it is. A second moment that has overflowed counts as the largest
    one that can be mixed with others: infinity times zero would be NaN.

    Args:
        state: by name; moments of several layers (L x m x r) or of one (m x r).
        kinds: by name, ``"first"``, ``"second"`` or ``"root"``.
        rows: of which layers the bases changed; None: of all.
        rotation: C of each (l x r x r).
        axis: of the weight that the bases span.

    Returns:
        the names of moments that could not be carried, because they are no floating-point numbers.

    Source: LDAdam (arXiv 2410.16103) for the rotation; the fill-in of unseen directions is this library's.
    """
    squared = rotation.square()
    unseen = (1.0 - squared.sum(-2)).clamp_min(0.0)
    rank_axis = -1 if axis == 1 else -2
    coded = []
    for key, value in state.items():
        kind = kinds.get(key)
        if kind is None or not isinstance(value, Tensor):
            continue
        if not value.is_floating_point():
            coded.append(key)
            continue
        if value.ndim != rotation.ndim or value.shape[rank_axis] != rotation.shape[-1]:
            continue
        held = value if rows is None else value[list(rows)]
        if kind == "first":
            carried = _right(held, rotation.to(value.dtype), axis)
        else:
            most = torch.finfo(value.dtype).max / (2 * rotation.shape[-1])
            held = held.clamp(max=most) if kind == "second" else held.clamp(max=most**0.5).square()
            shape = unseen.unsqueeze(-2 if axis == 1 else -1).to(value.dtype)
            carried = _right(held, squared.to(value.dtype), axis) + held.mean(rank_axis, keepdim=True) * shape
            carried = carried if kind == "second" else carried.sqrt()
        if rows is None:
            value.copy_(carried)
        else:
            value[list(rows)] = carried
    return coded


def _right(value: Tensor, rotation: Tensor, axis: int) -> Tensor:
    return product(value, rotation) if axis == 1 else product(rotation.mT, value)
