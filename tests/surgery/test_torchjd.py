"""The same values as TorchJD where both have the method, and TorchJD's weightings as surgeries."""

import pytest
import torch

from gradsub.surgery import GradVac, mgda, pcgrad, resolve_surgery, sum_weights, upgrad

from ._samplers import generator, gradients

aggregation = pytest.importorskip("torchjd.aggregation")

SAMPLES = [(K, rank, seed) for K in (1, 2, 3, 5) for rank in {1, 2, K} if rank <= K for seed in range(3)]


def gramian(K, rank, seed):
    J = gradients(K, rank, seed=seed, spread=3.0)
    return J, J @ J.mT


@pytest.mark.parametrize(("K", "rank", "seed"), SAMPLES)
def test_sum(K, rank, seed):
    _, G = gramian(K, rank, seed)
    assert torch.equal(sum_weights(G), aggregation.SumWeighting()(G))


@pytest.mark.parametrize(("K", "rank", "seed"), SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pcgrad_from_the_same_seed(K, rank, seed, dtype):
    J, G = gramian(K, rank, seed)
    G = G.to(dtype)
    with torch.random.fork_rng(devices=[]):  # theirs draws from the global generator
        torch.manual_seed(seed)
        expected = aggregation.PCGradWeighting()(G)
    found = pcgrad(G, generator=generator(seed))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found.double() @ J, expected.double() @ J, rtol=tolerance, atol=tolerance * 3)
    if rank == K:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_gradvac_over_steps_in_the_same_order(K, monkeypatch):
    theirs = aggregation.GradVacWeighting(beta=0.5)
    ours = GradVac(beta=0.5)
    queue = []
    # Theirs asks for a permutation of the others' positions: answer with the cyclic order.
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(queue.pop(0), dtype=torch.int64))
    for step in range(5):
        _, G = gramian(K, K, step)
        for i in range(K):
            others = [j for j in range(K) if j != i]
            queue.append([others.index((i + 1 + t) % K) for t in range(K - 1)])
        torch.testing.assert_close(ours(G), theirs(G), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.targets, theirs._phi_t, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("K", "rank", "seed"), SAMPLES)
def test_mgda_is_where_the_iteration_goes(K, rank, seed):
    J, G = gramian(K, rank, seed)
    theirs = aggregation.MGDAWeighting(epsilon=1e-6, max_iters=2000)(G) @ J
    ours = mgda(G) @ J
    assert ours.norm() <= theirs.norm() + 1e-9
    # Strong convexity: |p - q|^2 <= |q|^2 - |p|^2 for any q of the hull and its shortest point p.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-2)
    assert ((ours - theirs).norm() ** 2) <= theirs.norm() ** 2 - ours.norm() ** 2 + 1e-9
    if K <= 2:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["SumWeighting", "MeanWeighting", "PCGradWeighting", "MGDAWeighting", "GradVacWeighting", "IMTLGWeighting"]
)
def test_their_weightings_are_surgeries(name):
    weighting = getattr(aggregation, name)()
    surgery = resolve_surgery(weighting)
    assert surgery is weighting
    with torch.random.fork_rng(devices=[]):  # some draw from the global generator
        weights = surgery(gramian(3, 3, 0)[1])
    assert weights.shape == (3,)
    assert torch.isfinite(weights).all()


def test_cagrad_where_their_solver_is_installed():
    from gradsub.surgery import cagrad

    try:
        theirs = aggregation.CAGradWeighting(c=0.5)
    except ImportError as missing:
        pytest.skip(f"TorchJD's CAGrad: {missing}")
    for seed in range(10):
        J, G = gramian(3, 3, seed)
        torch.testing.assert_close(cagrad(G, c=0.5) @ J, theirs(G) @ J, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("K", "rank", "seed"), SAMPLES)
def test_upgrad(K, rank, seed):
    pytest.importorskip("quadprog")
    from torchjd.linalg import QuadprogProjector

    J, G = gramian(K, rank, seed)
    # Theirs adds a part of the identity, which changes the weights by as much.
    theirs = aggregation.UPGradWeighting(projector=QuadprogProjector(norm_eps=0.0, reg_eps=1e-12))
    torch.testing.assert_close(upgrad(G) @ J, theirs(G) @ J, rtol=0, atol=1e-6 * float(J.norm(dim=1).max()))
    if rank == K:
        torch.testing.assert_close(upgrad(G), theirs(G), rtol=0, atol=1e-6)
