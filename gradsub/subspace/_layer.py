from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradsub.subspace._basis import lift, project, sketch
from gradsub.subspace._protected import Protected
from gradsub.subspace._schedule import sketch_size
from gradsub.subspace._shards import Shards, local

if TYPE_CHECKING:
    from gradsub.subspace._block import Block


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
        protected: directions along ``axis`` that no update may touch. May grow.
        sketched: whether bases are refreshed from sketches of the gradient, without the whole of it.
        shards: which of the weight's rows are on this rank; None: all. Bases are whole on every rank.
        block: the layers that it is stacked with.
        row: its place among them.
    """

    name: str
    parameter: Tensor
    index: int
    axis: int
    widths: tuple[int, ...]
    protected: Protected | None = None
    sketched: bool = False
    shards: Shards | None = None
    block: Block = field(init=False, repr=False)
    row: int = field(init=False, default=0)

    @property
    def whole_shape(self) -> tuple[int, int]:
        """(m, n) of the weight as a matrix."""
        rows = self.parameter.shape[0]
        return rows, self.parameter.numel() // rows

    @property
    def shape(self) -> tuple[int, int]:
        """The same of what is here: of a sharded weight, this rank's rows."""
        rows, columns = self.whole_shape
        return (rows if self.shards is None else self.shards.stop - self.shards.start), columns

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight, or a gradient of its shape, as a matrix of what is here; a view wherever memory allows."""
        tensor = local(tensor)
        return tensor if tensor.ndim == 2 else tensor.reshape(self.shape)

    @property
    def dimension(self) -> int:
        """d, the length of the axis that the bases span."""
        return self.whole_shape[self.axis]

    @property
    def codimension(self) -> int:
        """The length of the weight's other axis."""
        return self.whole_shape[1 - self.axis]

    @property
    def sketch_size(self) -> int:
        """c, the columns of its sketches."""
        return sketch_size(self.widths[0], self.codimension)

    def near(self, directions: Tensor) -> Tensor:
        """Of directions along the weight's first axis, the rows that are here."""
        return directions if self.shards is None else directions[self.shards.start : self.shards.stop]

    def project(self, matrix: Tensor, basis: Tensor) -> Tensor:
        """Coordinates of a matrix of the weight's shape; of a sharded one along axis 0 a part of a sum, see `total`."""
        return project(matrix, basis if self.axis == 1 else self.near(basis), self.axis)

    def lift(self, coordinates: Tensor, basis: Tensor) -> Tensor:
        """The matrix that has these coordinates, as far as it is here."""
        return lift(coordinates, basis if self.axis == 1 else self.near(basis), self.axis)

    def sketch(self, matrix: Tensor, directions: Tensor) -> Tensor:
        """The sketch (d x c) of a matrix of the weight's shape; of a sharded one a part of a sum."""
        if self.axis == 1:
            return sketch(matrix, self.near(directions), self.axis)
        found = sketch(matrix, directions, self.axis)
        if self.shards is None:
            return found
        padded = found.new_zeros(self.dimension, found.shape[1])
        self.near(padded).copy_(found)
        return padded

    @property
    def splits_coordinates(self) -> bool:
        """Whether each rank has its own rows of the coordinates; if not, its projections are parts of a sum."""
        return self.shards is not None and self.shards.group is not None and self.axis == 1

    def total(self, projected: Tensor) -> Tensor:
        """Coordinates from this rank's projection; waits for the other ranks where it is a part of a sum."""
        if self.shards is not None and self.axis == 0:
            self.shards.sum_([projected])
        return projected

    @property
    def free(self) -> int:
        """d - k: the dimension of the null space."""
        return self.dimension if self.protected is None else self.protected.free

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of bases and of everything inside the subspace: float32 at least."""
        # Not torch.promote_types: that is an operation, and this is asked for in every step and layer.
        return torch.float64 if self.parameter.dtype == torch.float64 else torch.float32

    def coordinates(self, subspace: int) -> tuple[int, int]:
        """The shape of a projected gradient: (m, r) or (r, n)."""
        rows, columns = self.shape
        width = self.widths[subspace]
        return (rows, width) if self.axis == 1 else (width, columns)

    def columns(self, subspace: int) -> slice:
        """Where the subspace's basis lies in the layer's joint basis (d x sum of widths)."""
        start = sum(self.widths[:subspace])
        return slice(start, start + self.widths[subspace])
