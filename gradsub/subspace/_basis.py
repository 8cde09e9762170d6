from __future__ import annotations

import torch
from torch import Tensor

from gradsub.linalg._orthonormal import _orthonormalize_unchecked
from gradsub.linalg._randomized_svd import _randomized_svd_unchecked


def project(matrix: Tensor, basis: Tensor, axis: int) -> Tensor:
    """R = G V (m x r) for axis 1, R = U^T G (r x n) for axis 0; the basis (d x r) is V or U."""
    matrix = matrix.to(basis.dtype)
    return matrix @ basis if axis == 1 else basis.mT @ matrix


def lift(coordinates: Tensor, basis: Tensor, axis: int) -> Tensor:
    """d V^T for axis 1, U d for axis 0: the m x n matrix that has these coordinates in the subspace."""
    return coordinates @ basis.mT if axis == 1 else basis @ coordinates


def sketch(matrix: Tensor, directions: Tensor, axis: int) -> Tensor:
    """Y = G^T Omega (n x c) for axis 1, Y = G Omega (m x c) for axis 0: the range of G, seen through c directions."""
    matrix = matrix.to(directions.dtype)
    return matrix.mT @ directions if axis == 1 else matrix @ directions


def dominant_basis(
    gradient: Tensor, width: int, axis: int, against: Tensor | None, free: int, generator: torch.Generator
) -> Tensor:
    """The leading singular vectors of (I - K K^T) G along ``axis``, as orthonormal columns orthogonal to K.

    The protection is folded into the basis here: whatever the inner optimizer then does with the coordinates, the
    lifted update stays orthogonal to K.

    Args:
        gradient: G (m x n), finite and not zero.
        width: columns of the result.
        axis: the axis of length d that the basis spans.
        against: K (d x k), orthonormal columns (zero columns are allowed) to stay orthogonal to.
        free: the dimension of K's complement; columns beyond it are zero, since there is no direction left for them.
        generator: draws the random test matrix.

    Returns:
        the basis (d x width).
    """
    matrix = (gradient if axis == 0 else gradient.mT).to(torch.promote_types(gradient.dtype, torch.float32))
    if against is not None:
        matrix = matrix - against @ (against.mT @ matrix)
    basis = matrix.new_zeros(matrix.shape[0], width)
    kept = min(width, free)
    if kept:
        leading = _randomized_svd_unchecked(matrix, kept, generator=generator).U
        basis[:, :kept] = _orthonormalize_unchecked(leading, against=against, generator=generator)
    return basis
