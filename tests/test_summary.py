"""What the optimizer says of itself before it has stepped."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from test_memory import TASKS, Block, distinct_bytes, kept, null_space_of, train
from torch import nn

from gradsub import GemsOptimizer, NullSpace
from gradsub.memory import layer_bytes, model_bytes
from gradsub.surgery import DWA


def build(model: nn.Module, /, **options: Any) -> GemsOptimizer:
    base = options.pop("base", None) or torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"tasks": TASKS, "rank": 4, "model": model, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is not decomposed or not protected
        return GemsOptimizer(base, **options)


@pytest.mark.parametrize(
    ("share", "refresh", "dtype"),
    [(0.0, "svd", torch.float64), (0.2, "sketch", torch.float32), (0.8, "svd", torch.float32)],
)
def test_its_bytes_are_those_of_the_state_and_of_the_formula(share, refresh, dtype, device):
    torch.manual_seed(0)
    model = Block().to(device, dtype)
    null_space = null_space_of(model, share) if share else None
    optimizer = build(model, null_space=null_space, refresh=refresh, update_proj_gap=3)
    said = model_bytes(model, rank=4, null_space=null_space, refresh=refresh)
    method = said.methods["gradsub, null space" if share else "gradsub"]
    for steps in (0, 3):
        train(model, optimizer, steps)
        summary, found = optimizer.summary(), kept(optimizer)
        assert summary.state == found["state"] == method.state
        assert summary.host == found["host"] == method.host
        assert sum(layer.host for layer in summary.layers) >= summary.host
    for layer in summary.layers:
        rows, columns = layer.shape
        protected = round(layer.protected_fraction * columns)
        formula = layer_bytes(
            rows, columns, rank=4, protected=protected, sketched=refresh == "sketch", itemsize=dtype.itemsize
        )
        assert (layer.state, layer.host) == (formula.state, formula.host)
        in_a_step = formula.joint + formula.captured + formula.sketches
        whole = 0 if refresh == "sketch" else len(TASKS) * rows * columns * dtype.itemsize
        assert layer.transient == in_a_step + whole
        assert layer.refresh == refresh


@pytest.mark.parametrize(("base", "protection"), [("AdamW", "device"), ("SGD", "host")])
def test_the_bytes_of_any_base_optimizer(base, protection, device):
    torch.manual_seed(0)
    model = Block().to(device)
    options = {"lr": 0.1, "momentum": 0.9} if base == "SGD" else {"lr": 0.1}
    optimizer = build(
        model,
        base=getattr(torch.optim, base)(model.parameters(), **options),
        null_space=null_space_of(model, 0.6),
        protection=protection,
        surgery=DWA(window=2),
        anchor=True,
    )
    train(model, optimizer, 2)
    summary = optimizer.summary()
    states = list(optimizer.state.values())
    directions = [s[key] for s in states for key in ("protected", "free", "anchor") if key in s]
    rest = [v for s in states for key, v in s.items() if key not in ("protected", "free", "anchor")]
    plain = sum(v.numel() * v.itemsize for v in rest if isinstance(v, torch.Tensor))
    if protection == "host":
        assert (summary.state, summary.host) == (plain, distinct_bytes(directions))
    else:
        assert (summary.state, summary.host) == (plain + sum(v.numel() * v.itemsize for v in directions), 0)


class Zoo(nn.Module):
    """A bit of everything that is not decomposed, or not protected."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 24)
        self.linear = nn.Linear(24, 24)
        self.chosen_out = nn.Linear(24, 24, bias=False)
        self.frozen = nn.Linear(24, 24, bias=False)
        self.frozen.requires_grad_(False)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(24, 24, bias=False))
        self.experts = nn.Parameter(torch.randn(2, 24, 24))
        self.norm = nn.LayerNorm(24)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.norm(self.embedding(ids)))
        return self.computed(self.frozen(self.chosen_out(x) @ self.experts[0]))


def zoo(device: Any) -> tuple[Zoo, GemsOptimizer]:
    torch.manual_seed(0)
    model = Zoo().to(device)
    stranger = nn.Parameter(torch.randn(24, 24, device=device))
    null_space = NullSpace(max_rank=3).collect(model, [torch.randint(30, (4, 8), device=device)])
    del null_space._shared.by_name["chosen_out"]  # as if it had been collected on fewer layers
    whole = ("chosen_out.weight",)
    groups = [
        {"params": [p for name, p in model.named_parameters() if name not in whole]},
        {"params": [dict(model.named_parameters())[name] for name in whole], "subspace": False},
        {"params": [stranger]},
    ]
    return model, build(model, base=torch.optim.AdamW(groups), null_space=null_space)


