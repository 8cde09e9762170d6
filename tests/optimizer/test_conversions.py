"""A model that is converted or moved after its optimizer was built: the optimizer follows, as the bare one does."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer

from .toys import TASKS, gems, leak, loss_of, mlp, noise, null_space_of, same, tensors_in, train, weights_of

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "SGD dampened": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}
DTYPES = [torch.bfloat16, torch.float64]


def model_of(device: torch.device) -> nn.Sequential:
    return mlp((12, 16, 8), device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "options", [{}, {"side": "output", "gate": "hypergradient", "moments": "reset"}], ids=["", "all"]
)
def test_before_the_first_step_it_is_as_if_built_afterwards(device, dtype, base, options):
    model, other = model_of(device), model_of(device).to(dtype)
    optimizer = gems(model, base=BASES[base](model.parameters()), capture="fused", **options)
    model.to(dtype)
    expected = gems(other, base=BASES[base](other.parameters()), capture="fused", **options)
    for network, each in ((model, optimizer), (other, expected)):
        train(network, each, 5)
    assert same(weights_of(model), weights_of(other))
    saved, wanted = optimizer.state_dict(), expected.state_dict()
    assert same(tensors_in(saved["state"]), tensors_in(wanted["state"]))
    expected.load_state_dict(saved)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("capture", ["fused", "generic"])
def test_after_steps_training_goes_on(device, base, refresh, capture):
    """In float64 as in float32, but for rounding; and there and back changes nothing."""
    model, other, still = model_of(device), model_of(device), model_of(device)
    optimizers = [
        gems(network, base=BASES[base](network.parameters()), refresh=refresh, capture=capture)
        for network in (model, other, still)
    ]
    for network, optimizer in zip((model, other, still), optimizers, strict=True):
        train(network, optimizer, 4)
    model.double()
    train(model, optimizers[0], 1, start=4)
    other.double()
    with optimizers[1].task("rec"):
        pass  # it is noticed here
    other.float()
    train(other, optimizers[1], 2, start=4)
    train(still, optimizers[2], 1, start=4)
    for moved, wanted in zip(model.parameters(), still.parameters(), strict=True):
        assert moved.dtype == torch.float64
        torch.testing.assert_close(moved.float(), wanted, rtol=1e-3, atol=1e-4)
    train(still, optimizers[2], 1, start=5)
    assert same(weights_of(other), weights_of(still))


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.filterwarnings("ignore:the weights are torch.bfloat16")
def test_low_precision_after_steps(device, master_weights):
    model = model_of(device)
    null_space = null_space_of(model)
    optimizer = gems(model, null_space=null_space, master_weights=master_weights, free=True)
    train(model, optimizer, 4)
    model.bfloat16()
    start = [model[0].weight.detach().float().clone()]
    train(model, optimizer, 4, start=4)
    state = optimizer.state[model[0].weight]
    assert ("master" in state) == master_weights
    assert state["basis"].dtype == torch.float32
    assert optimizer.state[model[0].bias]["inner.exp_avg"].dtype == torch.bfloat16
    if master_weights:
        assert leak(state["master"] - start[0], null_space.basis("0"), "input") < 1e-5
    fresh = model_of(device).bfloat16()
    again = gems(fresh, null_space=null_space, master_weights=master_weights, free=True)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh.load_state_dict(model.state_dict())
    for network, each in ((model, optimizer), (fresh, again)):
        train(network, each, 4, start=8)
    assert same(weights_of(model), weights_of(fresh))
    model.float()
    train(model, optimizer, 2, start=12)
    assert "master" not in optimizer.state[model[0].weight]


def test_half_a_model(device):
    model = model_of(device)
    optimizer = gems(model)
    train(model, optimizer, 2)
    model[2].double()
    before = weights_of(model)
    for task in optimizer.tasks:
        with optimizer.task(task):
            x = noise(8, 12, key=(3,)).to(device)
            model[2](model[1](model[0](x)).double()).square().mean().backward()
    optimizer.step()
    assert all(bool((new != old).any()) for new, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("after", [0, 3])
def test_channels_last_after_construction(device, fused, after):
    ends = []
    for last in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)).to(device)
        groups = [{"params": [model[0].weight]}, {"params": [model[1].weight], "subspace": False}]
        optimizer = GemsOptimizer(torch.optim.AdamW(groups, lr=1e-2, fused=fused), tasks=TASKS, rank=2)
        for step in range(after + 3):
            if last and step == after:
                model.to(memory_format=torch.channels_last)
            for k, task in enumerate(optimizer.tasks):
                with optimizer.task(task):
                    model(noise(2, 3, 6, 6, key=(step, k)).to(device)).square().mean().backward()
            optimizer.step()
        ends.append(weights_of(model))
    for moved, wanted in zip(*ends, strict=True):
        torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-5)


def test_between_backward_and_step_it_is_refused_and_said(device):
    model = model_of(device)
    optimizer = gems(model)
    train(model, optimizer, 1)
    with optimizer.task("rec"):
        loss_of(model, 1, 1).backward()
    model.double()
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"0\.weight is torch\.float64 on .* now, it was torch\.float32.*zero_grad"):
        optimizer.step()
    assert same(before, weights_of(model))
    optimizer.zero_grad()
    train(model, optimizer, 2, start=1)
    assert not same(before, weights_of(model))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("base", BASES)
def test_a_model_that_moves_to_the_device_and_back(after, base):
    model, still = model_of(torch.device("cpu")), model_of(torch.device("cpu"))
    first, second = (gems(network, base=BASES[base](network.parameters())) for network in (model, still))
    for network, optimizer in ((model, first), (still, second)):
        train(network, optimizer, after)
    model.cuda()
    train(model, first, 2, start=after)
    model.cpu()
    train(model, first, 2, start=after + 2)
    train(still, second, 4, start=after)
    for moved, wanted in zip(model.parameters(), still.parameters(), strict=True):
        torch.testing.assert_close(moved, wanted, rtol=1e-2, atol=1e-3)


def grown(parameter: torch.Tensor) -> None:
    """Six more rows in place, as transformers' ``resize_token_embeddings`` has it."""
    parameter.data = torch.cat([parameter.data, parameter.data[:6]])


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", ["0.weight", "2.weight", "2.bias"])
@pytest.mark.parametrize("capture", ["fused", "generic"])
def test_another_shape_is_refused_with_both(device, capture, name, steps):
    model = model_of(device)
    optimizer = gems(model, base=torch.optim.AdamW(model.parameters(), lr=1e-2), capture=capture)
    train(model, optimizer, steps)
    before = weights_of(model)
    wanted = dict(model.named_parameters())[name]
    old = tuple(wanted.shape)
    grown(wanted)
    new = tuple(wanted.shape)
    says = re.escape(f"{name} has the shape {new} now, it had {old} when the optimizer was built")
    for act in (lambda: optimizer.task(TASKS[0]).__enter__(), optimizer.step):
        with pytest.raises(RuntimeError, match=f"{says}.*build a new one"):
            act()
    wanted.data = wanted.data[: old[0]].clone()
    assert same(before, weights_of(model)), "nothing was changed"
    train(model, optimizer, 1)


def test_another_shape_of_what_the_base_optimizer_keeps_nothing_of_is_its_own(device):
    """As `torch.optim.SGD` alone takes it."""
    models = [nn.Sequential(nn.Embedding(10, 12), nn.Linear(12, 8)).to(device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        base = torch.optim.SGD(model.parameters(), lr=1e-2)
        optimizer = gems(model, base=base, rank=4)
        if model is models[0]:
            grown(model[0].weight)
        for _ in range(2):
            with optimizer.task(TASKS[0]):
                model(torch.arange(10, device=device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(models[0][0].weight[:10], models[1][0].weight)
    torch.testing.assert_close(models[0][1].weight, models[1][1].weight)
