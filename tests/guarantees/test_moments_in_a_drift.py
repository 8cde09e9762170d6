"""When the gradients' subspace drifts, moments that follow the basis are worth more than numbers of the old one."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from torch import Tensor, nn

from gradsub import GemsOptimizer

SEEDS = range(5)
STEPS = 100


def rotation(size: int, speed: float, generator: torch.Generator) -> Tensor:
    A = torch.randn(size, size, generator=generator)
    A = A - A.mT
    return torch.linalg.matrix_exp(speed * A / torch.linalg.matrix_norm(A, 2))


def error_at_the_end(moments: str, seed: int) -> float:
    """Two tasks whose targets have rank 2 and turn a little at every step; a refresh every 5 steps.

    The mean squared distance of the weight to the tasks' mean target over the last 20 steps.
    """
    generator = torch.Generator().manual_seed(seed)
    turn = rotation(16, 0.01, generator)
    targets = [
        torch.randn(12, 2, generator=generator) @ torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q.mT
        for _ in range(2)
    ]
    model = nn.Linear(16, 12, bias=False)
    nn.init.zeros_(model.weight)
    base = torch.optim.Adam(model.parameters(), lr=0.05, betas=(0.9, 0.99))
    optimizer = GemsOptimizer(base, tasks=("a", "b"), rank=4, update_proj_gap=5, moments=moments)
    errors = []
    for step in range(STEPS):
        targets = [target @ turn for target in targets]
        for name, target in zip("ab", targets, strict=True):
            x = torch.randn(16, 16, generator=generator)
            with optimizer.task(name):
                (model(x) - x @ target.mT).square().sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= STEPS - 20:
            errors.append(float((model.weight.detach() - sum(targets) / 2).square().sum()))
    return sum(errors) / len(errors)


@pytest.fixture(scope="module")
def errors() -> dict[str, list[float]]:
    return {rule: [error_at_the_end(rule, seed) for seed in SEEDS] for rule in ("rotate", "keep", "reset")}


def test_rotating_beats_keeping(errors):
    assert median(errors["rotate"]) < 0.85 * median(errors["keep"])
    wins = [rotate < keep for rotate, keep in zip(errors["rotate"], errors["keep"], strict=True)]
    assert sum(wins) >= 4


def test_rotating_beats_forgetting_at_the_same_rate(errors):
    """At this learning rate; a reset takes larger steps, so at a lower rate of its own it catches up."""
    assert median(errors["rotate"]) < 0.85 * median(errors["reset"])


def test_the_task_is_learnt_at_all(errors):
    """The targets' squared norm is about 12 at the start, and an untrained weight stays as far away."""
    assert all(error < 3.0 for error in errors["rotate"])
