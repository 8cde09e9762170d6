"""Whether a base optimizer can be wrapped is found out by running it: no name decides."""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradsub import GemsOptimizer

from .toys import TASKS, gems, mlp, noise, same, tensors_in, train, weights_of

# What a base optimizer does is seen in gradients of no task.
pytestmark = pytest.mark.filterwarnings("ignore:.* none of them a task:UserWarning")

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]


def of(module: str, name: str, **options: Any) -> Make:
    return lambda parameters: getattr(importlib.import_module(module), name)(parameters, **options)


class Plain(torch.optim.Optimizer):
    """Gradient descent, with terms that the subclasses add; its name says nothing."""

    def __init__(self, params: Any, lr: float = 0.01, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.copy_(self.after(p.detach(), p.grad, group, self.state[p]))

    def after(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        return p - group["lr"] * g


class Shrinks(Plain):
    def after(self, p, g, group, state):
        return super().after(p, g, group, state) - group["lr"] * group["pull"] * p


class Averages(Plain):
    """Goes back to an average of where it was, every ``every`` steps."""

    def after(self, p, g, group, state):
        state["count"] = state.get("count", 0) + 1
        slow = state.setdefault("slow", p.clone())
        p = super().after(p, g, group, state)
        if state["count"] % group["every"] == 0:
            slow.lerp_(p, 0.5)
            p = slow.clone()
        return p


class Anchored(Plain):
    """Keeps what it remembers on itself, not in the state."""

    def after(self, p, g, group, state):
        self.first = getattr(self, "first", {})
        return super().after(p, g, group, state) + 1e-3 * (self.first.setdefault(id(p), p.clone()) - p)


class FollowsTheNorm(Plain):
    def after(self, p, g, group, state):
        return p - group["lr"] * g / g.norm() * (p.norm() or 1.0)


class FollowsTheRows(Plain):
    def after(self, p, g, group, state):
        return p - group["lr"] * g * p.norm(dim=1, keepdim=True).clamp_min(1e-3)


class KeepsTheNorm(Plain):
    def after(self, p, g, group, state):
        return super().after(p, g, group, state) * (p.norm() / super().after(p, g, group, state).norm())


class Noisy(Plain):
    def after(self, p, g, group, state):
        return super().after(p, g, group, state) + group["lr"] * group["noise"] * torch.randn_like(p) * random.random()


DEPEND = {
    "Amos": of("pytorch_optimizer", "Amos"),
    "ASGD": of("torch.optim", "ASGD"),
    "ASGD tiny lambd": of("torch.optim", "ASGD", lambd=1e-6),
    "ScheduleFreeAdamW": of("pytorch_optimizer", "ScheduleFreeAdamW", lr=1e-2),
    "ScheduleFreeSGD": of("pytorch_optimizer", "ScheduleFreeSGD", lr=1e-2),
    "ScheduleFreeRAdam": of("pytorch_optimizer", "ScheduleFreeRAdam", lr=1e-2),
    "Ranger": of("pytorch_optimizer", "Ranger", lr=1e-2),
    "Ranger every 50": of("pytorch_optimizer", "Ranger", lr=1e-2, k=50),
    "Fromage": of("pytorch_optimizer", "Fromage", lr=1e-2),
    "Nero": of("pytorch_optimizer", "Nero", lr=1e-2),
    "FTRL": of("pytorch_optimizer", "FTRL", lr=1e-2),
    "AccSGD": of("pytorch_optimizer", "AccSGD", lr=1e-2),
    "AdamP": of("pytorch_optimizer", "AdamP", lr=1e-2),
    "Prodigy": of("pytorch_optimizer", "Prodigy"),
    "MADGRAD": of("pytorch_optimizer", "MADGRAD"),
    "DAdaptSGD": of("pytorch_optimizer", "DAdaptSGD"),
    "own decay": lambda p: Shrinks(p, pull=1e-4),
    "own average": lambda p: Averages(p, every=5),
    "own late average": lambda p: Averages(p, every=100),
    "own anchor": Anchored,
    "own rows": FollowsTheRows,
    "own constraint": KeepsTheNorm,
    "at a rate of 0": lambda p: Shrinks(p, lr=0.0, pull=1e-4),
    "at a tiny rate": lambda p: Shrinks(p, lr=1e-12, pull=1e-4),
    "at a tensor's rate": lambda p: Shrinks(p, lr=torch.tensor(1e-3), pull=1e-4),
}


@pytest.mark.parametrize("make", DEPEND.values(), ids=DEPEND.keys())
def test_steps_that_depend_on_where_the_parameter_stands_are_refused(make):
    model = mlp()
    base = make(model.parameters())
    groups, before = base.param_groups, tensors_in(dict(base.state))
    with pytest.raises(ValueError, match=rf"base={type(base).__name__}.* the parameter (stands|started)"):
        gems(model, base=base)
    assert base.param_groups is groups
    assert "rank" not in groups[0]
    assert same(before, tensors_in(dict(base.state)))


@pytest.mark.parametrize("make", [of("pytorch_optimizer", "Lamb"), of("pytorch_optimizer", "LARS"), FollowsTheNorm])
def test_a_trust_ratio_is_refused(make):
    model = mlp()
    with pytest.raises(ValueError, match="scales its step by the parameter's norm"):
        gems(model, base=make(model.parameters()))


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (of("torch.optim", "ASGD", lambd=1e-3), "lambd=0.001"),
        (lambda p: Shrinks(p, pull=0.5), "pull=0.5"),
        (of("pytorch_optimizer", "MADGRAD"), "momentum=0.9"),
    ],
)
def test_the_option_to_blame_is_named_and_without_it_all_is_well(make, option):
    model = mlp()
    key = option.split("=")[0]
    base = make(model.parameters())
    with pytest.raises(ValueError, match=rf"with {option}.*pass {key}=0"):
        gems(model, base=base)
    base.param_groups[0][key] = 0.0
    train(model, gems(model, base=base), 2)


