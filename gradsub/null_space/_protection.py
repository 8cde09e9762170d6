from __future__ import annotations

from dataclasses import dataclass

import torch
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


def extend(spectrum: Spectrum, criterion: Criterion, kept: Tensor) -> Tensor:
    """K (d x k') that keeps every direction of ``kept`` (d x k) and adds the fewest that satisfy ``criterion``.

    The leading eigenvectors of what ``kept`` leaves of the covariance, (I - K K^T) C (I - K K^T), are added.
    """
    K = kept.to(spectrum.vectors.dtype)
    roots = spectrum.vectors * spectrum.eigenvalues.sqrt()
    left = roots - K @ (K.mT @ roots)
    vectors, values, _ = torch.linalg.svd(left, full_matrices=False)
    held = float(spectrum.eigenvalues.sum() - values.square().sum())
    # What a float32 basis leaves of a direction that it holds is no direction of its own.
    resolution = max(spectrum.resolution, K.shape[0] * torch.finfo(torch.float32).eps ** 2)
    count = criterion.count_beyond(values.square(), held, spectrum, resolution, K.shape[1])
    added = vectors[:, :count]
    added = torch.linalg.qr(added - K @ (K.mT @ added)).Q if count else added
    return torch.cat([K, added], dim=1)
