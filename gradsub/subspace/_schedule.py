"""When a basis is due: all layers at once for exact decompositions, block after block for sketches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# One sketch only comes close to the exact decomposition of its batch; what a second batch adds makes the basis better
# for the batches that follow than that decomposition (measured in benchmarks/refresh).
SKETCHES_PER_REFRESH = 2

_GOLDEN = 0.6180339887498949


def next_multiple(step: int, gap: int) -> int:
    """The next multiple of ``gap`` after ``step``."""
    return (step // gap + 1) * gap


def own_place(gap: int, index: int) -> int:
    """A layer's own place within ``gap`` steps.

    Multiples of the golden ratio spread any number of layers evenly, also those that are added later.
    """
    return int(index * _GOLDEN % 1 * gap)


def next_place(step: int, gap: int, index: int) -> int:
    """The first step after ``step`` that is a layer's own place.

    Args:
        step: the layer's count of steps.
        gap: steps between two refreshes.
        index: of the layer.
    """
    return step + 1 + (own_place(gap, index) - step - 1) % gap


def sketch_size(rank: int, codimension: int) -> int:
    """How many directions a sketch looks through; all of them where that is no more."""
    return min(codimension, max(2 * rank, rank + 64))


def check_steps_taken(what: str, value: Tensor | float) -> None:
    """Raise unless counting steps, one by one, can have led to this number.

    Raises:
        ValueError: it is negative, fractional, not finite, or beyond what can be counted in its dtype.
    """
    number = float(value)
    # A float32 count stays at 2^24: adding 1 does not change it.
    narrow = isinstance(value, Tensor) and value.is_floating_point()
    # Nobody takes a thousand steps a second for two years.
    longest = 2.0**36
    most = min(longest, 2 / torch.finfo(value.dtype).eps) if narrow else longest  # type: ignore[union-attr]
    if not (0 <= number <= most and number == math.floor(number)):
        raise ValueError(f"{what} is {number:g}: it counts steps, so it must be a whole number from 0 to {most:g}")
