"""What happens to gradients between `backward()` and `step()`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer

from .toys import SAMPLES, TASKS, gems, loss_of, mlp, same, train, weights_of


def plain_sgd(model: nn.Module, **options: object) -> GemsOptimizer:
    """Every parameter takes the plain inner step, of length lr = 1 along the shared gradient."""
    base = torch.optim.SGD([{"params": list(model.parameters()), "subspace": False}], lr=1.0)
    return GemsOptimizer(base, tasks=TASKS, **options)


def shared_gradients(model: nn.Module, samples: dict[str, float]) -> list[torch.Tensor]:
    """sum_k w_k G_k by plain autograd."""
    total = sum(samples.values())
    result = [torch.zeros_like(p) for p in model.parameters()]
    for task, name in enumerate(TASKS):
        if name in samples:
            parts = torch.autograd.grad(loss_of(model, 0, task), list(model.parameters()))
            result = [held + part * (samples[name] / total) for held, part in zip(result, parts, strict=True)]
    return result


@pytest.mark.parametrize("due", [True, False], ids=["refresh", "between"])
def test_no_gradient_stays_after_a_task(device, due):
    model = mlp(device=device)
    optimizer = gems(model, update_proj_gap=10)
    if not due:
        train(model, optimizer, 1)
    for task, name in enumerate(TASKS):
        with optimizer.task(name):
            loss_of(model, 0, task).backward()
            assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_plain_parameters_take_the_step_along_the_sample_weighted_mean(device):
    model = mlp(dtype=torch.float64, device=device)
    optimizer = plain_sgd(model)
    before, gradients = weights_of(model), shared_gradients(model, SAMPLES)
    train(model, optimizer, 1)
    for old, new, gradient in zip(before, model.parameters(), gradients, strict=True):
        torch.testing.assert_close(new.detach(), old - gradient)


def test_biases_step_exactly_as_under_the_bare_optimizer(device):
    """Bit for bit over several steps: the same AdamW on the same sample-weighted gradients."""
    model, bare = mlp(device=device), mlp(device=device)
    optimizer = gems(model, base=torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    biases = [p for p in bare.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(biases, lr=1e-2, weight_decay=0.1)
    for step in range(4):
        bare.load_state_dict(model.state_dict())
        for bias in biases:
            bias.grad = torch.zeros_like(bias)
        for task, name in enumerate(TASKS):
            parts = torch.autograd.grad(loss_of(bare, step, task), biases)
            for bias, part in zip(biases, parts, strict=True):
                bias.grad += part * (SAMPLES[name] / 32)
        train(model, optimizer, 1, start=step)
        reference.step()
        assert same((p for p in model.parameters() if p.ndim == 1), biases)


def test_four_parts_of_a_batch_equal_the_whole(device):
    whole, parts = mlp(dtype=torch.float64, device=device), mlp(dtype=torch.float64, device=device)
    first, second = gems(whole), gems(parts)
    for step in range(7):
        for task, name in enumerate(TASKS):
            with first.task(name, samples=SAMPLES[name]):
                torch.stack([loss_of(whole, step, task + 10 * part) for part in range(4)]).mean().backward()
        for part in range(4):  # interleaved, as a loop over micro-batches does it
            for task, name in enumerate(TASKS):
                with second.task(name, samples=SAMPLES[name] / 4):
                    (loss_of(parts, step, task + 10 * part) / 4).backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_backward_equals_task_contexts(device):
    one, two = mlp(device=device), mlp(device=device)
    first, second = gems(one), gems(two)
    for step in range(5):
        losses = {name: loss_of(one, step, task) for task, name in enumerate(TASKS)}
        first.backward(losses, samples=SAMPLES)
        first.step()
        first.zero_grad()
    train(two, second, 5)
    assert same(one.parameters(), two.parameters())
    assert first.report().to_dict() == second.report().to_dict()


def test_backward_shares_one_forward_pass(device):
    model = mlp(device=device)
    optimizer = gems(model)
    output = model(torch.randn(4, 12, device=device))
    optimizer.backward({"search": output.square().mean(), "rec": output.mean()})
    with pytest.raises(RuntimeError, match="second time"):
        output.mean().backward()
    optimizer.zero_grad()
    output = model(torch.randn(4, 12, device=device))
    optimizer.backward({"search": output.square().mean(), "rec": output.mean()}, retain_graph=True)
    output.mean().backward()


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_parameter_without_a_gradient_in_one_task_takes_its_share_of_the_other(device, side):
    """The mixed batch's gradient counts the samples of the absent task, whose part of it is zero."""
    model = nn.ModuleDict({"trunk": nn.Linear(8, 8), "head": nn.Linear(8, 7)}).to(device)
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = GemsOptimizer(base, tasks=TASKS, rank=6, task_rank=1, model=model, side=side, gate="uniform")
    x = torch.randn(5, 8, device=device)
    head = model["head"].weight.detach().clone()
    gradient = torch.autograd.grad(model["head"](model["trunk"](x)).square().sum(), model["head"].weight)[0]
    with optimizer.task("search", samples=3):
        model["trunk"](x).square().sum().backward()
    with optimizer.task("rec", samples=1):
        model["head"](model["trunk"](x)).square().sum().backward()
    optimizer.step()
    top = torch.linalg.svd(gradient)
    leading = top.S[0] * torch.outer(top.U[:, 0], top.Vh[0])
    expected = head - (gradient / 4 + leading)  # w_rec = 1/4 of the shared step, and the whole own one: the gate is 1
    torch.testing.assert_close(model["head"].weight.detach(), expected, rtol=1e-4, atol=1e-4)
    head_report = {layer.name: layer for layer in optimizer.report().layers}["head"]
    assert head_report.gates == {"rec": 1.0}
    assert head_report.cosines == {}


