"""Whether the config's targets were reached, and by how much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .config import Case, Config, Target
from .contenders import Key
from .derived import Result


@dataclass(frozen=True)
class Outcome:
    """A target, for one model: the ratio measured, or why there is none."""

    model: str
    target: Target
    tasks: int
    measured: float | None
    reason: str = ""

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
            return f"not measured: {self.reason}"
        distance = 100 * (self.measured / self.target.at_most - 1)
        return f"hit, {-distance:.0f} % below" if distance <= 0 else f"missed by {distance:.0f} %"


def check_targets(config: Config, results: Mapping[str, Result]) -> Iterator[Outcome]:
    """Every target for every model that has a case at the centre."""
    for model in config.models:
        cases = [case for case in config.cases if _is_central(case, model, config)]
        for target in config.targets if cases else ():
            tasks = target.tasks or config.centre.tasks
            found = [
                (results[case.name], case) for case in cases if case.name in results and _covers(case, target, tasks)
            ]
            if not found:
                yield Outcome(model, target, tasks, None, "no finished case covers it")
                continue
            result = found[0][0]
            measured = _measure(target, result, Key(target.method, tasks))
            yield Outcome(model, target, tasks, measured, "" if measured is not None else _why(result, target))


def _is_central(case: Case, model: str, config: Config) -> bool:
    return (case.model, case.tokens, case.rank) == (model, config.centre.tokens, config.centre.rank)


def _covers(case: Case, target: Target, tasks: int) -> bool:
    methods = {
        "step": case.methods,
        "peak": case.memory,
        "refresh": case.refresh,
    }[target.measure]
    wanted_methods = {target.method, *([target.against] if target.against else [])}
    wanted_tasks = {tasks, *([target.against_tasks] if target.against_tasks else [])}
    return wanted_methods <= {*methods} and wanted_tasks <= {*case.tasks}


def _measure(target: Target, result: Result, key: Key) -> float | None:
    if target.measure == "refresh":
        refresh = result.refresh_ratio(key)
        return None if refresh is None else refresh.worst
    other = Key(target.against or key.method, target.against_tasks or key.tasks)
    if target.measure == "step":
        ratio = result.step_ratio(key, other)
        return None if ratio is None else ratio.median
    own, its = result.peak_above_parameters(key), result.peak_above_parameters(other)
    return None if own is None or its is None else own / its


def _why(result: Result, target: Target) -> str:
    missing = result.raw["unavailable"]
    for name in (target.method, target.against):
        if name in missing:
            return f"{name} is unavailable"
    return "it was left out of the measurement"
