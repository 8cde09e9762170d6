"""When a basis is due: all layers at once for exact decompositions, one after the other for sketches."""

from __future__ import annotations

# Each sketch is one step of a power iteration that starts from a random basis. What these numbers were measured on
# stands in benchmarks/refresh/README.md.
FIRST_SKETCHES = 4
SKETCHES_PER_REFRESH = 1

_GOLDEN = 0.6180339887498949


def next_multiple(step: int, gap: int) -> int:
    """The next multiple of ``gap`` after ``step``."""
    return (step // gap + 1) * gap


def next_sketch(step: int, gap: int, index: int) -> int:
    """The step of a layer's next sketch after ``step``.

    The first steps sketch every layer. After that every layer has its own place within ``gap`` steps: multiples of
    the golden ratio spread any number of layers evenly, also those that are added later.

    Args:
        step: the layer's count of steps.
        gap: steps between two refreshes.
        index: of the layer.
    """
    following = step + 1
    if following < FIRST_SKETCHES:
        return following
    phase = (following - int(index * _GOLDEN % 1 * gap)) % gap
    return following if phase < SKETCHES_PER_REFRESH else following + gap - phase
