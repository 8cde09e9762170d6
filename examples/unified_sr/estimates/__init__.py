"""What a run will take, before it takes it: memory by a formula, time from what was measured."""

from __future__ import annotations

from ._memory import MemoryEstimate, estimate_memory
from ._shape import Layer, ModelShape, RowSize, row_size, shape_of
from ._time import Cost, TimeNotice, format_duration

__all__ = [
    "Cost",
    "Layer",
    "MemoryEstimate",
    "ModelShape",
    "RowSize",
    "TimeNotice",
    "estimate_memory",
    "format_duration",
    "row_size",
    "shape_of",
]
