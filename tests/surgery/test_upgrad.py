"""UPGrad: what its paper proves of it, and the projections one by one in the space of the gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsub.surgery import mgda, pcgrad, upgrad
from gradsub.surgery._cosines import cosines
from gradsub.surgery._upgrad import _pivoted, _tried

from . import _oracles
from ._samplers import dtypes, few, gradients, scales, seeds

many = st.integers(1, 11)  # beyond eight tasks another solver is at work
spreads = st.sampled_from([1.0, 10.0, 1e4])


@few
@given(data=st.data(), K=many, scale=scales, dtype=dtypes, seed=seeds, spread=spreads)
def test_no_task_is_harmed(data, K, scale, dtype, seed, spread):
    J = gradients(K, data.draw(st.integers(1, K)), seed=seed, scale=scale, spread=spread)
    weights = upgrad((J @ J.mT).to(dtype)).double()
    common = weights @ J
    largest = J.norm(dim=1) * (weights[:, None] * J).norm(dim=1).max()
    assert (J @ common >= -(1e-3 if dtype == torch.float32 else 1e-8) * largest).all()
    assert (weights >= 1 / K - 1e-6).all()


@few
@given(data=st.data(), K=many, scale=scales, seed=seeds, spread=spreads)
def test_each_gradient_is_projected_onto_the_dual_cone(data, K, scale, seed, spread):
    J = gradients(K, data.draw(st.integers(1, K)), seed=seed, scale=scale, spread=spread)
    expected = _oracles.upgrad(J)
    found = upgrad(J @ J.mT) @ J
    # A small gradient in the span of large ones is known from the Gramian no better than they are.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(J.norm(dim=1).max()))


@few
@given(data=st.data(), K=st.integers(1, 8), seed=seeds)
def test_both_solvers_project_alike(data, K, seed):
    J = gradients(K, data.draw(st.integers(1, K)), seed=seed)
    split = cosines(J @ J.mT)
    one, other = _tried(split.values) @ J, _pivoted(split) @ J
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@few
@given(data=st.data(), K=many, seed=seeds)
def test_absent_tasks_change_nothing(data, K, seed):
    J = gradients(K, K, seed=seed)
    present = torch.tensor(data.draw(st.lists(st.booleans(), min_size=K, max_size=K).filter(any)))
    J[~present] = 0
    weights = upgrad(J @ J.mT)
    assert (weights[~present] == 0).all()
    among = J[present]
    torch.testing.assert_close(weights @ J, upgrad(among @ among.mT) @ among, rtol=0, atol=1e-6)


@few
@given(K=many, scale=scales, dtype=dtypes, seed=seeds)
def test_gradients_without_conflict_are_left_as_they_are(K, scale, dtype, seed):
    J = gradients(K, K, seed=seed, scale=scale).abs()
    torch.testing.assert_close(upgrad((J @ J.mT).to(dtype)), torch.full((K,), 1 / K, dtype=dtype))


@few
@given(seed=seeds, scale=scales, spread=spreads)
def test_two_tasks_are_half_of_pcgrads(seed, scale, spread):
    J = gradients(2, 2, seed=seed, scale=scale, spread=spread)
    G = J @ J.mT
    torch.testing.assert_close(upgrad(G) @ J, pcgrad(G) @ J / 2, rtol=1e-6, atol=1e-9 * float(J.norm()))


@pytest.mark.parametrize("K", [2, 3, 9])
def test_where_no_direction_helps_all_the_step_is_zero(K):
    angles = torch.arange(K, dtype=torch.float64) * 2 * torch.pi / K
    J = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert (upgrad(J @ J.mT) @ J).norm() < 1e-6
    assert (mgda(J @ J.mT) @ J).norm() < 1e-6


def test_larger_gradients_count_more():
    """Unlike in MGDA, where the shortest decides."""
    J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    K = torch.diag(torch.tensor([5.0, 1.0], dtype=torch.float64)) @ J
    gain = [J @ (upgrad(M @ M.mT) @ M) for M in (J, K)]
    assert gain[1][0] == pytest.approx(5 * gain[0][0])


def test_many_tasks_in_few_dimensions():
    J = gradients(60, 9, seed=1) + 0.3
    common = upgrad(J @ J.mT) @ J
    assert (J @ common >= -1e-9).all()
    torch.testing.assert_close(common, _oracles.upgrad(J), rtol=0, atol=1e-6)
