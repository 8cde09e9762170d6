"""How long a run takes, from what another one took."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..run_folder import AFTER, BEFORE

if TYPE_CHECKING:
    from ..training import History

TYPICAL_STEP = 3
"""The step that is taken for typical: the first ones allocate, and find the subspaces."""

RECENT_STEPS, CHANGE = 5, 1.5
"""An estimate is said again when the median of so many recent steps differs from its own step by this factor."""


@dataclass(frozen=True)
class Cost:
    """Seconds of the parts of a run.

    Args:
        fixed: of all but training and the evaluations: to load everything, to prepare the training.
        per_step: of one training step.
        per_query: of one evaluated example, with its share of the perplexity.
    """

    fixed: float
    per_step: float
    per_query: float

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Cost:
        """Read what a finished run took out of its ``run.json``."""
        seconds: Mapping[str, float] = summary["seconds"]
        evaluations = [seconds[name] for name in (BEFORE, AFTER) if name in seconds]
        queries = len(evaluations) * sum(summary["evaluated"].values())
        return cls(
            fixed=sum(taken for name, taken in seconds.items() if name not in (BEFORE, AFTER, "training")),
            per_step=summary["throughput"].get("seconds_per_step", 0.0),
            per_query=sum(evaluations) / max(1, queries),
        )

    @classmethod
    def typical(cls, costs: Iterable[Cost]) -> Cost:
        """Return the median of each part.

        Raises:
            ValueError: if there is none.
        """
        rows = [(cost.fixed, cost.per_step, cost.per_query) for cost in costs]
        if not rows:
            raise ValueError("costs is empty: nothing was measured yet")
        return cls(*(statistics.median(column) for column in zip(*rows, strict=True)))

    def seconds(self, *, steps: int, queries: int, evaluations: int = 2) -> float:
        """Return what a run takes.

        Args:
            steps: of its training.
            queries: examples of one evaluation, of all tasks.
            evaluations: how many there are; a method that trains nothing has one.
        """
        return self.fixed + steps * self.per_step + evaluations * queries * self.per_query


@dataclass
class TimeNotice:
    """Says how long a run goes on: once a typical step was seen, and again where its pace has changed.

    Args:
        steps: that are planned.
        evaluation: seconds of the evaluation after them.
        say: prints a line to the user.
        further: names of the methods that are trained after this one, in as many steps.
    """

    steps: int
    evaluation: float
    say: Callable[[str], None]
    further: Sequence[str] = ()
    _seen: int = 0
    _said: float = 0.0

    def __call__(self, history: History) -> None:
        """Take notice of a step."""
        self._seen += 1
        left = self.steps - len(history.records)
        if self._seen < TYPICAL_STEP or left <= 0:
            return
        recent = [record["seconds"] for record in history.records[-min(RECENT_STEPS, self._seen) :]]
        step = recent[-1] if self._seen == TYPICAL_STEP else statistics.median(recent)
        if self._said and 1 / CHANGE < step / self._said < CHANGE:
            return
        text = (
            f"about {format_duration(left * step)} for {left} further steps of {step:.2f} s, then about "
            f"{format_duration(self.evaluation)} of evaluation"
        )
        if self.further:
            each = self.steps * step + self.evaluation
            text += f", then about {format_duration(len(self.further) * each)} for {', '.join(self.further)}"
        self.say(f"time{', as the pace has changed' if self._said else ''}: {text}, an estimate")
        self._said = step


def format_duration(seconds: float) -> str:
    """Return a duration in the unit that suits it.

    Example:
        >>> [format_duration(seconds) for seconds in (8, 200, 9000, 200000)]
        ['8 s', '3 min', '2.5 h', '2.3 days']
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
