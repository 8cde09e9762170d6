"""Which runs are on one data set: what their folders are called, and what they were asked."""

from __future__ import annotations

import json
from pathlib import PurePath

import pandas as pd

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
