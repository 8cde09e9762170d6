"""However a weight lies in memory, a step moves it like a contiguous one, in every branch that writes weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsub import GemsOptimizer, NullSpace, update
from gradsub.subspace import Block, Layer

from .toys import TASKS, leak, noise

STEPS = 4


def channels_last(values: Tensor) -> Tensor:
    return values.to(memory_format=torch.channels_last)


def transposed(values: Tensor) -> Tensor:
    """With the first axis the fastest one."""
    axes = (*range(1, values.ndim), 0)
    return values.permute(axes).contiguous().permute(values.ndim - 1, *range(values.ndim - 1))


def sliced(values: Tensor) -> Tensor:
    """Every other entry of a larger storage."""
    whole = values.new_zeros(*values.shape[:-1], 2 * values.shape[-1] + 1)
    whole[..., 1::2] = values
    return whole[..., 1::2]


def cut(values: Tensor) -> Tensor:
    """A block of a larger storage."""
    whole = values.new_zeros(values.shape[0] + 2, values.shape[1] + 3, *values.shape[2:])
    whole[1:-1, 2:-1] = values
    return whole[1:-1, 2:-1]


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": channels_last,
    "transposed": transposed,
    "sliced": sliced,
    "cut": cut,
}


@pytest.fixture(params=["device", "batched"])
def branch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own branch, and that of accelerators on every device."""
    if request.param == "batched":
        monkeypatch.setattr(update, "_small", lambda layer: True)


def laid_out(weight: Tensor, layout: Callable[[Tensor], Tensor]) -> nn.Parameter:
    found = nn.Parameter(layout(weight.clone()))
    assert torch.equal(found, weight)
    return found


def trained(weights: list[nn.Parameter], base: Callable[[Any], Any], **options: Any) -> list[Tensor]:
    """The changes of weights of one shape after some steps."""
    names = [(f"w{i}", weight) for i, weight in enumerate(weights)]
    optimizer = GemsOptimizer(base(names), **{"tasks": TASKS, "rank": 3, "update_proj_gap": 2, **options})
    before = [weight.detach().clone() for weight in weights]
    for step in range(STEPS):
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                sum((w * noise(*w.shape, key=(i, step, task), like=w)).sum() for i, w in enumerate(weights)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach() - old for weight, old in zip(weights, before, strict=True)]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def decayed(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.3)


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(10, 6, 3, 3), (10, 12)], ids=["convolution", "matrix"])
@pytest.mark.parametrize("base", [adam, decayed])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_move_however_they_lie_in_memory(device, layout, shape, base, side, dtype):
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("needs four dimensions")
    values = [noise(*shape, key=(i,)).to(device, dtype) for i in range(2)]
    expected = trained([laid_out(value, torch.clone) for value in values], base, side=side)
    # One of each, side by side in one block.
    mixed = [laid_out(values[0], FORMATS[layout]), laid_out(values[1], torch.clone)]
    for moved, wanted in zip(trained(mixed, base, side=side), expected, strict=True):
        assert wanted.norm() > 0.1
        torch.testing.assert_close(moved, wanted)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("side", ["input", "output"])
def test_protection_holds_however_a_weight_lies_in_memory(device, layout, side):
    weight = laid_out(noise(10, 6, 3, 3).to(device, torch.float64), FORMATS[layout])
    null_space = NullSpace(side=side, max_rank=3)
    null_space.update("w0", noise(20, 54 if side == "input" else 10))
    (moved,) = trained([weight], decayed, side=side, null_space=null_space)
    assert moved.norm() > 0.1
    assert leak(moved.reshape(10, 54), null_space.basis("w0"), side) < 1e-6


@pytest.mark.parametrize("layout", FORMATS)
def test_master_weights_of_any_layout(device, layout):
    values = noise(10, 6, 3, 3).to(device, torch.bfloat16)
    (wanted,) = trained([laid_out(values, torch.clone)], adam, master_weights=True)
    (moved,) = trained([laid_out(values, FORMATS[layout])], adam, master_weights=True)
    assert torch.equal(moved, wanted)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    order=st.randoms(use_true_random=False),
    stride=st.integers(1, 3),
)
def test_a_batched_update_reaches_every_entry_of_any_dense_or_sliced_storage(sizes, order, stride):
    """The batched update alone: against the addition entry by entry."""
    axes = list(range(len(sizes)))
    order.shuffle(axes)
    storage = torch.zeros(*[sizes[axis] * stride for axis in axes])
    view = storage[tuple(slice(None, None, stride) for _ in axes)]
    weight = nn.Parameter(view.permute([axes.index(axis) for axis in range(len(axes))]))
    rows, columns = sizes[0], weight.numel() // sizes[0]
    block = Block(0, [Layer("w", weight, 0, 1, (1,))], 0)
    step, basis = noise(1, rows, 1, key=(1,)), noise(columns, 1, key=(2,))
    with torch.no_grad():
        update.apply_updates(block, [{}], step, basis[None], 0.0)
    torch.testing.assert_close(weight.detach(), (step[0] @ basis.mT).reshape(sizes))


def test_a_weight_whose_entries_share_memory_is_refused(device):
    parameter = nn.Parameter(torch.zeros(1, 8, device=device).expand(16, 8))
    with pytest.raises(ValueError, match=r"expanded \(strides \(0, 1\)\).*clone"):
        GemsOptimizer(torch.optim.AdamW([parameter]), rank=2)
