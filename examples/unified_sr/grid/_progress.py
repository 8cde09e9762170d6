"""How far the runs of a grid are: on a terminal a line for each, in a log a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from tqdm import tqdm

LOG_INTERVAL = 30.0
"""Seconds between two lines of a log where several runs go on side by side, so that something changes all the time."""


class Progress:
    """Draws the progress of a grid.

    Args:
        total: runs.
        places: runs that go on side by side at most.
    """

    def __init__(self, total: int, places: int) -> None:
        self._terminal = sys.stderr.isatty()
        self._interval = 0.0 if self._terminal or places == 1 else LOG_INTERVAL
        self._last = -LOG_INTERVAL
        self._bar = tqdm(total=total, desc="grid", unit="run")
        own = places if self._terminal and places > 1 else 0
        self._lines = [tqdm(bar_format="{desc}", position=place, leave=False) for place in range(1, own + 1)]

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in reversed(self._lines):
            line.close()
        self._bar.close()

    def say(self, text: str) -> None:
        """Print a line above."""
        tqdm.write(text)

    def advance(self) -> None:
        """One run more is over."""
        self._bar.update()

    def show(self, runs: Sequence[str], left: str) -> None:
        """Show what the runs are doing, and how long all take."""
        if self._lines:
            for place, line in enumerate(self._lines):
                line.set_description_str(f"  {runs[place]}" if place < len(runs) else "")
            self._bar.set_postfix_str(left)
            return
        text = ", ".join([*runs, *([left] if left else [])])
        # On a terminal the clock runs; a log gets a line only where something has changed.
        due = text != self._bar.postfix and time.monotonic() - self._last >= self._interval
        self._bar.set_postfix_str(text, refresh=self._terminal or due)
        if due:
            self._last = time.monotonic()
