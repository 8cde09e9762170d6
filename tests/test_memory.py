"""What training takes in memory is what the formulas say, to the byte."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer, NullSpace
from gradsub.memory import layer_bytes, model_bytes

# Vectors move freely here on purpose: what holds of weights must hold beside them.
pytestmark = pytest.mark.filterwarnings("ignore:null_space has nothing for:UserWarning")

TASKS = ("a", "b")
WIDTH, HIDDEN = 24, 40
SHARES = {"q": 0.55, "k": 0.55, "v": 0.55, "o": 0.55, "gate": 0.77, "up": 0.77, "down": 0.75}


class Block(nn.Module):
    """Query, key and value have one input; so have gate and up."""

    def __init__(self, width=WIDTH, hidden=HIDDEN, narrow=WIDTH):
        super().__init__()
        shapes = {
            "q": (width, width),
            "k": (width, narrow),
            "v": (width, narrow),
            "o": (width, width),
            "gate": (width, hidden),
            "up": (width, hidden),
            "down": (hidden, width),
        }
        self.layers = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = self.norm(x)
        q, k, v = (self.layers[name](x) for name in "qkv")
        x = x + self.layers["o"]((q * k).tanh() * v)
        return x + self.layers["down"](self.layers["gate"](x).tanh() * self.layers["up"](x))


def null_space_of(model, share):
    """Protects a share of each layer's directions; layers with one input have one covariance."""
    with torch.no_grad():
        return NullSpace(max_rank=max(1, round(share * WIDTH))).collect(
            model, [torch.randn(4, 30, WIDTH).to(model.norm.weight)]
        )


def train(model, optimizer, steps=4):
    for _ in range(steps):
        for task in TASKS:
            with optimizer.task(task):
                model(torch.randn(5, 3, WIDTH).to(model.norm.weight)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def distinct_bytes(tensors):
    return sum({tensor.untyped_storage().data_ptr(): tensor.numel() * tensor.itemsize for tensor in tensors}.values())


def kept(optimizer):
    """Bytes of a run's state, by what it is; tensors that several layers share count once."""
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    found = {
        "host": distinct_bytes(s[key] for s in states for key in ("protected", "free") if key in s),
        "joint": sum(
            joint.numel() * joint.itemsize for block in optimizer._blocks.all for _, joint, _ in block._joint.values()
        ),
    }
    rest = [v for s in states for key, v in s.items() if key not in ("protected", "free", "anchor")]
    return {**found, "state": sum(v.numel() * v.itemsize for v in rest)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.8])
def test_a_run_holds_what_the_table_says(share, refresh, dtype, device):
    torch.manual_seed(0)
    model = Block().to(device, dtype)
    null_space = null_space_of(model, share) if share else None
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = GemsOptimizer(
        base, tasks=TASKS, rank=4, model=model, null_space=null_space, refresh=refresh, update_proj_gap=3
    )
    train(model, optimizer)
    found, table = kept(optimizer), model_bytes(model, rank=4, null_space=null_space, refresh=refresh)
    said = table.methods["gradsub, null space" if share else "gradsub"]
    assert said.host == found["host"]
    assert said.state == found["state"]
    assert said.joint == found["joint"]
    assert said.weights == sum(p.numel() * p.itemsize for p in model.parameters())
    assert "protection" in str(table)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.8])
def test_the_allocator_holds_what_the_table_says(share, tmp_path):
    """Between two steps, but for some hundred bytes of counters; a mapped file counts as memory there."""
    pytest.importorskip("yaml")
    from benchmarks.training.memory import trace

    path, kept = tmp_path / "null.safetensors", []

    def prepare():
        torch.manual_seed(0)
        model, null_space = Block(), None
        if share:
            null_space_of(model, share).save(path, statistics=False)
            null_space = NullSpace.load(path)
        base = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer = GemsOptimizer(base, tasks=TASKS, rank=4, model=model, null_space=null_space)
        train(model, optimizer)
        kept.extend([model, null_space, optimizer])
        return lambda: train(model, optimizer, 1)

    held = trace(prepare).held - (path.stat().st_size if share else 0)
    said = model_bytes(kept[0], rank=4, null_space=kept[1]).methods["gradsub, null space" if share else "gradsub"]
    assert 0 <= held - (said.weights + said.state + said.joint + said.host) < 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("protection", ["host", "device"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.8])
