"""NaN and Inf: the task is named, and weights and state stay bit for bit as they were."""

from __future__ import annotations

import math

import pytest
import torch

from gradsub import GemsOptimizer, NonFiniteError

from .toys import TASKS, gems, loss_of, mlp, same, tensors_in, train, weights_of


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("steps", [0, 2, 3], ids=["first step", "between refreshes", "at a refresh"])
@pytest.mark.parametrize("where", ["loss", "gradient of a layer", "gradient of a bias"])
def test_nothing_changes_and_the_task_is_named(device, bad, steps, where):
    model, clean = mlp(device=device), mlp(device=device)
    optimizer, other = (
        gems(each, base=torch.optim.AdamW(each.parameters(), lr=0.01, weight_decay=0.1)) for each in (model, clean)
    )
    train(model, optimizer, steps)
    train(clean, other, steps)
    before = [*weights_of(model), *tensors_in(optimizer.state_dict())]
    with optimizer.task("search"):
        loss_of(model, 9, 0).backward()
    with optimizer.task("rec"):
        loss = loss_of(model, 9, 1)
        if where == "loss":
            loss = loss + bad
        else:
            parameter = model[2].weight if where == "gradient of a layer" else model[0].bias
            handle = parameter.register_hook(lambda g: g.flatten().index_fill(0, g.new_zeros(1).long(), bad).view_as(g))
        loss.backward()
    kind = "loss" if where == "loss" else "gradient"
    with pytest.raises(NonFiniteError, match=f"the {kind} of task 'rec' is NaN or Inf.*zero_grad") as caught:
        optimizer.step()
    assert isinstance(caught.value, FloatingPointError)
    assert isinstance(caught.value, ValueError)
    if where != "loss":
        handle.remove()
    optimizer.zero_grad()
    assert same(before, [*weights_of(model), *tensors_in(optimizer.state_dict())])
    train(model, optimizer, 4, start=steps)
    train(clean, other, 4, start=steps)
    assert same(model.parameters(), clean.parameters())


def test_a_loss_handed_to_backward_is_looked_at_too(device):
    model = mlp(device=device)
    optimizer = gems(model)
    loss = loss_of(model, 0, 0)
    optimizer.backward({"search": loss, "rec": loss * math.nan})
    with pytest.raises(NonFiniteError, match="the loss of task 'rec'"):
        optimizer.step()


@pytest.mark.parametrize("steps", [0, 2], ids=["at a refresh", "between refreshes"])
def test_a_gradient_from_outside_is_looked_at_too(device, steps):
    model = mlp(device=device)
    optimizer = gems(model)
    train(model, optimizer, steps)
    before = [*weights_of(model), *tensors_in(optimizer.state_dict())]
    (loss_of(model, 0, 0) * math.nan).backward()
    with pytest.raises(NonFiniteError):
        optimizer.step()
    optimizer.zero_grad()
    assert same(before, [*weights_of(model), *tensors_in(optimizer.state_dict())])


@pytest.mark.parametrize("size", [1e15, 1e25])
def test_huge_but_finite_gradients_pass(device, size):
    """As under the bare optimizer, which only multiplies them."""
    model = mlp((12, 16), device=device)
    optimizer = gems(model, base=torch.optim.SGD(model.parameters(), lr=1 / size))
    for task, name in enumerate(TASKS):
        with optimizer.task(name):
            loss = loss_of(model, 0, task)
            (loss * (size / loss.detach())).backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_ignoring_means_not_looking_but_a_basis_is_not_built_on_nan(device):
    """After the weights are put back, training goes on: what is left of the NaN is in no basis."""
    model = mlp((12, 16), device=device)
    optimizer = gems(model, base=torch.optim.SGD(model.parameters(), lr=0.01), nonfinite="ignore", update_proj_gap=1)
    train(model, optimizer, 1)
    good = {key: value.clone() for key, value in model.state_dict().items()}
    with optimizer.task("rec"):
        (loss_of(model, 0, 0) * math.nan).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert not bool(model[0].weight.isfinite().all())
    assert bool(optimizer.state[model[0].weight]["basis"].isfinite().all())
    model.load_state_dict(good)
    train(model, optimizer, 2, start=1)
    assert bool(model[0].weight.isfinite().all())


def test_an_empty_parameter_is_finite(device):
    empty, weight = (torch.nn.Parameter(torch.ones(rows, 5, device=device)) for rows in (0, 6))
    optimizer = GemsOptimizer(torch.optim.SGD([empty, weight], lr=0.1), tasks=TASKS, rank=2)
    with optimizer.task("rec"):
        (weight.sum() + empty.sum()).backward()
    optimizer.step()
    assert bool((weight < 1).all())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_skipping_drops_the_step_and_warns_once(device, what):
    """Weights and state stay, the other task's gradient goes with it, and the next batch is a step as any other."""
    model, twin = mlp(device=device), mlp(device=device)
    optimizer, other = gems(model, nonfinite="skip"), gems(twin, nonfinite="skip")
    train(model, optimizer, 2)
    train(twin, other, 2)
    before = tensors_in(optimizer.state_dict())
    snapshot = [tensor.clone() for tensor in before]
    for attempt in range(2):
        with optimizer.task("search"):
            loss_of(model, 7, 0).backward()
        with optimizer.task("rec"):
            loss = loss_of(model, 7, 1)
            (loss * math.nan if what == "loss" else loss + (model[0].weight * math.inf).sum() * 0).backward()
        if attempt == 0:
            with pytest.warns(UserWarning, match="of task 'rec' is NaN or Inf: the step is skipped"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        assert same(tensors_in(optimizer.state_dict()), snapshot)
    assert same(model.parameters(), twin.parameters())
    train(model, optimizer, 3, start=2)
    train(twin, other, 3, start=2)
    assert same(model.parameters(), twin.parameters())
