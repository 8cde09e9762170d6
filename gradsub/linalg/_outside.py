"""What columns have to stay out of: directions, and the complement of others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._arithmetic import product, widen


@dataclass(frozen=True)
class Outside:
    """The space orthogonal to ``against`` and, if given, within the span of ``within``, which contains ``against``.

    Attributes:
        against: (..., d, k), orthonormal columns, or zero ones; None: there are none.
        within: (..., d, f), orthonormal columns, or zero ones; None: the whole space.
    """

    against: Tensor | None = None
    within: Tensor | None = None

    @property
    def columns(self) -> int:
        """How many columns of orthonormal ones it is given by."""
        return sum(0 if part is None else part.shape[-1] for part in (self.against, self.within))

    def project(self, X: Tensor) -> Tensor:
        """The part of X (..., d, c) in the space."""
        if self.within is not None:
            X = product(self.within, product(self.within.mT, X))
        return X if self.against is None else X - product(self.against, product(self.against.mT, X))

    def widened(self, dtype: torch.dtype) -> Outside:
        """In float32 at least, and in ``dtype`` if that is wider."""
        parts = (None if part is None else widen(part) for part in (self.against, self.within))
        against, within = (None if p is None else p.to(torch.promote_types(p.dtype, dtype)) for p in parts)
        return Outside(against, within)


def outside_of(against: Tensor | Outside | None) -> Outside | None:
    """The space orthogonal to ``against``; None where that is the whole space."""
    if not isinstance(against, Outside):
        against = Outside(against)
    nothing = against.within is None and (against.against is None or against.against.shape[-1] == 0)
    return None if nothing else against
