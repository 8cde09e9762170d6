import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsub.linalg import orthonormalize, subspace_angles

from ._samplers import EPS, assert_orthonormal, dtypes, gaussian, generator, of_rank, orthonormal, scales, seeds


def assert_orthogonal(K, Q):
    # The unit: one product of two unit vectors of length d in floating point.
    assert (K.mT @ Q).abs().max() <= 10 * EPS[Q.dtype]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data(), d=st.integers(1, 40), scale=scales, dtype=dtypes, seed=seeds)
def test_always_as_many_orthonormal_columns_as_asked_for(data, d, scale, dtype, seed):
    k = data.draw(st.integers(0, d - 1))
    c = data.draw(st.integers(1, d - k))
    rank = data.draw(st.integers(0, c))
    K = orthonormal(d, k, seed=seed, dtype=dtype) if k else None
    Y = of_rank(d, c, rank, seed=seed + 1, scale=scale, dtype=dtype) if rank else torch.zeros(d, c, dtype=dtype)
    Q = orthonormalize(Y, against=K, generator=generator(seed))
    assert Q.shape == (d, c)
    assert Q.dtype == dtype
    assert_orthonormal(Q)
    if K is not None:
        assert_orthogonal(K, Q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [0, 1, 30])
def test_columns_keep_their_order_and_sign(dtype, k, device):
    d, c = 50, 12
    K = orthonormal(d, k, seed=1, dtype=dtype).to(device) if k else None
    Y = gaussian(d, c, seed=2, dtype=dtype).to(device)
    Q = orthonormalize(Y, against=K)
    outside = Y if K is None else Y - K @ (K.mT @ Y)
    # Gram-Schmidt, written plainly in float64, is the definition.
    expected = []
    for y in outside.double().mT:
        for q in expected * 2:
            y = y - (q @ y) * q
        expected.append(y / y.norm())
    torch.testing.assert_close(Q.double(), torch.stack(expected, -1), rtol=0, atol=1e3 * EPS[dtype])


def test_first_column_is_parallel_to_the_first_column():
    Y = gaussian(40, 5, seed=3, dtype=torch.float32)
    Y[:, 1] = -2 * Y[:, 0]
    Q = orthonormalize(Y)
    torch.testing.assert_close(Q[:, 0], Y[:, 0] / Y[:, 0].norm(), rtol=0, atol=1e-6)


