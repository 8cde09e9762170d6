"""Two ranks train a benchmark model for a few steps, and all that they hand to the all-reduce is counted."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gradsub import GemsOptimizer

from ..training.data import make_batches
from ..training.models import build_model, mean_loss, trained_weights
from ..training.problem import Problem

RANKS = 2


def count(spec: Mapping[str, Any], rank: int, tasks: int) -> dict[str, Any]:
    """Shapes of the trained weights, and bytes a step: of DDP, of GEMS in an ordinary step and in its first."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, args=(folder, dict(spec), rank, tasks), nprocs=RANKS)
        found: dict[str, Any] = torch.load(Path(folder) / "found.pt", weights_only=True)
    return found


def _work(process: int, folder: str, spec: dict[str, Any], rank: int, tasks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=RANKS)
    found: dict[str, Any] = {
        "data_parallel": _data_parallel(spec, rank, tasks),
        "gems": _gems(spec, rank, tasks),
        "shapes": [tuple(weight.shape) for weight in trained_weights(build_model(spec, 0))],
    }
    if process == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


def _problem(rank: int, tasks: int) -> Problem:
    return Problem(tokens=32 * tasks, rank=rank, tasks=tasks, sequence_length=16)


def _data_parallel(spec: dict[str, Any], rank: int, tasks: int) -> int:
    model = build_model(spec, 0)
    wrapped = DistributedDataParallel(model)
    sent = []

    def hook(state, bucket):  # without annotations, which DDP reads
        sent.append(bucket.buffer().nbytes)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    (batch,) = make_batches(_problem(rank, 1), model.config.vocab_size, model.config.is_encoder_decoder)
    mean_loss(wrapped, batch).backward()
    return sum(sent)


def _gems(spec: dict[str, Any], rank: int, tasks: int) -> list[int]:
    model = build_model(spec, 0)
    wrapped = DistributedDataParallel(model)
    problem = _problem(rank, tasks)
    optimizer = GemsOptimizer(
        torch.optim.AdamW(trained_weights(model)),
        tasks=problem.task_names,
        rank=rank,
        update_proj_gap=200,
        model=wrapped,
        refresh="sketch",
        capture="fused",
    )
    batches = make_batches(problem, model.config.vocab_size, model.config.is_encoder_decoder)
    steps = []
    plain = dist.all_reduce
    for _ in range(4):
        for task, batch in zip(problem.task_names, batches, strict=True):
            with optimizer.task(task, samples=1):
                mean_loss(wrapped, batch).backward()
        sent: list[int] = []

        def counted(tensor: Tensor, *arguments: Any, sent: list[int] = sent, **options: Any) -> Any:
            sent.append(tensor.nbytes)
            return plain(tensor, *arguments, **options)

        dist.all_reduce = counted
        optimizer.step()
        dist.all_reduce = plain
        optimizer.zero_grad()
        steps.append(sum(sent))
    return steps
