"""The guarantee: what the null space protects does not move, whatever the inner optimizer does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer, NullSpace

from .toys import TASKS, gems, leak, mlp, noise, null_space_of, protected_inputs, train, weights_of


def decayed_adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("orthogonalize", ["none", "shared_first"])
def test_protected_directions_rest_over_50_adamw_steps_with_decay(device, side, orthogonalize):
    model = mlp((12, 16, 8), device=device)
    null_space = null_space_of(model, side)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in null_space}
    assert set(before) == {"0", "2"}
    options = {"side": side, "null_space": null_space, "orthogonalize": orthogonalize, "update_proj_gap": 10}
    train(model, gems(model, base=decayed_adamw(model), **options), 50)
    for name, old in before.items():
        change = model.get_submodule(name).weight.detach() - old
        protected = null_space.basis(name)
        assert protected.shape[1] >= 2
        assert float(change.norm()) > 0.05 * float(old.norm())  # it did learn
        assert leak(change, protected, side) < 1e-6
        inside = old @ protected if side == "input" else protected.mT @ old
        moved = change @ protected if side == "input" else protected.mT @ change
        assert float(moved.norm()) < 1e-6 * float(inside.norm())


def test_without_a_null_space_the_same_directions_do_move(device):
    """So that the tests above measure the protection, and not a problem that leaves these directions alone."""
    model = mlp((12, 16, 8), device=device)
    null_space = null_space_of(model)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in null_space}
    train(model, gems(model, base=decayed_adamw(model), update_proj_gap=10), 50)
    for name, old in before.items():
        assert leak(model.get_submodule(name).weight.detach() - old, null_space.basis(name), "input") > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layer_answers_protected_inputs_as_before(device, dtype):
    """side="input", weights only: layer by layer, and so the whole network, too."""
    model = mlp((12, 16, 8), bias=False, dtype=dtype, device=device)
    general = protected_inputs(model[0].weight)
    null_space = NullSpace(side="input", energy=1.0, max_rank=6).collect(model, [general])
    hidden = model[:2](general).detach()
    first, network = model[0](general).detach(), model(general).detach()
    held = hidden @ (null_space.basis("2", dtype).to(device) @ null_space.basis("2", dtype).to(device).mT)
    second = model[2](held).detach()
    other = noise(20, 12, key=(8,), like=first)
    elsewhere = model(other).detach()
    train(model, gems(model, base=decayed_adamw(model), null_space=null_space), 50)
    # Rounding is relative to the answers, and depends on the processor.
    close = {"rtol": 0.0, "atol": 16 * torch.finfo(dtype).eps * float(first.abs().max())}
    torch.testing.assert_close(model[0](general).detach(), first, **close)
    torch.testing.assert_close(model[2](held).detach(), second, **close)
    assert float((model(other) - elsewhere).detach().norm()) > 0.2 * float(elsewhere.norm())
    if null_space.protected_fraction("2") * 16 < 6:  # all that general text uses in the second layer fitted in
        torch.testing.assert_close(model(general).detach(), network, rtol=0, atol=1e-3)


def test_no_input_moves_a_protected_output(device):
    """side="output": the part of every output along the protected directions stays, for inputs never seen."""
    model = mlp((12, 16), bias=False, device=device)
    null_space = null_space_of(model, "output")
    protected = null_space.basis("0").to(device)
    anything = noise(50, 12, key=(77,)).to(device) * 10
    before = (model(anything) @ protected).detach()
    train(model, gems(model, base=decayed_adamw(model), side="output", null_space=null_space), 50)
    torch.testing.assert_close((model(anything) @ protected).detach(), before, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("side", ["input", "output"])
def test_decay_without_a_null_space_is_adamws(device, side):
    """The difference that weight_decay makes to one step is -lr * weight_decay * W, as under the bare AdamW."""
    ends, olds = [], []
    for decay in (0.0, 0.3):
        model = mlp(dtype=torch.float64, device=device)
        olds = weights_of(model)
        base = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=decay)
        train(model, gems(model, base=base, side=side), 1)
        ends.append(weights_of(model))
    for old, free, decayed in zip(olds, *ends, strict=True):
        torch.testing.assert_close(decayed - free, -0.05 * 0.3 * old, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", ["input", "output"])
def test_decay_acts_outside_of_the_protected_directions_only(device, side):
    ends, olds = [], []
    null_space = null_space_of(mlp(device=device), side)
    for decay in (0.0, 0.3):
        model = mlp(dtype=torch.float64, device=device)
        olds = {name: model.get_submodule(name).weight.detach().clone() for name in null_space}
        base = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=decay)
        train(model, gems(model, base=base, side=side, null_space=null_space), 1)
        ends.append({name: model.get_submodule(name).weight.detach() for name in null_space})
    for name, old in olds.items():
        protected = null_space.basis(name, torch.float64).to(device)
        inside = old @ protected @ protected.mT if side == "input" else protected @ (protected.mT @ old)
        assert float(inside.norm()) > 0.05 * float(old.norm())
        torch.testing.assert_close(ends[1][name] - ends[0][name], -0.05 * 0.3 * (old - inside), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("side", ["input", "output"])
def test_coupled_decay_keeps_the_null_space_and_shrinks_the_rest(device, side):
    model = mlp((12, 16), device=device)
    null_space = null_space_of(model, side)
    old = model[0].weight.detach().clone()
    norms = []
    for decay in (0.5, 0.0):
        model = mlp((12, 16), device=device)
        base = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=decay)
        train(model, gems(model, base=base, side=side, null_space=null_space, rank=8), 20)
        assert leak(model[0].weight.detach() - old, null_space.basis("0"), side) < 1e-6
        norms.append(model[0].weight.detach().norm())
    assert norms[0] < norms[1]


@pytest.mark.parametrize("side", ["input", "output"])
def test_weights_tied_in_two_places_keep_what_either_protects(device, side):
    tied = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)).to(device)
    tied[1].weight = tied[0].weight
    null_space = NullSpace(side=side, max_rank=2)
    for name, key in (("0", 1), ("1", 2)):
        null_space.update(name, noise(30, 12, key=(key,)))
    old = tied[0].weight.detach().clone()
    train(tied, gems(tied, side=side, null_space=null_space), 10)
    change = tied[0].weight.detach() - old
    assert float(change.norm()) > 0
    for name in ("0", "1"):
        assert leak(change, null_space.basis(name), side) < 1e-6


class Conv1D(nn.Module):
    """A linear layer that stores its weight as GPT-2 does: in_features x out_features."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(noise(nx, nf, key=(3,)) / nx**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_a_transposed_weight_keeps_its_answers_too(device):
    model = nn.Sequential(Conv1D(8, 12)).to(device)
    general = protected_inputs(torch.empty(8, 12, device=device))
    null_space = NullSpace(side="input", energy=1.0).collect(model, [general])
    before, start = model(general).detach(), model[0].weight.detach().clone()
    optimizer = GemsOptimizer(decayed_adamw(model), tasks=TASKS, rank=3, model=model, null_space=null_space)
    assert optimizer.state[model[0].weight]["basis"].shape == (12, 3 + 1 + 1)
    for _ in range(20):
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                (model(noise(9, 12, key=(task,)).to(device)) - task).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model(general).detach(), before, rtol=0, atol=2e-6)
    assert float((model[0].weight - start).detach().norm()) > 0.1


def test_a_layer_that_is_protected_wholly_says_so_and_rests(device):
    model = mlp((6, 8), bias=False, device=device)
    null_space = NullSpace(energy=1.0)
    null_space.update("0", torch.eye(6))
    old = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="protects all 6 directions of 0"):
        optimizer = gems(model, base=decayed_adamw(model), null_space=null_space)
    train(model, optimizer, 3)
    torch.testing.assert_close(model[0].weight.detach(), old, rtol=0, atol=1e-6)


def test_a_null_space_that_is_new_at_a_resume_protects_from_the_first_step(device):
    model = mlp((12, 16), device=device)
    optimizer = gems(model, update_proj_gap=100)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    null_space = null_space_of(model)
    resumed = gems(model, update_proj_gap=100, null_space=null_space)
    resumed.load_state_dict(saved)
    old = model[0].weight.detach().clone()
    train(model, resumed, 5, start=2)
    assert leak(model[0].weight.detach() - old, null_space.basis("0"), "input") < 1e-6
