"""What every training loop may expect of a `torch.optim.Optimizer`."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradsub import GemsOptimizer

from .toys import TASKS, gems, leak, loss_of, mlp, null_space_of, same, tensors_in, train, weights_of

METHODS = [
    name
    for name, method in inspect.getmembers(Optimizer, inspect.isfunction)
    if not name.startswith("_") and method.__qualname__.startswith("Optimizer.")
]


@pytest.mark.parametrize("name", METHODS)
def test_every_public_method_has_torchs_signature(name):
    theirs = inspect.signature(getattr(Optimizer, name)).parameters
    ours = inspect.signature(getattr(GemsOptimizer, name)).parameters
    assert list(ours) == list(theirs)
    for key, parameter in theirs.items():
        assert ours[key].kind == parameter.kind
        assert ours[key].default == parameter.default


def test_step_is_an_ordinary_bound_method():
    """LR schedulers replace it on the instance and look at its function."""
    optimizer = gems(mlp())
    assert isinstance(optimizer, Optimizer)
    assert inspect.ismethod(optimizer.step)
    assert optimizer.step.__func__ is GemsOptimizer.step
    assert GemsOptimizer._step_supports_amp_scaling is False
    fused = torch.optim.AdamW(mlp().parameters(), fused=True)
    assert GemsOptimizer(fused, tasks=TASKS, rank=2)._step_supports_amp_scaling is False


def test_defaults_and_groups_are_the_bases_and_its_own():
    model = mlp()
    base = torch.optim.AdamW(model.parameters(), lr=0.3, betas=(0.8, 0.9))
    optimizer = gems(model, base=base, rank=3, scale=0.5)
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["rank"], group["scale"], group["subspace"]) == (0.3, 3, 0.5, True)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 0.1
    assert "lr: 0.1" in repr(optimizer)
    assert repr(optimizer).startswith("GemsOptimizer")


@pytest.mark.parametrize("option", ["lr", "weight_decay", "betas"])
def test_the_groups_are_what_counts_at_every_step(device, option):
    """Changed on the wrapper's groups between steps, as schedulers and users do."""
    value = {"lr": 0.2, "weight_decay": 0.7, "betas": (0.1, 0.2)}[option]
    ends = []
    for late in (True, False):
        model = mlp(device=device)
        base = torch.optim.AdamW(
            model.parameters(), **{"lr": 0.01, "weight_decay": 0.1, **({} if late else {option: value})}
        )
        optimizer = gems(model, base=base)
        optimizer.param_groups[0][option] = value
        train(model, optimizer, 3)
        ends.append(weights_of(model))
    assert same(*ends)
    changed = mlp(device=device)
    train(changed, gems(changed, base=torch.optim.AdamW(changed.parameters(), lr=0.01, weight_decay=0.1)), 3)
    assert not same(ends[0], changed.parameters())


def test_a_closure_runs_once_with_gradients_and_its_result_is_returned(device):
    model, plain = mlp(device=device), mlp(device=device)
    optimizer = gems(model)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        for task, name in enumerate(TASKS):
            with optimizer.task(name, samples=(24.0, 8.0)[task]):
                loss = loss_of(model, 0, task)
                loss.backward()
        return loss.item()

    with torch.no_grad():
        result = optimizer.step(closure)
    assert calls == [True]
    assert result == pytest.approx(loss_of(plain, 0, 1).item())
    assert optimizer.step() is None
    train(plain, gems(plain), 1)
    assert same(model.parameters(), plain.parameters())


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_both_ways(device, to_none):
    model, other = mlp(device=device), mlp(device=device)
    optimizer, reference = gems(model), gems(other)
    for step in range(5):
        for each, network in ((optimizer, model), (reference, other)):
            loss_of(network, step, 5).backward()
            with each.task("rec"):
                loss_of(network, step, 1).backward()
            each.step()
        optimizer.zero_grad(set_to_none=to_none)
        reference.zero_grad()
        for p in model.parameters():
            assert p.grad is None if to_none else not bool(p.grad.any())
    assert same(model.parameters(), other.parameters())


def test_hooks_of_the_instance_fire_once_a_step(device):
    model = mlp(device=device)
    optimizer = gems(model)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o)))
    train(model, optimizer, 2)
    assert seen == [("pre", optimizer), ("post", optimizer)] * 2


