"""Which runs are on one data set, and which are one row of a table: those of one label and settings, of any seed."""

from __future__ import annotations

import json
from pathlib import PurePath

import pandas as pd

from ..tables import difference, evaluated_differently, without

OWN = "gems"
"""Methods whose name starts with this are what is compared with baselines; all others are baselines."""

Asked = dict[str, set[str]]
"""Task -> its queries."""


def with_data_apart(runs: pd.DataFrame, queries: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with data sets that share the name of their folder called by the folder above it as well.

    A data set may lie elsewhere on another machine: it is the same one if the same queries were ranked.

    Args:
        runs: rows of ``runs.parquet``.
        queries: rows of ``queries.parquet``.
    """
    runs = runs.assign(
        data=runs["data"].astype(str), source=[json.loads(text)["data.source"] for text in runs["settings"]]
    )
    names: dict[str, str] = {}
    for name, members in runs.groupby("data"):
        sources = sorted(set(members["source"]))
        different: list[tuple[str, Asked]] = []
        for source in sources if len(sources) > 1 else ():
            asked = _asked(members.loc[members["source"] == source, "run"], queries)
            same = next((first for first, other in different if _agree(asked, other)), None)
            names[source] = names[same] if same is not None else "/".join(PurePath(source).parts[-2:])
            if same is None:
                different.append((source, asked))
        if len(different) < 2:
            names |= dict.fromkeys(sources, str(name))
    return runs.assign(data=runs["source"].map(names)).drop(columns="source")


def _asked(runs: pd.Series, queries: pd.DataFrame) -> Asked:
    own = queries[queries["run"].isin(set(runs))]
    return {str(task): set(found["query"]) for task, found in own.groupby("task", observed=True)}


def _agree(one: Asked, other: Asked) -> bool:
    shared = one.keys() & other.keys()
    return bool(shared) and all(one[task] == other[task] for task in shared)


def group_runs(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the runs on one data set with a column ``group``, the best group first.

    A group is called as its label, and where that is not unique also by the settings that tell it apart. What does not
    serve all tasks comes last.

    Args:
        runs: rows of ``runs.parquet`` that evaluated the test split.
        metric: whose mean over the tasks orders the groups.

    Raises:
        ValueError: if the runs were evaluated differently, so that their numbers cannot be compared.
    """
    found = evaluated_differently(dict(zip(runs["run"], runs["settings"], strict=True)))
    if found is not None:
        raise ValueError(f"the runs cannot be compared, because they were evaluated differently: {found}")
    runs = runs.assign(group=names_of(runs["label"], runs["settings"].map(without)), score=score(runs, metric))
    means = runs.groupby("group", sort=False)["score"].mean().sort_values(ascending=False, kind="stable")
    return runs.set_index("group").loc[means.index].reset_index()


def names_of(labels: pd.Series, texts: pd.Series) -> list[str]:
    """Return what to call each run: its label, and where runs that differ have it, also by what settings they do.

    Args:
        labels: of runs.
        texts: their settings as JSON text, as far as they are to tell runs apart.
    """
    pairs = list(zip(labels.astype(str), texts, strict=True))
    alike: dict[str, list[str]] = {}
    for label, text in dict.fromkeys(pairs):
        alike.setdefault(label, []).append(text)
    names = {}
    for label, members in alike.items():
        varied = difference(members, absent=True)
        for place, text in enumerate(members):
            own = ", ".join(f"{key}={values[place]}" for key, values in varied.items())
            names[label, text] = f"{label} ({own})" if len(members) > 1 else label
    return [names[pair] for pair in pairs]


def tasks_of(runs: pd.DataFrame) -> list[str]:
    """Return all tasks that any of the runs has ranked."""
    columns = [name for name in runs.columns if name.endswith("_examples") and runs[name].notna().any()]
    return [name.removesuffix("_examples") for name in columns]


def score(runs: pd.DataFrame, metric: str) -> pd.Series:
    """Return the mean of each run's metric over the tasks; NaN if it was not measured for all of them."""
    columns = [f"{task}_{metric}" for task in tasks_of(runs)]
    return runs.reindex(columns=columns).mean(axis=1, skipna=False)


def perplexity_change(runs: pd.DataFrame) -> pd.Series:
    """Return by how many per cent training has changed each run's perplexity of general text."""
    return 100 * (runs["perplexity"] / runs["perplexity_before"] - 1)
