"""The learning rate of a method, chosen from trials on the validation split by one criterion for all methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import TASKS
from ..run_folder import METRICS, SELECTION, RunFolder
from ..settings import Settings
from ..training import tasks_to_train
from ._config import Entry, Selection
from ._jobs import Job

FACTOR = 2.0
"""Between the best rate at the edge of those tried and the next one beyond."""


@dataclass(frozen=True)
class Trial:
    """What came out at one learning rate.

    Args:
        rate: the learning rate.
        value: mean over the trained tasks of the metric on the validation split; ``None`` where training diverged.
        perplexity_increase: share by which the perplexity of general text rose; ``None`` likewise.
    """

    rate: float
    value: float | None = None
    perplexity_increase: float | None = None


@dataclass(frozen=True)
class Choice:
    """The chosen trial.

    Args:
        trial: with its rate.
        within_limit: whether it keeps to the limit of the perplexity; always true where there is none.
        at_edge: whether the smallest or largest rate was chosen, so that a better one may lie outside.
    """

    trial: Trial
    within_limit: bool
    at_edge: bool


def choose(trials: Sequence[Trial], max_perplexity_increase: float | None = None) -> Choice:
    """Choose the best trial among those within the limit; of equals the smaller rate.

    Where none keeps to the limit, the one that raises perplexity least is chosen.

    Args:
        trials: at different rates.
        max_perplexity_increase: the limit; ``None`` for no limit.

    Raises:
        ValueError: if training diverged at every rate, or there is no trial.
    """
    finished = sorted((trial for trial in trials if trial.value is not None), key=lambda trial: trial.rate)
    if not finished:
        raise ValueError(f"no trial came to a result at the rates {[trial.rate for trial in trials]}; add smaller ones")
    limit = math.inf if max_perplexity_increase is None else max_perplexity_increase
    allowed = [trial for trial in finished if _increase(trial) <= limit]
    best = max(allowed, key=lambda trial: trial.value or 0.0) if allowed else min(finished, key=_increase)
    rates = sorted(trial.rate for trial in trials)
    return Choice(best, bool(allowed), len(rates) > 1 and best.rate in (rates[0], rates[-1]))


def next_rate(trials: Sequence[Trial], max_perplexity_increase: float | None = None) -> float:
    """Return the rate that is to be tried after some others.

    As long as the best one is at an edge, that is the next one beyond, by the factor 2. Once it is inside, the wider of
    the two gaps beside it is halved (on a scale of logarithms); of equal ones that on whose other side it is better.

    Args:
        trials: at different rates.
        max_perplexity_increase: as of ``choose``.

    Example:
        >>> next_rate([Trial(1e-4, 0.1, 0.0), Trial(2e-4, 0.2, 0.0)])
        0.0004
        >>> next_rate([Trial(1e-4, 0.1, 0.0), Trial(2e-4, 0.2, 0.0), Trial(4e-4, 0.15, 0.1)])
        0.0002828
    """
    by_rate = {trial.rate: trial for trial in trials}
    rates = sorted(by_rate)
    try:
        best = choose(trials, max_perplexity_increase).trial.rate
    except ValueError:
        return _rounded(rates[0] / FACTOR)  # training diverged at every rate
    position = rates.index(best)
    if position == len(rates) - 1:
        return _rounded(best * FACTOR)
    if position == 0:
        return _rounded(best / FACTOR)
    below, above = rates[position - 1], rates[position + 1]
    if math.isclose(above / best, best / below, rel_tol=1e-2):
        try:
            other = choose([by_rate[below], by_rate[above]], max_perplexity_increase).trial.rate
        except ValueError:
            other = below  # training diverged at the other one
    else:
        other = max(below, above, key=lambda rate: abs(math.log(rate / best)))
    return _rounded(math.sqrt(best * other))


def trials_of(job: Job, out: Path) -> list[Job]:
    """Return the trials of a run as far as they are known: a further one depends on how the others came out."""
    jobs = job.trials
    selection = job.entry.select
    wanted = max(len(jobs), selection.trials or 0) if jobs else 0
    while len(jobs) < wanted and all(trial.over(out) for trial in jobs):
        found = [_read(trial, selection, out) for trial in jobs]
        jobs.append(job.trial(next_rate(found, selection.max_perplexity_increase)))
    return jobs


def choose_rate(job: Job, out: Path) -> Choice:
    """Choose the rate of a run from its trials.

    Args:
        job: a run whose trials are all finished.
        out: the folder of the grid.

    Raises:
        ValueError: as ``choose``.
    """
    return choose(_trials(job, out), job.entry.select.max_perplexity_increase)


def record_choice(job: Job, out: Path, choice: Choice) -> None:
    """Write down how the rate of a run was chosen, and from what."""
    trials = _trials(job, out)
    folder = RunFolder((out / job.name).parent)
    folder.write_json(SELECTION, _record(job.entry, job.trials[0].settings(), trials, choice))


def _trials(job: Job, out: Path) -> list[Trial]:
    return [_read(trial, job.entry.select, out) for trial in trials_of(job, out)]


def _read(job: Job, selection: Selection, out: Path) -> Trial:
    assert job.rate is not None
    if job.diverged(out) is not None:
        return Trial(job.rate)
    metrics = job.folder(out).read_json(METRICS)
    before, after = (metrics[part]["general"]["perplexity"] for part in ("zero_shot", "final"))
    found = {task: values[selection.metric] for task, values in metrics["final"].items() if task != "general"}
    trained = [task for task in tasks_to_train(job.settings().training.tasks, TASKS) if task in found]
    return Trial(job.rate, math.fsum(found[task] for task in trained) / len(trained), after / before - 1)


def _record(entry: Entry, settings: Settings, trials: Sequence[Trial], choice: Choice) -> dict[str, Any]:
    selection, first = entry.select, entry.rates
    limit = selection.max_perplexity_increase
    criterion = f"largest mean over the trained tasks of {selection.metric} on the validation split"
    if limit is not None:
        criterion += f", among the rates that raise the perplexity of general text by at most {100 * limit:g} %"
    rule = f"the rates {', '.join(f'{rate:g}' for rate in first)}"
    if len(trials) > len(first):
        rule += (
            f", then {len(trials) - len(first)} more: beyond the best one by the factor {FACTOR:g} while it is at an "
        )
        rule += "edge, then halfway (on a scale of logarithms) to its neighbour across the wider gap"
    return {
        "criterion": criterion,
        "rule": rule,
        "metric": selection.metric,
        "max_perplexity_increase": limit,
        "budget": {
            "trials": len(trials),
            "steps": settings.training.steps if settings.training.epochs is None else None,
            "epochs": settings.training.epochs,
            "seed": settings.seed,
            "examples per task": settings.evaluation.users or "all",
        },
        "trials": [
            {"lr": trial.rate, "value": trial.value, "perplexity_increase": trial.perplexity_increase}
            for trial in trials
        ],
        "lr": choice.trial.rate,
        "within_limit": choice.within_limit,
        "at_edge": choice.at_edge,
    }


def _increase(trial: Trial) -> float:
    return math.inf if trial.perplexity_increase is None else trial.perplexity_increase


def _rounded(rate: float) -> float:
    """To four digits, as it stands in names and tables."""
    return float(f"{rate:.4g}")
