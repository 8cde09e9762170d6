"""The same batch in another order gives the same weights: no step is made along coordinates that are rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradsub import GemsOptimizer
from gradsub._rounding import drop_rounding
from gradsub.linalg._room import Room
from gradsub.subspace import Layer
from gradsub.subspace._basis import dominant_basis, project, sketched_basis

M, N, RANK = 32, 48, 16


def train(rows, turned, device, tasks=1, passes=1, base=torch.optim.AdamW, outside=False, repeat=False, **options):
    """The weight after 20 steps, and how it moved; ``turned``: each batch's rows in the opposite order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M, bias=False)).to(device)
    start = model[0].weight.detach().clone()
    if options.get("capture") != "generic":
        options["model"] = model
    names = [f"task{k}" for k in range(tasks)]
    optimizer = GemsOptimizer(base(model.parameters(), lr=1e-3), tasks=names, rank=RANK, **options)
    for step in range(20):
        draws = torch.Generator().manual_seed(0 if repeat else step)

        def backward(draws=draws):
            x, y = torch.randn(rows, N, generator=draws).to(device), torch.randn(rows, M, generator=draws).to(device)
            if turned:
                x, y = x.flip(0), y.flip(0)
            (model(x) - y).square().mean().backward()

        for name in names:
            for _ in range(passes):
                with optimizer.task(name):
                    backward()
        if outside:
            backward()
        optimizer.step()
        optimizer.zero_grad()
    return model[0].weight.detach(), model[0].weight.detach() - start


def difference(rows, device, **options):
    """Between the two orders, relative to the movement."""
    (first, moved), (second, _) = (train(rows, turned, device, **options) for turned in (False, True))
    return float((first - second).norm() / moved.norm())


@pytest.mark.parametrize("rows", [2, 8, 24])
@pytest.mark.parametrize("capture", ["fused", "generic"])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_either_side_refresh_and_capture(side, refresh, capture, rows, device):
    assert difference(rows, device, side=side, refresh=refresh, capture=capture) < 1e-5


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("capture", ["fused", "generic"])
@pytest.mark.parametrize(
    "options",
    [
        {"tasks": 2},
        {"tasks": 3, "orthogonalize": "shared_first"},
        {"passes": 2},
        {"outside": True},
        {"repeat": True},
        {"surgery": "pcgrad", "tasks": 2},
        {"update_proj_gap": 3},
        {"base": torch.optim.RMSprop},
        {"base": torch.optim.Adamax},
        {"base": torch.optim.Rprop},
        {"base": torch.optim.NAdam, "repeat": True},
    ],
    ids=str,
)
def test_tasks_passes_and_base_optimizers(options, capture, rows, device):
    assert difference(rows, device, capture=capture, refresh="svd", **options) < 1e-5


@pytest.mark.filterwarnings("ignore:.* none of them a task:UserWarning")
def test_gradients_from_outside_alone(device):
    assert difference(2, device, tasks=1, passes=0, outside=True, capture="generic", refresh="svd") < 1e-5


def layer_of(shape, axis, device, dtype):
    return Layer("w", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)), 0, axis, (RANK,))


def basis_of(gradient, axis, rank, refresh, dtype):
    generator = torch.Generator(gradient.device).manual_seed(5)
    if refresh == "svd":
        return dominant_basis(gradient, rank, axis, Room(), gradient.shape[axis], generator)[0]
    Y = gradient.mT if axis == 1 else gradient
    return sketched_basis(Y[None], None, rank, Room(), generator)[0][0]


@given(
    shape=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    spectrum=st.lists(st.sampled_from([1.0, 1e-1, 1e-2, 1e-4]), min_size=1, max_size=6),
    axis=st.sampled_from([0, 1]),
    refresh=st.sampled_from(["svd", "sketch"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-25, 1.0, 1e25]),
)
def test_what_lies_beyond_the_rank_goes_and_small_directions_stay(shape, spectrum, axis, refresh, dtype, scale, device):
    draws = torch.Generator().manual_seed(shape[0])

    def orthonormal(rows):
        return torch.linalg.qr(torch.randn(rows, len(spectrum), generator=draws, dtype=torch.float64)).Q

    # The largest first, so that the columns of the basis are known by it.
    exact = orthonormal(shape[0]) * torch.tensor(sorted(spectrum, reverse=True), dtype=torch.float64)
    gradient = (scale * exact @ orthonormal(shape[1]).mT).to(device, dtype)
    basis = basis_of(gradient, axis, RANK, refresh, dtype)
    R = project(gradient, basis, axis)[None].contiguous()
    before = R.clone()
    drop_rounding(R, layer_of(shape, axis, device, dtype), 0.0, None)
    columns = R[0] if axis == 1 else R[0].mT
    lost = torch.linalg.norm((R - before)[0] / scale) / torch.linalg.norm(before[0] / scale)
    assert lost < (1e-5 if dtype == torch.float32 else 1e-13)
    # Orthogonal iterations of a sketch may miss directions below sqrt(eps): they are in the columns drawn at random.
    if refresh == "svd" or min(spectrum) > 1e-3:
        assert not columns[:, len(spectrum) :].any()
        kept = (columns[:, : len(spectrum)] != 0).double().mean(0)
        assert kept.min() > 0.8, "a small direction was taken for rounding"


