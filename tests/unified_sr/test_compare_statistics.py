"""Tests over queries agree with scipy's own functions and with slow twins that follow the definitions."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from examples.unified_sr.compare import _tests
from examples.unified_sr.compare._tests import holm, paired


def series(values: list[float] | np.ndarray) -> pd.Series:
    return pd.Series(values, [f"q{number}" for number in range(len(values))], dtype=float)


def one(method: pd.Series, baseline: pd.Series, seed: int = 0) -> pd.Series:
    """The tests of one method, as a row."""
    return paired(method.to_frame("method"), baseline, seed).loc["method"]


@pytest.mark.parametrize("seed", range(3))
def test_both_tests_are_scipys(seed: int) -> None:
    draw = np.random.default_rng(seed)
    method, baseline = draw.random(40), draw.random(40)
    found = one(series(method), series(baseline))
    assert found["queries"] == 40
    assert found["difference"] == pytest.approx((method - baseline).mean())
    assert found["t_test"] == pytest.approx(stats.ttest_rel(method, baseline).pvalue)
    options = {"permutation_type": "samples", "vectorized": True, "n_resamples": 9999}
    wanted = stats.permutation_test((method - baseline,), np.mean, rng=np.random.default_rng(1), **options)
    error = (wanted.pvalue * (1 - wanted.pvalue) / 9999) ** 0.5  # of each of the two draws
    assert found["permutation"] == pytest.approx(wanted.pvalue, abs=6 * error + 1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_permutation_test_of_few_queries_counts_all_signs(seed: int) -> None:
    draw = np.random.default_rng(seed)
    method, baseline = draw.random(8), draw.random(8)
    differences = method - baseline
    means = [float(np.mean(differences * signs)) for signs in itertools.product((1, -1), repeat=8)]
    observed = float(differences.mean())
    lower = sum(mean <= observed + 1e-12 for mean in means) / len(means)
    higher = sum(mean >= observed - 1e-12 for mean in means) / len(means)
    found = one(series(method), series(baseline))
    assert found["permutation"] == pytest.approx(min(1.0, 2 * min(lower, higher)))


def test_p_values_of_no_effect_are_uniform() -> None:
    draw = np.random.default_rng(0)
    found = paired(pd.DataFrame(draw.random((14, 200))), pd.Series(0.5, range(14)))
    for name in ("t_test", "permutation"):
        assert stats.kstest(found[name], "uniform").pvalue > 0.01


def test_methods_are_tested_alike_together_and_alone() -> None:
    draw = np.random.default_rng(0)
    values = pd.DataFrame(draw.random((50, 4)), columns=list("abcd"))
    values.loc[draw.random(50) < 0.3, "b"] = np.nan
    together = paired(values[["a", "b", "c"]], values["d"])
    for name in "abc":
        pd.testing.assert_series_equal(one(values[name], values["d"]), together.loc[name], check_names=False)
    kept = values["b"].notna()
    left = one(values["b"][kept], values["d"][kept])
    assert (left["queries"], left["t_test"]) == (kept.sum(), together.loc["b", "t_test"])
    assert left["permutation"] == pytest.approx(together.loc["b", "permutation"], abs=0.03)


def test_edge_cases() -> None:
    values = series([0.1, 0.5, 0.5])
    assert list(one(values, values)) == [3, 0.0, 1.0, 1.0]
    shifted = one(series([0.75] * 20), series([0.5] * 20))
    assert (shifted["t_test"], shifted["difference"]) == (0.0, 0.25)
    assert shifted["permutation"] < 0.001
    alone = one(values, pd.Series({"q0": 0.0, "other": 1.0}))
    assert alone["queries"] == 1
    assert alone.drop("queries").isna().all(), "one query is common"
    some = one(values, pd.Series({"q0": 0.0, "q2": 0.5, "other": 1.0}))
    assert (some["queries"], some["difference"]) == (2, pytest.approx(0.05))
    other = series([0.3, 0.1, 0.2])
    pd.testing.assert_series_equal(one(values, other), one(values, other))


def rejected(p_values: list[float], alpha: float) -> list[bool]:
    """Holm's procedure as he states it: step through the sorted values until one is too large."""
    result = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for position, index in enumerate(order):
        if p_values[index] > alpha / (len(p_values) - position):
            break
        result[index] = True
    return result


@pytest.mark.parametrize("seed", range(8))
def test_holm_rejects_what_the_procedure_rejects(seed: int) -> None:
    draw = np.random.default_rng(seed)
    p_values, alpha = list(draw.random(1 + seed) ** 3), float(draw.uniform(0.001, 0.5))
    assert list(holm(pd.Series(p_values)) <= alpha) == rejected(p_values, alpha)


def test_holm_by_hand() -> None:
    """Of five values the smallest counts five times, the next four times, and so on; none falls below one before."""
    found = holm(pd.Series([0.02, 0.01, 0.9, 0.015, 0.6]))
    assert list(found) == pytest.approx([0.06, 0.05, 1.0, 0.06, 1.0])


def test_holm_counts_what_was_tested() -> None:
    found = holm(pd.Series([0.01, np.nan, 0.04], ["a", "b", "c"]))
    assert found["a"] == pytest.approx(0.02)
    assert found["c"] == pytest.approx(0.04)
    assert np.isnan(found["b"])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        holm(pd.Series([0.1, 1.5]))
    assert holm(pd.Series([], dtype=float)).empty
    assert doctest.testmod(_tests).failed == 0
