"""Ordinary steps: all contenders of a case take turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..alternate import quiet_collector, take_turns
from .config import Case, Config
from .contenders import Builder, Contender, Key
from .methods import METHODS


def measure_steps(config: Config, case: Case) -> list[dict[str, Any]]:
    """Seconds a step of every contender, round by round, and whether it trained.

    The first steps, which build state and bases, are timed one by one and stand apart (``first_steps``).
    """
    builder = Builder(config, case)
    contenders = {key: builder.build(key) for key in builder.keys(case.methods)}
    before = {key: _fingerprints(each) for key, each in contenders.items()}
    losses: dict[Key, list[float]] = {key: [] for key in contenders}

    def stepping(key: Key) -> Callable[[], None]:
        return lambda: losses[key].append(contenders[key].step())

    with quiet_collector() as collect:
        first = {}
        for key in contenders:
            first[key] = []
            for _ in range(METHODS[key.method].warm_up_steps):
                collect()
                first[key].append(seconds_of(stepping(key)))
        named = {str(key): stepping(key) for key in contenders}
        times = take_turns(
            named, config.rounds_of(case), warm_up=config.warm_up_rounds, setup=dict.fromkeys(named, collect)
        )
    return [
        {
            "method": key.method,
            "tasks": key.tasks,
            "seconds": times[str(key)],
            "first_steps": first[key],
            "first_loss": losses[key][0],
            "last_loss": losses[key][-1],
            "trained_tensors": len(before[key]),
            "moved_tensors": _count_moved(before[key], _fingerprints(each)),
            "state_bytes": each.training.state_bytes(),
        }
        for key, each in contenders.items()
    ]


def seconds_of(run: Callable[[], object]) -> float:
    """Wall-clock seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _fingerprints(contender: Contender) -> list[tuple[float, float]]:
    return [_fingerprint(tensor.detach()) for tensor in contender.training.trained()]


def _fingerprint(tensor: Tensor) -> tuple[float, float]:
    """Two sums that no update leaves as they are, instead of a copy of the weights."""
    exact = tensor.double()
    return float(exact.sum()), float(exact.square().sum())


def _count_moved(before: list[tuple[float, float]], after: list[tuple[float, float]]) -> int:
    return sum(old != new for old, new in zip(before, after, strict=True))
