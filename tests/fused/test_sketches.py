"""Bases from sketches: orthonormal, protected, as good as those of decompositions, one layer after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradsub.linalg._room import Room
from gradsub.subspace import SKETCHES, sketch_size
from gradsub.subspace._basis import sketched_basis
from gradsub.subspace._schedule import SKETCHES_PER_REFRESH, next_place

from .worlds import TASKS, flat, gems, model_of, null_space_of, train

# Vectors move freely here on purpose: what holds of weights must hold beside them.
pytestmark = pytest.mark.filterwarnings("ignore:null_space has nothing for:UserWarning")

WIDTHS = (20, 28, 24, 12)


def bases_of(optimizer, weight, widths=(4, 2, 2, 2)):
    return optimizer.state[weight]["basis"].split(list(widths), dim=1)


@pytest.mark.parametrize("orthogonalize", ["none", "shared_first"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("capture", ["fused", "generic"])
def test_bases_are_orthonormal_and_inside_the_null_space_after_every_step(capture, side, orthogonalize):
    model = model_of(WIDTHS)
    null_space = null_space_of(model, side)
    options = {"side": side, "orthogonalize": orthogonalize, "capture": capture}
    optimizer = gems(model, refresh="sketch", null_space=null_space, **options)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in null_space}
    for step in range(8):
        train(model, optimizer, 1, start=step)
        for name in null_space:
            weight, K = model.get_submodule(name).weight, null_space.basis(name, torch.float64)
            shared, *own = bases_of(optimizer, weight)
            for basis in (shared, *own):
                torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[1], dtype=basis.dtype))
                assert (K.mT @ basis).abs().max() < 1e-12
                if orthogonalize == "shared_first" and basis is not shared:
                    assert (shared.mT @ basis).abs().max() < 1e-12
    for name, old in before.items():
        change = model.get_submodule(name).weight.detach() - old
        K = null_space.basis(name, torch.float64)
        inside = change @ K if side == "input" else K.mT @ change
        assert inside.norm() < 1e-12 * change.norm()


@given(
    d=st.integers(6, 40),
    o=st.integers(6, 40),
    width=st.integers(1, 5),
    k=st.integers(0, 1),
    exponent=st.integers(-25, 25),
    seed=st.integers(0, 99),
)
def test_a_gradient_of_low_rank_is_found_whole(d, o, width, k, exponent, seed):
    """Rank <= width: nothing of it lies outside the basis, whatever its scale."""
    source = torch.Generator().manual_seed(seed)
    gradient = torch.randn(o, width, generator=source) @ torch.randn(width, d, generator=source) * 10.0**exponent
    K = torch.linalg.qr(torch.randn(1, d, k, generator=source)).Q if k else None
    Omega = torch.randn(o, sketch_size(width, o), generator=source)
    basis, values, usable = sketched_basis((gradient.mT @ Omega)[None], None, width, Room(K), source)
    assert bool(usable)
    free = gradient if K is None else gradient - (gradient @ K[0]) @ K[0].mT
    left = free - free @ basis[0] @ basis[0].mT
    assert left.double().norm() < 1e-3 * gradient.double().norm()
    assert values.shape == (1, width)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_an_unusable_sketch_says_so(bad):
    Y = torch.randn(2, 9, 6)
    Y[1] = bad
    _, _, usable = sketched_basis(Y, None, 3, Room(), torch.Generator().manual_seed(0))
    assert usable.flatten().tolist() == [True, False]


@pytest.mark.parametrize("left", [0.0, 1e-8])
def test_a_sketch_of_which_the_protection_leaves_only_rounding_does_not_count(left):
    draws = torch.Generator().manual_seed(0)
    K, earlier = torch.linalg.qr(torch.randn(1, 200, 60, generator=draws)).Q.split([50, 10], dim=-1)
    strengths = torch.logspace(0, -2, 10)
    Y = K @ torch.randn(1, 50, 18, generator=draws) + left * torch.randn(1, 200, 18, generator=draws)
    basis, values, _ = sketched_basis(Y, earlier * strengths, 10, Room(K), draws)
    torch.testing.assert_close((basis[0].mT @ earlier[0]).abs(), torch.eye(10), rtol=0, atol=1e-3)
    torch.testing.assert_close(values[0], strengths, rtol=1e-3, atol=0)


def test_a_zero_gradient_keeps_the_basis():
    model = nn.Sequential(nn.Linear(20, 24, bias=False)).double()
    optimizer = gems(model, refresh="sketch")
    train(model, optimizer, 3)
    old = optimizer.state[model[0].weight]["basis"].clone()
    for _ in range(12):
        with optimizer.task("a"):
            (model(torch.randn(3, 20, dtype=torch.float64)) * 0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    new = optimizer.state[model[0].weight]["basis"]
    assert torch.equal(old[:, :6], new[:, :6])


def test_a_batch_to_come_is_kept_as_well_as_by_a_decomposition():
    """The mean over following batches of the energy that a basis keeps: at least .95 of an exact refresh's."""
    kept = {}
    for refresh in ("svd", "sketch"):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = nn.Sequential(nn.Linear(96, 160, bias=False)).double()
            mixing = torch.randn(96, 96, dtype=torch.float64) * torch.logspace(0, -2, 96, dtype=torch.float64)
            target = torch.randn(96, 160, dtype=torch.float64)
        base = torch.optim.SGD(model.parameters(), lr=1e-9)  # it only looks
        optimizer = gems(model, tasks=("a",), rank=16, update_proj_gap=4, refresh=refresh, base=base)
        energies = []
        for step in range(24):
            x = torch.randn(64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) @ mixing
            loss = (model(x) - x @ target).square().mean()
            if step > 4:
                (gradient,) = torch.autograd.grad(loss, model[0].weight, retain_graph=True)
                basis = optimizer.state[model[0].weight]["basis"][:, :16]
                energies.append(float((gradient @ basis).square().sum() / gradient.square().sum()))
            with optimizer.task("a"):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        kept[refresh] = sum(energies) / len(energies)
    assert kept["sketch"] > 0.95 * kept["svd"], kept
    assert kept["svd"] > 0.5