def test_every_parameter_has_its_place_and_its_reasons(device):
    model, optimizer = zoo(device)
    summary = optimizer.summary()
    assert len(summary.parameters) == sum(len(group["params"]) for group in optimizer.param_groups)
    decomposed = {layer.name: layer for layer in summary.layers}
    assert set(decomposed) == {"linear", "frozen"}
    assert decomposed["linear"].ranks == (4, 2, 2)
    assert decomposed["linear"].protected_fraction == pytest.approx(3 / 24)
    sizes = {name: layer.numel for name, layer in decomposed.items()}
    shares = sum(layer.protected_fraction * sizes[name] for name, layer in decomposed.items())
    assert summary.protected_fraction == pytest.approx(shares / sum(sizes.values()))
    assert decomposed["linear"].not_protected is None
    assert decomposed["frozen"].capture == "none"
    assert decomposed["frozen"].transient == 0
    why = summary.not_decomposed
    assert why["embedding.weight"] == "it is no weight of a layer that target_modules names"
    assert why["chosen_out.weight"] == "its group has subspace=False"
    assert why["experts"] == "it is a matrix outside of linear layers"
    assert why["norm.weight"] == why["linear.bias"] == "it is a vector"
    assert why[next(name for name in why if name.startswith("param_groups[2]"))] == "model= does not have it"
    free = summary.not_protected
    assert free["embedding.weight"] == "null_space has nothing for it"
    assert "frozen" not in free
    notes = "\n".join(summary.notes)
    assert "computed: its weight is computed from " in notes
    model.linear.bias.requires_grad_(False)
    frozen = {p.name: p for p in optimizer.summary().parameters}["linear.bias"]
    assert (frozen.capture, frozen.not_decomposed, frozen.not_protected) == ("none", "it is frozen", None)
    text = str(summary)
    for part in (
        "its group has subspace=False",
        "12%",
        "4 + 2 + 2",
        "no: null_space has nothing for it",
        "side='input'",
    ):
        assert part in text


def test_without_a_model_the_rank_decides(device):
    model = nn.Sequential(nn.Linear(24, 24, bias=False), nn.Linear(24, 3, bias=False)).to(device)
    optimizer = build(model, model=None)
    assert list(optimizer.summary().not_decomposed.values()) == ["rank=4 >= min(m, n) = 3"]
    assert optimizer.summary().not_protected == {}
    assert "no null space" in str(optimizer.summary())


def test_layers_that_differ_in_a_number_share_a_line(device):
    model = nn.ModuleList(nn.Sequential(nn.Linear(24, 24, bias=False)) for _ in range(12)).to(device)
    summary = build(model).summary()
    (line,) = (line for line in str(summary).splitlines() if line.startswith("*.*"))
    assert line.split()[1] == "x12"
    assert len(summary.layers) == 12
    assert "100.0% of the trained weights decomposed" in str(summary)


def test_it_is_data(device):
    pandas = pytest.importorskip("pandas")
    _, optimizer = zoo(device)
    summary = optimizer.summary()
    found = json.loads(summary.to_json(indent=1), parse_constant=pytest.fail)
    assert found["state"] == summary.state
    assert found["parameters"][0]["name"] == summary.parameters[0].name
    frame = summary.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["state"].sum() == summary.state
    assert list(frame["name"]) == [parameter.name for parameter in summary.parameters]


def test_an_optimizer_without_tasks_has_one_too(device):
    model = nn.Sequential(nn.Linear(24, 24, bias=False)).to(device)
    (layer,) = build(model, tasks=()).summary().layers
    assert layer.ranks == (4,)
    assert layer.transient >= 24 * 24 * 4


def test_asking_changes_nothing(device):
    ends = []
    for asking in (False, True):
        torch.manual_seed(0)
        model = Block().to(device)
        optimizer = build(model, null_space=null_space_of(model, 0.5))
        torch.manual_seed(1)
        for _ in range(2):
            if asking:
                optimizer.summary()
            train(model, optimizer, 1)
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
