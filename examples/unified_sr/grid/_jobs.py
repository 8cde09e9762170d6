"""The runs of a grid in the order in which they are carried out."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checking import build_settings, changed
from ..config import SECTIONS, differences, merged, read_config, section_of
from ..methods import method_named
from ..run_folder import CONFIG, RunFolder, State
from ..settings import Settings
from ._config import Entry, Grid

DIVERGED = "diverged.txt"
"""The file that says why a run ended with a loss that is no number; such a run is not tried again."""


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        grid: it belongs to.
        data: name of the data set.
        entry: the method.
        seed: of the run.
        rate: the learning rate of a trial; ``None`` for a run on the test split.
    """

    grid: Grid
    data: str
    entry: Entry
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """Its folder under that of the grid."""
        return f"{self.data}/{self.entry.name}/{f'seed-{self.seed}' if self.rate is None else f'lr-{self.rate:g}'}"

    @property
    def selects(self) -> bool:
        """Whether the run takes a rate that trials choose."""
        return self.rate is None and bool(self.trials)

    @property
    def trained(self) -> bool:
        """Whether its method trains anything: the method's name is looked up here, not when the file is read."""
        return method_named(self.entry.method).build is not None

    @property
    def trials(self) -> list[Job]:
        """The first trials of its method on its data, if it has a rate and nobody has fixed it."""
        if not self.trained or "training.lr" in self._given():
            return []
        return [self.trial(rate) for rate in self.entry.rates]

    def trial(self, rate: float) -> Job:
        """The trial of its method on its data at a rate."""
        return replace(self, seed=self.entry.select.seed, rate=rate)

    @property
    def is_a_run(self) -> bool:
        """Whether this trial is the same training as the run with its seed at its rate, but for what is evaluated."""
        if self.rate is None or self.seed not in self.entry.seeds:
            return False
        return replace(self, rate=None).settings(self.rate) == changed(self.settings(), {"evaluation.split": "test"})

    def settings(self, rate: float | None = None) -> Settings:
        """Return the settings of the run.

        Args:
            rate: that was chosen for it, if trials choose one.

        Raises:
            ValueError: if the data has no source, or a method or setting is wrong.
        """
        source = self.grid.data[self.data].source
        if source is None:
            raise ValueError(f"the data {self.data!r} has no source; pass --data {self.data}=DIR, or leave it out")
        trial = self.rate is not None
        values = {
            **self._given(),
            "data.source": source,
            "seed": self.seed,
            "evaluation.split": "valid" if trial else "test",
        }
        chosen = self.rate if trial else rate
        return build_settings(self.entry.method, values if chosen is None else {**values, "training.lr": chosen})

    def _given(self) -> dict[str, Any]:
        """What the file and the command line say, later ones winning; what defines a method, over what all share."""
        method = method_named(self.entry.method)
        return merged(
            self.grid.settings,
            self.grid.data[self.data].settings,
            method.defining,
            section_of(method, self.grid.sections),
            self.entry.settings,
            self.entry.select.settings if self.rate is not None else {},
            self.grid.overrides,
        )

    def folder(self, out: Path) -> RunFolder:
        """Return where its results go."""
        return RunFolder(out / self.name)

    def log(self, out: Path) -> Path:
        """Return the file with what it prints."""
        return out / f"{self.name}.log"

    def over(self, out: Path) -> bool:
        """Tell whether it has come to a result, be it that training diverged."""
        return self.diverged(out) is not None or self.folder(out).finished

    def diverged(self, out: Path) -> str | None:
        """Return why it diverged, if it did."""
        file = self.folder(out).file(DIVERGED)
        return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def list_jobs(grid: Grid, only: Sequence[str] = ()) -> list[Job]:
    """List the runs: the first seed of every method on all data before the second one, trials before what needs them.

    Args:
        grid: the grid.
        only: patterns, see ``matching``; trials of a run that matches belong to it. Without any, all runs are listed.

    Raises:
        ValueError: if a method is unknown, a section for one is wrong, or a pattern matches nothing.
    """
    for name, section in grid.sections.items():
        try:
            build_settings(name, section)
        except ValueError as error:
            raise ValueError(f"{error} (settings.{SECTIONS}.{name} of the grid)") from error
    jobs: dict[str, Job] = {}
    names: list[str] = []
    for turn in range(max(len(entry.seeds) for entry in grid.entries)):
        for data in grid.data:
            for entry in grid.entries:
                if turn >= len(entry.seeds):
                    continue
                main = Job(grid, data, entry, entry.seeds[turn])
                names.append(main.name)
                if matching(main.name, only):
                    wanted = [*main.trials, main]
                else:
                    rated = [main.trial(rate) for rate in entry.rates]
                    wanted = [trial for trial in rated if matching(trial.name, only) and trial in main.trials]
                jobs.update({job.name: job for job in wanted if job.name not in jobs})
    unmatched = [pattern for pattern in only if not any(matching(name, [pattern]) for name in jobs)]
    if unmatched:
        raise ValueError(f"--only {' '.join(unmatched)} matches none of the runs {', '.join(names)}")
    return list(jobs.values())


def matching(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a run is wanted: a pattern matches its whole name, or one part of it; no pattern matches all.

    Example:
        >>> [matching("movielens/gems/seed-0", [pattern]) for pattern in ("gems", "movie*", "*/seed-1", "lens")]
        [True, True, False, False]
    """
    parts = [name, *name.split("/")]
    return not patterns or any(fnmatch.fnmatchcase(part, pattern) for pattern in patterns for part in parts)


def is_same_run(path: Path, settings: Settings) -> bool:
    """Tell whether a folder holds a run with these very settings that is finished or diverged."""
    folder = RunFolder(path)
    over = folder.finished or folder.file(DIVERGED).is_file()
    return over and not differences(read_config(folder.file(CONFIG)), settings)


def state_of(job: Job, settings: Settings, out: Path) -> State:
    """Tell what a run's folder holds; a diverged trial is finished.

    Raises:
        FileExistsError: as ``RunFolder.check``.
    """
    state = job.folder(out).check(settings)
    return State.FINISHED if state is State.UNFINISHED and job.diverged(out) is not None else state
