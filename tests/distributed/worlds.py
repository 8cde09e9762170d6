"""One training, on one process with the whole batch or on several with a part of it each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradsub import GemsOptimizer, NullSpace

TASKS = ("search", "rec")
STEPS = 20


@dataclass(frozen=True)
class World:
    """A configuration of the optimizer and of how the model is run."""

    base: str = "adamw"
    side: str = "input"
    capture: str = "generic"
    refresh: str = "svd"
    ddp: bool = False
    forward: str = "task"  # or "shared": one forward pass, one backward pass a task; "mixed": one of each
    surgery: str = "sum"
    protect: bool = False
    clip: float | None = None
    gate: str = "heuristic"


class Net(nn.Module):
    """Two linear layers, a norm and a bias: decomposed and plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 14)
        self.norm = nn.LayerNorm(14)
        self.second = nn.Linear(14, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


def build_model() -> Net:
    torch.manual_seed(3)
    return Net().double()


def batch(step: int, task: int) -> tuple[Tensor, Tensor]:
    """The whole batch of a step: inputs and targets."""
    generator = torch.Generator().manual_seed(1000 * task + step)
    x = torch.randn(12, 10, generator=generator, dtype=torch.float64)
    maps = torch.Generator().manual_seed(77 + task)
    return x, x @ torch.randn(10, 6, generator=maps, dtype=torch.float64)


def share(step: int, task: int, rank: int, ranks: int, *, idle: bool) -> slice:
    """A rank's rows of the batch: unequal numbers, in some steps none of a task, or (``idle``) none at all."""
    if ranks == 1:
        return slice(0, 12)
    cuts = {2: [0, 5, 12], 4: [0, 2, 3, 8, 12]}[ranks]
    if step % 5 == 3 and task == 1:
        cuts = {2: [0, 12, 12], 4: [0, 4, 4, 12, 12]}[ranks]  # the last rank has nothing of the task
    if step % 5 == 4 and idle:
        cuts = {2: [0, 1, 12], 4: [0, 0, 6, 7, 12]}[ranks]
    return slice(cuts[rank], cuts[rank + 1])


def build(
    world: World, ranks: int, shard: Callable[[Net, int], nn.Module] | None = None, **more: Any
) -> tuple[nn.Module, GemsOptimizer]:
    model: nn.Module = build_model()
    if shard is not None and ranks > 1:
        model = shard(model, ranks)
    null_space = None
    if world.protect:
        null_space = NullSpace(side=world.side, max_rank=3)
        null_space.collect(model, [torch.cat([batch(998, 0)[0], batch(999, 0)[0]])])
        # Vectors are collected from a model that is whole.
        null_space.collect_gradients(build_model(), [batch(999, 0)[0]], lambda model, x: model(x).square().sum())
    wrapped = DistributedDataParallel(model) if world.ddp and ranks > 1 else model
    kinds = {
        "adamw": lambda: torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1),
        "sgd": lambda: torch.optim.SGD(wrapped.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1),
    }
    optimizer = GemsOptimizer(
        kinds[world.base](),
        tasks=TASKS,
        rank=3,
        task_rank=2,
        update_proj_gap=8,
        side=world.side,
        gate=world.gate,
        null_space=null_space,
        model=wrapped,
        surgery=world.surgery,
        capture=world.capture,
        refresh=world.refresh,
        **more,
    )
    return wrapped, optimizer


def gradients(world: World, model: nn.Module, optimizer: GemsOptimizer, step: int, rank: int, ranks: int) -> None:
    """The backward passes of a step, of this rank's rows."""
    parts = {}
    for task, name in enumerate(TASKS):
        # DDP's own reducer, at work after a forward pass outside of tasks, wants every rank to take part.
        rows = share(step, task, rank, ranks, idle=not (world.ddp and world.forward == "shared"))
        x, target = (tensor[rows] for tensor in batch(step, task))
        if len(x):
            parts[name] = x, target
    if world.forward == "task":
        for name, (x, target) in parts.items():
            with optimizer.task(name, samples=len(x)):
                (model(x) - target).square().mean().backward()
    elif world.forward == "shared" and parts:
        outputs = model(torch.cat([x for x, _ in parts.values()]))
        split = torch.split(outputs, [len(x) for x, _ in parts.values()])
        losses = {
            name: (output - target).square().mean()
            for output, (name, (_, target)) in zip(split, parts.items(), strict=True)
        }
        optimizer.backward(losses, samples={name: len(x) for name, (x, _) in parts.items()})
    elif parts:
        ids = [name for name, (x, _) in parts.items() for _ in x]
        with optimizer.mixed(ids) as rows:
            outputs = model(torch.cat([x for x, _ in parts.values()]))
            targets = torch.cat([target for _, target in parts.values()])
            rows.loss((outputs - targets).square().mean(1)).backward()


def step_once(world: World, model: nn.Module, optimizer: GemsOptimizer, step: int, rank: int, ranks: int) -> None:
    gradients(world, model, optimizer, step, rank, ranks)
    if world.clip is not None:
        optimizer.clip_grad_norm_(world.clip)
    optimizer.step()
    optimizer.zero_grad()


def trained(world: World, rank: int = 0, ranks: int = 1, steps: int = STEPS) -> dict[str, Tensor]:
    """Weights and bases after the training."""
    model, optimizer = build(world, ranks)
    for step in range(steps):
        step_once(world, model, optimizer, step, rank, ranks)
    return result(model, optimizer)


def result(model: nn.Module, optimizer: GemsOptimizer) -> dict[str, Tensor]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    found = {name: parameter.detach().clone() for name, parameter in inner.named_parameters()}
    for name, parameter in inner.named_parameters():
        if "basis" in optimizer.state.get(parameter, {}):
            found[f"{name}.basis"] = optimizer.state[parameter]["basis"].clone()
    return found
