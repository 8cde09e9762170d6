"""What a rank hands to the all-reduce in a step, in bytes."""

from __future__ import annotations

from collections.abc import Iterable

from gradsub.memory import layer_bytes

Shape = tuple[int, int]


def data_parallel_bytes(shapes: Iterable[Shape], itemsize: int = 4) -> int:
    """DDP: every weight's gradient."""
    return sum(itemsize * rows * columns for rows, columns in shapes)


def gems_bytes(shapes: Iterable[Shape], *, rank: int, tasks: int, side: str = "input", itemsize: int = 4) -> int:
    """GEMS in an ordinary step: what was captured, and what the ranks agree on."""
    shapes = list(shapes)
    captured = sum(
        layer_bytes(rows, columns, rank=rank, tasks=tasks, side=side, itemsize=itemsize).captured
        for rows, columns in shapes
    )
    return captured + agreement_bytes(len(shapes), tasks)


def sketch_bytes(shapes: Iterable[Shape], *, rank: int, tasks: int, side: str = "input", itemsize: int = 4) -> int:
    """What the sketches of all layers add, twice in every ``update_proj_gap`` steps."""
    return sum(
        layer_bytes(rows, columns, rank=rank, tasks=tasks, side=side, itemsize=itemsize).sketches
        for rows, columns in shapes
    )


def agreement_bytes(parameters: int, tasks: int) -> int:
    """Samples, losses, the coarsest format, and who has a gradient of what: in float64."""
    return 8 * ((tasks + 1) + tasks + 1 + (tasks + 2) * parameters + tasks)