ACCEPTED = {
    "AdamW": of("torch.optim", "AdamW", lr=1e-2),
    "AdamW tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
    "ASGD without lambd": of("torch.optim", "ASGD", lr=1e-2, lambd=0.0),
    "Rprop": of("torch.optim", "Rprop", lr=1e-2),
    "Adafactor": of("torch.optim", "Adafactor", lr=1e-2),
    "Adafactor of transformers": of("transformers.optimization", "Adafactor"),
    "Lion": of("pytorch_optimizer", "Lion", lr=1e-3),
    "Adalite": of("pytorch_optimizer", "Adalite", lr=1e-2),
    "SOAP": of("pytorch_optimizer", "SOAP", lr=1e-2, weight_decay=0.0),
    "Tiger": of("pytorch_optimizer", "Tiger", lr=1e-3),
    "Yogi": of("pytorch_optimizer", "Yogi", lr=1e-2),
    "DAdaptAdam": of("pytorch_optimizer", "DAdaptAdam"),
    "own noise": lambda p: Noisy(p, noise=0.1),
    "own": Plain,
}


def in_the_whole_space(make: Make, wrap: bool, steps: int = 15) -> Tensor:
    """With the identity as the shared basis, for all its steps: the wrapped optimizer has to be the bare one."""
    layer = nn.Linear(8, 8, bias=False).double()
    layer.weight.data = noise(8, 8, key=(1,)).double()
    base: Any = make(layer.parameters())
    optimizer = base
    if wrap:
        with pytest.warns(UserWarning, match="rank=8"):
            optimizer = GemsOptimizer(base, tasks=("a",), rank=8, model=layer)
        optimizer.state[layer.weight]["basis"].copy_(torch.eye(8, 12))
        optimizer.state[layer.weight]["next_refresh"].fill_(10**6)
    for step in range(steps):
        x = noise(32, 8, key=(2, step)).double()
        (layer(x) - x.flip(1)).square().mean().backward()
        torch.manual_seed(step)
        random.seed(step)
        optimizer.step()
        optimizer.zero_grad()
    return layer.weight.detach()


@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_is_accepted_steps_as_it_does_alone(make):
    torch.testing.assert_close(in_the_whole_space(make, True), in_the_whole_space(make, False), rtol=1e-6, atol=1e-8)


