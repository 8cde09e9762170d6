"""Weightings with memory inside of the optimizer: by losses, and TorchJD's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gradsub.surgery import DWA, FAMO, SurgeryInputs, UncertaintyWeighting, upgrad
from tests.optimizer.toys import SAMPLES, TASKS, gems, loss_of, mlp, same, train, weights_of


class Recorder:
    """Passes on to another one, and keeps what it was given."""

    needs_losses = True

    def __init__(self, weights: tuple[float, ...] = (1.0, 1.0)) -> None:
        self.weights = weights
        self.seen: list[SurgeryInputs] = []

    def __call__(self, inputs: SurgeryInputs) -> torch.Tensor:
        self.seen.append(inputs)
        return torch.tensor(self.weights).to(inputs.gramian)


def test_what_a_weighting_is_told(device):
    model = mlp(device=device)
    recorder = Recorder()
    grams = []

    def plain(gramian: torch.Tensor) -> torch.Tensor:
        grams.append(gramian)
        return torch.ones_like(gramian[0])

    twin = copy.deepcopy(model)
    train(model, gems(model, surgery=recorder), 2)
    train(twin, gems(twin, surgery=plain), 2)
    assert same(weights_of(model), weights_of(twin))
    assert len(recorder.seen) == 2
    for inputs, gramian in zip(recorder.seen, grams, strict=True):
        assert torch.equal(inputs.gramian, gramian)
        assert inputs.samples.tolist() == [SAMPLES[task] for task in TASKS]
    expected = [loss_of(mlp(device=device), 0, task).item() for task in range(2)]
    assert recorder.seen[0].losses.tolist() == pytest.approx(expected)


def test_its_weights_are_those_of_the_sum(device):
    """2 and 1/2 do to the shared gradient what losses multiplied by them do."""
    ends = []
    for weights, factors in (((2.0, 0.5), (1.0, 1.0)), ((1.0, 1.0), (2.0, 0.5))):
        model = mlp((12, 10), device=device, bias=False)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        off = lambda inputs: torch.zeros_like(inputs.gradient_norms)  # noqa: E731 (the tasks' own steps are left out)
        optimizer = gems(model, base=base, surgery=Recorder(weights), gate=off, update_proj_gap=50)
        # The first gradients alone make the bases, and there the factors would count.
        optimizer.load_state_dict(started(device))
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                (loss_of(model, 1, task) * factors[task]).backward()
        optimizer.step()
        ends.append(weights_of(model))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def started(device: Any) -> dict[str, Any]:
    model = mlp((12, 10), device=device, bias=False)
    optimizer = gems(model, base=torch.optim.SGD(model.parameters(), lr=0.0), update_proj_gap=50, surgery=Recorder())
    train(model, optimizer, 1)
    return optimizer.state_dict()


def alone(optimizer: Any, model: nn.Module, step: int, task: int) -> None:
    with optimizer.task(TASKS[task]):
        loss_of(model, step, task).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_task_alone_in_its_step_is_weighted_too(device):
    model = mlp(device=device)
    optimizer = gems(model, surgery=(surgery := UncertaintyWeighting(lr=0.5)))
    for step in range(4):
        alone(optimizer, model, step, step % 2)
    assert (surgery.state_dict()["steps"] == 2).all()


@pytest.mark.parametrize("surgery", ["famo", "dwa", "uncertainty"])
def test_a_loss_that_nobody_saw_is_said_once(device, surgery):
    model = mlp(device=device)
    optimizer = gems(model, surgery=surgery, gate="uniform")

    def step() -> None:
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                loss = loss_of(model, 0, task)
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = gradient
        optimizer.step()

    with pytest.warns(UserWarning, match=r"reads losses, and none was seen of \['search', 'rec'\]: their weight is 1"):
        step()
    step()
    assert all(torch.isfinite(weight).all() for weight in weights_of(model))


def torchjd(name: str, *arguments: str) -> Callable[[], Any]:
    def make() -> Any:
        aggregation = pytest.importorskip("torchjd.aggregation")
        try:
            return getattr(aggregation, name)(*(getattr(aggregation, argument)() for argument in arguments))
        except ImportError as missing:
            pytest.skip(f"{name}: {missing}")

    return make


STATEFUL: dict[str, Callable[[], Any]] = {
    "famo": lambda: FAMO(lr=0.3),
    "dwa": lambda: DWA(window=1),
    "uncertainty": lambda: UncertaintyWeighting(lr=0.3),
    "TorchJD's GradVac": torchjd("GradVacWeighting"),
    "TorchJD's PCD": torchjd("PCDWeighting"),
    "TorchJD's CR-MOGM of MGDA": torchjd("CRMOGMWeighting", "MGDAWeighting"),
    "TorchJD's GradVac in a closure": lambda: (lambda inner: lambda gramian: inner(gramian))(
        torchjd("GradVacWeighting")()
    ),
}


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_its_state_resumes_bit_for_bit(device, name, after):
    with torch.random.fork_rng(devices=[]):  # TorchJD's draw from the global generator; two tasks have one order
        model = mlp(device=device)
        optimizer = gems(model, surgery=STATEFUL[name]())
        train(model, optimizer, after)
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        fresh = mlp(device=device, seed=1)
        fresh.load_state_dict(weights)
        again = gems(fresh, surgery=STATEFUL[name]())
        shapes = {key: value.shape for key, value in flat(again).items()}
        again.load_state_dict(state)
        assert {key: value.shape for key, value in flat(again).items()} == shapes  # as distributed checkpoints want it
        train(model, optimizer, 3, start=after)
        train(fresh, again, 3, start=after)
        assert same(weights_of(model), weights_of(fresh))
        one, other = flat(optimizer), flat(again)
        assert one.keys() == other.keys()
        assert same(one.values(), other.values())
        # The memory matters: the same weights and moments with a fresh one end elsewhere.
        if after == 3:
            forgetful = gems(other_model := mlp(device=device, seed=1), surgery=STATEFUL[name]())
            other_model.load_state_dict(weights)
            for held in state["state"].values():
                for key in [key for key in held if key.startswith("surgery")]:
                    del held[key]
            with pytest.warns(UserWarning, match="no state of surgery="):
                forgetful.load_state_dict(state)
            train(other_model, forgetful, 3, start=3)
            assert not same(weights_of(model), weights_of(other_model))


def flat(optimizer: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for held in optimizer.state_dict()["state"].values():
        found.update({key: torch.as_tensor(value) for key, value in held.items() if key.startswith("surgery")})
    assert found
    return found


@pytest.mark.parametrize("way", ["deepcopy", "new process"])
def test_a_copy_has_a_memory_of_its_own(device, way):
    model = mlp(device=device)
    optimizer = gems(model, surgery=DWA(window=1))
    train(model, optimizer, 3)
    twin, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, start=3)
    train(twin, copied, 2, start=3)
    assert same(weights_of(model), weights_of(twin))
    assert same(flat(optimizer).values(), flat(copied).values())


def test_an_aggregator_stands_for_its_weighting(device):
    aggregation = pytest.importorskip("torchjd.aggregation")
    pytest.importorskip("quadprog")
    ends = []
    for surgery in (aggregation.UPGrad(), aggregation.UPGradWeighting()):
        model = mlp(device=device)
        train(model, gems(model, surgery=surgery), 3)
        ends.append(weights_of(model))
    assert same(*ends)


def test_an_aggregator_of_gradients_is_refused(device):
    aggregation = pytest.importorskip("torchjd.aggregation")
    with pytest.raises(ValueError, match=r"surgery=GradDrop\(\) aggregates gradients.*pass a weighting of a Gramian"):
        gems(mlp(device=device), surgery=aggregation.GradDrop())


def test_weights_of_another_shape_are_refused(device):
    model = mlp(device=device)
    optimizer = gems(model, surgery=lambda gramian: gramian)
    with pytest.raises(ValueError, match=r"surgery returned weights of shape \(2, 2\), expected one a task: \(2,\)"):
        train(model, optimizer, 1)


def test_upgrad_by_name_is_the_function(device):
    ends = []
    for surgery in ("upgrad", upgrad):
        model = mlp(device=device)
        train(model, gems(model, surgery=surgery), 3)
        ends.append(weights_of(model))
    assert same(*ends)
