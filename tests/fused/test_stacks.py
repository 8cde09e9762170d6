"""Whole blocks travel as stacks from the backward pass to the step, and nobody can tell."""

from __future__ import annotations

import contextlib
import copy
import weakref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune

from gradsub import NullSpace
from gradsub.capture import Captured
from gradsub.capture._tray import tasks_side_by_side
from gradsub.subspace import Block

from .worlds import flat, gems, model_of, null_space_of, train

WIDTHS = (16, 16, 16, 16)
TASKS = ("a", "b")


class Partly(nn.Module):
    """Linear layers of one shape, of which a pass may leave some out or use some as bare weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = model_of(WIDTHS, bias=False)

    def forward(self, x, left_out=(), bare=()):
        for place, layer in enumerate(self.layers):
            if not isinstance(layer, nn.Linear):
                x = layer(x)
            elif place // 2 in bare:
                x = nn.functional.linear(x, layer.weight)
            elif place // 2 not in left_out:
                x = layer(x)
        return x


def input_of(step, width=16):
    return torch.randn(6, width, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


PLACES = st.sets(st.integers(0, 2), max_size=2)


@example([("a", set(), set()), ("a", set(), set())], {0}, "input")  # a stack on top of another
@example([("a", set(), set()), ("b", {0}, set())], {1}, "input")  # and beside what is none
@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(TASKS), PLACES, PLACES), min_size=1, max_size=6),
    st.sets(st.integers(0, 5)),
    st.sampled_from(["input", "output"]),
)
def test_looking_at_single_gradients_changes_no_step(passes, looked_after, side):
    """Whatever passes bring of a block, in whatever order: read layer by layer in between, or never."""
    models = [Partly() for _ in range(2)]
    optimizers = [gems(model, tasks=TASKS, side=side, update_proj_gap=100) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        for step in range(2):  # the bases, then places for the stacks
            for task in TASKS:
                with optimizer.task(task):
                    model(input_of(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for number, (task, left_out, bare) in enumerate(passes):
        for model, optimizer in zip(models, optimizers, strict=True):
            with optimizer.task(task):
                model(input_of(number + 2), left_out, bare).square().mean().backward()
        if number in looked_after:
            assert optimizers[0]._intake.held.by_parameter()
    for optimizer in optimizers:
        optimizer.step()
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("side", ["input", "output"])
def test_an_ordinary_step_makes_no_record_of_a_layer(side, protected, monkeypatch):
    made = []
    model = model_of(WIDTHS, bias=False)
    optimizer = gems(
        model, side=side, update_proj_gap=100, null_space=null_space_of(model, side) if protected else None
    )
    train(model, optimizer, 2)
    before = [weight.detach().clone() for weight in model.parameters()]
    monkeypatch.setattr(Captured, "__init__", lambda self, *args, **kwargs: made.append(self))
    train(model, optimizer, 1, start=2)
    assert not made
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_gradients_of_one_layer_never_reach_another():
    """Every layer of the block has its own task's gradient, told by what the others have not."""
    model = model_of(WIDTHS, bias=False)
    optimizer = gems(model, tasks=TASKS, update_proj_gap=100)
    train(model, optimizer, 2)
    with optimizer.task("a"):
        model(input_of(7)).square().mean().backward()
    stacked = copy.deepcopy(optimizer._intake.held)
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    single = optimizer._intake.held.by_parameter()[0]
    found = next(stacked.tensors(0))
    for row, weight in enumerate(weights):
        gradient = torch.autograd.grad(model(input_of(7)).square().mean(), weight)[0]
        state = optimizer.state[weight]
        shared_and_own = state["basis"][:, : found.shape[1]]
        torch.testing.assert_close(single[weight].projected, gradient @ shared_and_own, rtol=0, atol=1e-12)
        assert torch.equal(found[row].mT, single[weight].projected)


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_norm_is_the_same_of_stacks_and_of_single_gradients(accumulated):
    norms, weights = [], []
    for looked in (False, True):
        model = model_of(WIDTHS, bias=False)
        optimizer = gems(model, tasks=TASKS, update_proj_gap=100)
        train(model, optimizer, 2)
        for number, task in enumerate(TASKS * (1 + accumulated)):
            with optimizer.task(task):
                model(input_of(number)).square().mean().backward()
        if looked:
            assert optimizer._intake.held.by_parameter()
        norms.append(torch.stack(list(optimizer.clip_grad_norm_(1e-3).values())))
        optimizer.step()
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0)
    assert float(norms[0].min()) > 1e-3
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-12)


def test_gradients_of_a_block_that_is_split_meanwhile_are_not_lost():
    """Nothing does that between a backward pass and the step; whoever will must not lose a gradient in silence."""
    weights = []
    for looked in (False, True):
        model = model_of((*WIDTHS, 16), bias=False)
        optimizer = gems(model, tasks=TASKS, update_proj_gap=100)
        train(model, optimizer, 2)
        for number, task in enumerate(TASKS):
            with optimizer.task(task):
                model(input_of(number)).square().mean().backward()
            if looked:
                assert optimizer._intake.held.by_parameter()
            if number == 0:
                optimizer._blocks._split(optimizer._blocks.all[0], [2, 3])
        optimizer.step()
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("tasks", [("a",), ("b", "a"), ("a", "b", "c")])
def test_a_step_copies_no_stack_that_lies_side_by_side_and_keeps_none_that_it_copied(tasks):
    """Also of a single task, and where other tasks came than in the last step."""
    model = model_of(WIDTHS, bias=False)
    optimizer = gems(model, tasks=("a", "b", "c"), update_proj_gap=100)
    train(model, optimizer, 2)
    for number, task in enumerate(tasks):
        with optimizer.task(task):
            model(input_of(number)).square().mean().backward()
    stacks = [weakref.ref(stack) for task in range(3) for _, stack in optimizer._intake.held.stacks(task)]
    assert len(stacks) == len(tasks)
    seen = []
    inner_step = optimizer._inner.step

    def watched(*arguments):
        seen.append([stack() is not None for stack in stacks])
        return inner_step(*arguments)

    optimizer._inner.step = watched
    optimizer.step()
    assert seen == [[False] * len(tasks)]


