import math

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsub.linalg import subspace_angles

from ._samplers import gaussian, of_rank, orthonormal, scales, seeds


@settings(max_examples=60, deadline=None, derandomize=True)
@given(d=st.integers(1, 30), a=st.integers(1, 30), b=st.integers(1, 30), scale=scales, seed=seeds)
def test_parity_with_scipy(d, a, b, scale, seed):
    A, B = gaussian(d, min(a, d), seed=seed) * scale, gaussian(d, min(b, d), seed=seed + 1)
    expected = torch.from_numpy(scipy.linalg.subspace_angles(A.numpy(), B.numpy()).copy())
    # SciPy takes some small angles from the cosine (its mask is in the other order), which is good to sqrt(eps) only.
    torch.testing.assert_close(subspace_angles(A, B), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(2, 5), (5, 2), (3, 3)])
def test_dependent_columns_count_once_as_in_scipy(rank_a, rank_b):
    A, B = of_rank(20, 8, rank_a, seed=1), of_rank(20, 6, rank_b, seed=2)
    expected = torch.from_numpy(scipy.linalg.subspace_angles(A.numpy(), B.numpy()).copy())
    found = subspace_angles(A, B)
    assert found.shape == (min(rank_a, rank_b),)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-3, 0.5, math.pi / 4, 1.5, math.pi / 2 - 1e-3, math.pi / 2])
def test_known_angles_are_resolved_in_every_range(angle, dtype, device):
    # Two planes of R^4 that share no axis: one angle is `angle`, the other half of it.
    A = torch.eye(4, 2, dtype=dtype, device=device)
    angles = torch.tensor([angle, angle / 2], dtype=torch.float64)
    B = torch.cat([torch.diag(angles.cos()), torch.diag(angles.sin())]).to(device=device, dtype=dtype)
    found = subspace_angles(A, B)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double().cpu(), angles, rtol=1e-5, atol=3 * torch.finfo(dtype).eps)


def test_angles_do_not_depend_on_the_basis_nor_on_the_order():
    A, B = gaussian(12, 3, seed=1), gaussian(12, 5, seed=2)
    found = subspace_angles(A, B)
    torch.testing.assert_close(subspace_angles(B, A), found)
    torch.testing.assert_close(subspace_angles(A @ gaussian(3, 3, seed=3), B * 1e9), found, rtol=1e-6, atol=1e-9)


def test_batch_equals_loop_and_broadcasts(device):
    A, B = gaussian(3, 2, 10, 4, seed=1).to(device), gaussian(2, 10, 3, seed=2).to(device)
    found = subspace_angles(A, B)
    assert found.shape == (3, 2, 3)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(found[i, j], subspace_angles(A[i, j], B[j]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    A, B = gaussian(12, 3, seed=1).to(dtype), gaussian(12, 3, seed=2).to(dtype)
    found = subspace_angles(A, B)
    assert found.dtype == torch.float32
    assert torch.equal(found, subspace_angles(A.float(), B.float()))


GOOD = orthonormal(4, 2)


@pytest.mark.parametrize(
    ("A", "B", "message"),
    [
        (torch.full((4, 2), torch.nan), GOOD, "A must be finite"),
        (GOOD, torch.full((4, 2), torch.inf), "B must be finite"),
        (torch.zeros(4, 0), GOOD, "A must not be empty"),
        (GOOD, torch.zeros(4), "B must have at least 2 dimensions"),
        (GOOD, torch.zeros(4, 2, dtype=torch.complex64), "B must be real"),
        (GOOD, torch.zeros(4, 2), "B must span a space, got a zero matrix"),
        (GOOD, orthonormal(5, 2), r"same number of rows, got shapes \(4, 2\) and \(5, 2\)"),
        (GOOD, torch.stack([torch.eye(4, 2), torch.ones(4, 2)]), "B must have one rank over its batch, .* 1 to 2"),
    ],
)
def test_wrong_input_is_named(A, B, message):
    with pytest.raises(ValueError, match=message):
        subspace_angles(A, B)