def test_the_gpu_holds_what_the_table_says(share, protection, tmp_path):
    """Between two steps. Its allocator rounds tensors up to 512 bytes; counters may be the host's."""

    def held():
        torch.cuda.synchronize()
        gc.collect()
        return torch.cuda.memory_allocated()

    def prepared():
        torch.manual_seed(0)
        model, null_space = Block().cuda(), None
        if share:  # a file's directions stay in the host's memory
            null_space_of(model, share).save(tmp_path / "null.safetensors", statistics=False)
            null_space = NullSpace.load(tmp_path / "null.safetensors")
        base = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer = GemsOptimizer(base, tasks=TASKS, rank=4, model=model, null_space=null_space, protection=protection)
        train(model, optimizer)
        return model, null_space, optimizer

    prepared()  # workspaces of the libraries stay
    before = held()
    model, null_space, optimizer = prepared()
    found = held() - before
    table = model_bytes(model, rank=4, null_space=null_space, protection=protection)
    said = table.methods["gradsub, null space" if share else "gradsub"]
    expected = said.weights + said.state + said.joint
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    tensors = sum(isinstance(value, torch.Tensor) for state in states for value in state.values())
    assert expected - said.bookkeeping <= found <= expected + 512 * (tensors + 2 * len(states))


def test_adamw_holds_what_the_table_says():
    model = Block()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3, WIDTH)).sum().backward()
    optimizer.step()
    said = model_bytes(model, rank=4).methods["AdamW"]
    assert said.state == sum(v.numel() * v.itemsize for s in optimizer.state.values() for v in s.values())
    assert said.gradients == sum(p.grad.numel() * p.grad.itemsize for p in model.parameters())


def test_lora_holds_what_the_table_says():
    peft = pytest.importorskip("peft")
    model = Block()
    before = sum(p.numel() * p.itemsize for p in model.parameters())
    said = model_bytes(model, rank=4).methods["LoRA"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(SHARES)))
    adapters = [p for p in adapted.parameters() if p.requires_grad]
    assert said.weights == before + sum(p.numel() * p.itemsize for p in adapters)
    optimizer = torch.optim.AdamW(adapters)
    adapted(torch.randn(5, 3, WIDTH)).sum().backward()
    optimizer.step()
    assert said.state == sum(v.numel() * v.itemsize for s in optimizer.state.values() for v in s.values())


