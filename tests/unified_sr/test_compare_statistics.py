"""Tests over queries agree with scipy's own functions and with slow twins that follow the definitions."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from examples.unified_sr.compare import _statistics, holm, mean_and_deviation, paired

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def named(values: list[float]) -> dict[str, float]:
    return {f"q{number}": value for number, value in enumerate(values)}


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_mean_and_deviation_are_numpys(values: list[float]) -> None:
    mean, deviation = mean_and_deviation(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    assert deviation == pytest.approx(np.std(values, ddof=1), abs=1e-9)


def test_one_value_has_no_deviation_and_none_has_no_mean() -> None:
    assert mean_and_deviation([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="values is empty"):
        mean_and_deviation([])


@pytest.mark.parametrize("seed", range(5))
def test_the_t_test_is_scipys(seed: int) -> None:
    draw = np.random.default_rng(seed)
    method, baseline = draw.random(40), draw.random(40)
    found = paired(named(list(method)), named(list(baseline)))
    assert found is not None
    assert found.queries == 40
    assert found.difference == pytest.approx((method - baseline).mean())
    assert found.t_test == pytest.approx(stats.ttest_rel(method, baseline).pvalue)
    # The permutation test has no closed form; for 40 queries of similar spread the two nearly agree.
    assert found.permutation == pytest.approx(found.t_test, abs=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_the_permutation_test_of_few_queries_counts_all_signs(seed: int) -> None:
    draw = np.random.default_rng(seed)
    method, baseline = draw.random(8), draw.random(8)
    differences = method - baseline
    means = [float(np.mean(differences * signs)) for signs in itertools.product((1, -1), repeat=8)]
    observed = float(differences.mean())
    lower = sum(mean <= observed + 1e-12 for mean in means) / len(means)
    higher = sum(mean >= observed - 1e-12 for mean in means) / len(means)
    found = paired(named(list(method)), named(list(baseline)))
    assert found is not None
    assert found.permutation == pytest.approx(min(1.0, 2 * min(lower, higher)))


def test_p_values_of_no_effect_are_uniform() -> None:
    draw = np.random.default_rng(0)
    found = [paired(named(list(draw.random(12))), named(list(draw.random(12)))) for _ in range(80)]
    for name in ("t_test", "permutation"):
        assert stats.kstest([getattr(test, name) for test in found], "uniform").pvalue > 0.01


def test_edge_cases() -> None:
    values = named([0.1, 0.5, 0.5])
    same = paired(values, values)
    assert same is not None
    assert (same.difference, same.t_test, same.permutation) == (0.0, 1.0, 1.0)
    shifted = paired({qid: value + 0.25 for qid, value in named([0.5] * 20).items()}, named([0.5] * 20))
    assert shifted is not None
    assert (shifted.t_test, shifted.difference) == (0.0, 0.25)
    assert shifted.permutation < 0.001
    assert paired(values, {"q0": 0.0, "other": 1.0}) is None, "one query is common"
    some = paired(values, {"q0": 0.0, "q2": 0.5, "other": 1.0})
    assert some is not None
    assert (some.queries, some.difference) == (2, pytest.approx(0.05))
    assert paired(values, {"q0": 0.3, "q1": 0.1, "q2": 0.2}) == paired(values, {"q0": 0.3, "q1": 0.1, "q2": 0.2})


def rejected(p_values: list[float], alpha: float) -> list[bool]:
    """Holm's procedure as he states it: step through the sorted values until one is too large."""
    result = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for position, index in enumerate(order):
        if p_values[index] > alpha / (len(p_values) - position):
            break
        result[index] = True
    return result


@given(P_VALUES, st.floats(0.001, 0.5))
def test_holm_rejects_what_the_procedure_rejects(p_values: list[float], alpha: float) -> None:
    adjusted = holm(p_values)
    margin = [abs(value - alpha) > 1e-9 for value in adjusted]
    for value, reject, clear in zip(adjusted, rejected(p_values, alpha), margin, strict=True):
        assert not clear or (value <= alpha) == reject


@given(P_VALUES)
def test_holm_is_never_below_the_values_nor_above_bonferroni(p_values: list[float]) -> None:
    for value, adjusted in zip(p_values, holm(p_values), strict=True):
        assert value <= adjusted <= min(1.0, len(p_values) * value) + 1e-12
    assert holm(p_values[::-1]) == holm(p_values)[::-1]


def test_holm_refuses_what_is_no_probability() -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        holm([0.1, float("nan")])
    assert holm([]) == []
    assert doctest.testmod(_statistics).failed == 0
