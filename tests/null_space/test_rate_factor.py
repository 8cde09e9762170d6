"""`NullSpace.rate_factor`: what the null space leaves of a task's gradients, as a factor on steps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradsub import NullSpace


@given(
    side=st.sampled_from(["input", "output"]),
    protected=st.lists(st.integers(1, 5), min_size=2, max_size=2),
    seed=st.integers(0, 99),
)
def test_it_compares_whole_and_free_gradients(side, protected, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 8))
    null_space, whole, free = NullSpace(side=side, energy=1.0), 0.0, 0.0
    for name, count in zip(("0", "1"), protected, strict=True):
        weight = model[int(name)].weight
        weight.grad = torch.randn(weight.shape, generator=generator)
        features = torch.randn(count, weight.shape[1 if side == "input" else 0], generator=generator)
        null_space.update(name, features)
        K = null_space.basis(name)
        left = weight.grad - (weight.grad @ K @ K.mT if side == "input" else K @ K.mT @ weight.grad)
        whole += weight.numel() ** 0.5 * float(weight.grad.norm())
        free += weight.numel() ** 0.5 * float(left.norm())
    assert null_space.rate_factor(model) == pytest.approx(whole / free, rel=1e-4)


def test_without_gradients_or_room_it_says_so():
    model = nn.Linear(4, 3)
    null_space = NullSpace(energy=1.0)
    null_space.update("", torch.eye(4))
    with pytest.raises(ValueError, match=r"none of the null space's layers has a gradient .* loss.backward\(\)"):
        null_space.rate_factor(model)
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ValueError, match="leaves nothing of the gradients"):
        null_space.rate_factor(model)
    other = nn.Linear(5, 3)
    other(torch.ones(1, 5)).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of shape \(3, 5\), and the null space 4 features"):
        null_space.rate_factor(other)
