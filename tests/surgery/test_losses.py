"""Weightings by losses, against their papers' formulas step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsub.surgery import DWA, FAMO, SurgeryInputs, UncertaintyWeighting

from ._samplers import dtypes, few, generator, seeds, tasks
from ._waiting import NothingIsRead

METHODS = {"famo": FAMO, "dwa": lambda: DWA(window=2), "uncertainty": UncertaintyWeighting}
names = st.sampled_from(sorted(METHODS))
sizes = st.sampled_from([1e-12, 1e-3, 1.0, 1e5, 1e15])


def inputs(losses: torch.Tensor | list[float], dtype: torch.dtype = torch.float64) -> SurgeryInputs:
    losses = torch.as_tensor(losses, dtype=dtype)
    return SurgeryInputs(torch.eye(len(losses), dtype=dtype), losses, torch.ones(len(losses), dtype=dtype))


def course(K: int, steps: int, seed: int, size: float = 1.0) -> torch.Tensor:
    """Positive losses (steps, K) of tasks of different sizes, in float64."""
    noise = torch.randn(steps + 1, K, generator=generator(seed), dtype=torch.float64)
    return size * (0.5 * noise[1:] + noise[0]).exp()


@few
@given(K=tasks, seed=seeds, lr=st.sampled_from([0.0, 0.025, 1.0]), decay=st.sampled_from([0.0, 1e-3]))
def test_famo_is_its_algorithm(K, seed, lr, decay):
    xi = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.Adam([xi], lr=lr, weight_decay=decay)
    surgery, before = FAMO(lr=lr, weight_decay=decay), None
    for losses in course(K, 6, seed):
        if before is not None:
            fallen = before.log() - losses.log()
            xi.grad = torch.autograd.grad(torch.softmax(xi, 0) @ fallen, xi)[0]
            descent.step()
        z = torch.softmax(xi, 0).detach()
        expected = z / losses / (z / losses).sum()
        torch.testing.assert_close(surgery(inputs(losses)), K * expected, rtol=1e-6, atol=1e-9)
        before = losses


def test_famo_of_losses_measured_again():
    measured, next_one = FAMO(lr=0.5), FAMO(lr=0.5)
    first, second = course(3, 2, 1)
    measured(inputs(first))
    next_one(inputs(first))
    measured.after(second)
    assert torch.equal(measured(inputs(second)), next_one(inputs(second)))
    # What was told is not learnt once more from the next batch.
    logits = measured.state_dict()["logits"]
    measured.after(first)
    told = measured.state_dict()["logits"]
    assert not torch.equal(told, logits)
    measured(inputs(second))
    assert torch.equal(measured.state_dict()["logits"], told)


def test_famo_equals_torchjds():
    scalarization = pytest.importorskip("torchjd.scalarization")
    theirs, ours = scalarization.FAMO(3), FAMO()
    for step, losses in enumerate(course(3, 8, 2).float()):
        if step:
            theirs.update(losses)
        leaf = losses.clone().requires_grad_()
        theirs(leaf).backward()
        torch.testing.assert_close(ours(inputs(losses)).float(), 3 * leaf.grad, rtol=1e-5, atol=1e-6)


@few
@given(K=tasks, seed=seeds, window=st.integers(1, 3), temperature=st.sampled_from([0.5, 2.0]))
def test_dwa_is_its_formula(K, seed, window, temperature):
    surgery = DWA(window=window, temperature=temperature)
    losses = course(K, 8, seed)
    for step in range(8):
        means = [losses[start : start + window].mean(0).numpy() for start in range(0, step // window * window, window)]
        rates = means[-1] / means[-2] if len(means) > 1 else np.ones(K)
        expected = K * np.exp(rates / temperature) / np.exp(rates / temperature).sum()
        np.testing.assert_allclose(surgery(inputs(losses[step])).numpy(), expected, rtol=1e-9)


@few
@given(K=tasks, seed=seeds, lr=st.sampled_from([0.01, 1.0]))
def test_uncertainty_is_trained_along(K, seed, lr):
    s = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.Adam([s], lr=lr)
    surgery = UncertaintyWeighting(lr=lr)
    for losses in course(K, 6, seed):
        torch.testing.assert_close(surgery(inputs(losses)), (-s).exp().detach(), rtol=1e-9, atol=1e-12)
        descent.zero_grad()
        ((-s).exp() @ losses + s.sum()).backward()
        descent.step()


def moves(gradients: torch.Tensor, lr: float = 1e-3, quiet: int = 100_000) -> torch.Tensor:
    """By how much each of these gradients (steps, K) of the logarithms moves them, after so many steps without any."""
    surgery, K = UncertaintyWeighting(lr=lr), gradients.shape[1]
    surgery(inputs(torch.ones(K)))
    surgery.load_state_dict({**surgery.state_dict(), "steps": torch.full((K,), quiet, dtype=torch.float64)})
    s = [surgery.state_dict()["log_variances"]]
    for gradient in gradients:
        surgery(inputs((1 - gradient) * s[-1].exp()))
        s.append(surgery.state_dict()["log_variances"])
    return torch.stack(s).diff(dim=0) / lr


@few
@given(K=tasks, seed=seeds, rate=st.sampled_from([0.9, 1.0, 1.11, 1.5]), quiet=st.sampled_from([0, 10, 100_000]))
def test_a_logarithm_moves_by_at_most_seven_point_three_rates(K, seed, rate, quiet):
    noise = torch.rand(40, K, generator=generator(seed), dtype=torch.float64) + 0.1
    assert float(moves(-noise * rate ** torch.arange(40.0)[:, None], quiet=quiet).abs().max()) <= 7.3


def test_the_moves_of_a_logarithm_are_those_that_its_rate_promises():
    steps = torch.arange(120.0, dtype=torch.float64)[:, None]
    assert float(moves(-torch.ones_like(steps), quiet=0)[-1]) == pytest.approx(1, rel=1e-3)
    assert float(moves(-torch.ones_like(steps[:1]))) == pytest.approx(3.2, abs=0.05)
    assert float(moves(-1e-3 * (0.999 / 0.9) ** steps)[-1]) == pytest.approx(7.3, abs=0.05)


@few
@given(name=names, K=tasks, seed=seeds, size=sizes, dtype=dtypes, zeros=st.booleans())
def test_weights_are_finite_and_have_their_size(name, K, seed, size, dtype, zeros):
    surgery = METHODS[name]()
    for losses in course(K, 7, seed, size):
        losses[-1] *= 0.0 if zeros else 1.0
        weights = surgery(inputs(losses, dtype))
        assert weights.dtype == dtype
        assert not weights.requires_grad
        assert torch.isfinite(weights).all()
        assert (weights >= 0).all()
        if name != "uncertainty":
            assert float(weights.double().sum()) == pytest.approx(K, rel=1e-5)
        assert all(torch.isfinite(value).all() for value in surgery.state_dict().values())


@few
@given(name=names, K=st.integers(2, 5), seed=seeds, missing=st.sampled_from([math.nan, math.inf]))
def test_a_task_whose_loss_was_not_seen_keeps_its_state(name, K, seed, missing):
    surgery = METHODS[name]()
    losses = course(K, 7, seed)
    for row in losses[:6]:
        surgery(inputs(row))
    before = surgery.state_dict()
    losses[6, 0] = missing
    weights = surgery(inputs(losses[6]))
    assert weights[0] == 1
    assert torch.isfinite(weights).all()
    after = surgery.state_dict()
    assert all(torch.equal(after[key][0], before[key][0]) for key in before)
    assert any(not torch.equal(after[key][1:], before[key][1:]) for key in before)


@few
@given(name=names, K=tasks, seed=seeds, at=st.integers(0, 6))
def test_a_resumed_one_goes_on_bit_for_bit(name, K, seed, at):
    whole, first, second = METHODS[name](), METHODS[name](), METHODS[name]()
    second.expect(torch.zeros(K, K))
    losses = course(K, 7, seed)
    for row in losses[:at]:
        first(inputs(row))
        whole(inputs(row))
    second.load_state_dict(first.state_dict())
    for row in losses[at:]:
        assert torch.equal(whole(inputs(row)), second(inputs(row)))


@pytest.mark.parametrize("name", METHODS)
def test_what_does_not_fit_is_refused(name):
    surgery = METHODS[name]()
    surgery(inputs([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"losses has 3 tasks, but .* those of 2: call reset\(\)"):
        surgery(inputs([1.0, 2.0, 3.0]))
    before = surgery.state_dict()
    for damaged in ({}, {"other": torch.ones(2)}, dict.fromkeys(before, math.nan * torch.ones(2))):
        if damaged:
            with pytest.raises(ValueError, match="state_dict"):
                surgery.load_state_dict(damaged)
    assert all(torch.equal(value, before[key]) for key, value in surgery.state_dict().items())
    surgery.reset()
    assert surgery(inputs([1.0, 2.0, 3.0])).shape == (3,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FAMO(lr=-1.0), "lr must be a number >= 0.0, got -1.0"),
        (lambda: FAMO(weight_decay=math.nan), "weight_decay"),
        (lambda: DWA(window=0), "window must be a whole number from 1, got 0"),
        (lambda: DWA(window=1.5), "window"),
        (lambda: DWA(temperature=0.0), "temperature must be positive"),
        (lambda: UncertaintyWeighting(limit=-1.0), "limit"),
        (lambda: FAMO().after(torch.ones(2)), "expected a step before"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_read_on_the_host(name):
    surgery, K = METHODS[name](), 3
    with NothingIsRead():
        for losses in course(K, 4, 0):
            surgery(SurgeryInputs(torch.eye(K), losses, torch.ones(K)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", METHODS)
def test_nothing_waits_for_the_device(name):
    surgery = METHODS[name]()
    record = SurgeryInputs(torch.eye(3, device="cuda"), torch.ones(3, device="cuda"), torch.ones(3, device="cuda"))
    surgery(record)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        surgery(record)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
