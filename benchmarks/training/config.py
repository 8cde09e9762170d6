"""A benchmark's settings, read from YAML and checked before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import yaml

from .methods import METHODS
from .models import ARCHITECTURES
from .problem import Problem

CONFIGS: Final = Path(__file__).parent / "configs"
MEASURES: Final = ("step", "peak", "refresh")


@dataclass(frozen=True)
class Refresh:
    """How refresh steps are timed: ``cycles`` times ``gap`` steps of gradsub; ``decompositions`` of the peers' SVD."""

    gap: int = 10
    cycles: int = 2
    decompositions: int = 2


@dataclass(frozen=True)
class Case:
    """What is measured together, in one process: one model, one number of tokens, one rank.

    ``rounds`` are its own where the config's are too few.
    """

    model: str
    tokens: int
    rank: int
    tasks: tuple[int, ...]
    methods: tuple[str, ...]
    refresh: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()
    rounds: int | None = None

    @property
    def name(self) -> str:
        tasks = "-".join(map(str, self.tasks))
        return f"{self.model}-tokens{self.tokens}-rank{self.rank}-tasks{tasks}"


@dataclass(frozen=True)
class Target:
    """At most this ratio: to another method (``against``), or to the method itself with ``against_tasks`` tasks.

    The measure ``"step"`` is an ordinary step's time, ``"peak"`` the memory at its peak above the parameters, and
    ``"refresh"`` the slowest step of a refresh cycle over the method's own ordinary step. It holds for every model
    unless it names one.
    """

    measure: str
    method: str
    at_most: float
    against: str | None = None
    tasks: int | None = None
    against_tasks: int | None = None
    model: str | None = None


@dataclass(frozen=True)
class Centre:
    """Where the targets hold, and from where one thing at a time is varied."""

    tokens: int
    rank: int
    tasks: int


@dataclass(frozen=True)
class Config:
    """All settings of a benchmark."""

    threads: int
    rounds: int
    models: Mapping[str, Mapping[str, Any]]
    cases: tuple[Case, ...]
    centre: Centre
    targets: tuple[Target, ...] = ()
    warm_up_rounds: int = 2
    seed: int = 0
    sequence_length: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    update_proj_gap: int = 200
    refresh: Refresh = Refresh()
    fresh_process: bool = True

    def problem(self, case: Case, tasks: int) -> Problem:
        """The training problem of a case with this many tasks."""
        return Problem(
            tokens=case.tokens,
            rank=case.rank,
            tasks=tasks,
            sequence_length=self.sequence_length,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            update_proj_gap=self.update_proj_gap,
            seed=self.seed,
        )

    def case(self, name: str) -> Case:
        """The case of this name."""
        for case in self.cases:
            if case.name == name:
                return case
        raise ValueError(f"case {name!r} is not in the config; it has {[case.name for case in self.cases]}")

    def rounds_of(self, case: Case) -> int:
        """How often the methods of a case take their turns."""
        return case.rounds or self.rounds

    def settings(self, case: Case) -> dict[str, Any]:
        """All that a case's numbers depend on, ready for JSON."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _NOT_A_CASES}
        own.update(refresh=vars(self.refresh), rounds=self.rounds_of(case))
        known = {key: value for key, value in vars(case).items() if value is not None}
        listed = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
        return {**own, "case": listed, "model": dict(self.models[case.model])}


_NOT_A_CASES: Final = frozenset({"models", "cases", "centre", "targets", "fresh_process", "refresh"})


def load(path: Path, rounds: int | None = None) -> Config:
    """Read a config; ``rounds`` overrides its numbers of rounds.

    Raises:
        ValueError: a key, a name or a value is not known; the message names it and what is possible.
        OSError: the file cannot be read.
    """
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no settings: it has to be a mapping, as configs/quick.yaml is")
    sets = raw.pop("method_sets", {})
    config = _make(
        Config,
        {
            **raw,
            "cases": tuple(case for entry in raw.get("cases") or () for case in _cases(entry, sets)),
            "targets": tuple(_make(Target, entry, "targets") for entry in raw.get("targets") or ()),
            "centre": _make(Centre, raw.get("centre") or {}, "centre"),
            "refresh": _make(Refresh, raw.get("refresh") or {}, "refresh"),
        },
        str(path),
    )
    if rounds is not None:
        cases = tuple(replace(case, rounds=None) for case in config.cases)
        config = replace(config, rounds=rounds, cases=cases)
    _check(config)
    return config


def _cases(entry: Mapping[str, Any], sets: Mapping[str, list[str]]) -> Iterator[Case]:
    """One case a rank: several ranks in an entry are several cases, several numbers of tasks are one."""
    named = {key: _methods(entry[key], sets) for key in ("methods", "refresh", "memory") if key in entry}
    for rank in _listed(entry.get("rank")):
        tasks = tuple(_listed(entry.get("tasks")))
        yield _make(Case, {**entry, **named, "rank": rank, "tasks": tasks}, "cases")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _methods(value: str | list[str], sets: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Names of methods and of sets of methods, as names of methods in the order of the registry."""
    found = {name for entry in _listed(value) for name in sets.get(entry, [entry])}
    unknown = sorted(found - METHODS.keys())
    if unknown:
        raise ValueError(f"methods {unknown} are not known; there are {list(METHODS)} and the sets {list(sets)}")
    return tuple(name for name in METHODS if name in found)


def _make(kind: type, values: Mapping[str, Any], where: str) -> Any:
    known = {item.name for item in fields(kind)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(f"{where}: {unknown} are no settings; there are {sorted(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _check(config: Config) -> None:
    for name in ("threads", "rounds", "sequence_length", "update_proj_gap"):
        _check_positive(name, getattr(config, name))
    for item in fields(config.refresh):
        _check_positive(f"refresh.{item.name}", getattr(config.refresh, item.name))
    _check_among("architecture", (spec.get("architecture") for spec in config.models.values()), ARCHITECTURES)
    _check_among("model", (case.model for case in config.cases), config.models)
    _check_among("measure", (target.measure for target in config.targets), MEASURES)
    _check_among("method", (target.method for target in config.targets), METHODS)
    _check_among("against", (target.against for target in config.targets if target.against), METHODS)
    _check_among("targets' model", (target.model for target in config.targets if target.model), config.models)
    names = [case.name for case in config.cases]
    if not names:
        raise ValueError("cases is empty: there is nothing to measure")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"cases: {twice} appear twice, but a result file belongs to one case: join their methods")
    for case in config.cases:
        for name in ("tokens", "rank", *(["rounds"] if case.rounds is not None else [])):
            _check_positive(f"case {case.name}: {name}", getattr(case, name))
        for tasks in case.tasks:
            _check_positive(f"case {case.name}: tasks", tasks)
        extra = sorted({*case.refresh, *case.memory} - {*case.methods})
        if extra:
            raise ValueError(f"case {case.name}: refresh and memory name {extra}, which methods lacks: add them there")


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} has to be a positive whole number")


def _check_among(name: str, values: Iterable[object], known: Iterable[str]) -> None:
    unknown = [value for value in values if value not in known]
    if unknown:
        raise ValueError(f"{name}={unknown[0]!r} is not known; there are {list(known)}")
