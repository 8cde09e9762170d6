"""Gradients from 1e-30 to 1e30: nothing that is computed of them overflows, or vanishes, when it is squared."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer
from gradsub.linalg._arithmetic import norm
from gradsub.surgery import SURGERIES

FACTORS = [1e-30, 1e20, 1e30]
WIDTH = 16


def world(device, base, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).to(device)
    if options.get("capture") != "generic":
        options["model"] = model
    options = {"rank": 4, "update_proj_gap": 3, **options}
    return model, GemsOptimizer(base(model.parameters()), tasks=("a", "b"), **options)


def backward(model, optimizer, factor, device):
    for position, task in enumerate(optimizer.tasks):
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(position)).to(device)
        with optimizer.task(task):
            ((model(x) - position).square().mean() * factor).backward()


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def moved(model, before):
    changes = [after.detach() - old for after, old in zip(model.parameters(), before, strict=True)]
    assert all(bool(change.isfinite().all()) for change in changes)
    return changes


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("capture", ["fused", "generic"])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize(
    "options",
    # The weights of "uncertainty" are one over the losses, whatever their unit.
    [{"surgery": name} for name in sorted(SURGERIES.keys() - {"uncertainty"})] + [{"gate": "hypergradient"}],
    ids=str,
)
def test_steps_do_not_depend_on_the_scale(options, refresh, capture, factor, device):
    """A factor on all losses that the learning rate takes back changes nothing."""
    found = []
    for scale in (1.0, factor):
        model, optimizer = world(device, sgd(1e-1 / scale), capture=capture, refresh=refresh, **options)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for _ in range(5):
            backward(model, optimizer, scale, device)
            optimizer.step()
            optimizer.zero_grad()
        found.append(moved(model, before))
    for plain, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-2, atol=1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("capture", ["fused", "generic"])
@pytest.mark.parametrize("passes", [1, 2])
def test_clipping_bounds_the_norm_and_keeps_the_direction(passes, capture, factor, device):
    found = []
    for scale in (1.0, factor):
        model, optimizer = world(device, sgd(1e-1), capture=capture)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for _ in range(passes):
            backward(model, optimizer, scale, device)
        norms = optimizer.clip_grad_norm_(1e-3 if scale > 1e-3 else scale)
        optimizer.step()
        found.append((norms, [change / min(1e-3, scale) for change in moved(model, before)] if scale > 1e-9 else None))
    for task, value in found[0][0].items():
        assert math.isclose(float(found[1][0][task]), float(value) * factor, rel_tol=1e-3)
    if found[1][1] is not None:
        for plain, scaled in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(scaled, plain, rtol=1e-2, atol=1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("gate", ["heuristic", "hypergradient"])
@pytest.mark.parametrize("capture", ["fused", "generic"])
def test_a_report_is_finite(capture, gate, factor, device):
    reports = []
    for scale in (1.0, factor):
        model, optimizer = world(device, sgd(0.0), capture=capture, gate=gate)
        for _ in range(2):
            backward(model, optimizer, scale, device)
            optimizer.step()
            optimizer.zero_grad()
        reports.append(optimizer.report())
    for plain, scaled in zip(*(report.layers for report in reports), strict=True):
        for pair, cosine in plain.cosines.items():
            assert math.isclose(scaled.cosines[pair], cosine, rel_tol=1e-3, abs_tol=1e-4)
        for task, gate_of_task in plain.gates.items():
            assert math.isclose(scaled.gates[task], gate_of_task, rel_tol=1e-2)
        if capture == "generic":
            for task, size in plain.gradient_norms.items():
                assert math.isclose(scaled.gradient_norms[task], size * factor, rel_tol=1e-3)
            for name, energy in plain.energy.items():
                assert math.isclose(scaled.energy[name], energy, rel_tol=1e-3)


@pytest.mark.parametrize("base", ["AdamW", "AdamW amsgrad", "Adagrad", "RMSprop", "Adadelta", "NAdam", "Adamax"])
@pytest.mark.parametrize("moments", ["rotate", "keep", "reset"])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("spike", [1e25])
def test_after_a_spike_the_next_refresh_leaves_weights_finite(spike, refresh, moments, base, device):
    """Second moments overflow in that step, as they would without a wrapper."""
    name, *flag = base.split()
    kind, options = getattr(torch.optim, name), dict.fromkeys(flag, True)
    model, optimizer = world(
        device, lambda parameters: kind(parameters, lr=1e-3, **options), refresh=refresh, moments=moments
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(8):
        backward(model, optimizer, spike if step == 2 else 1.0, device)
        optimizer.step()
        optimizer.zero_grad()
    moved(model, before)


@pytest.mark.parametrize("dim", [None, (1, 2), (0,)])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1.0, 1e30, 1e37])
def test_norm(size, dim, device):
    A = torch.randn(3, 4, 5) * size
    exact = torch.linalg.vector_norm(A.double(), dim=dim).float()
    torch.testing.assert_close(norm(A.to(device), dim).cpu(), exact, rtol=1e-5, atol=0.0)
    assert norm(torch.zeros(0, 4, device=device)).item() == 0.0
    assert norm(torch.tensor([1.0, math.nan], device=device)).isnan()
