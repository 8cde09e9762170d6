"""Bad input: refused with the argument, the value and the remedy, and nothing is lost."""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer, NullSpace

from .toys import TASKS, gems, loss_of, mlp, null_space_of, same, tensors_in, train, weights_of


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "search"}, r"tasks='search' is one string"),
        ({"tasks": ("a", "a")}, r"names a task twice"),
        ({"tasks": ("a", "")}, r"must be non-empty strings"),
        ({"tasks": ("a", 1)}, r"must be non-empty strings"),
        ({"tasks": ("shared", "a")}, r"'shared' is the name of the common subspace"),
        ({"rank": 0}, r"rank=0 must be an integer of at least 1"),
        ({"rank": 2.0}, r"rank=2.0 must be an integer"),
        ({"rank": True}, r"rank=True must be an integer"),
        ({"task_rank": 0}, r"task_rank=0 must be an integer of at least 1, or None"),
        ({"update_proj_gap": 0}, r"update_proj_gap=0"),
        ({"update_proj_gap": None}, r"update_proj_gap=None"),
        ({"scale": 0}, r"scale=0 must be a positive number"),
        ({"scale": -1.0}, r"scale=-1.0"),
        ({"scale": math.inf}, r"scale=inf"),
        ({"scale": math.nan}, r"scale=nan"),
        ({"side": "left"}, r"side='left' must be 'input' or 'output'"),
        ({"orthogonalize": "all"}, r"orthogonalize='all' must be one of 'none', 'shared_first'"),
        ({"gate": "learned"}, r"gate='learned' must be one of"),
        ({"seed": -1}, r"seed=-1 must be an integer of at least 0"),
        ({"gate": 0.5}, r"gate=0.5 must be one of .* or a callable"),
        ({"moments": "forget"}, r"moments='forget'"),
        ({"nonfinite": "panic"}, r"nonfinite='panic'"),
        ({"target_modules": ["query"]}, r"target_modules=\['query'\] matches no linear layer.*\['0', '2'\]"),
        ({"target_modules": ["0", "query"]}, r"\['query'\] match no linear layer"),
        ({"target_modules": "attention.*"}, r"target_modules='attention"),
        ({"target_modules": "(0|1"}, r"target_modules='\(0\|1' is no regular expression \(missing \)"),
        ({"target_modules": "*.query"}, r"target_modules='\*.query' is no regular expression \(nothing to repeat"),
        ({"target_modules": "a{99999999999}"}, r"target_modules='a\{9+\}' is no regular expression"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    model = mlp()
    base = sgd(model)
    with pytest.raises(ValueError, match=message):
        gems(model, base=base, **options)
    gems(model, base=base)  # the base optimizer is as it was: correct the argument and go on


@pytest.mark.parametrize("wrong", [3, (3,), object()], ids=["number", "numbers", "object"])
@pytest.mark.parametrize("argument", sorted(inspect.signature(GemsOptimizer).parameters.keys() - {"base"}))
def test_no_argument_takes_whatever_it_is_given(argument, wrong):
    """At once, by its name: not in the first step, nor by an attribute that is not there."""
    if isinstance(wrong, int) and argument in {"rank", "task_rank", "update_proj_gap", "scale", "seed"}:
        return
    with pytest.raises((TypeError, ValueError), match=argument):
        GemsOptimizer(sgd(model := mlp()), **{"model": model, "rank": 4, argument: wrong})


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"subspace": "no"}, r"subspace='no' of a parameter group must be True or False"),
        ({"rank": -1}, r"rank=-1"),
        ({"scale": "big"}, r"scale='big'"),
    ],
)
def test_bad_group_options(group, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        gems(model, base=torch.optim.SGD([{"params": list(model.parameters()), **group}], lr=0.1))


def test_the_base_must_be_a_fresh_optimizer():
    model = mlp()
    with pytest.raises(TypeError, match=r"base must be a torch\.optim\.Optimizer, found generator: wrap one.*AdamW"):
        GemsOptimizer(model.parameters(), tasks=TASKS)
    for make in (torch.optim.AdamW, torch.optim.Adagrad):
        used = make(model.parameters(), lr=0.1)
        loss_of(model, 0, 0).backward()
        used.step()
        with pytest.raises(ValueError, match=rf"base={make.__name__} already has state from earlier steps.*fresh"):
            GemsOptimizer(used, tasks=TASKS)
        assert used.state
    with pytest.raises(ValueError, match="base=GemsOptimizer"):
        GemsOptimizer(gems(model), tasks=TASKS)


def test_optimizers_that_cannot_run_on_a_zero_proxy():
    model = mlp()
    with pytest.raises(ValueError, match=r"base=LBFGS evaluates its closure several times"):
        GemsOptimizer(torch.optim.LBFGS(model.parameters()), tasks=TASKS)
    more = importlib.import_module("pytorch_optimizer")
    with pytest.raises(ValueError, match=r"base=SAM evaluates its closure several times"):
        GemsOptimizer(more.SAM(model.parameters(), torch.optim.SGD, lr=0.1), tasks=TASKS)
    for name in ("Lamb", "LARS"):
        with pytest.raises(ValueError, match=rf"base={name} scales its step by the parameter's norm"):
            GemsOptimizer(getattr(more, name)(model.parameters(), lr=0.1), tasks=TASKS)
    with pytest.raises(ValueError, match=r"differentiable=True\) is not supported"):
        GemsOptimizer(torch.optim.AdamW(model.parameters(), differentiable=True), tasks=TASKS)


@pytest.mark.parametrize("name", ["Prodigy", "MADGRAD"])
def test_optimizers_that_remember_where_they_started(name):
    """They keep the first position in their state, or measure the distance to it; a proxy begins each step at 0."""
    base = getattr(importlib.import_module("pytorch_optimizer"), name)(mlp().parameters())
    with pytest.raises(ValueError, match=f"base={name}"):
        GemsOptimizer(base, tasks=TASKS, rank=2)


def test_complex_parameters():
    weight = nn.Parameter(torch.zeros(6, 5, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"param_groups\[0\]\[0\] is complex \(torch.complex64\).*view_as_real"):
        GemsOptimizer(torch.optim.SGD([weight], lr=0.1), tasks=TASKS, rank=2)


def test_sparse_gradients_of_a_task():
    embedding = nn.Embedding(10, 8, sparse=True)
    optimizer = GemsOptimizer(torch.optim.SGD(embedding.parameters(), lr=0.1), tasks=TASKS, rank=2)
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=r"param_groups\[0\]\[0\] is sparse.*sparse=False"), optimizer.task("rec"):
        embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert torch.equal(before, embedding.weight)


def test_sparse_gradients_from_outside():
    embedding = nn.Embedding(10, 8, sparse=True)
    optimizer = GemsOptimizer(torch.optim.SGD(embedding.parameters(), lr=0.1), tasks=TASKS, rank=2)
    before = [embedding.weight.detach().clone(), *tensors_in(optimizer.state_dict())]
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse"):
        optimizer.step()
    assert same(before, [embedding.weight.detach(), *tensors_in(optimizer.state_dict())])


class TestTasks:
    def test_unknown(self):
        model = mlp()
        optimizer = gems(model)
        with pytest.raises(ValueError, match=r"task 'recs' was never declared: tasks=\('search', 'rec'\)"):
            optimizer.task("recs").__enter__()
        loss = loss_of(model, 0, 0)
        with pytest.raises(ValueError, match="task 'recs' was never declared"):
            optimizer.backward({"rec": loss, "recs": loss})
        with pytest.raises(ValueError, match="task 'recs' was never declared"):
            optimizer.backward({"rec": loss}, samples={"recs": 3})
        with pytest.raises(ValueError, match=r"samples names \['search'\], but losses has only \['rec'\]"):
            optimizer.backward({"rec": loss}, samples={"search": 3})
        before = weights_of(model)
        optimizer.step()  # no half of the refused calls was captured
        assert same(before, model.parameters())
        optimizer.backward({"rec": loss})

    @pytest.mark.parametrize("samples", [0, -3, math.nan, math.inf, "8", None, True])
    def test_samples(self, samples):
        optimizer = gems(mlp())
        with (
            pytest.raises(ValueError, match="of task 'rec' must be a positive number"),
            optimizer.task("rec", samples=samples),
        ):
            pytest.fail("the task opened")

    def test_nested(self):
        model = mlp()
        optimizer = gems(model)
        with optimizer.task("rec"):
            loss_of(model, 0, 0).backward()
            with pytest.raises(RuntimeError, match=r"task\('search'\) inside another task"):
                optimizer.task("search").__enter__()
            loss_of(model, 1, 0).backward()
        with optimizer.task("search"):
            pass
        optimizer.step()
        assert optimizer.report().layers[0].gates == {"rec": 1.0}


class TestNullSpaces:
    def test_of_another_side(self):
        model = mlp()
        with pytest.raises(ValueError, match=r"side='output', but null_space was collected for side='input'"):
            gems(model, side="output", null_space=null_space_of(model, "input"))

    def test_of_another_width(self):
        model = mlp((12, 16, 8))
        null_space = NullSpace()
        null_space.update("2", torch.randn(4, 12))
        with pytest.raises(ValueError, match=r"length 12 for '2', but the weight \(8, 16\) has 16 on side='input'"):
            gems(model, null_space=null_space)

    @pytest.mark.filterwarnings("ignore:null_space has nothing for:UserWarning")
    def test_that_knows_none_of_the_layers(self):
        null_space = NullSpace()
        null_space.update("decoder.0", torch.randn(4, 12))
        with pytest.raises(ValueError, match=r"null_space knows the layers \['decoder.0'\].*pass the model="):
            gems(mlp(), null_space=null_space)
        with pytest.raises(ValueError, match="pass the model="):
            GemsOptimizer(sgd(mlp()), tasks=TASKS, rank=2, null_space=null_space_of(mlp()))

    def test_the_base_survives_a_refusal(self):
        """In a notebook the next call, corrected, gets the same base optimizer."""
        model = mlp((12, 16, 8))
        wrong = NullSpace()
        wrong.update("2", torch.randn(4, 12))
        base = sgd(model)
        with pytest.raises(ValueError, match="length 12"):
            gems(model, base=base, null_space=wrong)
        train(model, gems(model, base=base, null_space=null_space_of(model)), 1)


def test_a_gate_of_the_wrong_shape_loses_nothing():
    model = mlp()
    optimizer = gems(model, gate=lambda inputs: torch.ones(3))
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"gate returned shape \(3,\), expected \(layers, tasks\) = \(2, 2\)"):
        train(model, optimizer, 1)
    assert same(before, model.parameters())


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    model = mlp()
    optimizer = gems(model)
    train(model, optimizer, 2)
    before = tensors_in(optimizer.state_dict())
    bad: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.zeros(6, 5, dtype=torch.complex64))]},
        {"params": [nn.Parameter(torch.zeros(6, 5))], "rank": 0},
        {"params": [model[0].weight]},
    ]
    for group in bad:
        with pytest.raises(ValueError, match=r"complex|rank=0|more than one parameter group"):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
    assert same(before, tensors_in(optimizer.state_dict()))
    train(model, optimizer, 1, start=2)


@pytest.mark.parametrize("option", ["rank", "task_rank", "subspace"])
def test_ranks_that_were_edited(option):
    model = mlp()
    optimizer = gems(model)
    train(model, optimizer, 1)
    before = optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = False if option == "subspace" else 3
    with pytest.raises(RuntimeError, match=rf"param_groups\[0\] has .*{option}.* Put it back"):
        train(model, optimizer, 1)
    optimizer.param_groups[0][option] = before
    train(model, optimizer, 1)


def test_decay_without_a_rate():
    transformers = pytest.importorskip("transformers")
    model = mlp()
    base = transformers.optimization.Adafactor(model.parameters(), weight_decay=0.01)
    with pytest.raises(ValueError, match=r"weight_decay=0.01 takes a share .* but lr=None"):
        gems(model, base=base)
    train(model, gems(model, base=transformers.optimization.Adafactor(model.parameters())), 2)
