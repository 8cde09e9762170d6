"""Any shape, dtype and mix of tasks: finite weights, exact protection, orthonormal bases, state of constant shape."""

from __future__ import annotations

import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from gradsub import GemsOptimizer, NullSpace

from .worlds import assert_orthonormal, bases, clones, leak

# Vectors move freely here on purpose: what holds of weights must hold beside them.
pytestmark = pytest.mark.filterwarnings("ignore:null_space has nothing for:UserWarning")

GAP = 2


def quiet(*args, **options) -> GemsOptimizer:
    """Without the warnings about full rank and about layers that nothing protects, which are tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return GemsOptimizer(*args, **options)


def shapes_of_state(optimizer: GemsOptimizer) -> dict[tuple[int, str], tuple]:
    return {
        (i, key): (tuple(value.shape), value.dtype)
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=40)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    rank=st.integers(1, 12),
    protected=st.integers(0, 9),
    side=st.sampled_from(["input", "output"]),
    orthogonalize=st.sampled_from(["none", "shared_first"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    present=st.integers(1, 4).flatmap(
        lambda K: st.lists(st.lists(st.booleans(), min_size=K, max_size=K), min_size=4, max_size=6)
    ),
    decay=st.sampled_from([0.0, 0.1]),
)
def test_any_matrix_any_tasks(m, n, rank, protected, side, orthogonalize, dtype, present, decay):
    """Tasks come and go from step to step, and a step may have none at all."""
    K = len(present[0])
    tasks = tuple("abcd"[:K])
    model = nn.ModuleDict({"layer": nn.Linear(n, m, dtype=dtype)})
    weight = model["layer"].weight
    dimension = n if side == "input" else m
    null_space = None
    if protected := min(protected, dimension):
        null_space = NullSpace(side=side, energy=1.0)
        null_space.update("layer", random(protected, dimension, seed=1, dtype=dtype))
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay)
    optimizer = quiet(
        base,
        tasks=tasks,
        rank=rank,
        update_proj_gap=GAP,
        side=side,
        orthogonalize=orthogonalize,
        model=model,
        null_space=null_space,
    )
    before, layout = weight.detach().clone(), shapes_of_state(optimizer)
    for step, here in enumerate(present):
        start = clones(model.parameters())
        for k, task in enumerate(tasks):
            if here[k]:
                with optimizer.task(task, samples=k + 1):
                    model["layer"](random(3, n, seed=10 * step + k, dtype=dtype)).square().sum().backward()
            else:
                with optimizer.task(task):
                    pass  # an empty task
        optimizer.step()
        optimizer.zero_grad()
        if not any(here):
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start, strict=True))

    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert shapes_of_state(optimizer) == layout
    widths = [min(rank, m, n)] + [min(max(1, rank // 2), m, n)] * K
    free = dimension - protected
    for subspace, basis in enumerate(bases(optimizer, weight, widths)):
        assert basis.shape == (dimension, widths[subspace])
        assert_orthonormal(basis)
        reached = any(any(here) for here in present) if subspace == 0 else any(here[subspace - 1] for here in present)
        if orthogonalize == "none":
            assert int((basis.norm(dim=0) > 0.5).sum()) == (min(widths[subspace], free) if reached else 0)
    change = weight.detach() - before
    if null_space is not None:
        K_ = null_space.basis("layer", torch.float64).double()
        inside = change.double() @ K_ if side == "input" else K_.mT @ change.double()
        rounding = 30 * torch.finfo(dtype).eps * max(1.0, float(before.norm()))
        # The basis is kept in the layer's dtype; so is the weight.
        assert inside.norm() <= rounding
        if free == 0:
            assert change.norm() <= rounding
    if any(any(here) for here in present) and free:
        assert change.norm() > 1e-4


def regression(model: nn.Module, task: int, step: int, shape: tuple[int, ...], dtype=torch.float32) -> Tensor:
    y = model(random(*shape, seed=100 * step + task, dtype=dtype))
    return (y - (task + 1)).square().mean()


def fit(model: nn.Module, optimizer: GemsOptimizer, shape: tuple[int, ...], steps: int = 5, **options) -> None:
    for step in range(steps):
        for k, task in enumerate(optimizer.tasks):
            with optimizer.task(task):
                regression(model, k, step, shape, **options).backward()
        optimizer.step()
        optimizer.zero_grad()


def convolution(side: str, memory_format: torch.memory_format) -> tuple[nn.Module, Tensor, NullSpace]:
    """A convolution and its null space, of unfolded patches (in * kernel) or of output channels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3)).to(memory_format=memory_format)
    before = model[0].weight.detach().clone()
    null_space = NullSpace(side=side, max_rank=4)
    null_space.update("0", random(40, 27 if side == "input" else 8, seed=2))
    base = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    optimizer = GemsOptimizer(base, tasks=("a", "b"), rank=3, update_proj_gap=GAP, side=side, null_space=null_space)
    fit(model, optimizer, (2, 3, 6, 6))
    for basis in bases(optimizer, model[0].weight, (3, 1, 1)):
        assert_orthonormal(basis, used=basis.shape[1])
    return model, before, null_space


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_convolution_is_the_matrix_out_by_in_times_kernel(side):
    model, before, null_space = convolution(side, torch.contiguous_format)
    weight, K = model[0].weight.detach(), null_space.basis("0")
    assert leak((weight - before).flatten(1), K, side) < 3e-6
    image = random(1, 3, 3, 3, seed=3)
    if side == "input":  # a patch inside the protected directions
        image = (image.flatten() @ K @ K.mT).view(1, 3, 3, 3)
        torch.testing.assert_close(nn.functional.conv2d(image, weight), nn.functional.conv2d(image, before))
    else:  # the protected part of any output
        found, was = (nn.functional.conv2d(image, w).flatten() @ K for w in (weight, before))
        torch.testing.assert_close(found, was)
    assert (weight - before).norm() > 0.05