def test_an_8b_model_with_a_null_space_is_one_that_fits():
    """State on the device at most .05 of AdamW's moments, the protection at most 12 GB of the host's memory."""
    with torch.device("meta"):
        model = nn.ModuleList(Block(4096, 14336, 1024) for _ in range(32))
    shares = {name: SHARES[name.split(".")[-1]] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    sources = {"k": "q", "v": "q", "up": "gate"}
    inputs = {name: f"{head}.{sources.get(last, last)}" for name in shares for head, _, last in [name.rpartition(".")]}
    table = model_bytes(model, rank=64, null_space=shares, inputs=inputs)
    adamw, gems = table.methods["AdamW"], table.methods["gradsub, null space"]
    assert gems.state <= 0.05 * adamw.moments
    assert gems.host <= 12e9
    assert gems.state == table.methods["gradsub"].state
    each = [
        layer_bytes(m.out_features, m.in_features, rank=64, protected=round(shares[name] * m.in_features))
        for name, m in model.named_modules()
        if name in shares
    ]
    assert sum(layer.state for layer in each) <= 0.05 * adamw.moments


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("protected", [0, 3, 12, 13, 23, 24])
@pytest.mark.filterwarnings("ignore:null_space protects")
def test_a_layer_holds_what_the_formula_says(protected, anchor, side, device):
    model = nn.Sequential(nn.Linear(24, 24, bias=False)).to(device)
    null_space = NullSpace(side=side, max_rank=protected or None, energy=None if protected else 1.0)
    null_space.update("0", torch.randn(60, 24) if protected else torch.zeros(2, 24))
    optimizer = GemsOptimizer(
        torch.optim.AdamW(model.parameters()),
        tasks=TASKS,
        rank=4,
        side=side,
        model=model,
        null_space=null_space,
        anchor=anchor,
        refresh="svd",
    )
    with optimizer.task("a"):
        model(torch.randn(5, 24, device=device)).square().mean().backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    host = sum(v.numel() * v.itemsize for key, v in state.items() if key in ("protected", "free", "anchor"))
    assert host == layer_bytes(24, 24, rank=4, protected=protected, side=side, anchor=anchor).host


def test_more_directions_than_there_are():
    with pytest.raises(ValueError, match="protected=25 must be a number of directions from 0 to 24"):
        layer_bytes(24, 24, rank=4, protected=25)


OF_BOTH = [
    ({"side": "x"}, "side='x' must be 'input' or 'output'"),
    ({"protection": "gpu"}, "protection='gpu' must be one of 'auto', 'device', 'host'"),
    ({"rank": -3}, "rank=-3 must be an integer of at least 1"),
    ({"rank": 2.5}, "rank=2.5 must be an integer of at least 1"),
    ({"rank": True}, "rank=True must be an integer of at least 1"),
    ({"task_rank": 0}, "task_rank=0 must be an integer of at least 1, or None"),
]
OF_THESE = [
    ({"moments": -1}, "moments=-1 must be an integer of at least 0"),
    ({"moments": 1.5}, "moments=1.5 must be an integer of at least 0"),
    ({"tasks": -1}, "tasks=-1 must be an integer of at least 0"),
    ({"tasks": TASKS}, r"tasks=\('a', 'b'\) must be an integer of at least 0"),
]


@pytest.mark.parametrize(("wrong", "message"), [*OF_BOTH, *OF_THESE], ids=str)
def test_what_no_optimizer_takes_has_no_bytes(wrong, message):
    """Said in the words in which the optimizer says it."""
    model = Block()
    with pytest.raises(ValueError, match=message):
        layer_bytes(24, 24, **{"rank": 4, **wrong})
    with pytest.raises(ValueError, match=message):
        model_bytes(model, **{"rank": 4, **wrong})
    if (wrong, message) in OF_BOTH:
        with pytest.raises(ValueError, match=message):
            GemsOptimizer(torch.optim.AdamW(model.parameters()), tasks=TASKS, **{"rank": 4, "model": model, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"out_features": 0}, "out_features=0 must be an integer of at least 1"),
        ({"in_features": 2.0}, "in_features=2.0 must be an integer of at least 1"),
        ({"itemsize": -4}, "itemsize=-4 must be an integer of at least 1"),
        ({"protected": -1}, "protected=-1 must be a number of directions from 0 to 24"),
        ({"protected": 0.5}, "protected=0.5 must be a number of directions from 0 to 24"),
    ],
    ids=str,
)
def test_what_no_layer_has_has_no_bytes(wrong, message):
    with pytest.raises(ValueError, match=message):
        layer_bytes(**{"out_features": 24, "in_features": 24, "rank": 4, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"refresh": "x"}, "refresh='x' must be one of 'auto', 'sketch', 'svd'"),
        ({"target_modules": "("}, r"target_modules='\(' is no regular expression"),
        ({"null_space": {"nope": 0.5}}, r"null_space: \['nope'\] are no decomposed layers; these are layers.q"),
        ({"null_space": {"norm": 0.5}}, r"null_space: \['norm'\] are no decomposed layers"),
        ({"null_space": {"layers.q": math.nan}}, r"null_space\['layers.q'\]=nan must be .* from 0 to 1"),
        ({"null_space": {"layers.q": 77}}, r"null_space\['layers.q'\]=77 must be .* from 0 to 1"),
        ({"null_space": {"layers.q": -0.1}}, r"null_space\['layers.q'\]=-0.1 must be"),
        ({"null_space": {"layers.q": "half"}}, r"null_space\['layers.q'\]='half' must be"),
        ({"null_space": 0.5}, "null_space=0.5 must be a NullSpace, a share for each layer by its name, or None"),
        ({"null_space": NullSpace("output")}, "side='input', but null_space was collected for side='output'"),
        ({"inputs": {"nope": "x"}}, r"inputs: \['nope'\] are no decomposed layers"),
    ],
    ids=str,
)
def test_what_no_model_has_has_no_bytes(wrong, message):
    with pytest.raises(ValueError, match=message):
        model_bytes(Block(), **{"rank": 4, **wrong})


