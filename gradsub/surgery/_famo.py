"""Fast adaptive multitask optimization."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ._checks import check_interval
from ._descent import FIELDS, adam
from ._inputs import LossWeighting

# Its reciprocal is a number in float32, too.
_SMALLEST = 1e-37


class FAMO(LossWeighting):
    r"""All losses fall at nearly the same relative rate, for the price of K numbers a step.

    The method descends along sum_k z_k grad log l_k with z = softmax(xi), scaled so that the gradients' weights sum to
    one. Here they sum to the number of tasks K, so that equal weights leave the sum of the gradients as it is:

        w_k = K c z_k / l_k,   c = 1 / sum_j z_j / l_j

    A task whose loss has fallen by more, in log l, than the others' then loses weight: xi takes a step of Adam against
    the gradient of sum_k z_k (log l_k(t) - log l_k(t+1)).

    The paper measures l(t+1) on the batch of step t, by another forward pass. Here it is the loss of the next batch,
    which is there anyway, and noisier. Those who do measure it call `after` between two steps.

    It takes the tasks of a step together: a task that is alone in a step has the weight 1. Losses must be positive; up
    to 1e-37 they count as that number. Wants `GemsOptimizer` to see every loss. One object serves one optimizer.

    Args:
        lr: step size of xi (dimensionless). The paper's is 0.025.
        weight_decay: pulls xi to equal weights, in units of xi. The paper's is 1e-3.

    Raises:
        ValueError: an argument is negative.

    Example:
        >>> import torch
        >>> from gradsub.surgery import FAMO, SurgeryInputs
        >>> surgery = FAMO()
        >>> surgery(SurgeryInputs(torch.eye(2), torch.tensor([1.0, 3.0]), torch.ones(2)))
        tensor([1.5000, 0.5000])

    References:
        Liu, Feng, Stone, Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, arXiv 2306.03792, Algorithm
        1.
    """

    FIELDS = ("logits", "previous", *FIELDS)

    def __init__(self, *, lr: float = 0.025, weight_decay: float = 1e-3) -> None:
        super().__init__()
        check_interval("lr", lr, 0.0)
        check_interval("weight_decay", weight_decay, 0.0)
        self.lr = lr
        self.weight_decay = weight_decay

    def after(self, losses: Tensor) -> None:
        """Tell the losses of the last step's batch, measured once more after the step.

        Args:
            losses: (K,), finite; scaled like those that the optimizer saw, as by a division by a number of parts.

        Raises:
            ValueError: another number of losses than of tasks, or there was no step yet.
        """
        previous = self._state.get("previous")
        if previous is None or previous.shape != losses.shape:
            raise ValueError(
                f"losses has the shape {tuple(losses.shape)}, expected "
                f"{'a step before' if previous is None else tuple(previous.shape)}: pass one loss a task after a step"
            )
        self._state = self._learn(self._state, losses.detach().to(previous), losses.isfinite())
        # The next step has nothing to learn from.
        self._state["previous"] = torch.zeros_like(previous)

    def _learn(self, state: Mapping[str, Tensor], losses: Tensor, seen: Tensor) -> dict[str, Tensor]:
        known = seen & (state["previous"] > 0)
        share = torch.softmax(state["logits"], 0)
        fallen = state["previous"].where(known, 1.0).log() - losses.clamp_min(_SMALLEST).where(known, 1.0).log()
        gradient = share * (fallen - (share * fallen).sum())
        logits, moments = adam(state["logits"], gradient, state, self.lr, self.weight_decay)
        new = {"logits": logits, **moments}
        return {**state, **{name: value.where(known, state[name]) for name, value in new.items()}}

    def _weigh(self, state: Mapping[str, Tensor], losses: Tensor, seen: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        state = self._learn(state, losses, seen)
        losses = losses.clamp_min(_SMALLEST)
        weights = (torch.softmax(state["logits"], 0) / losses).where(seen, 0.0)
        total = weights.sum()
        weights = seen.sum() * weights / total.where(total > 0, 1.0)
        return weights, {**state, "previous": losses}
