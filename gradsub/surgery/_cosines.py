"""The Gramian as norms and cosines, and the order in which a task visits the others."""

from typing import NamedTuple

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import widen


class Cosines(NamedTuple):
    """G = diag(n) R diag(n): tasks whose norms differ by 10^20 are told apart, which no common factor achieves.

    Attributes:
        norms: (K,) the gradients' norms n, in their own unit; 1 at absent tasks.
        values: (K, K) the cosines R; 0 in the rows and columns of absent tasks.
        present: (K,) booleans, False at zero gradients.
    """

    norms: Tensor
    values: Tensor
    present: Tensor


def cosines(gramian: Tensor) -> Cosines:
    """Split a Gramian without waiting for the device; NaN and Inf end up as NaN in ``values``."""
    G = widen(gramian)
    squares = G.diagonal()
    # Not `squares > 0`: NaN must count as present, or its task would silently drop out.
    present = ~torch.le(squares, 0)
    norms = squares.where(present, 1.0).sqrt()
    # One division after the other: the product of two norms can leave the range of float32.
    R = (G / norms[:, None] / norms).where(present[:, None] & present, 0.0)
    return Cosines(norms, R, present)


def weights_of(coefficients: Tensor, split: Cosines, like: Tensor) -> Tensor:
    """Weights (K,) of the sum of the K changed gradients, given in unit gradients: g'_i = n_i sum_j C_ij g_j / n_j.

    NaN everywhere if the Gramian was not finite: comparisons with NaN are False, so a method skips it unnoticed.
    """
    weights = (coefficients * (split.norms[:, None] / split.norms)).sum(0)
    return (weights + 0.0 * split.values.sum()).to(like.dtype)


def visiting_order(tasks: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Row i (of K): the K - 1 other tasks in the order in which task i meets them; i + 1, i + 2, ... without generator.

    The numbers are drawn on the generator's device, one permutation of all K tasks after the other with the own index
    dropped: the order of TorchJD's PCGrad under the same seed.
    """
    if generator is None or tasks <= 2:
        own = torch.arange(tasks, device=device)[:, None]
        return (own + torch.arange(1, tasks, device=device)) % tasks
    drawn = [torch.randperm(tasks, generator=generator, device=generator.device) for _ in range(tasks)]
    permutations = torch.stack(drawn)
    own = torch.arange(tasks, device=generator.device)[:, None]
    # A stable sort moves the own index to the end; a mask would wait for the device.
    own_last = torch.eq(permutations, own).to(torch.uint8).argsort(dim=1, stable=True)
    return permutations.gather(1, own_last)[:, :-1].to(device, non_blocking=True)
