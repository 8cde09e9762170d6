"""How many directions are protected."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsub import NullSpace

# Rows whose covariance has exactly the eigenvalues 4, 2, 1, 0.5, 0.5, 0 (mean squares; 6 rows in 6 directions).
EIGENVALUES = (4.0, 2.0, 1.0, 0.5, 0.5, 0.0)
ROWS = torch.diag(torch.tensor([6 * value for value in EIGENVALUES], dtype=torch.float64).sqrt())


def count(**options: Any) -> int:
    null_space = NullSpace(**options)
    null_space.update("layer", ROWS)
    return null_space.basis("layer").shape[1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"energy": 0.4}, 1),
        ({"energy": 0.6}, 2),
        ({"energy": 0.74}, 2),
        ({"energy": 0.76}, 3),
        ({"energy": 0.9}, 4),
        ({"energy": 0.99}, 5),
        ({"energy": 1.0}, 5),
        ({}, 5),
        ({"threshold": 5.0}, 0),
        ({"threshold": 1.5}, 2),
        ({"threshold": 0.75}, 3),
        ({"threshold": 1e-9}, 5),
        ({"max_rank": 2}, 2),
        ({"max_rank": 60}, 5),
        ({"energy": 0.9, "max_rank": 3}, 3),
        ({"energy": 0.6, "max_rank": 3}, 2),
        ({"threshold": 0.75, "max_rank": 1}, 1),
    ],
    ids=str,
)
def test_energy_threshold_and_rank(options, expected):
    assert count(**options) == expected


def test_the_threshold_is_absolute_and_the_energy_relative():
    for scale, by_threshold in ((1.0, 3), (10.0, 5), (0.1, 0)):
        absolute, relative = NullSpace(threshold=0.75), NullSpace(energy=0.76)
        for null_space in (absolute, relative):
            null_space.update("layer", ROWS * scale)
        assert absolute.basis("layer").shape[1] == by_threshold
        assert relative.basis("layer").shape[1] == 3


def test_the_threshold_is_the_published_rule():
    """Directions with a smaller eigenvalue are free: K is the complement of the published U_0."""
    rows = torch.randn(400, 7, dtype=torch.float64) * torch.logspace(0, -2, 7, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(rows.T @ rows / 400)
    free = vectors[:, values < 2e-2]
    null_space = NullSpace(side="output", threshold=2e-2)
    null_space.update("layer", rows)
    protected = null_space.basis("layer", torch.float64)
    torch.testing.assert_close(torch.eye(7).double() - protected @ protected.T, free @ free.T)


@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_more_energy_protects_more(first, second):
    low, high = sorted((first, second))
    assert count(energy=low) <= count(energy=high)


def test_directions_come_strongest_first():
    null_space = NullSpace(energy=1.0)
    null_space.update("layer", ROWS.flip(1))
    largest = null_space.basis("layer").abs().argmax(0)
    assert largest.tolist()[:3] == [5, 4, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.5, "threshold": 0.1}, r"energy=0.5 and threshold=0.1 exclude each other"),
        ({"energy": 0.0}, r"energy=0.0 must lie in \(0, 1\]"),
        ({"energy": 1.5}, r"energy=1.5"),
        ({"energy": math.nan}, r"energy=nan"),
        ({"threshold": 0.0}, r"threshold=0.0 must be positive"),
        ({"threshold": math.nan}, r"threshold=nan"),
        ({"max_rank": 0}, r"max_rank=0 must be an integer of at least 1"),
        ({"max_rank": 2.5}, r"max_rank=2.5 must be"),
        ({"side": "both"}, r"side='both' must be 'input' or 'output'"),
    ],
    ids=str,
)
def test_bad_criteria(options, message):
    with pytest.raises(ValueError, match=message):
        NullSpace(**options)


def test_the_representation_says_what_was_chosen():
    null_space = NullSpace(side="output", threshold=0.02)
    assert repr(null_space) == "NullSpace(side='output', threshold=0.02, layers=0)"
    null_space.update("layer", torch.eye(2))
    assert "layers=1" in repr(null_space)
