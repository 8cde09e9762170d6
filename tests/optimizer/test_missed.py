"""Steps without a task, and torch's clipping of gradients that are captured: said once."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad, clip_grad_norm_

from gradsub import GemsOptimizer

from .toys import TASKS, gems, loss_of, mlp, same, train, weights_of

Clip = Callable[[nn.Module, GemsOptimizer], object]


def quiet_step(model: nn.Module, optimizer: GemsOptimizer, number: int, clip: Clip | None = None) -> None:
    for task, name in enumerate(TASKS):
        with optimizer.task(name):
            loss_of(model, number, task).backward()
    if clip is not None:
        clip(model, optimizer)
    optimizer.step()
    optimizer.zero_grad()


# --- no task ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["fused", "generic"])
def test_several_steps_without_any_task_are_said_once(device, capture):
    model = mlp(device=device)
    optimizer = gems(model, capture=capture)

    def step(number: int) -> None:
        loss_of(model, number, 0).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    step(1)
    with pytest.warns(UserWarning, match=r"3 steps had gradients, and none of them a task: no optimizer\.task") as told:
        step(2)
    assert len(told) == 1
    assert told[0].filename == __file__
    step(3)


def test_a_backward_pass_a_step_later_is_said_too():
    """Forward in the block, backward after the step: no gradient follows its block before that is over."""
    model = mlp((12, 8))
    optimizer = gems(model, capture="generic")

    def late(number: int) -> None:
        with optimizer.task("search"):
            loss = loss_of(model, number, 0)
        optimizer.step()
        optimizer.zero_grad()
        loss.backward()

    for number in range(3):
        late(number)
    with pytest.warns(UserWarning, match=r"of them a task: task\('search'\) was closed before any backward") as told:
        late(3)
    late(4)
    assert len(told) == 1


@pytest.mark.parametrize("why", ["tasks came first", "no tasks", "nothing arrived", "by hand"])
def test_steps_that_need_no_task(why):
    model = mlp()
    optimizer = gems(model, tasks=() if why == "no tasks" else TASKS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if why == "tasks came first":
            train(model, optimizer, 1)
        for number in range(5):
            if why == "by hand":
                for parameter in model.parameters():
                    parameter.grad = torch.ones_like(parameter)
            elif why != "nothing arrived":
                loss_of(model, number, 0).backward()
            optimizer.step()
            optimizer.zero_grad()


# --- a refresh step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", ["svd", "sketch"])
def test_gradients_of_inputs_after_a_block_are_not_refused(device, refresh):
    """In no step, whether it decomposes whole gradients or not; they change nothing."""
    model, plain = mlp(device=device), mlp(device=device)
    optimizer, other = (gems(each, capture="fused", refresh=refresh, update_proj_gap=2) for each in (model, plain))
    for number in range(3):
        for task, name in enumerate(TASKS):
            x = torch.randn(4, model[0].in_features, device=device, requires_grad=True)
            with optimizer.task(name):
                loss_of(model, number, task).backward()
                y = model(x).square().mean()
            (slope,) = torch.autograd.grad(y, x)
            expected = torch.autograd.grad(plain(x).square().mean(), x)[0]
            torch.testing.assert_close(slope, expected)
            with other.task(name):
                loss_of(plain, number, task).backward()
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    assert same(weights_of(model), weights_of(plain))


@pytest.mark.parametrize("one_inside", [False, True])
def test_a_backward_pass_after_its_block_is_refused_in_steps_that_refresh_as_well(device, one_inside):
    """Also if every step is one, and if another loss of the block had its backward pass inside."""
    model = mlp(device=device)
    optimizer = gems(model, capture="fused", refresh="svd", update_proj_gap=1)
    with optimizer.task("search"):
        loss = loss_of(model, 0, 0)
        if one_inside:
            loss_of(model, 1, 0).backward()
    with pytest.raises(RuntimeError, match=r"ran inside optimizer\.task .* its backward pass outside of it"):
        loss.backward()


def test_second_derivatives_inside_of_a_block_are_not_refused(device):
    model = mlp(device=device)
    optimizer = gems(model, capture="fused", refresh="svd")
    with optimizer.task("search"):
        x = torch.randn(4, 12, device=device, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (slope.square().sum() + model(x).square().sum()).backward()
    optimizer.step()


# --- clipping ---------------------------------------------------------------------------------------------------------


def by_accelerate(model: nn.Module, _: GemsOptimizer) -> None:
    from accelerate import Accelerator

    Accelerator(cpu=True).clip_grad_norm_(model.parameters(), 1.0)


TORCHS: dict[str, Clip] = {
    "by attribute": lambda model, _: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "imported earlier": lambda model, _: clip_grad_norm_(model.parameters(), 1.0),
    "by keyword": lambda model, _: torch.nn.utils.clip_grad_norm_(parameters=list(model.parameters()), max_norm=1.0),
    "one parameter": lambda model, _: torch.nn.utils.clip_grad_norm_(model[0].weight, 1.0),
    "accelerate": by_accelerate,
}
OTHERS: dict[str, Clip] = {
    "the optimizer's": lambda _, optimizer: optimizer.clip_grad_norm_(1.0),
    "both": lambda model, optimizer: (clip_grad_norm_(model.parameters(), 1.0), optimizer.clip_grad_norm_(1.0)),
    "both, the other way round": lambda model, optimizer: (
        optimizer.clip_grad_norm_(1.0),
        clip_grad_norm_(model.parameters(), 1.0),
    ),
    "the norm alone": lambda model, _: clip_grad_norm_(model.parameters(), float("inf")),
    "of another model": lambda model, _: clip_grad_norm_(copy.deepcopy(model).parameters(), 1.0),
}


@pytest.mark.parametrize("capture", ["fused", "generic"])
@pytest.mark.parametrize("clip", TORCHS)
def test_torchs_clipping_of_captured_gradients_is_said_once(device, clip, capture):
    model = mlp(device=device)
    optimizer = gems(model, capture=capture)
    with pytest.warns(UserWarning, match=r"were not clipped\. Call optimizer\.clip_grad_norm_\(max_norm\)") as told:
        quiet_step(model, optimizer, 0, TORCHS[clip])
    assert len(told) == 1
    assert told[0].filename == __file__
    quiet_step(model, optimizer, 1, TORCHS[clip])


@pytest.mark.parametrize("clip", OTHERS)
def test_clipping_that_misses_nothing_is_no_reason_to_speak(device, clip):
    model = mlp(device=device)
    optimizer = gems(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_step(model, optimizer, 0, OTHERS[clip])
        loss_of(model, 1, 0).backward()
        clip_grad_norm_(model.parameters(), 1.0)  # outside of any task, and nothing is captured
        optimizer.step()


def test_torchs_functions_do_what_they_do_and_are_given_back(device):
    model = mlp(device=device)
    optimizer, own = gems(model), torch.nn.utils.clip_grad_norm_
    loss_of(model, 0, 0).backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    with optimizer.task("rec"):
        loss_of(model, 0, 1).backward()
    assert torch.nn.utils.clip_grad_norm_ is not own
    norm = torch.nn.utils.clip_grad_norm_((p for p in model.parameters()), 1e-3)
    torch.testing.assert_close(norm, expected)
    total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(total) == pytest.approx(1e-3, rel=1e-3)
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-6)
    assert max(float(p.grad.abs().max()) for p in model.parameters()) == pytest.approx(1e-6)
    optimizer.zero_grad()
    assert torch.nn.utils.clip_grad_norm_ is clip_grad.clip_grad_norm_ is own


def test_of_two_optimizers_the_one_whose_gradients_were_missed_speaks(device):
    first, second = mlp(device=device), mlp(seed=1, device=device)
    optimizers = [gems(first), gems(second)]
    own = torch.nn.utils.clip_grad_norm_
    for model, optimizer in zip((first, second), optimizers, strict=True):
        with optimizer.task("rec"):
            loss_of(model, 0, 0).backward()
    clip_grad_norm_(second.parameters(), 1.0)
    optimizers[0].step()
    with pytest.warns(UserWarning, match="were not clipped"):
        optimizers[1].step()
    assert torch.nn.utils.clip_grad_norm_ is own


def test_who_begins_to_listen_while_another_thread_gives_the_functions_back_is_heard(device):
    from gradsub.capture import _clipping

    model = mlp(device=device)
    gone, optimizer = gems(model), gems(other := mlp(device=device))
    with gone.task("rec"):
        loss_of(model, 0, 0).backward()
    del gone
    gc.collect()
    thread = threading.Thread(target=lambda: torch.nn.utils.clip_grad_norm_([], 1.0))
    with _clipping._EXCHANGING:
        thread.start()  # it finds that nobody listens, and waits
        time.sleep(0.1)
        _clipping._LISTENING.add(optimizer._intake._clipping)
    thread.join()
    with pytest.warns(UserWarning, match="were not clipped"):
        quiet_step(other, optimizer, 0, TORCHS["by attribute"])


def test_an_optimizer_that_is_gone_leaves_torch_alone(device):
    model, own = mlp(device=device), torch.nn.utils.clip_grad_norm_
    optimizer = gems(model)
    with optimizer.task("rec"):
        loss_of(model, 0, 0).backward()
    del optimizer
    gc.collect()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert torch.nn.utils.clip_grad_norm_ is own


def test_copies_and_pickles_speak_for_themselves(device):
    model = mlp(device=device)
    optimizer = gems(model)
    for twins in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        with pytest.warns(UserWarning, match="were not clipped"):
            quiet_step(*twins, 0, TORCHS["by attribute"])
    assert same(weights_of(model), weights_of(mlp(device=device)))


def test_a_trainers_own_clipping_is_said(tmp_path):
    """The Trainer's ``max_grad_norm`` of 1, its default."""
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.layers(x).square().mean()}

    class Tasked(Trainer):
        def training_step(self, *arguments: object) -> torch.Tensor:
            with optimizer.task("rec"):
                return super().training_step(*arguments)

    model = Model()
    optimizer = gems(model)
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, **quiet)
    data = [{"x": row} for row in torch.randn(32, 12)]
    trainer = Tasked(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    with pytest.warns(UserWarning, match=r"in a trainer, set its own clipping \(max_grad_norm"):
        trainer.train()
