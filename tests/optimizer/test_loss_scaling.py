"""Loss scaling is recognised, and nothing else is taken for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer

from .toys import TASKS, loss_of, mlp, weights_of


def sgd(model: nn.Module, **options: object) -> GemsOptimizer:
    return GemsOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, rank=4, **options)


def distance(model: nn.Module, start: list[torch.Tensor]) -> float:
    return sum(float((a - b).detach().norm()) for a, b in zip(model.parameters(), start, strict=True))


def moved(scale, outside_first: bool, unscale: bool = False) -> list[torch.Tensor]:
    """A step from a task's gradient and one from outside, with a scaler or without."""
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scale)

    def outside() -> None:
        scaler.scale(loss_of(model, 1, 1)).backward()

    if outside_first:
        outside()
    with optimizer.task("rec"):
        scaler.scale(loss_of(model, 0, 0)).backward()
    if not outside_first:
        outside()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return weights_of(model)


@pytest.mark.parametrize("outside_first", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
def test_scaled_gradients_from_outside_and_inside_together(outside_first, unscale):
    for plain, scaled in zip(moved(False, outside_first), moved(True, outside_first, unscale), strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("clip", [False, True])
def test_a_weighted_loss_is_no_scaled_loss(factor, clip):
    """Clipping what came from outside does not reach what was captured."""
    results = []
    for weighted in (False, True):
        model = mlp()
        optimizer = sgd(model)
        with optimizer.task("rec"):
            loss = loss_of(model, 0, 0)
            (loss * factor if weighted else loss / 2).backward()
        loss_of(model, 1, 1).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        results.append(weights_of(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_clearing_through_the_model_after_an_inf_step():
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        with optimizer.task("rec"):
            loss = loss_of(model, step, 0)
            scaler.scale(loss * float("inf") if step == 0 else loss).backward()
        start = weights_of(model)
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
        assert (distance(model, start) == 0) == (step == 0)


def test_a_scaled_loss_whose_value_is_given():
    results = []
    for scale in (False, True):
        model = mlp()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scale)
        loss = loss_of(model, 0, 0)
        with optimizer.task("rec", loss=loss):
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        results.append(weights_of(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
