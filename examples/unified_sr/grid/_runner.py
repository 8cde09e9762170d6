"""All runs of a grid, one after the other: resumes, skips what is done, and goes on past a failure."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..estimates import format_duration
from ..run_folder import State
from ..settings import Settings
from ..zero_shot import evaluates_alike
from ._config import Grid
from ._forecast import Forecast
from ._jobs import Job, is_same_run, list_jobs, state_of
from ._process import execute
from ._select import choose_rate, record_choice

Say = Callable[[str], None]


@dataclass
class Outcome:
    """What came of a grid.

    Args:
        done: names of the runs that are finished.
        failed: name -> why it is not.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run_grid(
    grid: Grid, out: str | Path, *, only: Sequence[str] = (), dry_run: bool = False, say: Say = print
) -> Outcome:
    """Carry out all runs that are not finished.

    Args:
        grid: of ``read_grid``.
        out: the folder of the grid.
        only: patterns of the runs that are wanted, see ``matching``.
        dry_run: only say what would be done.
        say: prints a line to the user.

    Raises:
        FileExistsError: before anything is run, if a folder holds another run's results.
        ValueError: before anything is run, if a setting, method or source of data is wrong.
    """
    out = Path(out)
    jobs = list_jobs(grid, only)
    states = {job.name: _state(job, out) for job in jobs}
    forecast = Forecast()
    for job in jobs:
        if states[job.name] is State.FINISHED and job.diverged(out) is None:
            forecast.learn(job, job.folder(out).path)
    left = [job for job in jobs if states[job.name] is not State.FINISHED]
    say(
        f"{len(jobs)} runs in {out}: {len(jobs) - len(left)} finished, "
        f"{sum(states[job.name] is State.UNFINISHED for job in left)} begun, the others new"
    )
    if dry_run:
        for job in jobs:
            say(f"  {job.name}: {states[job.name].value}")
    _say_memory(left, forecast, say)
    if not dry_run and len(left) > 1 and math.isnan(forecast.total(left)):
        _probe(left, forecast, say)
    seconds = forecast.total(left)
    if left:
        known = (
            "unknown until one of the kind has finished"
            if math.isnan(seconds)
            else f"about {format_duration(seconds)}, an estimate"
        )
        say(f"time for the {len(left)} runs left: {known}")
    return Outcome() if dry_run else _Runner(out, jobs, forecast).run()


def _state(job: Job, out: Path) -> State:
    if not job.selects:
        return state_of(job, job.settings(), out)
    if all(state_of(trial, trial.settings(), out) is State.FINISHED for trial in job.trials):
        try:
            return state_of(job, job.settings(choose_rate(job, out).trial.rate), out)
        except ValueError:
            return State.NEW  # training diverged at every rate, which is said where the run's turn comes
    job.settings()  # what is wrong with them is said before anything runs
    return State.NEW


def _say_memory(jobs: Sequence[Job], forecast: Forecast, say: Say) -> None:
    shown: set[tuple[str, str]] = set()
    for job in jobs:
        kind = (job.data, job.entry.name)
        if kind not in shown:
            shown.add(kind)
            say(f"memory of {'/'.join(kind)}: {forecast.memory(job)}")


def _probe(jobs: Sequence[Job], forecast: Forecast, say: Say) -> None:
    probed = next((job for job in jobs if job.trained), None)
    if probed is not None:
        say(f"nothing was measured yet: a few steps of {probed.data}/{probed.entry.name} tell how long a step takes")
        failure = forecast.probe(probed)
        if failure is not None:
            say(f"these steps failed: {failure}")


class _Runner:
    def __init__(self, out: Path, jobs: Sequence[Job], forecast: Forecast) -> None:
        self._out = out
        self._jobs = list(jobs)
        self._forecast = forecast
        self._outcome = Outcome()

    def run(self) -> Outcome:
        with tqdm(total=len(self._jobs), desc="grid", unit="run") as bar:
            for position, job in enumerate(self._jobs):
                self._one(job, bar, self._jobs[position:])
                bar.update()
        return self._outcome

    def _one(self, job: Job, bar: Any, left: Sequence[Job]) -> None:
        started = time.monotonic()
        try:
            settings = job.settings(self._rate(job))
            state = state_of(job, settings, self._out)
            if state is not State.FINISHED:
                remaining = [other for other in left if other is job or not self._finished(other)]
                total = self._forecast.total(remaining)
                failure = self._execute(job, settings, lambda: self._show(job, bar, total, started))
                if failure is None:
                    self._forecast.learn(job, job.folder(self._out).path)
                elif job.diverged(self._out) is None:
                    raise RuntimeError(failure)
            diverged = job.diverged(self._out)
            if diverged is not None and job.rate is None:
                raise RuntimeError(f"{diverged} (remove {job.folder(self._out).path} to try again)")
            self._outcome.done.append(job.name)
        except Exception as error:
            self._outcome.failed[job.name] = str(error)
            tqdm.write(f"{job.name} failed: {error}")

    def _rate(self, job: Job) -> float | None:
        if not job.selects:
            return None
        broken = [trial.name for trial in job.trials if trial.name not in self._outcome.done]
        if broken:
            raise RuntimeError(f"its learning rate cannot be chosen, because {', '.join(broken)} did not finish")
        choice = choose_rate(job, self._out)
        record_choice(job, self._out, choice)
        if job.seed == job.entry.seeds[0]:
            notes = "" if choice.within_limit else ", the least harm to the perplexity, as none keeps to the limit"
            notes += ", at the edge of the rates tried" if choice.at_edge else ""
            tqdm.write(f"{job.data}/{job.entry.name}: learning rate {choice.trial.rate:g}{notes}")
        return choice.trial.rate

    def _execute(self, job: Job, settings: Settings, watch: Callable[[], object]) -> str | None:
        folder, log = job.folder(self._out).path, job.log(self._out)
        folders = [other.folder(self._out).path for other in self._jobs]
        same = next((path for path in folders if is_same_run(path, settings)), None)
        if same is not None:  # a trial of two entries that differ in how they choose
            shutil.copytree(same, folder, dirs_exist_ok=True)
            log.write_text(f"the same run as {same}, of which this is a copy\n", encoding="utf-8")
            return job.diverged(self._out)
        zero_shot = next((path for path in folders if evaluates_alike(path, settings)), None)
        return execute(settings, folder, log, watch, zero_shot)

    def _finished(self, job: Job) -> bool:
        folder = job.folder(self._out)
        return job.diverged(self._out) is not None or folder.finished

    def _show(self, job: Job, bar: Any, total: float, started: float) -> None:
        steps = job.folder(self._out).file("steps.jsonl")
        taken = steps.read_bytes().count(b"\n") if steps.is_file() else 0
        left = total - (time.monotonic() - started)
        about = "" if math.isnan(total) else f", about {format_duration(left)} left" if left > 0 else ", overdue"
        text = f"{job.name} step {taken}{about}"
        # On a terminal the clock runs; a log gets a line only where something has changed.
        bar.set_postfix_str(text, refresh=sys.stderr.isatty() or text != bar.postfix)
