"""Save, load into a fresh optimizer, go on: bit for bit as if never interrupted."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer

from .toys import TASKS, gems, leak, loss_of, mlp, null_space_of, same, tensors_in, train, weights_of

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumed(model: nn.Module, optimizer: GemsOptimizer, make: Callable[[nn.Module], GemsOptimizer]) -> Any:
    """A new model and a new optimizer out of what was saved of these."""
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    parameter = next(model.parameters())
    fresh = mlp(seed=7, dtype=parameter.dtype, device=parameter.device)
    fresh.load_state_dict(saved["model"])
    again = make(fresh)
    again.load_state_dict(saved["optimizer"])
    return fresh, again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("after", [0, 2, 3, 4], ids=["at the start", "before a refresh", "at a refresh", "after it"])
def test_a_resumed_run_equals_an_uninterrupted_one(device, base, dtype, after):
    def make(model: nn.Module) -> GemsOptimizer:
        return gems(model, base=BASES[base](model.parameters()))

    model = mlp(dtype=dtype, device=device)
    optimizer = make(model)
    train(model, optimizer, after)
    fresh, again = resumed(model, optimizer, make)
    train(model, optimizer, 4, start=after)
    train(fresh, again, 4, start=after)
    assert same(model.parameters(), fresh.parameters())
    assert same(tensors_in(optimizer.state_dict()), tensors_in(again.state_dict()))


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("gate", ["uniform", "heuristic", "hypergradient"])
@pytest.mark.parametrize("orthogonalize", ["none", "shared_first"])
@pytest.mark.parametrize("moments", ["rotate", "reset"])
def test_with_every_option(device, side, gate, orthogonalize, moments):
    null_space = null_space_of(mlp(device=device), side, rank=2)
    options = {"side": side, "gate": gate, "orthogonalize": orthogonalize, "moments": moments, "null_space": null_space}
    model = mlp(device=device)
    optimizer = gems(model, **options)
    train(model, optimizer, 2)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in null_space}
    fresh, again = resumed(model, optimizer, lambda m: gems(m, **options))
    train(model, optimizer, 4, start=2)
    train(fresh, again, 4, start=2)
    assert same(model.parameters(), fresh.parameters())
    assert optimizer.report().to_dict() == again.report().to_dict()
    for name, old in before.items():
        assert leak(fresh.get_submodule(name).weight.detach() - old, null_space.basis(name), side) < 1e-6


@pytest.mark.parametrize("after", [2, 5])
def test_moments_that_were_reset_after_the_step_do_not_come_back(device, after):
    """Of an optimizer whose state begins with its first step, as dampened momentum does."""

    def make(model: nn.Module) -> GemsOptimizer:
        base = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, dampening=0.1)
        return gems(model, base=base, refresh="sketch", moments="reset")

    model = mlp(device=device)
    optimizer = make(model)
    train(model, optimizer, after)
    fresh, again = resumed(model, optimizer, make)
    train(model, optimizer, 5, start=after)
    train(fresh, again, 5, start=after)
    assert same(model.parameters(), fresh.parameters())


def test_groups_and_their_options_come_back(device):
    def make(model: nn.Module, lr: float = 0.5) -> GemsOptimizer:
        groups = [
            {"params": list(model[0].parameters()), "lr": lr, "rank": 2, "update_proj_gap": 2},
            {"params": list(model[2].parameters()), "subspace": False},
        ]
        return gems(model, base=torch.optim.AdamW(groups, lr=0.01))

    model = mlp(device=device)
    optimizer = make(model, lr=0.03)
    train(model, optimizer, 3)
    fresh, again = resumed(model, optimizer, make)
    assert [group["lr"] for group in again.param_groups] == [0.03, 0.01]
    train(model, optimizer, 4, start=3)
    train(fresh, again, 4, start=3)
    assert same(model.parameters(), fresh.parameters())


def test_loading_copies_and_keeps_dtypes(device):
    model = mlp(dtype=torch.bfloat16, device=device)
    optimizer = gems(model)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    snapshot = copy.deepcopy(saved)
    again = gems(mlp(dtype=torch.bfloat16, device=device))
    again.load_state_dict(saved)
    assert again.state_dict()["state"][0]["inner.shared.exp_avg"].dtype == torch.float32
    assert again.state_dict()["state"][0]["next_refresh"].dtype == torch.int64
    train(mlp(dtype=torch.bfloat16, device=device), optimizer, 0)
    fresh = mlp(dtype=torch.bfloat16, device=device)
    other = gems(fresh)
    other.load_state_dict(saved)
    train(fresh, other, 3, start=2)
    assert same(tensors_in(snapshot), tensors_in(saved))  # going on does not write into the checkpoint


def test_a_checkpoint_between_backward_and_step_is_refused(device):
    model = mlp(device=device)
    optimizer = gems(model)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    with optimizer.task("rec"):
        loss_of(model, 0, 0).backward()
    with pytest.raises(RuntimeError, match=r"state_dict between backward and step.*zero_grad\(\)"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match=r"load_state_dict between backward and step.*zero_grad\(\)"):
        optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    assert same(tensors_in(saved), tensors_in(optimizer.state_dict()))


REFUSED = {
    "tasks": ({"tasks": ("search", "ads")}, r"tasks is \('search', 'ads'\) there and \('search', 'rec'\) here"),
    "more tasks": ({"tasks": (*TASKS, "ads")}, "tasks is"),
    "rank": ({"rank": 5}, r"of 0 has shape \(.*\) there and \(.*\) here.*rank"),
    "task_rank": ({"task_rank": 3}, r"of 0 has shape \(.*\) there and \(.*\) here.*task_rank"),
    "side": ({"side": "output"}, "side is 'output' there and 'input' here"),
    "whole": ({"target_modules": ["2"]}, r"0 is a plain parameter there and a decomposed one here|parameter 0 is"),
}


def refused(optimizer: GemsOptimizer, model: nn.Module, saved: Any, message: str) -> None:
    train(model, optimizer, 1)
    groups = [{**group, "params": None} for group in optimizer.param_groups]
    before = [*weights_of(model), *tensors_in(optimizer.state_dict())]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert same(before, [*weights_of(model), *tensors_in(optimizer.state_dict())])
    assert groups == [{**group, "params": None} for group in optimizer.param_groups]
    train(model, optimizer, 3, start=1)


@pytest.mark.parametrize("difference", REFUSED)
def test_a_checkpoint_of_other_options_is_refused_and_nothing_changes(device, difference):
    options, message = REFUSED[difference]
    other, model = mlp(device=device), mlp(device=device)
    saved = gems(other, **options).state_dict()
    refused(gems(model), model, saved, message)


@pytest.mark.parametrize("widths", [(12, 18, 8), (12, 16, 16, 8)])
def test_a_checkpoint_of_another_model_is_refused(device, widths):
    model = mlp(device=device)
    saved = gems(mlp(widths, device=device)).state_dict()
    refused(gems(model), model, saved, r"has shape|6 parameters, the optimizer has 4")


def test_a_checkpoint_with_the_tasks_in_another_order_is_refused_or_sorted(device):
    model, other = mlp(device=device), mlp(device=device)
    first = gems(other)
    train(other, first, 2)
    second = gems(model, tasks=tuple(reversed(TASKS)))
    try:
        second.load_state_dict(first.state_dict())
    except ValueError:
        return
    joint, mine = (each.state[m[0].weight]["basis"] for each, m in ((first, other), (second, model)))
    assert torch.equal(joint[:, 4:6], mine[:, 6:8])


@pytest.mark.parametrize("options", [{"tasks": ("a", "b")}, {"side": "output"}], ids=["tasks", "side"])
def test_other_tasks_or_side_are_refused_without_inner_state_too(device, options):
    model, other = mlp((9, 9), device=device), mlp((9, 9), device=device)
    saved = gems(other, base=torch.optim.SGD(other.parameters(), lr=0.1), **options).state_dict()
    refused(gems(model, base=torch.optim.SGD(model.parameters(), lr=0.1)), model, saved, "tasks|side")


def test_a_checkpoint_of_a_bare_optimizer_is_refused(device):
    model = mlp(device=device)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = copy.deepcopy(base.state_dict())
    refused(gems(model, base=base), model, saved, "basis|state|plain")


def test_a_checkpoint_of_another_base_is_refused(device):
    model, other = mlp(device=device), mlp(device=device)
    saved = gems(other, base=torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)).state_dict()
    refused(gems(model), model, saved, "momentum_buffer|exp_avg|betas")
