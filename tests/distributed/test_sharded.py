"""Weights sharded by `fully_shard`: every rank steps its own rows, and the model trains as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from gradsub import GemsOptimizer
from tests.distributed.launch import launch
from tests.distributed.worlds import TASKS, Net, World, batch, build

WORLDS = [
    World(refresh="sketch"),
    World(refresh="sketch", base="sgd"),
    World(refresh="sketch", side="output"),
    World(refresh="sketch", protect=True),
    World(refresh="sketch", protect=True, side="output"),
    World(refresh="sketch", surgery="pcgrad", gate="hypergradient", clip=0.3),
    World(refresh="sketch", surgery="pcgrad", gate="hypergradient", side="output", clip=0.3),
]


def sharded(model: Net, ranks: int) -> nn.Module:
    """With the model's parameters spread over all ranks; on four of them two copies of two shards (HSDP)."""
    shape, names = ((2, 2), ("copy", "shard")) if ranks == 4 else ((ranks,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for module in (model.first, model.second):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(world: World, model: nn.Module, optimizer: GemsOptimizer, rank: int, ranks: int, steps: range) -> None:
    for step in steps:
        for task, name in enumerate(TASKS):
            # fully_shard averages the ranks' gradients, so all have as many rows
            x, target = (tensor.chunk(ranks)[rank] for tensor in batch(step, task))
            with optimizer.task(name, samples=len(x)):
                (model(x) - target).square().mean().backward()
        if world.clip is not None:
            optimizer.clip_grad_norm_(world.clip)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.full_tensor().detach() if isinstance(p, DTensor) else p.detach().clone()
        for name, p in model.named_parameters()
    }


def _trained(rank: int, ranks: int) -> list[dict[str, Tensor]]:
    found = []
    for world in WORLDS:
        model, optimizer = build(world, ranks, sharded)
        train(world, model, optimizer, rank, ranks, range(20))
        found.append(weights(model))
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sharded_training_is_that_of_one_process(ranks: int, tmp_path: Path) -> None:
    found = launch(_trained, ranks, tmp_path, ranks)
    for world, expected, *of_ranks in zip(WORLDS, _trained(0, 1), *found, strict=True):
        for name, value in expected.items():
            assert torch.allclose(of_ranks[0][name], value, rtol=0, atol=1e-8), (world, name)


def _sent_and_held(rank: int) -> tuple[int, list[tuple[int, ...]]]:
    """The largest tensor that the optimizer sends in a step with a refresh, and the shapes of its state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = GemsOptimizer(torch.optim.AdamW(model.parameters()), tasks=TASKS, rank=3, model=model)
    sent = []
    plain = dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return plain(tensor, *arguments, **options)

    with optimizer.task("rec"):
        model(torch.randn(4, 200)).square().mean().backward()
    dist.all_reduce = counted
    optimizer.step()
    dist.all_reduce = plain
    shapes = [tuple(value.shape) for value in optimizer.state[next(model.parameters())].values()]
    return max(sent), shapes


def test_no_rank_holds_or_sends_anything_of_the_weights_size(tmp_path: Path) -> None:
    for sent, shapes in launch(_sent_and_held, 2, tmp_path):
        # a sketch (200 x 67); its norm, in float64, goes alone
        assert sent == 200 * (3 + 64)
        assert {shape for shape in shapes if 300 in shape} == set()
        assert (150, 3) in shapes


def _refused(rank: int) -> str:
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    options = {"tasks": TASKS, "rank": 2, "model": model}
    with pytest.raises(ValueError, match="looks at whole matrices, but 0 is sharded"):
        GemsOptimizer(torch.optim.Adafactor(model.parameters()), **options)
    with pytest.raises(ValueError, match="no rank has one"):
        GemsOptimizer(torch.optim.AdamW(model.parameters()), refresh="svd", **options)
    by_column = nn.Sequential(nn.Linear(8, 6, bias=False))
    fully_shard(by_column, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda parameter: Shard(1))
    with pytest.raises(ValueError, match="subspace=False"):
        GemsOptimizer(torch.optim.AdamW(by_column.parameters()), tasks=TASKS, rank=2, model=by_column)
    return "refused"


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    assert launch(_refused, 2, tmp_path) == ["refused", "refused"]


def _saved(rank: int, ranks: int, folder: str, world: World) -> dict[str, Tensor]:
    model, optimizer = build(world, ranks, sharded)
    train(world, model, optimizer, rank, ranks, range(10))
    weights_now, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights_now, "optimizer": state}, checkpoint_id=folder)
    train(world, model, optimizer, rank, ranks, range(10, 20))
    return weights(model)


def _resumed(rank: int, ranks: int, folder: str, world: World) -> dict[str, Tensor]:
    model, optimizer = build(world, ranks, sharded)
    weights_now, state = get_state_dict(model, optimizer)
    read = {"model": weights_now, "optimizer": state}
    dcp.load(read, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=read["model"], optim_state_dict=read["optimizer"])
    train(world, model, optimizer, rank, ranks, range(10, 20))
    return weights(model)


@pytest.mark.parametrize(
    "world",
    [
        World(refresh="sketch", protect=True, gate="hypergradient"),
        World(refresh="sketch", protect=True, side="output", base="sgd"),
    ],
    ids=["input", "output"],
)
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_four(world: World, tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "checkpoint")
    expected = launch(_saved, 2, tmp_path / "two", 2, checkpoint, world)[0]
    for ranks in (1, 2, 4):
        found = launch(_resumed, ranks, tmp_path / f"resumed-{ranks}", ranks, checkpoint, world)
        for name, value in expected.items():
            assert torch.allclose(found[0][name], value, rtol=0, atol=1e-8), (ranks, name)


def _scaled(rank: int, ranks: int, scale: float) -> tuple[dict[str, Tensor], list[float]]:
    """Sharded weights under a scaler, with a step that has Inf on one rank's rows, and gradients from outside."""
    model, optimizer = build(World(refresh="sketch", base="sgd"), ranks, sharded)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
    scales = []
    for step in range(4):
        if step == 2 and scale == 1.0:
            continue
        for task, name in enumerate(TASKS):
            x, target = (tensor.chunk(ranks)[rank] for tensor in batch(step, task))
            factor = float("inf") if step == 2 and rank == 1 and task == 0 else 1.0
            with optimizer.task(name, samples=len(x)):
                scaler.scale((model(x * factor) - target).square().mean()).backward()
        if step == 1:
            scaler.scale(model(torch.ones(3, 10).double()).square().mean()).backward()
        scaler.unscale_(optimizer)
        optimizer.clip_grad_norm_(0.3)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return weights(model), scales


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_scaled_run_of_sharded_weights(tmp_path: Path, ranks: int) -> None:
    expected, _ = _scaled(0, 1, 1.0)
    for found, scales in launch(_scaled, ranks, tmp_path, ranks, 1000.0):
        assert scales == [1000.0, 1000.0, 500.0, 500.0]
        assert all(torch.allclose(found[name], value, rtol=1e-6, atol=1e-7) for name, value in expected.items())
