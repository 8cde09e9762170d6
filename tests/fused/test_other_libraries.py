"""What other libraries and users do to captured layers, or to torch, counts as without an optimizer."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from gradsub.capture import can_fuse

from .worlds import gems, model_of

WIDTHS = (16, 16, 16)
TASKS = ("a", "b")


def input_of(step):
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def passes(model, optimizer, steps, *, start=0):
    """Outputs, and gradients of inputs, of every pass."""
    found = []
    for step in range(start, start + steps):
        for number, task in enumerate(TASKS):
            x = input_of(2 * step + number).requires_grad_()
            with optimizer.task(task):
                y = model(x)
                y.square().mean().backward()
            found += [y.detach(), x.grad]
        optimizer.step()
        optimizer.zero_grad()
    return found


def both(change, steps=3):
    """The same training by both captures, with something changed: they must see the same."""
    results = []
    for capture in ("fused", "generic"):
        model = model_of(WIDTHS)
        optimizer = gems(model, tasks=TASKS, capture=capture, update_proj_gap=100)
        with change(model):
            results.append([*passes(model, optimizer, steps), *(p.detach() for p in model.parameters())])
    for fused, generic in zip(*results, strict=True):
        torch.testing.assert_close(fused, generic, rtol=0, atol=1e-10)
    return results[0]


class Doubled(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        return 2 * found if function is F.linear else found


class patched_linear:
    """``F.linear`` of somebody else's."""

    def __init__(self, model):
        self._own = F.linear

    def __enter__(self):
        F.linear = lambda *arguments: 2 * self._own(*arguments)

    def __exit__(self, *_):
        F.linear = self._own


@pytest.mark.parametrize("change", [patched_linear, lambda model: Doubled()], ids=["patched", "mode"])
def test_a_linear_function_that_somebody_overrides_counts_forward_and_backward(change):
    changed = both(change)
    plain = both(lambda model: torch.device("cpu"))
    assert not torch.allclose(changed[0], plain[0])


def test_a_device_as_a_mode_overrides_nothing():
    """Rows of a mixed batch can be told apart by the layers' own backward passes alone."""
    model = model_of(WIDTHS)
    optimizer = gems(model, tasks=TASKS)
    with torch.device("cpu"), optimizer.mixed(["a", "b", "a", "b", "b"]) as rows:
        rows.loss(model(input_of(0)).square().mean(1)).backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


class Louder(torch.Tensor):
    """A class of tensors of which a linear layer has twice the output."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        found = super().__torch_function__(function, types, arguments, options or {})
        return 2 * found if function is F.linear else found


@pytest.mark.parametrize("inside", [True, False])
def test_a_linear_function_that_an_inputs_class_overrides_counts_forward_and_backward(inside):
    model, twin = model_of(WIDTHS), model_of(WIDTHS)
    optimizer = gems(model, tasks=TASKS)
    passes(model, optimizer, 2)
    twin.load_state_dict(model.state_dict())
    found = []
    for net in (model, twin):
        x = input_of(7).as_subclass(Louder).requires_grad_()
        with optimizer.task("a") if inside else contextlib.nullcontext():
            y = net(x)
            y.square().mean().backward()
        found.append((y.detach().as_subclass(torch.Tensor), x.grad.as_subclass(torch.Tensor)))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)


class Scaled(nn.Linear):
    """Its parameter is read through a property."""

    @property
    def bias(self):
        return 2 * self._parameters["bias"] + 1

    @property
    def weight(self):
        return self._parameters["weight"]


@pytest.mark.parametrize("when", ["before the optimizer", "after it"])
def test_a_property_of_a_layers_class_comes_before_its_parameter(when):
    model, twin = model_of(WIDTHS), model_of(WIDTHS)
    if when == "before the optimizer":
        model[0].__class__ = Scaled
    optimizer = gems(model, tasks=TASKS, update_proj_gap=100)
    passes(model, optimizer, 2)
    twin.load_state_dict(model.state_dict())
    for net in (model, twin):
        net[0].__class__ = Scaled
    with optimizer.task("a"):
        torch.testing.assert_close(model(input_of(9)), twin(input_of(9)), rtol=0, atol=1e-12)


def shifted(self, x):
    return F.linear(x, self.weight, self.bias) + 1


def test_a_forward_pass_that_was_patched_before_is_not_replaced(monkeypatch):
    model, x = model_of(WIDTHS), input_of(0)
    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(nn.Linear.forward)(shifted))
    expected = model(x)
    with pytest.warns(UserWarning, match="capture"):
        optimizer = gems(model, tasks=TASKS)
    assert not can_fuse(model[0])
    assert torch.equal(model(x), expected)
    with optimizer.task("a"):
        assert torch.equal(model(x), expected)


class Linear(nn.Linear):
    """Its forward pass has the name of torch's."""

    def forward(self, x):
        return shifted(self, x)


