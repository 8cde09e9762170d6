from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import full_precision
from gradsub.linalg._orthonormal import complement_of
from gradsub.null_space._protection import Protection
from gradsub.null_space._statistics import Spectrum, Statistics

_LOOSE = 5e-5  # for sums of standard normal numbers that orthonormal columns leave as they are; rounding is below 3e-6


class Directions:
    """What is left of statistics without the sums: the protected directions alone, in their smaller form.

    Features cannot be added any more.

    Args:
        protection: what the statistics came to.
        total: tr(C).
        count: the tokens seen.
        stored: `tensor`, where ``protection`` is a view of it, as in a mapped file.
    """

    kind = "directions"
    error = 0.0

    def __init__(self, protection: Protection, total: float, count: int, stored: Tensor | None = None) -> None:
        self.protection = protection
        self.count = count
        self.stored = stored
        self._total = total

    def moved(self, put: Callable[[Tensor], Tensor]) -> Directions:
        """The same as views of what ``put`` makes of `tensor`."""
        stored, mine = put(self.tensor), self.protection
        found = Protection(stored[1:].mT, mine.count, mine.eigenvalues.to(stored.device), mine.energy, mine.missed)
        return Directions(found, self._total, self.count, stored)

    @classmethod
    def restore(cls, tensor: Tensor, state: dict[str, Any]) -> Directions:
        count: Any = state.get("protected")
        total: Any = state.get("energy")
        share: Any = state.get("share")
        held = tensor[1:].mT
        if type(count) is not int or not 0 <= count <= tensor.shape[1]:
            raise ValueError(f"protected={count!r} of {tensor.shape[1]} directions")
        for key, value, most in (("energy", total, math.inf), ("share", share, 1.0 + 1e-6)):
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not (math.isfinite(value) and 0.0 <= value <= most)
            ):
                raise ValueError(f"{key}={value!r} must be a number that is not negative")
        if held.shape[1] != min(count, tensor.shape[1] - count):
            raise ValueError(f"{held.shape[1]} columns for {count} protected directions of {tensor.shape[1]}")
        _check_orthonormal(held)
        return cls(Protection(held, count, tensor[0].double(), float(share)), float(total), state["count"], tensor)

    @property
    def dimension(self) -> int:
        return self.protection.dimension

    @property
    def nbytes(self) -> int:
        return self.protection.held.nbytes

    @property
    def tensor(self) -> Tensor:
        """The eigenvalues in the first row, the columns that are held in the others."""
        if self.stored is not None:
            return self.stored
        held = self.protection.held
        # Squares of large features leave the range of the columns' float32: nothing is decided by how large they are.
        values = self.protection.eigenvalues.clamp_max(torch.finfo(held.dtype).max)
        return torch.cat([values[None].to(held), held.mT])

    @property
    def shape(self) -> tuple[int, int]:
        dimension, columns = self.protection.held.shape
        return 1 + columns, dimension

    @property
    def dtype(self) -> torch.dtype:
        return self.protection.held.dtype

    def add(self, rows: Tensor) -> None:
        raise ValueError(
            "this null space was saved without its statistics: it holds directions alone, and nothing can be added. "
            "Save it with statistics=True, or collect anew"
        )

    def merge(self, other: Statistics) -> None:
        raise ValueError("directions cannot be merged: save both null spaces with statistics=True")

    def copy(self) -> Directions:
        return self  # it never changes

    def spectrum(self, quick: bool = False) -> Spectrum:
        count, values = self.protection.count, self.protection.eigenvalues
        resolution = self.dimension * torch.finfo(torch.float32).eps
        paired = not self.protection.complementary
        return Spectrum(values[:count], self.basis().to(values.dtype), self._total, 0.0, resolution, paired)

    def basis(self) -> Tensor:
        """K; where the complement is held, in no order."""
        held = self.protection.held
        return complement_of(held) if self.protection.complementary else held

    def energy(self, basis: Tensor | None = None) -> float:
        if basis is None:
            return self._total
        raise ValueError("held_out holds directions alone: save it with statistics=True")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "stored": None}  # or pickles would hold the same numbers twice

    def state(self) -> dict[str, Any]:
        protection = self.protection
        return {
            "kind": self.kind,
            "count": self.count,
            "protected": protection.count,
            "energy": self._total,
            "share": protection.energy,
        }


def _check_orthonormal(held: Tensor) -> None:
    """Raise a ValueError unless the columns are orthonormal, seen from random combinations of them: one pass."""
    wide = held.to(torch.promote_types(held.dtype, torch.float32))
    generator = torch.Generator(device="cpu").manual_seed(0)
    numbers = torch.randn(held.shape[1], 4, dtype=torch.float32, device="cpu", generator=generator).to(wide)
    with full_precision(wide.device):
        left = wide.mT @ (wide @ numbers) - numbers
    if not bool((left.abs() <= _LOOSE).all()):
        raise ValueError("directions are orthonormal columns, these are not")
