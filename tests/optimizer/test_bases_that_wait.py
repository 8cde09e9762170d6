"""A basis whose gradient says nothing yet stays as it is and stays due, whatever came before."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradsub import GemsOptimizer, NullSpace
from gradsub.subspace import SHARED, Block, Layer, SubspaceBank
from gradsub.subspace._schedule import next_place

from .toys import mlp, same, weights_of

WIDTH, INPUTS, DIRECTIONS, GAP = 32, 40, 3, 50
REFRESHES = ["svd", "sketch"]


def share_of(basis, directions):
    """How much of the directions (d x k, orthonormal) the basis holds: 1 for all."""
    return float((basis.mT @ directions).square().sum() / directions.shape[1])


class World:
    """Inputs, and so gradients, that live in a few directions; task "a" and task "b" have others."""

    def __init__(self, model, device, **options):
        draws = torch.Generator().manual_seed(3)
        self.U = torch.linalg.qr(torch.randn(INPUTS, 2 * DIRECTIONS, generator=draws)).Q.to(device)
        self.draws, self.device, self.model = draws, device, model.to(device)
        groups = [{"params": model[0].parameters()}, {"params": model[-1].parameters(), "subspace": False}]
        base = torch.optim.AdamW(groups, lr=1e-3)
        if options.get("capture") != "generic":
            options["model"] = model
            options["target_modules"] = ["0"]
        self.optimizer = GemsOptimizer(
            base, tasks=("a", "b"), rank=8, task_rank=4, update_proj_gap=GAP, seed=1, **options
        )

    def batch(self, task):
        z = torch.randn(64, DIRECTIONS, generator=self.draws).to(self.device)
        own = self.U[:, :DIRECTIONS] if task == "a" else self.U[:, DIRECTIONS:]
        return z @ own.mT, torch.cat([z, z.square()], dim=1)

    def step(self, factors):
        """A step of the tasks in ``factors``, whose losses are multiplied by them."""
        for task, factor in factors.items():
            x, y = self.batch(task)
            with self.optimizer.task(task):
                ((self.model(x) - y).square().mean() * factor).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def shares(self):
        """Of the directions of both tasks in the shared basis, and of each task's in its own."""
        basis = self.optimizer.state[self.model[0].weight]["basis"]
        return (
            share_of(basis[:, :8], self.U),
            share_of(basis[:, 8:12], self.U[:, :DIRECTIONS]),
            share_of(basis[:, 12:], self.U[:, DIRECTIONS:]),
        )


def two_layers(bias=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, WIDTH, bias=bias), nn.Tanh(), nn.Linear(WIDTH, 2 * DIRECTIONS, bias=bias))


@pytest.mark.parametrize("orthogonalize", ["none", "shared_first"])
@pytest.mark.parametrize("capture", ["fused", "generic"])
@pytest.mark.parametrize("refresh", REFRESHES)
def test_below_a_head_of_zeros(refresh, capture, orthogonalize, device):
    model = two_layers()
    nn.init.zeros_(model[2].weight)
    world = World(model, device, refresh=refresh, capture=capture, orthogonalize=orthogonalize)
    for _ in range(8):
        world.step({"a": 1.0, "b": 1.0})
    shared, *own = world.shares()
    assert shared > 0.999
    assert orthogonalize == "shared_first" or min(own) > 0.999
    next_refresh = world.optimizer.state[model[0].weight]["next_refresh"]
    assert (next_refresh > 8).all()
    assert (next_refresh <= GAP).all()


@pytest.mark.parametrize(
    "factors", [[0.0] * 5 + [1.0] * 4, [1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]]
)
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("refresh", REFRESHES)
def test_a_loss_that_warms_up_or_pauses(refresh, side, factors, device):
    world = World(two_layers(), device, refresh=refresh, side=side)
    state = world.optimizer.state[world.model[0].weight]
    for factor in factors:
        world.step({"a": factor, "b": factor})
    assert (state["next_refresh"] > len(factors)).all(), "the refresh never came about"
    if side == "input":
        assert min(world.shares()) > 0.999


@pytest.mark.parametrize("away", ["absent", "zero"])
@pytest.mark.parametrize("orthogonalize", ["none", "shared_first"])
@pytest.mark.parametrize("refresh", REFRESHES)
def test_a_task_that_comes_late(refresh, orthogonalize, away, device):
    world = World(two_layers(), device, refresh=refresh, orthogonalize=orthogonalize)
    for _ in range(30):
        world.step({"a": 1.0} if away == "absent" else {"a": 1.0, "b": 0.0})
    next_refresh = world.optimizer.state[world.model[0].weight]["next_refresh"]
    assert next_refresh[SHARED] > 30
    assert next_refresh[1] > 30
    assert next_refresh[2] <= 30, "a task without a gradient is not due any more"
    for _ in range(5):
        world.step({"a": 1.0, "b": 1.0})
    assert next_refresh[2] > 35
    basis = world.optimizer.state[world.model[0].weight]["basis"]
    # With "shared_first" the task's own basis has what the shared one lacks.
    both = basis[:, 12:] if orthogonalize == "none" else torch.cat([basis[:, :8], basis[:, 12:]], dim=1)
    assert share_of(both, world.U[:, DIRECTIONS:]) > 0.999


