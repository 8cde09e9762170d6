"""One conformance suite for everything that may be wrapped."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsub import GemsOptimizer

from .toys import TASKS, gems, leak, loss_of, mlp, noise, null_space_of, tensors_in, train, weights_of

Make = Callable[[Iterable[Any]], Optimizer]


def of_torch(name: str, **options: Any) -> Make:
    return lambda parameters: getattr(torch.optim, name)(parameters, **options)


def of_pytorch_optimizer(name: str, **options: Any) -> Make:
    return lambda parameters: getattr(importlib.import_module("pytorch_optimizer"), name)(parameters, **options)


PREPOPULATED = {
    "AdamW": of_torch("AdamW", lr=2e-2),
    "AdamW foreach": of_torch("AdamW", lr=2e-2, foreach=True),
    "AdamW fused": of_torch("AdamW", lr=2e-2, fused=True),
    "AdamW maximize": of_torch("AdamW", lr=2e-2, maximize=True),
    "AdamW tensor lr": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(2e-2)),
    "Adam amsgrad": of_torch("Adam", lr=2e-2, amsgrad=True),
    "SGD": of_torch("SGD", lr=1e-1),
    "SGD momentum": of_torch("SGD", lr=5e-2, momentum=0.9),
    "SGD nesterov foreach": of_torch("SGD", lr=5e-2, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": of_torch("SGD", lr=5e-2, momentum=0.9, fused=True),
    "RMSprop": of_torch("RMSprop", lr=1e-2),
    "RMSprop centered momentum": of_torch("RMSprop", lr=3e-3, centered=True, momentum=0.5),
    "Adagrad": of_torch("Adagrad", lr=1e-1, initial_accumulator_value=0.1),
    "Adamax": of_torch("Adamax", lr=2e-2),
    "NAdam": of_torch("NAdam", lr=2e-2),
    "RAdam": of_torch("RAdam", lr=1e-1),
    "Adadelta": of_torch("Adadelta", lr=20.0),
}
OTHERS = {
    # Its step is relative to the weight's mean square, but never below eps[1]: for a zero proxy, eps[1] it is.
    "Adafactor absolute": of_torch("Adafactor", lr=2e-1, eps=(None, 1.0)),
    "Lion": of_pytorch_optimizer("Lion", lr=5e-3),
    "AdaBelief": of_pytorch_optimizer("AdaBelief", lr=1e-2),
}
if hasattr(torch.optim, "Muon"):
    OTHERS["Muon"] = of_torch("Muon", lr=2e-2, weight_decay=0.0)
ALL = PREPOPULATED | OTHERS

every = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
prepopulated = pytest.mark.parametrize("make", PREPOPULATED.values(), ids=PREPOPULATED.keys())


def network(make: Make, device: torch.device) -> nn.Sequential:
    """Without biases: Muon takes matrices only."""
    return mlp((12, 16, 8), bias=False, device=device)


def total_loss(model: nn.Module) -> float:
    return sum(loss_of(model, step, task).item() for step in range(3) for task in range(2))


@every
@pytest.mark.parametrize("side", ["input", "output"])
def test_learns_and_keeps_the_null_space(device, make, side):
    model = network(make, device)
    null_space = null_space_of(model, side, rank=2)
    optimizer = gems(model, base=make(model.parameters()), side=side, null_space=null_space, update_proj_gap=10)
    old = {name: model.get_submodule(name).weight.detach().clone() for name in null_space}
    start = total_loss(model)
    ascend = optimizer.param_groups[0].get("maximize", False)
    for step in range(30):
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                loss = loss_of(model, step % 3, task)
                (-loss if ascend else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert total_loss(model) < 0.9 * start
    for name, before in old.items():
        assert leak(model.get_submodule(name).weight.detach() - before, null_space.basis(name), side) < 1e-6


def test_adafactor_as_it_comes_moves_as_far_as_the_bare_one():
    moved = []
    for wrap in (False, True):
        weight = nn.Parameter(noise(9, 8, key=(1,)))
        base = torch.optim.Adafactor([weight], lr=1e-2)
        optimizer = GemsOptimizer(base, tasks=(), rank=7) if wrap else base
        start = weight.detach().clone()
        for step in range(3):
            weight.grad = noise(9, 8, key=(2, step))
            optimizer.step()
        moved.append(float((weight.detach() - start).norm()))
    assert 0.2 < moved[1] / moved[0] < 5


@every
def test_solves_a_quadratic(device, make):
    """|| W - target ||^2 with a target of rank 2: two directions are enough, so the subspace holds all there is."""
    target = noise(9, 2, key=(1,)) @ noise(2, 7, key=(2,))
    target = (target / target.norm() * 3).to(device)
    weight = nn.Parameter(torch.zeros(9, 7, device=device))
    optimizer = GemsOptimizer(make([weight]), tasks=["only"], rank=2, task_rank=1, update_proj_gap=10)
    ascend = optimizer.param_groups[0].get("maximize", False)
    for _ in range(80):
        with optimizer.task("only"):
            ((weight - target).square().sum() * (-0.5 if ascend else 0.5)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float((weight - target).detach().norm()) < 0.5 * 3


@prepopulated
def test_state_is_there_from_the_start_and_keeps_its_shapes(device, make):
    model = mlp((12, 16, 8), device=device)
    optimizer = gems(model, base=make(model.parameters()))

    def shapes() -> dict[Any, dict[str, Any]]:
        return {
            key: {
                name: (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)
                for name, value in s.items()
            }
            for key, s in optimizer.state_dict()["state"].items()
        }

    first = shapes()
    assert {0, 2} <= set(first)
    assert {"step", "basis", "next_refresh"} <= set(first[0])
    assert all(isinstance(value, tuple) for state in first.values() for value in state.values())
    train(model, optimizer, 5)
    assert shapes() == first
    state = optimizer.state[model[0].weight]
    moving = [value for name, value in state.items() if name.startswith("inner.") and value.ndim == 2]
    assert all(bool(value.any()) for value in moving)


def whole_space(make: Make, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """A start, and where the bare optimizer and one whose shared subspace is everything get to from there."""
    shape = (6, 5) if side == "input" else (5, 6)  # a rank is capped at min(m, n): only the shorter side fits wholly
    start = noise(*shape, key=(1,)).double()
    bare, weight = (nn.Parameter(start.clone()) for _ in range(2))
    reference = make([bare])
    layer = nn.Linear(*reversed(shape), bias=False)
    layer.weight = weight
    options = {"tasks": (), "rank": 5, "side": side, "update_proj_gap": 3, "model": nn.Sequential(layer)}
    with pytest.warns(UserWarning, match="rank=5"):
        optimizer = GemsOptimizer(make([weight]), **options)
    for step in range(8):
        gradient = noise(*shape, key=(2, step)).double()
        for parameter, each in ((bare, reference), (weight, optimizer)):
            parameter.grad = gradient.clone()
            each.step()
            each.zero_grad()
    return start, bare.detach(), weight.detach()


ROTATION_INVARIANT = {
    "SGD": of_torch("SGD", lr=0.1),
    "SGD momentum": of_torch("SGD", lr=0.1, momentum=0.9),
    "SGD momentum dampening": of_torch("SGD", lr=0.1, momentum=0.9, dampening=0.5),
    "SGD nesterov": of_torch("SGD", lr=0.1, momentum=0.9, nesterov=True),
    "SGD weight decay": of_torch("SGD", lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD maximize": of_torch("SGD", lr=0.1, momentum=0.9, weight_decay=0.1, maximize=True),
}


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("make", ROTATION_INVARIANT.values(), ids=ROTATION_INVARIANT.keys())
def test_in_the_whole_space_a_rotation_invariant_optimizer_is_the_bare_one(make, side):
    """Over three refreshes, so that moments must follow the basis."""
    _, bare, wrapped = whole_space(make, side)
    torch.testing.assert_close(wrapped, bare, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("side", ["input", "output"])
def test_in_the_whole_space_muon_is_the_bare_one(side):
    make = functools.partial(torch.optim.Muon, lr=0.05, weight_decay=0.1, ns_steps=5)
    start, bare, wrapped = whole_space(make, side)
    assert float((wrapped - bare).norm()) < 0.05 * float((bare - start).norm())  # Newton-Schulz runs in bfloat16


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adagrad"])
def test_fused_and_foreach_equal_the_plain_loop(name, fused):
    ends = []
    for options in ({"foreach": False}, {"fused": True} if fused else {"foreach": True}):
        model = mlp()
        base = getattr(torch.optim, name)(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
        train(model, gems(model, base=base), 5)
        ends.append([p.detach() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flag", [True, False])
def test_decoupled_decay_of_adam_is_adamws(device, flag):
    """Adam(decoupled_weight_decay=True) is AdamW; without the flag it is not."""
    ends = []
    for make in (torch.optim.AdamW, functools.partial(torch.optim.Adam, decoupled_weight_decay=flag)):
        model = mlp(device=device)
        train(model, gems(model, base=make(model.parameters(), lr=1e-2, weight_decay=0.5)), 4)
        ends.append(tensors_in(list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True)) is flag


def test_fixed_decay_does_not_depend_on_the_learning_rate():
    weight = nn.Parameter(torch.ones(6, 5))
    base = of_pytorch_optimizer("Lion", lr=1e-3, weight_decay=0.1, fixed_decay=True)([weight])
    optimizer = GemsOptimizer(base, tasks=TASKS, rank=2)
    with optimizer.task("rec"):
        (weight * 0).sum().backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((6, 5), 0.9))


class Proportional(torch.optim.Optimizer):
    """Against the sign of the gradient; in some groups as far as the parameter is large."""

    def __init__(self, params, lr=1e-2, relative=False):
        super().__init__(params, {"lr": lr, "relative": relative})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    size = p.square().mean().sqrt().clamp_min(1e-3) if group["relative"] else 1.0
                    p.sub_(p.grad.sign() * group["lr"] * size)


def test_groups_with_relative_steps_beside_others(device):
    model = mlp((12, 16, 16, 8), bias=False, device=device)
    first, second, third = (model[place].weight for place in (0, 2, 4))
    base = Proportional([{"params": [first, second]}, {"params": [third], "relative": True}])
    before = weights_of(model)
    train(model, gems(model, base=base, rank=4), 2)
    moved = [float((new - old).norm() / new.numel() ** 0.5) for new, old in zip(weights_of(model), before, strict=True)]
    assert all(moved)
    assert moved[2] < 0.5 * min(moved[:2])  # its weights are less than half as large as 1
