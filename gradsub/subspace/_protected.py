from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsub.linalg._orthonormal import complement_of


@dataclass(frozen=True, eq=False)
class Protected:
    """The directions K (d x k) that no update of a layer may touch, in the smaller form: K, or all that K leaves.

    Attributes:
        directions: K where at most half of the directions are protected, else an orthonormal basis F (d x (d - k)) of
            K's complement: I - K K^T = F F^T. It may lie in the memory of the host, since only refreshes need it.
        complement: whether it is F.
    """

    directions: Tensor
    complement: bool = False

    @property
    def free(self) -> int:
        """d - k: the dimension of the null space."""
        dimension, count = self.directions.shape
        return count if self.complement else dimension - count

    def to(self, device: torch.device) -> Protected:
        """The same there; a copy that lasts as long as its holder, unless it lies there."""
        return Protected(self.directions.to(device, non_blocking=True), self.complement)

    def leaves(self, X: Tensor) -> Tensor:
        """(I - K K^T) X for X (d x c)."""
        inside = self.directions @ (self.directions.mT @ X)
        return inside if self.complement else X - inside

    def whole(self) -> Tensor:
        """K (d x k)."""
        return complement_of(self.directions) if self.complement else self.directions

    def smaller(self) -> Protected:
        """In the smaller form."""
        dimension, count = self.directions.shape
        if 2 * count <= dimension + self.complement:
            return self
        return Protected(complement_of(self.directions), not self.complement)


def side_by_side(several: Sequence[Protected | None], like: Tensor) -> Protected | None:
    """What several layers protect, of one form, as one stack (l x d x k) with zero columns where there is less.

    Args:
        several: one a layer; None protects nothing, and goes with those that hold K.
        like: of the device, the dtype and the length d of the result (... x d x any).
    """
    complement = any(each is not None and each.complement for each in several)
    most = max(0 if each is None else each.directions.shape[1] for each in several)
    if not most and not complement:
        return None
    most = max(most, 1)  # where nothing at all is left, a column of zeros says so
    stacked = like.new_zeros(len(several), like.shape[-2], most)
    there = [
        (place, each.directions) for place, each in zip(stacked.unbind(), several, strict=True) if each is not None
    ]
    torch._foreach_copy_(
        [place if directions.shape[1] == most else place[:, : directions.shape[1]] for place, directions in there],
        [directions for _, directions in there],
        non_blocking=True,
    )
    return Protected(stacked, complement)
