"""Where words at points go, so that none covers another, a point, or the edge of the picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

Box = tuple[float, float, float, float]
"""Left, bottom, right, top; of any unit, such as pixels. In a picture whose second axis points down, top is below."""

DISTANCES = (0.0, 6.0, 14.0, 24.0, 36.0, 50.0)
"""Of a label from its point, beyond the gap; the first one is right beside it."""

FAR = 12.0
"""From here on a label and its point need a line between them."""

SWEEPS = 4
"""Rounds in which each label looks for a better place, the others standing."""


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    taken: Sequence[Box] = (),
    gap: float = 6.0,
) -> list[Box]:
    """Place one label at each point: the nearest place that is free, or the one that covers least.

    Args:
        points: where they belong.
        sizes: width and height of each.
        bounds: they must not leave this.
        taken: what else must not be covered, such as error bars and lines; points are not, in any case.
        gap: between a point's centre and its label.

    Returns:
        The box of each label.

    Example:
        >>> place_labels([(10, 10), (95, 10)], [(30, 8), (30, 8)], (0, 0, 100, 20))
        [(16.0, 6.0, 46.0, 14.0), (59.0, 6.0, 89.0, 14.0)]
    """
    marks = [(x - gap / 2, y - gap / 2, x + gap / 2, y + gap / 2) for x, y in points]
    blocked = [*marks, *taken]
    placed: list[Box | None] = [None] * len(points)
    for _ in range(SWEEPS):
        before = list(placed)
        for index, (point, size) in enumerate(zip(points, sizes, strict=True)):
            near = [(points[other], box) for other, box in enumerate(placed) if other != index and box is not None]
            others = [*blocked, *(box for _, box in near), *(part for pair in near for part in _leader(*pair, gap))]
            costs = [(_cost(point, box, bounds, others, gap), away, box) for box, away in _around(point, size, gap)]
            placed[index] = min(costs, key=lambda cost: cost[:2])[2]
        if placed == before:
            break
    return [box for box in placed if box is not None]


def _around(point: tuple[float, float], size: tuple[float, float], gap: float) -> Iterator[tuple[Box, float]]:
    """Places and their distance: right, left, above and below, then between these, and further out."""
    (x, y), (width, height) = point, size
    sides = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    for distance, (across, up) in itertools.product(DISTANCES, sides):
        reach = (gap + distance) / (math.sqrt(2) if across and up else 1)
        left = x + across * reach - (width / 2 if across == 0 else width if across < 0 else 0)
        bottom = y + up * reach - (height / 2 if up == 0 else height if up < 0 else 0)
        yield (left, bottom, left + width, bottom + height), distance


def leader(point: tuple[float, float], box: Box) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Return the line from a point to a label that is not right beside it, if it needs one."""
    nearest = (min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3]))
    return (point, nearest) if math.dist(point, nearest) > FAR else None


def _leader(point: tuple[float, float], box: Box, gap: float) -> list[Box]:
    """The line as small boxes, without its ends, which touch the point and the label."""
    line = leader(point, box)
    if line is None:
        return []
    (x, y), (end_x, end_y) = line
    count = max(2, round(math.dist(*line) / 2))
    shares = [part / count for part in range(count + 1) if gap < part / count * math.dist(*line)]
    centres = [(x + share * (end_x - x), y + share * (end_y - y)) for share in shares[:-1]]
    return [(a - 1, b - 1, a + 1, b + 1) for a, b in centres]


def _cost(point: tuple[float, float], box: Box, bounds: Box, others: Sequence[Box], gap: float) -> float:
    """How much it covers, or lacks of the picture, and how much its line crosses."""
    outside = (box[2] - box[0]) * (box[3] - box[1]) - _common(box, bounds)
    crossed = sum(_common(part, other) for part in _leader(point, box, gap) for other in others)
    return round(100 * outside + sum(_common(box, other) for other in others) + 10 * crossed, 6)


def _common(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0
