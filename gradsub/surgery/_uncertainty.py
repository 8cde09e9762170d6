"""Weighting by uncertainty."""

from collections.abc import Mapping

from torch import Tensor

from ._checks import check_interval
from ._descent import FIELDS, adam
from ._inputs import LossWeighting


class UncertaintyWeighting(LossWeighting):
    """Each loss is divided by what is left of it: by a variance that is trained along.

    The total loss is

        sum_k exp(-s_k) L_k + s_k

    with s_k the logarithm of task k's variance (twice the paper's objective, whose factor 1/2 would halve all steps).
    The weights are w_k = exp(-s_k), 1 at first, and s_k takes a step of Adam against 1 - exp(-s_k) L_k. It settles at
    s_k = log L_k, where every term is of the size 1: a task counts the more, the smaller its loss is.

    Losses should be positive, as likelihoods and squared errors are; s_k of one that is not falls to its bound. Wants
    `GemsOptimizer` to see every loss. One object serves one optimizer.

    Args:
        lr: step size of s (dimensionless). Typical: 1e-3 to 0.05. While the gradients of s keep their size, a logarithm
            moves by about lr a step. When one comes after many steps without any, it moves by up to 3.2 lr. When they
            grow by 11 % at every step, it moves by up to 7.3 lr, and never by more.
        limit: bound on |s|.

    Raises:
        ValueError: an argument is negative.

    Example:
        >>> import torch
        >>> from gradsub.surgery import SurgeryInputs, UncertaintyWeighting
        >>> surgery = UncertaintyWeighting(lr=0.1)
        >>> for _ in range(100):
        ...     weights = surgery(SurgeryInputs(torch.eye(2), torch.tensor([4.0, 0.5]), torch.ones(2)))
        >>> [round(weight, 1) for weight in weights.tolist()]
        [0.2, 2.0]

    References:
        Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics",
        CVPR 2018, arXiv 1705.07115, equation 7.
    """

    FIELDS = ("log_variances", *FIELDS)

    def __init__(self, *, lr: float = 0.01, limit: float = 40.0) -> None:
        super().__init__()
        check_interval("lr", lr, 0.0)
        check_interval("limit", limit, 0.0)
        self.lr = lr
        self.limit = limit

    def _weigh(self, state: Mapping[str, Tensor], losses: Tensor, seen: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # A checkpoint may hold any number, and exp of a large one is infinite.
        s = state["log_variances"].clamp(-self.limit, self.limit)
        weights = (-s).exp()
        moved, moments = adam(s, 1 - weights * losses, state, self.lr)
        return weights, {"log_variances": moved.clamp(-self.limit, self.limit), **moments}
