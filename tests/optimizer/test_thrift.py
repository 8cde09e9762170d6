"""No state for what does not train, no full-size leftovers, and decay as the base class means it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer

from .toys import TASKS, gems, leak, mlp, null_space_of, train


def test_a_frozen_parameter_has_no_inner_state_until_it_trains():
    frozen, weight = nn.Parameter(torch.ones(30), requires_grad=False), nn.Parameter(torch.ones(6, 5))
    optimizer = GemsOptimizer(torch.optim.AdamW([frozen, weight]), tasks=TASKS, rank=2)
    assert not any(key.startswith("inner.") for key in optimizer.state.get(frozen, {}))
    frozen.requires_grad_(True)
    with optimizer.task("rec"):
        (frozen.sum() + weight.sum()).backward()
    optimizer.step()
    assert "inner.exp_avg" in optimizer.state[frozen]
    assert bool((frozen < 1).all())


def test_adagrads_first_accumulators_are_not_kept_whole():
    weight = nn.Parameter(torch.ones(60, 50))
    optimizer = GemsOptimizer(torch.optim.Adagrad([weight], initial_accumulator_value=0.3), tasks=TASKS, rank=2)
    held = optimizer._inner._initial[weight]["sum"]
    assert held.untyped_storage().nbytes() == held.element_size()
    assert bool((optimizer.state[weight]["inner.rec.sum"] == 0.3).all())


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_subclass_decays_as_its_parent(name):
    parent = getattr(torch.optim, name)
    ends = []
    for kind in (parent, type("Mine", (parent,), {})):
        weight = nn.Parameter(torch.ones(6, 5))
        optimizer = GemsOptimizer(kind([weight], lr=0.1, weight_decay=0.5), tasks=TASKS, rank=2)
        with optimizer.task("rec"):
            (weight * torch.arange(5.0)).sum().backward()
        optimizer.step()
        ends.append(weight.detach().clone())
    assert torch.equal(*ends)


def test_protection_survives_a_resume_without_the_null_space():
    """What a checkpoint says is protected stays so, even if the null space is not given again."""
    model = mlp()
    null_space = null_space_of(model, rank=2)
    optimizer = gems(model, null_space=null_space)
    train(model, optimizer, 4)
    again = gems(model)
    again.load_state_dict(optimizer.state_dict())
    old = {name: model.get_submodule(name).weight.detach().clone() for name in null_space}
    train(model, again, 8, start=4)
    for name, before in old.items():
        assert leak(model.get_submodule(name).weight.detach() - before, null_space.basis(name), "input") < 1e-6
