"""What holds on several ranks beside parity: agreement, refusals, silence of other reducers, failure."""

from __future__ import annotations

import copy
import os
import pickle
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from gradsub import GemsOptimizer, NonFiniteError
from tests.distributed.launch import launch, try_launch
from tests.distributed.worlds import TASKS, World, build, build_model, gradients, result, step_once


def test_different_weights_are_refused(tmp_path: Path) -> None:
    assert launch(_different_weights, 2, tmp_path) == ["refused", "refused"]


def _different_weights(rank: int) -> str:
    model, optimizer = build(World(), 2)
    with torch.no_grad():
        model.second.weight[0, 0] += rank
    with pytest.raises(RuntimeError, match=r"different weights \(second\.weight\)"):
        step_once(World(), model, optimizer, 0, rank, 2)
    return "refused"


@pytest.mark.parametrize("rule", ["raise", "skip"])
def test_nan_on_one_rank_stops_all(rule: str, tmp_path: Path) -> None:
    assert launch(_nan_on_one, 2, tmp_path, rule) == ["unchanged", "unchanged"]


def _nan_on_one(rank: int, rule: str) -> str:
    model, optimizer = build(World(), 2, nonfinite=rule)
    step_once(World(), model, optimizer, 0, rank, 2)
    before = result(model, optimizer)
    with optimizer.task("rec"):
        (model(torch.ones(2, 10).double()).sum() * (float("nan") if rank else 1.0)).backward()
    if rule == "raise":
        with pytest.raises(NonFiniteError, match="rec"):
            optimizer.step()
    else:
        with pytest.warns(UserWarning, match="rec"):
            optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(value, before[name]) for name, value in result(model, optimizer).items())
    step_once(World(), model, optimizer, 1, rank, 2)
    return "unchanged"


def test_a_group_of_one_rank_is_alone(tmp_path: Path) -> None:
    first, second = launch(_alone, 2, tmp_path)
    assert not torch.equal(first["second.weight"], second["second.weight"])


def _alone(rank: int) -> dict[str, Tensor]:
    groups = [dist.new_group([member]) for member in range(2)]
    model, optimizer = build(World(), 2, process_group=groups[rank])
    for step in range(3):
        step_once(World(), model, optimizer, step, rank, 2)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(optimizer)
    return result(model, optimizer)


def test_gradients_from_outside_tasks_are_averaged(tmp_path: Path) -> None:
    bare = launch(_outside, 2, tmp_path / "bare")[0]
    wrapped = launch(_outside, 2, tmp_path / "ddp", True)[0]
    alone = _outside(0, ranks=1)
    for name, value in alone.items():
        if not name.endswith("basis"):
            assert torch.allclose(bare[name], value, atol=1e-9)
            assert torch.allclose(wrapped[name], value, atol=1e-9)


def _outside(rank: int, ddp: bool = False, ranks: int = 2) -> dict[str, Tensor]:
    world = World(ddp=ddp)
    model, optimizer = build(world, ranks)
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for step in range(4):
        gradients(world, model, optimizer, step, rank, ranks)
        model(x.chunk(ranks)[rank] + step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(model, optimizer)


def test_a_wrapped_model_sends_nothing_itself(tmp_path: Path) -> None:
    for inside, around, warned in launch(_ddp_traffic, 2, tmp_path):
        assert inside == 0
        assert around > 0
        assert warned == 1


def _ddp_traffic(rank: int) -> tuple[int, int, int]:
    """Buckets that DDP's own reducer sends: with the forward pass inside of tasks, and outside; and warnings."""
    counts = []
    for forward in ("task", "shared"):
        world = World(ddp=True, forward=forward, capture="fused", refresh="sketch")
        model, optimizer = build(world, 2)
        sent = []

        def hook(state, bucket, sent=sent):
            sent.append(bucket.buffer().numel())
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, hook)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(3):
                step_once(world, model, optimizer, step, rank, 2)
        counts.append(len(sent))
        assert all(parameter.grad is None for parameter in model.parameters())
    return counts[0], counts[1], sum("travel for nothing" in str(each.message) for each in caught)


def test_a_task_after_the_sum_is_refused(tmp_path: Path) -> None:
    assert launch(_late_task, 2, tmp_path) == ["refused", "refused"]


def _late_task(rank: int) -> str:
    model, optimizer = build(World(), 2)
    gradients(World(), model, optimizer, 0, rank, 2)
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="after the ranks have summed"), optimizer.task("rec"):
        pass
    optimizer.step()
    gradients(World(), model, optimizer, 1, rank, 2)
    optimizer.step()
    return "refused"


@pytest.mark.parametrize("how", ["step", "unscale_", "reduce"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_scaler_sees_the_same_on_every_rank(tmp_path: Path, how: str, sharded: bool) -> None:
    assert launch(_scaler, 2, tmp_path, how, sharded) == [[65536.0, 32768.0, 32768.0]] * 2


def _scaler(rank: int, how: str, sharded: bool) -> list[float]:
    """The loss scale after a good step, one with Inf on one rank, and one where that rank has no task at all."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    optimizer = GemsOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, rank=2)
    scaler = (ShardedGradScaler if sharded else torch.amp.GradScaler)("cpu", init_scale=65536.0)
    scaler.scale(torch.zeros(()))  # or a rank that has no loss had no scale
    scales = []
    for step in range(3):
        if step < 2 or rank == 0:
            with optimizer.task("rec"):
                factor = float("inf") if step == 1 and rank == 1 else 1.0
                scaler.scale(model(torch.ones(2, 6) * factor).sum()).backward()
        if how == "reduce":
            optimizer.reduce()
        elif how == "unscale_":
            scaler.unscale_(optimizer)
        before = model.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model.weight) == (step == 1)
        scales.append(scaler.get_scale())
    return scales


def test_copies_and_pickles_keep_working(tmp_path: Path) -> None:
    assert launch(_copies, 2, tmp_path) == ["same", "same"]


def _copies(rank: int) -> str:
    model, optimizer = build(World(), 2)
    step_once(World(), model, optimizer, 0, rank, 2)
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for step in (1, 2):
        step_once(World(), model, optimizer, step, rank, 2)
        for other in pairs:
            step_once(World(), *other, step, rank, 2)
    expected = result(model, optimizer)
    for other in pairs:
        assert all(torch.equal(value, expected[name]) for name, value in result(*other).items())
    return "same"


def test_arguments_are_checked() -> None:
    model = build_model()
    with pytest.raises(TypeError, match="process_group must be"):
        GemsOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), process_group="world")


def test_a_dead_rank_is_an_error_on_the_others_and_the_checkpoint_stays(tmp_path: Path) -> None:
    start = time.monotonic()
    outcomes = try_launch(_one_dies, 3, tmp_path, str(tmp_path / "checkpoint.pt"), timeout=20.0)
    assert time.monotonic() - start < 60
    assert outcomes[2] == ("died", 17)
    for kind, text in outcomes[:2]:
        assert kind == "raised"
        assert "RuntimeError" in text or "DistBackendError" in text or "DistNetworkError" in text
    model = build_model()
    optimizer = GemsOptimizer(
        torch.optim.AdamW(model.parameters()), tasks=TASKS, rank=3, task_rank=2, update_proj_gap=8, model=model
    )
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert int(optimizer.state[model.first.weight]["step"]) == 2


def _one_dies(rank: int, checkpoint: str) -> None:
    world = World()
    model, optimizer = build(world, 4)
    for step in range(4):
        if step == 2 and rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
        if step == 3 and rank == 2:
            os._exit(17)
        step_once(world, model, optimizer, step, rank, 4)
