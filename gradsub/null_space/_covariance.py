from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import full_precision, largest_magnitude
from gradsub.null_space._statistics import Spectrum, Statistics, accumulation_dtype

NARROWEST_SINGLE = 256
"""Narrower features cost nothing noticeable in float64."""

_ROWS = 1024  # of one float32 product; the sums of products are float64, so that errors do not grow with the tokens
_COLUMNS = 192  # of one block of products; narrower ones are slow on a CPU


class Covariance:
    """The exact statistics: X^T X as one d x d sum in the accumulation dtype, so accumulators merge by addition.

    Only blocks on and above the diagonal are computed; the others are their mirror image, made when they are asked for.

    Args:
        total: X^T X (d x d).
        count: the rows of X.
        single: whether products of at most 1,024 float32 rows and eigenvectors are computed in float32. The products
            differ from those of float64 by about 1e-7 of sqrt(C_ii C_jj) each.
    """

    kind = "exact"
    error = 0.0

    def __init__(self, total: Tensor, count: int, single: bool = False) -> None:
        self._total = total
        self._whole = True
        self.count = count
        self.single = single

    @classmethod
    def empty(cls, dimension: int, device: torch.device, single: bool = False) -> Covariance:
        total = torch.zeros(dimension, dimension, dtype=accumulation_dtype(device), device=device)
        return cls(total, 0, single)

    @classmethod
    def restore(cls, tensor: Tensor, state: dict[str, Any]) -> Covariance:
        _check_moment(tensor)
        if state["count"] == 0 and bool(tensor.any()):
            raise ValueError("their sum is not zero, but no features were counted")
        single = state.get("single", False)  # earlier files say nothing: theirs is float64
        if type(single) is not bool:
            raise ValueError(f"single={single!r} is neither true nor false")
        return cls(tensor, state["count"], single)

    @property
    def dimension(self) -> int:
        return self._total.shape[0]

    @property
    def nbytes(self) -> int:
        return self._total.nbytes

    @property
    def total(self) -> Tensor:
        if not self._whole:
            for start, stop in self._blocks():
                self._total[stop:, start:stop] = self._total[start:stop, stop:].mT
            self._whole = True
        return self._total

    @property
    def tensor(self) -> Tensor:
        return self.total

    def add(self, rows: Tensor) -> None:
        if not self.single or rows.dtype == torch.float64:
            self._add(rows.to(self._total.dtype))
        else:
            # float32 products under autocast or TF32 would be wrong by 1e-3.
            with full_precision(rows.device):
                for part in torch.split(rows, _ROWS):
                    self._add_single(part.float())
        self.count += rows.shape[0]

    def _add_single(self, rows: Tensor) -> None:
        largest = float(largest_magnitude(rows))
        if largest == 0.0 or 2.0**-30 < largest < 2.0**30:
            self._add(rows)
        else:  # their squares would leave the range of float32
            self._add(rows / largest, largest**2)

    def _add(self, rows: Tensor, scale: float = 1.0) -> None:
        rows = rows.to(self._total.device)
        self._whole = False
        for start, stop in self._blocks():
            self._total[start:stop, start:].add_(rows[:, start:stop].mT @ rows[:, start:], alpha=scale)

    def _blocks(self) -> list[tuple[int, int]]:
        width = max(_COLUMNS, self.dimension // 16)
        return [(start, min(start + width, self.dimension)) for start in range(0, self.dimension, width)]

    def merge(self, other: Statistics) -> None:
        assert isinstance(other, Covariance)
        self._total = self.total.add_(other.total.to(self._total))
        self.count += other.count

    def copy(self) -> Covariance:
        return Covariance(self.total.clone(), self.count, self.single)

    def spectrum(self, quick: bool = False) -> Spectrum:
        with full_precision(self._total.device):
            return self._spectrum(quick)

    def _spectrum(self, quick: bool) -> Spectrum:
        dtype = torch.float32 if quick and self.single else self._total.dtype
        energy = float(self._total.trace()) / max(self.count, 1)
        resolution = self.dimension * torch.finfo(self._total.dtype).eps
        if self.dimension >= NARROWEST_SINGLE and 0 < self.count <= self.dimension // 4:
            values, vectors = self._of_few_rows()
        else:
            # Divided by the trace, because float32 has no room for squares of huge or tiny features.
            unit = max(self.count, 1) * (energy or 1.0)
            scaled = torch.empty_like(self._total, dtype=dtype)
            for start, stop in self._blocks():
                scaled[start:stop] = self._total[start:stop] / unit
            values, vectors = torch.linalg.eigh(scaled.mT)  # reads the lower half, which is whole there
            values = values.to(self._total.dtype) * (energy or 1.0)
        values = values.flip(0).clamp_min(0.0)
        return Spectrum(values, vectors.flip(1), energy, 0.0, resolution)

    def _of_few_rows(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors inside the range of a sum of few outer products, from an N x N matrix."""
        C = self.total / max(self.count, 1)
        generator = torch.Generator(device="cpu").manual_seed(0)
        start = torch.randn(self.dimension, self.count, dtype=C.dtype, device="cpu", generator=generator).to(C.device)
        # The second pass makes columns orthonormal in directions that are weak beside the first ones.
        Q = torch.linalg.qr(C @ torch.linalg.qr(C @ start).Q).Q
        values, vectors = torch.linalg.eigh(Q.mT @ C @ Q)
        return values, Q @ vectors

    def energy(self, basis: Tensor | None = None) -> float:
        if basis is None:
            return float(self._total.trace()) / max(self.count, 1)
        K = basis.to(self._total)
        return float((K * (self.total @ K)).sum()) / max(self.count, 1)

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "count": self.count, "single": self.single}


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
