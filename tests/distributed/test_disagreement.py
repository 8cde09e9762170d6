"""Ranks that do not do the same: what is right all the same, and what is refused on every one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradsub import GemsOptimizer, NullSpace
from tests.distributed.launch import launch
from tests.distributed.worlds import TASKS, World, batch, build, gradients, result, share


class Uneven(nn.Module):
    """Layers that are alike on some ranks only: of 14, 20 and 13 rows, two ranks have 7 + 7, 10 + 10 and 7 + 6."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(9, rows) for rows in (14, 20, 13))

    def forward(self, x: Tensor) -> Tensor:
        return sum((layer(x).square().mean() for layer in self.layers), x.new_zeros(()))


def uneven(ranks: int, **options: object) -> tuple[nn.Module, GemsOptimizer]:
    model: nn.Module = Uneven().double()
    if ranks > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"rank": 3, "task_rank": 2, "model": model, "refresh": "sketch", "capture": "generic", **options}
    return model, GemsOptimizer(base, tasks=TASKS, **options)


def rows(step: int, task: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + task)
    return torch.randn(8, 9, generator=generator, dtype=torch.float64) * (1 + 3 * task)


def _gates(rank: int, ranks: int) -> list[dict[str, float]]:
    model, optimizer = uneven(ranks)
    for step in range(4):
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                model(rows(step, task).chunk(ranks)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [layer.gates for layer in optimizer.report().layers]


def test_layers_alike_on_some_ranks_keep_their_own_gates(tmp_path: Path) -> None:
    expected = _gates(0, 1)
    for found in launch(_gates, 2, tmp_path, 2):
        assert [pytest.approx(each, rel=1e-6) for each in expected] == found


def _unequal(rank: int, kind: str) -> str:
    model, optimizer = uneven(2)
    name, count = ("rec", 1 + 6 * rank) if kind == "numbers" else (TASKS[rank], 4)
    with optimizer.task(name, samples=count):
        model(rows(0, 0)[:count]).backward()
    with pytest.raises(RuntimeError, match="the same number of samples"):
        optimizer.step()
    return "refused"


@pytest.mark.parametrize("kind", ["numbers", "tasks"])
def test_unequal_samples_are_refused_under_fully_shard(kind: str, tmp_path: Path) -> None:
    assert launch(_unequal, 2, tmp_path, kind) == ["refused", "refused"]


def _kept_back(rank: int) -> str:
    model, optimizer = uneven(2)
    model.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match="set_requires_gradient_sync"), optimizer.task("rec"):
        model(rows(0, 0)).backward()
    return "refused"


def test_gradients_that_fully_shard_keeps_back_are_refused(tmp_path: Path) -> None:
    assert launch(_kept_back, 2, tmp_path) == ["refused", "refused"]


def _sharded_alone(rank: int) -> Tensor:
    groups = [dist.new_group([member]) for member in range(2)]
    model, optimizer = uneven(2, process_group=groups[rank])
    for step in range(2):
        with optimizer.task("rec"):
            model(rows(step, 0).chunk(2)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.state[model.layers[0].weight]["basis"]


def test_a_group_of_one_rank_still_completes_shards(tmp_path: Path) -> None:
    first, second = launch(_sharded_alone, 2, tmp_path)
    assert torch.equal(first, second)


def _two_meshes(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    model = Uneven().double()
    fully_shard(model.layers[0], mesh=mesh["a"])
    fully_shard(model.layers[1], mesh=mesh["b"])
    with pytest.raises(ValueError, match="sharded over other ranks"):
        GemsOptimizer(torch.optim.AdamW(model.parameters()), tasks=TASKS, rank=3, model=model)
    return "refused"


def test_two_meshes_are_refused(tmp_path: Path) -> None:
    assert launch(_two_meshes, 4, tmp_path) == ["refused"] * 4


def _nan_in_one_shard(rank: int) -> int:
    model = nn.Linear(4, 6, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    groups = [{"params": list(model.parameters()), "subspace": False}]
    optimizer = GemsOptimizer(torch.optim.SGD(groups, lr=0.1), tasks=TASKS, rank=2, nonfinite="skip")
    before = model.weight.full_tensor()
    with optimizer.task("rec"):
        output = model(torch.ones(2, 4))
        output.register_hook(lambda g: torch.cat([g[:, :1] * float("nan"), g[:, 1:]], dim=1))
        output.sum().backward()
    with pytest.warns(UserWarning, match="NaN or Inf"):
        optimizer.step()
    return int(torch.equal(before, model.weight.full_tensor()))


def test_nan_in_one_shard_of_a_plain_weight_stops_all(tmp_path: Path) -> None:
    assert launch(_nan_in_one_shard, 2, tmp_path) == [1, 1]


def _clipped(rank: int, ranks: int, first: bool) -> dict[str, float]:
    model, optimizer = build(World(capture="fused", refresh="sketch"), ranks)
    for step in range(2):
        gradients(World(), model, optimizer, step, rank, ranks)
        if first:
            optimizer.reduce()
        norms = optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
    return {name: float(norm) for name, norm in norms.items()}


def test_clipping_after_reduce_is_clipping(tmp_path: Path) -> None:
    alone = _clipped(0, 1, False)
    for first in (True, False):
        for found in launch(_clipped, 2, tmp_path / str(first), 2, first):
            assert found == pytest.approx(alone)


def _late(rank: int) -> str:
    model, optimizer = build(World(), 2)
    gradients(World(), model, optimizer, 0, rank, 2)
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="a backward pass after the ranks have summed"):
        model(torch.ones(2, 10).double()).sum().backward()
    return "refused"


def test_a_backward_pass_after_the_sum_is_refused(tmp_path: Path) -> None:
    assert launch(_late, 2, tmp_path) == ["refused", "refused"]


def _scaled(rank: int, ranks: int, scale: float, clip: bool) -> dict[str, Tensor]:
    """Parity of scaled runs: unequal shares of the batch, gradients from outside on one rank only."""
    world = World(base="sgd")
    model, optimizer = build(world, ranks)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
    for step in range(4):
        for task, name in enumerate(TASKS):
            x, target = batch(step, task)
            rows = share(step, task, rank, ranks, idle=False)
            if rows.start < rows.stop:
                with optimizer.task(name, samples=rows.stop - rows.start):
                    scaler.scale((model(x[rows]) - target[rows]).square().mean()).backward()
        scaler.scale(torch.zeros(()))
        if rank == ranks - 1:
            scaler.scale(ranks * model.norm.weight.sum()).backward()  # the average over the ranks is the sum
        if clip:
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(0.3)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return result(model, optimizer)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("scale", [1024.0, 3.7])
def test_a_scaled_run_on_several_ranks_is_the_unscaled_one(tmp_path: Path, scale: float, clip: bool) -> None:
    # Clipped: several ranks know the norm in the shared subspace, where one knows that of the whole gradient.
    expected = launch(_scaled, 2, tmp_path / "unscaled", 2, 1.0, clip)[0] if clip else _scaled(0, 1, 1.0, clip)
    for found in launch(_scaled, 2, tmp_path / "scaled", 2, scale, clip):
        assert all(torch.allclose(found[name], value, rtol=1e-6, atol=1e-8) for name, value in expected.items())


def _bucket_views(rank: int, views: bool) -> dict[str, Tensor]:
    model, _ = build(World(), 2)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=views)
    optimizer = GemsOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, rank=3, model=wrapped)
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(rank)).double()
    wrapped(x).square().mean().backward()
    loss = (wrapped(x) - 1).square().mean()
    with optimizer.task("rec"):
        loss.backward()
    optimizer.step()
    return result(model, optimizer)


