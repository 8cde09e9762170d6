"""Adam on K numbers, without a parameter, a graph or an optimizer object."""

from collections.abc import Mapping

from torch import Tensor

BETAS = 0.9, 0.999
FIELDS = ("first_moments", "second_moments", "steps")


def adam(
    values: Tensor, gradient: Tensor, state: Mapping[str, Tensor], lr: float, weight_decay: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of ``torch.optim.Adam`` with its defaults; each number counts its own steps.

    Args:
        values: (K,).
        gradient: (K,).
        state: by the names of ``FIELDS``, (K,) each, zero at first.
        lr: learning rate.
        weight_decay: added to the gradient, in units of the values.

    Returns:
        the new values, and the new state.
    """
    gradient = gradient + weight_decay * values
    steps = state["steps"] + 1
    first = BETAS[0] * state["first_moments"] + (1 - BETAS[0]) * gradient
    second = BETAS[1] * state["second_moments"] + (1 - BETAS[1]) * gradient.square()
    size = (second / (1 - BETAS[1] ** steps)).sqrt() + 1e-8
    moved = values - lr * first / (1 - BETAS[0] ** steps) / size
    return moved, dict(zip(FIELDS, (first, second, steps), strict=True))
