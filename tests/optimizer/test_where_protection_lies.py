"""Protected directions lie once, in their smaller form, in the memory of the host or on the device by choice."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer, NullSpace
from gradsub._placement import Placement

WIDTH = 24


class Two(nn.Module):
    """Two layers with one input."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = (nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(2))

    def forward(self, x):
        return self.q(x).tanh() * self.k(x)


def build(device, share=0.3, dtype=torch.float32, side="input", **options):
    model = Two(dtype).to(device)
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(100, WIDTH, generator=generator, dtype=torch.float64).to(device, dtype)
    null_space = NullSpace(side=side, max_rank=round(share * WIDTH)).collect(model, [data])
    optimizer = GemsOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
        tasks=("a",),
        rank=4,
        side=side,
        model=model,
        null_space=null_space,
        **{"update_proj_gap": 3, **options},
    )
    return model, null_space, optimizer


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step)).to(model.q.weight)
        with optimizer.task("a"):
            (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def directions(optimizer, weight):
    (found,) = (optimizer.state[weight][key] for key in ("protected", "free") if key in optimizer.state[weight])
    return found


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_layers_with_one_input_hold_one_tensor(share, device):
    model, _, optimizer = build(device, share)
    assert directions(optimizer, model.q.weight) is directions(optimizer, model.k.weight)
    other = build(device, share)[2]
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    first, second = (directions(other, p) for p in other.param_groups[0]["params"])
    assert first is second
    twin = copy.deepcopy(optimizer)
    first, second = (directions(twin, p) for p in twin.param_groups[0]["params"])
    assert first is second


def test_a_null_space_of_the_layers_dtype_on_a_cpu_is_held_by_both():
    model, null_space, optimizer = build(torch.device("cpu"), dtype=torch.float64)
    assert directions(optimizer, model.q.weight) is null_space.basis("q", torch.float64)


@pytest.mark.parametrize("where", ["auto", "host", "device"])
def test_it_lies_where_it_is_wanted(where, device):
    model, _, optimizer = build(device, protection=where)
    train(model, optimizer, 4)
    assert directions(optimizer, model.q.weight).device.type == (device.type if where == "device" else "cpu")


@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_where_it_lies_changes_no_bit(share, refresh, device):
    runs = [build(device, share, refresh=refresh, protection=where) for where in ("host", "device")]
    for model, _, optimizer in runs:
        train(model, optimizer, 8)
    (first, *_), (second, *_) = runs
    assert torch.equal(first.q.weight, second.q.weight)


def test_a_place_that_does_not_exist(device):
    with pytest.raises(ValueError, match="protection='disk' must be one of 'auto', 'device', 'host'"):
        build(device, protection="disk")


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("orthogonalize", ["none", "shared_first"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.55, 0.8, 0.95])
def test_either_form_keeps_the_layers_answers(share, orthogonalize, refresh, side, device):
    model, null_space, optimizer = build(
        device, share, side=side, orthogonalize=orthogonalize, refresh=refresh, dtype=torch.float64
    )
    before = [layer.weight.detach().clone() for layer in (model.q, model.k)]
    train(model, optimizer, 10)
    state = optimizer.state[model.q.weight]
    assert ("free" in state) == (round(share * WIDTH) > WIDTH / 2)
    assert min(directions(optimizer, model.q.weight).shape) <= WIDTH // 2
    for name, layer, old in zip("qk", (model.q, model.k), before, strict=True):
        K, change = null_space.basis(name, torch.float64).to(device), layer.weight.detach() - old
        inside = change @ K if side == "input" else K.mT @ change
        assert inside.norm() < 1e-12 * change.norm()
        assert change.norm() > 1e-3 * old.norm()


def test_a_checkpoint_that_holds_all_protected_directions_goes_on_in_the_smaller_form(device):
    """As earlier versions wrote it, with an anchor."""
    model, _, optimizer = build(device, 0.8, anchor=True)
    train(model, optimizer, 3)
    assert {"protected", "anchor"} <= optimizer.state[model.q.weight].keys()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, null_space, resumed = build(device, 0.8)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    state = resumed.state[other.q.weight]
    assert "free" in state
    assert not {"protected", "anchor"} & state.keys()
    K, before = null_space.basis("q").to(device), other.q.weight.detach().clone()
    train(other, resumed, 6, start=3)
    change = other.q.weight.detach() - before
    assert (change @ K).norm() < 1e-5 * change.norm()
    # And back, to a run that wants an anchor.
    again, _, anchored = build(device, 0.8, anchor=True)
    again.load_state_dict(other.state_dict())
    anchored.load_state_dict(resumed.state_dict())
    assert anchored.state[again.q.weight]["anchor"].shape == (WIDTH, K.shape[1])


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
def test_growth_beyond_the_half_changes_the_form_and_gives_nothing_up(refresh, where, device):
    model = Two().to(device)
    Q = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2))).Q.to(device)
    null_space = NullSpace(energy=1.0)
    for name in "qk":
        null_space.update(name, Q[:, :6].mT)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer = GemsOptimizer(
        base,
        tasks=("a",),
        rank=4,
        model=model,
        null_space=null_space,
        update_proj_gap=3,
        protection=where,
        refresh=refresh,
    )
    start = model.q.weight.detach().clone()
    train(model, optimizer, 6)
    for name in "qk":
        null_space.update(name, Q[:, 6:19].mT)
    train(model, optimizer, 4, start=6)
    grown = model.q.weight.detach().clone()
    train(model, optimizer, 9, start=10)
    assert optimizer.state[model.q.weight]["free"].shape == (WIDTH, 5)
    assert directions(optimizer, model.q.weight).device.type == ("cpu" if where == "host" else device.type)
    end = model.q.weight.detach()
    assert ((end - start) @ Q[:, :6]).norm() < 3e-6 * (end - start).norm()
    assert ((end - grown) @ Q[:, 6:19]).norm() < 3e-6 * (end - grown).norm()
    assert (end - grown).norm() > 0.01 * grown.norm()


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("mapped", [False, True])
def test_another_models_widths_are_refused_with_the_layers_name(tmp_path, share, mapped):
    model = Two()
    null_space = NullSpace(max_rank=round(share * WIDTH))
    null_space.update("q", torch.randn(100, WIDTH))
    null_space.update("k", torch.randn(100, WIDTH + 1))
    if mapped:
        null_space.save(tmp_path / "null.safetensors", statistics=False)
        null_space = NullSpace.load(tmp_path / "null.safetensors")
    base = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=rf"directions of length {WIDTH + 1} for 'k'.*has {WIDTH}"):
        GemsOptimizer(base, tasks=("a",), rank=4, model=model, null_space=null_space)