DECAYS = {
    "coupled": of("torch.optim", "Adam", lr=1e-2, weight_decay=0.1),
    "coupled, upwards": of("torch.optim", "Adam", lr=1e-2, weight_decay=0.1, maximize=True),
    "decoupled": of("torch.optim", "AdamW", lr=1e-2, weight_decay=0.1),
    "by a flag": of("torch.optim", "Adam", lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "coupled elsewhere": of("pytorch_optimizer", "AdaDelta", lr=1.0, weight_decay=0.1),
    "decoupled elsewhere": of("pytorch_optimizer", "Lion", lr=1e-3, weight_decay=0.1),
    "fixed": of("pytorch_optimizer", "Lion", lr=1e-3, weight_decay=0.01, fixed_decay=True),
    "ignored": lambda p: Plain(p, weight_decay=0.1),
    "coupled, of no known class": lambda p: Coupled(p, weight_decay=0.1),
}


class Coupled(Plain):
    def after(self, p, g, group, state):
        return super().after(p, g + group["weight_decay"] * p, group, state)


@pytest.mark.parametrize("make", DECAYS.values(), ids=DECAYS.keys())
def test_weight_decay_is_what_it_is_alone(make):
    torch.testing.assert_close(in_the_whole_space(make, True), in_the_whole_space(make, False), rtol=1e-6, atol=1e-8)


class OddDecay(Plain):
    def after(self, p, g, group, state):
        return super().after(p, g, group, state) - group["weight_decay"] * p.sign()


def test_a_decay_of_another_kind_is_said_once():
    model = mlp()
    with pytest.warns(UserWarning, match=r"weight_decay=0\.1 of base=OddDecay neither joins the gradient"):
        gems(model, base=OddDecay(model.parameters(), weight_decay=0.1))
    optimizer = gems(model := mlp(), base=OddDecay(model.parameters(), weight_decay=0.0))
    train(model, optimizer, 1)
    optimizer.param_groups[0]["weight_decay"] = 0.2
    with pytest.warns(UserWarning, match=r"weight_decay=0\.2 of base=OddDecay") as said:
        train(model, optimizer, 2, start=1)
    assert len(said) == 1


def test_an_option_that_is_switched_on_later_is_refused_before_anything_changes():
    model = mlp()
    optimizer = gems(model, base=torch.optim.ASGD(model.parameters(), lambd=0.0))
    train(model, optimizer, 2)
    optimizer.param_groups[0]["lambd"] = 1e-3
    before = [*weights_of(model), *tensors_in(optimizer.state_dict())]
    with pytest.raises(ValueError, match=r"base=ASGD with lambd=0\.001"):
        train(model, optimizer, 1, start=2)
    optimizer.zero_grad()
    assert same(before, [*weights_of(model), *tensors_in(optimizer.state_dict())])
    optimizer.param_groups[0]["lambd"] = 0.0
    train(model, optimizer, 1, start=2)


def test_a_group_that_is_added_later_is_looked_at_too():
    model, more = mlp(), nn.Parameter(noise(9, 7))
    optimizer = GemsOptimizer(torch.optim.ASGD(model.parameters(), lambd=0.0), tasks=TASKS, rank=2)
    with pytest.raises(ValueError, match=r"base=ASGD with lambd=0\.1"):
        optimizer.add_param_group({"params": [more], "lambd": 0.1})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [more]})


def test_ordinary_schedules_need_no_second_look(monkeypatch):
    model = mlp()
    optimizer = gems(model, base=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1))
    monkeypatch.setattr(optimizer._inner.probes, "traits", lambda *_: pytest.fail("probed again"))
    for step, rate in enumerate((0.1, 0.0, 0.3)):
        optimizer.param_groups[0].update(lr=rate, weight_decay=rate, momentum=0.9 - rate)
        train(model, optimizer, 1, start=step)


def test_counters_of_the_base_optimizer_are_not_taken_for_changes():
    model = mlp()
    optimizer = gems(model, base=of("pytorch_optimizer", "Lion", lr=1e-3)(model.parameters()))
    train(model, optimizer, 3)
    assert optimizer.param_groups[0]["step"] == 3
    again = gems(fresh := mlp(), base=of("pytorch_optimizer", "Lion", lr=1e-3)(fresh.parameters()))
    again.load_state_dict(optimizer.state_dict())
    train(fresh, again, 2, start=3)


def test_groups_of_matrices_alone_are_looked_at():
    """What is not decomposed may depend on anything."""
    model = mlp()
    vectors = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    GemsOptimizer(torch.optim.ASGD(vectors), tasks=TASKS)
    whole = [{"params": matrices, "subspace": False}, {"params": vectors}]
    optimizer = GemsOptimizer(torch.optim.ASGD(whole), tasks=TASKS, rank=2)
    train(model, optimizer, 1)
    embedding, layer = nn.Embedding(9, 7), nn.Linear(7, 6, bias=False)
    groups = [{"params": [layer.weight], "lambd": 0.0}, {"params": [embedding.weight], "lambd": 0.1}]
    GemsOptimizer(torch.optim.ASGD(groups), tasks=TASKS, rank=2, model=nn.Sequential(embedding, layer))


