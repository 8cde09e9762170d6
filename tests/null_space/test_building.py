"""Statistics in float32 products, decompositions in float32, the smaller form, and few rows: as good as in float64."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsub import NullSpace
from gradsub.null_space._covariance import NARROWEST_SINGLE, Covariance


def features(width: int, rows: int, *, decay: float = 0.7, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Rotated, with a decaying spectrum and a mean, as those of language models."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64) * torch.arange(1, width + 1) ** -decay + 0.05
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return (x @ rotation * scale).float()


def exact(x: Tensor) -> Tensor:
    x = x.double()
    return x.mT @ x / len(x)


def held(K: Tensor, C: Tensor) -> float:
    K = K.to(C)
    return float((K.mT @ C @ K).trace() / C.trace())


@given(
    width=st.sampled_from([NARROWEST_SINGLE, 300, 577]),
    rows=st.sampled_from([1, 40, 700, 2500]),
    exponent=st.sampled_from([-60, -25, -3, 0, 4, 25, 60]),
    decay=st.floats(0.0, 3.0),
)
@settings(max_examples=25, deadline=None)
def test_products_of_float32_differ_by_rounding_only(width, rows, exponent, decay):
    """By less than 2e-6 of sqrt(C_ii C_jj), so that weak features beside strong ones are as exact as these."""
    x = features(width, rows, decay=decay) * 2.0**exponent
    null_space = NullSpace(energy=0.97)
    for part in x.split(900):
        null_space.update("layer", part)
    statistics = null_space._statistics("layer")
    assert isinstance(statistics, Covariance)
    assert statistics.single
    C = exact(x)
    sizes = C.diagonal().sqrt()
    off = (statistics.tensor / len(x) - C) / (sizes[:, None] * sizes).clamp_min(1e-300)
    assert float(off.abs().max()) < 2e-6
    assert torch.equal(statistics.tensor, statistics.tensor.mT)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.97, 0.999])
@pytest.mark.parametrize("rows", [50, 150, 4000])
@pytest.mark.parametrize("decay", [0.3, 1.0, 2.5])
def test_the_guarantee_is_that_of_float64(device, energy, rows, decay):
    """As many directions, of which an error of 1e-6 of the energy may move one; they hold the energy asked for."""
    x = features(320, rows, decay=decay).to(device)
    one, precise = NullSpace(energy=energy), NullSpace(energy=energy)
    one.update("layer", x)
    precise.update("layer", x.double() if device.type != "mps" else x)
    C = exact(x.cpu())
    K = one.basis("layer").cpu()
    assert abs(K.shape[1] - precise.basis("layer").shape[1]) <= 1
    assert held(K, C) >= energy - 2e-6
    assert float((K.double().mT @ K.double() - torch.eye(K.shape[1])).abs().max()) < 1e-6
    complement = one.complement("layer").cpu()
    assert complement.shape == (320, 320 - K.shape[1])
    assert float((complement.mT @ K).abs().max()) < 1e-6 if complement.numel() else True


def test_one_direction_far_above_all_others_does_not_drown_them(device):
    """float32 eigenvectors are off by 1e-6 of the largest eigenvalue: where that matters, they are float64."""
    x = features(320, 3000, decay=0.0)
    x[:, 0] += 3000.0
    null_space = NullSpace(energy=0.99999 * 0.999)
    null_space.update("layer", x.to(device))
    C = exact(x)
    values = torch.linalg.eigvalsh(C).flip(0)
    wanted = int((values.cumsum(0) < null_space.criterion.energy * values.sum()).sum()) + 1
    assert abs(null_space.basis("layer").shape[1] - wanted) <= 1


@pytest.mark.parametrize(
    "options", [{"energy": 1.0}, {"max_rank": 20}, {"threshold": 1e-4}, {"energy": 0.9999}], ids=str
)
def test_what_hangs_on_weak_directions_is_float64(options):
    null_space = NullSpace(**options)
    null_space.update("layer", features(300, 500))
    assert not null_space._statistics("layer").single
    assert null_space._protection("layer").held.dtype == torch.float64


@pytest.mark.parametrize("context", ["autocast", "tf32"])
def test_settings_of_the_caller_do_not_reach_the_products(device, context):
    x = features(300, 600).to(device)
    plain, inside = NullSpace(), NullSpace()
    plain.update("layer", x)
    before = torch.get_float32_matmul_precision()
    try:
        if context == "tf32":
            torch.set_float32_matmul_precision("medium")
        with torch.autocast(device.type, torch.bfloat16, enabled=context == "autocast"):
            inside.update("layer", x)
            inside.basis("layer")
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(plain._statistics("layer").tensor, inside._statistics("layer").tensor)
    assert torch.equal(plain.basis("layer"), inside.basis("layer"))


@pytest.mark.parametrize("options", [{"energy": 0.97}, {"energy": 1.0}, {"max_rank": 9}], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_few_rows_are_decomposed_on_their_own_side(options, rows, monkeypatch):
    sizes = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: sizes.append(A.shape[-1]) or eigh(A))
    x = features(300, rows, decay=0.1)
    null_space = NullSpace(**options)
    null_space.update("layer", x)
    K = null_space.basis("layer", torch.float64)
    assert sizes == [rows]
    right = torch.linalg.svd(x.double(), full_matrices=False).Vh[: K.shape[1]].mT
    torch.testing.assert_close(K @ K.mT, right @ right.mT, atol=1e-5, rtol=0)
    if options == {"energy": 1.0}:
        assert K.shape[1] == rows


def test_the_smaller_of_directions_and_complement_is_kept(device):
    null_space = NullSpace(energy=0.97)
    null_space.update("most", features(320, 2000, decay=0.0).to(device))
    null_space.update("few", features(320, 2000, decay=2.0).to(device))
    for name, complementary in (("most", True), ("few", False)):
        K = null_space.basis(name)
        held = null_space._protection(name).held
        assert (2 * K.shape[1] > 320) is complementary
        assert held.shape[1] == min(K.shape[1], 320 - K.shape[1])
        assert held.untyped_storage().nbytes() == held.nbytes  # no view of all eigenvectors


def test_layers_of_one_input_get_one_tensor_that_nobody_keeps_for_them():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = nn.Linear(320, 8), nn.Linear(320, 8)

        def forward(self, x):
            return self.query(x) + self.key(x)

    null_space = NullSpace(energy=0.99).collect(Attention(), [features(320, 2000, decay=0.0)])
    K = null_space.basis("query")
    assert null_space.basis("key") is K
    gone = weakref.ref(K)
    again = K.clone()
    del K
    gc.collect()
    assert gone() is None
    torch.testing.assert_close(null_space.basis("key"), again, atol=1e-6, rtol=0)  # strongest first, as before


def test_group_after_group_gives_the_directions_of_all_at_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 3))
    batches = [torch.randn(40, 12) for _ in range(3)]
    whole = NullSpace(energy=0.9).collect(model, batches)
    parts = NullSpace(energy=0.9).collect(model, batches, layers_at_once=2)
    assert list(parts) == list(whole)
    for name in whole:
        K, other = whole.basis(name), parts.basis(name)
        torch.testing.assert_close(K @ K.mT, other @ other.mT, atol=1e-5, rtol=0)
        assert parts._statistics(name).kind == "directions"
    assert whole.residual_energy(whole) == pytest.approx(parts.residual_energy(whole), abs=1e-5)
    with pytest.raises(ValueError, match="nothing can be added"):
        parts.collect(model, batches)
    for bad in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="layers_at_once="):
            NullSpace().collect(model, batches, layers_at_once=bad)
    with pytest.raises(ValueError, match=r"run through once.*pass a list"):
        NullSpace().collect(model, iter(batches), layers_at_once=1)
