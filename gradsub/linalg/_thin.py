"""Factorisations of thin matrices (more rows than columns), the only ones a randomized method needs."""

import torch
from torch import Tensor

from ._arithmetic import product


def positive_qr(Y: Tensor) -> Tensor:
    """Orthonormal Q of Y = Q R with diag(R) >= 0: column j of Q points the way column j of Y does."""
    Q, R = torch.linalg.qr(Y)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    signs: Tensor = torch.where(diagonal < 0, -1.0, 1.0).to(Q.dtype).unsqueeze(-2)
    return torch.mul(Q, signs)


def independent_qr(Y: Tensor) -> Tensor:
    """`positive_qr` of columns whose norms are near 1 and that are independent to 1e-6; NaN gives NaN."""
    if not _widens(Y):
        return positive_qr(Y)
    wide = Y.double()
    for _ in range(2):
        wide = product(wide, _inverse(_factor(wide)))
    return wide.to(Y.dtype)


def dominant_eigenvectors(gramian: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Orthonormal columns that approach the leading eigenvectors of Y^T Y (..., c, c), by orthogonal iteration.

    Nothing waits for the device. Columns beyond the rank of ``gramian`` mean nothing, and need not be orthonormal.

    Args:
        gramian: Y^T Y.
        start: (..., c, k), not orthogonal to the eigenvectors.
        iterations: products with the Gramian.
    """
    Z: Tensor
    if not _widens(gramian):
        Z = torch.linalg.qr(start).Q
        for _ in range(iterations):
            Z = torch.linalg.qr(product(gramian, Z)).Q
        return Z
    wide = gramian.double()
    Z = _rotated(start.double())
    for _ in range(iterations):
        Z = _rotated(product(wide, Z))
    return Z.to(gramian.dtype)


def _rotated(Z: Tensor) -> Tensor:
    """The columns made orthonormal, as far as they are independent: close to the eigenvectors they nearly are."""
    norms = torch.linalg.vector_norm(Z, dim=-2, keepdim=True)
    Z = Z / norms.masked_fill(norms == 0, 1)
    return product(Z, _inverse(_factor(Z)))


def added_by_each(Y: Tensor) -> Tensor:
    """What each column has beyond those before it: the absolute diagonal of R of Y = Q R, (..., c)."""
    if _widens(Y):
        return _factor(Y.double()).diagonal(dim1=-2, dim2=-1).to(Y.dtype)
    added: Tensor = torch.linalg.qr(Y, mode="r").R.diagonal(dim1=-2, dim2=-1).abs()
    return added


def _widens(Y: Tensor) -> bool:
    """Whether there is a format with twice the digits, in which the Gramian of ``Y`` says all about it.

    Then Cholesky's decomposition of the Gramian takes the place of Householder's of ``Y``: few products of matrices for
    any number of matrices, where cuSOLVER decomposes one matrix after the other, and nothing waits for the device.
    """
    return Y.dtype == torch.float32 and Y.device.type != "mps"


def _factor(wide: Tensor) -> Tensor:
    """R, upper triangular with a positive diagonal, of Y^T Y = R^T R; entries below its rounding error are kept."""
    gramian = product(wide.mT, wide)
    diagonal = gramian.diagonal(dim1=-2, dim2=-1)
    shift = torch.finfo(wide.dtype).eps * 4 * gramian.shape[-1] * diagonal.amax(-1, keepdim=True)
    diagonal += shift.clamp_min(1e-200)  # of a matrix of zeros: R must have an inverse
    R: Tensor = torch.linalg.cholesky_ex(gramian, upper=True).L
    return R


def _inverse(R: Tensor) -> Tensor:
    identity = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    inverse: Tensor = torch.linalg.solve_triangular(R, identity, upper=True)
    return inverse


def thin_svd(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., m, c), S (..., c), V (..., c, c) with Y = U diag(S) V^T, for Y (..., m, c) with m >= c.

    By QR first: 4 times faster than LAPACK's SVD of a thin matrix. NaN in ``Y`` gives NaN in all three results, where
    torch.linalg.svd raises.
    """
    Q, R = torch.linalg.qr(Y)
    finite = torch.isfinite(R).all(-1, keepdim=True).all(-2, keepdim=True)
    U, S, Vh = torch.linalg.svd(torch.where(finite, R, 0))
    poison = torch.where(finite, 0.0, torch.nan).to(S.dtype)
    return product(Q, U + poison), S + poison.squeeze(-1), Vh.mT + poison