@pytest.mark.parametrize("blocks", [(("a", 0), ("a", 1), ("b", 2)), (("a", 0), ("b", 2), ("a", 1))])
def test_a_task_that_is_opened_again_before_the_step_adds_to_what_it_left(blocks):
    """Two blocks of one task are one pass of the sum of their losses."""
    found = []
    for together in (False, True):
        model = Partly()
        optimizer = gems(model, tasks=TASKS, gate="uniform", update_proj_gap=100)
        for step in range(4):
            for task, places in (("a", (0, 1)), ("b", (2,))) if together else [(task, (k,)) for task, k in blocks]:
                with optimizer.task(task, samples=len(places)):
                    sum(model(input_of(3 * step + place)).square().mean() for place in places).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_task_that_cannot_open_is_not_half_open(late, monkeypatch):
    """Out of memory: what follows outside of any task is of none."""
    model = model_of((8, 8, 8, 12), bias=False)
    optimizer = gems(model, tasks=TASKS, rank=3)
    train(model, optimizer, 2)
    joint, calls = Block.joint, []

    def fails(self, *given):
        calls.append(self)
        if len(calls) > late:
            raise torch.OutOfMemoryError("none left")
        return joint(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Block, "joint", fails)
        with contextlib.suppress(torch.OutOfMemoryError), optimizer.task("a"):
            pass
    model(input_of(0, 8)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("tasks", [1, 2])
def test_stacks_that_lie_side_by_side_are_not_copied(tasks, axis):
    rack = torch.randn(tasks, 3, 4, 5)
    stacks = list(rack.unbind()) if tasks > 1 else [rack[0].clone()]
    found = tasks_side_by_side(stacks, axis)
    assert found.data_ptr() == stacks[0].data_ptr()
    assert all(torch.equal(found[:, k], stack.mT if axis == 1 else stack) for k, stack in enumerate(stacks))


@pytest.mark.parametrize("shape", [(0, 4, 16), (3, 0, 16), (0, 16)])
@pytest.mark.parametrize("side", ["input", "output"])
def test_an_empty_batch_adds_nothing(shape, side):
    weights = []
    for empty in (False, True):
        model = model_of(WIDTHS, bias=True)
        optimizer = gems(model, tasks=TASKS, side=side, update_proj_gap=100)
        for step in range(4):
            for number, task in enumerate(TASKS):
                with optimizer.task(task):
                    loss = model(input_of(2 * step + number)).square().mean()
                    if empty and step > 1:
                        loss = loss + model(torch.zeros(shape, dtype=torch.float64, requires_grad=True)).sum()
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-12)


def pruned(layer):
    prune.l1_unstructured(layer, "bias", amount=0.5)


def parametrized(layer):
    parametrize.register_parametrization(layer, "bias", nn.Softplus())


def computed(layer):
    bias = layer.bias.detach() + 1.0
    del layer.bias
    layer.bias = bias


@pytest.mark.parametrize("change", [pruned, parametrized, computed])
def test_a_bias_that_somebody_else_computes_counts(change):
    model, twin = model_of(WIDTHS, bias=True), model_of(WIDTHS, bias=True)
    for layer in (*model, *twin):
        if isinstance(layer, nn.Linear):
            change(layer)
    x = input_of(5)
    before = model(x)
    optimizer = gems(model, tasks=TASKS, update_proj_gap=100)
    assert torch.equal(model(x), before)
    train(model, optimizer, 2)
    twin.load_state_dict(model.state_dict())
    with optimizer.task("a"):
        inside = model(x)
        torch.testing.assert_close(inside, twin(x), rtol=0, atol=1e-12)
        inside.square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(x), inside)


BASES = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.1),
    "Muon": lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("moments", ["rotate", "reset"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("capture", ["fused", "generic"])
def test_layers_of_one_shape_train_as_if_each_were_alone(capture, base, moments, monkeypatch):
    """Side by side in one block, or each in its own; backward passes of no task come too, and leave out a layer."""
    found = []
    for most in (1 << 22, 1):
        monkeypatch.setattr("gradsub.subspace._block._MOST_ON_CPU", most)
        model = Partly()
        optimizer = gems(
            model,
            base=BASES[base](model.parameters()),
            tasks=TASKS,
            update_proj_gap=3,
            null_space=NullSpace(max_rank=3).collect(model, [input_of(step) for step in range(60, 90)]),
            anchor=True,
            gate="hypergradient",
            moments=moments,
            capture=capture,
            refresh="svd",
        )
        for step in range(8):
            for number, task in enumerate(TASKS):
                with optimizer.task(task):
                    (model(input_of(2 * step + number)) - number).square().mean().backward()
            if step in (3, 4, 6):
                model(input_of(50 + step), {step % 3} if step > 3 else ()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)
