"""How much of each task's own step enters the update."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradsub import GateInputs, GemsOptimizer
from gradsub._measure import previous_step
from gradsub.gates import heuristic_gate, resolve_gate, uniform_gate

from .toys import SAMPLES, TASKS, basis_of, gems, loss_of, mlp, noise, train

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 5))
VALUES = st.floats(0.0, 1e6, width=32)


@st.composite
def gate_inputs(draw: st.DrawFn) -> GateInputs:
    layers, tasks = draw(SIZES)
    present = draw(hnp.arrays(bool, (layers, tasks)))
    norms = draw(hnp.arrays(np.float32, (layers, tasks), elements=VALUES))
    return GateInputs(
        losses=torch.from_numpy(draw(hnp.arrays(np.float32, tasks, elements=VALUES))),
        gradient_norms=torch.from_numpy(norms * present),
        samples=torch.from_numpy(draw(hnp.arrays(np.float32, tasks, elements=st.floats(1, 1e4, width=32)))),
        present=torch.from_numpy(present),
    )


@given(gate_inputs())
def test_gates_are_shares(inputs):
    for gate in (heuristic_gate, uniform_gate):
        gates = gate(inputs)
        assert gates.shape == inputs.gradient_norms.shape
        assert bool((gates >= 0).all())
        assert bool((gates[~inputs.present] == 0).all())
        some = inputs.present.any(1)
        torch.testing.assert_close(gates[some].sum(1), torch.ones(int(some.sum())), rtol=0, atol=1e-5)


@given(gate_inputs())
def test_the_uniform_gate_is_equal_over_the_tasks_present(inputs):
    gates = uniform_gate(inputs)
    for row, here in zip(gates, inputs.present, strict=True):
        assert row[here].tolist() == pytest.approx([1 / max(1, int(here.sum()))] * int(here.sum()))


@given(gate_inputs())
def test_the_heuristic_is_its_formula(inputs):
    """g_k = 0.4 loss share + 0.4 norm share + 0.2 sample share, where each has something to share."""
    gates = heuristic_gate(inputs).double().numpy()
    for row, here, norms in zip(gates, inputs.present.numpy(), inputs.gradient_norms.double().numpy(), strict=True):
        parts = [inputs.losses.double().numpy()[here], norms[here], inputs.samples.double().numpy()[here]]
        shares = [part / part.sum() if part.sum() > 0 else np.full(len(part), 1 / max(1, len(part))) for part in parts]
        np.testing.assert_allclose(row[here], 0.4 * shares[0] + 0.4 * shares[1] + 0.2 * shares[2], rtol=1e-4, atol=1e-6)


def test_an_unseen_loss_makes_losses_count_as_equal():
    row = torch.tensor([[1.0, 1.0]])
    inputs = GateInputs(torch.tensor([torch.nan, 100.0]), row, row[0], row.bool())
    assert heuristic_gate(inputs).tolist() == [[0.5, 0.5]]
    absent = GateInputs(torch.tensor([torch.nan, 100.0]), row, row[0], torch.tensor([[False, True]]))
    assert heuristic_gate(absent).tolist() == [[0.0, 1.0]]


def test_negative_losses_weigh_by_their_size():
    row = torch.tensor([[1.0, 1.0]])
    gates = heuristic_gate(GateInputs(torch.tensor([-3.0, 1.0]), row, row[0], row.bool()))
    torch.testing.assert_close(gates, torch.tensor([[0.6, 0.4]]))


class Spy:
    """A user's own gate that keeps what it was shown."""

    def __init__(self, gates: tuple[float, ...]) -> None:
        self.gates = gates
        self.seen: list[GateInputs] = []

    def __call__(self, inputs: GateInputs) -> torch.Tensor:
        self.seen.append(inputs)
        return torch.tensor(self.gates, device=inputs.losses.device).expand(inputs.gradient_norms.shape)


def test_a_gate_sees_losses_norms_and_samples(device):
    model = mlp(device=device)
    spy = Spy((0.5, 0.5))
    optimizer = gems(model, gate=spy, rank=4, task_rank=7)
    losses, norms = [], []
    for task in range(2):
        loss = loss_of(model, 0, task)
        gradient = torch.autograd.grad(loss, model[0].weight)[0]
        losses.append(loss.item())
        norms.append(float(torch.linalg.svdvals(gradient)[:7].norm()))
    train(model, optimizer, 1)
    (inputs,) = spy.seen
    assert inputs.losses.tolist() == pytest.approx(losses, rel=1e-5)
    assert inputs.samples.tolist() == list(SAMPLES.values())
    assert inputs.gradient_norms[0].tolist() == pytest.approx(norms, rel=1e-4)
    assert inputs.present.tolist() == [[True, True]] * 2


def test_losses_of_accumulated_parts_add_up_and_samples_too(device):
    model = mlp(device=device)
    spy = Spy((0.5, 0.5))
    optimizer = gems(model, gate=spy)
    total = 0.0
    for part in range(3):
        with optimizer.task("rec", samples=5):
            loss = loss_of(model, part, 0)
            loss.backward()
            total += loss.item()
    optimizer.step()
    assert float(spy.seen[0].losses[1]) == pytest.approx(total, rel=1e-5)
    assert bool(spy.seen[0].losses[0].isnan())
    assert spy.seen[0].samples.tolist() == [0.0, 15.0]
    assert spy.seen[0].present.tolist() == [[False, True]] * 2


