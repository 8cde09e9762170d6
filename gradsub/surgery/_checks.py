"""Argument checks: each error names the argument, the value found and the remedy. None looks at a tensor's values."""

import math

from torch import Tensor


def check_gramian(gramian: Tensor) -> None:
    """Raise unless ``gramian`` is a real floating-point K x K tensor with K >= 1."""
    if not isinstance(gramian, Tensor):
        raise ValueError(f"gramian must be a torch.Tensor, got {type(gramian).__name__}: use torch.as_tensor.")
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or gramian.shape[0] == 0:
        raise ValueError(
            f"gramian must have shape (K, K) for K >= 1 tasks, got {tuple(gramian.shape)}: pass J @ J.T for the K x n "
            "matrix J of the task gradients."
        )
    if not gramian.is_floating_point():
        raise ValueError(f"gramian must be real and floating point, got {gramian.dtype}: use gramian.float().")


def check_interval(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise unless the number lies in [low, high]; NaN lies nowhere."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        interval = f"in [{low}, {high}]" if high < math.inf else f">= {low}"
        raise ValueError(f"{name} must be a number {interval}, got {value!r}: choose one in that range.")