class TestNothingIsTouched:
    def test_neither_random_numbers_nor_hooks_nor_the_base(self):
        model = mlp()
        base = of("pytorch_optimizer", "Lion", lr=1e-3)(model.parameters())
        base.own = torch.Generator().manual_seed(3)
        base.table = [torch.zeros(3)]
        weights, calls = weights_of(model), []
        handle = register_optimizer_step_pre_hook(lambda *_: calls.append("global"))
        base.register_step_pre_hook(lambda *_: calls.append("own"))
        python, numbers, torchs = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
        own = base.own.get_state()
        try:
            gems(model, base=base)
            gems(model, base=Noisy(model.parameters(), noise=1.0))
        finally:
            handle.remove()
        assert calls == []
        assert random.getstate() == python
        assert (np.random.get_state()[1] == numbers).all()  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), torchs)
        assert torch.equal(base.own.get_state(), own)
        assert same(weights, model.parameters())
        assert not base.table[0].any()
        assert all(p.grad is None for p in model.parameters())

    def test_a_copied_generator_is_not_the_users(self):
        class Own(Plain):
            def after(self, p, g, group, state):
                return super().after(p, g, group, state) + torch.randn(p.shape, generator=self.own, dtype=p.dtype)

        base = Own((model := mlp()).parameters())
        base.own = torch.Generator().manual_seed(3)
        state = base.own.get_state()
        gems(model, base=base)
        assert torch.equal(base.own.get_state(), state)

    def test_a_model_that_the_base_holds_is_not_copied(self):
        class Holds(Plain):
            pass

        base = Holds((model := mlp()).parameters())
        base.model = model
        gems(model, base=base)


def test_no_default_dtype_or_device_gets_in_the_way():
    model = mlp()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        gems(model, base=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        with pytest.raises(ValueError, match="lambd"):
            gems(model, base=torch.optim.ASGD(model.parameters()))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_parameters_without_storage_are_no_obstacle():
    model = mlp(device="meta")
    gems(model, base=torch.optim.AdamW(model.parameters(), capturable=True))
    with pytest.raises(ValueError, match="lambd"):
        gems(model, base=torch.optim.ASGD(model.parameters(), capturable=True))


class Inside(torch.optim.Optimizer):
    """Wraps another optimizer, as a lookahead does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_what_moves_nothing_is_refused():
    with pytest.raises(ValueError, match="base=Inside does not move what is in its param_groups"):
        gems(model := mlp(), base=Inside(torch.optim.SGD(model.parameters(), lr=0.1)))


class Twice(Plain):
    def step(self, closure: Any) -> None:
        closure()
        super().step()
        closure()


def test_what_needs_a_closure_is_refused():
    with pytest.raises(ValueError, match="base=Twice evaluates its closure several times a step, or cannot step"):
        gems(model := mlp(), base=Twice(model.parameters()))
    with pytest.raises(ValueError, match=r"base=SparseAdam could not take a step on a matrix .*dense gradients"):
        gems(model := mlp(), base=torch.optim.SparseAdam(list(model.parameters())))


def test_a_base_optimizer_behind_a_scheduler_is_tried_without_it():
    model = mlp()
    base = torch.optim.AdamW(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(base, lambda step: 0.0)
    gems(model, base=base)


class Single(torch.optim.SGD):
    """Computes in float32 whatever it is given, as bitsandbytes does."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data.copy_(p.data.float())


def test_single_precision_is_no_dependence():
    train(model := mlp(), gems(model, base=Single(model.parameters(), lr=0.1, momentum=0.9)), 2)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion"])
def test_bitsandbytes(name):
    base = getattr(pytest.importorskip("bitsandbytes").optim, name)(mlp().parameters(), lr=1e-3)
    GemsOptimizer(base, tasks=TASKS, rank=2)


def test_accelerates_wrapper():
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    model = mlp()
    base = accelerate.optimizer.AcceleratedOptimizer(torch.optim.AdamW(model.parameters()))
    before = weights_of(model)
    train(model, gems(model, base=base), 1)
    assert not same(before, model.parameters())


def test_nothing_that_cannot_be_zero_is_blamed():
    """Ranger divides by how often it averages."""
    base = of("pytorch_optimizer", "Ranger")(mlp().parameters())
    with pytest.raises(ValueError, match="base=Ranger takes other steps"):
        GemsOptimizer(base, tasks=TASKS, rank=2)


def test_two_hundred_groups_cost_one_trial():
    weights = [nn.Parameter(noise(9, 7, key=(i,))) for i in range(200)]
    base = torch.optim.AdamW([{"params": [weight], "lr": 0.1 / (i + 1)} for i, weight in enumerate(weights)])
    start = time.perf_counter()
    optimizer = GemsOptimizer(base, tasks=TASKS, rank=2)
    assert len(optimizer._inner.probes._answers) == 1
    assert time.perf_counter() - start < 5  # a trial for each would take longer
