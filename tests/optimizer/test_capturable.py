"""An ordinary step asks nothing of the device and keeps its memory in place, as a CUDA graph of it needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradsub import GemsOptimizer, NullSpace

# Biases and the norm move freely here, which is said once.
pytestmark = pytest.mark.filterwarnings("ignore:null_space has nothing for:UserWarning")

TASKS = ("first", "second")
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}


class Refuse(TorchDispatchMode):
    """Nothing that has to read a number before it can go on."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        assert operation.name().partition(".")[0] not in WAITING, operation.name()
        return operation(*arguments, **(options or {}))


def trained(device, *, protected=False, gate="heuristic", surgery="sum", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24), nn.LayerNorm(24)).to(device)
    null_space = None
    if protected:
        tokens = torch.randn(200, 6, device=device) @ torch.randn(6, 24, device=device)
        null_space = NullSpace(energy=0.9).collect(model, [tokens])
    # A rate on the CPU may be read at any time, and is where decay is collected.
    rate = 1e-2 if protected and torch.device(device).type == "cpu" else torch.tensor(1e-2, device=device)
    base = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, fused=True)
    optimizer = GemsOptimizer(
        base,
        tasks=TASKS,
        rank=4,
        update_proj_gap=10**6,
        model=model,
        capture="fused",
        nonfinite="ignore",
        null_space=null_space,
        gate=gate,
        surgery=surgery,
        **options,
    )
    batches = [torch.randn(8, 24, device=device) for _ in TASKS]

    def passes():
        for task, x in zip(TASKS, batches, strict=True):
            with optimizer.task(task, samples=8):
                (model(x) - 1).square().mean().backward()

    def step():
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):  # refreshes are over
        passes()
        step()
    return model, optimizer, passes, step


def places(model, optimizer):
    """Where everything lies that outlives a step."""
    held = {f"weight {name}": parameter for name, parameter in model.named_parameters()}
    for number, state in enumerate(optimizer.state.values()):
        held.update({f"state {number} {key}": value for key, value in state.items() if isinstance(value, torch.Tensor)})
    return {name: (tensor.data_ptr(), tensor.shape, tensor.stride()) for name, tensor in held.items()}


KINDS = [
    {},
    {"protected": True},
    {"gate": "hypergradient"},
    {"surgery": "pcgrad"},
    {"refresh": "sketch"},
    {"protected": True, "refresh": "sketch", "side": "input", "orthogonalize": "shared_first"},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_ordinary_step_waits_for_nothing_and_keeps_its_places(device, kind):
    model, optimizer, passes, step = trained(device, **kind)
    before = places(model, optimizer)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    with Refuse():
        for _ in range(3):
            passes()
            step()
    assert places(model, optimizer) == before
    assert not any(torch.equal(old, new) for old, new in zip(start, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_cuda_graph_of_a_step_does_what_the_step_does(device, kind):
    if torch.device(device).type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    captured, _, *parts = trained(device, **kind)
    eager, _, *eager_parts = trained(device, **kind)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries make their workspaces before the capture
        for part in parts:
            part()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, and computes nothing
        for part in parts:
            part()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        for part in eager_parts:
            part()
    for mine, wanted in zip(captured.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
