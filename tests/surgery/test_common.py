"""What every method promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsub.surgery import cagrad, mgda

from ._samplers import EPS, METHODS, WHERE_ALL_ARE_ZERO, dtypes, few, gradients, names, scales, seeds, tasks
from ._waiting import NothingIsRead


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_like_the_gramian(name, dtype, device):
    J = gradients(3, 3).to(device).requires_grad_()
    G = (J @ J.mT).to(dtype)
    weights = METHODS[name](G)
    assert weights.shape == (3,)
    assert weights.dtype == dtype
    assert weights.device == G.device
    assert not weights.requires_grad
    assert (weights >= 0).all()
    expected = METHODS[name]((J @ J.mT).detach())
    torch.testing.assert_close(weights.double(), expected, rtol=0.1 if dtype.itemsize == 2 else 1e-4, atol=1e-2)


@few
@given(data=st.data(), name=names, K=tasks, scale=scales, dtype=dtypes, seed=seeds)
def test_weights_do_not_depend_on_the_scale(data, name, K, scale, dtype, seed):
    J = gradients(K, data.draw(st.integers(1, K)), seed=seed)
    # A power of two is exact in both formats, so the two Gramians differ in nothing else.
    scale = 2.0 ** torch.tensor(scale).log2().round().item()
    G = (J @ J.mT).to(dtype)
    weights = METHODS[name](G)
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(METHODS[name](scale**2 * G), weights, rtol=1e-5, atol=1e-6)


@few
@given(name=names, K=tasks, dtype=dtypes, seed=seeds)
def test_tasks_of_very_different_size_are_told_apart(name, K, dtype, seed):
    J = gradients(K, K, seed=seed, scale=1e-6, spread=1e12)
    weights = METHODS[name]((J @ J.mT).to(dtype))
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()


@few
@given(data=st.data(), name=names, K=st.integers(1, 5), dtype=dtypes, seed=seeds)
def test_an_absent_task_changes_nothing(data, name, K, dtype, seed):
    J = gradients(K, data.draw(st.integers(1, K)), seed=seed)
    places = sorted(data.draw(st.sets(st.integers(0, K + 1), min_size=K, max_size=K)))
    with_absent = torch.zeros(K + 2, 9, dtype=torch.float64)
    with_absent[places] = J
    weights = METHODS[name]((with_absent @ with_absent.mT).to(dtype))
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(weights[places], METHODS[name]((J @ J.mT).to(dtype)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_gramian(name, dtype):
    expected = torch.full((3,), WHERE_ALL_ARE_ZERO[name], dtype=dtype)
    torch.testing.assert_close(METHODS[name](torch.zeros(3, 3, dtype=dtype)), expected)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("square", [1e-24, 1.0, 1e24])
def test_one_task(name, square):
    # c |g_0| further along the only gradient.
    expected = 1.5 if name == "cagrad" else 1.0
    torch.testing.assert_close(METHODS[name](torch.tensor([[square]])), torch.tensor([expected]))


@few
@given(data=st.data(), name=names, K=tasks, seed=seeds)
def test_renaming_the_tasks_renames_the_weights(data, name, K, seed):
    J = gradients(K, K, seed=seed)
    if name in ("pcgrad", "gradvac", "GradVac"):
        # The cyclic order of meetings follows rotations; two tasks have no order.
        shift = data.draw(st.integers(0, K - 1))
        permutation = torch.arange(K).roll(shift)
    else:
        permutation = torch.tensor(data.draw(st.permutations(range(K))))
    renamed = J[permutation]
    torch.testing.assert_close(
        METHODS[name](renamed @ renamed.mT), METHODS[name](J @ J.mT)[permutation], rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sum"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (2, 2)])
def test_what_is_not_finite_is_not_hidden(name, value, place):
    J = gradients(3, 3)
    G = J @ J.mT
    G[place] = G[place[::-1]] = value
    assert METHODS[name](G).isnan().all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        (torch.ones(3), r"shape \(K, K\).*\(3,\): pass J @ J.T"),
        (torch.ones(2, 3), r"shape \(K, K\).*\(2, 3\)"),
        (torch.ones(1, 2, 2), r"shape \(K, K\)"),
        (torch.ones(0, 0), "K >= 1"),
        (torch.ones(2, 2, dtype=torch.int64), "floating point, got torch.int64: use gramian.float"),
        (torch.ones(2, 2, dtype=torch.complex64), "real and floating point"),
        ([[1.0]], "must be a torch.Tensor, got list"),
    ],
)
def test_errors_name_value_and_remedy(name, gramian, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name](gramian)


def test_a_common_factor_of_rounding_size_does_not_hurt():
    # Rounding makes a Gramian of parallel gradients indefinite.
    J = torch.tensor([[1.0], [1.0 + 1e-7], [-1e-3]], dtype=torch.float32)
    G = J @ J.mT
    G[0, 1] = G[1, 0] = G[0, 1] * (1 + 4 * EPS[torch.float32])
    for method in (mgda, cagrad):
        assert torch.isfinite(method(G)).all()
    assert abs((mgda(G) @ J).item()) < 1e-5


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"mgda", "cagrad"}))  # which go there as a whole, and say so
def test_nothing_is_read_on_the_host(name):
    J = gradients(4, 4)
    G = J @ J.mT
    with NothingIsRead():
        METHODS[name](G)
    with pytest.raises(AssertionError, match="waits for the device"), NothingIsRead():
        float(G.sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["sum", "pcgrad", "gradvac", "GradVac", "upgrad"])
def test_nothing_waits_for_the_device(name):
    J = gradients(4, 4).to("cuda")
    G = J @ J.mT
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        METHODS[name](G)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
