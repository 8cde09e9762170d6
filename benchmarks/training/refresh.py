"""Steps that refresh the subspaces, beside the same method's ordinary steps."""

from __future__ import annotations

from typing import Any

from ..alternate import quiet_collector, take_turns
from .config import Case, Config
from .contenders import Builder, Key
from .methods import METHODS
from .steps import seconds_of


def measure_refreshes(config: Config, case: Case) -> list[dict[str, Any]]:
    """For every contender of ``case.refresh`` the seconds of steps with a short gap and, in turns, with the usual one.

    A method that decomposes on schedule gets a gap of 1, so that every step refreshes. gradsub gets
    ``config.refresh.gap`` and whole cycles of it, since it may spread its refreshes over the cycle.
    """
    builder = Builder(config, case)
    methods = tuple(name for name in case.refresh if METHODS[name].refreshes is not None)
    return [_measure(builder, key, config) for key in builder.keys(methods)]


def _measure(builder: Builder, key: Key, config: Config) -> dict[str, Any]:
    method = METHODS[key.method]
    if method.refreshes == "cycle":
        gap, rounds = config.refresh.gap, config.refresh.gap * config.refresh.cycles
    else:
        gap, rounds = 1, config.refresh.decompositions
    ordinary, refreshing = builder.build(key), builder.build(key, gap)
    with quiet_collector() as collect:
        for contender in (ordinary, refreshing):
            for _ in range(method.warm_up_steps):
                collect()
                seconds_of(contender.step)
        times = take_turns(
            {"ordinary": ordinary.step, "refreshing": refreshing.step},
            rounds,
            warm_up=0,
            setup={"ordinary": collect, "refreshing": collect},
        )
    return {"method": key.method, "tasks": key.tasks, "gap": gap, **times}
