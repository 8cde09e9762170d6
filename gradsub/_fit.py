"""Whether a null space fits the model: collected on these weights, and on enough tokens."""

from __future__ import annotations

import warnings

from gradsub.layers import some
from gradsub.null_space import NullSpace
from gradsub.subspace import Layer

# Shares by which protected parts of weights may differ: rounding to bfloat16 makes 0.002, 8-bit codes 0.01, another
# model's weights about 1.4.
_OTHER_WEIGHTS = 0.1
# Tokens for each protected direction below which fresh text is left at least half as much again unprotected.
_FEW = 5
# Of the features' mean square that is left of fresh tokens beyond what is left of these: less is no loss to speak of.
_MATTERS = 0.01
_NAMED = 4


class Fit:
    """Looks at layers and what a null space holds of them, and says what does not fit.

    The share of the mean square that k directions of d leave unprotected, u on the N tokens that they were taken from,
    is at least about u (1 + k / N) / (1 - k / N) on others: k / N is the mean leverage of a token, the part of what is
    protected that is there for its sake. Of independent Gaussian features with spectra 1 / i^a, a from 0.5 to 2, fresh
    ones were found 1 to 2.5 times that.
    """

    def __init__(self, null_space: NullSpace | None) -> None:
        self._null_space = null_space
        self._other: dict[str, float] = {}
        self._few: dict[str, str] = {}

    def look(self, layer: Layer, names: list[str]) -> None:
        """Compare a layer with what was collected under these names."""
        null_space, protected = self._null_space, layer.protected
        if null_space is None or protected is None:
            return
        for name in names:
            if name not in null_space.fitted_on:
                continue  # nobody knows the weights, or the directions were given by hand
            distance = null_space.fitted_on.distance(
                name, layer.parameter, layer.axis, protected.directions, protected.complement
            )
            if distance is not None and distance > _OTHER_WEIGHTS:
                self._other[name] = distance
            self._look_at_tokens(null_space, name)

    def _look_at_tokens(self, null_space: NullSpace, name: str) -> None:
        tokens, found = null_space.tokens(name), null_space._protection(name)
        left = 1.0 - found.energy
        if not 0 < found.count < found.dimension or tokens >= _FEW * found.count:
            return
        leverage = found.count / tokens
        expected = min(1.0, left * (1 + leverage) / (1 - leverage)) if leverage < 1 else 1.0
        if expected - left > _MATTERS:
            fresh = "all" if leverage >= 1 else f"at least {expected:.1%}"
            self._few[name] = (
                f"{name} ({found.count} of {found.dimension} directions from {tokens} tokens, of which it leaves "
                f"{left:.1%} unprotected, and of fresh ones perhaps {fresh})"
            )

    def say(self, stacklevel: int) -> None:
        """Warn of what was found since the last call."""
        if self._other:
            far = sorted(self._other.items(), key=lambda item: -item[1])
            listed = some([f"{name} by {distance:.0%}" for name, distance in far], _NAMED)
            warnings.warn(
                "null_space was collected on other weights than the model has: what the weights do with the protected "
                f"directions differs, of {listed}. It may protect what this model does not use: collect it on this one",
                UserWarning,
                stacklevel=stacklevel + 1,
            )
        if self._few:
            warnings.warn(
                f"null_space was collected on few tokens for what it protects: {some(list(self._few.values()), _NAMED)}"
                f". Collect more, at least {_FEW} for each protected direction; NullSpace.residual_energy measures "
                "on held-out text whether they are enough",
                UserWarning,
                stacklevel=stacklevel + 1,
            )
        self._other.clear()
        self._few.clear()