@given(step=st.integers(0, 5000), gap=st.integers(1, 300), index=st.integers(0, 500))
def test_a_layers_place_comes_once_in_a_gap(step, gap, index):
    first = next_place(step, gap, index)
    assert step < first <= step + gap
    assert next_place(first, gap, index) == first + gap


@pytest.mark.parametrize(("layers", "gap"), [(84, 200), (210, 200), (12, 10), (500, 50)])
def test_refreshes_are_spread_over_the_gap(layers, gap):
    places = [next_place(0, gap, index) % gap for index in range(layers)]
    most = max(places.count(place) for place in places)
    assert most <= -(-layers // gap) + 1


def test_blocks_refresh_one_after_the_other_and_twice_each():
    """Layers of one shape refresh together, layers of different shapes in their own places within the gap."""
    model = model_of((20, 20, 20, 24, 28, 28, 32))
    optimizer = gems(model, refresh="sketch", update_proj_gap=12)
    changes = []
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    for step in range(26):
        before = [optimizer.state[weight]["basis"].clone() for weight in weights]
        train(model, optimizer, 1, start=step)
        now = [optimizer.state[weight]["basis"] for weight in weights]
        changes.append([not torch.equal(a, b) for a, b in zip(before, now, strict=True)])
    assert changes[0] == changes[1] == [True] * 6
    assert all(row[0] == row[1] for row in changes)
    for layer in range(6):
        later = [step for step in range(2, 26) if changes[step][layer]]
        assert len(later) == 2 * SKETCHES_PER_REFRESH
        assert later[1] == later[0] + 1
        assert later[2] == later[0] + 12
    assert max(sum(row) for row in changes[2:]) <= 3


def test_a_task_that_was_away_catches_up():
    model = model_of(WIDTHS)
    optimizer = gems(model, refresh="sketch", update_proj_gap=4)
    weight = model[0].weight
    x = torch.randn(4, 3, 20, dtype=torch.float64)
    for step in range(9):
        for task in TASKS if step > 6 else TASKS[:2]:
            with optimizer.task(task):
                (model(x) - TASKS.index(task)).square().mean().backward()
        before = bases_of(optimizer, weight)[3].clone()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(before, bases_of(optimizer, weight)[3]) is (step < 7)


def test_momentless_optimizers_and_outside_gradients_work_too():
    model = model_of(WIDTHS)
    optimizer = gems(model, refresh="sketch", base=torch.optim.SGD(model.parameters(), lr=0.1), tasks=())
    before = flat(model)
    x = torch.randn(4, 3, 20, dtype=torch.float64)
    for _ in range(3):
        model(x).square().mean().backward()  # outside any task
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(before, flat(model))
    assert model(x).square().mean() < model_of(WIDTHS)(x).square().mean()


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(
    ("shape", "largest"),
    # c (m + n) < m n with c = max(2 r, r + 64) columns, at most 120 where that is the other side: c < 150, c < 102.4
    [((300, 300), 74), ((120, 700), 38)],
)
def test_auto_sketches_where_that_costs_less_than_the_gradient(shape, largest, side):
    m, n = shape
    for rank, sketched in [(4, True), (largest, True), (largest + 1, False), (119, False)]:
        model = nn.Sequential(nn.Linear(n, m, bias=False))
        optimizer = gems(model, rank=rank, side=side, refresh="auto")
        with optimizer.task("a"):
            model(torch.randn(3, n)).square().sum().backward()
        optimizer.step()
        assert ("sketches" in optimizer.state[model[0].weight]) is sketched, rank


@pytest.mark.parametrize(("before", "after"), [("svd", "sketch"), ("sketch", "svd")])
def test_a_checkpoint_goes_on_with_the_other_kind_of_refresh(before, after):
    models = [model_of(WIDTHS) for _ in range(2)]
    first, second = (gems(model, refresh=kind) for model, kind in zip(models, (before, after), strict=True))
    train(models[0], first, 3)
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(first.state_dict())
    weights = models[0][0].weight, models[1][0].weight
    for old, new in zip(bases_of(first, weights[0]), bases_of(second, weights[1]), strict=True):
        assert torch.equal(old, new)
    assert (second.state[weights[1]].keys() >= SKETCHES) is (after == "sketch")
    assert second.state[weights[1]].keys() ^ first.state[weights[0]].keys() == SKETCHES
    train(models[1], second, 12, start=3)
    for basis in bases_of(second, weights[1]):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[1], dtype=basis.dtype))
