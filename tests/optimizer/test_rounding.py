"""Beyond the rank of a gradient no direction is chosen by rounding: bases do not depend on how it was summed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsub.linalg._orthonormal import complement_of
from gradsub.linalg._room import Room
from gradsub.subspace._basis import dominant_basis, sketched_basis


def of_svd(gradient, width, room, free):
    generator = torch.Generator().manual_seed(5)
    return dominant_basis(gradient[None], width, 0, room, free, generator)[0][0]


def of_sketch(gradient, width, room, free):
    generator = torch.Generator().manual_seed(5)
    return sketched_basis(gradient[None], None, width, room, generator)[0][0]


def outside(K):
    return Room(None if K is None else K[None])


def inside(K):
    """The same room by what K leaves, and as blocks hold it: a column of zeros stands where another layer has more."""
    if K is None:
        return Room()
    free = complement_of(K)
    return Room(within=torch.cat([free, free.new_zeros(len(free), 1)], dim=1)[None])


@pytest.mark.parametrize("room_of", [outside, inside])
@pytest.mark.parametrize("basis_of", [of_svd, of_sketch])
@given(
    d=st.integers(7, 40),
    spectrum=st.sampled_from([(1.0,), (1.0, 1.0, 1.0), (1.0, 3e-3), (1.0, 1e-3), (1.0, 0.5, 0.1, 0.01, 0.003)]),
    protected=st.integers(0, 2),
    within=st.sampled_from([1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    ulps=st.integers(1, 9),
)
def test_a_basis_wider_than_the_rank(basis_of, room_of, d, spectrum, protected, within, dtype, scale, ulps):
    draws = torch.Generator().manual_seed(d)
    rank, eps = min(len(spectrum), d - protected - 2), torch.finfo(dtype).eps

    def orthonormal(rows, columns):
        return torch.linalg.qr(torch.randn(rows, columns, generator=draws, dtype=dtype)).Q

    K = orthonormal(d, protected) if protected else None
    gradient = orthonormal(d, rank) * torch.tensor(spectrum[:rank], dtype=dtype) @ orthonormal(d, rank).mT
    if K is not None:  # a part that vanishes in the complement of K
        gradient = gradient + K @ (within * torch.randn(protected, d, generator=draws, dtype=dtype))
    gradient = scale * gradient
    width = rank + 2
    first, second = (
        basis_of(matrix, width, room_of(K), d - protected) for matrix in (gradient, gradient * (1 + ulps * eps))
    )
    lost = within if protected else 1.0
    tolerance = 200 * eps * lost
    torch.testing.assert_close(first.mT @ first, torch.eye(width, dtype=dtype), rtol=0, atol=200 * eps)
    left = gradient if K is None else gradient - K @ (K.mT @ gradient)
    torch.testing.assert_close(first @ (first.mT @ left), left, rtol=0, atol=tolerance * scale)
    # The direction of the smallest singular value is known so much less precisely than that of the largest.
    tolerance /= spectrum[rank - 1]
    torch.testing.assert_close(first @ first.mT, second @ second.mT, rtol=0, atol=tolerance)
