"""Norms and energies of gradients that never exist as a whole."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsub import GemsOptimizer
from tests.optimizer.toys import TASKS, gems, noise

# The other axis is longer than a sketch has directions (rank + 64), so that its norm is an estimate.
WIDTHS = (24, 90)


def world(device: Any, **options: Any) -> tuple[nn.Sequential, GemsOptimizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(*WIDTHS, bias=False)).to(device, torch.float64)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    return model, gems(model, base=base, capture="fused", **{"update_proj_gap": 5, **options})


def loss_of(model: nn.Module, task: int, part: int = 0) -> Tensor:
    like = next(model.parameters())
    return (
        model(noise(12, WIDTHS[0], key=(task, part), like=like)) * noise(12, WIDTHS[1], key=(7, task), like=like)
    ).sum()


def step(model: nn.Module, optimizer: GemsOptimizer, parts: int = 1) -> None:
    for task, name in enumerate(TASKS):
        with optimizer.task(name):
            for part in range(parts):
                loss_of(model, task, part).backward()
    optimizer.step()


def true_norm(model: nn.Module, task: int, parts: int = 1) -> float:
    loss = torch.stack([loss_of(model, task, part) for part in range(parts)]).sum()
    return float(torch.autograd.grad(loss, list(model.parameters()))[0].norm())


@pytest.mark.parametrize("parts", [1, 3])
def test_the_square_of_a_sketch_is_unbiased(device, parts):
    """Also of a sum of several backward passes, whose norms do not add up."""
    ratios = []
    model, optimizer = world(device, refresh="sketch", update_proj_gap=1)
    true = [true_norm(model, task, parts) for task in range(2)]
    for _ in range(12):  # each looks through other directions
        step(model, optimizer, parts)
        (layer,) = optimizer.report(angles=False).layers
        assert layer.estimated == TASKS
        ratios += [(layer.gradient_norms[name] / true[task]) ** 2 for task, name in enumerate(TASKS)]
    squares = torch.tensor(ratios, dtype=torch.float64)
    # Of 68 directions: sqrt(2 / 68) is the most that one estimate can be expected to be off, of a gradient of rank 1.
    assert 0.01 < float(squares.std()) < math.sqrt(2 / 68)
    # The tasks of one step look through the same directions, so only every second ratio is independent.
    assert abs(float(squares.mean()) - 1) < 4 * math.sqrt(2 / 68) / math.sqrt(len(ratios) / 2)


def test_a_sketch_through_all_directions_is_exact(device):
    model, optimizer = world(device, refresh="sketch", side="output")
    step(model, optimizer)
    (layer,) = optimizer.report().layers
    assert layer.estimated == ()
    assert layer.gradient_norms == {
        name: pytest.approx(true_norm(model, task), rel=1e-6) for task, name in enumerate(TASKS)
    }


@pytest.mark.parametrize("refresh", ["sketch", "svd"])
def test_between_refreshes_the_last_known_share_stands_for_todays(device, refresh):
    """The gradients are the same in every step here, so the estimates are close."""
    model, optimizer = world(device, refresh=refresh, rank=8)
    for count in range(1, 5):
        step(model, optimizer)
        (layer,) = optimizer.report().layers
        assert (layer.estimated == ()) == (refresh == "svd" and count == 1)
        for task, name in enumerate(TASKS):
            assert layer.gradient_norms[name] == pytest.approx(true_norm(model, task), rel=0.5 if count == 3 else 0.3)
        assert all(0 < share <= 1 for share in layer.energy.values())
        assert ("~" in str(optimizer.report())) == bool(layer.estimated)
        assert optimizer.report().scalars().keys() >= {"norm/search", "norm/rec", "energy/shared", "energy/rec"}
        if refresh == "svd":  # the bases, and with them the shares, are those of the first step
            assert layer.gradient_norms["rec"] == pytest.approx(true_norm(model, 1), rel=1e-6)


def test_right_after_a_resume_nothing_is_known_and_nothing_is_nan(device):
    model, optimizer = world(device, refresh="sketch")
    for _ in range(3):
        step(model, optimizer)
    again = world(device, refresh="sketch")[1]
    again.load_state_dict(optimizer.state_dict())
    model = again._layout._model
    step(model, again)
    report = again.report()
    assert math.isnan(report.layers[0].gradient_norms["rec"])
    found = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert found["layers"][0]["gradient_norms"] == {"search": None, "rec": None}
    scalars = report.scalars()
    assert all(map(math.isfinite, scalars.values()))
    assert "norm/rec" not in scalars
    assert "gate/rec" in scalars
    for _ in range(2):
        step(model, again)
    assert "norm/rec" in again.report().scalars()


def test_a_split_block_keeps_what_is_known(device):
    """Two layers of one shape, one of which a task leaves out later on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(*WIDTHS, bias=False) for name in ("a", "b")}).to(device)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = gems(model, base=base, capture="fused", refresh="sketch", update_proj_gap=50)
    for count in range(4):
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                x = noise(6, WIDTHS[0], key=(task,)).to(device)
                loss = model["a"](x).square().sum()
                if count < 2 or name == "rec":
                    loss = loss + model["b"](x).square().sum()
                loss.backward()
        optimizer.step()
    first, second = optimizer.report().layers
    assert list(second.gradient_norms) == ["rec"]
    assert all(math.isfinite(n) for layer in (first, second) for n in layer.gradient_norms.values())