def test_numbers_of_numpy_count_as_those_of_python():
    few, many = np.int8(4), {name: np.float32(0.5) for name, _ in Block().named_modules() if name.startswith("layers.")}
    found = model_bytes(Block(), rank=few, tasks=np.int8(2), moments=np.int8(2), null_space=many)
    expected = model_bytes(Block(), rank=4, null_space=dict.fromkeys(many, 0.5))
    assert found == expected
    assert layer_bytes(576, 1536, rank=few, tasks=np.int8(2)) == layer_bytes(576, 1536, rank=4)


@pytest.mark.parametrize("refresh", ["svd", "sketch"])
def test_a_step_holds_what_the_table_says(refresh):
    model = Block()
    optimizer = GemsOptimizer(torch.optim.AdamW(model.parameters()), tasks=TASKS, rank=4, model=model, refresh=refresh)
    said = model_bytes(model, rank=4, refresh=refresh).methods["gradsub"]
    assert said.joint + said.captured + said.sketches + said.gradients == optimizer.summary().transient


def test_protected_vectors_and_masters_stay_on_the_device(device):
    model = Block().to(device, torch.bfloat16)
    batches = [torch.randn(40, 30, WIDTH).to(model.norm.weight)]
    null_space = NullSpace(energy=0.5).collect(model, batches)
    null_space.collect_gradients(model, batches, lambda model, batch: model(batch).float().square().sum())
    optimizer = GemsOptimizer(
        torch.optim.AdamW(model.parameters()),
        tasks=TASKS,
        rank=4,
        model=model,
        null_space=null_space,
        master_weights=True,
    )
    train(model, optimizer)
    said = model_bytes(model, rank=4, null_space=null_space, master_weights=True).methods["gradsub, null space"]
    assert said.master == sum(4 * layer.weight.numel() for layer in model.layers.values())
    assert said.protection == sum(
        optimizer.state[v]["protected"].numel() * 4 for v in (model.norm.weight, model.norm.bias)
    )
    assert said.state == optimizer.summary().state


def test_a_place_for_the_protection_is_one_that_an_optimizer_knows():
    by_place = {place: layer_bytes(8, 6, rank=2, protected=3, protection=place) for place in ("auto", "host", "device")}
    assert by_place["auto"] == by_place["host"]
    assert by_place["host"].host == by_place["device"].state - by_place["host"].state > 0
    with pytest.raises(ValueError, match="protection='gpu' must be one of 'auto', 'device', 'host'"):
        layer_bytes(8, 6, rank=2, protected=3, protection="gpu")
    model = torch.nn.Linear(6, 8, bias=False)
    tables = [model_bytes(model, rank=2, null_space={"": 0.5}, protection=place) for place in ("auto", "host")]
    assert tables[0] == tables[1]
