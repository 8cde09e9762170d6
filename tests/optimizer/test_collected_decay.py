"""Decay of protected layers is collected and taken away at the refresh: what it comes to, and what it costs."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer, NullSpace

WIDTH, RANK, GAP = 24, 4, 5
TASKS = ("a", "b")


class World:
    """One or several square layers, of which a share of the directions is protected."""

    def __init__(self, device, share=0.3, side="input", gap=GAP, lr=1e-2, decay=0.5, dtype=torch.float64, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))).to(device, dtype)
        self.null_space = None
        if share:
            self.null_space = NullSpace(side=side, max_rank=round(share * WIDTH))
            for name in ("0", "1"):
                self.null_space.update(name, torch.randn(100, WIDTH, dtype=dtype))
        make = options.pop("base", lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=decay))
        self.optimizer = GemsOptimizer(
            make(self.model.parameters()),
            tasks=TASKS,
            rank=RANK,
            side=side,
            model=self.model,
            null_space=self.null_space,
            update_proj_gap=gap,
            **{"refresh": "svd", **options},
        )
        self.steps = 0

    @property
    def weights(self):
        return [layer.weight for layer in self.model]

    def step(self, count=1):
        for _ in range(count):
            self.steps += 1
            generator = torch.Generator().manual_seed(self.steps)
            for task in TASKS:
                x = torch.randn(8, WIDTH, generator=generator, dtype=torch.float64).to(self.weights[0])
                with self.optimizer.task(task):
                    (self.model(x) - x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def pending(self):
        return [float(self.optimizer.state[weight]["pending_decay"]) for weight in self.weights]

    def free_part(self, weight, name):
        """P of the weight."""
        K = self.null_space.basis(name, weight.dtype).to(weight.device)
        return weight - weight @ K @ K.mT if self.null_space.side == "input" else weight - K @ (K.mT @ weight)


def snapshot(world):
    return [weight.detach().clone() for weight in world.weights]


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("side", ["input", "output"])
def test_what_is_collected_is_taken_away_at_the_refresh(side, share, device):
    """Without steps of the base optimizer what is left is (1 - c) P W + (I - P) W, exactly as with decay a step."""
    world = World(device, share, side)
    world.step(1)
    for group in world.optimizer.param_groups:
        group["scale"] = 1e-300  # updates vanish, decay does not
    before = snapshot(world)
    world.step(GAP - 1)
    assert all(torch.equal(new, old) for new, old in zip(world.weights, before, strict=True))
    assert world.pending() == pytest.approx([1 - 0.995 ** (GAP - 1)] * 2)
    world.step(1)
    assert world.pending() == [0.0, 0.0]
    for name, (new, old) in enumerate(zip(world.weights, before, strict=True)):
        expected = old - (1 - 0.995**GAP) * world.free_part(old, str(name))
        torch.testing.assert_close(new.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lr", [1e-3, 1e-2])
@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("side", ["input", "output"])
def test_the_difference_from_decay_at_every_step_is_bounded(side, share, lr, device, monkeypatch):
    """Within a gap by c times the sum of the norms of the updates, both from the same weights."""
    world = World(device, share, side, lr=lr)
    world.step(1)
    at_once = copy.deepcopy(world)
    sizes = [0.0, 0.0]
    exact = snapshot(world)
    for _ in range(GAP - 1):
        before = snapshot(world)
        world.step(1)
        for place, (new, old) in enumerate(zip(world.weights, before, strict=True)):
            update = new.detach() - old
            sizes[place] += float(update.norm())
            exact[place] = exact[place] - lr * 0.5 * at_once.free_part(exact[place], str(place)) + update
    share_left = world.pending()[0]
    for place, (weight, expected) in enumerate(zip(world.weights, exact, strict=True)):
        found = weight.detach() - share_left * world.free_part(weight.detach(), str(place))
        difference = float((found - expected).norm())
        assert 0 < difference <= share_left * sizes[place]


@pytest.mark.parametrize("gap", [1])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_with_a_refresh_at_every_step_nothing_waits(gap, share, device):
    world = World(device, share, gap=gap)
    for _ in range(4):
        world.step()
        assert world.pending() == [0.0, 0.0]


def test_layers_without_protection_decay_at_every_step(device):
    world = World(device, 0.0)
    world.step(1)
    for group in world.optimizer.param_groups:
        group["scale"] = 1e-300
    before = snapshot(world)
    world.step(2)
    for new, old in zip(world.weights, before, strict=True):
        torch.testing.assert_close(new.detach(), old * 0.995**2, rtol=1e-12, atol=0)
    assert world.pending() == [0.0, 0.0]


BASES = {
    "a tensor for the rate": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(1e-2, dtype=torch.float64), weight_decay=0.5
    ),
    "of one entry": lambda p: torch.optim.AdamW(p, lr=torch.full((1,), 1e-2, dtype=torch.float64), weight_decay=0.5),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.5),
    "no decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
}


@pytest.mark.parametrize("base", BASES)
def test_whatever_the_options_are(base, device):
    world = World(device, base=BASES[base])
    world.step(GAP)
    expected = 0.0 if base in ("SGD", "no decay") else 1 - 0.995 ** (GAP - 1)
    assert world.pending() == pytest.approx([expected] * 2)


def test_options_that_change_within_a_gap(device):
    world = World(device)
    world.step(2)
    world.optimizer.param_groups[0]["lr"] = 2e-2
    world.step(1)
    world.optimizer.param_groups[0]["weight_decay"] = 0.0
    world.step(2)
    assert world.pending() == pytest.approx([1 - 0.995 * 0.99] * 2)


def test_a_learning_rate_on_the_device_is_not_read(device):
    """What is collected then lives beside it; the meta device has no numbers that could be read."""
    from gradsub.update import collect_decay

    world = World(device)
    (block, *_) = world.optimizer._blocks.all
    states = [world.optimizer.state[layer.parameter] for layer in block.layers]
    collect_decay(block, states, torch.empty((), device="meta"))
    assert all(state["pending_decay"].device.type == "meta" for state in states)


@pytest.mark.parametrize("after", [3, GAP, GAP + 2])
@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
def test_a_run_resumed_in_the_middle_of_a_gap_goes_on_bit_for_bit(refresh, share, after, device):
    world = World(device, share, refresh=refresh, dtype=torch.float32)
    world.step(after)
    file = io.BytesIO()
    torch.save({"model": world.model.state_dict(), "optimizer": world.optimizer.state_dict()}, file)
    file.seek(0)
    again = World(device, share, refresh=refresh, dtype=torch.float32)
    saved = torch.load(file, weights_only=True)
    again.model.load_state_dict(saved["model"])
    again.optimizer.load_state_dict(saved["optimizer"])
    again.steps = after
    for run in (world, again):
        run.step(2 * GAP)
    for mine, other in zip(world.weights, again.weights, strict=True):
        assert torch.equal(mine, other)
        first, second = world.optimizer.state[mine], again.optimizer.state[other]
        assert list(first) == list(second)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_checkpoint_of_earlier_versions_has_nothing_pending(device):
    world = World(device)
    world.step(3)
    saved = world.optimizer.state_dict()
    for state in saved["state"].values():
        del state["pending_decay"]
    again = World(device)
    again.step(3)
    again.optimizer.load_state_dict(saved)
    assert again.pending() == [0.0, 0.0]


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan")])
def test_a_share_that_cannot_be_is_refused(wrong, device):
    world = World(device)
    world.step(3)
    saved = copy.deepcopy(world.optimizer.state_dict())
    saved["state"][0]["pending_decay"].fill_(wrong)
    with pytest.raises(ValueError, match="'pending_decay' of 0"):
        world.optimizer.load_state_dict(saved)