def test_a_name_alone_makes_no_layer_that_is_known():
    other = type("Conv1D", (nn.Linear,), {"forward": shifted})
    assert not can_fuse(other(4, 4))
    assert not can_fuse(Linear(4, 4))
    assert can_fuse(Conv1D(4, 4))
    assert can_fuse(type("Mine", (nn.Linear,), {})(4, 4))


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_of_both_keeps_a_wrapper_that_came_later(how):
    model = model_of(WIDTHS)
    optimizer = gems(model, tasks=TASKS, update_proj_gap=100)
    passes(model, optimizer, 2)
    model[0].forward = functools.partial(plus_one, model[0].forward)
    expected = model(input_of(7))
    pair = (model, optimizer)
    model, optimizer = copy.deepcopy(pair) if how == "copied" else pickle.loads(pickle.dumps(pair))
    assert torch.equal(model(input_of(7)), expected)
    before = model[0].weight.detach().clone()
    passes(model, optimizer, 1, start=5)
    assert not torch.equal(model[0].weight, before)


def plus_one(forward, x):
    return forward(x) + 1


def test_arguments_are_those_of_the_layers_own_forward_pass():
    class WithScale(nn.Linear):
        def forward(self, x, scale=1.0):
            return scale * F.linear(x, self.weight, self.bias)

    model = model_of(WIDTHS)
    optimizer = gems(model, tasks=TASKS)
    layer, x = model[0], input_of(0)
    expected = layer(x)
    with optimizer.task("a"):
        assert torch.equal(layer(input=x), expected)
    for arguments, options in (((x, x), {}), ((x,), {"scale": 3.0}), ((), {"y": x}), ((), {})):
        with pytest.raises(TypeError):
            layer(*arguments, **options)
    layer.__class__ = WithScale
    torch.testing.assert_close(layer(x, scale=3.0), 3 * expected)
    torch.testing.assert_close(layer(x, 3.0), 3 * expected)


def test_who_wraps_a_forward_pass_by_functools_does_not_inherit_the_optimizer():
    model = model_of(WIDTHS)
    optimizer = gems(model, tasks=TASKS)
    forward = model[0].forward
    assert forward.slots
    wrapper = functools.update_wrapper(functools.partial(plus_one, forward), forward)
    assert not hasattr(wrapper, "slots")
    model[0].forward = wrapper
    torch.save(model, io.BytesIO())
    optimizer.close()
    assert model[0].forward is wrapper


@pytest.mark.parametrize("inside", [True, False])
def test_tracers_see_a_linear_layer(inside):
    class Traced(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    model = model_of(WIDTHS)
    optimizer = gems(model, tasks=TASKS)
    passes(model, optimizer, 2)
    x = input_of(3)
    with optimizer.task("a") if inside else contextlib.nullcontext():
        graph = Traced().trace(model)
    torch.testing.assert_close(torch.fx.GraphModule(model, graph)(x), model(x))


class Duck:
    """No tensor, but torch's functions take it for one."""

    def __init__(self, x):
        self.x = x

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        return function(*(each.x if isinstance(each, Duck) else each for each in arguments), **(options or {}))


@pytest.mark.parametrize("inside", [True, False])
def test_an_input_need_not_be_a_tensor(inside):
    model = model_of(WIDTHS)
    optimizer = gems(model, tasks=TASKS)
    passes(model, optimizer, 2)
    x = input_of(3)
    with optimizer.task("a") if inside else contextlib.nullcontext():
        torch.testing.assert_close(model(Duck(x)), model(x))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("converted", [2, 3])
def test_no_gradient_is_lost_where_the_model_was_converted_before_a_forward_pass_outside(kind, refresh, converted):
    """In a step that refreshes bases, or in one between."""
    moved = []
    for capture in ("fused", "generic"):
        model = model_of(WIDTHS, bias=False)
        optimizer = gems(model, tasks=TASKS, capture=capture, refresh=refresh, update_proj_gap=2)
        for step in range(6):
            if step == converted:
                model.to(kind)
            before = [p.detach().clone().double() for p in model.parameters()]
            dtype = model[0].weight.dtype
            losses = {task: model(input_of(2 * step + n).to(dtype)).square().mean() for n, task in enumerate(TASKS)}
            optimizer.backward(losses)
            optimizer.step()
            optimizer.zero_grad()
            after = [p.detach().double() for p in model.parameters()]
            moved.append([float((new - old).norm()) for new, old in zip(after, before, strict=True)])
    fused, generic = torch.tensor(moved).view(2, 6, -1)
    assert (fused > 0).all()
    torch.testing.assert_close(fused, generic, rtol=0.02, atol=0)
