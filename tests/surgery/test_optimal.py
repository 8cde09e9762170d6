"""MGDA and CAGrad: methods that solve an optimisation problem."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsub.surgery import cagrad, mgda

from . import _oracles
from ._samplers import dtypes, few, generator, gradients, scales, seeds, tasks

spreads = st.sampled_from([1.0, 10.0, 1e4])


@few
@given(data=st.data(), K=tasks, scale=scales, dtype=dtypes, seed=seeds, spread=spreads)
def test_mgda_is_optimal(data, K, scale, dtype, seed, spread):
    J = gradients(K, data.draw(st.integers(1, K)), seed=seed, scale=scale, spread=spread)
    weights = mgda((J @ J.mT).to(dtype)).double()
    assert (weights >= 0).all()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-10
    assert abs(weights.sum().item() - 1) < tolerance
    p = weights @ J
    # KKT: no gradient lies before the plane <x, p> = |p|^2, and those with a weight lie on it.
    slack = J @ p - p @ p
    error = (1e-3 if dtype == torch.float32 else 1e-7) * J.norm(dim=1).clamp_min(p.norm()) * J.norm(dim=1).min()
    assert (slack >= -error).all()
    assert (slack[weights > 0] * weights[weights > 0] <= error.max()).all()


@few
@given(data=st.data(), K=st.integers(1, 5), seed=seeds, spread=spreads)
def test_mgda_is_the_best_of_all_faces(data, K, seed, spread):
    J = gradients(K, data.draw(st.integers(1, K)), seed=seed, spread=spread)
    expected = _oracles.shortest_of_all_faces(J)
    found = mgda(J @ J.mT) @ J
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.norm() <= expected.norm() + 1e-7


def test_mgda_of_many_tasks_and_of_equal_ones():
    J = gradients(60, 9, seed=1) + 0.3
    weights = mgda(J @ J.mT)
    p = weights @ J
    assert (J @ p >= p @ p - 1e-9).all()
    J = gradients(1, 1).expand(4, 9)
    torch.testing.assert_close(mgda(J @ J.mT) @ J, J[0])


def test_mgda_of_two_orthogonal_tasks_of_any_size():
    for ratio in (1e-7, 1e-3, 1.0):
        G = torch.diag(torch.tensor([1.0, ratio**2], dtype=torch.float64))
        expected = torch.tensor([ratio**2, 1.0], dtype=torch.float64) / (1 + ratio**2)
        torch.testing.assert_close(mgda(G), expected, rtol=1e-9, atol=0)


@few
@given(K=tasks, scale=scales, dtype=dtypes, seed=seeds)
def test_cagrad_with_c_zero_is_the_mean(K, scale, dtype, seed):
    J = gradients(K, K, seed=seed, scale=scale)
    torch.testing.assert_close(cagrad((J @ J.mT).to(dtype), c=0.0), torch.full((K,), 1 / K, dtype=dtype))


@few
@given(data=st.data(), K=st.integers(1, 5), seed=seeds, c=st.sampled_from([0.1, 0.5, 0.9]))
def test_cagrad_is_the_direct_optimum_in_gradient_space(data, K, seed, c):
    J = gradients(K, K, seed=seed, spread=data.draw(st.sampled_from([1.0, 4.0])))
    mean = J.mean(0)
    found = cagrad(J @ J.mT, c=c) @ J
    expected = _oracles.cagrad_in_gradient_space(J, c)
    worst_found, worst_expected = (J @ found).min(), (J @ expected).min()
    assert (found - mean).norm() <= c * mean.norm() * (1 + 1e-9)
    assert worst_found >= worst_expected - 1e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


@few
@given(data=st.data(), K=tasks, seed=seeds, scale=scales, c=st.sampled_from([1e-3, 0.1, 0.5, 0.9]), dtype=dtypes)
def test_cagrad_closes_the_duality_gap(data, K, seed, scale, c, dtype):
    J = gradients(K, data.draw(st.integers(1, K)), seed=seed, spread=data.draw(spreads))
    mean = J.mean(0)
    weights = cagrad(((scale * J) @ (scale * J).mT).to(dtype), c=c).double()
    if (weights == 0).all():
        # No direction in the ball helps the worst task: the bound over the simplex is not positive.
        assert _oracles.cagrad_dual(J, c, mgda(J @ J.mT)) <= 1e-3 * J.norm()
        return
    d = weights @ J
    w = (weights - 1 / K).clamp(min=0)
    w = w / w.sum()
    # Every w bounds min_k <g_k, d> from above: a gap of zero proves both.
    gap = _oracles.cagrad_dual(J, c, w) - (J @ d).min()
    tolerance = (1e-3 if dtype == torch.float32 else 1e-7) * mean.norm() * J.norm()
    assert abs(gap) <= tolerance
    assert abs((d - mean).norm() - c * mean.norm()) <= (1e-3 if dtype == torch.float32 else 1e-6) * J.norm()


def test_cagrad_beats_a_grid_over_the_simplex():
    steps = 120
    a, b = torch.meshgrid(torch.arange(steps + 1), torch.arange(steps + 1), indexing="ij")
    inside = a + b <= steps
    grid = torch.stack([a[inside], b[inside], steps - a[inside] - b[inside]], 1).double() / steps
    for seed in range(10):
        J = gradients(3, 3, seed=seed, spread=3.0)
        values = _oracles.cagrad_dual(J, 0.5, grid)
        w = cagrad(J @ J.mT, c=0.5) - 1 / 3
        w = w / w.sum()
        found = _oracles.cagrad_dual(J, 0.5, w)
        assert values.min() - 2e-2 <= found <= values.min() + 1e-9
        torch.testing.assert_close(w, grid[values.argmin()], rtol=0, atol=0.05)


def test_cagrad_at_a_stationary_point():
    # Three directions that cancel up to their unequal sizes: zero lies inside their hull, and c >= 1 admits d = 0.
    turn = torch.tensor([0.0, 2.0944, 4.1888], dtype=torch.float64)
    J = torch.stack([turn.cos(), turn.sin()], 1) * torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    assert torch.equal(cagrad(J @ J.mT, c=1.5), torch.zeros(3, dtype=torch.float64))
    opposed = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert torch.equal(cagrad(opposed), torch.full((2,), 0.5))


def test_a_short_gradient_is_not_taken_for_a_stationary_point():
    J = torch.tensor([[1e-6, 0.0], [0.0, 1.0]], dtype=torch.float64)
    d = cagrad(J @ J.mT, c=0.5) @ J
    # The ball's point furthest along g_1.
    torch.testing.assert_close(d, torch.tensor([0.5e-6 + 0.25, 0.5], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["c", "norm_eps"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), "a", None])
def test_errors_of_cagrad(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number >= 0"):
        cagrad(torch.eye(2), **{name: value})


def test_random_weights_are_no_better():
    for seed in range(20):
        J = gradients(5, 5, seed=seed, spread=5.0)
        w = torch.rand(500, 5, generator=generator(seed), dtype=torch.float64)
        w = w**4 / (w**4).sum(1, keepdim=True)
        assert ((w @ J).norm(dim=1) >= (mgda(J @ J.mT) @ J).norm() - 1e-12).all()
