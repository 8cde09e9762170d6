"""How long a run goes on, said once its pace is seen."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .training import History

TYPICAL_STEP = 3
"""The step that is taken for typical: the first ones allocate, and find the subspaces."""

RECENT_STEPS, CHANGE = 5, 1.5
"""An estimate is said again when the median of so many recent steps differs from its own step by this factor."""


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
