"""What a run will take, before it takes it: the memory of its training, and the time from what was measured."""

from __future__ import annotations

from ._memory import estimate_memory, row_size
from ._time import Cost, TimeNotice, format_duration

__all__ = ["Cost", "TimeNotice", "estimate_memory", "format_duration", "row_size"]
