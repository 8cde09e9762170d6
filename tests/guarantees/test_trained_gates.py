"""Gates: the trained ones move, drop a useless task and survive a resume; a user's own takes their place."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from torch import Tensor, nn

from gradsub import GemsOptimizer
from gradsub.gates import GateInputs, HypergradientGate

TASKS = ("useful", "noise")


def problem() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))
    return model, torch.randn(16, 8, generator=torch.Generator().manual_seed(3))


def gems(model: nn.Module, gate, tasks=TASKS, **options) -> GemsOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    return GemsOptimizer(base, tasks=tasks, rank=4, update_proj_gap=20, model=model, gate=gate, **options)


def train(
    model: nn.Module, target: Tensor, optimizer: GemsOptimizer, steps: range, every: int = 1
) -> list[dict[str, float]]:
    """One task can be learnt, the other asks for fresh noise at every step; all layers' gates, ``every`` few steps."""
    seen = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name in optimizer.tasks:
            x = torch.randn(32, 16, generator=generator)
            noise = torch.randn(32, 8, generator=generator)
            wanted = noise if name == "noise" else x @ target
            with optimizer.task(name, samples=32):
                (model(x) - wanted).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0 or step + 1 == steps.stop:
            seen += [layer.gates for layer in optimizer.report().layers]
    return seen


def test_trained_gates_move_and_a_useless_task_loses():
    model, target = problem()
    gates = train(model, target, gems(model, "hypergradient"), range(120), every=20)
    first, last = gates[:2], gates[-2:]
    assert all(abs(gate["noise"] - 0.5) < 0.02 for gate in first)
    assert all(gate["noise"] < 0.4 < 0.6 < gate["useful"] for gate in last)
    for gate in gates:
        assert min(gate.values()) > 0.0
        assert sum(gate.values()) == pytest.approx(1.0, abs=1e-6)


def test_between_two_equally_useful_tasks_the_gates_stay_near_equal():
    """The control: what moved them above was the noise."""
    model, target = problem()
    gates = train(model, target, gems(model, "hypergradient", tasks=("first", "second")), range(120), every=120)
    assert all(0.4 < share < 0.6 for gate in gates[-2:] for share in gate.values())


def test_uniform_gates_do_not_move():
    model, target = problem()
    gates = train(model, target, gems(model, "uniform"), range(3))
    assert all(gate == {"useful": 0.5, "noise": 0.5} for gate in gates)


def test_gates_stay_positive_however_long_a_task_is_useless():
    gate = HypergradientGate(lr=0.5, limit=3.0)
    memory = torch.zeros(1, 3)
    ones = torch.ones(1, 3)
    for _ in range(500):
        found = gate(
            GateInputs(ones[0], ones, ones[0], ones.bool(), memory=memory, alignment=torch.tensor([[-1.0, 0.0, 1.0]]))
        )
    assert found.min() >= torch.tensor(-6.0).exp() / 3
    assert found[0, 0] > 0.9
    assert found.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_theta_moves_by_no_more_than_the_gate_says(tasks, temperature):
    """As much where one task's gate is 1/2 and the others' steps help while its own do harm."""
    gate = HypergradientGate(lr=0.1, temperature=temperature, limit=50.0)
    generator = torch.Generator().manual_seed(tasks)
    theta = temperature * torch.randn(10_000, tasks, generator=generator).clamp_(-3.0, 3.0)
    alignment = torch.rand(10_000, tasks, generator=generator).round().mul_(2.0).sub_(1.0)
    theta[0] = torch.tensor([0.0] + (tasks - 1) * [-temperature * torch.tensor(tasks - 1.0).log().item()])
    alignment[0] = torch.tensor([1.0] + (tasks - 1) * [-1.0])
    memory, ones = theta.clone(), torch.ones_like(theta)
    gate(GateInputs(ones[0], ones, ones[0], ones.bool(), memory=memory, alignment=alignment))
    moved, most = (memory - theta).abs(), gate.lr / (2 * temperature)
    assert float(moved.max()) <= most * (1 + 1e-4)
    assert float(moved[0].max()) == pytest.approx(most, rel=1e-4)


