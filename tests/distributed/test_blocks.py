"""Ranks sum whole blocks, whatever each of them has captured of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradsub import GemsOptimizer
from tests.distributed.launch import launch

TASKS = ("a", "b")
ROWS = (3, 5)  # of the ranks


class Net(nn.Module):
    """Layers of one shape, some of which a pass may leave out."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(layers))
        self.double()

    def forward(self, x: Tensor, left_out: tuple[int, ...] = ()) -> Tensor:
        for place, layer in enumerate(self.layers):
            if place not in left_out:
                x = torch.tanh(layer(x))
        return x


def build(layers: int, **options: Any) -> tuple[Net, GemsOptimizer]:
    model = Net(layers)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    options = {"rank": 3, "update_proj_gap": 100, "refresh": "svd", "capture": "fused", **options}
    return model, GemsOptimizer(base, tasks=TASKS, model=model, **options)


def left_out(step: int, task: int, rank: int, reach: str) -> tuple[int, ...]:
    """Of three layers; the first steps reach all of them, so that all bases are there."""
    if reach == "all" or step < 2:
        return ()
    return (task,) if reach == "other tasks" else (rank,)


def loss_of(model: Net, step: int, task: int, rank: int, reach: str) -> Tensor:
    x = torch.randn(ROWS[rank], 8, generator=torch.Generator().manual_seed(10 * step + 3 * task + rank)).double()
    return (model(x, left_out(step, task, rank, reach)) - task).square().mean()


def trained(rank: int | None, reach: str, side: str, clip: bool) -> Tensor:
    """By a rank with its rows; or by one process with all of them (None)."""
    model, optimizer = build(3, side=side)
    for step in range(6):
        for task, name in enumerate(TASKS):
            for whose in range(2) if rank is None else (rank,):
                share = ROWS[whose] / sum(ROWS) if rank is None else 1.0
                with optimizer.task(name, samples=ROWS[whose]):
                    (share * loss_of(model, step, task, whose, reach)).backward()
        if clip:
            optimizer.clip_grad_norm_(1e-2)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("reach", ["all", "other tasks", "other ranks"])
def test_ranks_train_what_one_process_trains(reach: str, side: str, clip: bool, tmp_path: Path) -> None:
    found = launch(trained, 2, tmp_path, reach, side, clip)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], trained(None, reach, side, clip), rtol=0, atol=1e-10)


def test_operations_of_a_step_do_not_grow_with_the_layers(tmp_path: Path) -> None:
    few, many = (launch(_operations, 2, tmp_path / str(layers), layers)[0] for layers in (3, 9))
    assert few == many


def _operations(rank: int, layers: int) -> int:
    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            counted.append(operation)
            return operation(*arguments, **(options or {}))

    model, optimizer = build(layers)
    for step in range(4):
        for task, name in enumerate(TASKS):
            with optimizer.task(name, samples=ROWS[rank]):
                loss_of(model, step, task, rank, "all").backward()
        if step < 3:
            optimizer.step()
            optimizer.zero_grad()
    with Count():
        optimizer.step()
    return len(counted)
