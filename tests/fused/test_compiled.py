"""torch.compile: what is due changes tensors, and hardly ever the graph."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer

WIDTHS = (70, 72, 74, 76)
GAP = 4


def chain():
    torch.manual_seed(0)
    pairs = itertools.pairwise(WIDTHS)
    return nn.Sequential(*(part for a, b in pairs for part in (nn.Linear(a, b), nn.Tanh())))


def trained(run, model, device, steps, **options):
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = GemsOptimizer(
        base, tasks=("a", "b"), rank=4, update_proj_gap=GAP, model=run, capture="fused", **options
    )
    for step in range(steps):
        for k, task in enumerate(optimizer.tasks):
            x = torch.randn(16, WIDTHS[0], generator=torch.Generator().manual_seed(2 * step + k)).to(device)
            with optimizer.task(task):
                (run(x) - k).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach() for weight in model.parameters()]


@pytest.mark.parametrize("refresh", ["sketch", "svd", "auto"])
def test_at_most_three_graphs_over_any_number_of_refreshes(device, refresh):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, plain = chain().to(device), chain().to(device)
    run = torch.compile(model, backend="eager", fullgraph=True)
    found = trained(run, model, device, 4 * GAP, refresh=refresh)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    if refresh == "svd":  # sketches take turns where nothing is compiled
        for mine, wanted in zip(found, trained(plain, plain, device, 4 * GAP, refresh=refresh), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch looks at that of what a layer is given
def test_layers_of_one_shape_that_are_compiled_one_by_one_share_their_graphs(device):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(10))).to(device)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = GemsOptimizer(base, tasks=("a",), rank=2, model=model, capture="fused", refresh="sketch")
    for layer in model:
        layer.compile(backend="eager", fullgraph=True)
    for step in range(4):
        with optimizer.task("a"):
            model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


class Model(nn.Module):
    """Of a class of its own: of torch's, such as `nn.Sequential`, torch compiles no forward pass in place."""

    def __init__(self):
        super().__init__()
        self.body = chain()

    def forward(self, x):
        return self.body(x)


def test_a_model_that_is_compiled_in_place_has_as_few_graphs(device):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Model().to(device)
    model.compile(backend="eager", fullgraph=True)
    trained(model, model, device, 3 * GAP, refresh="sketch")
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def mixed(run, model, optimizer, rows, device):
    for step in range(3 * GAP):
        x = torch.randn(16, WIDTHS[0], generator=torch.Generator().manual_seed(step)).to(device)
        with optimizer.mixed(rows):
            (run(x) - torch.tensor(rows, device=device)[:, None]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach() for weight in model.parameters()]


@pytest.mark.parametrize("rows", [[0] * 8 + [1] * 8, [0, 1] * 8], ids=["neighbours", "in turns"])
@pytest.mark.parametrize("refresh", ["sketch", "svd"])
def test_a_mixed_batch_has_as_few_graphs_and_equals_the_uncompiled_one(device, refresh, rows):
    """Also in steps that sketch, where the segments of all tasks share one matrix."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for compiled in (True, False):
        model = chain().to(device)
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = GemsOptimizer(
            # Of what torch.compile returns in both: sketches take turns where nothing is compiled.
            base,
            tasks=("a", "b"),
            rank=4,
            update_proj_gap=GAP,
            model=run,
            capture="fused",
            refresh=refresh,
        )
        found.append(mixed(run if compiled else model, model, optimizer, rows, device))
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-5)
