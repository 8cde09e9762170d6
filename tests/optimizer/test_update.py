"""What a step does to a decomposed weight: subspaces, sides, tasks, scale."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradsub import GemsOptimizer

from .toys import TASKS, basis_of, gems, leak, mlp, noise, null_space_of, same, train


def one_layer(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(noise(rows, columns, key=(1,)))
    return layer


def push(optimizer: GemsOptimizer, weight: torch.Tensor, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """One step with exactly these task gradients; what it changed."""
    before = weight.detach().clone()
    for name, gradient in gradients.items():
        with optimizer.task(name):
            (weight * gradient).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return weight.detach() - before


def truncated(gradient: torch.Tensor, rank: int) -> np.ndarray:
    """The best approximation of that rank."""
    u, s, vh = scipy.linalg.svd(gradient.numpy(force=True), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.filterwarnings("ignore:rank=:UserWarning")
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    rank=st.integers(1, 14),
    side=st.sampled_from(["input", "output"]),
    exponent=st.integers(-8, 8),
)
def test_sgd_in_one_subspace_is_a_truncated_svd_step(rows, columns, rank, side, exponent):
    """With no task, the method is GaLore's; the scale of the gradients changes nothing but the scale of the step."""
    layer = one_layer(rows, columns)
    optimizer = GemsOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1.0), tasks=(), rank=rank, side=side, model=layer_in(layer)
    )
    gradient = noise(rows, columns, key=(2, rows, columns)).double() * 10.0**exponent
    before = layer.weight.detach().clone()
    (layer.weight * gradient).sum().backward()
    optimizer.step()
    moved = (before - layer.weight.detach()).numpy()
    wanted, best = gradient.numpy(), truncated(gradient, rank)
    slack = 1e-6 * np.linalg.norm(wanted) + 1e-14 * float(before.norm())
    # A randomized basis is as good as the best one but for a few percent, and exact where it is as wide as the matrix.
    factor = 1.0 if rank >= min(rows, columns) else 1.05
    assert np.linalg.norm(wanted - moved) <= factor * np.linalg.norm(wanted - best) + slack
    assert np.linalg.norm(wanted - moved) ** 2 == pytest.approx(
        np.linalg.norm(wanted) ** 2 - np.linalg.norm(moved) ** 2, abs=slack * np.linalg.norm(wanted) * 4
    )  # an orthogonal projection of the gradient: nothing is scaled


def layer_in(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_update_is_the_shared_step_and_the_gated_task_steps(side, count):
    """SGD with lr 1 makes every lifted step the projected gradient itself."""
    layer = one_layer(14, 10)
    tasks = [f"task {k}" for k in range(count)]
    optimizer = GemsOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1.0), tasks=tasks, rank=4, task_rank=2, side=side, gate="uniform"
    )
    gradients = {name: noise(14, 10, key=(3, k)).double() for k, name in enumerate(tasks)}
    mixed = sum(gradients.values()) / count
    moved = push(optimizer, layer.weight, gradients)
    expected = truncated(mixed, 4) + sum(truncated(g, 2) for g in gradients.values()) / count
    np.testing.assert_allclose(-moved.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_input_side_is_output_side_of_the_transposed_weight():
    layer, flipped = one_layer(9, 6), one_layer(6, 9)
    with torch.no_grad():
        flipped.weight.copy_(layer.weight.T)
    options = {"tasks": TASKS, "rank": 3, "update_proj_gap": 2}
    first = GemsOptimizer(torch.optim.AdamW(layer.parameters(), lr=0.1), side="input", **options)
    second = GemsOptimizer(torch.optim.AdamW(flipped.parameters(), lr=0.1), side="output", **options)
    for step in range(5):
        gradients = {name: noise(9, 6, key=(4, step, k)).double() for k, name in enumerate(TASKS)}
        push(first, layer.weight, gradients)
        push(second, flipped.weight, {name: g.T for name, g in gradients.items()})
    torch.testing.assert_close(layer.weight, flipped.weight.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("orthogonalize", ["none", "shared_first"])
def test_bases_are_orthonormal_and_between_refreshes_they_stay(device, side, orthogonalize):
    model = mlp((12, 10, 9), device=device)
    optimizer = gems(model, rank=4, task_rank=2, side=side, orthogonalize=orthogonalize, update_proj_gap=3)
    kept: list[torch.Tensor] = []
    for step in range(7):
        train(model, optimizer, 1, start=step)
        for weight in (model[0].weight, model[2].weight):
            shared, *own = (basis_of(optimizer, weight, k, (4, 2, 2)) for k in range(3))
            for basis in (shared, *own):
                eye = torch.eye(basis.shape[1], device=device)
                torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-5)
            overlap = max(float((shared.mT @ basis).abs().max()) for basis in own)
            assert overlap < 1e-5 if orthogonalize == "shared_first" else overlap > 1e-2
        joint = optimizer.state[model[0].weight]["basis"].clone()
        assert step % 3 == 0 or torch.equal(joint, kept[-1])
        assert step in (0, 1, 2, 4, 5) or not torch.equal(joint, kept[-1])
        kept.append(joint)


def test_shared_first_holds_when_the_shared_gradient_was_zero_at_first():
    layer = one_layer(8, 7)
    optimizer = GemsOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1.0), tasks=TASKS, rank=2, orthogonalize="shared_first"
    )
    gradient = noise(8, 7, key=(5,)).double()
    push(optimizer, layer.weight, {"search": gradient, "rec": -gradient})
    push(optimizer, layer.weight, {"search": gradient, "rec": gradient})
    shared, search, rec = (basis_of(optimizer, layer.weight, k, (2, 1, 1)) for k in range(3))
    assert float((shared.mT @ torch.cat([search, rec], dim=1)).abs().max()) < 1e-5


