"""What else models do while their layers are captured: checkpointing, autocast, compilation, copies, ties."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradsub.capture._forward import FusedForward

from .worlds import batch_of, flat, gems, losses_of, model_of, train

WIDTHS = (20, 28, 24, 12)
FORWARDS = ["inside", "outside", "mixed inside", "mixed outside"]


def plain_gradients(model):
    model.zero_grad()
    model(batch_of(model, 0)["a"]).square().mean().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, refresh, forward):
    model, plain = model_of(WIDTHS), model_of(WIDTHS)
    optimizer, reference = gems(model, refresh=refresh), gems(plain, refresh=refresh)
    optimizer.calls = lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
    train(model, optimizer, 4, forward=forward)
    train(plain, reference, 4, forward=forward)
    torch.testing.assert_close(flat(model), flat(plain), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("forward", FORWARDS)
def test_outputs_may_be_changed_in_place(forward, bias):
    """As ``nn.ReLU(inplace=True)`` does; in steps that sketch and in ordinary ones."""
    ends = []
    for in_place in (True, False):
        model = model_of(WIDTHS, bias=bias)
        model[1] = nn.ReLU(inplace=in_place)
        optimizer = gems(model, refresh="sketch")
        before = flat(model)
        train(model, optimizer, 4, forward=forward)
        ends.append(flat(model))
        assert not torch.equal(ends[-1], before)
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("forward", FORWARDS)
def test_autocast(forward, side):
    """Within bfloat16's rounding of the generic capture; weights, bases and moments stay float32."""
    ends = []
    for capture, way in (("fused", forward), ("generic", "inside")):
        model = model_of(WIDTHS, dtype=torch.float32)
        base = torch.optim.SGD(model.parameters(), lr=0.3)
        optimizer = gems(model, base=base, capture=capture, side=side, refresh="svd")

        def call(x, model=model):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x).float()

        before = flat(model)
        optimizer.calls = call
        train(model, optimizer, 3, forward=way)
        assert {value.dtype for value in optimizer.state[model[0].weight].values()} == {torch.float32, torch.int64}
        ends.append(flat(model))
    moved = (ends[1] - before).norm()
    assert moved > 0.01 * before.norm()
    assert (ends[0] - ends[1]).norm() < 0.05 * moved


def test_autocast_leaves_no_cast_without_a_graph_behind():
    """A forward pass outside the optimizer's sight, in the same autocast block, has its gradient."""
    model = model_of(WIDTHS, dtype=torch.float32)
    optimizer = gems(model)
    x = batch_of(model, 0)["a"]
    with torch.autocast("cpu", torch.bfloat16):
        with optimizer.task("a"):
            model(x).float().square().mean().backward()
        optimizer.close()
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("inside", [True, False])
def test_a_compiled_model(inside):
    torch._dynamo.reset()
    model, plain = model_of(WIDTHS), model_of(WIDTHS)
    optimizer, reference = gems(model), gems(plain)
    optimizer.calls = torch.compile(model, backend="aot_eager")
    way = "inside" if inside else "outside"
    train(model, optimizer, 7, forward=way)
    train(plain, reference, 7, forward=way)
    torch.testing.assert_close(flat(model), flat(plain), rtol=0, atol=1e-9)


def test_a_compiled_model_has_one_graph_for_all_tasks():
    """Two in all: of steps that want the whole gradient, and of the others."""
    torch._dynamo.reset()
    model = model_of(WIDTHS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = gems(model, update_proj_gap=100, refresh="svd")
    counter = torch._dynamo.utils.counters
    counter.clear()
    x = torch.randn(4, 3, 20, dtype=torch.float64)
    for _ in range(4):
        for task in optimizer.tasks:
            with optimizer.task(task):
                losses_of(task, compiled(x)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter["stats"]["unique_graphs"] == 2


def test_a_frozen_layer_below_costs_nothing_and_one_in_between_passes_gradients_on():
    model, plain = model_of(WIDTHS), model_of(WIDTHS)
    for each in (model, plain):
        each[0].weight.requires_grad_(False)
        each[2].weight.requires_grad_(False)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, gems(model), 4)
    train(plain, gems(plain, capture="generic"), 4)
    torch.testing.assert_close(flat(model), flat(plain), rtol=0, atol=1e-9)
    assert torch.equal(start[0], model[0].weight)
    assert not torch.equal(start[4], model[4].weight)


def test_evaluation_is_untouched():
    model, plain = model_of(WIDTHS), model_of(WIDTHS)
    optimizer = gems(model)
    x = batch_of(model, 0)["b"]
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        with optimizer.task("a"):
            assert torch.equal(model(x), plain(x))
    with torch.inference_mode():
        assert torch.equal(model(x), plain(x))


def test_outside_any_task_gradients_are_ordinary():
    model = model_of(WIDTHS)
    expected = plain_gradients(model)
    optimizer = gems(model)
    train(model, optimizer, 0)
    for found, gradient in zip(plain_gradients(model), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-14)
    (slope,) = torch.autograd.grad(model(batch_of(model, 0)["a"]).sum(), model[0].weight)
    assert slope.shape == model[0].weight.shape


def test_autograd_grad_is_not_captured_and_second_derivatives_are_right():
    model, plain = model_of(WIDTHS), model_of(WIDTHS)
    x = batch_of(model, 0)["a"].requires_grad_()
    ends = []
    for each, capture in ((model, "fused"), (plain, "generic")):
        optimizer = gems(each, capture=capture, refresh="svd")
        train(each, optimizer, 1)
        with optimizer.task("a"):
            (slope,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
            assert not optimizer._intake.held.by_parameter()
            slope.square().sum().backward()
        optimizer.step()
        ends.append(flat(each))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)


def test_a_hook_on_a_weight_still_sees_its_gradient():
    model = model_of(WIDTHS)
    optimizer = gems(model)
    train(model, optimizer, 1)
    seen = []
    model[0].weight.register_hook(lambda gradient: seen.append(gradient.shape))
    train(model, optimizer, 1, start=1)
    assert seen == [model[0].weight.shape] * 3


def test_backward_in_another_block_is_refused():
    model = model_of(WIDTHS)
    optimizer = gems(model, refresh="sketch")
    with optimizer.task("a"):
        loss = model(batch_of(model, 0)["a"]).square().mean()
    with pytest.raises(RuntimeError, match="in the same block"):
        loss.backward()


def test_a_tied_weight_falls_back_and_says_so_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.inner = nn.Linear(8, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.inner(self.embed(tokens)))

    ends = []
    for capture in ("fused", "generic"):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = Tied().double()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = gems(model, tasks=("a",), capture=capture, rank=3)
        told = [str(warning.message) for warning in caught]
        assert [("head shares its weight" in text) for text in told] == ([True] if capture == "fused" else [])
        assert isinstance(model.inner.__dict__.get("forward"), FusedForward) is (capture == "fused")
        for step in range(3):
            with optimizer.task("a"):
                tokens = torch.randint(20, (4, 5), generator=torch.Generator().manual_seed(step))
                nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)


