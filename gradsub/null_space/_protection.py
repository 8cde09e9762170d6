from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradsub.null_space._criterion import Criterion
from gradsub.null_space._statistics import Spectrum


@dataclass(frozen=True)
class Protection:
    """What a layer's statistics come to under a criterion.

    Attributes:
        basis: K (d x k).
        eigenvalues: (d,), zero beyond what is held.
        energy: the share of tr(C) in [0, 1] that K holds, a lower bound where the spectrum is approximate.
        missed: what K falls short of, in words, or None.
    """

    basis: Tensor
    eigenvalues: Tensor
    energy: float
    missed: str | None


def protect(spectrum: Spectrum, criterion: Criterion) -> Protection:
    """The leading eigenvectors that ``criterion`` asks for."""
    count = criterion.count(spectrum)
    held = float(spectrum.eigenvalues[:count].sum())
    eigenvalues = spectrum.eigenvalues.new_zeros(spectrum.vectors.shape[0])
    eigenvalues[: spectrum.eigenvalues.shape[0]] = spectrum.eigenvalues
    return Protection(
        basis=spectrum.vectors[:, :count].contiguous(),
        eigenvalues=eigenvalues,
        energy=held / spectrum.energy if spectrum.energy else 1.0,
        missed=criterion.missed(spectrum),
    )
