from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import norm, widest
from gradsub.subspace import Layer, local

# In the place of a task: gradients of a batch whose rows belong to several tasks, already weighted and summed.
MIXED = -1


@dataclass(eq=False, slots=True)
class Captured:
    """What one task's backward passes left for one parameter; summed over them, like ``p.grad``.

    Attributes:
        full: G_k (m x n), kept only where a basis is about to be refreshed, and for parameters without subspaces.
        projected: G_k in the coordinates of the shared and of the task's own subspace, side by side.
        sketch: Y of G_k (d x c), in steps that renew a basis.
        squared_norm: the squared Frobenius norm of G_k (0-dim, float64 where there is one), where it was computed
            before G_k was projected; None once a second backward pass was added, because norms of parts do not add up
            to the norm of the sum.
    """

    full: Tensor | None = None
    projected: Tensor | None = None
    sketch: Tensor | None = None
    squared_norm: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Every gradient held."""
        return [tensor for tensor in (self.full, self.projected, self.sketch) if tensor is not None]

    def squared_norm_known(self, layer: Layer | None) -> Tensor:
        """The squared norm of what is known of the gradient (0-dim): all of it, or its part in the shared subspace."""
        if self.squared_norm is not None:
            return self.squared_norm
        if layer is None or self.projected is None:
            return squared_norm(local(self.tensors()[0]))
        return squared_norm(self.projected.narrow(layer.axis, 0, layer.widths[0]))

    def add(self, other: Captured) -> None:
        """Accumulate another backward pass of the same task."""
        self.full = _sum(self.full, other.full)
        self.projected = _sum(self.projected, other.projected)
        self.sketch = _sum(self.sketch, other.sketch)
        self.squared_norm = None


def squared_norm(gradient: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """The squared Frobenius norm, or norms: float32 has no room for that of a gradient of 1e20, or of 1e-25."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return norm(wide, dim).to(widest(gradient.device)).square()


def _sum(held: Tensor | None, more: Tensor | None) -> Tensor | None:
    if held is None or more is None:
        return more if held is None else held
    return held.add_(more)
