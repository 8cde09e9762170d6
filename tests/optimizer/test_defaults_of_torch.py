"""Whatever torch's default dtype and device are, the optimizer counts and computes the same."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradsub
from gradsub import GemsOptimizer, NullSpace
from gradsub.surgery import GradVac

from .toys import TASKS, gems, loss_of, mlp, noise, null_space_of, same, tensors_in, train

FACTORIES = {"tensor", "zeros", "ones", "empty", "full", "eye", "rand", "randn", "as_tensor", "arange", "randperm"}
FACTORIES |= {"linspace", "scalar_tensor", "empty_strided", "randint", "normal", "tril_indices", "triu_indices"}
NUMBERS = {"arange", "randperm", "randint", "tril_indices", "triu_indices"}  # integers, if given integers


def test_every_tensor_that_is_made_names_its_dtype_and_device():
    """The runs below reach what they reach; this reaches every line."""
    bare = []
    for source in sorted(Path(gradsub.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
                continue
            named = {keyword.arg for keyword in node.keywords}
            if node.func.attr == "Generator" or node.func.attr in NUMBERS:
                missing = {"device"} - named
            elif node.func.attr in FACTORIES:
                missing = {"dtype", "device"} - named
            else:
                continue
            if missing:
                bare.append(f"{source.name}:{node.lineno} torch.{node.func.attr} lacks {sorted(missing)}")
    assert bare == []


@contextmanager
def defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def data(step: int, task: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return noise(16, 12, key=(step, task), like=like), noise(16, 8, key=(step, task, 9), like=like)


def run(dtype: torch.dtype, device: str | None, mixed: bool = False, clip: bool = False, **options: Any) -> list[Any]:
    """All weights and states after some steps; what is not the library's is made beforehand."""
    model = mlp()
    batches = [[data(step, task, model[0].weight) for task in range(2)] for step in range(5)]
    null_space = null_space_of(model) if options.pop("protect", True) else None
    surgery = options.pop("surgery", "sum")
    with defaults(dtype, device):
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        optimizer = gems(
            model, base=base, null_space=null_space, surgery=surgery() if callable(surgery) else surgery, **options
        )
        for batch in batches:
            if mixed:
                with optimizer.mixed(["search", "rec"] * 16) as rows:
                    x, y = (torch.stack(pair, 1).flatten(0, 1) for pair in zip(*batch, strict=True))
                    rows.loss((model(x) - y).square().mean(1)).backward()
            else:
                for (x, y), name in zip(batch, TASKS, strict=True):
                    with optimizer.task(name, samples=24.0 if name == "search" else 7.0):
                        (model(x) - y).square().mean().backward()
            if clip:
                optimizer.clip_grad_norm_(0.3)
            optimizer.step()
            optimizer.report()
            optimizer.zero_grad()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return [*(p.detach() for p in model.parameters()), *tensors_in(optimizer.state_dict())]


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "output side": {"protect": False, "side": "output"},
    "fused": {"capture": "fused"},
    "sketches": {"capture": "fused", "refresh": "sketch"},
    "mixed": {"capture": "fused", "mixed": True},
    "clipped": {"clip": True},
    "hypergradient": {"gate": "hypergradient"},
    "shared first": {"orthogonalize": "shared_first"},
    "unchecked": {"nonfinite": "ignore"},
    "GradVac": {"surgery": GradVac},
    **{name: {"surgery": name} for name in ("pcgrad", "cagrad", "mgda", "gradvac")},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.bfloat16, None), (torch.float64, None), (torch.float32, "meta")],
    ids=["bfloat16", "float64", "another device"],
)
def test_the_run_is_the_same(options, dtype, device):
    assert same(run(torch.float32, None, **options), run(dtype, device, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_null_spaces_are_the_same(dtype, tmp_path):
    model, found = mlp(), []
    batches = [noise(20, 12, key=(i,), like=model[0].weight) for i in range(3)]
    for each in (torch.float32, dtype):
        with defaults(each, None):
            null_space = NullSpace(energy=0.9, max_rank=5)
            null_space.collect(model, batches)
            null_space.save(tmp_path / "it.safetensors")
            again = NullSpace.load(tmp_path / "it.safetensors")
            again.update("0", batches[0])
            found.append([again.basis(name) for name in again])
    assert same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
def test_steps_and_refreshes_are_counted_beyond_what_a_low_precision_holds(dtype, refresh):
    layer = nn.Linear(12, 8, bias=False)
    with defaults(dtype, None):
        base = torch.optim.SGD(layer.parameters(), lr=1e-3)
        optimizer = GemsOptimizer(base, tasks=("a",), rank=2, update_proj_gap=20, model=layer, refresh=refresh)
    changed, x = [], noise(16, 12)
    state = optimizer.state[layer.weight]
    for step in range(300):
        before = state["basis"].clone()
        with optimizer.task("a"):
            layer(x * (1 + step % 7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if not torch.equal(before, state["basis"]):
            changed.append(step)
    assert int(state["step"]) == 300
    assert changed[-1] > 279


@pytest.mark.parametrize("saved", [torch.int64, torch.float32, torch.float64], ids=str)
def test_a_long_run_is_counted_right_also_from_an_older_checkpoint(saved):
    """float32 stops at 2^24: adding 1 to it changes nothing."""
    model, other = mlp(), mlp()
    optimizer, again = gems(model), gems(other)
    train(model, optimizer, 2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for index in (0, 2):
        state_dict["state"][index]["step"] = torch.tensor(2**24, dtype=saved)
    again.load_state_dict(state_dict)
    train(other, again, 3, start=2)
    for layer in (other[0], other[2]):
        step = again.state[layer.weight]["step"]
        assert (int(step), step.dtype, step.device.type) == (2**24 + 3, torch.int64, "cpu")
        assert (again.state[layer.weight]["next_refresh"] > 2**24).all()


def test_statistics_that_are_loaded_in_inference_mode_grow_outside_of_it(tmp_path):
    x, path = noise(9, 6), tmp_path / "null_space.safetensors"
    null_space = NullSpace()
    null_space.update("layer", x[:4])
    null_space.save(path)
    with torch.inference_mode():
        loaded = NullSpace.load(path)
    for each in (loaded, null_space):
        each.update("layer", x[4:])
    assert torch.equal(loaded.basis("layer"), null_space.basis("layer"))


def test_a_step_in_inference_mode_is_a_step():
    """Of an optimizer that has its state already; what base optimizers make in there cannot be written to later."""
    weights = []
    for inside in (False, True):
        model = mlp()
        optimizer = gems(model)
        for number in range(3):
            for task, name in enumerate(TASKS):
                with optimizer.task(name, samples=1 + number):
                    loss_of(model, number, task).backward()
            with torch.inference_mode(inside and number > 0):
                optimizer.step()
            optimizer.zero_grad()
        weights.append(list(model.parameters()))
    assert same(*weights)


def test_captured_losses_do_not_depend_on_the_default():
    """Half of the samples' shares would be rounded in bfloat16."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        model = mlp()
        losses = [loss_of(model, 0, task) for task in range(2)]
        with defaults(dtype, None):
            optimizer = gems(model, base=torch.optim.SGD(model.parameters(), lr=0.1), surgery="pcgrad")
            optimizer.backward(dict(zip(TASKS, losses, strict=True)), samples={"search": 1001.0, "rec": 3.0})
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    assert same(*ends)
