from __future__ import annotations

import math

import torch
from torch import Tensor

from gradsub.linalg._arithmetic import full_precision, largest_magnitude, product
from gradsub.linalg._orthonormal import _orthonormalize_unchecked
from gradsub.linalg._randomized_svd import _randomized_svd_unchecked
from gradsub.linalg._room import Room
from gradsub.linalg._thin import added_by_each, dominant_eigenvectors

_ITERATIONS = 4
_ROUNDING = 32
"""A singular value of so many machine epsilons of the largest one is rounding error."""


def project(matrix: Tensor, basis: Tensor, axis: int) -> Tensor:
    """R = G V (m x r) for axis 1, R = U^T G (r x n) for axis 0; the basis (d x r) is V or U."""
    matrix = matrix.to(basis.dtype)
    return product(matrix, basis) if axis == 1 else product(basis.mT, matrix)


def lift(coordinates: Tensor, basis: Tensor, axis: int) -> Tensor:
    """d V^T for axis 1, U d for axis 0: the m x n matrix that has these coordinates in the subspace."""
    return product(coordinates, basis.mT) if axis == 1 else product(basis, coordinates)


def sketch(matrix: Tensor, directions: Tensor, axis: int) -> Tensor:
    """Y = G^T Omega (n x c) for axis 1, Y = G Omega (m x c) for axis 0: the range of G, seen through c directions."""
    matrix = matrix.to(directions.dtype)
    return matrix.mT @ directions if axis == 1 else matrix @ directions


def orthonormality(dtype: torch.dtype) -> float:
    """How far products of orthonormal columns may be from 0 and 1: far above rounding, far below what a copy in half
    precision has lost.
    """
    return 1e-4 if torch.finfo(dtype).bits <= 32 else 1e-5


def dominant_basis(
    gradient: Tensor, width: int, axis: int, room: Room, free: int, generator: torch.Generator, may_vanish: bool = False
) -> tuple[Tensor, list[bool]] | None:
    """The leading singular vectors of (I - K K^T) G along ``axis``, as orthonormal columns orthogonal to K.

    The protection is folded into the basis here: whatever the inner optimizer then does with the coordinates, the
    lifted update stays orthogonal to K.

    Args:
        gradient: G (m x n), or several of them (L x m x n).
        width: columns of the result.
        axis: the axis of length d that the basis spans.
        room: K's complement.
        free: its dimension; columns beyond it are zero, since there is no direction left for them.
        generator: draws the random test matrix, and the columns beyond the rank of (I - K K^T) G.
        may_vanish: whether G counts if K leaves nothing but rounding of it: then all columns are drawn.

    Returns:
        the basis (d x width), or L of them, and of which of them G counts: it is finite, not zero, and K leaves
        something of it. Where it does not, ignore the basis. None if none counts. Reading that waits for the device, as
        the decomposition does.
    """
    whole = matrix = (gradient if axis == 0 else gradient.mT).to(torch.promote_types(gradient.dtype, torch.float32))
    if room.narrow:
        with full_precision(matrix.device):
            matrix = room.project(room.enter(matrix))
    largest = largest_magnitude(whole)
    error = _error(largest, largest_magnitude(matrix))
    usable: list[bool] = _counts(largest, error, may_vanish).flatten().tolist()
    if not any(usable):
        return None
    # One that is not finite would make the decomposition of all raise.
    matrix = torch.where(torch.isfinite(largest), matrix, 0.0)
    basis = whole.new_zeros(*whole.shape[:-1], width)
    kept = min(width, free)
    if kept:
        leading, values, _ = _randomized_svd_unchecked(matrix, kept, generator=generator)
        leading = leading.masked_fill(_is_rounding(values, error).unsqueeze(-2), 0)
        basis[..., :kept] = _orthonormalize_unchecked(leading, room, generator)
    return basis, usable


