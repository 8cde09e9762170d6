from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsub.null_space._statistics import Spectrum, Statistics, accumulation_dtype


class Covariance:
    """The exact statistics: X^T X as one d x d sum in the accumulation dtype, so accumulators merge by addition."""

    kind = "exact"
    error = 0.0

    def __init__(self, total: Tensor, count: int) -> None:
        self.total = total
        self.count = count

    @classmethod
    def empty(cls, dimension: int, device: torch.device) -> Covariance:
        return cls(torch.zeros(dimension, dimension, dtype=accumulation_dtype(device), device=device), 0)

    @classmethod
    def restore(cls, tensor: Tensor, state: dict[str, Any]) -> Covariance:
        _check_moment(tensor)
        if state["count"] == 0 and bool(tensor.any()):
            raise ValueError("their sum is not zero, but no features were counted")
        return cls(tensor, state["count"])

    @property
    def dimension(self) -> int:
        return self.total.shape[0]

    @property
    def nbytes(self) -> int:
        return self.total.nbytes

    @property
    def tensor(self) -> Tensor:
        return self.total

    def add(self, rows: Tensor) -> None:
        wide = rows.to(self.total.dtype)
        self.total += (wide.mT @ wide).to(self.total.device)
        self.count += rows.shape[0]

    def merge(self, other: Statistics) -> None:
        assert isinstance(other, Covariance)
        self.total += other.total.to(self.total)
        self.count += other.count

    def copy(self) -> Covariance:
        return Covariance(self.total.clone(), self.count)

    def spectrum(self) -> Spectrum:
        values, vectors = torch.linalg.eigh(self.total / max(self.count, 1))
        values = values.flip(0).clamp_min(0.0)
        resolution = self.dimension * torch.finfo(values.dtype).eps
        return Spectrum(values, vectors.flip(1), float(values.sum()), 0.0, resolution)

    def energy(self, basis: Tensor | None = None) -> float:
        if basis is None:
            return float(self.total.trace()) / max(self.count, 1)
        K = basis.to(self.total)
        return float((K * (self.total @ K)).sum()) / max(self.count, 1)

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "count": self.count}


def _check_moment(total: Tensor) -> None:
    """Raise a ValueError unless the matrix is symmetric and nonnegative but for rounding, as every X^T X is."""
    if total.shape[0] != total.shape[1]:
        raise ValueError(f"a covariance is square, found {tuple(total.shape)}")
    largest = total.abs().max()
    scaled = total / torch.where(largest > 0, largest, 1.0)  # sums of huge or tiny entries would leave the range
    tolerance = torch.finfo(total.dtype).eps ** 0.5
    if bool((scaled - scaled.mT).abs().max() > tolerance):
        raise ValueError("a covariance is symmetric, this matrix is not")
    # Cholesky costs a small part of the eigendecomposition that follows; it fails where an eigenvalue is negative.
    shift = tolerance * scaled.trace().clamp_min(tolerance)
    raised = scaled + shift * torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
    if bool(torch.linalg.cholesky_ex(raised.cpu() if raised.device.type == "mps" else raised).info):
        raise ValueError("a covariance has no negative eigenvalue, this matrix has")
