"""What other features have outside the protected directions: exact, bounded for sketches, and less the more is seen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradsub import NullSpace

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**16)


def features(rows: int, dimension: int, seed: int, scale: float = 1.0) -> Tensor:
    """Rows of a decaying spectrum in the same basis for every seed."""
    basis = torch.linalg.qr(torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(0)).double()).Q
    deviations = torch.arange(1, dimension + 1, dtype=torch.float64) ** -1.0 * scale
    random = torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return random * deviations @ basis.mT


def space(rows: Tensor, **options: object) -> NullSpace:
    found = NullSpace(**options)
    found.update("layer", rows)
    return found


@quick
@given(
    dimension=st.integers(2, 24),
    rows=st.integers(1, 60),
    energy=st.floats(0.1, 1.0),
    exponent=st.integers(-12, 12),
    seed=seeds,
)
def test_it_is_the_mean_square_of_what_the_projector_leaves(dimension, rows, energy, exponent, seed):
    null_space = space(features(rows, dimension, seed), energy=energy)
    other = features(17, dimension, seed + 1, 10.0**exponent)
    K = null_space.basis("layer", torch.float64)
    expected = float((other - other @ K @ K.mT).square().sum() / other.square().sum())
    found = null_space.residual_energy(space(other))["layer"]
    assert 0.0 <= found <= 1.0
    assert abs(found - expected) < 1e-9


@quick
@given(rows=st.integers(1, 60), energy=st.floats(0.05, 0.99), seed=seeds)
def test_what_it_was_collected_from_is_covered_as_asked(rows, energy, seed):
    null_space = space(features(rows, 12, seed), energy=energy)
    assert null_space.residual_energy(null_space)["layer"] <= 1 - energy + 1e-12


@quick
@given(capacity=st.integers(2, 11), rows=st.integers(1, 60), seed=seeds)
def test_of_a_sketch_it_is_an_upper_bound_by_as_much_as_its_error_in_each_direction(capacity, rows, seed):
    null_space = space(features(40, 12, seed), max_rank=4)
    other = features(rows, 12, seed + 1)
    exact = null_space.residual_energy(space(other))["layer"]
    sketch = space(other, layer_memory_budget=capacity * 12 * 8)
    found = null_space.residual_energy(sketch)["layer"]
    mean_square = float(other.square().sum()) / rows
    assert exact - 1e-9 <= found <= min(1.0, exact + 4 * sketch.error_bound("layer") / mean_square + 1e-9)


def test_more_data_covers_fresh_data_better():
    held_out = space(features(2000, 64, 1))
    few, many = (space(features(rows, 64, 2), energy=0.97).residual_energy(held_out)["layer"] for rows in (80, 4000))
    assert many < few


def test_the_layers_of_both_in_the_order_here():
    here, there = NullSpace(energy=0.9), NullSpace()
    for name in ("b", "a", "only here"):
        here.update(name, features(9, 4, 1))
    for name in ("only there", "a", "b"):
        there.update(name, features(9, 4, 2))
    assert list(here.residual_energy(there)) == ["b", "a"]


def test_nothing_leaks_where_there_is_nothing():
    assert space(features(9, 4, 1)).residual_energy(space(torch.zeros(3, 4))) == {"layer": 0.0}


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (lambda: space(features(9, 4, 1), side="output"), "held_out.side='output' must be 'input'"),
        (NullSpace, r"held_out knows \[\], none of the layers here: \['layer'\]"),
        (lambda: space(features(9, 5, 1)), "held_out has 5 features for 'layer', here there are 4"),
    ],
)
def test_what_does_not_fit_is_named(held_out, message):
    with pytest.raises(ValueError, match=message):
        space(features(9, 4, 1)).residual_energy(held_out())


def test_features_of_another_scale_are_refused():
    layer = torch.nn.Linear(6, 2)
    by_energy = NullSpace().collect(layer, [features(20, 6, 1).float()])
    by_threshold = NullSpace(threshold=1e-3).collect(layer, [features(20, 6, 2).float()])
    with pytest.raises(ValueError, match="with normalize=True, here they are with normalize=False"):
        by_threshold.residual_energy(by_energy)
    again = NullSpace().collect(layer, [features(20, 6, 2).float()], normalize=False)
    assert 0.0 <= by_threshold.residual_energy(again)[""] <= 1.0