def test_orthonormal_input_comes_back():
    K = orthonormal(30, 10, dtype=torch.float32)
    torch.testing.assert_close(orthonormalize(K[:, 4:], against=K[:, :4]), K[:, 4:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twice_is_enough_for_columns_almost_inside_the_avoided_space(dtype, device):
    # What is left of such a column is 1e-3 of it: one projection leaves 1e3 eps of K in the normalised result.
    K = orthonormal(200, 50, seed=1, dtype=dtype).to(device)
    inside = K @ gaussian(50, 8, seed=2, dtype=dtype).to(device)
    Y = inside + 1e-3 * gaussian(200, 8, seed=3, dtype=dtype).to(device)
    Q = orthonormalize(Y, against=K)
    assert_orthogonal(K, Q)
    assert_orthonormal(Q)
    single = torch.linalg.qr(Y - K @ (K.mT @ Y)).Q
    assert (K.mT @ single).abs().max() > 10 * EPS[dtype], "the case is too easy to test anything"


def test_columns_that_cancel_to_noise_leave_nothing_inside_the_avoided_space():
    # The noise left of such a column lies mostly inside K, which is nearly everything here: projecting it out once
    # leaves an error relative to what is removed, 30 to 300 eps of the normalised rest.
    for seed in range(10):
        basis = orthonormal(300, 300, seed=seed)
        K, complement = basis[:, :290].float(), basis[:, 290:]
        B = complement @ gaussian(10, 10, seed=seed + 100)
        Y = B.clone()
        Y[:, 1] = B[:, 0] + 1e-4 * B[:, 1]
        Y[:, 2] = 1e4 * (Y[:, 1] - Y[:, 0]) + 1e-4 * B[:, 2]
        Y[:, 5] = Y[:, 3] + 1e-4 * Y[:, 4]
        Y[:, 6] = Y[:, 5] - Y[:, 3]
        Q = orthonormalize(Y.float(), against=K)
        assert_orthonormal(Q)
        assert (K.mT @ Q).abs().max() <= 40 * EPS[torch.float32]  # 33 on one processor, below 25 on another


def test_columns_inside_the_avoided_space_become_random_directions():
    K = orthonormal(20, 5, seed=1)
    Y = torch.cat([K @ gaussian(5, 3, seed=2), gaussian(20, 2, seed=3)], -1)
    one, other = (orthonormalize(Y, against=K, generator=generator(seed)) for seed in (1, 2))
    for Q in (one, other):
        assert_orthonormal(Q)
        assert_orthogonal(K, Q)
        own = Y[:, 3:] - K @ (K.mT @ Y[:, 3:])
        torch.testing.assert_close(Q @ (Q.mT @ own), own)
    assert subspace_angles(one[:, :3], other[:, :3]).max() > 0.1, "replacements must come from the generator"
    assert torch.equal(one, orthonormalize(Y, against=K, generator=generator(1)))


def test_a_dependent_column_costs_the_later_ones_nothing():
    # Plain QR completes the second column with e2 by accident and would then throw the third one away.
    e = torch.eye(6)
    Q = orthonormalize(torch.stack([e[0], e[0], e[1], e[2]], -1))
    assert_orthonormal(Q)
    for direction in e[:3]:
        torch.testing.assert_close(Q @ (Q.mT @ direction), direction, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rank=st.integers(1, 10), k=st.integers(0, 15), dtype=dtypes, seed=seeds)
def test_result_spans_a_rank_deficient_input(rank, k, dtype, seed):
    K = orthonormal(40, k, seed=seed, dtype=dtype) if k else None
    Y = of_rank(40, 10, rank, seed=seed + 1, dtype=dtype)
    Q = orthonormalize(Y, against=K)
    outside = Y if K is None else Y - K @ (K.mT @ Y)
    torch.testing.assert_close(Q @ (Q.mT @ outside), outside, rtol=0, atol=200 * EPS[dtype])


def test_the_whole_complement_can_be_asked_for(device):
    K = orthonormal(300, 280, seed=1, dtype=torch.float32).to(device)
    for Y in (torch.zeros(300, 20), torch.ones(300, 20), gaussian(300, 20, dtype=torch.float32)):
        Q = orthonormalize(Y.to(device), against=K)
        assert_orthonormal(torch.cat([K, Q], -1), factor=50)


@pytest.mark.parametrize("c", [1, 4, 7])
def test_a_space_drawn_with_the_same_seed_can_be_avoided(c):
    first = orthonormalize(torch.zeros(40, c), generator=generator(1))
    second = orthonormalize(torch.zeros(40, c), against=first, generator=generator(1))
    both = torch.cat([first, second], -1)
    assert_orthonormal(both)
    third = orthonormalize(torch.zeros(40, c), against=both, generator=generator(1))
    assert_orthonormal(torch.cat([both, third], -1))


def test_columns_of_very_different_size_are_all_directions():
    Y = gaussian(30, 4, dtype=torch.float32) * torch.tensor([1e-30, 1e30, 1.0, 1e-12])
    Q = orthonormalize(Y)
    for j in range(4):
        y = Y[:, j].double()
        y = y / y.norm()
        assert (Q[:, : j + 1].double().mT @ y).norm() > 1 - 1e-6


def test_the_unchecked_twin_takes_zero_columns_to_avoid():
    K = torch.zeros(10, 9, dtype=torch.float64)
    K[:, :4] = orthonormal(10, 4)
    Q = _unchecked(gaussian(10, 6, seed=3), against=K)
    assert_orthonormal(Q)
    assert_orthogonal(K, Q)


def test_empty_against_avoids_nothing():
    Y = gaussian(10, 3)
    assert torch.equal(_unchecked(Y, against=torch.zeros(10, 0)), orthonormalize(Y))


@pytest.mark.parametrize("batched_against", [True, False])
def test_batch_equals_loop(batched_against, device):
    Y = gaussian(3, 20, 4, seed=1).to(device)
    Y[1, :, 2] = 0
    K = orthonormal(20, 5, seed=2).to(device)
    K = torch.stack([K, K.flip(0), -K]) if batched_against else K
    found = orthonormalize(Y, against=K, generator=generator(4))
    for i in range(3):
        alone = orthonormalize(Y[i], against=K[i] if batched_against else K, generator=generator(4))
        torch.testing.assert_close(found[i], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    Y, K = gaussian(20, 3, seed=1).to(dtype), orthonormal(20, 4, dtype=torch.float32)
    Q = orthonormalize(Y, against=K)
    assert Q.dtype == torch.float32
    assert torch.equal(Q, orthonormalize(Y.float(), against=K))


def test_autocast_does_not_reach_the_computation(device):
    Y, K = gaussian(60, 8, dtype=torch.float32).to(device), orthonormal(60, 20, dtype=torch.float32).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        Q = orthonormalize(Y, against=K)
    assert_orthogonal(K, Q)


def _unchecked(Y, against):
    from gradsub.linalg._orthonormal import _orthonormalize_unchecked
    from gradsub.linalg._room import Room

    return _orthonormalize_unchecked(Y, Room(against))


def test_the_unchecked_twin_passes_nan_on():
    Y = gaussian(10, 3)
    Y[2, 1] = torch.nan
    assert _unchecked(Y, against=orthonormal(10, 2)).isnan().any()


def test_the_unchecked_twin_never_waits_for_the_device(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("read a value of a tensor on the host")

    Y, K = gaussian(20, 6), orthonormal(20, 5)
    Y[:, 2] = 0
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    _unchecked(Y, against=K)


@pytest.mark.parametrize(
    ("Y", "against", "message"),
    [
        (torch.full((4, 2), torch.nan), None, "Y must be finite"),
        (torch.eye(4, 2), torch.full((4, 1), torch.inf), "against must be finite"),
        (torch.zeros(4, 0), None, "Y must not be empty"),
        (torch.zeros(4), None, "Y must have at least 2 dimensions"),
        (torch.zeros(4, 2, dtype=torch.complex64), None, "Y must be real"),
        (torch.eye(4, 2), torch.eye(5, 1), r"as many rows as Y, got shapes \(5, 1\) and \(4, 2\)"),
        (torch.zeros(4, 5), None, "at most 4 columns, got 5: 4 rows less 0 columns"),
        (torch.zeros(4, 2), torch.eye(4, 3), "at most 1 columns, got 2: 4 rows less 3 columns of against leave 1"),
    ],
)
def test_wrong_input_is_named(Y, against, message):
    with pytest.raises(ValueError, match=message):
        orthonormalize(Y, against=against)
