"""Learning rate schedulers, before and after a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from gradsub import GemsOptimizer

from .toys import gems, mlp, same, train, weights_of

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=20),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
}


def make(device: torch.device, name: str, seed: int = 0) -> tuple[Any, GemsOptimizer, Any]:
    model = mlp(seed=seed, device=device)
    optimizer = gems(model, base=torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1))
    return model, optimizer, SCHEDULERS[name](optimizer)


def steps(model: Any, optimizer: GemsOptimizer, scheduler: Any, count: int, start: int = 0) -> list[tuple[Any, ...]]:
    seen = []
    for step in range(start, start + count):
        train(model, optimizer, 1, start=step)
        scheduler.step()
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_sets_what_it_would_set_on_the_bare_optimizer(device, name):
    seen = steps(*make(device, name), 6)
    model = mlp(device=device)
    bare = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    scheduler = SCHEDULERS[name](bare)
    for expected in seen:
        bare.step()
        scheduler.step()
        assert (bare.param_groups[0]["lr"], bare.param_groups[0]["betas"]) == expected


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rate_that_a_scheduler_sets_is_the_rate_of_the_step(device, name):
    """Set by hand to the same numbers, the run is the same."""
    model, optimizer, scheduler = make(device, name)
    by_hand = mlp(device=device)
    other = gems(by_hand, base=torch.optim.AdamW(by_hand.parameters(), lr=0.01, weight_decay=0.1))
    rates = set()
    for step in range(5):
        for key in ("lr", "betas"):
            other.param_groups[0][key] = optimizer.param_groups[0][key]
        rates.add(optimizer.param_groups[0]["lr"])
        steps(model, optimizer, scheduler, 1, start=step)
        train(by_hand, other, 1, start=step)
    assert len(rates) > 2
    assert same(model.parameters(), by_hand.parameters())


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scheduler_first", [True, False])
def test_a_resumed_schedule_equals_an_uninterrupted_one(device, name, scheduler_first):
    """The scheduler may be built, and loaded, before the optimizer's checkpoint is or after."""
    model, optimizer, scheduler = make(device, name)
    steps(model, optimizer, scheduler, 4)
    saved = [copy.deepcopy(each.state_dict()) for each in (model, optimizer, scheduler)]
    fresh, again, schedule = make(device, name, seed=5)
    order = ((fresh, saved[0]), (again, saved[1]), (schedule, saved[2]))
    for each, state in reversed(order) if scheduler_first else order:
        each.load_state_dict(state)
    expected = steps(model, optimizer, scheduler, 4, start=4)
    assert steps(fresh, again, schedule, 4, start=4) == expected
    assert same(weights_of(model), fresh.parameters())


def test_a_scheduler_built_after_loading_moves_the_loaded_groups(device):
    model, optimizer, _ = make(device, "lambda")
    train(model, optimizer, 2)
    fresh = mlp(device=device)
    again = gems(fresh, base=torch.optim.AdamW(fresh.parameters(), lr=0.7, weight_decay=0.1))
    again.load_state_dict(optimizer.state_dict())
    scheduler = lr_scheduler.LambdaLR(again, lambda step: 0.0 if step else 1.0)
    train(fresh, again, 1, start=2)
    scheduler.step()
    before = weights_of(fresh)
    train(fresh, again, 1, start=3)
    assert same(before, fresh.parameters())  # the learning rate is 0, decay included


def test_warnings_about_the_order_of_steps_are_torchs_own(device):
    _, optimizer, scheduler = make(device, "lambda")
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    optimizer.step()