def test_a_layer_with_a_forward_pass_of_its_own_falls_back_and_says_so():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubling(9, 9))
    with pytest.warns(UserWarning, match="Doubling"):
        gems(model, rank=2)
    assert "forward" not in model[0].__dict__


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_the_model_is_ordinary(way):
    model = model_of(WIDTHS)
    optimizer = gems(model)
    train(model, optimizer, 2)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert not any(isinstance(module.__dict__.get("forward"), FusedForward) for module in twin.modules())
    with optimizer.task("a"):
        twin(batch_of(twin, 0)["a"]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert list(twin.state_dict()) == list(model.state_dict()) == list(model_of(WIDTHS).state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
def test_a_copy_of_both_goes_on_bit_for_bit(refresh, way):
    model = model_of(WIDTHS)
    optimizer = gems(model, refresh=refresh)
    train(model, optimizer, 3)
    pair = (model, optimizer)
    twin, copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(model, optimizer, 5, start=3)
    train(twin, copied, 5, start=3)
    assert torch.equal(flat(model), flat(twin))
    assert isinstance(twin[0].__dict__["forward"], FusedForward)


@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_a_resumed_run_goes_on_bit_for_bit(refresh, steps):
    model, fresh = model_of(WIDTHS), model_of(WIDTHS)
    optimizer, again = gems(model, refresh=refresh), gems(fresh, refresh=refresh)
    train(model, optimizer, steps)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(model, optimizer, 7, start=steps)
    train(fresh, again, 7, start=steps)
    assert torch.equal(flat(model), flat(fresh))


def test_close_gives_the_modules_back():
    model = model_of(WIDTHS)
    optimizer = gems(model)
    assert all(isinstance(model[i].__dict__["forward"], FusedForward) for i in (0, 2, 4))
    optimizer.close()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(gradient is not None for gradient in plain_gradients(model))


def test_a_dead_optimizer_gives_the_modules_back():
    import gc

    model = model_of(WIDTHS)
    gems(model)
    gc.collect()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_of_two_optimizers_only_the_open_one_sees():
    model, alone = model_of(WIDTHS), model_of(WIDTHS)
    first, second = gems(model), gems(model)
    for forward in ("inside", "outside"):
        train(model, second, 2, forward=forward)
        first.step()
    single = gems(alone)
    for forward in ("inside", "outside"):
        train(alone, single, 2, forward=forward)
    assert torch.equal(flat(model), flat(alone))


def test_small_layers_are_captured_generically_by_default():
    """Up to 64 x 64 the whole gradient is cheaper than the bookkeeping."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 65))
    optimizer = gems(model, capture="auto")
    assert optimizer.report().layers == []
    assert [isinstance(layer.__dict__.get("forward"), FusedForward) for layer in model] == [False, True]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_backward_pass_under_autocast_of_a_forward_pass_outside_it(transposed, side):
    """Products of two formats are taken in the wider one; a second pass adds to the first."""
    found = []
    for autocast in (False, True):
        model = model_of((32, 32, 32), transposed=transposed, dtype=torch.float32, bias=False)
        optimizer = gems(model, side=side, update_proj_gap=100, tasks=("a",))
        for step in range(2):  # the first one finds the bases
            for part in range(2):
                x = torch.randn(5, 32, generator=torch.Generator().manual_seed(10 * step + part))
                with optimizer.task("a"):
                    loss = model(x).square().mean()
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast and step == 1):
                        loss.backward()
            if step == 0:
                optimizer.step()
                optimizer.zero_grad()
        held = optimizer._intake.held.by_parameter()[0]
        found.append([each.projected for each in held.values() if each.projected is not None])
    for exact, rounded in zip(*found, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0, atol=0.03 * float(exact.abs().max()))
