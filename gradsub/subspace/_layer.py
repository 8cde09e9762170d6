from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Layer:
    """A weight that is trained inside subspaces; only what is protected in it may change.

    Attributes:
        name: what reports and errors call it.
        parameter: the weight; one with more than two dimensions, as of a convolution, counts as the matrix
            ``out x (in * kernel)``.
        index: its position among all the optimizer's parameters; seeds its random numbers.
        axis: the axis of the weight that the bases span, of length d: 1 for ``side="input"`` of an
            ``out_features x in_features`` weight, 0 for ``side="output"``.
        widths: columns of each subspace's basis: the shared one first, then one a task.
        protected: K (d x k), orthonormal: directions along ``axis`` that no update may touch. May grow.
        sketched: whether bases are refreshed from sketches of the gradient, without the whole of it.
    """

    name: str
    parameter: Tensor
    index: int
    axis: int
    widths: tuple[int, ...]
    protected: Tensor | None = None
    sketched: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight as a matrix."""
        rows = self.parameter.shape[0]
        return rows, self.parameter.numel() // rows

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight, or a gradient of its shape, as a matrix; a view wherever memory allows."""
        return tensor if tensor.ndim == 2 else tensor.reshape(self.shape)

    @property
    def dimension(self) -> int:
        """d, the length of the axis that the bases span."""
        return self.shape[self.axis]

    @property
    def codimension(self) -> int:
        """The length of the weight's other axis."""
        return self.shape[1 - self.axis]

    @property
    def free(self) -> int:
        """d - k: the dimension of the null space."""
        return self.dimension - (0 if self.protected is None else self.protected.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of bases and of everything inside the subspace: float32 at least."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    def coordinates(self, subspace: int) -> tuple[int, int]:
        """The shape of a projected gradient: (m, r) or (r, n)."""
        rows, columns = self.shape
        width = self.widths[subspace]
        return (rows, width) if self.axis == 1 else (width, columns)

    def columns(self, subspace: int) -> slice:
        """Where the subspace's basis lies in the layer's joint basis (d x sum of widths)."""
        start = sum(self.widths[:subspace])
        return slice(start, start + self.widths[subspace])
