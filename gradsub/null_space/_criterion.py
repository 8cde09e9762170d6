from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Criterion:
    """How many eigenvectors of a covariance are protected.

    Exactly one of ``energy`` and ``threshold`` decides, ``max_rank`` caps it; ``max_rank`` alone protects that many.
    """

    energy: float | None = None
    threshold: float | None = None
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if self.energy is not None and self.threshold is not None:
            raise ValueError(
                f"energy={self.energy} and threshold={self.threshold} exclude each other: pass one of them"
            )
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ValueError(f"energy={self.energy} must lie in (0, 1]: it is a share of the features' mean square")
        if self.threshold is not None and not self.threshold > 0.0:
            raise ValueError(f"threshold={self.threshold} must be positive: it is an absolute eigenvalue")
        if self.max_rank is not None and self.max_rank < 1:
            raise ValueError(f"max_rank={self.max_rank} must be at least 1, or None for no cap")

    def count(self, eigenvalues: Tensor) -> int:
        """The number of leading eigenvalues (sorted, largest first) to protect."""
        largest = eigenvalues[0]
        # Beyond the numerical rank an eigenvector is rounding noise: protecting it would only cost capacity.
        floor = largest * eigenvalues.shape[0] * torch.finfo(eigenvalues.dtype).eps
        numerical_rank = int((eigenvalues > floor).sum())
        if self.threshold is not None:
            chosen = int((eigenvalues >= self.threshold).sum())
        elif self.energy is not None and self.energy < 1.0:
            kept = eigenvalues.cumsum(0)
            chosen = int((kept < self.energy * kept[-1]).sum()) + 1
        else:
            chosen = numerical_rank
        chosen = min(chosen, numerical_rank)
        return chosen if self.max_rank is None else min(chosen, self.max_rank)