@pytest.mark.filterwarnings("ignore:rank=:UserWarning")
def test_no_direction_is_left_for_tasks_when_the_shared_subspace_takes_all():
    layer = one_layer(6, 5)
    options = {"tasks": TASKS, "rank": 5, "orthogonalize": "shared_first", "model": layer_in(layer)}
    optimizer = GemsOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0), **options)
    gradients = {name: noise(6, 5, key=(6, k)).double() for k, name in enumerate(TASKS)}
    moved = push(optimizer, layer.weight, gradients)
    torch.testing.assert_close(-moved, sum(gradients.values()) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("orthogonalize", ["none", "shared_first"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_every_basis_avoids_the_protected_directions(device, side, orthogonalize):
    model = mlp((12, 10, 9), device=device)
    null_space = null_space_of(model, side)
    optimizer = gems(model, rank=4, side=side, orthogonalize=orthogonalize, null_space=null_space)
    train(model, optimizer, 4)
    for name in null_space:
        weight = model.get_submodule(name).weight
        protected = null_space.basis(name)
        assert protected.shape[1] > 0
        overlap = protected.mT @ optimizer.state[weight]["basis"]
        assert float(overlap.abs().max()) < 1e-6


def test_scale_multiplies_the_step_but_neither_decay_nor_plain_parameters(device):
    moved, biases = [], []
    for scale in (1.0, 0.25):
        model = mlp(dtype=torch.float64, device=device)
        weight, bias = model[0].weight, model[0].bias
        before, bias_before = weight.detach().clone(), bias.detach().clone()
        base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        train(model, gems(model, base=base, scale=scale), 1)
        moved.append(weight.detach() - before * (1 - 0.1 * 0.5))
        biases.append(bias.detach() - bias_before)
    torch.testing.assert_close(moved[1], moved[0] * 0.25, rtol=1e-6, atol=1e-9)
    assert torch.equal(*biases)


def test_groups_carry_their_own_options(device):
    model = mlp((12, 12, 12, 12), device=device)
    groups = [
        {"params": list(model[0].parameters()), "rank": 2, "task_rank": 3, "update_proj_gap": 1},
        {"params": list(model[2].parameters()), "subspace": False, "lr": 0.0},
        {"params": list(model[4].parameters())},
    ]
    optimizer = GemsOptimizer(torch.optim.SGD(groups, lr=0.1), tasks=TASKS, rank=6, model=model)
    untouched = [p.detach().clone() for p in model[2].parameters()]
    train(model, optimizer, 2)
    assert optimizer.state[model[0].weight]["basis"].shape == (12, 2 + 3 + 3)
    assert optimizer.state[model[0].weight]["next_refresh"].tolist() == [2, 2, 2]
    assert optimizer.state[model[4].weight]["basis"].shape == (12, 6 + 3 + 3)
    assert optimizer.state[model[4].weight]["next_refresh"].tolist() == [200, 200, 200]
    assert "basis" not in optimizer.state[model[2].weight]
    assert same(untouched, model[2].parameters())
    assert [layer.name for layer in optimizer.report().layers] == ["0", "4"]


@pytest.mark.parametrize("moments", ["rotate", "keep", "reset"])
def test_moments_follow_their_rule_at_a_refresh(moments):
    """The refresh is on a step whose own gradient is negligible, so the first moment shows what became of it."""
    layer = one_layer(8, 7)
    optimizer = GemsOptimizer(
        torch.optim.AdamW(layer.parameters(), lr=0.0, betas=(0.5, 0.5)),
        tasks=(),
        rank=4,
        update_proj_gap=2,
        moments=moments,
    )
    for step in range(2):
        (layer.weight * noise(8, 7, key=(7, step)).double()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state[layer.weight]
    old, moment = state["basis"].clone(), state["inner.shared.exp_avg"].clone()
    (layer.weight * noise(8, 7, key=(7, 9)).double() * 1e-12).sum().backward()
    optimizer.step()
    expected = {"rotate": moment @ (old.mT @ state["basis"]), "keep": moment, "reset": moment * 0}[moments] * 0.5
    torch.testing.assert_close(state["inner.shared.exp_avg"], expected, rtol=1e-6, atol=1e-9)
    assert float(state["inner.shared.step"]) == (1 if moments == "reset" else 3)


def test_a_zero_gradient_at_a_refresh_keeps_the_old_basis_and_tries_again():
    layer = one_layer(8, 7)
    optimizer = GemsOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0), tasks=["a"], rank=2, update_proj_gap=1)
    push(optimizer, layer.weight, {"a": noise(8, 7, key=(8,)).double()})
    old = optimizer.state[layer.weight]["basis"].clone()
    push(optimizer, layer.weight, {"a": torch.zeros(8, 7, dtype=torch.float64)})
    assert torch.equal(old, optimizer.state[layer.weight]["basis"])
    push(optimizer, layer.weight, {"a": noise(8, 7, key=(9,)).double()})
    assert leak(optimizer.state[layer.weight]["basis"].mT, old[:, :2], "input") < 0.999
    assert not torch.equal(old, optimizer.state[layer.weight]["basis"])


def test_the_seed_determines_the_run(device):
    models = [mlp((200, 90, 80), device=device) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        train(model, gems(model, seed=seed), 2)
    assert same(models[0].parameters(), models[1].parameters())
    assert not same(models[0].parameters(), models[2].parameters())
