"""All runs of a grid, one after the other or side by side: resumes, skips what is done, goes on past a failure."""

from __future__ import annotations

import contextlib
import math
import multiprocessing.connection
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..busy import cores
from ..run_folder import State, whole
from ..sealed import holds, unseal
from ..settings import Settings
from ..time_left import format_duration
from ..zero_shot import Shared
from ._config import INTACT, Grid
from ._forecast import Forecast
from ._jobs import Job, is_same_run, list_jobs, state_of
from ._process import TICK, Running
from ._progress import Progress
from ._select import choose_rate, record_choice, trials_of

GRACE = 60.0
"""Seconds that a run which is told to stop has for the step that is going on and its checkpoint."""

Say = Callable[[str], None]


@dataclass
class Outcome:
    """What came of a grid.

    Args:
        done: names of the runs that are finished.
        failed: name -> why it is not.
        left: name of a run that the deadline or the user kept from finishing -> how far it is.
        interrupted: whether the user stopped the grid.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def run_grid(
    grid: Grid,
    out: str | Path,
    *,
    only: Sequence[str] = (),
    dry_run: bool = False,
    parallel: int = 1,
    deadline: float | None = None,
    grace: float = GRACE,
    say: Say = print,
) -> Outcome:
    """Carry out all runs that are not finished.

    At the deadline, and at Ctrl-C or SIGTERM, the runs that go on are told to stop. Each takes the step that it is in,
    writes a checkpoint and leaves; after the grace it is ended, and its last checkpoint remains.

    Args:
        grid: of ``read_grid``.
        out: the folder of the grid.
        only: patterns of the runs that are wanted, see ``matching``.
        dry_run: only say what would be done.
        parallel: runs that go on side by side at most.
        deadline: seconds from now at which everything stops. No run is begun that is not expected to reach a checkpoint
            by then.
        grace: seconds after which what does not stop is ended.
        say: prints a line to the user.

    Raises:
        FileExistsError: before anything is run, if a folder holds another run's results.
        ValueError: before anything is run, if a setting, method or source of data is wrong.
    """
    if parallel < 1:
        raise ValueError(f"jobs must be at least 1, got {parallel}")
    if deadline is not None and not deadline > 0:
        raise ValueError(f"deadline must be a number of seconds above 0, got {deadline}")
    if not grace >= 0:
        raise ValueError(f"grace must be a number of seconds of at least 0, got {grace}")
    end = math.inf if deadline is None else time.monotonic() + deadline
    out = Path(out)
    jobs = _with_further_trials(list_jobs(grid, only), out)
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
    if not dry_run and deadline is None and len(left) > 1 and math.isnan(forecast.total(left)):
        _probe(left, forecast, say)
    further = _further_trials(jobs, out)
    seconds = forecast.total([*left, *further]) / parallel
    if left:
        known = (
            "unknown until one of the kind has finished"
            if math.isnan(seconds)
            else f"about {format_duration(seconds)}, an estimate"
        )
        more = f" and {len(further)} trials at rates that depend on these" if further else ""
        say(f"time for the {len(left)} runs left{more}: {known}")
    return Outcome() if dry_run else _Runner(out, jobs, forecast, parallel, end, grace).run(len(jobs) + len(further))


def _with_further_trials(jobs: Sequence[Job], out: Path) -> list[Job]:
    """Add the trials that those which are over have led to, each before the run that needs it."""
    listed: dict[str, Job] = {}
    for job in jobs:
        for each in [*(trials_of(job, out) if job.selects else []), job]:
            listed.setdefault(each.name, each)
    return list(listed.values())


def _further_trials(jobs: Sequence[Job], out: Path) -> list[Job]:
    """The trials that are going to be, whose rates nobody knows yet: the first trial in their place."""
    found: dict[str, list[Job]] = {}
    for job in jobs:
        if job.selects:
            first = job.trials[0]
            found[first.name] = [first] * ((job.entry.select.trials or 0) - len(trials_of(job, out)))
    return [trial for trials in found.values() for trial in trials]


def _state(job: Job, out: Path) -> State:
    if not job.selects:
        return state_of(job, job.settings(), out)
    if all(state_of(trial, trial.settings(), out) is State.FINISHED for trial in trials_of(job, out)):
        try:
            return state_of(job, job.settings(choose_rate(job, out).trial.rate), out)
        except ValueError:
            return State.NEW  # training diverged at every rate, which is said where the run's turn comes
    job.settings()  # what is wrong with them is said before anything runs
    return State.NEW


def _probe(jobs: Sequence[Job], forecast: Forecast, say: Say) -> None:
    probed = next((job for job in jobs if job.trained), None)
    if probed is not None:
        say(f"nothing was measured yet: a few steps of {probed.data}/{probed.entry.name} tell how long a step takes")
        failure = forecast.probe(probed)
        if failure is not None:
            say(f"these steps failed: {failure}")


@dataclass(frozen=True)
class _Active:
    """A run that goes on."""

    job: Job
    settings: Settings
    process: Running
    began: float
    steps_before: int


class _Runner:
    def __init__(
        self, out: Path, jobs: Sequence[Job], forecast: Forecast, parallel: int, end: float, grace: float
    ) -> None:
        self._out = out
        self._waiting = list(jobs)
        self._listed = {job.name: job for job in jobs}
        self._active: list[_Active] = []
        self._started: set[str] = set()  # those of the active ones that have taken a step
        self._forecast = forecast
        self._parallel = parallel
        self._end_at = end
        self._grace = grace
        self._outcome = Outcome()
        self._measured = Shared(out / INTACT)
        # Runs side by side share the cores; alone, a run leaves the choice to torch as ever.
        shared = parallel > 1 and "OMP_NUM_THREADS" not in os.environ
        self._threads = max(1, cores() // parallel) if shared else None
        self._total, self._estimated_at = math.nan, 0.0

    def run(self, total: int) -> Outcome:
        with _sigterm_as_interrupt(), Progress(total, self._parallel) as self._progress:
            try:
                self._work()
            except KeyboardInterrupt:
                self._outcome.interrupted = True
            finally:
                self._stop()
        for job in self._waiting:
            begun = job.folder(self._out).file("checkpoint.pt").is_file()
            self._outcome.left[job.name] = "has a checkpoint" if begun else "not begun"
        return self._outcome

    def _work(self) -> None:
        changed = True
        while True:
            if time.monotonic() >= self._end_at:
                return
            if changed:
                self._fill()
                self._estimate()
            if not self._active:
                return
            multiprocessing.connection.wait([active.process.sentinel for active in self._active], TICK)
            over = [active for active in self._active if active.process.over]
            for active in over:
                self._finish(active)
            changed = bool(over)
            self._show()

    def _fill(self) -> None:
        """Begin what can begin, in order, while there is a place."""
        position = 0
        while position < len(self._waiting) and len(self._active) < self._parallel:
            # What was before may have waited for just this one.
            position = 0 if self._advance(self._waiting[position]) else position + 1

    def _advance(self, job: Job) -> bool:
        """Begin a run or settle it without, and tell whether anything has changed."""
        try:
            rate = None
            if job.selects:
                trials = trials_of(job, self._out)
                further = [trial for trial in trials if trial.name not in self._listed]
                if further:
                    self._waiting[self._waiting.index(job) : self._waiting.index(job)] = further
                    self._listed.update({trial.name: trial for trial in further})
                    return True
                unsettled = {each.name for each in (*self._waiting, *(active.job for active in self._active))}
                if any(trial.name in unsettled for trial in trials):
                    return False
                rate = self._rate(job, trials)
            settings = job.settings(rate)
            if state_of(job, settings, self._out) is not State.FINISHED:
                if any(active.settings == settings for active in self._active):
                    return False  # the same run, of which this will be a copy
                if not self._copied(job, settings):
                    return self._begin(job, settings)
            self._settle(job)
        except Exception as error:
            self._fail(job, error)
        self._waiting.remove(job)
        return True

    def _rate(self, job: Job, trials: Sequence[Job]) -> float:
        broken = [trial.name for trial in trials if trial.name not in self._outcome.done]
        if broken:
            raise RuntimeError(f"its learning rate cannot be chosen, because {', '.join(broken)} did not finish")
        choice = choose_rate(job, self._out)
        record_choice(job, self._out, choice)
        if job.seed == job.entry.seeds[0]:
            notes = "" if choice.within_limit else ", the least harm to the perplexity, as none keeps to the limit"
            notes += ", at the edge of the rates tried" if choice.at_edge else ""
            self._progress.say(f"{job.data}/{job.entry.name}: learning rate {choice.trial.rate:g}{notes}")
        return choice.trial.rate

    def _copied(self, job: Job, settings: Settings) -> bool:
        """Take over the results of another run, if there is one that is the same training."""
        folder, log = job.folder(self._out), job.log(self._out)
        others = [other.folder(self._out) for other in self._listed.values()]
        same = next((other for other in others if is_same_run(other.path, settings)), None)
        if same is not None:  # a trial of two entries that differ in how they choose
            with whole(folder.path) as partial:
                shutil.copytree(same.path, partial)
            log.write_text(f"the same run as {same.path}, of which this is a copy\n", encoding="utf-8")
            return True
        if folder.path.exists():
            return False
        trial = next((other for other in others if holds(other, settings)), None)
        if trial is None:
            return False
        unseal(trial, folder.path)
        log.write_text(f"the same training as {trial.path}, evaluated on the test split there\n", encoding="utf-8")
        return True

    def _begin(self, job: Job, settings: Settings) -> bool:
        if time.monotonic() + self._forecast.to_checkpoint(job) > self._end_at:
            return False
        folder = job.folder(self._out)
        process = Running(
            settings,
            folder.path,
            job.log(self._out),
            measured=self._measured,
            sealing=job.is_a_run,
            threads=self._threads,
        )
        # The log of steps is written anew when training goes on from a checkpoint.
        self._active.append(_Active(job, settings, process, time.monotonic(), self._steps(job)))
        self._waiting.remove(job)
        return True

    def _finish(self, active: _Active) -> None:
        job = active.job
        self._active.remove(active)
        self._started.discard(job.name)
        try:
            failure = active.process.failure
            if active.process.stopped:
                self._outcome.left[job.name] = f"stopped after step {self._steps(job)}"
                return
            if failure is None:
                self._forecast.learn(job, job.folder(self._out).path)
                if self._parallel > 1:
                    self._progress.say(f"{job.name}: {format_duration(time.monotonic() - active.began)}")
            elif job.diverged(self._out) is None:
                raise RuntimeError(failure)
            self._settle(job)
        except Exception as error:
            self._fail(job, error)

    def _settle(self, job: Job) -> None:
        diverged = job.diverged(self._out)
        if diverged is not None and job.rate is None:
            raise RuntimeError(f"{diverged} (remove {job.folder(self._out).path} to try again)")
        self._outcome.done.append(job.name)
        self._progress.advance()

    def _fail(self, job: Job, error: Exception) -> None:
        self._outcome.failed[job.name] = str(error)
        self._progress.say(f"{job.name} failed: {error}")
        self._progress.advance()

    def _stop(self) -> None:
        """Tell what goes on to stop, and end what does not."""
        if not self._active:
            return
        self._progress.say(f"telling {len(self._active)} runs to stop, which takes at most {self._grace:.0f} s")
        for active in self._active:
            active.process.stop()
        end = time.monotonic() + self._grace
        with contextlib.suppress(KeyboardInterrupt):  # once more: at once
            while (alive := [each for each in self._active if not each.process.over]) and time.monotonic() < end:
                multiprocessing.connection.wait([active.process.sentinel for active in alive], TICK)
        for active in list(self._active):
            if not active.process.over:
                active.process.kill()
            self._finish(active)

    def _steps(self, job: Job) -> int:
        steps = job.folder(self._out).file("steps.jsonl")
        return steps.read_bytes().count(b"\n") if steps.is_file() else 0

    def _estimate(self) -> None:
        """How long everything takes that goes on or waits, and is not finished."""
        waiting = [job for job in self._waiting if not job.over(self._out)]
        left = [*(active.job for active in self._active), *waiting, *_further_trials(waiting, self._out)]
        self._total, self._estimated_at = self._forecast.total(left) / self._parallel, time.monotonic()

    def _show(self) -> None:
        now = time.monotonic()
        shown = []
        for active in self._active:
            steps = self._steps(active.job)
            if active.job.name not in self._started and steps > 0 and steps != active.steps_before:
                self._started.add(active.job.name)
                self._forecast.begun(active.job, now - active.began)
            shown.append(f"{active.job.name} step {steps}")
        seconds = min(self._total - (now - self._estimated_at), math.inf)
        about = "" if math.isnan(seconds) else f"about {format_duration(seconds)} left" if seconds > 0 else "overdue"
        self._progress.show(shown, about)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A grid that is asked to end leaves as at Ctrl-C; without this its runs would be ended where they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
