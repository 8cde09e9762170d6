"""A forward pass inside a task whose backward pass comes after it: refused or said in the first step."""

from __future__ import annotations

import warnings

import pytest
import torch

from gradsub import GemsOptimizer

from .toys import TASKS, loss_of, mlp


def optimizer_of(model: torch.nn.Module, **options: object) -> GemsOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return GemsOptimizer(base, tasks=TASKS, rank=3, model=model, **options)


@pytest.mark.parametrize("right_steps", [0, 2])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("capture", ["fused", "generic"])
@pytest.mark.parametrize("which", ["every task", "one task", "together", "after zero_grad"])
def test_a_backward_pass_after_its_task_is_said_there(device, capture, refresh, right_steps, which):
    model = mlp(device=device)
    optimizer = optimizer_of(model, capture=capture, refresh=refresh)

    def step(number: int, right: bool) -> None:
        losses = []
        for task, name in enumerate(TASKS):
            inside = right or (which == "one task" and task == 1)
            with optimizer.task(name):
                loss = loss_of(model, number, task)
                if inside:
                    loss.backward()
            losses += [] if inside else [loss]
            if losses and which == "after zero_grad":
                optimizer.zero_grad()
            if losses and which != "together":
                losses.pop().backward()
        if losses:
            sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(right_steps):
        step(number, right=True)
    if capture == "fused":
        with pytest.raises(RuntimeError, match=r"ran inside optimizer.task .* its backward pass outside of it"):
            step(right_steps, right=False)
        return
    with pytest.warns(UserWarning, match=r"closed before any backward pass, .* Call backward\(\) inside") as caught:
        step(right_steps, right=False)
    assert len(caught) == 1
    assert "task('" in str(caught[0].message)
    if capture == "generic":
        step(right_steps + 1, right=False)  # once is enough


@pytest.mark.parametrize("capture", ["fused", "generic"])
def test_gradients_that_never_had_a_task_are_nobodys_fault(device, capture):
    """Before, between and after tasks; and a task without a gradient harms no later step."""
    model = mlp(device=device)
    optimizer = optimizer_of(model, capture=capture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(3):
            loss_of(model, number, 0).backward()
            for task, name in enumerate(TASKS):
                with optimizer.task(name):
                    loss_of(model, number, task).backward()
                loss_of(model, number, task).backward()
            optimizer.step()
            optimizer.zero_grad()
        with optimizer.task(TASKS[0]):
            pass
        optimizer.step()
        loss_of(model, 9, 0).backward()
        optimizer.step()
