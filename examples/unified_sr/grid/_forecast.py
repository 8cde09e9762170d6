"""How long the runs that are left will take: estimates, said as such."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..checking import changed
from ..data import Dataset, load_dataset
from ..feeds import plan_training, training_pools
from ..methods import method_named
from ..run_folder import AFTER, BEFORE
from ..settings import DatasetSettings, Settings
from ._jobs import Job
from ._process import execute

T = TypeVar("T")

PROBE = {
    "training": {"steps": 3, "epochs": None, "early_stop": None},
    "evaluation": {"users": 16, "perplexity_tokens": 16, "multiple_choice": None},
}
"""The settings of a probe: little of everything. What perplexity and questions take is left out of its estimate."""


class Cost(NamedTuple):
    """Seconds of a run: of all but training and evaluations; of a step; of an evaluated example with its perplexity."""

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
        """Return the median of each part."""
        return cls(*map(statistics.median, zip(*costs, strict=True)))

    def seconds(self, *, steps: int, queries: int, evaluations: int = 2) -> float:
        """Return what a run takes.

        Args:
            steps: of its training.
            queries: examples of one evaluation, of all tasks.
            evaluations: how many there are; a method that trains nothing has one.
        """
        return self.fixed + steps * self.per_step + evaluations * queries * self.per_query


@dataclass
class Forecast:
    """Learns from finished runs what further ones cost."""

    costs: dict[tuple[str, str], list[Cost]] = field(default_factory=dict)
    _fits: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    _starts: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    _probed: list[Cost] = field(default_factory=list)
    _datasets: dict[DatasetSettings, Dataset] = field(default_factory=dict)

    def learn(self, job: Job, folder: Path) -> None:
        """Take in what a finished run took; one without a language model tells nothing about the others."""
        kind = (job.data, job.entry.name)
        if _without_language_model(job):
            self._fits.setdefault(kind, []).append(math.fsum(_summary(folder)["seconds"].values()))
        else:
            self.costs.setdefault(kind, []).append(_cost(folder))

    def probe(self, job: Job) -> str | None:
        """Measure a run of a few steps, whose results are thrown away; return why it failed, if it did."""
        short = changed(job.settings(), PROBE)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "probe")
            failure = execute(short, folder, Path(scratch, "probe.log"))
            if failure is None:
                self._probed = [_cost(folder)]
        return failure

    def begun(self, job: Job, seconds: float) -> None:
        """Take in how long a run took from its start to its first step."""
        self._starts.setdefault((job.data, job.entry.name), []).append(seconds)

    def to_checkpoint(self, job: Job) -> float:
        """Estimate how long a run takes from its start to the first checkpoint that it could leave; NaN if unknown.

        It leaves one after any step once it is told to stop, so that is loading, measuring the intact model and a step;
        without checkpoints and without training it is all of it. A run that goes on from a checkpoint starts likewise.
        """
        if not job.trained or not job.settings().training.checkpoint_every:
            return self.seconds(job)
        known = _nearest(self._starts, job)
        if known:
            return statistics.median(known)
        cost = self._typical(job)
        # Whether the intact model is measured, or was before, is not known here: it is left out rather than counted.
        return math.nan if cost is None else cost.fixed + cost.per_step

    def seconds(self, job: Job) -> float:
        """Estimate how long a run takes; NaN until something of the kind was measured, nothing if it cannot be planned.

        What the same method took on the same data counts first, then what any took on that data, then anything. For a
        run that trains only those that did count: zero-shot tells nothing about a step. A method without a language
        model counts for itself alone; until one of its runs has finished, its own rough figure stands.
        """
        if _without_language_model(job):
            rough = method_named(job.entry.method).fit_seconds
            return statistics.median(self._fits.get((job.data, job.entry.name), [rough]))
        cost = self._typical(job)
        if cost is None:
            return math.nan
        try:
            return self._of_cost(job, cost)
        except (ValueError, OSError, ImportError):
            return 0.0  # its data or plan is wrong: it fails as soon as it begins, and says why

    def _of_cost(self, job: Job, cost: Cost) -> float:
        settings = job.settings()
        dataset = self.dataset(settings)
        split = dataset.valid if settings.evaluation.split == "valid" else dataset.test
        queries = sum(min(settings.evaluation.users or len(rows), len(rows)) for rows in split.values())
        if not job.trained:
            return cost.seconds(steps=0, queries=queries, evaluations=1)
        steps = plan_training(settings, training_pools(dataset, settings, dataset.trainable)).steps
        return cost.seconds(steps=steps, queries=queries)

    def _typical(self, job: Job) -> Cost | None:
        costs = {
            kind: [cost for cost in found if cost.per_step > 0 or not job.trained] for kind, found in self.costs.items()
        }
        known = _nearest(costs, job) or self._probed
        return Cost.typical(known) if known else None

    def total(self, jobs: Iterable[Job]) -> float:
        """Estimate the seconds of several runs together."""
        return math.fsum(self.seconds(job) for job in jobs)

    def dataset(self, settings: Settings) -> Dataset:
        """Load a data set, once."""
        wanted = DatasetSettings.of(settings)
        if wanted not in self._datasets:
            self._datasets[wanted] = load_dataset(**dict(wanted))
        return self._datasets[wanted]


def _nearest(found: Mapping[tuple[str, str], list[T]], job: Job) -> list[T]:
    """What is known of the method on the data, otherwise of the data, otherwise at all."""
    own = found.get((job.data, job.entry.name), [])
    near = [each for (data, _), members in found.items() if data == job.data for each in members]
    return own or near or [each for members in found.values() for each in members]


def _without_language_model(job: Job) -> bool:
    return method_named(job.entry.method).fit is not None


def _cost(folder: Path) -> Cost:
    return Cost.of(_summary(folder))


def _summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found
