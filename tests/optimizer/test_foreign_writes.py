"""What somebody else writes into a weight between two steps stays as it was put there, and leaks nowhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer, NullSpace

WIDTH, PROTECTED = 32, 6


def scaled(weight):
    weight.mul_(0.5)


def perturbed(weight):
    weight.mul_(0.9).add_(0.01 * torch.randn(weight.shape).to(weight))


def one_entry(weight):
    weight[3, 5] += 1.0


def a_little(weight):
    weight.mul_(1 + 1e-3)


def clipped(weight):
    weight.clamp_(-0.1, 0.1)


def pruned(weight):
    weight.mul_((weight.abs() > 0.05).to(weight))


def loaded(weight):
    weight.copy_(torch.randn(weight.shape) / 6)


def through_data(weight):
    weight.data = weight.data * 1.5


WRITES = [scaled, perturbed, one_entry, a_little, clipped, pruned, loaded, through_data]


class World:
    def __init__(self, device, side="input", base=None, dtype=torch.float32, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).to(device, dtype)
        self.K = torch.linalg.qr(torch.randn(WIDTH, PROTECTED)).Q.to(device, dtype)
        null_space = NullSpace(side=side, energy=1.0)
        null_space.update("0", self.K.mT)
        make = base or (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))
        self.optimizer = GemsOptimizer(
            make(self.model.parameters()),
            tasks=("a",),
            rank=8,
            side=side,
            model=self.model,
            null_space=null_space,
            **options,
        )
        self.side = side

    @property
    def weight(self):
        return self.model[0].weight

    def protected_part(self):
        weight = self.optimizer.state[self.weight].get("master", self.weight.detach()).double()
        return weight @ self.K.double() if self.side == "input" else self.K.double().mT @ weight

    def step(self):
        x = torch.randn(16, WIDTH).to(self.weight)
        with self.optimizer.task("a"):
            self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def write(self, how):
        with torch.no_grad():
            how(self.weight)


def off(now, put):
    """The largest change of a protected answer, relative to their size."""
    return float((now - put).norm() / put.norm())


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("gap", [200, 20])
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_weight_written_between_two_refreshes(side, gap, how, device):
    world = World(device, side, update_proj_gap=gap)
    for _ in range(7):
        world.step()
    world.write(how)
    put, start = world.protected_part(), world.weight.detach().clone()
    for _ in range(60):
        world.step()
    assert off(world.protected_part(), put) < 2e-6
    assert (world.weight - start).norm() > 0.05 * start.norm(), "it stands still"


@pytest.mark.parametrize("how", [pruned, clipped, perturbed])
def test_a_weight_written_after_every_step(how, device):
    world = World(device, update_proj_gap=10)
    for _ in range(40):
        world.step()
        world.write(how)
        put = world.protected_part()
    world.step()
    assert off(world.protected_part(), put) < 2e-6


BASES = {
    "fixed decay": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), weight_decay=0.1),
    "decoupled Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "coupled": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1, momentum=0.9),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
}


@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("base", list(BASES))
def test_whatever_decays(base, refresh, device):
    world = World(device, base=BASES[base], refresh=refresh)
    world.step()
    world.write(scaled)
    put = world.protected_part()
    for _ in range(30):
        world.step()
    assert off(world.protected_part(), put) < 2e-6


def test_a_weight_average_swapped_in_and_out(device):
    world = World(device, update_proj_gap=10)
    average = world.weight.detach().clone()
    before = world.protected_part()
    for _ in range(25):
        world.step()
        average.lerp_(world.weight.detach(), 0.1)
        kept = world.weight.detach().clone()
        world.write(lambda weight: weight.copy_(average))
        world.write(lambda weight, kept=kept: weight.copy_(kept))
    assert off(world.protected_part(), before) < 2e-6
    world.write(lambda weight: weight.copy_(average))
    put = world.protected_part()
    for _ in range(25):
        world.step()
    assert off(world.protected_part(), put) < 2e-6


def test_a_master_copy_follows(device):
    world = World(device, dtype=torch.bfloat16, master_weights=True, update_proj_gap=10)
    for _ in range(3):
        world.step()
    world.write(scaled)
    world.step()
    put = world.protected_part()
    for _ in range(30):
        world.step()
    assert off(world.protected_part(), put) < 5e-5  # K itself is rounded to bfloat16 in this test


def test_decay_reaches_what_is_not_protected(device):
    """Without gradients along it, the free part of a weight written anew shrinks by lr times decay a step."""
    world = World(device, base=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5), update_proj_gap=1)
    world.step()
    world.write(loaded)
    K, before = world.K, world.weight.detach().clone()
    with world.optimizer.task("a"):
        (world.model(torch.zeros(2, WIDTH, device=device)) * 0).sum().backward()
    state = world.optimizer.state[world.weight]
    for key in [key for key in state if key.endswith("exp_avg")]:
        state[key].zero_()
    world.optimizer.step()
    free = before - before @ K @ K.mT
    torch.testing.assert_close(world.weight.detach(), before - 0.05 * free, rtol=1e-5, atol=1e-6)


def test_an_anchor_is_of_one_layer(device):
    """Of several of one shape, of which one is written by somebody else."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)]).to(device)
    null_space = NullSpace(max_rank=PROTECTED).collect(model, [torch.randn(64, WIDTH).to(model[0].weight)])
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"rank": 8, "update_proj_gap": 2, "model": model, "null_space": null_space, "anchor": True}
    optimizer = GemsOptimizer(base, tasks=("a",), **options)
    for step in range(6):
        if step == 3:
            with torch.no_grad():
                scaled(model[1].weight)
        with optimizer.task("a"):
            model(torch.randn(16, WIDTH).to(model[0].weight)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, name in zip(model, "012", strict=True):
        protected = layer.weight.detach() @ null_space.basis(name).to(layer.weight)
        torch.testing.assert_close(optimizer.state[layer.weight]["anchor"].to(protected), protected, rtol=0, atol=1e-5)
