"""Memory by formula, what the backward pass keeps, and how the work of a step grows with the layers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradsub import GemsOptimizer
from gradsub.capture._tray import side_by_side
from gradsub.memory import layer_bytes

from .worlds import gems, model_of, null_space_of, train

TASKS = ("a", "b", "c")


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("inner", ["AdamW", "SGD"])
@pytest.mark.parametrize("protected", [0, 3])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("capture", ["fused", "generic"])
def test_state_and_captured_gradients_are_what_the_formula_says(capture, side, refresh, protected, inner):
    model = model_of((40, 96, 48), dtype=torch.float32, bias=False)
    null_space = null_space_of(model, side) if protected else None
    options = {"momentum": 0.9} if inner == "SGD" else {}
    base = getattr(torch.optim, inner)(model.parameters(), lr=1e-3, **options)
    optimizer = gems(model, base=base, rank=8, side=side, refresh=refresh, null_space=null_space, capture=capture)
    for step in range(4):
        for layer in (model[0], model[2]):
            expected = layer_bytes(
                layer.out_features,
                layer.in_features,
                rank=8,
                tasks=3,
                side=side,
                moments=2 if inner == "AdamW" else 1,
                protected=protected,
                sketched=refresh == "sketch",
            )
            assert bytes_of(v for v in optimizer.state[layer.weight].values()) == expected.state + expected.host
        for task in TASKS:
            with optimizer.task(task):
                model(torch.randn(5, 40)).square().mean().backward()
        if step == 3 or refresh == "sketch":
            for layer in (model[0], model[2]):
                expected = layer_bytes(layer.out_features, layer.in_features, rank=8, tasks=3, side=side)
                held = [optimizer._intake.held.by_parameter()[task][layer.weight] for task in range(3)]
                assert bytes_of(each.projected for each in held) == expected.captured
                sketches = [each.sketch for each in held if each.sketch is not None]
                state = optimizer.state[layer.weight]
                due = refresh == "sketch" and state["next_refresh"][0] <= state["step"]
                assert bytes_of(sketches) == (expected.sketches if due else 0)
                assert due or step > 1 or refresh == "svd"
        optimizer.step()
        optimizer.zero_grad()


def saved_bytes(model, x, context):
    """Bytes of distinct tensors that the forward pass keeps for the backward pass, without the weights."""
    held: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with context, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x).square().mean()
        loss.backward()
    return sum(held.values())


def chain():
    """Nothing but the linear layers keeps an activation."""
    return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))


def test_the_input_side_keeps_x_times_the_basis_and_not_x():
    torch.manual_seed(0)
    x, rows, rank = torch.randn(512, 256), 512, 16
    plain = chain()
    import contextlib

    whole = saved_bytes(plain, x, contextlib.nullcontext())
    assert whole >= 4 * rows * 256 * 4
    model = chain()
    optimizer = GemsOptimizer(torch.optim.AdamW(model.parameters()), tasks=("a",), rank=rank, model=model)
    for _ in range(2):  # the first step decomposes the gradient, which needs x
        with optimizer.task("a"):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = saved_bytes(model, x, optimizer.task("a"))
    thin = 4 * rows * (rank + rank // 2) * 4
    output = rows * 256 * 4  # of the loss
    assert kept <= thin + output + 1024
    assert kept < 0.4 * whole


def backward_of(model, optimizer, tasks, seed):
    generator = torch.Generator().manual_seed(seed)
    for task in tasks:
        x = torch.randn(5, 32, generator=generator, dtype=torch.float64)
        with optimizer.task(task):
            model(x).tanh().square().mean().backward()


@given(
    st.lists(st.lists(st.sampled_from(TASKS), min_size=1, max_size=4), min_size=2, max_size=4),
    st.sampled_from(["input", "output"]),
)
def test_where_gradients_lie_depends_on_the_tasks_of_the_last_step_and_what_is_computed_does_not(steps, side):
    """One piece of memory where the same tasks come again, whatever their order and how often; as a loop of layers."""
    models = [model_of((32, 32, 32, 32), bias=False) for _ in range(2)]
    options = {"side": side, "update_proj_gap": 100}
    optimizers = [gems(m, capture=how, **options) for m, how in zip(models, ("fused", "generic"), strict=True)]
    last: set[int] = set()
    for number, tasks in enumerate(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward_of(model, optimizer, tasks, number)
        held = optimizers[0]._intake.held.by_parameter()
        # A task's first gradient comes as a whole.
        projected = {task: [each.projected for each in mine.values()] for task, mine in held.items()}
        here = {task for task, mine in projected.items() if mine[0] is not None}
        if here and last == here:
            places = {each.untyped_storage().data_ptr() for task in here for each in projected[task]}
            assert len(places) == 1
        last = here or last
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for ours, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(ours, twin, rtol=0, atol=1e-12)


def laid(how: str, layers: int, rows: int, columns: int) -> list[torch.Tensor]:
    """Gradients of a block, as those who make them leave them in memory."""
    numbers = torch.randn(layers, rows, columns, dtype=torch.float64)
    if how == "tray":
        return list(numbers.mT.contiguous().mT.unbind())
    return list(numbers.unbind()) if how == "product" else [each.clone() for each in numbers.unbind()]


@given(
    st.lists(st.sampled_from(["tray", "product", "loose"]), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_side_by_side_is_a_stack_however_gradients_lie(kinds, layers, rows, columns):
    held = [laid(how, layers, rows, columns) for how in kinds]
    found = side_by_side(held)
    assert torch.equal(found, torch.stack([torch.stack(mine) for mine in held], 1))


@pytest.mark.parametrize("refresh", ["svd", "sketch"])
def test_no_gradient_of_a_weights_size_between_refreshes(refresh):
    """Every tensor that is made between forward and step is smaller than the weight."""
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                made.append(found.untyped_storage().nbytes())
            return found

    model = model_of((160, 160, 160), dtype=torch.float32, bias=False)
    optimizer = gems(model, refresh=refresh, update_proj_gap=100)
    optimizer.step()
    train(model, optimizer, 3)
    with Watch():
        for task in TASKS:
            with optimizer.task(task):
                model(torch.randn(8, 160)).square().mean().backward()
        optimizer.step()
    # The weight itself is seen as what addmm_ and transposition return.
    weights = 160 * 160 * 4
    assert max(size for size in made if size != weights) < weights
    grown = [size for size in made if size == weights]
    captured = optimizer._intake.held.by_parameter()
    assert not captured
    assert len(grown) <= 2 * len(TASKS) * 2 * 3 + 8  # views of the two weights


def operations(layers, clips):
    """Of a step, by name: those on matrices, but for views and the lift that the CPU does layer by layer."""
    counts: Counter[str] = Counter()
    skipped = ("addmm_", "unbind", "view", "select", "slice", "split", "transpose", "expand", "detach", "alias")

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            matrices = any(isinstance(arg, torch.Tensor) and arg.ndim >= 2 for arg in args)
            if (matrices or name.startswith("_foreach")) and name not in skipped:
                counts[name] += 1
            return func(*args, **(kwargs or {}))

    model = model_of((24,) * (layers + 1), dtype=torch.float32, bias=False)
    base = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, foreach=True)
    optimizer = gems(model, base=base, update_proj_gap=100, refresh="svd", nonfinite="ignore")
    train(model, optimizer, 2)
    for task in TASKS:
        with optimizer.task(task):
            model(torch.randn(3, 2, 24)).square().mean().backward()
    with Count():
        if clips:
            optimizer.clip_grad_norm_(1e-3)
        optimizer.step()
    return counts


@pytest.mark.parametrize("clips", [False, True])
def test_operations_of_a_step_do_not_grow_with_the_layers(clips):
    few, many = operations(3, clips), operations(9, clips)
    assert few == many
    assert few["bmm"] >= 1


def test_nothing_grows_with_the_number_of_steps():
    import gc

    model = model_of((24, 24), dtype=torch.float32)
    optimizer = gems(model, refresh="sketch", update_proj_gap=3)
    sizes = []
    for step in range(12):
        train(model, optimizer, 1, start=step)
        gc.collect()
        sizes.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
    assert sizes[5] >= sizes[8] >= sizes[11]  # what earlier tests have left may go meanwhile