@pytest.mark.parametrize("side", ["input", "output"])
def test_channels_last_changes_nothing_but_the_memory(side):
    plain, _, _ = convolution(side, torch.contiguous_format)
    last, _, _ = convolution(side, torch.channels_last)
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last[0].weight, plain[0].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["input", "output"])
def test_an_embedding_is_a_matrix_too(side):
    model = nn.Embedding(12, 7)
    before = model.weight.detach().clone()
    optimizer = GemsOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0),
        tasks=("a",),
        rank=3,
        update_proj_gap=9,
        side=side,
    )
    for _ in range(3):
        with optimizer.task("a"):
            (model(torch.tensor([1, 2, 2, 5])) - 1).square().mean().backward()
        optimizer.step()
    shared, own = bases(optimizer, model.weight, (3, 1))
    assert shared.shape[0] == (7 if side == "input" else 12)
    assert_orthonormal(shared, used=3)
    assert_orthonormal(own, used=1)
    change = model.weight.detach() - before
    untouched = [i for i in range(12) if i not in (1, 2, 5)]
    assert change[untouched].abs().max() < 1e-6
    assert change[[1, 2, 5]].norm() > 1e-2


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_transposed_weight_takes_the_steps_of_the_plain_one(side):
    from transformers.pytorch_utils import Conv1D

    linear, transposed = nn.ModuleDict({"0": nn.Linear(10, 8)}), nn.ModuleDict({"0": Conv1D(8, 10)})
    with torch.no_grad():
        transposed["0"].weight.copy_(linear["0"].weight.mT)
        transposed["0"].bias.copy_(linear["0"].bias)
    for model in (linear, transposed):
        null_space = NullSpace(side=side, max_rank=3)
        null_space.update("0", random(20, 10 if side == "input" else 8, seed=4))
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = GemsOptimizer(
            base, tasks=("a", "b"), rank=3, update_proj_gap=GAP, side=side, null_space=null_space, model=model
        )
        before = model["0"].weight.detach().clone()
        fit(model["0"], optimizer, (6, 10))
        change = (model["0"].weight.detach() - before) if model is linear else (model["0"].weight.detach() - before).mT
        assert leak(change, null_space.basis("0"), side) < 3e-6
        assert change.norm() > 0.1
    torch.testing.assert_close(transposed["0"].weight.mT, linear["0"].weight, rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def test_a_parameter_of_two_modules_has_one_state_and_keeps_what_either_protects():
    model = Shared()
    null_space = NullSpace(energy=1.0)
    null_space.update("first", random(1, 6, seed=1))
    null_space.update("second", random(2, 6, seed=2))
    before = model.first.weight.detach().clone()
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = GemsOptimizer(base, tasks=("a", "b"), rank=2, update_proj_gap=GAP, model=model, null_space=null_space)
    fit(model, optimizer, (5, 6))
    assert len(optimizer.state) == 3
    change = model.first.weight.detach() - before
    assert change.norm() > 1e-2
    for name in ("first", "second"):
        assert leak(change, null_space.basis(name), "input") < 3e-6


def test_float64_is_exact_to_its_own_precision():
    model = nn.ModuleDict({"0": nn.Linear(12, 8, dtype=torch.float64)})
    null_space = NullSpace(max_rank=4)
    null_space.update("0", random(20, 12, seed=1, dtype=torch.float64))
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = GemsOptimizer(base, tasks=("a", "b"), rank=3, update_proj_gap=GAP, model=model, null_space=null_space)
    before = model["0"].weight.detach().clone()
    fit(model["0"], optimizer, (6, 12), steps=20, dtype=torch.float64)
    assert optimizer.state[model["0"].weight]["basis"].dtype == torch.float64
    assert leak(model["0"].weight.detach() - before, null_space.basis("0", torch.float64), "input") < 1e-13


def test_without_tasks_everything_is_shared():
    model = nn.ModuleDict({"0": nn.Linear(8, 6)})
    before = model["0"].weight.detach().clone()
    optimizer = GemsOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), tasks=(), rank=2, model=model)
    model["0"](random(4, 8, seed=0)).square().mean().backward()
    G = model["0"].weight.grad.clone()
    optimizer.step()
    U, S, Vh = torch.linalg.svd(G)
    torch.testing.assert_close(model["0"].weight.detach() - before, -0.1 * (U[:, :2] * S[:2]) @ Vh[:2])


def test_an_empty_batch_is_a_zero_gradient():
    """A task whose batch has no example: its loss is a sum over nothing, and the other task goes on."""
    model = nn.ModuleDict({"0": nn.Linear(8, 6)})
    optimizer = GemsOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2), tasks=("a", "b"), rank=2, update_proj_gap=GAP, model=model
    )
    before = model["0"].weight.detach().clone()
    for step in range(5):
        for task, rows in {"a": 4, "b": 0}.items():
            with optimizer.task(task):
                model["0"](random(rows, 8, seed=step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    _, a, b = bases(optimizer, model["0"].weight, (2, 1, 1))
    assert_orthonormal(a, used=1)
    assert b.abs().sum() == 0
    assert torch.isfinite(model["0"].weight).all()
    assert (model["0"].weight.detach() - before).norm() > 1e-2
