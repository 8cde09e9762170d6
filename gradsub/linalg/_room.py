"""Where columns have to stay: outside of some directions, and inside of the span of others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._arithmetic import full_precision, product, widen


@dataclass(frozen=True)
class Room:
    """The span of ``within``, or the whole space, without what ``against`` spans of it.

    Inside of a span all is computed in the coordinates of its columns, which are fewer than the directions: two
    products with them, on the way in and out, take the place of two for every projection.

    Attributes:
        against: (..., f, k), orthonormal columns, or zero ones, in coordinates; None: there are none.
        within: (..., d, f), orthonormal columns, or zero ones; None: the whole space, whose coordinates (f = d) are
            the directions themselves.
    """

    against: Tensor | None = None
    within: Tensor | None = None

    @property
    def columns(self) -> int:
        """How many columns of orthonormal ones it is given by."""
        return sum(0 if part is None else part.shape[-1] for part in (self.against, self.within))

    @property
    def narrow(self) -> bool:
        """Whether it is less than the whole space."""
        return self.within is not None or (self.against is not None and self.against.shape[-1] > 0)

    def enter(self, X: Tensor) -> Tensor:
        """The coordinates (..., f, c) of X (..., d, c), as far as it lies in the span."""
        return X if self.within is None else product(self.within.mT, X)

    def leave(self, X: Tensor) -> Tensor:
        """X (..., d, c) from its coordinates (..., f, c)."""
        return X if self.within is None else product(self.within, X)

    def without(self, directions: Tensor) -> Room:
        """The room that further orthonormal columns (..., d, j), which lie in it, leave."""
        with full_precision(directions.device):
            directions = self.enter(directions)
        return replace(
            self, against=directions if self.against is None else torch.cat([self.against, directions], dim=-1)
        )

    def project(self, X: Tensor) -> Tensor:
        """The part of X, in coordinates (..., f, c), in the room."""
        return X if self.against is None else X - product(self.against, product(self.against.mT, X))

    def widened(self, dtype: torch.dtype) -> Room:
        """In float32 at least, and in ``dtype`` if that is wider."""
        parts = (None if part is None else widen(part) for part in (self.against, self.within))
        return Room(*(None if part is None else part.to(torch.promote_types(part.dtype, dtype)) for part in parts))
