"""The multiple-gradient descent algorithm."""

from torch import Tensor

from ._checks import check_gramian
from ._hull import nearest_to_zero, weights_on_host


def mgda(gramian: Tensor) -> Tensor:
    """The convex combination of the gradients that is shortest: no task gets worse to first order.

        w = argmin |sum_k w_k g_k|²   over w >= 0, sum_k w_k = 1

    The point p = sum_k w_k g_k satisfies <g_k, p> >= |p|² for every task, and p = 0 exactly where no direction improves
    all tasks. Solved exactly by an active-set method (Wolfe 1976), not by the Frank-Wolfe iteration that is often used,
    whose error falls as 1 / iterations. If gradients are linearly dependent the point is unique, but not the weights.

    Short gradients dominate: a task that is almost solved takes almost all the weight. Where this is not wanted,
    normalise the gradients first. Tasks with a zero gradient count as absent, with the weight 0, although zero would be
    the shortest combination; if all gradients are zero, all weights are 1 / K. NaN or Inf anywhere gives NaN weights.
    Waits for the device once (K² numbers go to the host, in float64). Not differentiable.

    Args:
        gramian: G_ij = <g_i, g_j>, shape (K, K), squared unit of the gradients.

    Returns:
        Weights, shape (K,), no unit, non-negative, with sum 1.

    Raises:
        ValueError: ``gramian`` is no real floating-point tensor of shape (K, K) with K >= 1.

    Example:
        >>> import torch
        >>> from gradsub.surgery import mgda
        >>> gradients = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> weights = mgda(gradients @ gradients.T)
        >>> weights
        tensor([0.8000, 0.2000])
        >>> weights @ gradients
        tensor([0.8000, 0.4000])

    References:
        Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", Comptes Rendus
        Mathématique 2012. Sener, Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018, arXiv
        1810.04650. Wolfe, "Finding the nearest point in a polytope", Mathematical Programming 1976.
    """
    check_gramian(gramian)
    return weights_on_host(gramian, nearest_to_zero)
