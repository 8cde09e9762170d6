"""``lr_scale="adamw"``: updates have the size that the base optimizer's steps of whole weights have."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsub import GemsOptimizer, NullSpace
from tests.optimizer.toys import gems, mlp, noise, null_space_of, same, tensors_in, train, weights_of

LR = 1e-2


class Sign(torch.optim.Optimizer):
    """Steps of one size, with the decoupled weight decay of AdamW."""

    def __init__(self, params: Any, lr: float = LR, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(group["lr"] * parameter.grad.sign())


def weights(m: int, n: int, *layers: int) -> list[nn.Parameter]:
    return [nn.Parameter(noise(m, n, key=(m, n, layer)).double()) for layer in layers]


def step(optimizer: GemsOptimizer, trained: list[nn.Parameter], number: int) -> list[Tensor]:
    """One step with gradients of full rank; the changes."""
    before = [weight.detach().clone() for weight in trained]
    for task in optimizer.tasks or (None,):
        for place, weight in enumerate(trained):
            loss = (weight * noise(*weight.shape, key=(number, place, hash_of(task))).double()).sum()
            if task is None:
                loss.backward()
            else:
                with optimizer.task(task):
                    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return [weight.detach() - old for weight, old in zip(trained, before, strict=True)]


def hash_of(task: str | None) -> int:
    return 0 if task is None else sum(map(ord, task))


def rms(change: Tensor) -> float:
    return float(change.square().mean().sqrt())


@given(
    m=st.integers(2, 12),
    n=st.integers(2, 12),
    rank=st.integers(1, 14),
    task_rank=st.integers(1, 6),
    protected=st.integers(0, 11),
    side=st.sampled_from(["input", "output"]),
    tasks=st.sampled_from([(), ("a",)]),
    scale=st.sampled_from([1.0, 0.3]),
)
def test_an_update_is_as_large_as_a_step_of_the_whole_weight(m, n, rank, task_rank, protected, side, tasks, scale):
    """Exactly, where the subspaces are orthogonal to one another; whatever rank, side and protection leave of them."""
    weight = weights(m, n, 0)
    d = n if side == "input" else m
    null_space = None
    if 0 < protected < d:
        null_space = NullSpace(side=side, energy=1.0)
        null_space.update("W", noise(protected, d, key=(3, d)).double())
    named = [("W", weight[0])]
    options: dict[str, Any] = {"rank": rank, "task_rank": task_rank, "side": side, "orthogonalize": "shared_first"}
    # Without model= a matrix is decomposed where its rank is lower than both sides.
    layer = nn.Module()
    layer.register_parameter("W", weight[0])
    if min(m, n) <= rank:
        options["rank"] = rank = min(m, n) - 1
    optimizer = GemsOptimizer(Sign(named), tasks=tasks, scale=scale, lr_scale="adamw", null_space=null_space, **options)
    for number in range(3):
        change = step(optimizer, weight, number)[0]
        # Where the bases have more columns than the gradient has rank, some coordinates are rounding, or zero.
        if int(optimizer.state[weight[0]]["basis"].norm(dim=0).round().sum()) <= min(m, n):
            assert rms(change) == pytest.approx(scale * LR, rel=1e-6)


@given(seed=st.integers(0, 50), tasks=st.integers(2, 4), gate=st.sampled_from(["uniform", "heuristic"]))
def test_with_overlapping_subspaces_it_is_about_as_large(seed, tasks, gate):
    weight = weights(24, 32, seed)
    names = tuple("abcd"[:tasks])
    optimizer = GemsOptimizer(Sign([("W", weight[0])]), tasks=names, rank=8, gate=gate, lr_scale="adamw")
    assert rms(step(optimizer, weight, seed)[0]) == pytest.approx(LR, rel=0.3)


def test_layers_of_one_block_with_less_room_than_others():
    """The null space leaves 2 directions of the second layer, fewer than the rank."""
    trained = weights(10, 12, 0, 1, 2)
    null_space = NullSpace(energy=1.0)
    null_space.update("0", noise(3, 12, key=(1,)).double())
    null_space.update("1", noise(10, 12, key=(2,)).double())
    null_space.update("2", noise(1, 12, key=(3,)).double())
    base = Sign([(str(place), weight) for place, weight in enumerate(trained)])
    optimizer = GemsOptimizer(base, tasks=(), rank=4, update_proj_gap=2, lr_scale="adamw", null_space=null_space)
    for number in range(3):
        assert [rms(change) for change in step(optimizer, trained, number)] == pytest.approx([LR] * 3, rel=1e-6)
    null_space.update("2", noise(10, 12, key=(4,)).double())  # it grows, and is followed at the next refresh
    for number in range(3, 6):
        assert [rms(change) for change in step(optimizer, trained, number)] == pytest.approx([LR] * 3, rel=1e-6)
    assert int(optimizer.state[trained[2]]["basis"].norm(dim=0).round().sum()) == 1


def test_weight_decay_keeps_the_users_rate():
    decay, ends = 0.1, []
    for weight_decay in (0.0, decay):
        weight = weights(8, 8, 0)
        start = weight[0].detach().clone()
        optimizer = GemsOptimizer(Sign([("W", weight[0])], weight_decay=weight_decay), rank=2, lr_scale="adamw")
        step(optimizer, weight, 0)
        ends.append(weight[0].detach())
    torch.testing.assert_close(ends[0] - ends[1], LR * decay * start)


def test_it_folds_into_the_scale(device):
    """Layers of one block, one number: bit for bit what the same factor in ``scale`` does."""
    ends = []
    c = (12 / (4 + 2 * 2 / 4)) ** 0.5
    for options in ({"lr_scale": "adamw", "scale": 0.5}, {"scale": 0.5 * c}):
        model = mlp((12, 12, 12), device=device)
        train(model, gems(model, null_space=null_space_of(model), **options), 4)
        ends.append(weights_of(model))
    assert same(*ends)


def test_a_group_may_have_its_own(device):
    model = mlp((12, 12, 12), device=device)
    groups = [
        {"params": [model[0].weight], "lr_scale": "adamw"},
        {"params": [model[2].weight], "lr_scale": None},
        {"params": [model[0].bias], "lr_scale": 0.7},  # as another library has it
    ]
    optimizer = gems(model, base=torch.optim.AdamW(groups, lr=LR), tasks=())
    before = weights_of(model)
    for weight in (model[0].weight, model[2].weight):
        weight.grad = noise(12, 12, key=(1,), like=weight)
    optimizer.step()
    sizes = [rms(new - old) for new, old in zip(weights_of(model), before, strict=True)]
    assert sizes[0] == pytest.approx(LR, rel=1e-3)
    assert sizes[2] == pytest.approx(LR * (4 / 12) ** 0.5, rel=1e-3)
    assert [group["lr_scale"] for group in optimizer.param_groups] == ["adamw", None, 0.7]


def test_resumed_bit_for_bit(device):
    model = mlp((12, 12, 12), device=device)
    null_space = null_space_of(model)
    optimizer = gems(model, lr_scale="adamw", null_space=null_space)
    train(model, optimizer, 3)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    other = mlp((12, 12, 12), device=device)
    other.load_state_dict(model.state_dict())
    resumed = gems(other, null_space=null_space)  # the checkpoint knows the option
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    train(model, optimizer, 4, start=3)
    train(other, resumed, 4, start=3)
    assert same(weights_of(model), weights_of(other))
    assert same(tensors_in(optimizer.state_dict()), tensors_in(resumed.state_dict()))


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("AdamW", {}, None),
        ("Adam", {"amsgrad": True}, None),
        ("RAdam", {}, None),
        ("NAdam", {}, None),
        ("Adamax", {}, None),
        ("Adagrad", {}, None),
        ("RMSprop", {"momentum": 0.9}, None),
        ("SGD", {"lr": 0.1}, "follow the size of the gradient"),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, "follow the size of the gradient"),
        ("Muon", {}, "size depends on the shape"),
        ("Muon", {"adjust_lr_fn": "match_rms_adamw"}, None),
    ],
)
def test_the_base_optimizer_takes_steps_of_one_size(name, options, why):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    weight = nn.Parameter(torch.ones(12, 10))
    base = getattr(torch.optim, name)([weight], **options)
    if why is None:
        GemsOptimizer(base, rank=4, lr_scale="adamw")
        return
    with pytest.raises(ValueError, match=f"lr_scale='adamw' .*{name} .*{why}.*leave lr_scale out"):
        GemsOptimizer(base, rank=4, lr_scale="adamw")
    GemsOptimizer(base, rank=4)


@pytest.mark.parametrize("wrong", ["adam", 0.5, True, []])
def test_others_are_refused(wrong):
    weight = nn.Parameter(torch.ones(12, 10))
    with pytest.raises(ValueError, match="must be None or 'adamw'"):
        GemsOptimizer(torch.optim.AdamW([weight]), rank=4, lr_scale=wrong)
