"""``python -m benchmarks.null_space.anchor``: what rounding leaves of the protection, with and without the anchor.

Float32 layers are trained for many steps of AdamW with decay and a cosine schedule. K holds .97 of the energy of
general inputs, which have a spectrum that falls off. A row is a width and a learning rate; its numbers, the largest of
the two layers, are relative: the leak to the whole update, the others to the layer's answers to fresh general inputs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradsub import GemsOptimizer, NullSpace

TASKS = ("a", "b")


def general(width: int, rows: int, generator: torch.Generator) -> Tensor:
    """Inputs whose energy falls off with the direction."""
    return torch.randn(rows, width, generator=generator) * torch.arange(1, width + 1) ** -0.75


def measure(width: int, lr: float, steps: int, anchor: bool) -> tuple[float, float, float]:
    """Leak, the part of answers that it changes, and all that training changed of them."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh(), nn.Linear(width, width, bias=False))
    null_space = NullSpace(energy=0.97).collect(model, [general(width, 20 * width, generator)])
    before = [model[place].weight.detach().double() for place in (0, 2)]
    base = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    optimizer = GemsOptimizer(
        base, tasks=TASKS, rank=8, model=model, null_space=null_space, update_proj_gap=200, anchor=anchor
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    wanted = {task: torch.randn(width, width, generator=generator) / width**0.5 for task in TASKS}
    for _ in range(steps):
        for task in TASKS:
            x = torch.randn(16, width, generator=generator)
            with optimizer.task(task, samples=16):
                (model(x) - x @ wanted[task]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    x, found = general(width, 512, generator), []
    for place, start in zip((0, 2), before, strict=True):
        inputs = (x if place == 0 else model[:2](x)).detach().double()
        change, K = model[place].weight.detach().double() - start, null_space.basis(str(place), torch.float64)
        inside, answers = change @ K, torch.linalg.norm(inputs @ start.mT)
        found.append(
            (
                inside.norm() / change.norm(),
                torch.linalg.norm(inputs @ K @ inside.mT) / answers,
                torch.linalg.norm(inputs @ change.mT) / answers,
            )
        )
    leak, rounded, changed = (max(float(value) for value in column) for column in zip(*found, strict=True))
    return leak, rounded, changed


def main(arguments: Sequence[str]) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.null_space.anchor", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-3, 1e-4, 1e-5])
    parser.add_argument("--steps", type=int, default=10_000)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{chosen.steps:,} steps, float32")
    print()
    print("| width | learning rate | anchor | leak, of the update | that, of the answers | all change of the answers |")
    print("|---:|---:|---|---:|---:|---:|")
    for width in chosen.widths:
        for lr in chosen.rates:
            for anchor in (False, True):
                leak, rounded, changed = measure(width, lr, chosen.steps, anchor)
                kept = "kept" if anchor else "none"
                print(f"| {width} | {lr:g} | {kept} | {leak:.1e} | {rounded:.1e} | {changed:.1e} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
