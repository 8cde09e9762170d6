"""Statistics under a memory budget: the error bound, the order of the data, parity, and what it takes to keep going."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import IncrementalPCA
from torch import Tensor

from gradsub import NullSpace
from gradsub.linalg import subspace_angles
from gradsub.null_space._sketch import Sketch

CPU = torch.device("cpu")
quick = settings(max_examples=15, deadline=None)

seeds = st.integers(0, 2**16)
dtypes = st.sampled_from([torch.float32, torch.float64])
decays = st.sampled_from([0.0, 0.5, 1.0, 3.0])
batches = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices this small are decomposed faster by one thread than by several that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def features(rows: int, dimension: int, decay: float, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gaussian rows whose j-th direction has standard deviation j^-decay, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)).Q
    scales = torch.arange(1, dimension + 1, dtype=torch.float64) ** -decay
    return (torch.randn(rows, dimension, generator=generator, dtype=torch.float64) * scales @ basis.mT).to(dtype)


def sketched(parts: list[Tensor], capacity: int) -> Sketch:
    sketch = Sketch(capacity, parts[0].shape[1], parts[0].dtype, CPU)
    for part in parts:
        sketch.add(part)
    return sketch


def rounding(A: Tensor) -> float:
    return 100 * torch.finfo(A.dtype).eps * float(A.double().square().sum())


def assert_bounded(sketch: Sketch, A: Tensor, least_kept: int) -> None:
    """0 <= C - Ĉ <= error I, and the error is at most tail_k / (l + 1 - k) for every k <= l."""
    count, slack = A.shape[0], rounding(A) / A.shape[0]
    C = A.double().mT @ A.double() / count
    spectrum = sketch.spectrum()
    gap = torch.linalg.eigvalsh(C - spectrum.vectors * spectrum.eigenvalues @ spectrum.vectors.mT)
    assert gap[0] >= -slack
    assert gap[-1] <= spectrum.error + slack
    eigenvalues = torch.linalg.eigvalsh(C).flip(0).clamp_min(0)
    for k in range(min(least_kept, C.shape[0]) + 1):
        assert spectrum.error <= eigenvalues[k:].sum() / (least_kept + 1 - k) + slack
    assert spectrum.energy == pytest.approx(float(C.trace()), rel=1e-5)
    assert sketch.count == count


@quick
@given(batches, st.integers(1, 24), st.integers(2, 40), decays, dtypes, seeds)
def test_error_bound_holds_for_any_division_into_batches(sizes, dimension, capacity, decay, dtype, seed):
    A = features(sum(sizes), dimension, decay, seed, dtype)
    assert_bounded(sketched(list(A.split(sizes)), capacity), A, capacity // 2)


@quick
@given(batches, st.integers(1, 24), st.integers(2, 30), st.integers(2, 30), decays, dtypes, seeds)
def test_error_bound_holds_for_merged_sketches(sizes, dimension, one, two, decay, dtype, seed):
    A = features(2 * sum(sizes), dimension, decay, seed, dtype)
    here, there = A.chunk(2)
    merged, other = sketched(list(here.split(sizes)), one), sketched(list(there.split(sizes)), two)
    before = other.tensor
    merged.merge(other)
    assert_bounded(merged, A, min(one, two) // 2)
    assert torch.equal(other.tensor, before)


@quick
@given(st.integers(1, 10), decays, dtypes, seeds)
def test_features_of_low_rank_are_held_exactly(rank, decay, dtype, seed):
    A = (features(200, rank, decay, seed) @ features(rank, 24, 0.0, seed + 1)).to(dtype)
    sketch = sketched(list(A.split(17)), 20)
    slack = rounding(A) / 200
    assert sketch.error <= slack
    C = A.double().mT @ A.double() / 200
    spectrum = sketch.spectrum()
    assert torch.linalg.matrix_norm(C - spectrum.vectors * spectrum.eigenvalues @ spectrum.vectors.mT, 2) <= slack


@quick
@given(decays, dtypes, seeds)
def test_any_order_gives_the_same_space_within_the_bound(decay, dtype, seed):
    A = features(300, 20, decay, seed, dtype)
    A[:, 0] *= 30  # a gap behind the first direction
    shuffled = A[torch.randperm(300, generator=torch.Generator().manual_seed(seed))]
    first, second = (sketched(list(rows.split(13)), 16) for rows in (A, shuffled))
    eigenvalues, vectors = torch.linalg.eigh(A.double().mT @ A.double() / 300)
    for sketch in (first, second):
        sine = subspace_angles(sketch.spectrum().vectors[:, :1], vectors[:, -1:]).sin()
        # Davis and Kahan's theorem, with the sketch's eigenvalues below the true ones.
        assert sine <= (sketch.error + rounding(A) / 300) / (eigenvalues[-1] - eigenvalues[-2])


@quick
@given(batches, seeds)
def test_order_of_updates_changes_exact_statistics_by_rounding_only(sizes, seed):
    parts = list(features(sum(sizes), 12, 1.0, seed).split(sizes))
    forward, backward = NullSpace(energy=0.9), NullSpace(energy=0.9)
    for one, other in zip(parts, parts[::-1], strict=True):
        forward.update("layer", one)
        backward.update("layer", other)
    torch.testing.assert_close(forward.eigenvalues("layer"), backward.eigenvalues("layer"), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("budget", [None, 40 * 32 * 8])
def test_parity_with_incremental_pca_and_exact_eigenvectors(budget):
    A = features(600, 64, 1.5, seed=3)
    A -= A.mean(0)  # IncrementalPCA centres, the second moment does not
    null_space = NullSpace(max_rank=4, layer_memory_budget=budget)
    for part in A.split(100):
        null_space.update("layer", part)
    pca = IncrementalPCA(n_components=20 if budget else 64, batch_size=100).fit(A.numpy())
    variances = torch.from_numpy(pca.singular_values_**2 / 600)[:4]
    directions = torch.from_numpy(pca.components_[:4]).mT
    exact, vectors = torch.linalg.eigh(A.mT @ A / 600)
    exact, vectors = exact.flip(0), vectors.flip(1)
    basis, found = null_space.basis("layer", torch.float64), null_space.eigenvalues("layer")
    error = null_space.error_bound("layer")
    assert (error > 0) == (budget is not None)
    assert ((exact[:4] - found[:4]) >= -1e-10).all()
    assert ((exact[:4] - found[:4]) <= error + 1e-10).all()
    torch.testing.assert_close(found[:4], variances, rtol=1e-8, atol=error)
    allowed = 1e-8 if budget is None else float(torch.asin(error / (exact[3] - exact[4])))
    assert subspace_angles(basis, vectors[:, :4])[0] <= allowed
    assert subspace_angles(basis, directions)[0] <= (1e-7 if budget is None else 2 * allowed)


@quick
@given(st.integers(64, 4000), st.integers(1, 16), batches, dtypes, seeds)
def test_statistics_stay_within_the_budget(budget, dimension, sizes, dtype, seed):
    null_space = NullSpace(max_rank=1, layer_memory_budget=budget)
    parts = features(sum(sizes), dimension, 1.0, seed, dtype).split(sizes)
    exact = 8 * dimension**2 <= budget
    if not exact and budget < 2 * dimension * dtype.itemsize:
        with pytest.raises(ValueError, match=f"layer_memory_budget={budget} must hold at least two rows"):
            null_space.update("layer", parts[0])
        assert "layer" not in null_space
        return
    for part in parts:
        null_space.update("layer", part)
        statistics = null_space._statistics("layer")
        assert statistics.nbytes <= budget
        assert statistics.kind == ("exact" if exact else "sketch")


@quick
@given(st.floats(0.05, 1.0), decays, dtypes, seeds)
def test_energy_is_a_share_of_the_true_energy(energy, decay, dtype, seed):
    A = features(150, 24, decay, seed, dtype)
    null_space = NullSpace(energy=energy, layer_memory_budget=16 * 24 * dtype.itemsize)
    null_space.update("layer", A)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        K = null_space.basis("layer", torch.float64)
    held = float((A.double() @ K).square().sum() / A.double().square().sum())
    assert caught or held >= energy - 1e-6
    torch.testing.assert_close(K.mT @ K, torch.eye(K.shape[1], dtype=K.dtype), rtol=0, atol=1e-12)
    assert null_space._protection("layer").energy <= held + 1e-6


@quick
@given(st.floats(0.01, 2.0), decays, seeds)
def test_threshold_takes_every_direction_that_may_reach_it(threshold, decay, seed):
    A = features(150, 24, decay, seed)
    null_space = NullSpace(threshold=threshold, layer_memory_budget=20 * 24 * 8)
    null_space.update("layer", A)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = null_space.basis("layer").shape[1]
    assert bool(caught) == (null_space.error_bound("layer") >= threshold)
    if not caught:
        assert count >= int((torch.linalg.eigvalsh(A.mT @ A / 150) >= threshold).sum())


@pytest.mark.parametrize("criterion", [{"energy": 0.9}, {"threshold": 1e-3}, {"max_rank": 30}])
def test_too_small_a_sketch_warns_once_and_protects_what_it_holds(criterion):
    null_space = NullSpace(**criterion, layer_memory_budget=8 * 40 * 8)
    null_space.update("trunk.0", features(200, 40, 0.0, seed=0))
    with pytest.warns(UserWarning, match=r"sketch of 'trunk\.0' is too small for .*Raise the budget"):
        assert 4 <= null_space.basis("trunk.0").shape[1] <= 8
    null_space.update("trunk.0", features(200, 40, 0.0, seed=1))
    assert null_space.basis("trunk.0").shape[1] <= 8


def test_sketch_that_suffices_does_not_warn():
    null_space = NullSpace(energy=0.9, layer_memory_budget=30 * 40 * 8)
    null_space.update("layer", features(500, 40, 2.0, seed=0))
    assert null_space.error_bound("layer") > 0
    assert null_space.basis("layer").shape[1] < 15


def test_features_beyond_the_range_of_the_sketch_are_refused():
    null_space = NullSpace(layer_memory_budget=8 * 40 * 4)
    null_space.update("layer", features(20, 40, 0.0, seed=0, dtype=torch.float32))
    before, version = null_space._statistics("layer").tensor, null_space.version("layer")
    with pytest.raises(ValueError, match="exceed the range"):
        null_space.update("layer", torch.full((2, 40), 1e300, dtype=torch.float64))
    assert torch.equal(null_space._statistics("layer").tensor, before)
    assert null_space.version("layer") == version


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_narrow_features_are_kept_in_float32(dtype):
    null_space = NullSpace(max_rank=2, layer_memory_budget=8 * 40 * 8)
    null_space.update("layer", features(60, 40, 1.0, seed=0, dtype=dtype))
    expected = torch.promote_types(dtype, torch.float32)
    assert null_space._statistics("layer").tensor.dtype == expected
    K = null_space.basis("layer", torch.float64)
    torch.testing.assert_close(K.mT @ K, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("budget", [None, 16 * 24 * 4])
def test_save_and_load_go_on_exactly(tmp_path, budget):
    kept = NullSpace(side="output", max_rank=5, layer_memory_budget=budget)
    parts = features(90, 24, 1.0, seed=5, dtype=torch.float32).split(15)
    for part in parts[:4]:
        kept.update("layer", part)
    kept.save(tmp_path / "statistics.safetensors")
    loaded = NullSpace.load(tmp_path / "statistics.safetensors")
    assert repr(loaded) == repr(kept)
    for part in parts[4:]:
        kept.update("layer", part)
        loaded.update("layer", part)
    assert torch.equal(loaded.eigenvalues("layer"), kept.eigenvalues("layer"))
    assert torch.equal(loaded.basis("layer"), kept.basis("layer"))
    assert loaded.error_bound("layer") == kept.error_bound("layer")
    assert loaded.version("layer") == kept.version("layer") == 6


def test_kind_of_a_newer_version_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "statistics.safetensors"
    save_file(
        {"layer": torch.zeros(1)}, path, {"format": "gradsub.NullSpace", "statistics": '{"layer": {"kind": "other"}}'}
    )
    with pytest.raises(ValueError, match="kind 'other'"):
        NullSpace.load(path)


@pytest.mark.parametrize("budget", [0, -5])
def test_budget_must_be_positive(budget):
    with pytest.raises(ValueError, match="layer_memory_budget"):
        NullSpace(layer_memory_budget=budget)


def test_zero_features_protect_nothing():
    null_space = NullSpace(layer_memory_budget=8 * 40 * 4)
    null_space.update("layer", torch.zeros(30, 40))
    assert null_space.basis("layer").shape == (40, 0)
    assert math.isfinite(null_space.error_bound("layer"))
