"""What others ask of the base optimizer, or write into its groups, reaches the wrapper."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from gradsub import GemsOptimizer

from .toys import TASKS, gems, loss_of, mlp, same, tensors_in, train, weights_of


def warm_up(optimizer: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.get_cosine_schedule_with_warmup(optimizer, 2, 6)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: float(step < 2)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.05, step_size_up=2, cycle_momentum=False),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.1),
    "transformers' warm-up": warm_up,
}
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW, tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
}


def groups_of(model: nn.Module, split: bool) -> list[Any]:
    """All in one group, or matrices and vectors in two: wrapped, either has another number of groups inside."""
    if not split:
        return list(model.parameters())
    return [{"params": [p for p in model.parameters() if p.ndim == n]} for n in (2, 1)]


def run(name: str, base_of: Any, when: str, split: bool, steps: int = 6) -> tuple[list[Any], list[Any]]:
    """The weights after, and the rates and momenta before every step; with the scheduler on the base or the wrapper."""
    model = mlp()
    base = base_of(groups_of(model, split))
    scheduler = SCHEDULERS[name](base) if when == "before" else None
    optimizer = gems(model, base=base)
    scheduler = scheduler or SCHEDULERS[name](base if when == "after" else optimizer)
    seen = []
    for step in range(steps):
        group = optimizer.param_groups[-1]
        seen.append((float(group["lr"]), group.get("betas", group.get("momentum"))))
        train(model, optimizer, 1, start=step)
        scheduler.step(*([float(step)] if name == "plateau" else []))
    return weights_of(model), seen


@pytest.mark.parametrize("split", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("base_of", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_on_the_base_steers_as_one_on_the_wrapper(name, base_of, when, split):
    weights, seen = run(name, base_of, when, split)
    expected, rates = run(name, base_of, "wrapper", split)
    assert seen == rates
    assert len(set(seen)) > 1
    assert same(weights, expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_it_does_not_warn_of_steps_that_were_taken(when):
    model = mlp()
    base = torch.optim.AdamW(model.parameters())
    scheduler = lr_scheduler.LambdaLR(base, lambda step: 1.0) if when == "before" else None
    optimizer = gems(model, base=base)
    scheduler = scheduler or lr_scheduler.LambdaLR(base, lambda step: 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)
        scheduler.step()


@pytest.mark.parametrize("when", ["before", "after"])
def test_it_warns_of_a_step_that_was_not_taken(when):
    model = mlp()
    base = torch.optim.AdamW(model.parameters())
    scheduler = lr_scheduler.LambdaLR(base, lambda step: 1.0) if when == "before" else None
    optimizer = gems(model, base=base)
    scheduler = scheduler or lr_scheduler.LambdaLR(base, lambda step: 1.0)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("held", ["groups now", "a group from before", "the list from before"])
def test_a_rate_that_is_written_into_the_bases_groups_is_the_rate(held):
    model = mlp()
    base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    earlier, first = base.param_groups, base.param_groups[0]
    optimizer = gems(model, base=base)
    train(model, optimizer, 2)
    {"groups now": base.param_groups[0], "a group from before": first, "the list from before": earlier[0]}[held][
        "lr"
    ] = 0.0
    before = weights_of(model)
    train(model, optimizer, 1, start=2)
    assert same(before, model.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_step_and_zero_grad_of_the_base_are_the_wrappers():
    ends = []
    for through_base in (False, True):
        model = mlp()
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer = gems(model, base=base)
        asked: Any = base if through_base else optimizer
        for step in range(3):
            for _ in range(2):  # the first of them is thrown away
                asked.zero_grad()
                for task, name in enumerate(TASKS):
                    with optimizer.task(name):
                        loss_of(model, step, task).backward()
            assert asked.step(lambda: 7.0) == 7.0
            asked.zero_grad()
        ends.append([*weights_of(model), *tensors_in(asked.state_dict())])
    assert same(*ends)


def test_a_checkpoint_of_the_base_is_the_wrappers():
    model, other = mlp(), mlp(seed=3)
    bases = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, other)]
    optimizers = [gems(m, base=base) for m, base in zip((model, other), bases, strict=True)]
    train(model, optimizers[0], 3)
    other.load_state_dict(model.state_dict())
    bases[1].load_state_dict(bases[0].state_dict())
    for m, optimizer in zip((model, other), optimizers, strict=True):
        train(m, optimizer, 2, start=3)
    assert same(model.parameters(), other.parameters())


def test_a_group_that_is_added_to_the_base_is_the_wrappers():
    model, more = mlp(), mlp(seed=4)
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="not among the base optimizer's parameters"):
        optimizer = gems(nn.ModuleList([model, more]), base=base)
    base.add_param_group({"params": list(more.parameters()), "lr": 0.5})
    assert base.param_groups is optimizer.param_groups
    assert (optimizer.param_groups[1]["lr"], optimizer.param_groups[1]["rank"]) == (0.5, 4)
    before = weights_of(more)
    train(more, optimizer, 2)
    assert not same(before, more.parameters())


def test_it_steers_on_after_a_load_and_in_copies():
    model = mlp()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = gems(model, base=base)
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler = lr_scheduler.LambdaLR(base, lambda step: 0.0)
    assert optimizer.param_groups[0]["lr"] == 0.0
    scheduler.step()
    before = weights_of(model)
    train(model, optimizer, 1, start=1)
    assert same(before, model.parameters())
    both = {"model": mlp(), "optimizer": None}
    both["optimizer"] = gems(both["model"])
    for again in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        inner = again["optimizer"]._inner.base
        assert inner.param_groups is again["optimizer"].param_groups
        inner.param_groups[0]["lr"] = 0.0
        before = weights_of(again["model"])
        for task, name in enumerate(TASKS):
            with again["optimizer"].task(name):
                loss_of(again["model"], 0, task).backward()
        inner.step()
        assert same(before, again["model"].parameters())


def test_a_fused_base_leaves_unscaling_to_the_scaler():
    """Otherwise ``scaler.step(base)`` would step with scaled gradients."""
    base = torch.optim.AdamW((model := mlp()).parameters(), fused=True)
    gems(model, base=base)
    assert not base._step_supports_amp_scaling


def test_neither_keeps_the_other_alive():
    model = mlp()
    base = torch.optim.AdamW(model.parameters())
    optimizer = gems(model, base=base)
    gone = weakref.ref(base)
    del base
    optimizer.close()
    kept = optimizer._inner.base
    del optimizer
    gc.collect()
    with pytest.raises(
        RuntimeError, match=r"AdamW\.step\(\): this optimizer was wrapped in a GemsOptimizer that is gone"
    ):
        kept.step()
    gc.disable()
    try:
        del kept
        assert gone() is None  # by reference counting alone: its state is as large as the weights
    finally:
        gc.enable()


def test_a_base_that_was_refused_is_its_own():
    model = mlp()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="rank=0"):
        GemsOptimizer(base, tasks=TASKS, rank=0)
    assert "step" not in vars(base)
    loss_of(model, 0, 0).backward()
    before = weights_of(model)
    base.step()
    assert not same(before, model.parameters())
