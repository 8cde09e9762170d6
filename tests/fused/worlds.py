"""Models, batches and loops that the tests of the fused capture share."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from gradsub import GemsOptimizer, NullSpace

TASKS = ("a", "b", "c")
LENGTH = 3


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is in_features x out_features."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(-1, x.shape[-1]) @ self.weight + self.bias).view(*x.shape[:-1], self.nf)


def model_of(
    widths: tuple[int, ...], *, transposed: bool = False, bias: bool = True, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs, bias=bias), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).to(dtype)


def batch_of(model: nn.Module, step: int, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
    """(rows x LENGTH x features) for every task, of different sizes."""
    weight = model[0].weight
    features = weight.shape[0] if isinstance(model[0], Conv1D) else weight.shape[1]
    generator = torch.Generator().manual_seed(step)
    return {
        task: torch.randn(2 + 2 * k, LENGTH, features, generator=generator, dtype=torch.float64).to(weight)
        for k, task in enumerate(tasks)
    }


def losses_of(task: str, output: Tensor) -> Tensor:
    """One loss a row; the tasks want different things."""
    k = TASKS.index(task)
    return (output - 0.3 * k).square().mean((1, 2)) + k * output[..., 0].mean(1).abs()


def gems(model: nn.Module, **options: Any) -> GemsOptimizer:
    base = options.pop("base", None) or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    options = {"tasks": TASKS, "rank": 4, "update_proj_gap": 5, "model": model, "capture": "fused", **options}
    return GemsOptimizer(base, **options)


def train(model: nn.Module, optimizer: GemsOptimizer, steps: int, *, start: int = 0, forward: str = "inside") -> None:
    """A pass a task; ``forward``: inside the task, outside of it, or of a mixed batch in either place."""
    call = optimizer.__dict__.get("calls", model)
    for step in range(start, start + steps):
        batch = batch_of(model, step, optimizer.tasks)
        if forward.startswith("mixed"):
            _mixed_backward(call, optimizer, batch, step, late=forward == "mixed outside")
        else:
            for task, x in batch.items():
                if forward == "outside":
                    loss = losses_of(task, call(x)).mean()
                with optimizer.task(task, samples=len(x)):
                    if forward == "inside":
                        loss = losses_of(task, call(x)).mean()
                    loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _mixed_backward(call: Any, optimizer: GemsOptimizer, batch: dict[str, Tensor], step: int, late: bool) -> None:
    ids = [task for task, x in batch.items() for _ in range(len(x))]
    # Every other step the rows of a task are neighbours.
    order = torch.arange(len(ids)) if step % 2 else torch.randperm(len(ids), generator=torch.Generator().manual_seed(9))
    x, ids = torch.cat(list(batch.values()))[order], [ids[i] for i in order]
    output = call(x) if late else None
    other_rows = optimizer.__dict__.get("other_rows", lambda ids: ())
    with optimizer.mixed(ids, other_rows=other_rows(ids)) as rows:
        output = call(x) if output is None else output
        losses = torch.cat([losses_of(task, output[i : i + 1]) for i, task in enumerate(ids)])
        rows.loss(losses).backward()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def null_space_of(model: nn.Module, side: str) -> NullSpace:
    return NullSpace(side=side, max_rank=3).collect(model, list(batch_of(model, 999).values()))
