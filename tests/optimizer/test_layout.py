"""Which parameters are decomposed, what is warned about, and how often."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer, NullSpace

from .toys import TASKS, gems, mlp, noise, null_space_of, same, train, weights_of


def decomposed(optimizer: GemsOptimizer, model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if "basis" in optimizer.state[p]]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.query = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 20, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(self.embedding(tokens).mT).mT
        return self.head(self.norm(self.query(hidden)))


def test_with_a_model_the_targeted_layers_are_decomposed():
    model = Network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"conv.weight \(39% of the trained weights\) are matrices outside of linear"):
        assert decomposed(GemsOptimizer(base, tasks=TASKS, rank=4, model=model), model) == ["query.weight"]
    for targets, expected in (
        (["head"], ["head.weight"]),
        ("(query|head)", ["query.weight", "head.weight"]),
        ("query", ["query.weight"]),
    ):
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = GemsOptimizer(base, tasks=TASKS, rank=4, model=model, target_modules=targets)
        assert decomposed(optimizer, model) == expected


def test_without_a_model_every_matrix_larger_than_the_rank_is_and_a_convolution_is_one():
    model = Network()
    optimizer = GemsOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, rank=11)
    assert decomposed(optimizer, model) == ["embedding.weight", "conv.weight", "query.weight", "head.weight"]
    base = torch.optim.SGD([{"params": list(model.parameters()), "subspace": False}], lr=0.1)
    assert decomposed(GemsOptimizer(base, tasks=TASKS, rank=4), model) == []


def test_every_kind_of_parameter_trains(device):
    model = Network().to(device)
    optimizer = GemsOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), tasks=TASKS, rank=4)
    before = weights_of(model)
    for task in TASKS:
        with optimizer.task(task):
            model(torch.arange(20, device=device).view(2, 10)).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (6, 6)])
@pytest.mark.parametrize("side", ["input", "output"])
def test_full_rank_warns_once_and_takes_the_whole_gradient(device, shape, side):
    """With a model the layer keeps its subspaces, which are everything there is."""
    model = nn.Sequential(nn.Linear(*shape, bias=False), nn.Linear(shape[1], shape[0], bias=False)).to(device)
    before = [weight.double() for weight in weights_of(model)]
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.warns(UserWarning, match=r"rank=6 >= min\(m, n\) for 0.weight, 1.weight: they get a basis") as caught:
        optimizer = GemsOptimizer(base, tasks=TASKS, rank=6, model=model, side=side)
    assert len(caught) == 1
    gradients = [noise(*p.shape, key=(1, k)).to(p) for k, p in enumerate(model.parameters())]
    sum((p * g).sum() for p, g in zip(model.parameters(), gradients, strict=True)).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1, 3, device=device))]})
    for old, new, gradient in zip(before, model.parameters(), gradients, strict=True):
        torch.testing.assert_close(new.detach().double(), old - gradient.double(), rtol=1e-4, atol=1e-5)


def test_full_rank_without_a_model_warns_once_and_steps_plainly(device):
    model = mlp((12, 5, 12, 5), device=device)
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.warns(UserWarning, match=r"rank=5 >= min\(m, n\) for .* and 1 more|are not decomposed") as caught:
        optimizer = GemsOptimizer(base, tasks=TASKS, rank=5)
    assert len(caught) == 1
    assert "take the plain inner step" in str(caught[0].message)
    assert decomposed(optimizer, model) == []
    train(model, optimizer, 1)


def test_what_a_null_space_cannot_protect_is_said_once(device):
    model = mlp((12, 10, 9, 8), device=device)
    null_space = NullSpace(max_rank=2)
    null_space.update("0", noise(20, 12))
    null_space.update("4", noise(20, 9))
    with pytest.warns(UserWarning, match=r"null_space has nothing for 2.weight, 31.9% of the trained") as caught:
        gems(model, null_space=null_space)
    assert len(caught) == 1
    groups = [{"params": [p], "subspace": p is not model[0].weight} for p in model.parameters()]
    with pytest.warns(UserWarning, match="null_space") as caught:
        gems(model, base=torch.optim.SGD(groups, lr=0.1), null_space=null_space)
    assert sorted(str(w.message)[:40] for w in caught) == [
        "0.weight is protected by null_space but ",
        "null_space has nothing for 2.weight, 31.",
    ]


def test_a_null_space_finds_its_layers_by_parameter_names_alone(device):
    model = mlp(bias=False, device=device)
    null_space = null_space_of(model)
    with_model, without = mlp(bias=False, device=device), mlp(bias=False, device=device)
    train(with_model, gems(with_model, null_space=null_space), 4)
    base = torch.optim.AdamW(without.named_parameters(), lr=1e-2, weight_decay=0.0)
    train(without, GemsOptimizer(base, tasks=TASKS, rank=4, update_proj_gap=3, null_space=null_space), 4)
    assert same(with_model.parameters(), without.parameters())


def test_low_precision_weights_with_a_null_space_are_warned_about_once(device):
    model = mlp(dtype=torch.bfloat16, device=device)
    null_space = null_space_of(mlp(device=device))
    with pytest.warns(UserWarning, match=r"weights are torch.bfloat16.*keep float32 weights") as caught:
        optimizer = gems(model, null_space=null_space)
    assert len(caught) == 1
    train(model, optimizer, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_subspaces_are_float32_at_least_and_weights_keep_their_dtype(device, dtype):
    model = mlp(dtype=dtype, device=device)
    optimizer = gems(model, update_proj_gap=2)
    before = weights_of(model)
    train(model, optimizer, 3)
    wide = torch.promote_types(dtype, torch.float32)
    for layer in (model[0], model[2]):
        assert layer.weight.dtype == dtype
        state = optimizer.state[layer.weight]
        assert {state["basis"].dtype, state["inner.shared.exp_avg"].dtype, state["inner.rec.exp_avg_sq"].dtype} == {
            wide
        }
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