def sketched_basis(
    Y: Tensor, earlier: Tensor | None, width: int, room: Room, generator: torch.Generator, may_vanish: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The leading left singular vectors of (I - K K^T) [B diag(s), Y / ||Y||], without waiting for the device.

    Y is the sketch of this step's gradient; B diag(s) is what the sketch of the step before has left of that step's.
    Merging the two as Frequent Directions does gives both batches the same say. The singular subspace of the thin
    matrix comes from an orthogonal iteration on its Gramian, since a decomposition of that would wait; directions whose
    singular values are below sqrt(eps) of the largest one can be missed.

    Args:
        Y: sketches of L layers (L x d x c).
        earlier: B diag(s) (L x d x width), or None; zero where that sketch was not usable.
        width: columns of the result, at most the dimension of K's complement.
        room: K's complement.
        generator: draws the columns beyond the rank of the matrix.
        may_vanish: whether Y is usable if K leaves nothing but rounding of it.

    Returns:
        the bases (L x d x width), their singular values s (L x width), and whether Y was usable: finite, not zero, and
        not gone with K (L x 1 x 1); where it was not, ignore the others.
    """
    with full_precision(Y.device):
        d = Y.shape[-2]
        whole = largest = largest_magnitude(Y)
        if room.narrow:
            Y = room.project(room.enter(Y))
            largest = largest_magnitude(Y)
        error = _error(whole, largest)
        usable = _counts(whole, error, may_vanish)
        # Where K leaves nothing but rounding of Y, the earlier sketch alone decides. By the largest entry first, since
        # the square of a norm need not be representable.
        Y = torch.where(usable & (error < 1), Y / largest, 0.0)
        Y = Y / torch.linalg.matrix_norm(Y, keepdim=True).clamp_min(torch.finfo(Y.dtype).tiny)
        if earlier is not None:
            Y = torch.cat([room.project(room.enter(earlier)), Y], dim=-1)
        gramian = product(Y.mT, Y)
        columns = min(width, Y.shape[-1])
        start = gramian[..., :columns]
        if earlier is not None:
            # Columns of both: the iteration would never leave the earlier sketch where that has a lower rank, or none.
            start = start + gramian[..., -columns:]
        Z = dominant_eigenvectors(gramian, start, _ITERATIONS)
        leading = product(Y, Z)
        values = torch.linalg.vector_norm(leading, dim=-2)
        # Not the values: on the Gramian small ones are inexact, and columns are left with parts of those before them.
        new = added_by_each(leading)
        rounding = _is_rounding(new, torch.where(error < 1, error, _ROUNDING * torch.finfo(Y.dtype).eps))
        leading, values = leading.masked_fill(rounding.unsqueeze(-2), 0), values.masked_fill(rounding, 0)
    basis = Y.new_zeros(len(Y), d, width)
    basis[..., :columns] = _orthonormalize_unchecked(leading, room, generator)
    strength = values.new_zeros(*values.shape[:-1], width)
    strength[..., :columns] = values
    return basis, strength, usable


def _counts(largest: Tensor, error: Tensor, may_vanish: bool) -> Tensor:
    """Whether a gradient or a sketch with this largest entry, of which K leaves so much, says anything (... x 1 x 1).

    If not, the basis stays due: the gradient may come from an empty expert, a head of zeros or a loss that warms up.
    """
    counts = torch.isfinite(largest) & (largest > 0)
    return counts if may_vanish else counts & (error < 1)


def _error(whole: Tensor, left: Tensor) -> Tensor:
    """The relative size at which (I - K K^T) Y is rounding, from the largest entries of Y and of that (... x 1 x 1)."""
    lost = torch.where(left > 0, whole / left, math.inf)
    return _ROUNDING * torch.finfo(left.dtype).eps * lost


def _is_rounding(values: Tensor, error: Tensor) -> Tensor:
    """Which columns lie beyond the rank, by their singular values or what they add to those before them (... x c).

    Their directions are not taken: rounding alone would choose them, other ones for every way to sum a gradient. The
    generator that draws in their place does not.
    """
    return values <= error.squeeze(-1) * values.amax(-1, keepdim=True)
