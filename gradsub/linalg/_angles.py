"""Principal angles between two subspaces."""

import torch
from torch import Tensor

from ._arithmetic import full_precision, magnitude, widen
from ._checks import check_matrix


def subspace_angles(A: Tensor, B: Tensor) -> Tensor:
    """Principal angles between the column spaces of two matrices, in radians, in descending order.

    With orthonormal bases Q_A and Q_B the cosines are the singular values of Q_Aᵀ Q_B and the sines those of
    (I - Q_A Q_Aᵀ) Q_B. The arc cosine loses half of the digits near 0 and the arc sine near π/2, so each angle is
    taken from the one that is accurate there: an angle of 1e-6 is resolved in float32, where the cosine alone gives 0
    or 3e-4. The convention is that of scipy.linalg.subspace_angles, batched.

    The angles compare spaces, not bases: for two vectors with a sign, use torch.nn.functional.cosine_similarity.
    Not differentiable. The computation and the result are in float32, in float64 if either input is float64.

    Args:
        A: Matrix or batch of matrices whose columns span the first space, shape (..., d, a), any unit, finite. The
            columns may be linearly dependent; the dimension is the numerical rank at max(d, a) eps.
        B: The same for the second space, shape (..., d, b), batch dimensions broadcastable with those of ``A``.

    Returns:
        Angles in [0, π/2] radians, shape (..., min(rank A, rank B)).

    Raises:
        TypeError: ``A`` or ``B`` is no tensor.
        ValueError: An input has less than two dimensions, is empty, complex, not floating point, not finite or zero;
            the row counts differ; the devices differ; or the matrices of one batch have different ranks.

    Example:
        >>> import math, torch
        >>> from gradsub.linalg import subspace_angles
        >>> A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> t = math.pi / 6
        >>> B = torch.tensor([[1.0, 0.0], [0.0, math.cos(t)], [0.0, math.sin(t)]])
        >>> [round(math.degrees(x), 3) for x in subspace_angles(A, B).tolist()]
        [30.0, 0.0]

    References:
        Knyazev, Argentati, "Principal angles between subspaces in an A-based scalar product", SIAM Journal on
        Scientific Computing 2002, Algorithm 3.1.
    """
    check_matrix("A", A)
    check_matrix("B", B)
    if A.shape[-2] != B.shape[-2]:
        raise ValueError(
            f"A and B must have the same number of rows, got shapes {tuple(A.shape)} and {tuple(B.shape)}: columns are "
            "the directions, transpose if they are your rows."
        )
    if A.device != B.device:
        raise ValueError(f"A and B must be on one device, got {A.device} and {B.device}: move one with .to(device).")
    with full_precision(A.device):
        A, B = widen(A), widen(B)
        dtype = torch.promote_types(A.dtype, B.dtype)
        return _angles(_range("A", A).to(dtype), _range("B", B).to(dtype))


def _range(name: str, A: Tensor) -> Tensor:
    """Orthonormal basis (..., d, rank A) of the columns of A, by a rank-revealing SVD."""
    U, S, _ = torch.linalg.svd(A / magnitude(A), full_matrices=False)
    negligible = S[..., :1] * (torch.finfo(S.dtype).eps * max(A.shape[-2:]))
    ranks = torch.gt(S, negligible).sum(-1)
    lowest, highest = int(ranks.min()), int(ranks.max())
    if lowest == 0:
        raise ValueError(f"{name} must span a space, got a zero matrix: angles to {{0}} are undefined, skip it.")
    if lowest != highest:
        raise ValueError(
            f"{name} must have one rank over its batch, got ranks from {lowest} to {highest}: call once per matrix."
        )
    basis: Tensor = U[..., :highest]
    return basis


def _angles(QA: Tensor, QB: Tensor) -> Tensor:
    """Angles between the ranges of two orthonormal bases, descending."""
    # The sines count the angles of the smaller space only when that one is projected.
    larger, smaller = (QA, QB) if QA.shape[-1] >= QB.shape[-1] else (QB, QA)
    C = larger.mT @ smaller
    cosines = torch.linalg.svdvals(C).clamp(max=1).flip(-1)
    sines = torch.linalg.svdvals(smaller - larger @ C).clamp(max=1)
    angles: Tensor = torch.where(cosines.square() < 0.5, torch.acos(cosines), torch.asin(sines))
    return angles