def test_a_graded_spectrum_is_followed_to_its_end(device):
    spectrum = (1.0, 1e-2, 1e-4)
    U, V = (torch.linalg.qr(torch.randn(size, 3)).Q.to(device) for size in (M, N))
    weight = nn.Parameter(torch.zeros(M, N, device=device))
    optimizer = GemsOptimizer(torch.optim.Adam([weight], lr=1.0), tasks=("a",), rank=8, gate="uniform")
    with optimizer.task("a"):
        (weight * (U * torch.tensor(spectrum, device=device) @ V.mT)).sum().backward()
    optimizer.step()
    along = (weight.detach() @ V).norm(dim=0)
    assert (along > 0.5 * along.max()).all(), "Adam moves as far along a small direction as along a large one"
    assert (weight.detach() - weight.detach() @ V @ V.mT).norm() < 1e-2 * weight.norm()


@pytest.mark.parametrize("capture", ["fused", "generic"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_what_a_bare_optimizer_leaves_alone_stays(side, capture, device):
    """Two groups of outputs that see two groups of inputs: the gradient of the others' weights is exactly zero.

    The gradient's singular values are well apart, so that each direction is known up to rounding.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M, bias=False)).to(device)
    start = model[0].weight.detach().clone()
    options = {"model": model} if capture == "fused" else {}
    base = torch.optim.Adam(model.parameters(), lr=1e-2)
    optimizer = GemsOptimizer(base, tasks=("a",), rank=RANK, side=side, capture=capture, refresh="svd", **options)
    scales = 3.0 ** -torch.arange(3)[:, None]
    x, y = torch.zeros(6, N), torch.zeros(6, M)
    x[:3, : N // 2], x[3:, N // 2 :] = (torch.linalg.qr(torch.randn(N // 2, 3)).Q.mT for _ in range(2))
    y[:3, : M // 2], y[3:, M // 2 :] = (scales * torch.linalg.qr(torch.randn(M // 2, 3)).Q.mT for _ in range(2))
    y[3:] *= 0.6
    x, y = x.to(device), y.to(device)
    for _ in range(3):
        with optimizer.task("a"):
            (model(x) * y).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (model[0].weight.detach() - start).abs()
    off = torch.cat([moved[: M // 2, N // 2 :].flatten(), moved[M // 2 :, : N // 2].flatten()])
    assert off.max() < 1e-4 * moved.max()


@pytest.mark.parametrize("capture", ["fused", "generic"])
def test_in_bfloat16_rounding_is_larger(capture, device):
    """Coordinates of x V beyond the rank are 1e-3 of the others there; the update has the gradient's rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M, bias=False)).to(device)
    options = {"model": model} if capture == "fused" else {}
    if capture == "generic":
        model.to(torch.bfloat16)
    base = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    with torch.no_grad():
        x, y = torch.randn(3, N, device=device), torch.randn(3, M, device=device)
    optimizer = GemsOptimizer(
        base, tasks=("a",), rank=RANK, capture=capture, refresh="svd", master_weights=capture == "generic", **options
    )
    for _ in range(4):
        with optimizer.task("a"):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=capture == "fused"):
                output = model(x.to(model[0].weight.dtype))
            (output.float() * y).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moments = optimizer.state[model[0].weight]["inner.shared.momentum_buffer"]
    used = (moments.abs().amax(0) > 0).sum()
    assert used <= 2 * 3, "more directions than the gradients have"


def test_a_coordinate_that_is_zero_now_keeps_its_moments(device):
    model = nn.Sequential(nn.Linear(N, M, bias=False)).to(device)
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = GemsOptimizer(base, tasks=("a",), rank=8, model=model, refresh="svd")
    state = optimizer.state[model[0].weight]
    x = torch.randn(6, N, device=device)
    for rows in (6, 1):
        before = {key: state[f"inner.shared.{key}"].clone() for key in ("exp_avg", "exp_avg_sq")}
        start = model[0].weight.detach().clone()
        with optimizer.task("a"):
            model(x[:rows]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    V = state["basis"][:, :8]
    beyond = (x[:1] @ V).abs().flatten() < 1e-5 * (x[:1] @ V).abs().max()
    # Beyond the first gradient's rank of 6 there was nothing, and there is nothing now.
    assert beyond.sum() <= 2
    assert not state["inner.shared.exp_avg"][:, beyond].any()
    assert not torch.equal(model[0].weight, start)
    # A gradient of zeros leaves the base optimizer's own decay.
    before = state["inner.shared.exp_avg"].clone()
    with optimizer.task("a"):
        (model(x) * 0).sum().backward()
    optimizer.step()
    torch.testing.assert_close(state["inner.shared.exp_avg"], before * 0.9)
