"""Truncated singular value decomposition by a randomized range finder."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._arithmetic import full_precision, multiply, product, widen
from ._checks import check_count, check_finite_through, check_format
from ._range_finder import exact_is_cheaper, exact_svd, sketch
from ._thin import thin_svd


class SVDResult(NamedTuple):
    """Factors of A ≈ U diag(S) Vh; unpacks as ``U, S, Vh``.

    Attributes:
        U: Orthonormal columns, shape (..., m, r).
        S: Singular values in the unit of ``A``, descending, non-negative, shape (..., r).
        Vh: Orthonormal rows, shape (..., r, n).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


def randomized_svd(
    A: Tensor,
    rank: int,
    *,
    oversampling: int = 8,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
) -> SVDResult:
    """The ``rank`` dominant singular triples of a matrix, at the cost of 2q + 2 thin products with it.

    An orthonormal basis Q of the dominant range comes from a Gaussian sketch with r + p columns and q QR-stabilised
    power iterations on the taller side of ``A`` (r = ``rank``, p = ``oversampling``, q = ``power_iterations``). The
    small matrix B = Qᵀ A = U_B S Vᵀ is then decomposed exactly, through the QR factors of its transpose and an SVD
    of size r + p, and U = Q U_B. For p ≥ 2 the expected spectral error before the truncation to rank r is at most

        [1 + √(r/(p-1)) + e √(r+p)/p √(min(m,n)-r)]^(1/(2q+1)) σ_(r+1)

    and the truncation adds no more than σ_(r+1). If r + p >= min(m, n), or with p, q > 0 at least 3/4 of it,
    where that costs less, the result is exact to working precision, up to the signs and rotations that any SVD leaves
    open.

    Not differentiable: for gradients use torch.linalg.svd.
    The computation and the result are in float32, in float64 for a float64 ``A``; autocast and TF32 are ignored.
    The scale of ``A`` does not matter, from the smallest to the largest normal number.

    Args:
        A: Matrix or batch of matrices, shape (..., m, n), any unit, any floating dtype, finite.
        rank: Number r of triples, a count >= 1. At most min(m, n) are returned.
        oversampling: Extra columns p of the sketch, a count >= 0. 5 to 10 are usual; the bound needs 2.
        power_iterations: Applications q of A Aᵀ, a count >= 0. Each costs 4 m n (r + p) flops and takes a
            (2q+1)-th root of the excess error; 0 is enough for a steeply decaying spectrum.
        generator: Source of the sketch, on any device. None: a private generator with a constant seed. The global
            generator is never used. All matrices of a batch share one draw, so a batch gives what its members give.

    Returns:
        U (..., m, k), S (..., k), Vh (..., k, n) with k = min(rank, m, n). The zero matrix gives S = 0 with U and Vh
        orthonormal (columns of the identity up to sign), the same at every call. Beyond the rank of ``A`` the
        singular values are rounding noise and the vectors any orthonormal completion.

    Raises:
        TypeError: ``A`` is no tensor.
        ValueError: ``A`` has less than two dimensions, is empty, complex, not floating point or not finite, or a
            count is out of range.

    Example:
        >>> import torch
        >>> from gradsub.linalg import randomized_svd
        >>> A = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1e-3, 1e-3, 1e-3]))
        >>> U, S, Vh = randomized_svd(A, 3, oversampling=1)
        >>> U.shape, Vh.shape
        (torch.Size([6, 3]), torch.Size([3, 6]))
        >>> [round(s, 4) for s in S.tolist()]
        [8.0, 4.0, 2.0]
        >>> bool((A - U * S @ Vh).abs().max() < 2e-3)
        True

    References:
        Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 2011, arXiv 0909.4061, Algorithms
        4.4 and 5.1; the bounds are its Corollary 10.10 and Theorem 9.3.
    """
    check_format("A", A)
    check_count("rank", rank, at_least=1)
    check_count("oversampling", oversampling, at_least=0)
    check_count("power_iterations", power_iterations, at_least=0)
    result = _randomized_svd_unchecked(
        A, rank, oversampling=oversampling, power_iterations=power_iterations, generator=generator
    )
    check_finite_through(result.S, "A", A)
    return result


def _randomized_svd_unchecked(
    A: Tensor,
    rank: int,
    *,
    oversampling: int = 8,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
) -> SVDResult:
    """`randomized_svd` without looking at the values: NaN or Inf in ``A`` gives NaN."""
    with full_precision(A.device):
        A = widen(A)
        rank = min(rank, A.shape[-2], A.shape[-1])
        if exact_is_cheaper(A, rank, oversampling, power_iterations):
            U, S, V = exact_svd(A)
        elif A.shape[-2] >= A.shape[-1]:
            U, S, V = _tall_svd(A, rank + oversampling, power_iterations, generator)
        else:
            V, S, U = _tall_svd(A.mT, rank + oversampling, power_iterations, generator)
        return SVDResult(U[..., :rank], S[..., :rank], V[..., :rank].mT)


def _tall_svd(
    A: Tensor, size: int, power_iterations: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., m, size), S (..., size), V (..., n, size) of a tall A (..., m, n)."""
    Y, unit = sketch(A, size, power_iterations, generator)
    Q = torch.linalg.qr(Y).Q
    V, S, U = thin_svd(multiply(A.mT, Q / unit))
    return product(Q, U), S * unit.squeeze(-1), V