def test_what_a_file_holds_is_not_copied_on_a_cpu(tmp_path):
    width = 300  # wide enough for directions in float32
    model = nn.Sequential(nn.Linear(width, 8, bias=False))
    x = torch.randn(3000, width) * torch.arange(1, width + 1) ** -0.3
    for energy in (0.6, 0.97):
        null_space = NullSpace(energy=energy).collect(model, [x], out=tmp_path / "null.safetensors")
        base = torch.optim.AdamW(model.parameters())
        optimizer = GemsOptimizer(base, tasks=("a",), rank=4, model=model, null_space=null_space)
        held = directions(optimizer, model[0].weight)
        assert held.untyped_storage().data_ptr() == null_space._statistics("0").stored.untyped_storage().data_ptr()


def test_what_nobody_holds_any_more_is_forgotten():
    placement, cpu = Placement("auto"), torch.device("cpu")
    first = placement.keep(torch.eye(4)[:, :2].clone(), cpu)
    assert placement.keep(first.clone(), cpu) is first
    other = first.clone()
    other[3, 1] = 0.5
    assert placement.keep(other, cpu) is other
    del first
    fresh = torch.eye(4)[:, :2].clone()
    assert placement.keep(fresh, cpu) is fresh
    assert pickle.loads(pickle.dumps(placement)).keep(fresh.clone(), cpu) is not fresh
