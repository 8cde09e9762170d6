"""Where words at points go, so that none covers another, a point, or the edge of the picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, bottom, right, top; of any unit, such as pixels. In a picture whose second axis points down, top is below."""

ROWS = 12
"""Lines of text above or below its point that a label may move."""

FAR = 12.0
"""From here on a label and its point need a line between them."""

SWEEPS = 4
"""Rounds in which each label looks for a better place, the others standing."""


def place_labels(
    points: Sequence[Point],
    sizes: Sequence[Point],
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
    placed: list[Box | None] = [None] * len(points)
    for _ in range(SWEEPS):
        before = list(placed)
        for index, (point, size) in enumerate(zip(points, sizes, strict=True)):
            near = [(points[other], box) for other, box in enumerate(placed) if other != index and box is not None]
            texts = [*marks, *(box for _, box in near)]
            lines = [*taken, *(part for pair in near for part in _leader(*pair, gap))]
            placed[index] = _best(point, size, bounds, texts, lines, gap)
        if placed == before:
            break
    return [box for box in placed if box is not None]


def _best(point: Point, size: Point, bounds: Box, texts: Sequence[Box], lines: Sequence[Box], gap: float) -> Box:
    """The nearest place that costs nothing, otherwise the cheapest: no label is covered to spare a line."""
    costs: list[tuple[tuple[float, float], Box]] = []
    for box in _around(point, size, gap):
        outside = (box[2] - box[0]) * (box[3] - box[1]) - _common(box, bounds)
        covered = 100 * outside + sum(_common(box, other) for other in texts)
        crossed = sum(_common(box, other) for other in lines)
        crossed += sum(_common(part, other) for part in _leader(point, box, gap) for other in texts)
        costs.append(((round(covered, 6), round(crossed, 6)), box))
        if costs[-1][0] == (0, 0):
            break
    return min(costs, key=lambda cost: cost[0])[1]


def _around(point: Point, size: Point, gap: float) -> Iterator[Box]:
    """Places, the nearest first: beside the point, then some lines of text above or below, in three columns."""
    (x, y), (width, height) = point, size
    slant = gap / math.sqrt(2)
    lefts = {1: x + gap, -1: x - gap - width, 0: x - width / 2}
    beside = [
        (lefts[1], y - height / 2),
        (lefts[-1], y - height / 2),
        (lefts[0], y + gap),
        (lefts[0], y - gap - height),
    ]
    beside += [(a, b) for a in (x + slant, x - slant - width) for b in (y + slant, y - slant - height)]
    for left, bottom in beside:
        yield left, bottom, left + width, bottom + height
    for row, up, across in itertools.product(range(1, ROWS + 1), (1, -1), (1, -1, 0)):
        bottom = y + up * (gap + 1.1 * row * height) - (height if up < 0 else 0)
        yield lefts[across], bottom, lefts[across] + width, bottom + height


def leader(point: Point, box: Box) -> tuple[Point, Point] | None:
    """Return the line from a point to a label that is not right beside it, if it needs one."""
    nearest = (min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3]))
    return (point, nearest) if math.dist(point, nearest) > FAR else None


def _leader(point: Point, box: Box, gap: float) -> list[Box]:
    """The line as small boxes, without its ends, which touch the point and the label."""
    line = leader(point, box)
    if line is None:
        return []
    (x, y), (end_x, end_y) = line
    count = max(2, round(math.dist(*line) / 4))
    shares = [part / count for part in range(count + 1) if gap < part / count * math.dist(*line)]
    centres = [(x + share * (end_x - x), y + share * (end_y - y)) for share in shares[:-1]]
    return [(a - 2, b - 2, a + 2, b + 2) for a, b in centres]


def _common(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0
