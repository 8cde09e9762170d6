"""What the passes of a linear layer multiply: inputs, gradients of outputs, bases and random directions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a layer's weight is stored and which of its axes the bases span.

    Attributes:
        transposed: the weight is ``in_features x out_features``.
        axis: of the weight, that the bases span.
        input_side: whether they span input directions.
    """

    transposed: bool
    axis: int
    input_side: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_side", (self.axis == 1) != self.transposed)


# Which rows of a batch, along its first axis: from where to where, or which; None for all.
Rows: TypeAlias = "tuple[int, int] | Tensor | None"


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """X W^T + b, or x W + b for a transposed weight."""
    return F.linear(x, weight.mT if transposed else weight, bias)


def rows_of(matrix: Tensor, rows: Rows) -> Tensor:
    """The given rows of the first axis, then as a matrix (N x features)."""
    if isinstance(rows, tuple):
        matrix = matrix[rows[0] : rows[1]]
    elif rows is not None:
        matrix = matrix.index_select(0, rows)
    return matrix if matrix.ndim == 2 else matrix.reshape(-1, matrix.shape[-1])


def coordinates(thin: Tensor, wide: Tensor, axis: int) -> Tensor:
    """The projected gradient, as the weight's axes lie: thin^T wide (r x n) for axis 0, wide^T thin (m x r) for 1."""
    return thin.mT @ wide if axis == 0 else wide.mT @ thin


def whole(x: Tensor, g: Tensor, transposed: bool) -> Tensor:
    """The weight's gradient, as it is stored, from rows of inputs and of output gradients."""
    return x.mT @ g if transposed else g.mT @ x


def project_rows(
    orientation: Orientation,
    x: Tensor | None,
    g: Tensor,
    basis: Tensor | None,
    directions: Tensor | None,
    thin: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of these rows in coordinates of the basis, or the whole of it without one; and its sketch.

    Args:
        orientation: of the weight and the basis.
        x: inputs (N x in_features); None where ``thin`` suffices.
        g: gradients of the outputs (N x out_features).
        basis: (d x r), or None.
        directions: Omega (codimension x c), if a sketch is due.
        thin: x V (N x r) for a basis of inputs, if it is there already: then it stands for the basis.
    """
    if basis is None and thin is None:
        assert x is not None
        return whole(x, g, orientation.transposed), None
    if orientation.input_side:
        if thin is None:
            assert x is not None
            assert basis is not None
            thin = x @ basis.to(g.dtype)
        near, far, projected = g, x, coordinates(thin, g, orientation.axis)
    else:
        assert x is not None
        assert basis is not None
        near, far, projected = x, g, coordinates(g @ basis.to(g.dtype), x, orientation.axis)
    if directions is None:
        return projected, None
    assert far is not None
    return projected, far.mT @ (near @ directions.to(g.dtype))
