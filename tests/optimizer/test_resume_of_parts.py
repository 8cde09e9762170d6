"""A resume where the layers of a block have not all taken the same steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from gradsub import GemsOptimizer, NullSpace
from tests.optimizer.toys import same


class Skipping(nn.Module):
    """Layers of one shape, of which the second has no tokens in some steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor, skip: bool) -> Tensor:
        for place, layer in enumerate(self.layers):
            if not (skip and place == 1):
                x = torch.tanh(layer(x))
        return x


def build(model: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> GemsOptimizer:
    base = kind(model.parameters(), lr=1e-2)
    return GemsOptimizer(base, tasks=("a",), rank=4, update_proj_gap=4, model=model, capture="fused", **options)


def take(model: nn.Module, optimizer: GemsOptimizer, step: int) -> None:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    with optimizer.task("a"):
        (model(x, step % 3 == 1) - x.roll(1, 1)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("through", ["state_dict", "a distributed checkpoint"])
@pytest.mark.parametrize("converted", [False, True])
def test_layers_go_on_from_their_own_counts_and_draws(through, refresh, converted, tmp_path):
    """Also in the distributed format, which reads into the state of the optimizer that is resumed."""
    model = Skipping()
    optimizer = build(model, refresh=refresh)
    for step in range(7):
        if converted and step == 5:
            model.double()
        take(model, optimizer, step)
    other = copy.deepcopy(model)
    resumed = build(other, refresh=refresh)
    if through == "state_dict":
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
        held = {"optimizer": get_optimizer_state_dict(other, resumed)}
        dcp.load(held, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(other, resumed, held["optimizer"])
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[old]["inner.shared.step"] == resumed.state[new]["inner.shared.step"]
    counts = {float(optimizer.state[weight]["inner.shared.step"]) for weight in model.parameters()}
    assert len(counts) == 2
    for step in range(7, 14):
        take(model, optimizer, step)
        take(other, resumed, step)
    assert same(model.parameters(), other.parameters())


@pytest.mark.parametrize("refresh", ["svd", "sketch"])
def test_layers_that_have_parted_draw_what_they_do_side_by_side_again_after_a_resume(refresh):
    """Nothing that SGD keeps tells their counts apart."""
    model = Skipping()
    optimizer = build(model, torch.optim.SGD, refresh=refresh)
    for step in range(7):
        take(model, optimizer, step)
    other = copy.deepcopy(model)
    resumed = build(other, torch.optim.SGD, refresh=refresh)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(21, 42, 3):  # which reach all layers
        take(model, optimizer, step)
        take(other, resumed, step)
    assert same(model.parameters(), other.parameters())


def test_no_two_entries_of_a_state_dict_share_memory():
    model = Skipping()
    optimizer = build(model)
    take(model, optimizer, 0)
    saved = optimizer.state_dict()["state"]
    places = [value.data_ptr() for held in saved.values() for value in held.values() if isinstance(value, Tensor)]
    assert len(set(places)) == len(places)


def test_vectors_that_are_protected_along_one_direction_resume_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
    batches = [torch.randn(64, 16)]
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    null_space = NullSpace(energy=0.1).collect(model, batches).collect_gradients(model, batches, loss)
    assert {null_space.basis(name).shape[1] for name in ("0.bias", "2.bias")} == {1}
    optimizer = build_plain(model, null_space)
    for step in range(3):
        take_plain(model, optimizer, step)
    other = copy.deepcopy(model)
    resumed = build_plain(other, null_space)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 9):
        take_plain(model, optimizer, step)
        take_plain(other, resumed, step)
    assert same(model.parameters(), other.parameters())


def build_plain(model: nn.Module, null_space: NullSpace) -> GemsOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return GemsOptimizer(base, tasks=("a",), rank=4, model=model, null_space=null_space)


def take_plain(model: nn.Module, optimizer: GemsOptimizer, step: int) -> None:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
    with optimizer.task("a"):
        (model(x) - x.roll(1, 1)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
