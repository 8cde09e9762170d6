from __future__ import annotations

import warnings
from collections.abc import Iterable
from operator import methodcaller

import torch
from torch import Tensor

from gradsub.layers import some
from gradsub.linalg._arithmetic import widest
from gradsub.null_space._covariance import NARROWEST_SINGLE, Covariance
from gradsub.null_space._criterion import Criterion
from gradsub.null_space._directions import Directions
from gradsub.null_space._protection import Protection, leading, protect
from gradsub.null_space._scratch import Scratch
from gradsub.null_space._shared import SharedStatistics, Steps
from gradsub.null_space._sketch import Sketch
from gradsub.null_space._statistics import Spectrum, Statistics


class Content:
    """What is known of layers: their statistics, and the directions that these come to.

    Args:
        budget: bytes that a layer's statistics may take between calls, or None.
    """

    def __init__(self, criterion: Criterion, budget: int | None) -> None:
        self.criterion = criterion
        self.budget = budget
        self.shared = SharedStatistics()
        self._protected: dict[str, Protection] = {}
        self._warned: set[str] = set()

    def like(self) -> Content:
        """An empty one under the same criterion."""
        return Content(self.criterion, self.budget)

    def statistics(self, name: str) -> Statistics:
        """Of a layer, or a KeyError that lists the layers there are."""
        if name not in self.shared.by_name:
            raise KeyError(f"no features were collected for {name!r}; there are {sorted(self.shared.by_name)}")
        return self.shared.by_name[name]

    def protection(self, name: str) -> Protection:
        """What the layer's statistics come to; decomposed where that is not known yet."""
        found = self._known(name)
        if found is not None:
            return found
        with torch.inference_mode(False), torch.no_grad():
            return self._decompose(name, self.statistics(name))[0]

    def basis(self, name: str, dtype: torch.dtype) -> Tensor:
        """The layer's protected directions; decomposed anew where their complement is held and nobody has them."""
        statistics, protection = self.statistics(name), self._known(name)
        found = None if protection is None else protection.basis(dtype)
        if found is not None:
            return found
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(statistics, Directions):
                return statistics.protection.give(statistics.basis().to(dtype))
            protection, spectrum = self._decompose(name, statistics)
            held = protection.basis(dtype)
            return protection.give(leading(spectrum, protection.count).to(dtype)) if held is None else held

    def add(self, name: str, rows: Tensor, steps: Steps) -> None:
        """Take in a layer's features (N x d); ``steps`` as of `SharedStatistics.advance`."""

        def first() -> Statistics:
            statistics = self._empty(_checked(name, rows))
            statistics.add(rows)
            return statistics

        def more(statistics: Statistics) -> None:
            if statistics.dimension != rows.shape[1]:
                raise ValueError(
                    f"features of {name!r} have width {rows.shape[1]}, but the layer had {statistics.dimension} before"
                    ": pass features of the same layer and side"
                )
            statistics.add(_checked(name, rows))

        # Statistics that begin in inference mode could not be added to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.shared.advance(name, steps, first, more)
        self._protected.pop(name, None)

    def merge(self, other: Content) -> None:
        """Take in all that another one under the same criterion has seen; where that cannot be, nothing is changed."""
        sources = dict(other.shared.by_name)
        for name, theirs in sources.items():
            mine = self.shared.by_name.get(name, theirs)
            if (mine.dimension, mine.kind) != (theirs.dimension, theirs.kind):
                raise ValueError(
                    f"other has {theirs.kind} statistics of width {theirs.dimension} for {name!r}, this null space "
                    f"{mine.kind} ones of width {mine.dimension}: collect both on the same model"
                )
        if uneven := self.shared.uneven(other.shared):
            raise ValueError(f"other has {some(uneven)} with another choice of normalize: collect both alike")
        known = self.shared.by_name
        final = [name for name, each in sources.items() if name in known and isinstance(each, Directions)]
        if final:
            raise ValueError(f"{some(final)} hold directions alone, to which nothing can be added: collect anew")
        steps: dict[int, Steps] = {id(source): [] for source in sources.values()}
        with torch.inference_mode(False), torch.no_grad():
            for name, source in sources.items():
                self.shared.advance(name, steps[id(source)], source.copy, methodcaller("merge", source))
                self._protected.pop(name, None)
        self.shared.normalized = {**other.shared.normalized, **self.shared.normalized}

    def directions(self) -> SharedStatistics:
        """The directions of all layers without their statistics."""
        found = SharedStatistics()
        found.by_name, found.versions = dict(self.shared.by_name), dict(self.shared.versions)
        found.normalized = dict(self.shared.normalized)
        for first, each in self.shared.distinct().items():
            directions = self._directions_of(first)
            found.by_name.update((name, directions) for name in found.by_name if self.shared.by_name[name] is each)
        return found

    def condense(self, names: Iterable[str], scratch: Scratch | None) -> None:
        """Keep the directions alone, of one layer after the other, so that its statistics make room for the next."""
        names = [name for name in names if name in self.shared.by_name]
        for name in names:
            statistics = self.shared.by_name[name]
            if isinstance(statistics, Directions):
                continue
            directions = self._directions_of(name)
            if scratch is not None:
                directions = directions.moved(scratch.put)
            self.replace({twin: directions for twin in names if self.shared.by_name[twin] is statistics})

    def replace(self, directions: dict[str, Statistics] | dict[str, Directions]) -> None:
        """The same directions, held elsewhere."""
        for name, each in directions.items():
            self.shared.by_name[name] = each
            self._protected.pop(name, None)

    def _directions_of(self, name: str) -> Directions:
        statistics = self.statistics(name)
        if isinstance(statistics, Directions):
            return statistics
        return Directions(self.protection(name), statistics.energy(), statistics.count)

    def _known(self, name: str) -> Protection | None:
        """What is known of the layer, or of one with the same statistics."""
        statistics = self.statistics(name)
        if name not in self._protected:
            if isinstance(statistics, Directions):
                self._protected[name] = statistics.protection
            twin = next((twin for twin in self._protected if self.shared.by_name[twin] is statistics), None)
            if twin is not None:
                self._protected[name] = self._protected[twin]
        return self._protected.get(name)

    def _decompose(self, name: str, statistics: Statistics) -> tuple[Protection, Spectrum]:
        protection, spectrum = protect(statistics, self.criterion)
        # Layers that share statistics share what follows from them, and have one tensor of directions.
        for twin in [twin for twin in self.shared.by_name if self.shared.by_name[twin] is statistics]:
            protection = self._protected.setdefault(twin, protection)
        if protection.missed is not None and name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"layer_memory_budget={self.budget}: the sketch of {name!r} is too small for "
                f"{protection.missed}; it protects {protection.count} of {statistics.dimension} directions. "
                "Raise the budget",
                stacklevel=5,
            )
        return protection, spectrum

    def _empty(self, rows: Tensor) -> Statistics:
        budget, dimension, device = self.budget, rows.shape[1], rows.device
        if budget is None or dimension**2 * widest(device).itemsize <= budget:
            narrow = rows.dtype == torch.float64 or dimension < NARROWEST_SINGLE
            return Covariance.empty(dimension, device, single=self.criterion.coarse and not narrow)
        return Sketch.within(budget, dimension, rows.dtype, device)


def _checked(name: str, features: Tensor) -> Tensor:
    if features.is_complex():
        raise ValueError(f"features of {name!r} are complex: only real features are supported")
    # Both are NaN where an entry is; ten times as fast on a CPU as a look at each entry.
    low, high = features.aminmax()
    if not bool(torch.isfinite(torch.stack([low, high])).all()):
        raise ValueError(f"features of {name!r} hold NaN or Inf: check the model and the batch before collecting")
    return features
