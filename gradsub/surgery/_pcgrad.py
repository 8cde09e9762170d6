"""Projecting conflicting gradients."""

import torch
from torch import Tensor

from ._checks import check_gramian
from ._cosines import cosines, visiting_order, weights_of


def pcgrad(gramian: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Every task drops what points against another task; the weights of the sum of the changed gradients.

    Task i starts from g'_i = g_i and meets the other tasks j one by one. Where <g'_i, g_j> < 0,

        g'_i <- g'_i - <g'_i, g_j> / |g_j|² g_j

    and the common gradient is sum_i g'_i. After two tasks have met, neither changed gradient opposes the other's
    original; with more tasks a later meeting can bring an earlier conflict back.

    All tasks move at once, in K - 1 steps on the Gramian's device, and nothing waits for it. A zero gradient gets the
    weight 1. NaN or Inf anywhere gives NaN weights. Not differentiable.

    Args:
        gramian: G_ij = <g_i, g_j>, shape (K, K), squared unit of the gradients.
        generator: Source of each task's order of meetings; it matters from three tasks on. A generator on the CPU costs
            a small copy to the device, one there none. None: the cyclic order i + 1, i + 2, ... at every call, which
            needs no random numbers but favours the neighbour; the paper draws a new order at every step.

    Returns:
        Weights, shape (K,), no unit, at least 1.

    Raises:
        ValueError: ``gramian`` is no real floating-point tensor of shape (K, K) with K >= 1.

    Example:
        >>> import torch
        >>> from gradsub.surgery import pcgrad
        >>> gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> weights = pcgrad(gradients @ gradients.T)
        >>> weights
        tensor([2.0000, 1.5000])
        >>> weights @ gradients
        tensor([0.5000, 1.5000])

    References:
        Yu, Kumar, Gupta, Levine, Hausman, Finn, "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv
        2001.06782, Algorithm 1.
    """
    check_gramian(gramian)
    return _pcgrad_in_order(gramian, visiting_order(gramian.shape[0], generator, gramian.device))


def _pcgrad_in_order(gramian: Tensor, order: Tensor) -> Tensor:
    """`pcgrad` with the meetings given: ``order`` (K, K - 1), row i a permutation of the tasks other than i."""
    split = cosines(gramian)
    R = split.values
    # Row i: the coefficients of g'_i / |g_i| in the unit gradients.
    C = torch.eye(R.shape[0], dtype=R.dtype, device=R.device)
    for met in order.unbind(1):
        inner = (C * R[met]).sum(1)
        C = C.scatter_add(1, met[:, None], -inner.clamp(max=0)[:, None])
    return weights_of(C, split, gramian)
