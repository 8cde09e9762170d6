from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """float64 wherever the device has it.

    A covariance squares the condition number of the features, so float32 sums lose every direction below 3e-4 of the
    largest one.
    """
    return torch.float32 if device.type == "mps" else torch.float64


class Covariance:
    """The exact uncentred second moment of a stream of features.

    C = (1 / N) sum_i x_i x_i^T, kept as the sum and the count, so batches may come in any order and two accumulators
    merge by addition.
    """

    def __init__(self, total: Tensor, count: int) -> None:
        self.total = total
        self.count = count

    @classmethod
    def empty(cls, dimension: int, device: torch.device) -> Covariance:
        return cls(torch.zeros(dimension, dimension, dtype=accumulation_dtype(device), device=device), 0)

    @property
    def dimension(self) -> int:
        return self.total.shape[0]

    def add(self, gram: Tensor, count: int) -> None:
        """Add the features' Gram matrix X^T X (d x d) of ``count`` rows."""
        self.total += gram.to(self.total)
        self.count += count

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (d,), largest first and never negative, and eigenvectors as the columns of (d, d)."""
        values, vectors = torch.linalg.eigh(self.total / max(self.count, 1))
        return values.flip(0).clamp_min(0.0), vectors.flip(1)


def gram(features: Tensor) -> Tensor:
    """X^T X of features X (N x d), in the accumulation dtype."""
    wide = features.to(accumulation_dtype(features.device))
    return wide.T @ wide
