"""Steps that a base optimizer has taken, and whether two of them are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Run:
    """Steps, where the matrix was before each, and what the optimizer was left with."""

    steps: list[Tensor]
    positions: list[Tensor]
    kept: list[Any]
    counters: frozenset[str]
    failed: bool  # it raised after it had moved the matrix

    @property
    def moved(self) -> bool:
        return any(bool(step.any()) for step in self.steps)


def alike(one: Run, other: Run) -> bool:
    return all(
        close(a, b, torch.stack([p.abs().max(), q.abs().max()]))
        for a, b, p, q in zip(one.steps, other.steps, one.positions, other.positions, strict=True)
    )


def finite(*runs: Run) -> bool:
    return all(bool(step.isfinite().all()) for run in runs for step in run.steps)


def close(a: Tensor, b: Tensor, places: Tensor | None = None, tolerance: float = 1e-6) -> bool:
    """Equal, within what rounding at these places does."""
    if torch.equal(a, b) or not b.numel():
        return True
    rounding = 0.0 if places is None else 8 * torch.finfo(places.dtype).eps * float(places.abs().max())
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    size = max(float(a.abs().max()), float(b.abs().max()))
    different = (a - b).abs() > tolerance * size + rounding
    return not bool((different | (a.isnan() != b.isnan())).any())


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
