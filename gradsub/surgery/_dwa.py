"""Dynamic weight average."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ._checks import check_interval
from ._inputs import LossWeighting


class DWA(LossWeighting):
    """A task whose loss falls more slowly than the others' gains weight, from one stretch of training to the next.

    With L_k(t) the mean of task k's loss over the t-th ``window`` of its steps,

        w_k = K exp(r_k / T) / sum_j exp(r_j / T),   r_k = L_k(t-1) / L_k(t-2)

    and r_k = 1 before two windows are complete: then all weights are 1, as in the sum. A loss that has doubled counts
    e^(1/T) as much as one that stays. All tasks of the optimizer share the K, also those that are absent in a step.

    The paper's window is an epoch. Losses keep their sign; a window whose mean is 0 gives r_k = 1. Wants
    `GemsOptimizer` to see every loss. One object serves one optimizer.

    Args:
        window: steps of a task over which its loss is averaged. Typical: those of an epoch, at least 100.
        temperature: T (dimensionless); larger is flatter. The paper's is 2.

    Raises:
        ValueError: ``window`` is no whole number from 1, or ``temperature`` is not positive.

    Example:
        >>> import torch
        >>> from gradsub.surgery import DWA, SurgeryInputs
        >>> surgery = DWA(window=1)
        >>> for losses in ([4.0, 4.0], [2.0, 4.0], [1.0, 4.0]):
        ...     print(surgery(SurgeryInputs(torch.eye(2), torch.tensor(losses), torch.ones(2))))
        tensor([1., 1.])
        tensor([1., 1.])
        tensor([0.8756, 1.1244])

    References:
        Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, arXiv 1803.10704, equation 7.
    """

    FIELDS = ("sum", "count", "newer", "older")

    def __init__(self, *, window: int = 100, temperature: float = 2.0) -> None:
        super().__init__()
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a whole number from 1, got {window!r}: choose the steps of an epoch.")
        check_interval("temperature", temperature, 0.0)
        if not temperature:
            raise ValueError("temperature must be positive, got 0: choose one, such as 2.")
        self.window = window
        self.temperature = temperature

    def _weigh(self, state: Mapping[str, Tensor], losses: Tensor, seen: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        known = (state["newer"] != 0) & (state["older"] != 0)
        rates = (state["newer"] / state["older"].where(known, 1.0)).where(known, 1.0)
        weights = len(rates) * torch.softmax(rates / self.temperature, 0)
        total, count = state["sum"] + losses, state["count"] + 1
        full = count >= self.window
        return weights, {
            "sum": total.where(~full, 0.0),
            "count": count.where(~full, 0.0),
            "newer": (total / count).where(full, state["newer"]),
            "older": state["newer"].where(full, state["older"]),
        }
