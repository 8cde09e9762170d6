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

from gradsub import GemsOptimizer, NullSpace

from ..training.data import Batch, make_batches
from ..training.models import build_model, mean_loss, trained_weights
from ..training.problem import Problem
from ..training.protection import fit

RANKS = 2
NULL_SPACE = "null.safetensors"


def count(spec: Mapping[str, Any], rank: int, tasks: int) -> dict[str, Any]:
    """Shapes of the trained weights, and bytes a step: of DDP, of GEMS in its first four (also with a null space)."""
    model = build_model(spec, 0)
    with tempfile.TemporaryDirectory() as folder:
        null_space, _ = fit(model, _batches(model, _problem(rank, tasks))[0].inputs, "input", seed=0)
        null_space.save(Path(folder) / NULL_SPACE, statistics=False)
        mp.spawn(_work, args=(folder, dict(spec), rank, tasks), nprocs=RANKS)  # type: ignore[attr-defined]
        found: dict[str, Any] = torch.load(Path(folder) / "found.pt", weights_only=True)
    return found


def _work(process: int, folder: str, spec: dict[str, Any], rank: int, tasks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=RANKS)
    found: dict[str, Any] = {
        "data_parallel": _data_parallel(spec, rank, tasks),
        "gems": _gems(spec, rank, tasks),
        "gems_null": _gems(spec, rank, tasks, NullSpace.load(Path(folder) / NULL_SPACE)),
        "shapes": [tuple(weight.shape) for weight in trained_weights(build_model(spec, 0))],
    }
    if process == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


def _problem(rank: int, tasks: int) -> Problem:
    return Problem(tokens=32 * tasks, rank=rank, tasks=tasks, sequence_length=16)


def _batches(model: Any, problem: Problem) -> list[Batch]:
    return make_batches(problem, model.config.vocab_size, model.config.is_encoder_decoder)


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
    (batch,) = _batches(model, _problem(rank, 1))
    mean_loss(wrapped, batch).backward()
    return sum(sent)


def _gems(spec: dict[str, Any], rank: int, tasks: int, null_space: NullSpace | None = None) -> list[int]:
    model = build_model(spec, 0)
    wrapped = DistributedDataParallel(model)
    problem = _problem(rank, tasks)
    batches = _batches(model, problem)
    optimizer = GemsOptimizer(
        torch.optim.AdamW(trained_weights(model)),
        tasks=problem.task_names,
        rank=rank,
        update_proj_gap=200,
        model=wrapped,
        refresh="sketch",
        capture="fused",
        null_space=null_space,
    )
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
