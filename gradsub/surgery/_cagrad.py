"""Conflict-averse gradient descent."""

import math

import numpy as np
from torch import Tensor

from ._checks import check_gramian, check_interval
from ._hull import Array, nearest_to_zero, weights_on_host


def cagrad(gramian: Tensor, *, c: float = 0.5, norm_eps: float = 1e-4) -> Tensor:
    """The direction near the mean gradient that helps the worst-served task most.

    With the mean gradient g_0 = 1/K sum_k g_k, the common gradient d solves

        max_d min_k <g_k, d>   subject to |d - g_0| <= c |g_0|

    By duality d = g_0 + c |g_0| g_w / |g_w|, where g_w = sum_k w_k g_k and w minimises <g_w, g_0> + c |g_0| |g_w| over
    the simplex. With c = 0 this is the mean; for c < 1 the mean loss still falls at every sufficiently small step.

    The dual is solved to working precision: its optimality condition says that d = p / τ, where p is the point of the
    convex hull of g_k + τ g_0 nearest to zero and τ = |g_w| / (c |g_0|), so one active-set solver and a search for the
    number τ suffice. Where |g_w| is negligible no direction in the ball helps the worst task, and d = 0, as in TorchJD.

    Tasks with a zero gradient count as absent: K is the number of the others, their own weight is 0. If all gradients
    are zero, or their mean is, all weights are 1 / K. NaN or Inf anywhere gives NaN weights. Waits for the device once
    (K² numbers go to the host, in float64). Not differentiable.

    Args:
        gramian: G_ij = <g_i, g_j>, shape (K, K), squared unit of the gradients.
        c: Radius of the ball around the mean gradient, in units of |g_0|, >= 0; the convergence proof needs c < 1.
        norm_eps: Length |g_w| up to which the weights are 0, in units of sum_k w_k |g_k|, so that it measures how far
            the gradients cancel. (TorchJD takes the unit (sum_k |g_k|²)^(1/2), and with it gives 0 wherever one task's
            gradient is 10⁴ times shorter than the others.)

    Returns:
        Weights, shape (K,), no unit, non-negative.

    Raises:
        ValueError: ``gramian`` is no real floating-point tensor of shape (K, K) with K >= 1, or ``c`` or ``norm_eps``
            is negative.

    Example:
        >>> import torch
        >>> from gradsub.surgery import cagrad
        >>> gradients = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
        >>> weights = cagrad(gradients @ gradients.T, c=0.5)
        >>> weights
        tensor([1.0000, 0.5000])
        >>> weights @ gradients
        tensor([-0.5000,  0.0000])

    References:
        Liu, Liu, Jin, Stone, Liu, "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, arXiv
        2110.14048, Algorithm 1.
    """
    check_gramian(gramian)
    check_interval("c", c, 0.0)
    check_interval("norm_eps", norm_eps, 0.0)
    return weights_on_host(gramian, lambda gradients: _conflict_averse(gradients, c, norm_eps))


def _conflict_averse(gradients: Array, c: float, norm_eps: float) -> Array:
    from scipy.optimize import brentq  # here: importing it takes longer than importing gradsub

    tasks = len(gradients)
    mean = gradients.mean(axis=0)
    radius = c * float(np.linalg.norm(mean))
    # The gradients' own squares sum to 1: a mean below the rounding error is zero, and so is the ball.
    if radius <= np.finfo(np.float64).eps * c:
        return np.full(tasks, 1 / tasks)

    def dual(log_tau: float) -> Array:
        shift = math.exp(log_tau)
        return nearest_to_zero((gradients + shift * mean) / (1 + shift))

    def excess(log_tau: float) -> float:
        length = float(np.linalg.norm(dual(log_tau) @ gradients))
        return math.log(max(length, np.finfo(np.float64).tiny) / radius) - log_tau

    lengths = np.linalg.norm(gradients, axis=1)
    # |g_w(τ)| / τ falls with τ (the dual is jointly convex in w and the bound of |g_w|), so there is one root.
    lowest, highest = math.log(1e-10 * float(lengths.min()) / radius), math.log(float(lengths.max()) / radius)
    if excess(lowest) <= 0:
        return np.zeros(tasks)
    log_tau = highest if excess(highest) >= 0 else float(brentq(excess, lowest, highest, xtol=1e-14, rtol=1e-14))
    w = dual(log_tau)
    # Relative to the terms of the sum: compared with the largest gradient, a short one alone would count as none.
    if radius * math.exp(log_tau) <= norm_eps * float(w @ lengths):
        return np.zeros(tasks)
    weights: Array = 1 / tasks + w * math.exp(-log_tau)
    return weights
