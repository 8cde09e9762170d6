"""``surgery=``: what conflicting tasks do to the shared step, against a calculation by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from gradsub import GemsOptimizer
from gradsub.surgery import SURGERIES

LR = 0.1


def gradient(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES = (5, 5), (4, 7)


class Two(nn.Module):
    """Two layers, so that a conflict is one of the whole gradient and not of each matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(n, m, bias=False) for m, n in SHAPES)

    @property
    def weights(self) -> list[nn.Parameter]:
        return [self.first.weight, self.second.weight]


def conflicting(K: int) -> list[list[Tensor]]:
    """K gradients for both weights: the second points against the first, the others are at random."""
    found = [[gradient(shape, 10 * k + layer) for layer, shape in enumerate(SHAPES)] for k in range(K)]
    found[1] = [0.7 * second - 1.2 * first for first, second in zip(found[0], found[1], strict=True)]
    return found


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([G.flatten() for G in gradients])


def shared_step(
    surgery, K: int = 2, samples: list[float] | None = None, rank: int = 2, side: str = "output"
) -> tuple[Tensor, Tensor]:
    """What one SGD step with lr 1 subtracts in the shared subspaces, and the weighted projected gradients (K rows).

    The gates leave the tasks' own parts out of the step.
    """
    samples = samples or [1.0] * K
    model = Two()
    before = [weight.detach().clone() for weight in model.weights]
    tasks = tuple(f"task{k}" for k in range(K))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rank >= min(m, n) is meant
        optimizer = GemsOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0),
            tasks=tasks,
            rank=rank,
            side=side,
            model=model,
            surgery=surgery,
            gate=lambda inputs: torch.zeros_like(inputs.gradient_norms),
        )
    for task, count, gradients in zip(tasks, samples, conflicting(K), strict=True):
        with optimizer.task(task, samples=count):
            sum((w * G).sum() for w, G in zip(model.weights, gradients, strict=True)).backward()
    optimizer.step()
    step = flat([b - weight.detach() for weight, b in zip(model.weights, before, strict=True)])

    B = [optimizer.state[w]["basis"][:, : min(rank, *w.shape)] for w in model.weights]
    rows = []
    for count, gradients in zip(samples, conflicting(K), strict=True):
        kept = [G @ b @ b.mT if side == "input" else b @ b.mT @ G for G, b in zip(gradients, B, strict=True)]
        rows.append(flat(kept) * count / sum(samples))
    return step, torch.stack(rows)


@pytest.mark.parametrize("samples", [[1.0, 1.0], [3.0, 2.0]])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("rank", [2, 3])
def test_pcgrad_of_two_tasks_by_hand(side, samples, rank):
    step, (a, b) = shared_step("pcgrad", 2, samples, rank, side)
    assert a @ b < 0
    by_hand = a - (a @ b) / (b @ b) * b + b - (a @ b) / (a @ a) * a
    torch.testing.assert_close(step, by_hand, rtol=1e-4, atol=1e-5)
    assert (step - (a + b)).norm() > 0.1 * (a + b).norm()  # the sum is something else


def test_with_the_whole_space_it_is_pcgrad_of_the_whole_gradients():
    step, projected = shared_step("pcgrad", 2, rank=7)
    a, b = (flat(G) / 2 for G in conflicting(2))
    torch.testing.assert_close(projected, torch.stack([a, b]), rtol=1e-4, atol=1e-5)
    by_hand = a - (a @ b) / (b @ b) * b + b - (a @ b) / (a @ a) * a
    torch.testing.assert_close(step, by_hand, rtol=1e-4, atol=1e-5)


def test_mgda_of_two_tasks_by_hand():
    """The shortest convex combination; neither task's loss rises along it."""
    step, (a, b) = shared_step("mgda")
    share = ((b - a) @ b / (a - b).square().sum()).clamp(0, 1)
    torch.testing.assert_close(step, share * a + (1 - share) * b, rtol=1e-4, atol=1e-5)
    assert step @ a > -1e-5
    assert step @ b > -1e-5


@pytest.mark.parametrize("K", [2, 3])
def test_the_sum_is_the_mean_weighted_by_samples(K):
    step, projected = shared_step("sum", K, [1.0, 2.0, 3.0][:K])
    torch.testing.assert_close(step, projected.sum(0), rtol=1e-4, atol=1e-5)


def run(steps: int, K: int, **options) -> list[Tensor]:
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    tasks = tuple("abcd"[:K])
    optimizer = GemsOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2), tasks=tasks, rank=3, update_proj_gap=3, model=model, **options
    )
    for step in range(steps):
        x = gradient((16, 10), step)
        y = model(x)
        losses = {task: (y - 2 * (-1) ** k * x[:, k : k + 6]).square().mean() for k, task in enumerate(tasks)}
        optimizer.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_sum_takes_the_very_same_steps_as_no_surgery():
    assert all(torch.equal(a, b) for a, b in zip(run(7, 2), run(7, 2, surgery="sum"), strict=True))


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(SURGERIES))
def test_every_method_runs_through_refreshes(name, K):
    found = run(7, K, surgery=name)
    assert all(torch.isfinite(weight).all() for weight in found)
    same = all(torch.equal(a, b) for a, b in zip(found, run(7, K), strict=True))
    # Two windows of DWA are longer than this run; a single loss has an uncertainty, too.
    assert same == (name in ("sum", "dwa") or (K == 1 and name != "uncertainty"))


@pytest.mark.parametrize(
    "name", ["SumWeighting", "MeanWeighting", "PCGradWeighting", "MGDAWeighting", "IMTLGWeighting"]
)
def test_a_weighting_of_torchjd_plugs_in(name):
    aggregation = pytest.importorskip("torchjd.aggregation")
    weighting = getattr(aggregation, name)()

    def seeded(gramian: Tensor) -> Tensor:
        torch.manual_seed(5)  # PCGrad of TorchJD draws its order from the global generator
        return weighting(gramian)

    with torch.random.fork_rng(devices=[]):
        step, projected = shared_step(seeded, 3, [1.0, 2.0, 1.0])
        expected = seeded(projected @ projected.mT) @ projected
    torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-4)


def test_our_methods_are_torchjds():
    aggregation = pytest.importorskip("torchjd.aggregation")
    for ours, theirs in (("pcgrad", aggregation.PCGradWeighting()), ("mgda", aggregation.MGDAWeighting(1e-6, 2000))):
        with torch.random.fork_rng(devices=[]):
            torch.testing.assert_close(shared_step(ours)[0], shared_step(theirs)[0], rtol=1e-3, atol=1e-4)


def test_surgery_acts_on_parameters_without_subspaces_too():
    """Both tasks' gradients of a bias are combined with the same weights as those of the matrices."""
    biases = {}
    for surgery in ("sum", lambda gramian: gramian.new_tensor([2.0, 0.0])):
        model = nn.Linear(8, 6)
        before = model.bias.detach().clone()
        optimizer = GemsOptimizer(
            torch.optim.SGD(model.parameters(), lr=LR), tasks=("a", "b"), rank=2, model=model, surgery=surgery
        )
        for k, task in enumerate("ab"):
            with optimizer.task(task):
                (model(gradient((4, 8), k)) * (k + 1)).sum().backward()
        optimizer.step()
        biases[surgery if surgery == "sum" else "first"] = (model.bias.detach() - before) / -LR
    torch.testing.assert_close(biases["sum"], torch.full((6,), (4 * 1 + 4 * 2) / 2))
    torch.testing.assert_close(biases["first"], torch.full((6,), 4.0))
