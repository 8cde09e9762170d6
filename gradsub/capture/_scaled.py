from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradsub.subspace import local

# Small enough to be invisible in a gradient norm, a power of two so that dividing by a loss scale loses nothing.
_UNIT = 2.0**-60


def loss_scale(loss: Tensor) -> Tensor | None:
    """The factor, if the loss is a product with a constant float32 number, as `GradScaler.scale` makes it.

    A product with a Python number is none: torch keeps that as float64.
    """
    node = loss.grad_fn
    if node is None or node.name() != "MulBackward0":
        return None
    factor = getattr(node, "_saved_other", None)
    found = isinstance(factor, Tensor) and factor.numel() == 1 and factor.dtype == torch.float32
    return factor.detach().reshape(()).clone() if found else None  # type: ignore[union-attr]


class ScaleWitness:
    """Tells `torch.amp.GradScaler` what it can only read from ``p.grad``, and hears from it what it did.

    A scaler looks for Inf in ``p.grad``, divides it by the loss scale and refuses to go on when there is no ``p.grad``
    at all; captured gradients are not there. While a scaled loss is in use, one entry of one ``p.grad`` is therefore
    remembered: of a gradient of 2^-60 that is put up for this, or of one that is there anyway. NaN is added to it if a
    captured gradient is not finite. Whether the scaler divided it says whether captured gradients have to follow; by
    how much, the loss says, so whatever else scales ``p.grad`` (clipping) does not reach captured gradients.
    """

    def __init__(self) -> None:
        self._parameter: Tensor | None = None
        self._gradient: Tensor | None = None
        self._own = False
        self._index: Tensor | None = None
        self._value: Tensor | None = None

    def place(self, parameters: Iterable[Tensor], largest: Tensor) -> None:
        """Put the witness up.

        Args:
            parameters: those that may carry it; the smallest one without a gradient of its own does, if there is any.
            largest: NaN or Inf if a captured gradient is (0-dim).
        """
        if self._parameter is None:
            fit = [p for p in parameters if local(p).numel() and p.is_floating_point() and p.dtype != torch.float16]
            free = [p for p in fit if p.grad is None]
            if not fit:
                return
            self._own = bool(free)
            self._parameter = min(free or fit, key=Tensor.numel)
            if self._own:
                self._parameter.grad = torch.full_like(self._parameter, _UNIT)
            self._remember()
        assert self._gradient is not None
        # A zero for a finite value, NaN otherwise: what is not finite stays so.
        here = local(self._gradient)
        here += (largest * 0).to(here)

    def _remember(self) -> None:
        assert self._parameter is not None
        self._gradient = self._parameter.grad
        assert self._gradient is not None
        here = local(self._gradient)
        self._index = here.abs().argmax()
        self._value = here.flatten()[self._index].clone()

    def joined(self, parameter: Tensor) -> None:
        """A backward pass outside any task has added to ``p.grad``: it is a gradient in its own right from now on."""
        if parameter is self._parameter:
            self._own = False
            self._remember()

    @property
    def carrier(self) -> Tensor | None:
        """The parameter whose ``p.grad`` is nothing but the witness, if there is one."""
        return self._parameter if self._own else None

    def refresh(self) -> None:
        """What it stands on was averaged over the ranks: remember the new value."""
        if self._parameter is not None and not self._own:
            self._remember()

    def lost(self) -> bool:
        """Whether somebody cleared ``p.grad`` without telling the optimizer."""
        return self._parameter is not None and self._parameter.grad is not self._gradient

    def withdraw(self, scale: Tensor | None) -> Tensor | None:
        """Take it down; the factor for the captured gradients (0-dim), or None if there was no scaled loss.

        Args:
            scale: the loss scale.
        """
        parameter, gradient, lost = self._parameter, self._gradient, self.lost()
        self._parameter = self._gradient = None
        if parameter is None or gradient is None or lost:
            return None
        if self._own:
            parameter.grad = None
        if scale is None:
            return None
        assert self._index is not None
        assert self._value is not None
        ratio = (local(gradient).flatten()[self._index].float() / self._value.float()).abs().log2()
        scale = scale.to(ratio)
        divided = (ratio + scale.log2()).abs() < ratio.abs()
        return torch.where(divided, 1.0 / scale, 1.0)
