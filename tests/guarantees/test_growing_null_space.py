"""A null space that grows during training is taken up at the next refresh; nothing that was protected is given up."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from gradsub import GemsOptimizer, NullSpace

# Vectors move freely here on purpose: what holds of weights must hold beside them.
pytestmark = pytest.mark.filterwarnings("ignore:null_space has nothing for:UserWarning")

GAP = 4
DIMENSION = {"input": 14, "output": 10}


def features(side: str, rows: int, seed: int, directions: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(DIMENSION[side], directions, generator=generator)).Q
    return torch.randn(rows, directions, generator=generator) @ basis.mT


def build(
    null_space: NullSpace, model: nn.Module | None = None, refresh: str = "auto"
) -> tuple[nn.Module, GemsOptimizer]:
    if model is None:
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(14, 10)})
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    optimizer = GemsOptimizer(
        base,
        tasks=("a", "b"),
        rank=3,
        update_proj_gap=GAP,
        side=null_space.side,
        model=model,
        null_space=null_space,
        refresh=refresh,
    )
    return model, optimizer


def train(model: nn.Module, optimizer: GemsOptimizer, steps: range) -> Tensor:
    for step in steps:
        for k, task in enumerate(optimizer.tasks):
            x = torch.randn(12, 14, generator=torch.Generator().manual_seed(10 * step + k))
            with optimizer.task(task):
                (model["layer"](x) - (k + 1) * x[:, :10]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model["layer"].weight.detach().clone()


def moved(change: Tensor, directions: Tensor, side: str) -> float:
    return float((change @ directions if side == "input" else directions.mT @ change).norm())


STILL, MOVED = 3e-6, 1e-3


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("criterion", [{"energy": 1.0}, {"threshold": 1e-3}])
def test_new_directions_rest_from_the_next_refresh_and_old_ones_from_the_start(side, criterion):
    null_space = NullSpace(side=side, **criterion)
    null_space.update("layer", features(side, 20, 1, 2))
    old = null_space.basis("layer")
    model, optimizer = build(null_space)
    start = model["layer"].weight.detach().clone()

    train(model, optimizer, range(GAP + 1))  # refreshed at steps 0 and GAP
    more = features(side, 20, 2, 3)
    null_space.update("layer", more)
    new = torch.linalg.qr(more.mT[:, :3]).Q
    new = torch.linalg.qr(new - old @ (old.mT @ new)).Q
    told = model["layer"].weight.detach().clone()
    refresh = train(model, optimizer, range(GAP + 1, 2 * GAP))
    assert moved(refresh - told, new, side) > MOVED  # not before the refresh

    end = train(model, optimizer, range(2 * GAP, 6 * GAP))
    assert moved(end - refresh, new, side) < STILL
    assert moved(end - start, old, side) < STILL
    assert (end - refresh).norm() > 0.05
    assert optimizer.report().layers[0].protected_fraction == pytest.approx(5 / DIMENSION[side])


@pytest.mark.parametrize("side", ["input", "output"])
def test_leading_directions_that_turn_away_are_kept_all_the_same(side):
    """With ``max_rank`` or ``energy`` the eigenvectors of more data differ from those that were protected."""
    null_space = NullSpace(side=side, energy=0.9)
    null_space.update("layer", features(side, 20, 1, 2))
    old = null_space.basis("layer")
    model, optimizer = build(null_space)
    start = model["layer"].weight.detach().clone()
    train(model, optimizer, range(GAP))
    null_space.update("layer", 10 * features(side, 200, 2, 2))  # dominates: the old directions fall below the energy
    fresh = null_space.basis("layer")
    assert (old - fresh @ (fresh.mT @ old)).norm() > 0.1
    refresh = model["layer"].weight.detach().clone()
    end = train(model, optimizer, range(GAP, 4 * GAP))
    assert moved(end - start, old, side) < STILL
    held = optimizer.state[model["layer"].weight]["protected"]
    kept = end - refresh
    assert moved(kept, held, side) < STILL
    energy = 10 * features(side, 200, 2, 2)
    assert (energy @ held).square().sum() > 0.88 * energy.square().sum()


def test_without_new_data_the_protected_directions_stay_the_same_tensor():
    null_space = NullSpace(energy=1.0)
    null_space.update("layer", features("input", 20, 1, 2))
    model, optimizer = build(null_space)
    held = optimizer.state[model["layer"].weight]["protected"].clone()
    train(model, optimizer, range(3 * GAP))
    assert torch.equal(optimizer.state[model["layer"].weight]["protected"], held)


def test_data_of_known_directions_changes_nothing():
    null_space = NullSpace(energy=1.0)
    data = features("input", 20, 1, 2)
    null_space.update("layer", data)
    model, optimizer = build(null_space)
    train(model, optimizer, range(GAP))
    held = optimizer.state[model["layer"].weight]["protected"].clone()
    null_space.update("layer", data.flip(0))
    train(model, optimizer, range(GAP, 3 * GAP))
    torch.testing.assert_close(optimizer.state[model["layer"].weight]["protected"], held)


@pytest.mark.parametrize("after", [GAP + 2, 2 * GAP, 2 * GAP + 1], ids=["told", "before the refresh", "taken up"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
def test_a_run_resumed_after_the_growth_goes_on_bit_for_bit(after, side, refresh):
    """The growth is taken up at the next refresh, as it would have been."""
    null_space = NullSpace(side=side, energy=1.0)
    null_space.update("layer", features(side, 20, 1, 2))
    old = null_space.basis("layer")
    model, optimizer = build(null_space, refresh=refresh)
    start = model["layer"].weight.detach().clone()
    train(model, optimizer, range(GAP + 1))
    more = features(side, 20, 2, 3)
    null_space.update("layer", more)
    train(model, optimizer, range(GAP + 1, after))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    held = model["layer"].weight.detach().clone()
    for step in range(after, 5 * GAP):
        train(model, optimizer, range(step, step + 1))
        if step == 2 * GAP + 2:
            held = model["layer"].weight.detach().clone()

    torch.manual_seed(0)
    again = nn.ModuleDict({"layer": nn.Linear(14, 10)})
    again.load_state_dict(checkpoint["model"])
    again, resumed = build(null_space, again, refresh=refresh)
    resumed.load_state_dict(checkpoint["optimizer"])
    end = train(again, resumed, range(after, 5 * GAP))
    assert torch.equal(end, model["layer"].weight)
    for key, value in optimizer.state[model["layer"].weight].items():
        assert torch.equal(value, resumed.state[again["layer"].weight][key]), key
    assert moved(end - start, old, side) < STILL
    new = torch.linalg.qr(more.mT[:, :3]).Q
    assert moved(end - held, new, side) < STILL
    assert (end - held).norm() > 0.05
