"""Backward passes outside of any task: ordinary gradients, which belong to the shared subspace alone."""

from __future__ import annotations

import pytest
import torch

from gradsub import GemsOptimizer

from .toys import TASKS, gems, loss_of, mlp, same, weights_of


def test_a_backward_outside_leaves_the_gradient_to_the_user(device):
    """It is there to be seen and clipped, survives a task and the step, and is what the shared subspace follows."""
    model = mlp(device=device)
    optimizer = gems(model, tasks=TASKS)
    loss_of(model, 0, 0).backward()
    outside = [p.grad.clone() for p in model.parameters()]
    with optimizer.task("rec"):
        assert all(p.grad is None for p in model.parameters())
        loss_of(model, 0, 1).backward()
    assert same(outside, (p.grad for p in model.parameters()))
    optimizer.step()
    assert same(outside, (p.grad for p in model.parameters()))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_backward_outside_belongs_to_the_shared_subspace_alone(device, side):
    model = mlp((8, 6), bias=False, device=device)
    weight = model[0].weight
    optimizer = GemsOptimizer(torch.optim.SGD([weight], lr=1.0), tasks=TASKS, rank=5, task_rank=5, side=side)
    before = weight.detach().clone()
    loss_of(model, 0, 0).backward()
    top = torch.linalg.svd(weight.grad)
    optimizer.step()
    expected = (top.U[:, :5] * top.S[:5]) @ top.Vh[:5]  # once: no task adds its own step
    torch.testing.assert_close(before - weight.detach(), expected, rtol=1e-4, atol=1e-5)
    basis = optimizer.state[weight]["basis"]
    assert float(basis[:, :5].norm()) > 0
    assert float(basis[:, 5:].norm()) == 0


def test_outside_and_task_gradients_add_up_in_plain_parameters(device):
    model = mlp(dtype=torch.float64, device=device)
    base = torch.optim.SGD([{"params": list(model.parameters()), "subspace": False}], lr=1.0)
    optimizer = GemsOptimizer(base, tasks=TASKS)
    before = weights_of(model)
    shared = torch.autograd.grad(loss_of(model, 0, 1), list(model.parameters()))
    outside = torch.autograd.grad(loss_of(model, 3, 0), list(model.parameters()))
    loss_of(model, 3, 0).backward()
    with optimizer.task("rec", samples=7):
        loss_of(model, 0, 1).backward()
    optimizer.step()
    for old, new, one, two in zip(before, model.parameters(), shared, outside, strict=True):
        torch.testing.assert_close(new.detach(), old - one - two)


def test_clipping_an_outside_gradient_counts(device):
    model, clipped = mlp(device=device), mlp(device=device)
    for each in (model, clipped):
        optimizer = gems(each, base=torch.optim.SGD(each.parameters(), lr=1.0))
        loss_of(each, 0, 0).backward()
        if each is clipped:
            for p in each.parameters():
                p.grad.mul_(0.5)
        before = weights_of(each)
        optimizer.step()
        each.moved = [new.detach() - old for old, new in zip(before, each.parameters(), strict=True)]
    for whole, half in zip(model.moved, clipped.moved, strict=True):
        torch.testing.assert_close(half * 2, whole, rtol=1e-4, atol=1e-6)
