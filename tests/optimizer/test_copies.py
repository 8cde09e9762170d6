"""Copies, pickles and successors of an optimizer."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.distributed.checkpoint import state_dict as dcp

from gradsub import GemsOptimizer

from .toys import TASKS, gems, loss_of, mlp, null_space_of, same, tensors_in, train


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("base", ["AdamW", "SGD", "Adagrad"])
@pytest.mark.parametrize("steps", [0, 2, 3])
def test_a_copy_goes_on_bit_for_bit_and_alone(device, way, base, steps):
    model = mlp(device=device)
    inner = getattr(torch.optim, base)(model.parameters(), lr=0.01)
    optimizer = gems(model, base=inner, null_space=null_space_of(model, rank=2))
    train(model, optimizer, steps)
    pair = (model, optimizer)
    twin, copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    before = [*tensors_in(list(twin.parameters())), *tensors_in(copied.state_dict())]
    train(model, optimizer, 4, start=steps)
    assert same(before, [*twin.parameters(), *tensors_in(copied.state_dict())])
    train(twin, copied, 4, start=steps)
    assert same(model.parameters(), twin.parameters())
    assert same(tensors_in(optimizer.state_dict()), tensors_in(copied.state_dict()))
    assert optimizer.report().to_dict() == copied.report().to_dict()
    assert all(p.grad is None for p in twin.parameters())


def test_a_copied_model_alone_has_ordinary_gradients(device):
    model = mlp(device=device)
    optimizer = gems(model)
    train(model, optimizer, 1)
    twin = copy.deepcopy(model)
    with optimizer.task("rec"):
        loss_of(twin, 0, 0).backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_an_optimizer_is_freed_with_its_last_reference_and_a_second_takes_over(device):
    model, reference = mlp(device=device), mlp(device=device)
    first = gems(model)
    train(model, first, 2)
    with first.task("rec"):
        loss_of(model, 0, 0).backward()
    gone = [weakref.ref(first), weakref.ref(first.state[model[0].weight]["basis"])]
    del first
    gc.collect()
    assert [each() for each in gone] == [None, None]  # nor do its hooks hold the state's memory
    loss_of(model, 0, 0).backward()  # an ordinary backward is ordinary again
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    reference.load_state_dict(model.state_dict())
    train(model, gems(model), 4)
    train(reference, gems(reference), 4)
    assert same(model.parameters(), reference.parameters())


def test_two_optimizers_over_the_same_parameters_do_not_see_each_others_tasks(device):
    model, alone = mlp(device=device), mlp(device=device)
    first, second = gems(model), gems(model)
    train(model, second, 3)
    first.step()
    train(alone, gems(alone), 3)
    assert same(model.parameters(), alone.parameters())


def test_after_close_gradients_stay_in_the_parameters(device):
    model = mlp(device=device)
    optimizer = gems(model)
    optimizer.close()
    with optimizer.task("rec"):
        loss_of(model, 0, 0).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("steps", [0, 2, 3])
def test_distributed_checkpoint_helpers_round_trip(device, flatten, steps):
    """Keys are fully qualified names; nothing is stepped on the way."""
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = mlp(device=device)
    optimizer = gems(model)
    train(model, optimizer, steps)
    weights = copy.deepcopy(dcp.get_model_state_dict(model))
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    assert any("0.weight" in str(key) for key in (saved if flatten else saved["state"]))
    fresh = mlp(seed=9, device=device)
    again = gems(fresh)
    dcp.get_optimizer_state_dict(fresh, again, options=options)  # as DCP's load does, to know what to fill
    dcp.set_model_state_dict(fresh, weights)
    dcp.set_optimizer_state_dict(fresh, again, saved, options=options)
    train(model, optimizer, 4, start=steps)
    train(fresh, again, 4, start=steps)
    assert same(model.parameters(), fresh.parameters())


def test_a_copy_keeps_the_name_of_what_it_is(device):
    model = mlp(device=device)
    twin = copy.deepcopy((model, gems(model)))[1]
    assert isinstance(twin, GemsOptimizer)
    assert twin.tasks == TASKS
    assert repr(twin) == repr(gems(mlp(device=device)))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_takes_up_a_parameter_that_was_frozen(device, way):
    model = mlp(device=device)
    model[0].bias.requires_grad_(False)
    pair = model, gems(model)
    model, optimizer = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    model[0].bias.requires_grad_(True)
    start = model[0].bias.detach().clone()
    train(model, optimizer, 1)
    assert bool((model[0].bias.detach() != start).all())
