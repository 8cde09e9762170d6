"""Gradient checkpointing, compilation, autocast: whatever computes the gradients, the step is the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradsub import GemsOptimizer

from .toys import TASKS, gems, leak, loss_of, mlp, null_space_of, same, tensors_in, train, weights_of

Forward = Callable[[Tensor], Tensor]


class Calling(nn.Module):
    """The same parameters, another way to call them."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(device, reentrant):
    model, plain = mlp((12, 16, 16, 8), device=device), mlp((12, 16, 16, 8), device=device)

    def forward(x: Tensor) -> Tensor:
        hidden = checkpoint(model[:3], x.requires_grad_(), use_reentrant=reentrant)
        return model[3:](checkpoint(nn.Identity(), hidden, use_reentrant=reentrant))

    optimizer = gems(model)
    train(Calling(model, forward), optimizer, 5)
    train(plain, gems(plain), 5)
    assert same(model.parameters(), plain.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_tells_the_gate_the_loss_once(device, reentrant):
    model = mlp(device=device)
    seen = []

    def gate(inputs):
        seen.append(inputs.losses.tolist())
        return torch.full_like(inputs.gradient_norms, 0.5)

    optimizer = gems(model, gate=gate)

    def forward(x: Tensor) -> Tensor:
        return checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    expected = [loss_of(model, 0, task).item() for task in range(2)]
    train(Calling(model, forward), optimizer, 1)
    assert seen == [pytest.approx(expected)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("inside", [True, False], ids=["forward inside the task", "forward outside"])
def test_a_compiled_model(device, backend, inside):
    torch._dynamo.reset()
    model, plain = mlp(device=device), mlp(device=device)
    compiled = torch.compile(model, backend=backend)
    options = {"tasks": TASKS, "rank": 4, "update_proj_gap": 3}
    optimizer = GemsOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model=compiled, **options)
    reference = GemsOptimizer(torch.optim.AdamW(plain.parameters(), lr=1e-2), model=plain, **options)
    for step in range(4):
        for task, name in enumerate(TASKS):
            if inside:
                with optimizer.task(name, samples=(24.0, 8.0)[task]):
                    loss_of(compiled, step, task).backward()
            else:
                loss = loss_of(compiled, step, task)
                with optimizer.task(name, samples=(24.0, 8.0)[task]):
                    loss.backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    train(plain, reference, 4)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [layer.name for layer in optimizer.report().layers] == ["0", "2"]


def test_a_compiled_model_compiles_once_inside_tasks(device):
    torch._dynamo.reset()
    model = mlp(device=device)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = gems(model)
    counter = torch._dynamo.utils.counters
    counter.clear()
    for step in range(3):
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                loss_of(compiled, step, task).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter["stats"]["unique_graphs"] == 1


def test_autocast_keeps_float32_weights_and_state(device):
    """Losses and hidden states are bfloat16; gradients, bases and moments are the weights' float32."""
    model, plain = mlp(device=device), mlp(device=device)
    optimizer, reference = gems(model), gems(plain)
    for step in range(4):
        for task, name in enumerate(TASKS):
            with optimizer.task(name, samples=(24.0, 8.0)[task]):
                with torch.autocast(device.type, torch.bfloat16):
                    assert model(torch.randn(2, 12, device=device)).dtype == torch.bfloat16
                    loss = loss_of(model, step, task)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    train(plain, reference, 4)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=0, atol=0.06)
    dtypes = {value.dtype for value in optimizer.state[model[0].weight].values()}
    assert dtypes == {torch.float32, torch.int64}


def test_a_bfloat16_loss_is_a_loss(device):
    model = mlp(dtype=torch.bfloat16, device=device)
    optimizer = gems(model)
    train(model, optimizer, 1)
    assert sum(optimizer.report().layers[0].gates.values()) == pytest.approx(1.0, abs=1e-6)


def test_retained_graphs_and_second_derivatives_inside_a_task(device):
    """autograd.grad never reaches the capture; a gradient penalty's backward does."""
    model = mlp(device=device)
    optimizer = gems(model)
    x = torch.randn(6, 12, device=device, requires_grad=True)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.task("rec"):
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    optimizer.step()
    assert same(before, model.parameters())
    with optimizer.task("rec"):
        slope.square().sum().backward()
    optimizer.step()
    assert not torch.equal(before[0], model[0].weight)


@pytest.mark.parametrize("capture", ["generic", "fused"])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("where", ["backward", "step", "both"])
def test_what_runs_inside_of_autocast_is_what_runs_outside(device, where, refresh, capture):
    found = []
    for wanted in ("", where):
        model = mlp((12, 16, 8), device=device)
        base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        options = {"capture": capture, "refresh": refresh, "null_space": null_space_of(model), "free": True}
        optimizer = gems(model, base=base, **options)
        autocast = partial(torch.autocast, device.type, torch.bfloat16)
        for step in range(4):
            for task, name in enumerate(TASKS):
                with optimizer.task(name):
                    with autocast():
                        loss = loss_of(model, step, task)
                    with autocast(enabled=wanted in ("backward", "both")):
                        loss.backward()
            with autocast(enabled=wanted in ("step", "both")):
                optimizer.clip_grad_norm_(1.0)
                optimizer.step()
            optimizer.zero_grad()
        found.append([*weights_of(model), *tensors_in(optimizer.state_dict())])
    assert same(*found)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_products_of_lower_precision_do_not_leak(device, precision):
    """What a user allows matrix products: none of it in a step, of which 1e-4 would be in K."""
    model = mlp((96, 128, 96), device=device)  # smaller ones a CPU computes in float32 all the same
    null_space = null_space_of(model)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in null_space}
    optimizer = gems(model, base=torch.optim.AdamW(model.parameters(), lr=1e-2), null_space=null_space)
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    earlier = [backend.fp32_precision for backend in backends]
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = precision
        train(model, optimizer, 10)
    finally:
        for backend, was in zip(backends, earlier, strict=True):
            backend.fp32_precision = was
    for name, old in before.items():
        change = model.get_submodule(name).weight.detach() - old
        assert float(change.norm()) > 1e-2
        assert leak(change, null_space.basis(name), "input") < 1e-6


@pytest.mark.parametrize("capture", ["generic", "fused"])
def test_zero_grad_between_forward_and_backward_forgets_no_format(device, capture):
    """Rounding is dropped by the format of the passes that left the gradients, wherever they were cleared."""
    found = []
    for cleared in (False, True):
        model = mlp((12, 16, 8), device=device)
        optimizer = gems(model, capture=capture)
        for step in range(3):
            for task, name in enumerate(TASKS):
                with optimizer.task(name):
                    with torch.autocast(device.type, torch.bfloat16):
                        loss = loss_of(model, step, task)
                    if cleared and task == 0:
                        optimizer.zero_grad()
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(weights_of(model))
    assert same(*found)


def test_a_forward_pass_of_no_task_says_nothing_of_the_formats(device):
    found = []
    for passes in (0, 1):
        model = mlp((12, 16, 8), device=device)
        optimizer = gems(model, capture="fused")
        for step in range(3):
            for task, name in enumerate(TASKS):
                with optimizer.task(name):
                    loss_of(model, step, task).backward()
            for _ in range(passes):
                with torch.autocast(device.type, torch.bfloat16):
                    loss_of(model, step, 0)
            optimizer.step()
            optimizer.zero_grad()
        found.append(weights_of(model))
    assert same(*found)