@pytest.mark.filterwarnings("ignore:something other than autograd")
def test_gradients_set_aside_survive_a_reducer(tmp_path: Path) -> None:
    with_views, without = (launch(_bucket_views, 2, tmp_path / str(views), views)[0] for views in (True, False))
    assert all(torch.allclose(value, without[name]) for name, value in with_views.items())


def _static(rank: int) -> list[str]:
    """Refused before the base optimizer is taken over, or before the first task if it was said later."""
    found = []
    wrapped = DistributedDataParallel(nn.Linear(16, 16), static_graph=True)
    base = torch.optim.AdamW(wrapped.parameters())
    with pytest.raises(ValueError, match="static_graph=False") as caught:
        GemsOptimizer(base, tasks=TASKS, rank=3, model=wrapped)
    found.append(str(caught.value))
    wrapped = DistributedDataParallel(wrapped.module)
    optimizer = GemsOptimizer(base, tasks=TASKS, rank=3, model=wrapped)
    wrapped._set_static_graph()
    with pytest.raises(ValueError, match="static_graph=False") as caught, optimizer.task("rec"):
        pass
    return [*found, str(caught.value)]


def test_a_static_graph_is_refused(tmp_path: Path) -> None:
    (found,) = launch(_static, 1, tmp_path)
    assert len(set(found)) == 1


def _one_fails(rank: int, kind: str) -> str:
    model = nn.Linear(4, 3)
    batches = [torch.ones(2, 4) for _ in range(4)]
    if kind == "nan":
        batches = [batch * (float("nan") if i % 2 else 1.0) for i, batch in enumerate(batches)]
    elif kind == "none":
        batches = batches if rank else []
    elif kind == "fewer":
        batches = batches[: 2 + 2 * rank]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        NullSpace().collect(model, batches)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        ("nan", ["rank 1 could not collect", "hold NaN"]),
        ("none", ["shard=False", "shard=False"]),
        ("fewer", ["the numbers of batches are [2, 4]"] * 2),
    ],
)
def test_collecting_fails_on_all_ranks_or_none(kind: str, messages: list[str], tmp_path: Path) -> None:
    for found, message in zip(launch(_one_fails, 2, tmp_path, kind), messages, strict=True):
        assert message in found


def _plain_state(rank: int, saved: str) -> str:
    model, optimizer = uneven(2)
    optimizer.load_state_dict(torch.load(saved, weights_only=True))
    for task, name in enumerate(TASKS):
        with optimizer.task(name):
            model(rows(3, task).chunk(2)[rank]).backward()
    optimizer.step()
    state = optimizer.state_dict()
    _, alone = uneven(1)
    with pytest.raises(ValueError, match="full_state_dict"):
        alone.load_state_dict(state)
    return "stepped"


def test_whole_states_are_cut_and_parts_are_refused(tmp_path: Path) -> None:
    model, optimizer = uneven(1)
    for task, name in enumerate(TASKS):
        with optimizer.task(name):
            model(rows(0, task)).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    assert launch(_plain_state, 2, tmp_path / "ranks", str(tmp_path / "saved.pt")) == ["stepped", "stepped"]


def test_what_others_write_during_a_task_is_the_tasks_without_ranks() -> None:
    model = nn.Linear(4, 3)
    before = model.bias.detach().clone()
    optimizer = GemsOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), tasks=TASKS, rank=2)
    with optimizer.task("rec"):
        model(torch.ones(2, 4)).sum().backward()
        model.bias.grad = torch.full((3,), 5.0)
    optimizer.step()
    torch.testing.assert_close(model.bias.detach(), before - 2.0 - 5.0)  # beside what the backward pass gave
