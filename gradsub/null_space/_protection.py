from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import full_precision
from gradsub.linalg._orthonormal import complement_of
from gradsub.null_space._criterion import Criterion
from gradsub.null_space._statistics import Spectrum, Statistics

_WEAKEST_QUICK = 2.0**-16  # of the largest eigenvalue; float32 vectors and values are off by about 2^-20 of it


@dataclass
class Protection:
    """What a layer's statistics come to under a criterion: the protected directions K (d x k) in their smaller form.

    Attributes:
        held: K where k <= d / 2, else its orthonormal complement (d x (d - k)).
        count: k.
        eigenvalues: (d,), zero beyond what is held.
        energy: the share of tr(C) in [0, 1] that K holds, a lower bound where the spectrum is approximate.
        missed: what K falls short of, in words, or None.
    """

    held: Tensor
    count: int
    eigenvalues: Tensor
    energy: float
    missed: str | None = None
    _given: dict[torch.dtype, weakref.ref[Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def dimension(self) -> int:
        return self.held.shape[0]

    @property
    def complementary(self) -> bool:
        return 2 * self.count > self.dimension

    def basis(self, dtype: torch.dtype) -> Tensor | None:
        """K, if it is held or somebody still has what was given to `give`."""
        if not self.complementary:
            return self.held.to(dtype)
        given = self._given.get(dtype)
        return None if given is None else given()

    def give(self, basis: Tensor) -> Tensor:
        """Remember K as long as others do, so that layers that share it get one tensor; itself."""
        self._given[basis.dtype] = weakref.ref(basis)
        return basis

    def complement(self) -> Tensor:
        """Orthonormal columns (d x (d - k)) that span what K leaves."""
        return self.held if self.complementary else complement_of(self.held)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_given": {}}  # copies and pickles hold no references into this one's users


def protect(statistics: Statistics, criterion: Criterion) -> tuple[Protection, Spectrum]:
    """The leading eigenvectors that ``criterion`` asks for, and the spectrum they were taken from."""
    spectrum = statistics.spectrum(quick=True)
    count = criterion.count(spectrum)
    if _too_weak(spectrum, count):
        spectrum = statistics.spectrum()
        count = criterion.count(spectrum)
    values, vectors = spectrum.eigenvalues, spectrum.vectors
    dimension, known = vectors.shape
    if 2 * count <= dimension:
        held = leading(spectrum, count)
    else:
        held = _polished(vectors[:, count:]) if known == dimension else complement_of(leading(spectrum, count))
    eigenvalues = values.new_zeros(dimension)
    eigenvalues[:known] = values
    # Rounding of the sums may make the part larger than the whole.
    part = min(float(values[:count].sum()), spectrum.energy)
    return Protection(
        held=held,
        count=count,
        eigenvalues=eigenvalues,
        energy=part / spectrum.energy if spectrum.energy else 1.0,
        missed=criterion.missed(spectrum),
    ), spectrum


def leading(spectrum: Spectrum, count: int) -> Tensor:
    """The first ``count`` eigenvectors, strongest first."""
    return _polished(spectrum.vectors[:, :count])


def _too_weak(spectrum: Spectrum, count: int) -> bool:
    values = spectrum.eigenvalues
    narrow = spectrum.vectors.dtype != values.dtype
    return narrow and count > 0 and float(values[count - 1]) < _WEAKEST_QUICK * float(values[0])


def _polished(vectors: Tensor) -> Tensor:
    """A copy of its own; float32 eigenvectors, orthonormal to 1e-5 only, are made so to the rounding of float32."""
    if vectors.dtype == torch.float64:
        # Not contiguous(): of a single column it keeps the stride, and products round otherwise than those of a copy.
        return vectors.clone(memory_format=torch.contiguous_format)
    with full_precision(vectors.device):
        excess = vectors.mT @ vectors
        excess.diagonal().sub_(1.0)
        return torch.addmm(vectors, vectors, excess, alpha=-0.5)


# Of a direction's square: what K leaves of one that it holds, both rounded to float32, is less by far.
_LEFT: Final = 1e-6


def extend(spectrum: Spectrum, criterion: Criterion, kept: Tensor) -> Tensor:
    """K (d x k') that keeps every direction of ``kept`` (d x k) and adds the fewest that satisfy ``criterion``.

    The leading eigenvectors of what ``kept`` leaves of the covariance, (I - K K^T) C (I - K K^T), are added; where it
    is not known which eigenvalue is whose, all that it leaves of the eigenvectors.
    """
    # Statistics and what is protected may lie on two devices: collected on the GPU, kept in the host's memory.
    K = kept.to(spectrum.vectors.device, torch.promote_types(spectrum.vectors.dtype, spectrum.eigenvalues.dtype))
    roots = spectrum.vectors * spectrum.eigenvalues.sqrt() if spectrum.paired else spectrum.vectors
    left = roots - K @ (K.mT @ roots)
    vectors, values, _ = torch.linalg.svd(left, full_matrices=False)
    held = float(spectrum.eigenvalues.sum() - values.square().sum())
    if not spectrum.paired:
        return _with(K, vectors[:, : int((values.square() > _LEFT).sum())])
    # What a float32 basis leaves of a direction that it holds is no direction of its own.
    resolution = max(spectrum.resolution, K.shape[0] * torch.finfo(torch.float32).eps ** 2)
    count = criterion.count_beyond(values.square(), held, spectrum, resolution, K.shape[1])
    return _with(K, vectors[:, :count])


def _with(K: Tensor, added: Tensor) -> Tensor:
    """K and further directions (d x j), which lie outside of it up to rounding."""
    added = torch.linalg.qr(added - K @ (K.mT @ added)).Q if added.shape[1] else added
    return torch.cat([K, added], dim=1)
