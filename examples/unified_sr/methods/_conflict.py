"""How far the tasks' gradients agree: their inner products, weight by weight, and the cosines that follow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]
"""One task's gradients, one a weight; ``None`` where the task does not reach the weight."""


def gramians(tasks: Sequence[Gradients]) -> Tensor:
    """Return (W, K, K): for each weight the inner products of the K tasks' gradients.

    Args:
        tasks: K times the gradients of the same W weights.

    Example:
        >>> gramians([[torch.tensor([1.0, 2.0])], [torch.tensor([0.0, -1.0])]])
        tensor([[[ 5., -2.],
                 [-2.,  1.]]])
    """
    return torch.stack([_gramian(found) for found in zip(*tasks, strict=True)])


def cosines(gramian: Tensor, tasks: Sequence[str]) -> dict[str, float]:
    """Return ``"a|b"`` -> cosine, without the pairs of which one gradient is zero.

    Args:
        gramian: (K, K) inner products.
        tasks: K names.

    Example:
        >>> cosines(torch.tensor([[4.0, -3.0], [-3.0, 9.0]]), ("rec", "search"))
        {'rec|search': -0.5}
    """
    rows: list[list[float]] = gramian.tolist()
    return {
        f"{tasks[a]}|{tasks[b]}": rows[a][b] / math.sqrt(rows[a][a]) / math.sqrt(rows[b][b])
        for a, b in itertools.combinations(range(len(tasks)), 2)
        if rows[a][a] > 0 and rows[b][b] > 0
    }


def mean_cosines(each: Tensor, tasks: Sequence[str]) -> dict[str, float]:
    """Return ``"a|b"`` -> mean over the weights of the cosine in each of them.

    A weight counts where both gradients are more than rounding: a millionth of the task's gradient of all weights. The
    first token of a decoder attends to itself alone, so what its queries and keys receive is rounding and no conflict.

    Args:
        each: (W, K, K) inner products.
        tasks: K names.
    """
    squares = each.diagonal(dim1=1, dim2=2)
    counts = squares > 1e-12 * squares.sum(dim=0)
    return mean_values(cosines(one * (use[:, None] & use), tasks) for one, use in zip(each, counts, strict=True))


def mean_values(mappings: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each key over the mappings that have a finite value for it."""
    gathered: dict[str, list[float]] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            if math.isfinite(value):
                gathered.setdefault(key, []).append(float(value))
    return {key: math.fsum(found) / len(found) for key, found in gathered.items()}


def _gramian(gradients: Gradients) -> Tensor:
    like = next((gradient for gradient in gradients if gradient is not None), torch.zeros(()))
    found = like.new_zeros(len(gradients), len(gradients), dtype=torch.float32)
    for i, a in enumerate(gradients):
        for j, b in enumerate(gradients[: i + 1]):
            if a is not None and b is not None:
                found[i, j] = found[j, i] = torch.dot(a.flatten(), b.flatten())
    return found
