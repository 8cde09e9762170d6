from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# A power of two, so that dividing by a loss scale that is one as well loses nothing; small enough to be invisible in
# a gradient norm.
_UNIT = 2.0**-60


def looks_scaled(loss: Tensor) -> bool:
    """Whether the loss is a product with a constant one-element tensor, which is how `GradScaler.scale` makes it."""
    node = loss.grad_fn
    if node is None or node.name() != "MulBackward0":
        return False
    factor = getattr(node, "_saved_other", None)
    return isinstance(factor, Tensor) and factor.numel() == 1


class ScaleWitness:
    """Tells `torch.amp.GradScaler` what it can only read from ``p.grad``, and hears from it what it did.

    A scaler looks for Inf in ``p.grad``, divides it by the loss scale and refuses to go on when there is no ``p.grad``
    at all; captured gradients are not there. While a scaled loss is in use, one parameter therefore carries a
    gradient that is zero but for rounding: 2^-60 everywhere, or Inf if a captured gradient is not finite. What the
    scaler makes of it is the factor that the captured gradients still need.
    """

    def __init__(self) -> None:
        self._parameter: Tensor | None = None
        self._gradient: Tensor | None = None

    def place(self, parameters: Iterable[Tensor], largest: Tensor) -> None:
        """Put the witness up.

        Args:
            parameters: those that may carry it; the smallest one without a gradient of its own does.
            largest: NaN or Inf if a captured gradient is (0-dim).
        """
        if self._parameter is None:
            free = [p for p in parameters if p.grad is None and p.dtype != torch.float16]
            if not free:
                return
            self._parameter = min(free, key=Tensor.numel)
            self._gradient = torch.full_like(self._parameter, _UNIT)
            self._parameter.grad = self._gradient
        assert self._gradient is not None
        # A zero for a finite value, NaN otherwise: what is not finite stays so.
        self._gradient += (largest * 0).to(self._gradient)

    def withdraw(self) -> Tensor | None:
        """Take it down; the factor for the captured gradients (0-dim), or None if there was no scaled loss."""
        parameter, gradient = self._parameter, self._gradient
        self._parameter = self._gradient = None
        if parameter is None or gradient is None or parameter.grad is not gradient:
            return None
        parameter.grad = None
        return gradient.flatten()[0].double() / _UNIT if gradient.is_cpu else gradient.flatten()[0] / _UNIT
