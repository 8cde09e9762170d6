"""Other ways to run a model and its backward pass: what is captured is what an ordinary one leaves, or refused."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from gradsub import GemsOptimizer

from .toys import TASKS, gems, mlp, noise, weights_of

WIDTHS = (12, 16, 10, 8)
CAPTURES = ["generic", "fused"]
# Three steps see the whole gradient (or a sketch), projected ones, and a second refresh.
OPTIONS = [{"refresh": "svd"}, {"refresh": "sketch"}, {"refresh": "sketch", "side": "output"}]

captures = pytest.mark.parametrize("capture", CAPTURES)
options_of = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options.values()))


def build(device: torch.device, **options: Any) -> tuple[nn.Sequential, GemsOptimizer]:
    model = mlp(WIDTHS, device=device, dtype=torch.float64)
    base = torch.optim.SGD(model.parameters(), lr=0.3)
    return model, gems(model, base=base, **{"update_proj_gap": 2, **options})


def batch(model: nn.Module, step: int, task: int, rows: int = 6) -> Tensor:
    return noise(rows, WIDTHS[0], key=(step, task), like=next(model.parameters()))


def loss_of(output: Tensor, task: int) -> Tensor:
    return (output - 0.3 * task).square().mean() + task * output.abs().mean()


Step = Callable[[GemsOptimizer, nn.Sequential, int], None]


def run(device: torch.device, step: Step, steps: int = 5, **options: Any) -> nn.Sequential:
    model, optimizer = build(device, **options)
    for number in range(steps):
        step(optimizer, model, number)
        optimizer.step()
        optimizer.zero_grad()
    return model


def ordinary(optimizer: GemsOptimizer, model: nn.Sequential, number: int) -> None:
    for task, name in enumerate(TASKS):
        with optimizer.task(name):
            loss_of(model(batch(model, number, task)), task).backward()


def close(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


# --- chosen leaves -------------------------------------------------------------------------------------------------


@captures
@options_of
@pytest.mark.parametrize("inside", [True, False], ids=["forward inside", "forward outside"])
@pytest.mark.parametrize("method", [True, False], ids=["Tensor.backward", "autograd.backward"])
def test_backward_into_all_parameters_is_an_ordinary_one(device, capture, options, inside, method):
    def step(optimizer, model, number):
        for task, name in enumerate(TASKS):
            x = batch(model, number, task).requires_grad_()
            leaves = [x, *model.parameters()]
            loss = None if inside else loss_of(model(x), task)
            with optimizer.task(name):
                loss = loss_of(model(x), task) if loss is None else loss
                if method:
                    loss.backward(inputs=leaves)
                else:
                    torch.autograd.backward(loss, inputs=leaves)
            assert x.grad is not None

    # `torch.autograd.backward` tells no gate the loss.
    options = {**options, "gate": "uniform"}
    close(run(device, step, capture=capture, **options), run(device, ordinary, capture="generic", **options))


@captures
@options_of
@pytest.mark.parametrize("chosen", [["0.weight", "4.bias"], ["2.weight"], ["0.bias"]], ids="+".join)
def test_backward_into_some_parameters_trains_these_as_if_the_others_were_frozen(device, capture, options, chosen):
    def some(optimizer, model, number):
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                leaves = [model.get_parameter(each) for each in chosen]
                loss_of(model(batch(model, number, task)), task).backward(inputs=leaves)

    def frozen(optimizer, model, number):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        ordinary(optimizer, model, number)

    mine, reference = (
        run(device, some, capture=capture, **options),
        run(device, frozen, capture="generic", **options),
    )
    close(mine, reference)
    start = mlp(WIDTHS, device=device, dtype=torch.float64)
    for name, parameter in mine.named_parameters():
        assert torch.equal(parameter, start.get_parameter(name)) == (name not in chosen)


@pytest.mark.parametrize("inside", [True, False], ids=["forward inside", "forward outside"])
def test_backward_of_a_mixed_batch_into_parameters(device, inside):
    def step(chosen, optimizer, model, number):
        x, ids = batch(model, number, 0), [0, 1, 1, 0, 1, 0]
        output = None if inside else model(x)
        with optimizer.mixed(ids) as rows:
            output = model(x) if output is None else output
            rows.loss(output.square().mean(1)).backward(inputs=list(model.parameters()) if chosen else None)

    ends = [run(device, functools.partial(step, chosen), capture="fused") for chosen in (True, False)]
    close(*ends)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def selective() -> Any:
    return create_selective_checkpoint_contexts(
        lambda context, op, *args, **kwargs: (
            CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.tanh.default else CheckpointPolicy.PREFER_RECOMPUTE
        )
    )


def nested(model: nn.Sequential, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return checkpoint(model[2:4], y, use_reentrant=False)

    def outer(y: Tensor) -> Tensor:
        return inner(model[:2](y))

    return model[4:](checkpoint(outer, x, use_reentrant=False))


@contextlib.contextmanager
def without_early_stop() -> Iterator[None]:
    with set_checkpoint_early_stop(False):
        yield


Forward = Callable[[nn.Sequential, Tensor], Tensor]
CHECKPOINTS: dict[str, Forward] = {
    "non-reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant": lambda model, x: checkpoint(model, x.requires_grad_(), use_reentrant=True),
    "nested": nested,
    "a layer each": lambda model, x: functools.reduce(lambda y, m: checkpoint(m, y, use_reentrant=False), model, x),
}


def passes_in_between(forward: Forward, optimizer: GemsOptimizer, model: nn.Sequential, number: int) -> None:
    """One forward pass for two tasks, outside of them; another task, evaluation and a penalty before their backward."""
    first = forward(model, batch(model, number, 0))
    second = forward(model, batch(model, number, 1))
    with optimizer.task("search"):
        loss_of(forward(model, batch(model, number, 7)), 0).backward()
    with torch.no_grad():
        model(batch(model, number, 3))
    with optimizer.task("rec"):
        held = forward(model, batch(model, number, 4))
        model(batch(model, number, 5))
        with torch.no_grad():
            forward(model, batch(model, number, 6))
        (loss_of(held, 1) + loss_of(second, 0)).backward()
    model(batch(model, number, 3)).square().mean().backward()
    optimizer.backward({"search": loss_of(first, 0), "rec": loss_of(first, 1)})


@captures
@options_of
@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpoints_with_other_passes_in_between(device, capture, options, kind, early_stop):
    with contextlib.nullcontext() if early_stop else without_early_stop():
        mine = run(device, functools.partial(passes_in_between, CHECKPOINTS[kind]), capture=capture, **options)
    plain = run(device, functools.partial(passes_in_between, lambda model, x: model(x)), capture="generic", **options)
    close(mine, plain)


@captures
@options_of
def test_selective_checkpoints(device, capture, options):
    """Which have one backward pass each."""

    def step(forward, optimizer, model, number):
        outputs = [forward(model, batch(model, number, task)) for task in range(2)]
        with optimizer.task("rec"):
            loss_of(forward(model, batch(model, number, 5)), 1).backward()
        optimizer.backward({name: loss_of(output, 0) for name, output in zip(TASKS, outputs, strict=True)})

    mine = run(
        device,
        functools.partial(step, lambda model, x: checkpoint(model, x, use_reentrant=False, context_fn=selective)),
        capture=capture,
        **options,
    )
    close(mine, run(device, functools.partial(step, lambda model, x: model(x)), capture="generic", **options))


@captures
@pytest.mark.parametrize("checkpointed", [False, True])
def test_saved_tensors_that_are_moved_away(device, capture, checkpointed):
    forward = CHECKPOINTS["non-reentrant"] if checkpointed else lambda model, x: model(x)

    def step(optimizer, model, number):
        with torch.autograd.graph.save_on_cpu():
            passes_in_between(forward, optimizer, model, number)

    plain = functools.partial(passes_in_between, lambda model, x: model(x))
    close(run(device, step, capture=capture), run(device, plain, capture="generic"))


# --- transforms ----------------------------------------------------------------------------------------------------


def tangent(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent


def functional(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(model, parameters, (x,)).square().sum()


def gradients(model: nn.Module, x: Tensor) -> Tensor:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = torch.func.grad(functools.partial(functional, model))(parameters, x)
    return torch.cat([found[name].flatten() for name in sorted(found)])


def per_sample(model: nn.Module, x: Tensor) -> Tensor:
    parameters = dict(model.named_parameters())
    one = torch.func.grad(functools.partial(functional, model))
    found = torch.func.vmap(one, in_dims=(None, 0))(parameters, x[:, None])
    return torch.cat([found[name].flatten() for name in sorted(found)])


def batched_gradients(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = model(x).sum(0)
    return torch.autograd.grad(y, x, torch.eye(len(y)).to(y), is_grads_batched=True)[0]


USES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "vmap": lambda model, x: torch.func.vmap(model)(x),
    "jacrev": lambda model, x: torch.func.jacrev(model)(x[0]),
    "jacfwd": lambda model, x: torch.func.jacfwd(model)(x[0]),
    "hessian": lambda model, x: torch.func.hessian(lambda v: model(v).square().sum())(x[0]),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,))[1],
    "vjp": lambda model, x: torch.func.vjp(model, x)[1](model(x).detach())[0],
    "grad": gradients,
    "per-sample gradients": per_sample,
    "functional_call": lambda model, x: functional(model, dict(model.named_parameters()), x),
    "forward-mode": tangent,
    "vectorised jacobian": lambda model, x: torch.autograd.functional.jacobian(model, x, vectorize=True),
    "batched gradients": batched_gradients,
    "hessian-vector product": lambda model, x: torch.autograd.functional.hvp(lambda v: model(v).square().sum(), x, x)[
        1
    ],
    "jit.trace": lambda model, x: torch.jit.trace(model, (x,))(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "nested": lambda model, x: model(torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)).values(),
}


@captures
@pytest.mark.parametrize("inside", [True, False], ids=["in a task", "outside"])
@pytest.mark.parametrize("use", USES)
def test_transforms_give_what_they_do_without_the_optimizer(device, capture, use, inside):
    """And nothing is captured of them, since no backward pass accumulates."""
    model, optimizer = build(device, capture=capture)
    ordinary(optimizer, model, 0)
    optimizer.step()
    optimizer.zero_grad()
    twin = mlp(WIDTHS, device=device, dtype=torch.float64)
    twin.load_state_dict(model.state_dict())
    x, before = batch(model, 1, 0), weights_of(model)
    with optimizer.task("rec") if inside else contextlib.nullcontext():
        found = USES[use](model, x)
    torch.testing.assert_close(found.detach(), USES[use](twin, x).detach())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_scripting_names_the_remedies(device):
    model, optimizer = build(device, capture="fused")
    x = batch(model, 0, 0)
    with pytest.raises(AttributeError, match="deepcopy"):
        torch.jit.script(model)
    assert torch.equal(torch.jit.script(copy.deepcopy(model))(x), model(x))
    optimizer.close()
    assert torch.equal(torch.jit.script(model)(x), model(x))


def through(use: Callable[[nn.Module, Tensor], Tensor]) -> Step:
    def step(optimizer: GemsOptimizer, model: nn.Sequential, number: int) -> None:
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                loss_of(use(model, batch(model, number, task)), task).backward()

    return step


def dual_loss(model: nn.Module, x: Tensor) -> Tensor:
    """A backward pass through a forward-mode derivative."""
    with forward_ad.dual_level():
        primal, slope = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x)))
        return primal + slope


@captures
@options_of
@pytest.mark.parametrize(
    "use",
    [
        lambda model, x: torch.func.vmap(model)(x),
        lambda model, x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
        lambda model, x: torch.func.functional_call(
            model, {name: p * 1.0 for name, p in model.named_parameters()}, (x,)
        ),
        lambda model, x: model(torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)).values()[: len(x)],
        lambda model, x: model(torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)).values(),
        lambda model, x: torch.jit.trace(model, (x,), check_trace=False)(x),
    ],
    ids=["vmap", "functional_call", "derived weights", "nested, partly used", "nested", "traced"],
)
def test_a_backward_pass_through_a_transform_is_captured(device, capture, options, use):
    reference = run(device, ordinary, capture="generic", **options)
    close(run(device, through(use), capture=capture, **options), reference)


@captures
def test_a_backward_pass_through_forward_mode_is_captured(device, capture):
    def plain(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) + torch.autograd.functional.jvp(model, x, x, create_graph=True)[1]

    reference = run(device, through(plain), capture="generic")
    close(run(device, through(dual_loss), capture=capture), reference)


def test_a_nested_batch_of_several_tasks_is_refused(device):
    model, optimizer = build(device, capture="fused")
    x = batch(model, 0, 0)
    with optimizer.mixed([0, 1]), pytest.raises(RuntimeError, match="cannot be told apart"):
        model(torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)).values().square().mean().backward()


# --- whole gradients of a weight, second derivatives ---------------------------------------------------------------


@captures
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_gradient_of_a_weight_itself_in_a_task(device, capture, number):
    """Right where the forward pass ran outside; inside, fused layers refuse it where they do not compute it."""
    model, optimizer = build(device, capture=capture, update_proj_gap=2)
    for earlier in range(number):
        ordinary(optimizer, model, earlier)
        optimizer.step()
    twin = mlp(WIDTHS, device=device, dtype=torch.float64)
    twin.load_state_dict(model.state_dict())
    x = batch(model, 0, 0)
    expected = torch.autograd.grad(twin(x).square().mean(), list(twin.parameters()))
    outside = model(x).square().mean()
    with optimizer.task("rec"):
        found = torch.autograd.grad(outside, list(model.parameters()))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        loss = model(x).square().mean()
        refused = capture == "fused" and not optimizer._intake.fused._members[0].slot.opening.whole
        with pytest.raises(RuntimeError, match="forward pass outside") if refused else contextlib.nullcontext():
            found = torch.autograd.grad(loss, model[2].weight, allow_unused=True)
            torch.testing.assert_close(found[0], expected[2])
    before = weights_of(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@captures
@options_of
def test_gradient_penalties_and_graphs_of_gradients(device, capture, options):
    def step(create_graph, optimizer, model, number):
        for task, name in enumerate(TASKS):
            x = batch(model, number, task).requires_grad_()
            with optimizer.task(name):
                output = model(x)
                (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
                (loss_of(output, task) + 0.1 * slope.square().mean()).backward(create_graph=create_graph)

    ends = [
        run(device, functools.partial(step, graph), capture=kind, **options)
        for graph, kind in ((False, "generic"), (False, capture))
    ]
    close(*ends)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.*create_graph")  # torch says so once
        close(run(device, functools.partial(step, True), capture=capture, **options), ends[0])


# --- hooks ---------------------------------------------------------------------------------------------------------


def halve(parameter: Tensor) -> None:
    parameter.grad *= 0.5


def register(model: nn.Module, kind: str) -> list[float]:
    """Hooks that see gradients and halve them; where the norms they see are listed."""
    norms: list[float] = []
    for parameter in model.parameters():
        if kind == "tensor":
            parameter.register_hook(lambda gradient: (norms.append(float(gradient.norm())), gradient * 0.5)[1])
        else:
            parameter.register_post_accumulate_grad_hook(lambda p: (norms.append(float(p.grad.norm())), halve(p))[1])
    return norms


@captures
@options_of
@pytest.mark.parametrize("kind", ["tensor", "after accumulation"])
@pytest.mark.parametrize("when", ["before", "after", "later"])
@pytest.mark.parametrize("inside", [True, False], ids=["forward inside", "forward outside"])
def test_hooks_see_and_change_the_gradient(device, capture, options, kind, when, inside):
    """Registered before the optimizer is built, after, or between two steps."""
    model = mlp(WIDTHS, device=device, dtype=torch.float64)
    plain, reference = build(device, capture="generic", **options)
    norms = register(model, kind) if when == "before" else []
    base = torch.optim.SGD(model.parameters(), lr=0.3)
    optimizer = gems(model, base=base, capture=capture, **{"update_proj_gap": 2, **options})
    for number in range(4):
        if when == ("after" if number == 0 else "later") and number < 2:
            norms = register(model, kind)
        halved = 0.5 if norms or when != "later" or number else 1.0
        for task, name in enumerate(TASKS):
            x = batch(model, number, task)
            loss = None if inside else loss_of(model(x), task)
            with optimizer.task(name):
                (loss_of(model(x), task) if loss is None else loss).backward()
            with reference.task(name):
                (halved * loss_of(plain(x), task)).backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    close(model, plain)
    assert len(norms) == (3 if when == "later" else 4) * len(TASKS) * len(list(model.parameters()))
    assert min(norms) > 0


@captures
def test_a_hook_that_uses_the_gradient_up_leaves_nothing_to_capture(device, capture):
    model, optimizer = build(device, capture=capture)
    model[2].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    before = weights_of(model)
    for number in range(2):
        ordinary(optimizer, model, number)
        optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [name != "2.weight" for name, _ in model.named_parameters()]


@captures
@pytest.mark.parametrize("kind", ["tensor", "after accumulation"])
def test_a_hook_registered_inside_of_a_task(device, capture, kind):
    """Right or refused; a hook is never called without a gradient."""
    model, optimizer = build(device, capture=capture)
    ordinary(optimizer, model, 0)
    optimizer.step()
    optimizer.zero_grad()
    with optimizer.task("rec"):
        loss = loss_of(model(batch(model, 1, 0)), 0)
        norms = register(model, kind)
        if capture == "generic" and kind == "tensor":
            loss.backward()
            assert len(norms) == len(list(model.parameters()))
        else:
            with pytest.raises(RuntimeError, match=r"register (it|hooks) before"):
                loss.backward()
