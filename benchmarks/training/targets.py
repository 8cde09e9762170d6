"""Whether the config's targets were reached, and by how much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .config import Case, Config, Target
from .contenders import Key
from .derived import Result


@dataclass(frozen=True)
class Outcome:
    """A target, for one model: the ratio measured with a reservation if there is one, or why there is none."""

    model: str
    target: Target
    tasks: int
    measured: float | None
    note: str = ""

    @property
    def wording(self) -> str:
        """What was to be reached."""
        target = self.target
        if target.measure == "refresh":
            other = "its own ordinary step"
        elif target.against_tasks is not None:
            other = f"itself with {target.against_tasks} tasks"
        else:
            other = str(target.against)
        what = {"step": "step time", "peak": "peak memory above the parameters", "refresh": "refresh step"}
        return f"{what[target.measure]} of {target.method}, {self.tasks} tasks, against {other}"

    @property
    def verdict(self) -> str:
        """Hit or missed, and the distance in percent of the target."""
        if self.measured is None:
            return f"not measured: {self.note}"
        distance = 100 * (self.measured / self.target.at_most - 1)
        verdict = f"hit, {-distance:.0f} % below" if distance <= 0 else f"missed by {distance:.0f} %"
        return f"{verdict} ({self.note})" if self.note else verdict


def check_targets(config: Config, results: Mapping[str, Result]) -> Iterator[Outcome]:
    """Every target for every model that has a case at the centre."""
    for model in config.models:
        cases = [case for case in config.cases if _is_central(case, model, config)]
        own = [target for target in config.targets if target.model in (None, model)]
        for target in own if cases else ():
            yield _check(config, target, model, {case: results[case.name] for case in cases if case.name in results})


def _check(config: Config, target: Target, model: str, finished: Mapping[Case, Result]) -> Outcome:
    own = Key(target.method, target.tasks or config.centre.tasks)
    other = Key(target.against or own.method, target.against_tasks or own.tasks)
    together = [result for case, result in finished.items() if _covers(case, target.measure, own, other)]
    if together:
        measured = _measure(target, together[0], own, other)
        return Outcome(model, target, own.tasks, measured, _why(together[0], target) if measured is None else "")
    apart = _steps_apart(target, finished, own, other)
    note = "no finished case covers it" if apart is None else "medians of two processes"
    return Outcome(model, target, own.tasks, apart, note)


def _is_central(case: Case, model: str, config: Config) -> bool:
    return (case.model, case.tokens, case.rank) == (model, config.centre.tokens, config.centre.rank)


def _covers(case: Case, measure: str, *keys: Key) -> bool:
    methods = {"step": case.methods, "peak": case.memory, "refresh": case.refresh}[measure]
    return all(key.method in methods and key.tasks in case.tasks for key in keys)


def _measure(target: Target, result: Result, own: Key, other: Key) -> float | None:
    if target.measure == "refresh":
        refresh = result.refresh_ratio(own)
        return None if refresh is None else refresh.worst
    if target.measure == "step":
        ratio = result.step_ratio(own, other)
        return None if ratio is None else ratio.median
    mine, its = result.peak_above_parameters(own), result.peak_above_parameters(other)
    return None if mine is None or its is None else mine / its


def _steps_apart(target: Target, finished: Mapping[Case, Result], own: Key, other: Key) -> float | None:
    """The ratio of two medians that were not timed in turns: worth less, but more than nothing."""
    if target.measure != "step":
        return None
    medians = [
        next((result.step_seconds(key) for result in finished.values() if result.entry("steps", key)), None)
        for key in (own, other)
    ]
    return None if None in medians else medians[0] / medians[1]  # type: ignore[operator]


def _why(result: Result, target: Target) -> str:
    missing = result.raw["unavailable"]
    for name in (target.method, target.against):
        if name in missing:
            return f"{name} is unavailable"
    return "it was left out of the measurement"
