"""Round-robin timing: the only fair comparison on a machine that is not idle.

pytest-benchmark times one contender after the other, so a neighbour's load in the second half looks like a difference
between them. Here every round times each contender once, and a ratio is formed within its round.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OURS = "gradsub"


def take_turns(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    setup: dict[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, in the order of the rounds; ``warm_up`` more come first, uncounted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warm_up + rounds):
        for name, run in contenders.items():
            if setup is not None:
                setup[name]()
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if index >= warm_up:
                times[name].append(seconds)
    return times


def alternate(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    setup: dict[str, Callable[[], object]] | None = None,
    *,
    warm_up: int = 1,
) -> dict[str, Any]:
    """Median seconds of each contender, and for each peer the median and quartiles of peer / ours over the rounds."""
    times = take_turns(contenders, rounds, warm_up=warm_up, setup=setup)
    ratios = {
        name: [peer / own for peer, own in zip(times[name], times[OURS], strict=True)]
        for name in contenders
        if name != OURS
    }
    return {
        "rounds": rounds,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratios": {
            name: dict(zip(("low", "median", "high"), statistics.quantiles(values, n=4), strict=True))
            for name, values in ratios.items()
        },
    }


@contextmanager
def quiet_collector() -> Iterator[Callable[[], None]]:
    """Keep python's garbage collector out of the timed parts; yields what runs it in between."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # models and modules never become garbage here: looking through them each time would take long
    gc.disable()

    def collect() -> None:
        gc.collect()

    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
