"""The file of a grid: what is to be run; names of methods and settings are looked up only where they are used."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import SECTIONS, parse_pairs, read_yaml
from ..metrics import CUTOFFS
from ..settings import flatten

KEYS = ("data", "seeds", "settings", "select", "methods")
DATA_KEYS = ("source", "settings")
ENTRY_KEYS = ("name", "method", "settings", "seeds", "rates", "select")
SELECT_KEYS = ("rates", "trials", "seed", "metric", "max_perplexity_increase", "settings")
RESERVED = ("data.source", "method.name", "seed", "evaluation.split")
"""Settings that the grid itself gives to each run."""


@dataclass(frozen=True)
class Data:
    """A data set of a grid.

    Args:
        source: its name or folder; ``None`` where the command line must give it.
        settings: of all runs on it, such as how it is filtered.
    """

    source: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """How a learning rate is chosen: the one whose trial ranks the validation examples best.

    Args:
        seed: of the trials.
        metric: whose mean over the tasks is compared.
        max_perplexity_increase: share by which a trial may raise the perplexity of general text; ``None``: any.
        settings: of the trials, over those of the method, such as fewer steps; without any a trial is trained as the
            run is, and the run with the trials' seed at the chosen rate is its trial.
        trials: how many rates are tried, the first ones included, see ``next_rate``; ``None``: these alone.
    """

    seed: int = 0
    metric: str = "ndcg@10"
    max_perplexity_increase: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    trials: int | None = None


@dataclass(frozen=True)
class Entry:
    """A method of a grid.

    Args:
        name: of its folder.
        method: whose settings these are.
        settings: of its own.
        seeds: of its runs.
        rates: learning rates of its first trials; with none, or where settings name ``lr``, the method keeps its rate.
        selection: how one of them is chosen.
    """

    name: str
    method: str
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    selection: Selection


@dataclass(frozen=True)
class Grid:
    """What is to be run.

    Args:
        data: name of a folder -> the data set.
        settings: of all runs.
        sections: method -> settings of this method, and of its variants.
        entries: the methods in order.
        overrides: settings that win over all others.
    """

    data: Mapping[str, Data]
    settings: Mapping[str, Any]
    sections: Mapping[str, Mapping[str, Any]]
    entries: tuple[Entry, ...]
    overrides: Mapping[str, Any]


def read_grid(path: str | Path, *, data: Iterable[str] = (), pairs: Iterable[str] = ()) -> Grid:
    """Read a grid's file.

    Args:
        path: a YAML file with the keys ``data``, ``methods`` and optionally ``seeds``, ``settings`` and ``select``.
            ``settings`` are those of the runs and may hold sections for single methods, as the file of a run.
        data: texts ``NAME=SOURCE`` that add to the file's ``data``, or give one of them this source.
        pairs: texts ``key=value``: settings that win over the file's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming what is missing, unknown or of the wrong kind.
    """
    content = read_yaml(path)
    where = f"the grid {str(path)!r}"
    _check_keys(content, KEYS, where)
    overrides = _settings(parse_pairs(pairs), "--set")
    chosen = {
        name: _data(item, name, where) for name, item in _mapping(content.get("data"), f"data of {where}").items()
    }
    for name, source in _sources(data).items():
        chosen[name] = replace(chosen.get(name, Data()), source=source)
    if not chosen:
        raise ValueError(f"data of {where} must name at least one data set")
    select = _select(content.get("select"), where)
    seeds = _seeds(content.get("seeds", [0]), where)
    found = content.get("methods")
    if not isinstance(found, list) or not found:
        raise ValueError(f"methods of {where} must be a list of names and mappings, got {found!r}")
    entries = tuple(_entry(item, seeds, select, where) for item in found)
    _check_unique([entry.name for entry in entries], f"methods of {where}")
    shared = _mapping(content.get("settings"), f"settings of {where}")
    sections = {
        name: _settings(section, f"settings.{SECTIONS}.{name} of {where}")
        for name, section in _mapping(shared.pop(SECTIONS, None), f"settings.{SECTIONS} of {where}").items()
    }
    settings = _settings(shared, f"settings of {where}")
    return Grid(chosen, settings, sections, entries, overrides)


def _data(item: Any, name: str, grid: str) -> Data:
    if isinstance(item, (str, type(None))):
        return Data(item)
    where = f"the data {name!r} of {grid}"
    content = _mapping(item, where)
    _check_keys(content, DATA_KEYS, where)
    source = content.get("source")
    if not isinstance(source, (str, type(None))):
        raise ValueError(f"source of {where} must be the name of a data set or a folder, got {source!r}")
    return Data(source, _settings(content.get("settings"), where))


def _entry(item: Any, seeds: tuple[int, ...], select: Mapping[str, Any], grid: str) -> Entry:
    content = {"method": item} if isinstance(item, str) else _mapping(item, f"an entry of methods of {grid}")
    method = content.get("method", content.get("name"))
    name = content.get("name", method)
    where = f"the method {name!r} of {grid}"
    _check_keys(content, ENTRY_KEYS, where)
    if not isinstance(name, str) or not isinstance(method, str) or not name or "/" in name:
        raise ValueError(f"{where} needs a name that is text without '/', got {content!r}")
    settings = _settings(_mapping(content.get("settings"), f"settings of {where}"), where)
    select = {**select, **_select(content.get("select"), where)}
    rates = _rates(content.get("rates", select.get("rates", [])), where)
    selection = _selection(select, where)
    if selection.trials is not None and selection.trials < len(rates):
        raise ValueError(
            f"trials of select of {where} counts all trials, so it must be at least the number of rates, {len(rates)}, "
            f"got {selection.trials}"
        )
    return Entry(name, method, settings, _seeds(content.get("seeds", list(seeds)), where), rates, selection)


def _select(content: Any, where: str) -> dict[str, Any]:
    select = _mapping(content, f"select of {where}")
    _check_keys(select, SELECT_KEYS, f"select of {where}")
    return select


def _selection(content: Mapping[str, Any], grid: str) -> Selection:
    chosen = {key: value for key, value in content.items() if key != "rates"}
    selection = Selection(**{**chosen, "settings": _settings(chosen.get("settings") or {}, f"select of {grid}")})
    metrics = [f"{name}@{k}" for name in ("hit", "ndcg", "mrr", "map") for k in CUTOFFS]
    if selection.metric not in metrics:
        raise ValueError(f"metric of select must be one of {', '.join(metrics)}, got {selection.metric!r}")
    limit = selection.max_perplexity_increase
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit < 0):
        raise ValueError(f"max_perplexity_increase of select must be null or a share such as 0.05, got {limit!r}")
    _seeds([selection.seed], f"select of {grid}")
    if selection.trials is not None and (not isinstance(selection.trials, int) or isinstance(selection.trials, bool)):
        raise ValueError(f"trials of select must be null or a whole number, got {selection.trials!r}")
    return selection


def _settings(content: Any, where: str) -> dict[str, Any]:
    settings = flatten(_mapping(content, f"settings of {where}"))
    for key in RESERVED:
        if key in settings:
            raise ValueError(f"{where} cannot set {key!r}: the grid gives it to each run")
    return settings


def _sources(pairs: Iterable[str]) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in pairs)
    for name, source in found.items():
        if not name or not source or "/" in name:
            raise ValueError(f"--data takes NAME=SOURCE, such as shop=data/shop, got {name!r} and {source!r}")
    return found


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in value)
    if not whole or not value or min(value) < 0:
        raise ValueError(f"seeds of {where} must be a list of whole numbers from 0, got {value!r}")
    _check_unique(value, f"seeds of {where}")
    return tuple(value)


def _rates(value: Any, where: str) -> tuple[float, ...]:
    try:
        # YAML 1.1 reads 6e-4, without a dot, as text.
        rates = tuple(float(rate) for rate in value) if isinstance(value, list) else (0.0,)
    except (TypeError, ValueError):
        rates = (0.0,)
    if any(not 0 < rate < math.inf for rate in rates):
        raise ValueError(f"rates of {where} must be a list of learning rates above 0, got {value!r}")
    _check_unique(rates, f"rates of {where}")
    return tuple(sorted(rates))


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where} must be a mapping, got {value!r}")
    return dict(value)


def _check_keys(content: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the known ones are {', '.join(known)}"
            raise ValueError(f"{where} has no key {key!r}; {hint}")


def _check_unique(values: Collection[Any], where: str) -> None:
    repeated = sorted({value for value in values if list(values).count(value) > 1})
    if repeated:
        raise ValueError(f"{where} hold {repeated} more than once; give each a name of its own")
