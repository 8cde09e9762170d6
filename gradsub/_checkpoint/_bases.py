"""Whether a saved layer's counts, times and bases, of the right shapes, can have come about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from gradsub.subspace import Layer, SubspaceBank, check_steps_taken, orthonormality
from gradsub.subspace._schedule import SKETCHES_PER_REFRESH
from gradsub.update import protected_in

# In multiples of the gap that is in force: how far ahead a refresh may be planned. The gap may have been longer.
_LONGEST_GAP: Final = 1024


def check_bases(layer: Layer, state: Mapping[str, Any], bank: SubspaceBank, update_proj_gap: int) -> None:
    """Raise a ValueError if a count or a time is out of range, or a basis not orthonormal, or not free to move."""
    of = f"of {layer.name}"
    check_steps_taken(f"state_dict: 'step' {of}", state["step"])
    step, due = int(state["step"]), state["next_refresh"].tolist()
    latest = step + _LONGEST_GAP * update_proj_gap
    if not all(0 <= time <= latest for time in due):
        raise ValueError(f"state_dict: 'next_refresh' {of} is {due}: it must lie between 0 and {latest} at step {step}")
    if "sketches" in state and not all(0 <= n < SKETCHES_PER_REFRESH for n in state["sketches"].tolist()):
        raise ValueError(f"state_dict: 'sketches' {of} must be 0 to {SKETCHES_PER_REFRESH - 1}")
    if "singular_values" in state and bool((state["singular_values"] < 0).any()):
        raise ValueError(f"state_dict: 'singular_values' {of} has negative entries")
    protected, basis = protected_in(state), state["basis"]
    free = layer.dimension if protected is None else protected.free
    for subspace, time in enumerate(due):
        columns = layer.columns(subspace)
        if not _plausible(basis[:, columns], bank.columns(layer, subspace, free), step >= time):
            raise ValueError(f"state_dict: 'basis' {of} is not orthonormal in its columns {columns}")
    if protected is not None:
        inside = torch.linalg.vector_norm(basis - protected.to(basis.device).leaves(basis), dim=0)
        if bool((inside > orthonormality(basis.dtype)).any()):
            raise ValueError(
                f"state_dict: 'basis' {of} is not orthogonal to its 'protected' directions: one of them is damaged, "
                "or of another checkpoint"
            )


def _plausible(basis: Tensor, columns: int, due: bool) -> bool:
    """Whether a basis (d x r) can have come about: orthonormal in as many columns as there is room for, else zero.

    One that is due may also be zero still, or what new protected directions have left of it.
    """
    gramian = basis.mT @ basis
    slack = orthonormality(basis.dtype)
    if due:
        return not gramian.numel() or float(torch.linalg.eigvalsh(gramian)[-1]) <= 1 + slack
    there = gramian.diagonal() != 0
    return int(there.sum()) == columns and float((gramian - there.diag().to(gramian)).abs().amax()) <= slack