def test_a_parameter_without_any_gradient_stays_and_counts_no_step(device):
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)}).to(device)
    base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    optimizer = GemsOptimizer(base, tasks=TASKS, rank=2, model=model)
    before = weights_of(model["unused"])
    with optimizer.task("rec"):
        model["used"](torch.randn(3, 8, device=device)).sum().backward()
    optimizer.step()
    assert same(before, model["unused"].parameters())
    assert float(optimizer.state[model["unused"].weight]["step"]) == 0
    assert float(optimizer.state[model["used"].weight]["step"]) == 1


def test_tied_weights_are_stepped_once_with_the_sum_of_their_gradients(device):
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).to(device)
    tied[1].weight = tied[0].weight
    before = tied[0].weight.detach().clone()
    x = torch.randn(6, 8, device=device)
    gradient = torch.autograd.grad(tied(x).square().mean(), tied[0].weight)[0]
    base = torch.optim.SGD(tied.parameters(), lr=1.0)
    with pytest.warns(UserWarning, match="rank=8"):
        optimizer = GemsOptimizer(base, tasks=["only"], rank=8, model=tied)
    assert len(optimizer.param_groups[0]["params"]) == 1
    with optimizer.task("only"):
        tied(x).square().mean().backward()
    optimizer.step()
    moved = before - tied[0].weight.detach()
    top = torch.linalg.svd(gradient)
    own = (top.U[:, :4] * top.S[:4]) @ top.Vh[:4]
    torch.testing.assert_close(moved, gradient + own, rtol=1e-4, atol=1e-5)
    assert len(optimizer.report().layers) == 1


def test_a_frozen_parameter_rests_and_trains_once_it_is_unfrozen(device):
    model = mlp(device=device)
    model[0].weight.requires_grad_(False)
    optimizer = gems(model)
    before = model[0].weight.clone()
    train(model, optimizer, 2)
    assert torch.equal(before, model[0].weight)
    model[0].weight.requires_grad_(True)
    train(model, optimizer, 1, start=2)
    assert not torch.equal(before, model[0].weight)
    assert model[0].weight.grad is None


def test_a_step_without_gradients_moves_nothing(device):
    model = mlp(device=device)
    optimizer = gems(model, base=torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
    optimizer.step()
    train(model, optimizer, 2)
    before, state = weights_of(model), copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    with optimizer.task("rec"):
        pass
    optimizer.step()
    assert same(before, model.parameters())
    assert str(state) == str(optimizer.state_dict())


def test_zero_grad_forgets_what_was_captured(device):
    model = mlp(device=device)
    optimizer = gems(model)
    before = weights_of(model)
    with optimizer.task("rec"):
        loss_of(model, 0, 0).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert same(before, model.parameters())


def test_a_failed_forward_closes_its_task(device):
    model = mlp(device=device)
    optimizer = gems(model)
    with pytest.raises(RuntimeError, match="shapes"), optimizer.task("rec"):
        model(torch.randn(2, 5, device=device))
    with optimizer.task("search"):
        loss_of(model, 0, 0).backward()
    optimizer.step()
    assert optimizer.report().layers[0].gates == {"search": 1.0}


def test_a_task_that_could_not_be_opened_is_closed(device, monkeypatch):
    """Out of memory while the bases are laid side by side: the batch can be left out, and training goes on."""
    model, twin = mlp(device=device), mlp(device=device)
    options = {"capture": "fused", "update_proj_gap": 1}
    optimizer, undisturbed = gems(model, **options), gems(twin, **options)
    train(model, optimizer, 1)
    train(twin, undisturbed, 1)
    outside = torch.ones_like(model[0].weight)
    model[0].weight.grad = outside

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(type(optimizer._intake.fused), "_open_block", full)
        with pytest.raises(torch.OutOfMemoryError), optimizer.task("search"):
            pytest.fail("it was opened")
    assert model[0].weight.grad is outside
    model[0].weight.grad = None
    train(model, optimizer, 2, start=1)
    train(twin, undisturbed, 2, start=1)
    assert same(model.parameters(), twin.parameters())
