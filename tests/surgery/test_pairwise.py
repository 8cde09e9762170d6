"""PCGrad and GradVac: methods in which the tasks meet in pairs."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsub.surgery import GradVac, gradvac, pcgrad
from gradsub.surgery._cosines import visiting_order

from . import _oracles
from ._samplers import dtypes, few, generator, gradients, scales, seeds, tasks


def order_of(K, seed=None):
    source = None if seed is None else generator(seed)
    return visiting_order(K, source, torch.device("cpu")).tolist()


@pytest.mark.parametrize("K", range(1, 7))
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_each_task_meets_every_other_once(K, seed):
    order = order_of(K, seed)
    assert len(order) == K
    for i, others in enumerate(order):
        assert sorted(others) == [j for j in range(K) if j != i]


def test_the_generator_gives_every_order_and_is_advanced():
    source = generator(3)
    seen = {tuple(visiting_order(4, source, torch.device("cpu"))[2].tolist()) for _ in range(100)}
    assert len(seen) == 6


@few
@given(data=st.data(), K=tasks, scale=scales, dtype=dtypes, seed=seeds)
def test_pcgrad_is_the_projection_of_vectors(data, K, scale, dtype, seed):
    J = gradients(K, data.draw(st.integers(1, K)), seed=seed, scale=scale, spread=data.draw(st.sampled_from([1.0, 50])))
    given_seed = data.draw(st.sampled_from([None, 5]))
    source = None if given_seed is None else generator(given_seed)
    found = pcgrad((J @ J.mT).to(dtype), generator=source).double() @ J
    expected = _oracles.pcgrad(J, order_of(K, given_seed))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * J.norm().item())


@few
@given(data=st.data(), K=tasks, scale=scales, dtype=dtypes, seed=seeds)
def test_gradvac_is_the_correction_of_vectors(data, K, scale, dtype, seed):
    J = gradients(K, K, seed=seed, scale=scale, spread=data.draw(st.sampled_from([1.0, 50.0])))
    targets = 1.6 * torch.rand(K, K, generator=generator(seed), dtype=torch.float64) - 0.8
    given_seed = data.draw(st.sampled_from([None, 5]))
    source = None if given_seed is None else generator(given_seed)
    found = gradvac((J @ J.mT).to(dtype), target=targets, generator=source).double() @ J
    expected, _ = _oracles.gradvac(J, order_of(K, given_seed), targets)
    tolerance = 2e-3 if dtype == torch.float32 else 1e-7
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(J.norm().item(), expected.norm().item()))


@few
@given(seed=seeds, scale=scales)
def test_pcgrad_removes_the_conflict_of_two_tasks(seed, scale):
    J = gradients(2, 2, seed=seed, scale=scale, spread=7.0)
    J[1] = J[1] if J[0] @ J[1] < 0 else -J[1]
    weights = pcgrad(J @ J.mT)
    assert ((weights @ J) @ J.mT >= 0).all()
    # Each changed gradient is orthogonal to the other's original.
    ratio = J[0] @ J[1]
    assert abs((J[0] - ratio / (J[1] @ J[1]) * J[1]) @ J[1]) < 1e-12 * scale**2 * 49
    torch.testing.assert_close(weights, 1 - ratio / (J * J).sum(1))


def test_pcgrad_leaves_agreeing_tasks_alone():
    J = gradients(4, 4).abs()
    assert torch.equal(pcgrad(J @ J.mT), torch.ones(4, dtype=torch.float64))


def test_opposed_gradients_vanish():
    G = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    J = torch.tensor([[1.0], [-1.0]])
    for weights in (pcgrad(G), gradvac(G, target=0.5)):
        torch.testing.assert_close(weights @ J, torch.zeros(1))


@few
@given(seed=seeds, target=st.floats(-0.9, 0.95))
def test_gradvac_reaches_the_target_cosine(seed, target):
    J = gradients(2, 2, seed=seed, spread=3.0)
    cosine = torch.cosine_similarity(J[0], J[1], dim=0)
    # Row sums are lost in the weights: with a target for task 0 alone, task 1 stays, and w @ J - g_1 is g'_0.
    targets = torch.tensor([[0.0, target], [-1.0, 0.0]], dtype=torch.float64)
    changed = gradvac(J @ J.mT, target=targets) @ J - J[1]
    reached = torch.cosine_similarity(changed, J[1], dim=0)
    torch.testing.assert_close(
        reached, torch.tensor(max(target, cosine.item()), dtype=torch.float64), rtol=0, atol=1e-9
    )


@few
@given(K=tasks, seed=seeds)
def test_gradvac_with_target_zero_is_pcgrad(K, seed):
    J = gradients(K, K, seed=seed)
    G = J @ J.mT
    expected = pcgrad(G, generator=generator(seed))
    torch.testing.assert_close(gradvac(G, target=0.0, generator=generator(seed)), expected)
    torch.testing.assert_close(GradVac(generator=generator(seed))(G), expected)


def test_a_target_next_to_one_leaves_parallel_tasks_alone():
    for dtype in (torch.float32, torch.float64):
        for seed in range(50):  # rounding puts the cosine below 1 in some of them
            J = gradients(1, 1, seed=seed).to(dtype) * torch.tensor([[1.0], [1.7], [0.3]], dtype=dtype)
            torch.testing.assert_close(gradvac(J @ J.mT, target=1.0), torch.ones(3, dtype=dtype))
        weights = gradvac(torch.eye(2, dtype=dtype), target=1.0)
        assert torch.isfinite(weights).all()


@few
@given(K=st.integers(1, 5), seed=seeds, beta=st.sampled_from([0.01, 0.5, 1.0]), dtype=dtypes)
def test_targets_follow_the_cosines(K, seed, beta, dtype):
    surgery = GradVac(beta=beta, generator=generator(seed))
    order_source = generator(seed)
    targets = torch.zeros(K, K, dtype=torch.float64)
    for step in range(4):
        J = gradients(K, K, seed=seed + step, spread=3.0)
        order = visiting_order(K, order_source, torch.device("cpu")).tolist()
        expected, targets = _oracles.gradvac(J, order, targets, beta)
        found = surgery((J @ J.mT).to(dtype)).double() @ J
        tolerance = 1e-2 if dtype == torch.float32 else 1e-6
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.norm().item())
        torch.testing.assert_close(surgery.targets.double(), targets, rtol=0, atol=tolerance)


def test_memory_survives_absent_tasks_and_nan():
    surgery = GradVac()
    J = gradients(3, 3)
    surgery(J @ J.mT)
    before = surgery.targets.clone()
    assert before.abs().max() > 0.01
    surgery(torch.full((3, 3), torch.nan, dtype=torch.float64))
    assert torch.equal(surgery.targets, before)
    J[1] = 0
    surgery(J @ J.mT)
    assert torch.equal(surgery.targets[1], before[1])
    assert torch.equal(surgery.targets[:, 1], before[:, 1])
    assert surgery.targets[0, 2] != before[0, 2]


def test_state_goes_on_where_it_stopped():
    grams = [J @ J.mT for J in (gradients(3, 3, seed=seed) for seed in range(6))]
    whole = GradVac()
    expected = [whole(G) for G in grams]
    first = GradVac()
    for G in grams[:3]:
        first(G)
    state = first.state_dict()
    for other in (GradVac(), copy.deepcopy(first)):
        other.load_state_dict(state)
        assert all(torch.equal(other(G), weights) for G, weights in zip(grams[3:], expected[3:], strict=True))
    # What is saved is a copy, and an unused object can be saved too.
    assert torch.equal(state["targets"], first.targets)
    fresh = GradVac()
    fresh.load_state_dict(GradVac().state_dict())
    assert torch.equal(fresh(grams[0]), expected[0])


def test_errors_of_gradvac():
    surgery = GradVac()
    surgery(torch.eye(2))
    with pytest.raises(ValueError, match=r"3 tasks, but the targets were learnt for 2: call reset\(\)"):
        surgery(torch.eye(3))
    surgery.reset()
    assert surgery(torch.eye(3)).shape == (3,)
    for beta in (-0.1, 1.1, float("nan"), "much", True):
        with pytest.raises(ValueError, match=r"beta must be a number in \[0\.0, 1\.0\]"):
            GradVac(beta=beta)
    for target in (1.5, float("nan"), torch.ones(3), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="target must be a number"):
            gradvac(torch.eye(2), target=target)
    for state in ({}, {"targets": 1.0}, {"targets": torch.ones(2)}):
        with pytest.raises(ValueError, match="targets"):
            surgery.load_state_dict(state)
    assert repr(surgery) == "GradVac(beta=0.5)"