@pytest.mark.filterwarnings("ignore:the gate reads losses, and none was seen of .'rec'.")
def test_a_loss_may_be_told(device):
    """For backward passes that start elsewhere, at a vector of losses; that of a scalar is seen in any case."""
    model = mlp(device=device)
    spy = Spy((0.5, 0.5))
    optimizer = gems(model, gate=spy)
    with optimizer.task("search", loss=torch.tensor([3.0, 4.0], device=device)):
        torch.autograd.backward(loss_of(model, 0, 0))
    with optimizer.task("rec"):
        loss = loss_of(model, 0, 0)
        torch.autograd.backward(loss)
    optimizer.step()
    assert float(spy.seen[0].losses[0]) == 7.0
    assert float(spy.seen[0].losses[1]) == pytest.approx(loss.item())


@pytest.mark.parametrize(("gates", "kept"), [((1.0, 0.0), "search"), ((0.0, 1.0), "rec")])
def test_gates_weigh_each_tasks_own_step(device, gates, kept):
    """A gate of 1 for one task leaves the shared step and that task's own."""
    weight = torch.nn.Parameter(noise(9, 8, key=(1,)).double().to(device))
    gradients = {name: noise(9, 8, key=(2, k)).double().to(device) for k, name in enumerate(TASKS)}
    base = torch.optim.SGD([weight], lr=1.0)
    optimizer = GemsOptimizer(base, tasks=TASKS, rank=3, task_rank=2, gate=Spy(gates), null_space=None)
    before = weight.detach().clone()
    for name, gradient in gradients.items():
        with optimizer.task(name):
            (weight * gradient).sum().backward()
    optimizer.step()
    shared = torch.linalg.svd(sum(gradients.values()) / 2)
    own = torch.linalg.svd(gradients[kept])
    expected = (shared.U[:, :3] * shared.S[:3]) @ shared.Vh[:3] + (own.U[:, :2] * own.S[:2]) @ own.Vh[:2]
    torch.testing.assert_close(before - weight.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("widths", [(12, 16, 8, 12), (12, 12, 12, 12)], ids=["three blocks", "one block"])
def test_every_layer_has_a_gate_of_its_own(device, widths):
    """Where it is 0 for all tasks, the update stays in the shared subspace."""

    def gate(inputs: GateInputs) -> torch.Tensor:
        assert len(inputs.present) == 3
        return (torch.arange(3, device=device) > 0).float()[:, None].expand(3, 2)

    model = mlp(widths, dtype=torch.float64, device=device)
    optimizer = gems(model, base=torch.optim.SGD(model.parameters(), lr=0.1), gate=gate, task_rank=2)
    before = [layer.weight.detach().clone() for layer in model[::2]]
    train(model, optimizer, 1)
    for layer, old, gated in zip(model[::2], before, optimizer.report().layers, strict=True):
        change = layer.weight.detach() - old
        basis = basis_of(optimizer, layer.weight, 0, (4, 2, 2))
        outside = change - change @ basis @ basis.mT
        assert (float(outside.norm()) > 1e-3 * float(change.norm())) == (gated.gates["rec"] > 0)


def test_a_task_remembers_the_last_step_of_its_own(device):
    model = mlp(dtype=torch.float64, device=device)
    optimizer = gems(
        model, base=torch.optim.SGD(model.parameters(), lr=0.1), gate="hypergradient", update_proj_gap=100, task_rank=2
    )
    train(model, optimizer, 2)
    gradients = [torch.autograd.grad(loss_of(model, 2, task), list(model.parameters())) for task in (0, 1)]
    train(model, optimizer, 1, start=2)
    for place, parameter in enumerate(model.parameters()):
        if parameter.ndim == 2:
            for task in (0, 1):
                own = basis_of(optimizer, parameter, task + 1, (4, 2, 2))
                expected = -0.1 * gradients[task][place] @ own
                torch.testing.assert_close(optimizer.state[parameter][previous_step(task)], expected)


def test_gates_by_name_and_by_callable():
    assert resolve_gate("uniform") is uniform_gate
    assert resolve_gate(heuristic_gate) is heuristic_gate
    with pytest.raises(ValueError, match=r"gate='softmax' must be one of .*'heuristic'.*'uniform'"):
        resolve_gate("softmax")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_default_gates_of_a_run_sum_to_one(device, count):
    model = mlp(device=device)
    optimizer = gems(model, tasks=[f"t{k}" for k in range(count)])
    train(model, optimizer, 2)
    for layer in optimizer.report().layers:
        assert sum(layer.gates.values()) == pytest.approx(1.0, abs=1e-6)
        assert min(layer.gates.values()) > 0


@pytest.mark.parametrize("loss", [torch.inf, -torch.inf, 1e38])
def test_losses_beyond_the_range_are_shares_too(loss):
    one = torch.ones(1, 3)
    inputs = GateInputs(torch.tensor([loss, loss, 1.0]), one, torch.ones(3), one.bool())
    gates = heuristic_gate(inputs)
    torch.testing.assert_close(gates.sum(-1), torch.ones(1))
    torch.testing.assert_close(gates[:, 0], gates[:, 1])
