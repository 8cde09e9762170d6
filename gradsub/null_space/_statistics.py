from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """What is known of the leading eigenpairs of a covariance C (d x d), in squared feature units.

    Attributes:
        eigenvalues: (p,), largest first, never negative; the j-th is at most the j-th of C.
        vectors: (d, p), orthonormal columns.
        energy: tr(C), the features' mean square, exact also where the eigenvalues are not.
        error: bound of ||C - vectors diag(eigenvalues) vectors^T||_2; 0 where nothing was given up.
        resolution: eigenvalues below this share of the largest are rounding noise.
        paired: whether the vectors are in the order of the eigenvalues.
    """

    eigenvalues: Tensor
    vectors: Tensor
    energy: float
    error: float
    resolution: float
    paired: bool = True


class Statistics(Protocol):
    """The uncentred second moment C = (1 / N) sum_i x_i x_i^T of a stream of features, exact or approximate.

    Rows may come in any order and in any division into batches. `restore` undoes `tensor` and `state`.

    They are summed in the `widest` format: a covariance squares the condition number of the features, so float32 sums
    lose every direction below 3e-4 of the largest one; float64 sums lose those below 1e-8.
    """

    count: int

    @property
    def kind(self) -> str:
        """What `load` and the table call this implementation."""

    @property
    def dimension(self) -> int:
        """The features' width d."""

    @property
    def error(self) -> float:
        """Bound of the spectral error of C, in squared feature units."""

    @property
    def nbytes(self) -> int:
        """Memory held between calls, in bytes."""

    @property
    def tensor(self) -> Tensor:
        """All there is to save beside `state`; made when it is asked for."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of `tensor`."""

    @property
    def dtype(self) -> torch.dtype:
        """Of `tensor`."""

    def add(self, rows: Tensor) -> None:
        """Take in features (N x d)."""

    def merge(self, other: Statistics) -> None:
        """Take in what another accumulator of the same kind and dimension has seen; ``other`` stays as it is."""

    def copy(self) -> Statistics:
        """An accumulator of its own with the same content."""

    def spectrum(self, quick: bool = False) -> Spectrum:
        """The eigenpairs of C that are held.

        Args:
            quick: float32 vectors will do, and eigenvalues that are off by 1e-6 of the largest one.
        """

    def energy(self, basis: Tensor | None = None) -> float:
        """tr(C), or tr(K^T C K) for orthonormal columns K; of a sketch the latter is a lower bound."""

    def state(self) -> dict[str, Any]:
        """Plain numbers and strings for a file's header, among them ``kind``."""
