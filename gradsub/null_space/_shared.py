from __future__ import annotations

from collections.abc import Callable, Iterable

from gradsub.null_space._statistics import Statistics

Steps = list[tuple[Statistics | None, Statistics]]


class SharedStatistics:
    """Statistics by layer name, with the semantics of values: layers of equal history hold one object.

    Query, key and value projections see the same tensor in every batch, so a model has about half as many covariances
    as layers. Each addition is a step from one state to the next; layers that start from the same state and take in
    the same rows end in the same state, so the step is computed once. A state that another layer still holds is copied
    before it is changed.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Statistics] = {}
        self.versions: dict[str, int] = {}
        # Whether its rows were divided by their norms; a layer is absent if that is not known.
        self.normalized: dict[str, bool] = {}

    def advance(
        self, name: str, steps: Steps, first: Callable[[], Statistics], more: Callable[[Statistics], None]
    ) -> None:
        """Let the layer take in one piece of data.

        Args:
            steps: the states that this piece of data has led from and to so far, for all layers; extended here.
            first: what the data alone makes.
            more: adds the data to a state, in place.
        """
        before = self.by_name.get(name)
        after = next((end for start, end in steps if start is before), None)
        if after is None:
            if before is None:
                after = first()
            else:
                after = before.copy() if self._needed_elsewhere(name, before, steps) else before
                more(after)
            if after is not before:
                steps.append((before, after))
        self.by_name[name] = after
        self.versions[name] = self.versions.get(name, 0) + 1

    def drop(self, names: Iterable[str]) -> None:
        """Forget layers, of which nothing may be known."""
        for name in names:
            self.by_name.pop(name, None)
            self.versions.pop(name, None)
            self.normalized.pop(name, None)

    def uneven(self, other: SharedStatistics) -> list[str]:
        """The layers in both whose features are known to have come with another choice of ``normalize``."""
        mine, theirs = self.normalized, other.normalized
        return [name for name in other.by_name if name in mine and name in theirs and mine[name] is not theirs[name]]

    def distinct(self) -> dict[str, Statistics]:
        """Every object once, under the first layer that holds it."""
        firsts: dict[int, str] = {}
        for name, statistics in self.by_name.items():
            firsts.setdefault(id(statistics), name)
        return {name: self.by_name[name] for name in firsts.values()}

    def _needed_elsewhere(self, name: str, statistics: Statistics, steps: Steps) -> bool:
        # A layer that is called twice with one tensor arrives at a state that another layer is still to step into.
        return any(end is statistics for _, end in steps) or any(
            held is statistics for other, held in self.by_name.items() if other != name
        )
