"""The optimizer equals the readable twin, step by step."""

import numpy as np
import pytest
import torch
from simple_gems import SimpleGems

from gradsub import GemsOptimizer, NullSpace

M, N, RANK, TASK_RANK, GAP, STEPS = 11, 9, 4, 2, 7, 20
LR = 0.01


def quadratic(rng, rank=2 * N):
    """A task: 0.5 ||(W - T) A||^2 / n, whose gradient needs no autograd."""
    target, A = rng.normal(size=(M, N)), rng.normal(size=(N, rank)) * np.geomspace(2, 0.3, N)[:, None]
    return target, A @ A.T / N


def loss_of(weight, task):
    target, metric = (torch.from_numpy(part) for part in task)
    return 0.5 * torch.einsum("ij,jk,ik->", weight - target, metric, weight - target)


def make(side, count, gate, orthogonalize, with_null_space, inner, scale=0.7, rank=2 * N):
    rng = np.random.default_rng(count)
    start = rng.normal(size=(M, N))
    tasks = {f"task{k}": quadratic(rng, rank) for k in range(count)}
    decay = 0.1
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    null_space, protected = None, None
    if with_null_space:
        null_space = NullSpace(side=side, energy=1.0)
        null_space.update("W", torch.from_numpy(rng.normal(size=(3, N if side == "input" else M))))
        protected = null_space.basis("W", torch.float64).numpy()
    base = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=decay),
        "sgd": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, weight_decay=decay),
    }[inner]([("W", weight)])
    options = {"scale": scale, "side": side, "gate": gate, "orthogonalize": orthogonalize}
    optimizer = GemsOptimizer(
        base,
        tasks=tuple(tasks),
        rank=RANK,
        task_rank=TASK_RANK,
        update_proj_gap=GAP,
        null_space=null_space,
        **options,
    )
    twin = SimpleGems(
        start,
        tuple(tasks),
        rank=RANK,
        task_rank=TASK_RANK,
        gap=GAP,
        protected=protected,
        inner=inner,
        lr=LR,
        decay=decay,
        **options,
    )
    return weight, tasks, optimizer, twin


def both_step(weight, tasks, optimizer, twin, samples):
    gradients, losses = {}, {}
    for name in samples:
        target, metric = tasks[name]
        gradients[name] = (twin.weight() - target) @ metric
        with optimizer.task(name, samples=samples[name]):
            loss = loss_of(weight, tasks[name])
            loss.backward()
        losses[name] = loss.item()
    twin.step(gradients, samples, losses)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("inner", ["adamw", "sgd"])
@pytest.mark.parametrize("with_null_space", [False, True])
@pytest.mark.parametrize(
    ("gate", "orthogonalize"), [("uniform", "none"), ("heuristic", "none"), ("heuristic", "shared_first")]
)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("side", ["input", "output"])
def test_equals_twin(side, count, gate, orthogonalize, with_null_space, inner):
    weight, tasks, optimizer, twin = make(side, count, gate, orthogonalize, with_null_space, inner)
    start = weight.detach().clone()
    for _ in range(STEPS):
        both_step(weight, tasks, optimizer, twin, {name: 8 * (k + 1) for k, name in enumerate(tasks)})
        np.testing.assert_allclose(weight.detach().numpy(), twin.weight(), rtol=0, atol=1e-9)
    assert (weight - start).norm() > 0.05 * start.norm(), "both stood still"


@pytest.mark.parametrize("side", ["input", "output"])
def test_equals_twin_when_tasks_come_and_go(side):
    weight, tasks, optimizer, twin = make(side, 2, "heuristic", "none", True, "adamw")
    first, second = tasks
    for step in range(STEPS):
        # Steps 7 and 14 refresh: the first task is away at 7 and must refresh its basis when it is back, at 8.
        samples = {first: 8, second: 24} if step % 3 != 1 else {second: 24}
        both_step(weight, tasks, optimizer, twin, samples)
        np.testing.assert_allclose(weight.detach().numpy(), twin.weight(), rtol=0, atol=1e-9)


def test_equals_twin_where_gradients_have_a_lower_rank_than_bases():
    """The two complete their bases with other directions, along which nothing may move."""
    weight, tasks, optimizer, twin = make("input", 1, "uniform", "none", False, "adamw", rank=1)
    for _ in range(STEPS):
        both_step(weight, tasks, optimizer, twin, dict.fromkeys(tasks, 8))
        np.testing.assert_allclose(weight.detach().numpy(), twin.weight(), rtol=0, atol=1e-9)
