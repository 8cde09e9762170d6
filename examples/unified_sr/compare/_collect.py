"""Finds finished runs, and groups those that differ by their seed alone."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import read_yaml
from ..run_folder import CONFIG, ENVIRONMENT, METRICS, SAMPLED, RunFolder

EVALUATION = (
    *("min_user_events", "min_task_events", "min_item_events", "item_counts", "split", "histories", "searches"),
    *("eval_users", "eval_seed", "negatives", "perplexity_tokens", "perplexity_window", "general_text"),
    *("multiple_choice", "multiple_choice_questions"),
)
"""Settings in which runs must agree for their numbers to mean the same."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: where it lies.
    """

    folder: RunFolder

    @cached_property
    def settings(self) -> dict[str, Any]:
        """As in ``config.yaml``."""
        return read_yaml(self.folder.file(CONFIG))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """As in ``metrics.json``: ``zero_shot`` and ``final``."""
        return dict(self.folder.read_json(METRICS))

    @cached_property
    def sampled(self) -> dict[str, Any]:
        """As in ``metrics.sampled.json``."""
        return dict(self.folder.read_json(SAMPLED))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """As in ``run.json``."""
        return dict(self.folder.read_json("run.json"))

    @cached_property
    def machine(self) -> str:
        """What a run's speed depends on: the device, and the threads of a CPU."""
        environment = self.folder.read_json(ENVIRONMENT)
        return f"{environment['device']}, threads: {environment['threads']}"

    @property
    def tasks(self) -> list[str]:
        """The tasks it has ranked."""
        return [task for task in self.metrics["final"] if task != "general"]

    def per_query(self, task: str, metric: str) -> dict[str, float]:
        """Return the metric of each query, of a plain or a packed file; empty if the run has not ranked the task."""
        plain = self.folder.file(f"queries.{task}.jsonl")
        packed = self.folder.file(f"{plain.name}.gz")
        if plain.is_file():
            text = plain.read_text(encoding="utf-8")
        elif packed.is_file():
            text = gzip.decompress(packed.read_bytes()).decode("utf-8")
        else:
            return {}
        rows = [json.loads(line) for line in text.splitlines()]
        return {row["qid"]: float(row[metric]) for row in rows if metric in row}

    def records(self) -> list[dict[str, Any]]:
        """Return the training log, one entry a step."""
        lines = self.folder.file("steps.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Group:
    """Runs of one method on one data set with one set of settings.

    Args:
        label: how tables call it.
        runs: with different seeds.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.runs[0].settings["method"])

    @property
    def lr(self) -> float | None:
        """The learning rate, where something was trained."""
        return float(self.runs[0].settings["lr"]) if self.runs[0].summary["throughput"] else None

    def per_query(self, task: str, metric: str) -> dict[str, float]:
        """Return the metric of each query, averaged over the runs that have it."""
        gathered: dict[str, list[float]] = {}
        for run in self.runs:
            for qid, value in run.per_query(task, metric).items():
                gathered.setdefault(qid, []).append(value)
        return {qid: sum(values) / len(values) for qid, values in gathered.items()}


def collect(paths: Iterable[str | Path]) -> tuple[list[Run], list[Path]]:
    """Find runs in folders, at any depth.

    Args:
        paths: folders of runs, or of folders of runs such as a grid's.

    Returns:
        The finished runs, and the folders of those that are not finished.

    Raises:
        FileNotFoundError: if a folder is not there.
        ValueError: if nothing is found.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"the folder {str(path)!r} is not there; pass folders of runs or of a grid")
        found = sorted(file.parent.resolve() for file in path.rglob(CONFIG))
        if not found:
            raise ValueError(f"{str(path)!r} holds no run (no {CONFIG}); pass folders of runs or of a grid")
        folders.update(dict.fromkeys(found))
    finished = [RunFolder(folder) for folder in folders if RunFolder(folder).finished]
    if not finished:
        raise ValueError(f"none of the runs in {', '.join(map(str, paths))} is finished")
    left_out = [folder for folder in folders if not RunFolder(folder).finished]
    return [Run(folder) for folder in finished], left_out


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Group the runs on one data set by all settings but the seed.

    A group is called as its folder in a grid, or else as its method, and where that is not unique also by the settings
    that tell it apart.

    Raises:
        ValueError: if two runs have the same settings and seed, or numbers that cannot be compared.
    """
    gathered: dict[str, dict[int, Run]] = {}
    for run in runs:
        same = gathered.setdefault(json.dumps(_without_seed(run.settings), sort_keys=True), {})
        seed = int(run.settings["seed"])
        if seed in same:
            raise ValueError(
                f"{run.folder.path} and {same[seed].folder.path} have the same settings and seed; leave one out"
            )
        same[seed] = run
    _check_comparable(runs)
    members = [tuple(run for _, run in sorted(by_seed.items())) for by_seed in gathered.values()]
    names = [_name(group) for group in members]
    return [
        Group(name if names.count(name) == 1 else f"{name} ({_difference(group, members, names)})", group)
        for name, group in zip(names, members, strict=True)
    ]


def tasks_of(groups: Sequence[Group]) -> list[str]:
    """Return all tasks that any method has ranked."""
    return list(dict.fromkeys(task for group in groups for run in group.runs for task in run.tasks))


def _without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "seed"}


def _check_comparable(runs: Sequence[Run]) -> None:
    for key in EVALUATION:
        values = {run.settings.get(key): run.folder.path for run in runs}
        if len(values) > 1:
            found = ", ".join(f"{key}={value!r} in {path}" for value, path in values.items())
            raise ValueError(f"the runs cannot be compared, because they were evaluated differently: {found}")


def _name(group: Sequence[Run]) -> str:
    """The name of the folder METHOD of the layout METHOD/seed-SEED, otherwise the method."""
    parents = {run.folder.path.parent.name for run in group}
    in_grid = all(run.folder.path.name == f"seed-{run.settings['seed']}" for run in group)
    return parents.pop() if in_grid and len(parents) == 1 else str(group[0].settings["method"])


def _difference(group: Sequence[Run], members: Sequence[Sequence[Run]], names: Sequence[str]) -> str:
    own = group[0].settings
    others = [
        other[0].settings
        for other, name in zip(members, names, strict=True)
        if name == _name(group) and other is not group
    ]
    keys = [key for key in _without_seed(own) if any(other.get(key) != own[key] for other in others)]
    return ", ".join(f"{key}={own[key]}" for key in keys)
