"""The incremental covariance, against the exact one."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import TruncatedSVD

from gradsub import NullSpace


def features(rows: int, width: int, rank: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Decaying spectrum, and a mean that a centred analysis would remove."""
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((rows, rank)) + 1.0
    right = np.diag(0.6 ** np.arange(rank)) @ rng.standard_normal((rank, width))
    return torch.from_numpy(left @ right * scale)


def projector(null_space: NullSpace, name: str = "layer") -> np.ndarray:
    basis = null_space.basis(name, torch.float64).cpu().numpy()
    return basis @ basis.T


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 12),
    rank=st.integers(1, 12),
    exponent=st.integers(-12, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    energy=st.floats(0.05, 1.0),
)
def test_the_basis_is_orthonormal_and_holds_the_energy(rows, width, rank, exponent, dtype, energy):
    data = features(rows, width, rank, 10.0**exponent, seed=rows * 13 + width).to(dtype)
    null_space = NullSpace(energy=energy)
    null_space.update("layer", data)
    basis = null_space.basis("layer", torch.float64).numpy()
    assert basis.shape[0] == width
    assert 1 <= basis.shape[1] <= min(rows, width, rank)
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-10)
    whole = float(data.double().square().sum())
    assert float(np.sum((data.double().numpy() @ basis) ** 2)) >= energy * whole * (1 - 1e-6)
    if basis.shape[1] > 1:  # one direction fewer would not do
        fewer = basis[:, :-1]
        assert float(np.sum((data.double().numpy() @ fewer) ** 2)) < energy * whole * (1 + 1e-6)


