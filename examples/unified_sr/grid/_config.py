"""The file of a grid: what is to be run; names of methods and settings are looked up only where they are used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ..checking import checked
from ..config import SECTIONS, parse_pairs, read_yaml
from ..metrics import CUTOFFS
from ..settings import Number, Section, flatten

RESERVED = ("data.source", "method.name", "seed", "evaluation.split")
"""Settings that the grid itself gives to each run."""

INTACT = "intact-model"
"""The folder beside those of the data sets with what was measured of the model before training."""

TAKEN = (".", "..", INTACT)
"""Names of folders that are none of a data set or a method."""

METRICS = [f"{name}@{k}" for name in ("hit", "ndcg", "mrr", "map") for k in CUTOFFS]


def _given(value: Any) -> dict[str, Any]:
    settings = flatten(_mapping(value))
    for key in RESERVED:
        if key in settings:
            raise ValueError(f"cannot set {key!r}: the grid gives it to each run")
    return settings


def _mapping(value: Any) -> dict[str, Any]:
    """YAML reads a key with nothing behind it as null."""
    if not isinstance(value, (dict, type(None))):
        raise ValueError(f"must be a mapping, got {value!r}")
    return value or {}


def _distinct(values: Sequence[Any]) -> Sequence[Any]:
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"must not hold {repeated} more than once; give each a value or a name of its own")
    return values


def _folder(name: str) -> str:
    if not name or "/" in name:
        raise ValueError(f"needs a name that is text without '/', got {name!r}")
    if name in TAKEN:
        raise ValueError(f"needs a name that is none of {', '.join(TAKEN)}, which are other folders, got {name!r}")
    return name


def _metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"must be one of {', '.join(METRICS)}, got {name!r}")
    return name


def _by_name(items: Any) -> dict[str, Any]:
    if not isinstance(items, list) or not items or not all(isinstance(item, (str, dict)) for item in items):
        raise ValueError(f"must be a list of names and mappings, got {items!r}")
    entries = [{"method": item} if isinstance(item, str) else item for item in items]
    names = [str(entry.get("name", entry.get("method"))) for entry in entries]
    _distinct(names)
    return {name: {"name": name, "method": name, **entry} for name, entry in zip(names, entries, strict=True)}


Given = Annotated[dict[str, Any], BeforeValidator(_given)]
"""Settings of runs by ``section.key``."""
Name = Annotated[str, AfterValidator(_folder)]
Seed = Annotated[int, Field(ge=0)]
Seeds = Annotated[tuple[Seed, ...], Field(strict=False, min_length=1), AfterValidator(_distinct)]
Rate = Annotated[Number, Field(gt=0)]
Rates = Annotated[
    tuple[Rate, ...], Field(strict=False), AfterValidator(_distinct), AfterValidator(lambda rates: tuple(sorted(rates)))
]


class Part(Section):
    """A part of a grid's file; an unknown key is answered with the known one that is like it."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, content: Any) -> dict[str, Any]:
        found = _mapping(cls._long_form(content))
        known = list(cls.model_fields)
        for key in found:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the known ones are {', '.join(known)}"
                raise ValueError(f"has no key {key!r}; {hint}")
        return found

    @classmethod
    def _long_form(cls, content: Any) -> Any:
        return content


class Data(Part):
    """A data set of a grid: its name or folder, null where the command line must give it, and settings of its runs."""

    source: str | None = None
    settings: Given = Field({})

    @classmethod
    def _long_form(cls, content: Any) -> Any:
        return {"source": content} if isinstance(content, str) else content