def test_global_hooks_fire_once_a_step(device):
    model = mlp(device=device)
    optimizer = gems(model)
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(("post", o))),
    ]
    try:
        train(model, optimizer, 2)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [("pre", optimizer), ("post", optimizer)] * 2


def test_state_dict_hooks_fire(device):
    model = mlp(device=device)
    optimizer = gems(model)
    seen = []
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    optimizer.load_state_dict(state_dict=optimizer.state_dict())
    assert seen == ["saved", "loading", "loaded"]


@pytest.mark.parametrize("with_null_space", [False, True])
def test_a_group_added_later_trains_like_one_from_the_start(device, with_null_space):
    ends = []
    for late in (False, True):
        model = mlp(device=device)
        null_space = null_space_of(model, rank=2) if with_null_space else None
        start = model[2].weight.detach().clone()
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 0.05}]
        base = torch.optim.AdamW(groups[:1] if late else groups, lr=0.01)
        model[2].requires_grad_(not late)
        optimizer = gems(model, base=base, null_space=null_space)
        if late:
            model[2].weight.requires_grad_(True)
            model[2].bias.requires_grad_(not with_null_space)  # which does not hold it
            optimizer.add_param_group({**groups[1], "rank": 4})
        assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
        train(model, optimizer, 4)
        ends.append(weights_of(model))
        if null_space is not None:
            assert leak(model[2].weight.detach() - start, null_space.basis("2"), "input") < 1e-6
    assert same(*ends)


def test_a_group_added_in_training_is_in_state_reports_and_checkpoints(device):
    model = mlp(device=device)
    with pytest.warns(UserWarning, match="^2 of target_modules require gradients, but are not among the base"):
        optimizer = gems(model, base=torch.optim.AdamW(model[0].parameters(), lr=0.01))
    train(model, optimizer, 2)
    model.zero_grad()  # what nobody optimized has gathered gradients
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.02})
    assert optimizer.state[model[2].weight]["basis"].shape == (16, 8)
    before = weights_of(model[2])
    train(model, optimizer, 1, start=2)
    assert not same(before, model[2].parameters())
    assert [(layer.name, layer.step) for layer in optimizer.report().layers] == [("0", 3), ("2", 1)]
    assert len(optimizer.state_dict()["param_groups"]) == 2


def test_the_global_generators_are_untouched(device):
    model = mlp((200, 90, 80), device=device)
    null_space = null_space_of(model)
    before = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device.type == "cuda" else [])]
    optimizer = gems(model, null_space=null_space)
    train(model, optimizer, 4)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.report()
    assert same(before, [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device.type == "cuda" else [])])


def test_parameter_hooks_see_whole_gradients_and_may_change_them(device):
    model = mlp((12, 16), bias=False, device=device)
    optimizer = gems(model, base=torch.optim.SGD(model.parameters(), lr=1.0))
    train(model, optimizer, 1)
    seen = []

    def halve(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(gradient.shape)
        return gradient * 0

    model[0].weight.register_hook(halve)
    before = weights_of(model)
    train(model, optimizer, 1, start=1)
    assert seen == [(16, 12)] * 2
    assert same(before, model.parameters())


def test_an_optimizer_without_any_decomposed_layer_is_the_bare_one(device):
    model, bare = mlp(device=device), mlp(device=device)
    groups = [{"params": list(model.parameters()), "subspace": False}]
    optimizer = GemsOptimizer(torch.optim.AdamW(groups, lr=0.01), tasks=())
    reference = torch.optim.AdamW(bare.parameters(), lr=0.01)
    for step in range(4):
        for network, each in ((model, optimizer), (bare, reference)):
            loss_of(network, step, 0).backward()
            each.step()
            each.zero_grad()
    assert same(model.parameters(), bare.parameters())
    assert optimizer.report().layers == []
    assert len(tensors_in(optimizer.state_dict())) == len(tensors_in(reference.state_dict()))


def test_named_parameters_name_the_report(device):
    model = nn.ModuleDict({"query": nn.Linear(9, 8)}).to(device)
    optimizer = GemsOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), tasks=TASKS, rank=2)
    with optimizer.task("rec"):
        model["query"](torch.randn(3, 9, device=device)).sum().backward()
    optimizer.step()
    assert [layer.name for layer in optimizer.report().layers] == ["query"]
