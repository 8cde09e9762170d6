from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsFloat

from torch import Tensor

from gradsub._kinds import check_kind
from gradsub.null_space._statistics import Spectrum

_SURE_IN_SINGLE = 0.999


@dataclass(frozen=True)
class Criterion:
    """How many eigenvectors of a covariance are protected.

    Exactly one of ``energy`` and ``threshold`` decides, ``max_rank`` caps it; ``max_rank`` alone protects that many.
    Where the spectrum is approximate, the criterion errs towards protection: the energy is a share of the true one,
    and a direction whose eigenvalue may reach the threshold counts as reaching it.
    """

    energy: float | None = None
    threshold: float | None = None
    max_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("energy", "threshold"):
            value = getattr(self, name)
            if value is not None:
                check_kind(name, value, SupportsFloat, "a number, or None")
                object.__setattr__(self, name, float(value))  # numpy's numbers could not be written into a file
        if self.energy is not None and self.threshold is not None:
            raise ValueError(
                f"energy={self.energy} and threshold={self.threshold} exclude each other: pass one of them"
            )
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ValueError(f"energy={self.energy} must lie in (0, 1]: it is a share of the features' mean square")
        if self.threshold is not None and not self.threshold > 0.0:
            raise ValueError(f"threshold={self.threshold} must be positive: it is an absolute eigenvalue")
        if self.max_rank is not None and (type(self.max_rank) is not int or self.max_rank < 1):
            raise ValueError(f"max_rank={self.max_rank} must be an integer of at least 1, or None for no cap")

    @property
    def coarse(self) -> bool:
        """Whether float32 is precise enough: a share of at most .999 does not hang on what 1e-6 of the energy does."""
        return self.energy is not None and self.energy <= _SURE_IN_SINGLE

    def count(self, spectrum: Spectrum) -> int:
        """The number of leading eigenvectors to protect."""
        return self.count_beyond(spectrum.eigenvalues, 0.0, spectrum, spectrum.resolution, 0)

    def count_beyond(self, values: Tensor, held: float, spectrum: Spectrum, resolution: float, already: int) -> int:
        """How many more directions to protect beside ``already`` protected ones that hold the energy ``held``.

        Args:
            values: the eigenvalues of what those leave of the covariance, largest first.
            held: tr(K^T C K) of the protected directions K.
            spectrum: the covariance's own.
            resolution: values below this share of the largest eigenvalue are rounding noise.
            already: how many directions are protected.
        """
        # Beyond the numerical rank a direction is rounding noise: protecting it would only cost capacity.
        real = int((values > float(spectrum.eigenvalues[0]) * resolution).sum())
        if self.threshold is not None:
            chosen = int((values + spectrum.error >= self.threshold).sum())
        elif self.energy is not None and self.energy < 1.0:
            # A hair less than asked for, or rounding would add a direction to a basis that just satisfies it.
            wanted = self.energy * spectrum.energy * (1.0 - 1e-6 if already else 1.0) - held
            chosen = 0 if wanted <= 0.0 else int((values.cumsum(0) < wanted).sum()) + 1
        else:
            chosen = real
        chosen = min(chosen, real)
        return chosen if self.max_rank is None else max(0, min(chosen, self.max_rank - already))

    def missed(self, spectrum: Spectrum) -> str | None:
        """What the protected directions of an approximate spectrum fall short of; None where they satisfy it."""
        values, count = spectrum.eigenvalues, self.count(spectrum)
        exact = spectrum.error <= float(values[0]) * spectrum.resolution
        if exact or count == self.max_rank:
            return None
        if self.threshold is not None:
            reached, lack = spectrum.error < self.threshold, f"its error bound {spectrum.error:.3g} is no smaller"
            wanted = f"threshold={self.threshold}"
        elif self.energy is not None:
            held = float(values[:count].sum()) / spectrum.energy
            reached, lack, wanted = held >= self.energy, f"it holds {held:.4f}", f"energy={self.energy}"
        else:
            reached, lack, wanted = False, f"it holds {count} directions", f"max_rank={self.max_rank}"
        return None if reached else f"{wanted} ({lack})"
