import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsub.linalg import randomized_svd, range_finder

from ._samplers import (
    EPS,
    assert_orthonormal,
    dtypes,
    gaussian,
    generator,
    hmt_spectral_bound,
    of_rank,
    orthonormal,
    scales,
    seeds,
    sizes,
    with_spectrum,
)

SHAPES = [(60, 60), (90, 40), (40, 90)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(m=sizes, n=sizes, rank=st.integers(1, 40), true_rank=sizes, scale=scales, dtype=dtypes, seed=seeds)
def test_known_rank_is_recovered_at_every_shape_and_scale(m, n, rank, true_rank, scale, dtype, seed):
    true_rank = min(true_rank, m, n)
    A = of_rank(m, n, true_rank, seed=seed, scale=scale, dtype=dtype)
    U, S, Vh = randomized_svd(A, rank, oversampling=4, generator=generator(seed))

    k = min(rank, m, n)
    assert U.shape == (m, k)
    assert S.shape == (k,)
    assert Vh.shape == (k, n)
    assert U.dtype == S.dtype == Vh.dtype == dtype
    assert_orthonormal(U)
    assert_orthonormal(Vh.mT)
    assert (S >= 0).all()
    assert (S.diff() <= 0).all()
    if rank >= true_rank:
        tolerance = 100 * EPS[dtype]
        expected = torch.zeros(k, dtype=torch.float64)
        expected[:true_rank] = torch.logspace(0, -1, true_rank, dtype=torch.float64)
        torch.testing.assert_close(S.double() / scale, expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(((U * S) @ Vh) / scale, A / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("power_iterations", [0, 1, 2])
def test_error_obeys_halko_martinsson_tropp(m, n, power_iterations, device):
    # Corollary 10.10 bounds the expectation of the error of the basis; truncation adds at most sigma_(r+1) (Theorem
    # 9.3, Section 9.4). 20 draws estimate the expectation.
    rank, oversampling = 8, 4
    spectrum = torch.arange(1, 41, dtype=torch.float64) ** -0.5
    A = with_spectrum(m, n, spectrum).to(device)
    errors = []
    for seed in range(20):
        U, S, Vh = randomized_svd(
            A, rank, oversampling=oversampling, power_iterations=power_iterations, generator=generator(seed)
        )
        errors.append(float(torch.linalg.matrix_norm(A - (U * S) @ Vh, 2)))
    bound = hmt_spectral_bound(spectrum, rank, oversampling, power_iterations) + float(spectrum[rank])
    assert sum(errors) / len(errors) <= bound
    assert min(errors) >= spectrum[rank] * (1 - 1e-9), "no rank-r matrix is closer than Eckart and Young allow"


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_near_optimal_with_the_defaults(m, n, dtype, device):
    spectrum = torch.arange(1, 41, dtype=torch.float64) ** -1.0
    A = with_spectrum(m, n, spectrum, dtype=dtype).to(device)
    U, S, Vh = randomized_svd(A, 10)
    error = torch.linalg.matrix_norm(A - (U * S) @ Vh)
    assert error <= 1.01 * spectrum[10:].norm()
    torch.testing.assert_close(S.double().cpu(), spectrum[:10], rtol=1e-2, atol=0)


def test_power_iterations_reduce_the_error():
    A = with_spectrum(80, 80, torch.arange(1, 81, dtype=torch.float64) ** -0.3)
    errors = []
    for q in range(4):
        U, S, Vh = randomized_svd(A, 8, oversampling=2, power_iterations=q)
        errors.append(float(torch.linalg.matrix_norm(A - (U * S) @ Vh)))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.97 * errors[0]


def test_orthonormalising_between_applications_keeps_small_directions():
    # Without it, 5 products in float32 raise the ratio 1e-3 to 1e-15 and the second direction drowns in rounding.
    A = with_spectrum(64, 64, torch.tensor([1.0, 1e-3, 1e-4]), dtype=torch.float32)
    _, S, _ = randomized_svd(A, 3, oversampling=4, power_iterations=4)
    torch.testing.assert_close(S, torch.tensor([1.0, 1e-3, 1e-4]), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("m", "n"), [(30, 30), (50, 20), (20, 50), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("rank", [1, 15, 1000])
def test_is_exact_where_the_sketch_covers_the_matrix(m, n, rank, device):
    A = gaussian(m, n).to(device)
    U, S, Vh = randomized_svd(A, rank, oversampling=50)
    k = min(rank, m, n)
    U_full, S_full, Vh_full = torch.linalg.svd(A, full_matrices=False)
    torch.testing.assert_close(S, S_full[:k], rtol=1e-12, atol=0)
    signs = (U * U_full[:, :k]).sum(0).sign()
    torch.testing.assert_close(U * signs, U_full[:, :k], rtol=0, atol=1e-11)
    torch.testing.assert_close(signs.unsqueeze(-1) * Vh, Vh_full[:k], rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e-12, 1e12, 1e20, 1e37])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_float32_scale_only_scales_the_singular_values(m, n, scale):
    # A power of two, so that scaling A is exact: the result must then be the same to the last bits.
    scale = 2.0 ** round(torch.log2(torch.tensor(scale, dtype=torch.float64)).item())
    A = gaussian(m, n, dtype=torch.float32)
    U, S, Vh = randomized_svd(A, 6)
    U_scaled, S_scaled, Vh_scaled = randomized_svd(A * scale, 6)
    torch.testing.assert_close(S_scaled / scale, S, rtol=1e-5, atol=0)
    torch.testing.assert_close(U_scaled, U, rtol=0, atol=1e-4)
    torch.testing.assert_close(Vh_scaled, Vh, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("rank", [5, 40])
def test_zero_matrix_has_a_defined_answer(m, n, rank, device):
    A = torch.zeros(m, n, device=device)
    U, S, Vh = randomized_svd(A, rank)
    assert torch.equal(S, torch.zeros(rank, device=device))
    torch.testing.assert_close(U.abs(), torch.eye(m, rank, device=device))
    torch.testing.assert_close(Vh.abs(), torch.eye(rank, n, device=device))
    again = randomized_svd(A, rank, generator=generator(5))
    assert torch.equal(again.U, U)


@pytest.mark.parametrize("rank", [3, 20])
@pytest.mark.parametrize(("m", "n"), [(30, 20), (20, 30)])
def test_batch_equals_loop(m, n, rank, device):
    A = gaussian(2, 3, m, n).to(device) * torch.tensor([1e-20, 1.0, 1e20], device=device).view(3, 1, 1)
    U, S, Vh = randomized_svd(A, rank, oversampling=2, generator=generator(3))
    assert U.shape == (2, 3, m, rank)
    assert S.shape == (2, 3, rank)
    assert Vh.shape == (2, 3, rank, n)
    for i in range(2):
        for j in range(3):
            alone = randomized_svd(A[i, j], rank, oversampling=2, generator=generator(3))
            torch.testing.assert_close(S[i, j], alone.S, rtol=1e-10, atol=0)
            torch.testing.assert_close(U[i, j], alone.U, rtol=0, atol=1e-9)
            torch.testing.assert_close(Vh[i, j], alone.Vh, rtol=0, atol=1e-9)


def test_generator_decides_the_result(device):
    A = gaussian(50, 50).to(device)

    def draw(source: torch.Generator | None) -> torch.Tensor:
        return randomized_svd(A, 4, oversampling=1, power_iterations=0, generator=source).U

    assert torch.equal(draw(generator(1)), draw(generator(1)))
    assert torch.equal(draw(None), draw(None))
    assert not torch.equal(draw(generator(1)), draw(generator(2)))
    source = generator(1)
    first = draw(source)
    assert not torch.equal(first, draw(source)), "a generator that is passed twice goes on"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("oversampling", [4, 100])
def test_half_precision_is_computed_in_float32(dtype, oversampling, device):
    A = gaussian(40, 30).to(device=device, dtype=dtype)
    half = randomized_svd(A, 5, oversampling=oversampling)
    wide = randomized_svd(A.float(), 5, oversampling=oversampling)
    for found, expected in zip(half, wide, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_autocast_does_not_reach_the_computation(device):
    A = gaussian(60, 60, dtype=torch.float32).to(device)
    expected = randomized_svd(A, 8)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = randomized_svd(A, 8)
    assert_orthonormal(found.U)
    assert torch.equal(found.U, expected.U)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_does_not_reach_the_computation_and_is_restored(precision, device):
    A = gaussian(300, 300, dtype=torch.float32).to(device)
    expected = randomized_svd(A, 8)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = randomized_svd(A, 8)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert_orthonormal(found.U)
    torch.testing.assert_close(found.S, expected.S, rtol=1e-6, atol=0)


def test_input_is_neither_changed_nor_tracked():
    A = gaussian(20, 20).requires_grad_()
    before = A.detach().clone()
    U, S, Vh = randomized_svd(A, 3)
    assert torch.equal(A, before)
    assert not any(factor.requires_grad for factor in (U, S, Vh))


@pytest.mark.parametrize("oversampling", [2, 100])
def test_strides_do_not_matter(oversampling):
    A = gaussian(40, 60)
    views = [
        A.mT.contiguous().mT,
        gaussian(80, 120).copy_(A.repeat(2, 2))[:40, :60],
        A.repeat_interleave(2, -1)[:, ::2],
    ]
    expected = randomized_svd(A, 5, oversampling=oversampling)
    for view in views:
        found = randomized_svd(view, 5, oversampling=oversampling)
        torch.testing.assert_close(found.U, expected.U, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.Vh, expected.Vh, rtol=0, atol=1e-9)


@pytest.mark.parametrize("oversampling", [0, 8])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_range_finder_spans_the_range(m, n, oversampling, device):
    spectrum = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 1e-7, 1e-7], dtype=torch.float64)
    A = with_spectrum(m, n, spectrum).to(device)
    Q = range_finder(A, 5, oversampling=oversampling)
    assert Q.shape == (m, 5)
    assert_orthonormal(Q)
    assert torch.linalg.matrix_norm(A - Q @ (Q.mT @ A), 2) <= 1.1e-7


def test_range_finder_orders_its_columns_and_agrees_with_the_svd():
    A = with_spectrum(70, 50, 2.0 ** -torch.arange(40, dtype=torch.float64))
    Q = range_finder(A, 6)
    U = torch.linalg.svd(A, full_matrices=False).U[:, :6]
    torch.testing.assert_close((Q.mT @ U).abs(), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("m", "n"), [(4, 9), (9, 4)])
def test_range_finder_returns_no_more_columns_than_there_are(m, n):
    A = gaussian(2, m, n)
    Q = range_finder(A, 6)
    assert Q.shape == (2, m, 4)
    assert_orthonormal(Q)
    torch.testing.assert_close(Q @ (Q.mT @ A), A, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [randomized_svd, range_finder])
@pytest.mark.parametrize(
    ("A", "message"),
    [
        (torch.full((3, 3), torch.nan), r"A must be finite, got an entry nan.*nan_to_num"),
        (torch.tensor([[1.0, -torch.inf]]), r"A must be finite, got an entry inf"),
        (torch.zeros(0, 3), r"A must not be empty, got shape \(0, 3\)"),
        (torch.zeros(0, 3, 3), r"A must not be empty, got shape \(0, 3, 3\)"),
        (torch.zeros(3), r"A must have at least 2 dimensions .* got shape \(3,\): reshape"),
        (torch.zeros(3, 3, dtype=torch.complex64), r"A must be real, got torch.complex64: pass"),
        (torch.zeros(3, 3, dtype=torch.int64), r"A must be float64, .* got torch.int64: use A.float"),
    ],
)
def test_wrong_matrices_are_named(function, A, message):
    with pytest.raises(ValueError, match=message):
        function(A, 1)


@pytest.mark.parametrize("function", [randomized_svd, range_finder])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be an int >= 1, got 0: pass 1 or more"),
        ({"rank": -3}, "rank must be an int >= 1, got -3"),
        ({"rank": 2.0}, "rank must be an int >= 1, got 2.0"),
        ({"rank": True}, "rank must be an int >= 1, got True"),
        ({"rank": 1, "oversampling": -1}, "oversampling must be an int >= 0, got -1"),
        ({"rank": 1, "power_iterations": -1}, "power_iterations must be an int >= 0, got -1"),
    ],
)
def test_wrong_counts_are_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(torch.eye(3), **arguments)


def test_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match=r"A must be a torch\.Tensor, got list"):
        randomized_svd([[1.0]], 1)


@pytest.mark.parametrize("rank", [3, 20])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_unchecked_twin_passes_nan_on(rank, bad):
    from gradsub.linalg._randomized_svd import _randomized_svd_unchecked

    A = gaussian(30, 20, dtype=torch.float32)
    A[4, 5] = bad
    for result in _randomized_svd_unchecked(A, rank):
        assert result.isnan().all()


def test_samplers_have_the_spectrum_they_promise():
    spectrum = torch.tensor([3.0, 2.0, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(with_spectrum(9, 7, spectrum))[:3], spectrum)
    assert int(torch.linalg.matrix_rank(of_rank(9, 7, 4, scale=1e-12))) == 4
    assert_orthonormal(orthonormal(9, 4))


@pytest.mark.parametrize(("m", "n"), [(60, 40), (40, 60)])
def test_from_three_quarters_of_all_directions_on_it_is_exact(m, n, device):
    A = gaussian(m, n, seed=3, dtype=torch.float64).to(device)
    exact = torch.linalg.svdvals(A)

    def off(rank, **options):
        return float((randomized_svd(A, rank, **options).S - exact[:rank]).abs().max())

    assert off(22) < 1e-12  # 22 + 8 is 3/4 of 40
    assert off(21) > 1e-6
    assert off(22, power_iterations=0) > 1e-3
    assert off(30, oversampling=0) > 1e-6
    assert off(40, oversampling=0, power_iterations=0) < 1e-12
