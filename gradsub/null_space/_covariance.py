from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import full_precision, largest_magnitude, widest
from gradsub.null_space._statistics import Spectrum, Statistics

NARROWEST_SINGLE = 256
"""Narrower features cost nothing noticeable in float64."""

_ROWS = 1024  # of one float32 product; the sums of products are float64, so that errors do not grow with the tokens
_COLUMNS = 192  # of one block of products; narrower ones are slow on a CPU


class Covariance:
    """The exact statistics: X^T X as one sum in the widest format, so accumulators merge by addition.

    X^T X is symmetric: only blocks of its rows from the diagonal on are kept, .53 of the numbers where d is large,
    .67 where it is 576. The whole is made when it is asked for.

    Args:
        blocks: those of `_ranges`: rows ``start`` to ``stop``, columns from ``start`` on.
        count: the rows of X.
        single: whether products of at most 1,024 float32 rows and eigenvectors are computed in float32. The products
            differ from those of float64 by about 1e-7 of sqrt(C_ii C_jj) each.
    """

    kind = "exact"
    error = 0.0

    def __init__(self, blocks: list[Tensor], count: int, single: bool = False) -> None:
        self.blocks = blocks
        self.count = count
        self.single = single

    @classmethod
    def empty(
        cls, dimension: int, device: torch.device, single: bool = False, dtype: torch.dtype | None = None
    ) -> Covariance:
        dtype = widest(device) if dtype is None else dtype
        blocks = [
            torch.zeros(stop - start, dimension - start, dtype=dtype, device=device)
            for start, stop in _ranges(dimension)
        ]
        return cls(blocks, 0, single)

    @classmethod
    def restore(cls, tensor: Tensor, state: dict[str, Any]) -> Covariance:
        _check_moment(tensor)
        if state["count"] == 0 and bool(tensor.any()):
            raise ValueError("their sum is not zero, but no features were counted")
        single = state.get("single", False)  # earlier files say nothing: theirs is float64
        if type(single) is not bool:
            raise ValueError(f"single={single!r} is neither true nor false")
        # Views: a mapped file stays where it is until something is added.
        return cls([tensor[start:stop, start:] for start, stop in _ranges(len(tensor))], state["count"], single)

    @property
    def dimension(self) -> int:
        return self.blocks[0].shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.dimension, self.dimension

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    @property
    def tensor(self) -> Tensor:
        """X^T X (d x d), a copy."""
        total = self.blocks[0].new_empty(self.shape)
        for (start, stop), block in self._ranged():
            total[start:stop, start:] = block
            total[stop:, start:stop] = block[:, stop - start :].mT
        return total

    def add(self, rows: Tensor) -> None:
        if not self.single or rows.dtype == torch.float64:
            self._add(rows.to(self.dtype))
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
        rows = rows.to(self.blocks[0].device)
        for (start, stop), block in self._ranged():
            block.add_(rows[:, start:stop].mT @ rows[:, start:], alpha=scale)

    def _ranged(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        return zip(_ranges(self.dimension), self.blocks, strict=True)

    def merge(self, other: Statistics) -> None:
        assert isinstance(other, Covariance)
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            mine.add_(theirs.to(mine))
        self.count += other.count

    def copy(self) -> Covariance:
        return Covariance([block.clone() for block in self.blocks], self.count, self.single)

    def spectrum(self, quick: bool = False) -> Spectrum:
        with full_precision(self.blocks[0].device):
            return self._spectrum(quick)

    def _spectrum(self, quick: bool) -> Spectrum:
        dtype = torch.float32 if quick and self.single else self.dtype
        energy = self.energy()
        resolution = self.dimension * torch.finfo(self.dtype).eps
        if self.dimension >= NARROWEST_SINGLE and 0 < self.count <= self.dimension // 4:
            values, vectors = self._of_few_rows()
        else:
            # Divided by the trace, because float32 has no room for squares of huge or tiny features.
            unit = max(self.count, 1) * (energy or 1.0)
            scaled = self.blocks[0].new_zeros(self.shape, dtype=dtype)
            for (start, stop), block in self._ranged():
                scaled[start:stop, start:] = block / unit
            values, vectors = torch.linalg.eigh(scaled.mT)  # reads the lower half, which is whole there
            values = values.to(self.dtype) * (energy or 1.0)
        values = values.flip(0).clamp_min(0.0)
        return Spectrum(values, vectors.flip(1), energy, 0.0, resolution)

    def _of_few_rows(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors inside the range of a sum of few outer products, from an N x N matrix."""
        C = self.tensor.div_(max(self.count, 1))
        generator = torch.Generator(device="cpu").manual_seed(0)
        start = torch.randn(self.dimension, self.count, dtype=C.dtype, device="cpu", generator=generator).to(C.device)
        # The second pass makes columns orthonormal in directions that are weak beside the first ones.
        Q = torch.linalg.qr(C @ torch.linalg.qr(C @ start).Q).Q
        values, vectors = torch.linalg.eigh(Q.mT @ C @ Q)
        return values, Q @ vectors

    def energy(self, basis: Tensor | None = None) -> float:
        if basis is None:
            parts = [block.diagonal().sum() for block in self.blocks]
        else:
            # tr(K^T C K): each block beside the diagonal stands for its mirror image, too.
            K, parts = basis.to(self.blocks[0]), []
            for (start, stop), block in self._ranged():
                parts.append((K[start:stop] * (block[:, : stop - start] @ K[start:stop])).sum())
                parts.append(2.0 * (K[start:stop] * (block[:, stop - start :] @ K[stop:])).sum())
        return float(torch.stack(parts).sum()) / max(self.count, 1)

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "count": self.count, "single": self.single}


def _ranges(dimension: int) -> list[tuple[int, int]]:
    """The first row of every block, and the one behind its last."""
    width = max(_COLUMNS, dimension // 16)
    return [(start, min(start + width, dimension)) for start in range(0, dimension, width)]


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