@pytest.mark.parametrize("capture", ["fused", "generic"])
@pytest.mark.parametrize("refresh", REFRESHES)
def test_an_expert_that_had_no_tokens_when_its_turn_came(refresh, capture, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, WIDTH, bias=False), nn.Linear(WIDTH, 2 * DIRECTIONS, bias=False))
    world = World(model, device, refresh=refresh, capture=capture)
    weight, state = model[0].weight, world.optimizer.state[model[0].weight]

    def step(tokens):
        for task in ("a", "b"):
            x, y = world.batch(task)
            with world.optimizer.task(task):
                hidden = model[0](x[:tokens])
                (model[1](hidden) - y[:tokens]).square().sum().backward()
        world.optimizer.step()
        world.optimizer.zero_grad()

    for tokens in [0] * 3 + [64] * 4:
        step(tokens)
    assert world.shares()[0] > 0.999
    while state["step"] < state["next_refresh"].min():
        step(64)
    turn = int(state["step"])
    before = state["basis"].clone()
    for _ in range(3):
        step(0)
    torch.testing.assert_close(state["basis"], before, rtol=0, atol=1e-6)
    assert weight.isfinite().all()
    for _ in range(4):
        step(64)
    assert (state["next_refresh"] > turn + 7).all()


@pytest.mark.parametrize("refresh", REFRESHES)
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_gradient_that_is_protected_as_a_whole_is_none(side, refresh, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, WIDTH, bias=False)).to(device)
    K = torch.linalg.qr(torch.randn(INPUTS if side == "input" else WIDTH, 5)).Q.to(device)
    null_space = NullSpace(side=side, energy=1.0)
    null_space.update("0", K.mT)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = GemsOptimizer(
        base, tasks=("a",), rank=4, model=model, null_space=null_space, side=side, refresh=refresh
    )
    state = optimizer.state[model[0].weight]

    def step(inside):
        x, y = torch.randn(16, INPUTS, device=device), torch.randn(16, WIDTH, device=device)
        if inside and side == "input":
            x = x @ K @ K.mT
        elif inside:
            y = y @ K @ K.mT
        with optimizer.task("a"):
            (model(x) * y).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        step(inside=True)
    assert (state["next_refresh"] <= state["step"]).all()
    for _ in range(3):
        step(inside=False)
    assert (state["next_refresh"] > state["step"]).all()


def bare_layer(device, widths=(4, 2), axis=1, index=1):
    weight = nn.Parameter(torch.zeros(12, 20, device=device))
    return Layer(name="w", parameter=weight, index=index, axis=axis, widths=widths, sketched=True)


KINDS = st.sampled_from(["good", "zero", "nan", "inf", "absent"])


@given(kinds=st.lists(KINDS, max_size=7), seed=st.integers(0, 99))
def test_random_bases_are_replaced_by_the_first_two_usable_sketches(kinds, seed, device):
    layer = bare_layer(device, widths=(4,))
    block, state = Block(0, [layer], layer.index), {layer.parameter: {}}
    bank = SubspaceBank("none", seed)
    bank.initialise(block)
    block.show(state)
    mine = state[layer.parameter]
    draws = torch.Generator().manual_seed(seed)
    taken = []
    for kind in [*kinds, *["good"] * 5]:
        before = mine["basis"].clone()
        sketches = {}
        if kind != "absent" and bank.due(block)[0, SHARED]:
            # Of rank 2: two of them fill the basis.
            Y = (torch.randn(20, 2, generator=draws) @ torch.randn(2, 9, generator=draws)).to(device)
            Y = {"good": Y, "zero": Y * 0, "nan": Y * torch.nan, "inf": Y / 0}[kind]
            sketches = {SHARED: ([0], Y[None])}
            if kind == "good":
                taken.append(Y)
        bank.renew([(block, sketches, 40)])
        bank.advance(block)
        good = bool(sketches) and kind == "good"
        assert good != torch.equal(before, mine["basis"])
    assert len(taken) == 2, "neither more nor fewer sketches than a refresh needs"
    assert mine["next_refresh"].item() > mine["step"]
    assert mine["next_refresh"].item() % 40 == next_place(0, 40, layer.index) % 40, "its turn is not its own any more"
    for Y in taken:
        torch.testing.assert_close(mine["basis"] @ (mine["basis"].mT @ Y), Y, rtol=0, atol=1e-4 * float(Y.abs().max()))


def test_turns_spread_after_a_common_delay(device):
    widths = range(24, 50, 2)  # layers of one shape refresh together
    model = mlp(widths, bias=False).to(device)
    nn.init.zeros_(model[-1].weight)
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = GemsOptimizer(base, tasks=("a",), rank=4, model=model, refresh="sketch", update_proj_gap=60)
    for _ in range(30):
        with optimizer.task("a"):
            (model(torch.randn(16, 24, device=device)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    turns = [
        int(optimizer.state[layer.weight]["next_refresh"][0]) for layer in model[:-2] if isinstance(layer, nn.Linear)
    ]
    assert min(turns) >= 30
    assert len(set(turns)) == len(turns), turns


@pytest.mark.parametrize("at", range(1, 6))
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "earlier version"])
def test_a_resume_knows_what_was_usable(way, at, device):
    def world():
        model = two_layers()
        nn.init.zeros_(model[2].weight)
        return World(model, device, refresh="sketch")

    factors = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    through = world()
    for factor in factors:
        through.step({"a": factor, "b": 1.0})
    first = world()
    for factor in factors[:at]:
        first.step({"a": factor, "b": 1.0})
    if way == "deepcopy":
        second = copy.deepcopy(first)
        second.draws = first.draws
    else:
        second = world()
        second.draws = first.draws
        second.model.load_state_dict(first.model.state_dict())
        saved = copy.deepcopy(first.optimizer.state_dict())
        if way == "earlier version":
            for state in saved["state"].values():
                state.pop("usable", None)
        second.optimizer.load_state_dict(saved)
    for factor in factors[at:]:
        second.step({"a": factor, "b": 1.0})
    if way == "earlier version":  # which cannot know
        assert "usable" in second.optimizer.state[second.model[0].weight]
        return
    assert same(weights_of(second.model), weights_of(through.model))
    assert second.shares()[0] > 0.999
