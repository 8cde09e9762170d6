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
