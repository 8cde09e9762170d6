"""Numbers that follow from a result file: ratios within a round, the worst step of a refresh cycle, memory in use."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .contenders import Key


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class RefreshRatio:
    """Steps with a short gap over the ordinary ones timed in turns with them: the slowest, and their mean."""

    worst: float
    mean: float


class Result:
    """One case's result file."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self._parts = {
            part: {Key(entry["method"], entry["tasks"]): entry for entry in raw.get(part, [])}
            for part in ("steps", "refreshes", "memory")
        }

    @property
    def keys(self) -> list[Key]:
        """The contenders, in the order of the report."""
        return list(self._parts["steps"])

    def entry(self, part: str, key: Key) -> dict[str, Any] | None:
        """What was measured of a contender, if it was."""
        return self._parts[part].get(key)

    def step_seconds(self, key: Key) -> float:
        """Median of an ordinary step."""
        return statistics.median(self._parts["steps"][key]["seconds"])

    def step_ratio(self, key: Key, other: Key) -> Ratio | None:
        """An ordinary step over another contender's step of the same round."""
        own, peer = self.entry("steps", key), self.entry("steps", other)
        if own is None or peer is None:
            return None
        ratios = [mine / its for mine, its in zip(own["seconds"], peer["seconds"], strict=True)]
        if len(ratios) == 1:
            return Ratio(ratios[0], ratios[0], ratios[0])
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(median, low, high)

    def refresh_ratio(self, key: Key) -> RefreshRatio | None:
        """How much longer steps take that refresh.

        The worst is a step's place in the cycle, not a single step: over several cycles its median counts, so that
        one disturbed measurement is not taken for a refresh.
        """
        entry = self.entry("refreshes", key)
        if entry is None:
            return None
        ratios = [long / usual for long, usual in zip(entry["refreshing"], entry["ordinary"], strict=True)]
        places = [ratios[start :: entry["gap"]] for start in range(entry["gap"])]
        mean = statistics.mean(entry["refreshing"]) / statistics.mean(entry["ordinary"])
        return RefreshRatio(max(statistics.median(place) for place in places if place), mean)

    def cold_ratio(self, key: Key, steps: int = 3) -> float | None:
        """The slowest of the very first steps over an ordinary step; later ones are spared their noise."""
        entry = self.entry("steps", key)
        return None if entry is None else max(entry["first_steps"][:steps]) / self.step_seconds(key)

    def peak_above_parameters(self, key: Key) -> int | None:
        """Bytes beyond the model's own, at most during a step."""
        entry = self.entry("memory", key)
        return None if entry is None else entry["peak_bytes"] - entry["parameter_bytes"]

    def held_above_parameters(self, key: Key) -> int | None:
        """Bytes beyond the model's own, between steps."""
        entry = self.entry("memory", key)
        return None if entry is None else entry["held_bytes"] - entry["parameter_bytes"]
