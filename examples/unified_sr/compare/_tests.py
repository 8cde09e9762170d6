"""Paired tests over queries, Holm's correction for many of them, and the baselines that they are against."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from ._groups import OWN

LANGUAGE_MODEL = "language model"
RESAMPLES = 9999
"""Sign changes that the permutation test draws; it takes all of them where there are fewer."""

BATCH = 1000
"""Of these that are in memory at once."""


def values_of(runs: pd.DataFrame, queries: pd.DataFrame, task: str, metric: str) -> pd.DataFrame:
    """Return the metric of each query (row) and group (column), averaged over the seeds that have it.

    Args:
        runs: with a column ``group``.
        queries: rows of ``queries.parquet``.
        task: whose queries are wanted.
        metric: of a query.
    """
    found = queries[queries["task"] == task].reindex(columns=["run", "query", metric])
    found = found.merge(runs[["run", "group"]], on="run").dropna(subset=metric).astype({metric: float})
    wide = found.groupby(["query", "group"], observed=True)[metric].mean().unstack("group")
    return wide.reindex(columns=runs["group"].drop_duplicates())


def baselines_of(runs: pd.DataFrame, values: pd.DataFrame, tasks: Sequence[str]) -> dict[str, str]:
    """Return what the others are tested against: kind -> its best group that is no variant of GEMS.

    The kinds are ``any``; ``trained``, what trains a model; and ``LANGUAGE_MODEL``, what trains a language model on all
    tasks. They are found on the same queries that they are tested on, so they are rather too good than too weak.

    Args:
        runs: with a column ``group``.
        values: of ``values_of``.
        tasks: of the data.
    """
    firsts = runs.drop_duplicates("group").set_index("group")
    rivals = firsts[~firsts["method"].str.startswith(OWN)]
    trained = rivals[rivals["trained_parameters"] > 0]
    every = trained["trained_tasks"].map(lambda names: set(tasks) <= set(str(names).split(","))).astype(bool)
    kinds = {"any": rivals, "trained": trained, LANGUAGE_MODEL: trained[trained["perplexity"].notna() & every]}
    means = {kind: values[list(groups.index)].mean().dropna() for kind, groups in kinds.items()}
    return {kind: str(found.idxmax()) for kind, found in means.items() if not found.empty}


def against(values: pd.DataFrame, baselines: Sequence[str]) -> pd.DataFrame:
    """Test all groups against each of the baselines.

    Args:
        values: of ``values_of``.
        baselines: groups.

    Returns:
        One row a baseline and other group: the columns of ``paired``, and ``t_test_holm`` and ``permutation_holm``, for
        which all groups of the baseline count.
    """
    families = []
    for baseline in baselines:
        found = paired(values.drop(columns=baseline), values[baseline])
        for name in ("t_test", "permutation"):
            found[f"{name}_holm"] = holm(found[name])
        families.append(found.reset_index(names="group").assign(baseline=baseline))
    return (
        pd.concat(families, ignore_index=True)
        if families
        else pd.DataFrame(columns=["group", "t_test_holm", "baseline"])
    )


def paired(methods: pd.DataFrame, baseline: pd.Series, seed: int = 0) -> pd.DataFrame:
    """Test whether the values of methods differ from a baseline's, query by query.

    Args:
        methods: query (row) and method (column) -> value; NaN, as in the baseline, leaves the query out.
        baseline: query -> value.
        seed: of the permutation test.

    Returns:
        One row a method: ``queries`` that both have, mean ``difference``, and the two-sided p-values ``t_test`` and
        ``permutation``, which assumes no distribution. Both are 1 where no query differs; all but ``queries`` are NaN
        for fewer than two queries.
    """
    differences = methods.sub(baseline, axis=0)
    found = pd.DataFrame({"queries": differences.count(), "difference": differences.mean()}, index=methods.columns)
    found["t_test"] = differences.apply(_t_test)
    found["permutation"] = _permutation(differences.fillna(0.0).to_numpy(), np.random.default_rng(seed))
    found.loc[found["queries"] < 2, ["difference", "t_test", "permutation"]] = np.nan
    return found


def _t_test(differences: pd.Series) -> float:
    known = differences.dropna().to_numpy()
    if len(known) < 2:
        return np.nan
    # Equal differences have no spread: t is infinite, or no number, which scipy warns of.
    if np.ptp(known) == 0:
        return 0.0 if known[0] else 1.0
    return float(stats.ttest_1samp(known, 0.0).pvalue)


def _permutation(differences: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Of each column the share of sign changes whose mean is as extreme; the same signs serve all columns.

    scipy's ``permutation_test`` draws signs for each column, which takes a hundred times as long. A query that is left
    out is 0 and changes no sum.
    """
    count = len(differences)
    every = 2**count <= RESAMPLES
    if every:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count))).reshape(2**count, count)
        drawn: Iterable[np.ndarray] = [signs]
    else:
        sizes = [min(BATCH, RESAMPLES - start) for start in range(0, RESAMPLES, BATCH)]
        drawn = (2.0 * generator.integers(0, 2, (size, count)) - 1 for size in sizes)
    observed = differences.sum(axis=0)
    slack = 1e-12 * np.abs(differences).sum(axis=0)  # sums in another order differ in their last digits
    below, above, total = np.zeros(len(observed)), np.zeros(len(observed)), 0
    for signs in drawn:
        sums = signs @ differences
        below += (sums <= observed + slack).sum(axis=0)
        above += (sums >= observed - slack).sum(axis=0)
        total += len(signs)
    extra = 0 if every else 1  # the observed signs are one of the draws
    return np.minimum(1.0, 2 * (np.minimum(below, above) + extra) / (total + extra))


def holm(p_values: pd.Series) -> pd.Series:
    """Return Holm's adjusted p-values: comparing them with alpha bounds the chance of any error.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics, 1979.

    Args:
        p_values: of one family; NaN is no test, and stays.

    Raises:
        ValueError: if a value does not lie in [0, 1].

    Example:
        >>> import pandas as pd
        >>> [round(p, 3) for p in holm(pd.Series([0.01, 0.04, 0.03]))]
        [0.03, 0.06, 0.06]
    """
    from statsmodels.stats.multitest import multipletests

    known = p_values.dropna()
    if not known.between(0, 1).all():
        raise ValueError(f"p_values must lie in [0, 1], got {list(known)}")
    if known.empty:
        return p_values
    return pd.Series(multipletests(known.to_numpy(), method="holm")[1], known.index).reindex(p_values.index)