class Selection(Part):
    """How a learning rate is chosen: the one whose trial ranks the validation examples best.

    ``settings`` are those of the trials, over those of the method, such as fewer steps. Without any a trial is trained
    as the run is, and the run with the trials' seed at the chosen rate is its trial.
    """

    rates: Rates = Field((), description="of the first trials; with none, the method keeps its rate")
    trials: int | None = Field(None, description="rates that are tried, the first ones included; null: these alone")
    seed: Seed = Field(0, description="of the trials")
    metric: Annotated[str, AfterValidator(_metric)] = Field(
        "ndcg@10", description="whose mean over the trained tasks is compared"
    )
    max_perplexity_increase: Number | None = Field(
        None, ge=0, description="share by which a trial may raise the perplexity of general text; null: any"
    )
    settings: Given = Field({})


class Entry(Part):
    """A method of a grid."""

    name: Name = Field(description="of its folder")
    method: str = Field(description="whose settings these are")
    settings: Given = Field({})
    seeds: Seeds = Field((), description="of its runs; those of the grid unless given")
    rates: Rates = Field((), description="short for those of select")
    select: Selection = Field(Selection(), description="over that of the grid")


class GridFile(Part):
    """What stands in the file; the settings of all runs may hold sections for single methods, as the file of a run."""

    data: Annotated[dict[Name, Data], BeforeValidator(_mapping)] = Field({})
    seeds: Seeds = (0,)
    settings: Annotated[dict[str, Any], BeforeValidator(_mapping)] = Field({})
    select: Selection = Selection()
    methods: Annotated[dict[str, Entry], BeforeValidator(_by_name)] = Field(None, validate_default=True)


class _Flat(Section):
    """Settings that are checked by themselves, under the names by which a user knows them."""

    settings: Given
    sections: Annotated[dict[str, Given], BeforeValidator(_mapping)] = Field(alias=f"settings.{SECTIONS}")
    overrides: Given = Field(alias="--set")


@dataclass(frozen=True)
class Grid:
    """What is to be run.

    Args:
        data: name of a folder -> the data set.
        settings: of all runs.
        sections: method -> settings of this method, and of its variants.
        entries: the methods in order, each with all its seeds and its whole rule of choice.
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
        path: a YAML file with the keys of ``GridFile``.
        data: texts ``NAME=SOURCE`` that add to the file's ``data``, or give one of them this source.
        pairs: texts ``key=value``: settings that win over the file's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming what is missing, unknown or of the wrong kind.
    """
    where = f"the grid {str(path)!r}"
    file = checked(GridFile, read_yaml(path), "{} of " + where, where)
    shared = dict(file.settings)
    own = shared.pop(SECTIONS, None)
    values = {"settings": shared, f"settings.{SECTIONS}": own, "--set": parse_pairs(pairs)}
    flat = checked(_Flat, values, "{} of " + where)
    chosen = dict(file.data)
    for name, source in _sources(data).items():
        chosen[name] = chosen.get(name, Data()).model_copy(update={"source": source})
    if not chosen:
        raise ValueError(f"data of {where} must name at least one data set")
    entries = tuple(_completed(entry, file, where) for entry in file.methods.values())
    return Grid(chosen, flat.settings, flat.sections, entries, flat.overrides)


def _completed(entry: Entry, file: GridFile, where: str) -> Entry:
    """With the grid's seeds and rule of choice, as far as it has none of its own."""
    own = {key: getattr(entry.select, key) for key in entry.select.model_fields_set}
    rates = {"rates": entry.rates} if "rates" in entry.model_fields_set else {}
    select = file.select.model_copy(update={**own, **rates})
    if select.trials is not None and select.trials < len(select.rates):
        raise ValueError(
            f"trials of select of the method {entry.name!r} of {where} counts all trials, so it must be at least the "
            f"number of rates, {len(select.rates)}, got {select.trials}"
        )
    return entry.model_copy(update={"seeds": entry.seeds or file.seeds, "select": select, "rates": select.rates})


def _sources(pairs: Iterable[str]) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in pairs)
    for name, source in found.items():
        if not name or not source or "/" in name or name in TAKEN:
            raise ValueError(
                f"--data takes NAME=SOURCE, such as shop=data/shop, with a name that is none of {', '.join(TAKEN)}, "
                f"got {name!r} and {source!r}"
            )
    return found
