"""A loss scale is divided out of what was captured when it is divided out of ``p.grad``, and never guessed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp import GradScaler

from gradsub import GemsOptimizer

from .toys import TASKS, gems, loss_of, mlp, noise, weights_of

CAPTURES = ["generic", "fused"]
SCALES = [1024.0, 1000.0, 3.7, 1.0]


def sgd(model: nn.Module, **options: Any) -> GemsOptimizer:
    """Its step follows the gradient's size: a forgotten scale, which Adam divides away, would show."""
    return gems(model, base=torch.optim.SGD(model.parameters(), lr=0.1), **options)


def scaler_of(device: torch.device, scale: float = 1024.0, enabled: bool = True, **options: Any) -> GradScaler:
    return GradScaler(device.type, init_scale=scale, enabled=enabled, **options)


def close(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def unchanged(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


Work = Callable[[GemsOptimizer, nn.Module, GradScaler, int], None]


def per_task(optimizer: GemsOptimizer, model: nn.Module, scaler: GradScaler, step: int) -> None:
    for task, name in enumerate(TASKS):
        with optimizer.task(name):
            scaler.scale(loss_of(model, step, task)).backward()


def divided_and_summed(optimizer: GemsOptimizer, model: nn.Module, scaler: GradScaler, step: int) -> None:
    """Accumulated in two parts; what scales the loss is not the last operation before backward()."""
    for part in range(2):
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                (scaler.scale(loss_of(model, step, task) + 0.1 * loss_of(model, 9 + part, task)) / 2).backward()


def weighted_by_tensors(optimizer: GemsOptimizer, model: nn.Module, scaler: GradScaler, step: int) -> None:
    for task, name in enumerate(TASKS):
        loss = loss_of(model, step, task)
        with optimizer.task(name):
            scaler.scale(loss * loss.new_tensor(4.0)).backward()


def by_gradient(optimizer: GemsOptimizer, model: nn.Module, scaler: GradScaler, step: int) -> None:
    """The scale is the gradient that backward() starts from."""
    for task, name in enumerate(TASKS):
        loss = loss_of(model, step, task)
        with optimizer.task(name):
            loss.backward(gradient=scaler.scale(torch.ones_like(loss)))


def from_one_forward(optimizer: GemsOptimizer, model: nn.Module, scaler: GradScaler, step: int) -> None:
    losses = {name: scaler.scale(loss_of(model, step, task)) for task, name in enumerate(TASKS)}
    optimizer.backward(losses, samples={"search": 3, "rec": 1})


def with_losses_told(optimizer: GemsOptimizer, model: nn.Module, scaler: GradScaler, step: int) -> None:
    """Unscaled losses for the gate in one task, none in the other."""
    loss = loss_of(model, step, 0)
    with optimizer.task("search", loss=loss):
        scaler.scale(loss).backward()
    with optimizer.task("rec"):
        scaler.scale(loss_of(model, step, 1)).backward()


def with_outside(optimizer: GemsOptimizer, model: nn.Module, scaler: GradScaler, step: int) -> None:
    scaler.scale(loss_of(model, step, 0)).backward()
    per_task(optimizer, model, scaler, step)
    scaler.scale(loss_of(model, step + 5, 1)).backward()


def mixed(optimizer: GemsOptimizer, model: nn.Module, scaler: GradScaler, step: int) -> None:
    x, ids = noise(8, 12, key=(step,), like=model[0].weight), [0, 1, 1, 0, 0, 1, 1, 1]
    with optimizer.mixed(ids) as rows:
        scaler.scale(rows.loss((model(x) - 1).square().mean(1))).backward()
    with optimizer.mixed(ids) as rows:
        rows.loss(scaler.scale((model(x + 1) - 1).square().mean(1))).backward()
    with optimizer.task("rec"):
        scaler.scale(loss_of(model, step, 1)).backward()


WORKS: list[Work] = [
    per_task,
    divided_and_summed,
    weighted_by_tensors,
    by_gradient,
    from_one_forward,
    with_losses_told,
    with_outside,
    mixed,
]


def trained(
    device: torch.device, work: Work, scale: float | None, *, clip: float | None = None, **options: Any
) -> tuple[nn.Module, list[Any]]:
    """Five steps over a refresh; the weights, and the gates of each step."""
    model = mlp(device=device)
    optimizer = sgd(model, **options)
    scaler = scaler_of(device, 1.0 if scale is None else scale, scale is not None)
    gates = []
    for step in range(5):
        work(optimizer, model, scaler, step)
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.clip_grad_norm_(clip)
        scaler.step(optimizer)
        scaler.update()
        gates.append([list(layer.gates.values()) for layer in optimizer.report().layers])
        assert all(p.grad is None for p in model.parameters()) or work is with_outside
        optimizer.zero_grad()
    return model, gates


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
@pytest.mark.parametrize("capture", CAPTURES)
def test_a_scaled_run_is_the_unscaled_one(device, work, capture):
    if work is mixed and capture == "generic":
        pytest.skip("mixed needs the fused capture")
    plain, gates = trained(device, work, None, capture=capture)
    for scale in SCALES:
        scaled, scaled_gates = trained(device, work, scale, capture=capture)
        close(scaled, plain)
        torch.testing.assert_close(torch.tensor(scaled_gates), torch.tensor(gates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("work", [per_task, divided_and_summed, with_outside], ids=lambda work: work.__name__)
@pytest.mark.parametrize("capture", CAPTURES)
def test_clipping_after_unscaling_clips_what_it_would_without_a_scale(device, work, capture):
    plain, _ = trained(device, work, None, capture=capture, clip=0.05)
    for scale in SCALES:
        close(trained(device, work, scale, capture=capture, clip=0.05)[0], plain)


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "hypergradient"},
        {"surgery": "pcgrad"},
        {"side": "output"},
        {"refresh": "sketch"},
        {"orthogonalize": "shared_first", "side": "output", "refresh": "sketch"},
    ],
    ids=str,
)
@pytest.mark.parametrize("capture", CAPTURES)
def test_gates_surgery_and_refreshes_see_unscaled_gradients(device, options, capture):
    plain, gates = trained(device, per_task, None, capture=capture, **options)
    scaled, scaled_gates = trained(device, per_task, 3.7, capture=capture, **options)
    close(scaled, plain)
    torch.testing.assert_close(torch.tensor(scaled_gates), torch.tensor(gates), rtol=1e-3, atol=1e-4)


@given(scale=st.floats(2.0**-10, 2.0**20, width=32), factor=st.floats(0.1, 10.0))
def test_any_scale_is_divided_out_and_any_weight_of_the_loss_stays(scale, factor):
    def work(optimizer: GemsOptimizer, model: nn.Module, scaler: GradScaler, step: int) -> None:
        with optimizer.task("rec"):
            scaler.scale(loss_of(model, step, 0) * torch.tensor(factor)).backward()

    models = []
    for scaled in (scale, None):
        model = mlp()
        optimizer = sgd(model)
        scaler = scaler_of(torch.device("cpu"), scale, scaled is not None)
        work(optimizer, model, scaler, 0)
        scaler.step(optimizer)
        models.append(model)
    close(*models)


@pytest.mark.parametrize("clip", [False, True])
def test_a_weighted_loss_is_no_scaled_loss(device, clip):
    """Clipping what came from outside does not reach what was captured."""
    results = []
    for weight in (4.0, torch.tensor(4.0, device=device)):
        model = mlp(device=device)
        optimizer = sgd(model)
        (100 * loss_of(model, 1, 1)).backward()
        with optimizer.task("rec"):
            (loss_of(model, 0, 0) * weight).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        with pytest.warns(UserWarning, match="were not clipped") if clip else nullcontext():
            optimizer.step()
        results.append(model)
    close(*results)


class Delegating:
    """A wrapper around an optimizer, as trainers have them."""

    def __init__(self, optimizer: GemsOptimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


class Grandchild(GradScaler):
    def _unscale_grads_(self, optimizer: Any, *rest: Any) -> Any:
        return super()._unscale_grads_(optimizer, *rest)


@pytest.mark.parametrize("capture", CAPTURES)
def test_wrapped_optimizers_and_derived_scalers(device, capture):
    plain, _ = trained(device, per_task, None, capture=capture)
    model = mlp(device=device)
    optimizer = sgd(model, capture=capture)
    wrapper, scaler = Delegating(optimizer), Grandchild(device.type, init_scale=1000.0)
    for step in range(5):
        per_task(optimizer, model, scaler, step)
        scaler.step(wrapper)
        scaler.update()
        optimizer.zero_grad()
    close(model, plain)


def clearings() -> Iterator[tuple[str, Callable[[GemsOptimizer, nn.Module], None]]]:
    yield "optimizer", lambda optimizer, model: optimizer.zero_grad()
    yield "model", lambda optimizer, model: model.zero_grad()
    yield "model, to zero", lambda optimizer, model: model.zero_grad(set_to_none=False)
    yield "nobody", lambda optimizer, model: None


@pytest.mark.parametrize("clear", [function for _, function in clearings()], ids=[name for name, _ in clearings()])
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_step_with_inf_is_left_out_and_the_next_is_as_if_it_had_not_been(device, clear, capture, bad, unscale):
    plain, _ = trained(device, per_task, None, capture=capture)
    model = mlp(device=device)
    optimizer = sgd(model, capture=capture)
    scaler = scaler_of(device)
    step = 0
    for attempt in range(7):
        failing, before, scale = attempt in (0, 3), weights_of(model), scaler.get_scale()
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                loss = loss_of(model, step, task)
                scaler.scale(loss * bad if failing and task == 0 else loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        clear(optimizer, model)
        assert unchanged(model, before) == failing
        assert (scaler.get_scale() == scale / 2) == failing
        step += not failing
    close(model, plain)


def test_one_scaler_and_several_optimizers(device):
    models = []
    for enabled in (True, False):
        first, second, third = (mlp(seed=seed, device=device) for seed in range(3))
        optimizers = [sgd(first), sgd(second, capture="fused"), torch.optim.SGD(third.parameters(), lr=0.1)]
        scaler = scaler_of(device, 1000.0, enabled)
        for step in range(4):
            with optimizers[0].task("rec"):
                scaler.scale(loss_of(first, step, 0)).backward()
            with optimizers[1].task("rec"):
                scaler.scale(loss_of(second, step, 1)).backward()
            scaler.scale(loss_of(third, step, 1)).backward()
            scaler.unscale_(optimizers[1])
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        models.append(nn.ModuleList([first, second, third]))
    close(*models)


@pytest.mark.parametrize("scale", [1000.0, 3.7, torch.tensor(1024.0), torch.tensor([7.0])], ids=str)
@pytest.mark.parametrize("protocol", [False, True], ids=["unscale_", "grad_scale"])
@pytest.mark.parametrize("capture", CAPTURES)
def test_loops_that_scale_on_their_own(device, scale, protocol, capture):
    if protocol and not isinstance(scale, Tensor):
        scale = torch.tensor(scale)
    scale = scale.to(device) if isinstance(scale, Tensor) else scale
    plain, _ = trained(device, with_outside, None, capture=capture)
    model = mlp(device=device)
    optimizer = sgd(model, capture=capture)
    for step in range(5):
        scaler = scaler_of(device, float(scale))  # scales the losses only
        with_outside(optimizer, model, scaler, step)
        if protocol:
            optimizer.grad_scale, optimizer.found_inf = scale, torch.zeros((), device=device)
        else:
            for parameter in model.parameters():
                parameter.grad /= scale
            optimizer.unscale_(scale)
        optimizer.step()
        optimizer.zero_grad()
    close(model, plain)


def test_found_inf_leaves_the_step_out(device):
    model = mlp(device=device)
    optimizer = sgd(model)
    per_task(optimizer, model, scaler_of(device, enabled=False), 0)
    before = weights_of(model)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones((), device=device)
    optimizer.step()
    assert unchanged(model, before)
    del optimizer.found_inf, optimizer.grad_scale
    optimizer.step()
    assert unchanged(model, before)  # it was used up


def test_backward_between_unscaling_and_step_is_refused(device):
    model = mlp(device=device)
    optimizer = sgd(model)
    scaler = scaler_of(device)
    per_task(optimizer, model, scaler, 0)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="after the last backward pass"), optimizer.task("rec"):
        pass
    scaler.step(optimizer)
    scaler.update()
    per_task(optimizer, model, scaler, 1)
    optimizer.unscale_(scaler.get_scale())
    with pytest.raises(RuntimeError, match="after the last backward pass"), optimizer.task("rec"):
        pass
    with pytest.raises(RuntimeError, match="already"):
        optimizer.unscale_(scaler.get_scale())
    optimizer.step()


@pytest.mark.parametrize("explicit", [False, True])
def test_clipping_scaled_gradients_is_refused_when_they_are_unscaled(device, explicit):
    model = mlp(device=device)
    optimizer = sgd(model)
    scaler = scaler_of(device)
    per_task(optimizer, model, scaler, 0)
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="before the gradients were divided"):
        optimizer.unscale_(1024.0) if explicit else scaler.step(optimizer)


class Elsewhere(GradScaler):
    """Divides what it finds in a list of its own."""

    parameters: list[Tensor]

    def unscale_(self, optimizer: Any) -> None:
        state = self._per_optimizer_states[id(optimizer)]
        state["found_inf_per_device"] = {torch.device("cpu"): torch.zeros(())}
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= self._scale


def test_a_scaler_that_does_not_find_captured_gradients_is_refused(device):
    model = mlp(device=device)
    optimizer = sgd(model)
    scaler = Elsewhere(device.type, init_scale=8.0)
    scaler.parameters = list(model.parameters())
    per_task(optimizer, model, scaler, 0)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"optimizer\.unscale_\(scaler"):
        scaler.step(optimizer)
    assert unchanged(model, before)
    optimizer.unscale_(scaler.get_scale())
    scaler.step(optimizer)
    assert not unchanged(model, before)


def test_a_closure_under_a_scaler_is_refused(device):
    """It captures after the scaler has divided."""
    model = mlp(device=device)
    optimizer = sgd(model)
    scaler = scaler_of(device)
    scaler.scale(loss_of(model, 1, 1)).backward()
    with pytest.raises(RuntimeError, match="in a closure"):
        scaler.step(optimizer, lambda: per_task(optimizer, model, scaler, 0))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), torch.ones(2)], ids=str)
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="scale="):
        sgd(mlp()).unscale_(scale)


def test_groups_are_a_list_that_can_be_set_copied_and_read(device):
    model = mlp(device=device)
    optimizer = sgd(model)
    assert optimizer.param_groups is optimizer.param_groups
    per_task(optimizer, model, scaler_of(device, enabled=False), 0)
    assert len(optimizer.param_groups) == 1
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups is not optimizer.param_groups
    twin.param_groups[0]["lr"] = 5.0
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.param_groups = [{**group, "lr": 3.0} for group in optimizer.param_groups]
    assert optimizer.param_groups[0]["lr"] == 3.0