@given(
    cuts=st.lists(st.integers(1, 59), max_size=6, unique=True),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_pieces_in_any_order_are_the_whole(cuts, order, dtype):
    data = features(60, 9, 9).to(dtype)
    whole, pieces = NullSpace(max_rank=4), NullSpace(max_rank=4)
    whole.update("layer", data)
    parts = list(torch.tensor_split(data, sorted(cuts)))
    order.shuffle(parts)
    for part in parts:
        pieces.update("layer", part)
    np.testing.assert_allclose(projector(pieces), projector(whole), atol=1e-6)
    torch.testing.assert_close(pieces.eigenvalues("layer"), whole.eigenvalues("layer"), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_parity_with_exact_eigenvectors(scale):
    data = features(200, 10, 10, scale).numpy()
    null_space = NullSpace(max_rank=3)
    null_space.update("layer", torch.from_numpy(data))
    values, vectors = scipy.linalg.eigh(data.T @ data / len(data))
    np.testing.assert_allclose(
        null_space.eigenvalues("layer").numpy(), values[::-1], rtol=1e-7, atol=1e-12 * values[-1]
    )
    basis = null_space.basis("layer", torch.float64).numpy()
    np.testing.assert_allclose(np.abs(np.sum(basis * vectors[:, ::-1][:, :3], axis=0)), 1.0, atol=1e-9)


def test_parity_with_sklearns_uncentred_decomposition():
    """TruncatedSVD, not PCA: the mean of the inputs is a direction to protect, too."""
    data = features(300, 12, 12, seed=3)
    null_space = NullSpace(max_rank=4)
    for part in data.split(64):
        null_space.update("layer", part)
    reference = TruncatedSVD(n_components=4, algorithm="arpack", random_state=0).fit(data.numpy())
    expected = reference.components_.T @ reference.components_
    np.testing.assert_allclose(projector(null_space), expected, atol=1e-8)
    np.testing.assert_allclose(
        null_space.eigenvalues("layer")[:4].numpy(), reference.singular_values_**2 / len(data), rtol=1e-8
    )


def test_weak_directions_of_float32_features_are_found():
    """A float32 covariance squares the condition number away: 1e-5 of the largest would drown in its rounding."""
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    spectrum = np.array([1.0, 0.5, 1e-2, 1e-3, 1e-5, 0.0])
    rows = np.random.default_rng(1).standard_normal((500, 6)) * spectrum @ rotation.T
    null_space = NullSpace(max_rank=5)
    null_space.update("layer", torch.from_numpy(rows).float())
    left_out = rotation[:, 5]
    assert np.linalg.norm(projector(null_space) @ left_out) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_any_floating_dtype_and_any_leading_shape(device, dtype):
    data = features(48, 6, 6).to(device, dtype)
    flat, shaped = NullSpace(max_rank=2), NullSpace(max_rank=2)
    flat.update("layer", data)
    shaped.update("layer", data.view(2, 4, 6, 6))
    np.testing.assert_allclose(projector(flat), projector(shaped), atol=1e-12)
    np.testing.assert_allclose(projector(flat), projector_of(data), atol=1e-6)
    assert flat.basis("layer").dtype == torch.float32
    assert flat.basis("layer", torch.bfloat16).dtype == torch.bfloat16


def projector_of(data: torch.Tensor, rank: int = 2) -> np.ndarray:
    right = np.linalg.svd(data.double().cpu().numpy(), full_matrices=False)[2][:rank]
    return right.T @ right


def test_rank_deficient_features_protect_no_noise():
    """Fewer rows than directions: whatever is asked for, only what was seen is protected."""
    for options in ({"energy": 1.0}, {"max_rank": 9}, {"threshold": 1e-30}):
        null_space = NullSpace(**options)
        null_space.update("layer", features(50, 10, 3))
        assert null_space.basis("layer").shape == (10, 3)
        assert null_space.protected_fraction("layer") == 0.3


def test_zero_features_protect_nothing():
    for options in ({}, {"energy": 1.0}, {"max_rank": 2}, {"threshold": 1e-3}):
        null_space = NullSpace(**options)
        null_space.update("layer", torch.zeros(5, 4))
        assert null_space.basis("layer").shape == (4, 0)
        assert null_space.protected_fraction("layer") == 0.0


def test_updates_count_after_a_basis_was_asked_for():
    null_space = NullSpace(energy=1.0)
    null_space.update("layer", torch.eye(4)[:1])
    assert null_space.basis("layer").shape == (4, 1)
    null_space.update("layer", torch.eye(4)[1:2])
    assert null_space.basis("layer").shape == (4, 2)


def test_features_are_not_kept_or_changed():
    data = features(10, 4, 4).float().requires_grad_()
    before = data.detach().clone()
    null_space = NullSpace(max_rank=1)
    null_space.update("layer", data)
    data.data.zero_()
    np.testing.assert_allclose(projector(null_space), projector_of(before, 1), atol=1e-6)
    assert not null_space.basis("layer").requires_grad


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(4), r"features of 'layer' must be \(N, d\) and not empty, found \(4,\)"),
        (torch.zeros(0, 4), r"found \(0, 4\)"),
        (torch.zeros(3, 5), "features of 'layer' have width 5, but the layer had 4 before"),
        (torch.full((3, 4), torch.nan), "features of 'layer' hold NaN or Inf"),
        (torch.full((3, 4), torch.inf), "features of 'layer' hold NaN or Inf"),
        (torch.zeros(3, 4, dtype=torch.complex64), "features of 'layer' are complex"),
    ],
    ids=["1-D", "empty", "width", "NaN", "Inf", "complex"],
)
def test_bad_features_are_refused_and_leave_the_statistics(data, message):
    null_space = NullSpace()
    null_space.update("layer", torch.eye(4))
    before = null_space.eigenvalues("layer").clone()
    with pytest.raises(ValueError, match=message):
        null_space.update("layer", data)
    assert torch.equal(before, null_space.eigenvalues("layer"))


def test_a_layer_never_seen_lists_those_that_were():
    null_space = NullSpace()
    null_space.update("query", torch.eye(3))
    assert "query" in null_space
    assert "key" not in null_space
    assert (len(null_space), list(null_space)) == (1, ["query"])
    for ask in (null_space.basis, null_space.eigenvalues, null_space.protected_fraction):
        with pytest.raises(KeyError, match=r"'key'; there are \['query'\]"):
            ask("key")


def test_what_is_kept_may_lie_on_another_device(device):
    data = features(40, 8, 8).float()
    null_space = NullSpace(energy=0.8)
    null_space.update("layer", data[:20].to(device))
    kept = null_space.basis("layer").cpu()
    null_space.update("layer", data[20:].to(device))
    found = null_space.extended("layer", kept)
    assert found.device == kept.device
    torch.testing.assert_close(found[:, : kept.shape[1]], kept)
    torch.testing.assert_close(found.mT @ found, torch.eye(found.shape[1]), atol=1e-5, rtol=0)
