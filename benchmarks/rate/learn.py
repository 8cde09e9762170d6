"""Short trainings at the rates of AdamW, and how large the first steps are in each of them."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import torch

from gradsub import GemsOptimizer, NullSpace

from .world import TASKS, World

METHODS: Final = ("adamw", "gems", "gems, lr_scale", "gems, lr_scale and gradient")
LAST: Final = 5  # steps whose mean loss is compared


def learn(
    world: World, null_space: NullSpace, methods: list[str], rates: list[float], steps: int, measured: int, out: Path
) -> None:
    """Train by each method at each rate, from the same weights on the same batches; a line of JSON a run."""
    factor = factor_of(world, null_space)
    world.reset()
    intact = world.perplexity(1024)
    for rate in rates:
        for method in methods:
            world.reset()
            torch.manual_seed(0)
            options: dict[str, Any] = {} if method == "gems" else {"lr_scale": "adamw"}
            if method.endswith("gradient"):
                options["scale"] = factor
            optimizer = world.adamw(rate) if method == "adamw" else world.gems(rate, null_space, **options)
            start = time.perf_counter()
            losses, sizes = train(world, optimizer, rate, steps, measured)
            if isinstance(optimizer, GemsOptimizer):
                optimizer.close()
            row = {
                "data": Path(world.settings.data.source).name,
                "method": method,
                "rate": rate,
                "scale": options.get("scale", 1.0),
                "loss": {task: [round(each[task], 4) for each in losses] for task in TASKS},
                "last": {task: sum(each[task] for each in losses[-LAST:]) / LAST for task in TASKS},
                "perplexity": [intact, world.perplexity(1024)],
                "sizes": sizes,
                "seconds": time.perf_counter() - start,
            }
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(method, rate, row["last"], row["perplexity"], f"{row['seconds']:.0f} s", flush=True)


def factor_of(world: World, null_space: NullSpace) -> float:
    r"""By how much a null space shortens the first gradient: sum sqrt(mn) ||G|| / sum sqrt(mn) ||P G|| over the layers.

    A step whose entries have one size lr lowers the loss by about lr sqrt(m n) ||G|| to first order; multiplied by this
    factor, one inside the null space does as well.
    """
    world.reset()
    whole = free = 0.0
    for name, gradient in world.gradients(next(world.batches())).items():
        protection = null_space._protection(name)
        inside = gradient @ protection.held.float()
        left = inside if protection.complementary else gradient - inside @ protection.held.float().mT
        whole += gradient.numel() ** 0.5 * float(gradient.norm())
        free += gradient.numel() ** 0.5 * float(left.norm())
    print(f"factor {whole / free:.3f}", flush=True)
    return whole / free


def train(
    world: World, optimizer: torch.optim.Optimizer, rate: float, steps: int, measured: int
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The losses of every step, and of the first few steps their sizes, by the kind of layer."""
    losses = []
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number, batches in zip(range(steps), world.batches(), strict=False):
        looked = number < measured
        if looked:
            gradients = world.gradients(batches)
            before = {name: weight.detach().clone() for name, weight in world.weights.items()}
        losses.append(world.backward(batches, optimizer))
        optimizer.step()
        optimizer.zero_grad()
        if looked:
            for name, weight in world.weights.items():
                change = weight.detach() - before[name]
                kind = found[name.rsplit(".", 1)[-1]]
                kind["rms"].append(float(change.square().mean().sqrt()) / rate)
                kind["decrease"].append(-float((gradients[name] * change).sum()) / rate)
    summary = {
        kind: {
            "rms / rate": math.fsum(held["rms"]) / len(held["rms"]),
            "first-order decrease / rate, a step": math.fsum(held["decrease"]) / measured,
        }
        for kind, held in found.items()
    }
    return losses, summary
