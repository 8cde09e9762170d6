"""Small models, data and loops that the optimizer's tests share."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsub import GemsOptimizer, NullSpace

TASKS = ("search", "rec")
# Small layers are captured generically by default; tests/fused runs tests of this folder with the other one.
CAPTURE = "auto"
SAMPLES = {"search": 24.0, "rec": 8.0}


def mlp(
    widths: tuple[int, ...] = (12, 16, 8),
    *,
    seed: int = 0,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Sequential:
    """Linear layers named "0", "2", ... with tanh in between."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs, bias=bias), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).to(device, dtype)


def noise(*shape: int, key: Iterable[int] = (), like: Tensor | None = None) -> Tensor:
    """Standard normal numbers that depend on nothing but ``key`` and the shape."""
    generator = torch.Generator().manual_seed(sum((i + 1) * 7919**n for n, i in enumerate(key, start=1)) % 2**62)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values.to(torch.float32) if like is None else values.to(like)


def loss_of(model: nn.Module, step: int, task: int, rows: int = 16) -> Tensor:
    """A regression whose target differs from task to task and whose batch differs from step to step."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    x = noise(rows, weights[0].shape[1], key=(step, task), like=weights[0])
    target = noise(weights[0].shape[1], weights[-1].shape[0], key=(99, task), like=weights[0])
    return (model(x) - x @ target).square().mean()


def train(model: nn.Module, optimizer: GemsOptimizer, steps: int, start: int = 0) -> None:
    """One backward pass per task and step; resuming at ``start`` sees the data an uninterrupted run would have."""
    for step in range(start, start + steps):
        for task, name in enumerate(optimizer.tasks):
            with optimizer.task(name, samples=SAMPLES.get(name, 1)):
                loss_of(model, step, task).backward()
        optimizer.step()
        optimizer.zero_grad()


def gems(model: nn.Module, /, **options: Any) -> GemsOptimizer:
    """GemsOptimizer around AdamW unless ``base`` says otherwise, on the model's named layers.

    With a null space, the biases that it does not hold are frozen, as a user would do; or, with ``free=True``, they
    move, of which no warning is wanted.
    """
    free = options.pop("free", False)
    if (null_space := options.get("null_space")) is not None and not free:
        freeze_free_vectors(model, null_space)
    base = options.pop("base", None) or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    options = {"tasks": TASKS, "rank": 4, "update_proj_gap": 3, "model": model, "capture": CAPTURE, **options}
    with warnings.catch_warnings():
        if free:
            warnings.filterwarnings("ignore", "null_space has nothing for")
        return GemsOptimizer(base, **options)


def freeze_free_vectors(model: nn.Module, null_space: NullSpace) -> None:
    """Freeze the vectors that nothing holds in the null space."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.removesuffix(".weight") not in null_space:
            parameter.requires_grad_(False)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    """Bit for bit, NaN included."""
    pairs = list(zip(first, second, strict=True))
    return all(a.dtype == b.dtype and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0)) for a, b in pairs)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested containers, in order."""
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def basis_of(optimizer: GemsOptimizer, parameter: Tensor, subspace: int, widths: tuple[int, ...]) -> Tensor:
    """The basis of the shared subspace (0) or of a task (1, 2, ...), as kept in the optimizer's state."""
    return optimizer.state[parameter]["basis"].split(list(widths), dim=1)[subspace]


def null_space_of(model: nn.Module, side: str = "input", rows: int = 40, rank: int = 3) -> NullSpace:
    """Protects ``rank`` directions in every layer, from inputs of rank 2 (so that deeper layers see low rank too)."""
    first = next(parameter for parameter in model.parameters() if parameter.ndim == 2)
    return NullSpace(side=side, max_rank=rank).collect(model, [protected_inputs(first, rows)])


def protected_inputs(weight: Tensor, rows: int = 40) -> Tensor:
    """General-domain inputs that span two directions."""
    return noise(rows, 2, key=(5,), like=weight) @ noise(2, weight.shape[1], key=(6,), like=weight)


def leak(change: Tensor, protected: Tensor, side: str) -> float:
    """How much of a change of a weight lies in the protected directions: ||dW K|| / ||dW||, or ||K^T dW|| / ||dW||."""
    change, protected = change.double(), protected.to(change.device).double()
    inside = change @ protected if side == "input" else protected.mT @ change
    return float(inside.norm() / change.norm())
