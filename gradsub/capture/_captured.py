from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import norm, widest
from gradsub.subspace import local


@dataclass
class Captured:
    """What one task's backward passes left for one parameter; summed over them, like ``p.grad``.

    Attributes:
        full: G_k (m x n), kept only where a basis is about to be refreshed, and for parameters without subspaces.
        shared: G_k projected on the shared subspace.
        own: G_k projected on the task's own subspace.
        sketch: Y of G_k (d x c), in steps that renew a basis.
        squared_norm: the squared Frobenius norm of G_k (0-dim, float64 where there is one); None where G_k never
            existed as a whole, and once a second backward pass was added, because norms of parts do not add up to the
            norm of the sum.
    """

    full: Tensor | None = None
    shared: Tensor | None = None
    own: Tensor | None = None
    sketch: Tensor | None = None
    squared_norm: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Every gradient held."""
        return [tensor for tensor in (self.full, self.shared, self.own, self.sketch) if tensor is not None]

    def norm_known(self) -> Tensor:
        """The squared norm of what is known of the gradient (0-dim): all of it, or its part in the shared subspace."""
        if self.squared_norm is not None:
            return self.squared_norm
        return squared_norm(local(self.tensors()[0]))

    def add(self, other: Captured) -> None:
        """Accumulate another backward pass of the same task."""
        self.full = _sum(self.full, other.full)
        self.shared = _sum(self.shared, other.shared)
        self.own = _sum(self.own, other.own)
        self.sketch = _sum(self.sketch, other.sketch)
        self.squared_norm = None


def squared_norm(gradient: Tensor) -> Tensor:
    """The squared Frobenius norm (0-dim): float32 has no room for that of a gradient of 1e20, or of 1e-25."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return norm(wide).to(widest(gradient.device)).square()


def _sum(held: Tensor | None, more: Tensor | None) -> Tensor | None:
    if held is None or more is None:
        return more if held is None else held
    return held.add_(more)
