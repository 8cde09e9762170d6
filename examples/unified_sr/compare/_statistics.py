"""Mean and spread over seeds, paired tests over queries, and Holm's correction for many of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 9999
"""Sign changes that the permutation test draws; it takes all of them where there are fewer."""


@dataclass(frozen=True)
class Paired:
    """A method against a baseline on the queries that both have ranked.

    Args:
        queries: how many.
        difference: mean of the method's values less the baseline's.
        t_test: two-sided p-value of the paired t-test.
        permutation: two-sided p-value of the paired permutation test, which assumes no distribution.
    """

    queries: int
    difference: float
    t_test: float
    permutation: float


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation; of one value there is none.

    Raises:
        ValueError: if there is no value.

    Example:
        >>> mean_and_deviation([1.0, 3.0]), mean_and_deviation([2.0])
        ((2.0, 1.4142135623730951), (2.0, None))
    """
    if not values:
        raise ValueError("values is empty: there is nothing to average")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def paired(method: Mapping[str, float], baseline: Mapping[str, float], seed: int = 0) -> Paired | None:
    """Test whether a method's values differ from a baseline's, query by query.

    Both p-values are 1 where no query differs.

    Args:
        method: qid -> value.
        baseline: qid -> value; queries that only one of the two has are left out.
        seed: of the permutation test.

    Returns:
        ``None`` if fewer than two queries are common.
    """
    common = [qid for qid in method if qid in baseline]
    if len(common) < 2:
        return None
    differences = np.array([method[qid] - baseline[qid] for qid in common])
    if not differences.any():
        return Paired(len(common), 0.0, 1.0, 1.0)
    # Equal differences have no spread: t is infinite, which scipy warns of.
    t_test = 0.0 if np.ptp(differences) == 0 else float(stats.ttest_1samp(differences, 0.0).pvalue)
    found: Any = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=256,
        random_state=np.random.default_rng(seed),
    )
    return Paired(len(common), float(differences.mean()), t_test, float(found.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given: comparing them with alpha bounds the chance of any error.

    The i-th smallest of m is multiplied by m - i + 1; none may be below a smaller one's, or above 1.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics, 1979.

    Raises:
        ValueError: if a value does not lie in [0, 1].

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"p_values must lie in [0, 1], got {list(p_values)}")
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = highest
    return adjusted