@pytest.mark.parametrize("after", [7, 20, 33])
def test_a_resumed_run_has_the_same_gates_bit_for_bit(after):
    model, target = problem()
    optimizer = gems(model, "hypergradient")
    train(model, target, optimizer, range(after))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    rest = train(model, target, optimizer, range(after, 40))

    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    again, _ = problem()
    again.load_state_dict(checkpoint["model"])
    resumed = gems(again, "hypergradient")
    resumed.load_state_dict(checkpoint["optimizer"])
    assert train(again, target, resumed, range(after, 40)) == rest
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_memory_of_the_trained_gates_is_what_a_resume_needs():
    """Without it the resumed gates differ: the test above can fail."""
    model, target = problem()
    optimizer = gems(model, "hypergradient")
    train(model, target, optimizer, range(20))
    state = optimizer.state_dict()
    for held in state["state"].values():
        if "gate_memory" in held:
            assert held["gate_memory"].abs().sum() > 0
            held["gate_memory"] = torch.zeros_like(held["gate_memory"])
    rest = train(model, target, optimizer, range(20, 25))
    again, _ = problem()
    resumed = gems(again, "hypergradient")
    resumed.load_state_dict(state)
    assert train(again, target, resumed, range(20, 25)) != rest


def test_the_alignment_is_the_cosine_of_the_gradient_with_the_previous_step():
    seen = []

    class Spy:
        needs_alignment = True

        def __call__(self, inputs: GateInputs) -> Tensor:
            assert inputs.alignment is not None
            seen.append(inputs.alignment.clone())
            return torch.full_like(inputs.gradient_norms, 0.5)

    weight = nn.Parameter(torch.zeros(6, 8))
    optimizer = GemsOptimizer(
        torch.optim.SGD([weight], lr=0.1), tasks=("a", "b"), rank=4, task_rank=3, update_proj_gap=50, gate=Spy()
    )
    previous: dict[str, Tensor] = {}
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        G = {name: torch.randn(6, 8, generator=generator) for name in "ab"}
        for name in "ab":
            with optimizer.task(name):
                (weight * G[name]).sum().backward()
        optimizer.step()
        _, *own = optimizer.state[weight]["basis"].split([4, 3, 3], dim=1)
        R = {name: G[name] @ basis for name, basis in zip("ab", own, strict=True)}
        expected = [
            torch.cosine_similarity(R[n].flatten(), previous[n].flatten(), 0) if n in previous else torch.tensor(0.0)
            for n in "ab"
        ]
        torch.testing.assert_close(seen[-1][0], torch.stack(expected), rtol=1e-4, atol=1e-5)
        previous = {name: -0.1 * R[name] for name in "ab"}


def test_a_function_is_a_gate():
    """A softmax of the gradients' norms, as a user might write it."""

    def by_norm(inputs: GateInputs) -> Tensor:
        return inputs.gradient_norms.log().where(inputs.present, -torch.inf).softmax(-1)

    model, target = problem()
    gates = train(model, target, gems(model, by_norm), range(5))
    assert all(sum(gate.values()) == pytest.approx(1.0) for gate in gates)
    assert len({gate["noise"] for gate in gates}) > 5


class Smoothed:
    """A moving average of the samples' shares, kept in the optimizer's state."""

    def __call__(self, inputs: GateInputs) -> Tensor:
        assert inputs.memory is not None
        share = inputs.samples / inputs.samples.sum()
        inputs.memory.mul_(0.9).add_(0.1 * share)
        return inputs.memory / inputs.memory.sum(-1, keepdim=True)


def test_a_users_gate_remembers_through_the_optimizers_state_and_a_resume():
    def run(optimizer: GemsOptimizer, model: nn.Module, steps: range) -> list[float]:
        gates = []
        for step in steps:
            for name, samples in {"useful": 1 + step % 3, "noise": 2}.items():
                with optimizer.task(name, samples=samples):
                    model(torch.ones(2, 16)).square().mean().backward()
            optimizer.step()
            gates.append(optimizer.report().layers[0].gates["useful"])
        return gates

    model, _ = problem()
    optimizer = gems(model, Smoothed())
    found = run(optimizer, model, range(6))
    memory, expected = [0.0, 0.0], []
    for step in range(6):
        samples = (1 + step % 3, 2)
        memory = [0.9 * m + 0.1 * s / sum(samples) for m, s in zip(memory, samples, strict=True)]
        expected.append(memory[0] / sum(memory))
    assert found == pytest.approx(expected, rel=1e-5)

    again, _ = problem()
    resumed = gems(again, Smoothed())
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(model.state_dict())
    assert run(resumed, again, range(6, 9)) == run(optimizer, model, range(6, 9))
    pairs = itertools.zip_longest(model.parameters(), again.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)
