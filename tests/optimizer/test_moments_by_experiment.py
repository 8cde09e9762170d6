"""What of a base optimizer's state is a moment is found out by running it, not by names (GaLore 54)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradsub import GemsOptimizer
from gradsub._probe import Probes
from gradsub.subspace import _bank as bank
from gradsub.subspace import carry_moments
from tests.optimizer.toys import gems, mlp, noise, train, weights_of


class Foreign(torch.optim.Optimizer):
    """Adam without decay, with names of its own; ``root`` keeps the root of the second moment."""

    def __init__(self, params: Any, lr: float = 1e-2, root: bool = False) -> None:
        super().__init__(params, {"lr": lr, "root": root})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Adam's."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(t=0, a=torch.zeros_like(gradient), b=torch.zeros_like(gradient))
                state["t"] += 1
                state["a"].lerp_(gradient, 0.1)
                square = state["b"].square() if group["root"] else state["b"]
                square = square.mul(0.999).addcmul(gradient, gradient, value=0.001)
                state["b"].copy_(square.sqrt() if group["root"] else square)
                away = state["a"] / (1 - 0.9 ** state["t"])
                parameter.sub_(away / ((square / (1 - 0.999 ** state["t"])).sqrt() + 1e-8), alpha=group["lr"])


class Skewed(torch.optim.SGD):
    """Keeps what is neither odd nor even in the gradient, and products of all entries."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """SGD's."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    self.state[parameter]["mixture"] = gradient + gradient.square()
                    self.state[parameter]["products"] = gradient.flatten().outer(gradient.flatten())
                    parameter.sub_(gradient, alpha=group["lr"])


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("root", [False, True])
def test_moments_turn_with_the_basis_whatever_they_are_called(side: str, refresh: str, root: bool) -> None:
    ends = []
    for foreign in (False, True):
        model = mlp(dtype=torch.float64)
        base = Foreign(model.parameters(), root=root) if foreign else torch.optim.Adam(model.parameters(), lr=1e-2)
        train(model, gems(model, base=base, side=side, refresh=refresh), 10)
        ends.append(weights_of(model))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


FIRST, SECOND, ROOT = "first", "second", "root"
KNOWN: list[tuple[Any, dict[str, Any], dict[str, str]]] = [
    (torch.optim.AdamW, {"amsgrad": True}, {"exp_avg": FIRST, "exp_avg_sq": SECOND, "max_exp_avg_sq": SECOND}),
    (torch.optim.AdamW, {"maximize": True, "fused": True}, {"exp_avg": FIRST, "exp_avg_sq": SECOND}),
    (torch.optim.NAdam, {}, {"exp_avg": FIRST, "exp_avg_sq": SECOND}),
    (torch.optim.RAdam, {}, {"exp_avg": FIRST, "exp_avg_sq": SECOND}),
    (torch.optim.Adamax, {}, {"exp_avg": FIRST, "exp_inf": ROOT}),
    (torch.optim.Rprop, {}, {"prev": FIRST, "step_size": ROOT}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.3}, {"sum": SECOND}),
    (
        torch.optim.RMSprop,
        {"centered": True, "momentum": 0.9},
        {"square_avg": SECOND, "grad_avg": FIRST, "momentum_buffer": FIRST},
    ),
    (torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer": FIRST}),
    (torch.optim.SGD, {}, {}),
    (torch.optim.Adadelta, {}, {"square_avg": SECOND, "acc_delta": SECOND}),
    (Foreign, {}, {"a": FIRST, "b": SECOND}),
    (Foreign, {"root": True}, {"a": FIRST, "b": ROOT}),
]


@pytest.mark.parametrize(("base", "options", "moments"), KNOWN)
def test_each_moment_is_recognised(base: Any, options: dict[str, Any], moments: dict[str, str]) -> None:
    parameters = [nn.Parameter(torch.ones(8, 8))]
    optimizer = base(parameters, lr=1e-3, **options)
    traits = Probes(optimizer).traits({**optimizer.param_groups[0]}, parameters, optimizer.state)
    assert traits.moments == moments
    assert not traits.unknown


@pytest.mark.parametrize("moments", ["rotate", "keep", "reset"])
def test_what_no_rotation_reaches_is_said_once(moments: str) -> None:
    model = mlp()
    base = Skewed([{"params": [parameter]} for parameter in model.parameters()])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = GemsOptimizer(base, tasks=("search", "rec"), rank=4, model=model, moments=moments)
        train(model, optimizer, 3)
    texts = [str(warning.message) for warning in said]
    assert len(texts) == (moments == "rotate")
    assert all("['mixture', 'products'] of base=Skewed" in text for text in texts)
    assert all(warning.filename == __file__ for warning in said)


@given(axis=st.sampled_from([0, 1]), layers=st.integers(1, 3), scale=st.floats(1e-10, 1e10), stacked=st.booleans())
def test_of_a_root_the_square_is_carried(axis: int, layers: int, scale: float, stacked: bool) -> None:
    shape = (layers, 7, 3) if axis == 1 else (layers, 3, 7)
    value = noise(*shape, key=(1,)).double().abs() * scale
    old, new = (torch.linalg.qr(noise(layers, 6, 3, key=(key,)).double()).Q for key in (2, 3))
    if not stacked:
        value, old, new = value[0], old[0], new[0]
    squares, roots = value.square(), value.clone()
    assert not carry_moments({"x": squares}, {"x": "second"}, None, old.mT @ new, axis)
    assert not carry_moments({"x": roots}, {"x": "root"}, None, old.mT @ new, axis)
    torch.testing.assert_close(roots.square(), squares, rtol=1e-9, atol=0)


def test_moments_in_codes_are_left_and_named() -> None:
    """8-bit optimizers keep them so; rotating codes would be noise."""
    codes = torch.arange(21, dtype=torch.uint8).view(7, 3)
    old, new = (torch.linalg.qr(noise(6, 3, key=(key,))).Q for key in (2, 3))
    assert carry_moments({"x": codes}, {"x": "first"}, None, old.mT @ new, 1) == ["x"]
    assert torch.equal(codes, torch.arange(21, dtype=torch.uint8).view(7, 3))


def test_moments_follow_the_bases_that_a_refresh_has_found_before_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who catches an out-of-memory error and goes on has state that fits together."""
    model = mlp((12, 16, 8), bias=False, dtype=torch.float64)
    optimizer = gems(model, rank=4, update_proj_gap=2, refresh="svd", seed=1)
    train(model, optimizer, 2)
    before = {p: {key: value.clone() for key, value in optimizer.state[p].items()} for p in model.parameters()}
    find, calls = bank.dominant_basis, 0

    def find_some(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 4:  # the three subspaces of one layer, and one of the other
            raise torch.OutOfMemoryError("no room")
        return find(*arguments)

    monkeypatch.setattr(bank, "dominant_basis", find_some)
    with pytest.raises(torch.OutOfMemoryError):
        train(model, optimizer, 1, start=2)
    followed = 0
    for parameter, old in before.items():
        new = optimizer.state[parameter]
        B, C = old["basis"][:, :4], new["basis"][:, :4]
        key = next(key for key in new if key.startswith("inner.") and key.endswith("shared.exp_avg"))
        torch.testing.assert_close(new[key], old[key] @ (B.mT @ C), rtol=0, atol=1e-12)
        followed += not torch.equal(B, C)
    assert followed == 2
