"""The guarantee as a number: 1,000 steps of AdamW with decay, a schedule and refreshes on a small transformer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gradsub import GemsOptimizer, NullSpace

from .worlds import TASKS, Transformer, general_null_space, leak, linear_weights, losses, train_step

STEPS, GAP = 1000, 100


@dataclass
class Run:
    model: Transformer
    optimizer: GemsOptimizer
    null_space: NullSpace
    before: dict[str, Tensor]
    first_loss: float
    last_loss: float
    warned: list[str]

    @property
    def changes(self) -> dict[str, Tensor]:
        return {name: weight.detach().double() - self.before[name] for name, weight in weights_of(self).items()}

    def leaks(self, changes: dict[str, Tensor] | None = None) -> list[float]:
        """Of every protected layer."""
        found = (changes or self.changes).items()
        return [leak(change, self.null_space.basis(name), self.null_space.side) for name, change in found]


def weights_of(run: Run) -> dict[str, Tensor]:
    return linear_weights(run.model)


def mean_loss(model: Transformer) -> float:
    with torch.no_grad():
        return sum(float(loss) for i in range(16) for loss in losses(model, 10**6 + i).values()) / 32


def train(side: str, dtype: torch.dtype = torch.float32, *, steps: int = STEPS, lr: float = 3e-3, **options) -> Run:
    model = Transformer(dtype=dtype)
    before = {name: weight.detach().double() for name, weight in linear_weights(model).items()}
    first, null_space = mean_loss(model), general_null_space(model, side)
    base = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = GemsOptimizer(
            base, tasks=TASKS, rank=4, update_proj_gap=GAP, side=side, null_space=null_space, model=model, **options
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
        for step in range(steps):
            train_step(model, optimizer, step)
            scheduler.step()
    # Embeddings, norms and biases train as well, which is meant: it is layers that are looked at.
    said = [text for text in map(str, (warning.message for warning in caught)) if "has nothing for" not in text]
    return Run(model, optimizer, null_space, before, first, mean_loss(model), said)


@pytest.fixture(scope="module", params=["input", "output"])
def float32(request) -> Run:
    return train(request.param)


@pytest.fixture(scope="module")
def anchored() -> Run:
    return train("input", anchor=True)  # one side is enough, and takes its time


def test_the_leak_is_below_two_millionths_in_every_layer(float32):
    leaks = float32.leaks()
    assert len(leaks) == 6
    assert max(leaks) < 2e-6
    assert float32.warned == []


def test_with_an_anchor_the_leak_is_below_a_millionth_in_every_layer(anchored):
    leaks = anchored.leaks()
    assert len(leaks) == 6
    assert max(leaks) < 1e-6
    assert anchored.warned == []


def test_the_run_was_a_real_one(float32):
    """Its weights moved by much, its loss fell, its bases were refreshed and its schedule has ended."""
    assert float32.last_loss < float32.first_loss - 0.3
    for name, change in float32.changes.items():
        assert change.norm() > 0.2 * float32.before[name].norm()
        state = float32.optimizer.state[weights_of(float32)[name]]
        assert int(state["step"]) == STEPS
        assert state["next_refresh"].tolist() == [STEPS] * 3  # the last refresh was at 900
    assert float32.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_the_layers_answer_what_is_protected_as_before(float32):
    """To 1e-5 of the answer, which is what float32 leaves of a change that is zero in exact arithmetic."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights_of(float32).items():
        K, before, now = float32.null_space.basis(name), float32.before[name].float(), weight.detach()
        if float32.null_space.side == "input":
            x = torch.randn(64, K.shape[1], generator=generator) @ K.mT
            was, found = x @ before.mT, x @ now.mT
            free = torch.randn(64, weight.shape[1], generator=generator)
            free = free - free @ K @ K.mT
            elsewhere = free @ (now - before).mT
        else:
            x = torch.randn(64, weight.shape[1], generator=generator)
            was, found = x @ before.mT @ K, x @ now.mT @ K
            elsewhere = x @ (now - before).mT
        assert (found - was).norm() < 1e-5 * was.norm()
        assert elsewhere.norm() > 1e-2 * was.norm()


def test_an_anchor_keeps_roundings_from_adding_up(float32, anchored):
    """Each step's rounding alone, over 1,000 steps, leaves several times the leak."""
    if float32.null_space.side == anchored.null_space.side:
        assert max(float32.leaks()) > 2 * max(anchored.leaks())
        assert sum(float32.leaks()) > 2 * sum(anchored.leaks())


SHORT = 150


def master_leaks(run: Run) -> list[float]:
    weights = weights_of(run)
    return run.leaks({n: run.optimizer.state[w]["master"].double() - run.before[n] for n, w in weights.items()})


def test_bfloat16_weights_leak_and_it_is_said_once():
    run = train("input", torch.bfloat16, steps=SHORT, lr=1e-4)
    assert min(run.leaks()) > 0.05
    assert len(run.warned) == 1
    assert "master_weights=True" in run.warned[0]


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_float32_master_copy_of_bfloat16_weights_keeps_the_guarantee(side):
    run = train(side, torch.bfloat16, steps=SHORT, master_weights=True)
    assert run.warned == []
    assert max(master_leaks(run)) < 2e-6
    for weight in weights_of(run).values():
        master = run.optimizer.state[weight]["master"]
        assert torch.equal(master.bfloat16(), weight)  # the weight is the copy, rounded once
        assert master.dtype == torch.float32


def test_the_master_copy_takes_4_bytes_a_weight_exactly():
    def bytes_of(master_weights: bool) -> int:
        model = Transformer(dtype=torch.bfloat16)
        optimizer = GemsOptimizer(
            torch.optim.AdamW(model.parameters()), tasks=TASKS, rank=4, model=model, master_weights=master_weights
        )
        return sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())

    decomposed = sum(weight.numel() for weight in linear_weights(Transformer()).values())
    assert bytes_of(True) - bytes_of(False) == 4 * decomposed


def test_float32_weights_have_no_master_copy():
    model = Transformer()
    optimizer = GemsOptimizer(
        torch.optim.AdamW(model.parameters()), tasks=TASKS, rank=4, model=model, master_weights=True
    )
    assert not any("master" in state for state in optimizer.state.values())


def test_the_anchor_is_what_the_protected_part_was():
    """W K (m x k) for inputs, K^T W (k x n) for outputs, of the weight at the first refresh."""
    for side in ("input", "output"):
        run = train(side, steps=3, anchor=True)
        for name, weight in weights_of(run).items():
            K, anchor, before = run.null_space.basis(name), run.optimizer.state[weight]["anchor"], run.before[name]
            expected = before.float() @ K if side == "input" else K.mT @ before.float()
            assert anchor.shape == expected.shape
            torch.testing.assert_close(anchor, expected)
