from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradsub.distributed import Ranks
from gradsub.null_space._covariance import Covariance
from gradsub.null_space._shared import SharedStatistics
from gradsub.null_space._sketch import Sketch
from gradsub.null_space._statistics import Statistics

Result = TypeVar("Result")
_DIFFERENT = (
    "batches differ between the ranks: pass the same ones on every rank, of which each runs its part, or shard=False "
    "if every rank has batches of its own"
)


class OwnBatches:
    """Batches of this rank alone.

    Attributes:
        counts: whether the batch whose turn it is counts.
        dealt: how many batches there are on all ranks together; None if each has its own.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self.counts = True
        self.dealt: int | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


class SharedBatches(OwnBatches):
    """Of batches that are the same on every rank, every ``ranks.size``-th.

    Where the last round has too few for all, the other ranks run a batch that does not count: the forward pass of a
    sharded model needs every rank.

    Args:
        batches: the same on every rank.
        device: where the ranks compare them.
    """

    def __init__(self, ranks: Ranks, batches: Iterable[Any], device: torch.device) -> None:
        super().__init__(batches)
        self._ranks, self._device = ranks, device
        self.dealt: int = 0

    def __iter__(self) -> Iterator[Any]:
        """The batches.

        Raises:
            ValueError: on every rank, if the first ones differ.
        """
        ranks, batches = self._ranks, iter(self._batches)
        held = list(itertools.islice(batches, ranks.size))
        least, greatest = ranks.extremes(
            torch.tensor(_fingerprint(held), dtype=torch.float32, device=self._device).nan_to_num()
        )
        if not torch.equal(least, greatest):
            raise ValueError(_DIFFERENT)
        while held:
            self.dealt += len(held)
            self.counts = ranks.index < len(held)
            yield held[ranks.index if self.counts else 0]
            held = list(itertools.islice(batches, ranks.size))


def _fingerprint(value: list[Any]) -> list[float]:
    """The number of batches and of tensors, and the sum over their entries."""
    tensors = list(_tensors(value))
    return [float(len(value)), float(len(tensors)), sum(float(tensor.sum(dtype=torch.float64)) for tensor in tensors)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def merged_over_ranks(
    ranks: Ranks, mine: SharedStatistics, device: torch.device, dealt: int | None, error: Exception | None
) -> SharedStatistics:
    """The statistics of all ranks' features, the same bits on every rank.

    Covariances are summed; sketches are merged in the order of the ranks. A rank that has seen nothing takes part.

    Args:
        mine: what this one has seen.
        device: where the statistics are.
        dealt: as of `OwnBatches`; the same on every rank.
        error: what ended this rank's part early; it is raised here, and the other ranks learn of it.

    Raises:
        RuntimeError: the ranks have seen features of different layers, or of different widths; or another one failed.
        ValueError: the ranks were given different numbers of batches.
    """
    distinct = mine.distinct()
    firsts = {id(statistics): name for name, statistics in distinct.items()}
    described = ranks.of_all(
        {
            "error": None if error is None else f"{type(error).__name__}: {error}",
            "dealt": dealt,
            "layers": {name: firsts[id(statistics)] for name, statistics in mine.by_name.items()},
            "normalized": mine.normalized,
            "states": {
                name: {**each.state(), "shape": each.shape, "dtype": each.dtype} for name, each in distinct.items()
            },
        }
    )
    if error is not None:
        raise error
    for rank, each in enumerate(described):
        if each["error"] is not None:
            raise RuntimeError(f"rank {rank} could not collect its part: {each['error']}")
    if len({each["dealt"] for each in described}) > 1:
        raise ValueError(f"{_DIFFERENT}; the numbers of batches are {[each['dealt'] for each in described]}")
    present = [rank for rank, each in enumerate(described) if each["layers"]]
    layers = described[present[0]]["layers"] if present else {}
    for rank in present:
        if described[rank]["layers"] != layers:
            different = sorted(set(described[rank]["layers"].items()) ^ set(layers.items()))
            raise RuntimeError(f"ranks {present[0]} and {rank} have seen different layers ({different[:3]} ...)")
    merged: dict[str, Statistics] = {}
    for name in dict.fromkeys(layers.values()):
        states = {rank: described[rank]["states"][name] for rank in present}
        merged[name] = _merged(ranks, name, distinct.get(name), states, device)
    found = SharedStatistics()
    found.by_name = {name: merged[first] for name, first in layers.items()}
    found.versions = dict.fromkeys(layers, 1)
    found.normalized = dict(described[present[0]]["normalized"]) if present else {}
    return found


def on_every_rank(ranks: Ranks, action: Callable[[], Result]) -> Result:
    """What ``action`` returns here, once no rank failed: one that has no room on its disk must not keep others waiting.

    Raises:
        RuntimeError: it failed on another rank.
    """
    if ranks.size == 1:
        return action()
    found: list[Result] = []
    failure = None
    try:
        found.append(action())
    except Exception as error:
        failure = error
    messages = ranks.of_all(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"rank {rank} could not write its part: {message}")
    return found[0]


def _merged(
    ranks: Ranks, name: str, mine: Statistics | None, states: Mapping[int, dict[str, Any]], device: torch.device
) -> Statistics:
    kinds = {(state["kind"], state["shape"][-1]) for state in states.values()}
    if len(kinds) > 1:
        raise RuntimeError(f"the ranks have different statistics of {name!r}: {sorted(kinds)}")
    first = next(iter(states.values()))
    if first["kind"] == Covariance.kind:
        single = all(state["single"] for state in states.values())
        total = Covariance.empty(first["shape"][0], device, single, first["dtype"])
        if mine is not None:
            total.merge(mine)
        ranks.sum_(total.blocks)
        total.count = sum(state["count"] for state in states.values())
        return total
    sketch: Statistics | None = None
    for rank, state in states.items():
        own = mine is not None and rank == ranks.index
        rows = mine.tensor if own else torch.empty(state["shape"], dtype=state["dtype"], device=device)  # type: ignore[union-attr]
        ranks.send(rows, rank)
        one = Sketch.restore(rows, state)
        if sketch is None:
            sketch = one
        else:
            sketch.merge(one)
    assert sketch is not None
    return sketch
