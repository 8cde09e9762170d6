"""What `load_state_dict` makes of checkpoints that are valid but not quite its own: hooks, older ones, other dtypes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from gradsub import GemsOptimizer, NullSpace
from gradsub.gates import GateInputs, uniform_gate
from gradsub.surgery import GradVac, cagrad, pcgrad

from .toys import TASKS, gems, loss_of, mlp, null_space_of, same, tensors_in, train, weights_of

Saved = dict[str, Any]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def resumed(
    make: Callable[[nn.Module], GemsOptimizer],
    edit: Callable[[Saved], Any] = lambda saved: None,
    prepare: Callable[[GemsOptimizer], None] = lambda optimizer: None,
    after: int = 4,
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of an uninterrupted run, and of one that went on from an edited checkpoint, read from a file."""
    model = mlp()
    optimizer = make(model)
    train(model, optimizer, after)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(model, optimizer, 5, start=after)
    edit(saved["optimizer"])
    fresh = mlp(seed=3)
    again = make(fresh)
    prepare(again)
    fresh.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(fresh, again, 5, start=after)
    return weights_of(model), weights_of(fresh)


# --- hooks -----------------------------------------------------------------------------------------------------------


def by_name(optimizer: torch.optim.Optimizer, saved: Saved) -> Saved:
    """Torch's recipe: what is saved of a parameter goes to the one of the same name."""
    (theirs,), (ours,) = saved["param_groups"], optimizer.param_groups
    place = dict(zip(theirs["param_names"], theirs["params"], strict=True))
    state = {i: saved["state"][place[name]] for i, name in enumerate(ours["param_names"])}
    return {
        "state": state,
        "param_groups": [{**theirs, "params": list(state), "param_names": ours["param_names"]}],
    }


@pytest.mark.parametrize("width", [12, 7], ids=["of one shape", "of different shapes"])
@pytest.mark.parametrize("surgery", ["sum", "gradvac"])
def test_a_hook_maps_parameters_by_name(device, width, surgery):
    def make(reverse: bool) -> tuple[nn.Module, GemsOptimizer]:
        model = mlp((12, 12, width), device=device)
        named = list(model.named_parameters())
        base = adamw(named[::-1] if reverse else named)
        return model, GemsOptimizer(base, tasks=TASKS, rank=3, update_proj_gap=3, surgery=surgery)

    model, optimizer = make(False)
    train(model, optimizer, 4)
    other, late = make(True)
    late.register_load_state_dict_pre_hook(by_name)
    late.load_state_dict(optimizer.state_dict())
    mine, theirs = dict(other.named_parameters()), dict(model.named_parameters())
    for name, parameter in mine.items():
        there = {k: v for k, v in optimizer.state[theirs[name]].items() if not k.startswith("surgery")}
        here = {k: v for k, v in late.state[parameter].items() if not k.startswith("surgery")}
        assert here.keys() == there.keys()
        assert all(torch.equal(here[key], value) for key, value in there.items()), name
    other.load_state_dict(model.state_dict())
    train(model, optimizer, 1, start=4)  # layers have other indices: they agree until a basis is drawn anew
    train(other, late, 1, start=4)
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-6)


def test_what_a_pre_hook_returns_or_changes_is_what_is_loaded(device):
    model = mlp(device=device)
    optimizer = gems(model)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()

    def halve(optimizer: torch.optim.Optimizer, state: Saved) -> None:
        entries = {
            i: {k: v / 2 if k.endswith("exp_avg") else v for k, v in e.items()} for i, e in state["state"].items()
        }
        state["state"] = entries

    def slow(optimizer: torch.optim.Optimizer, state: Saved) -> Saved:
        return {**state, "param_groups": [{**group, "lr": 0.125} for group in state["param_groups"]]}

    again = gems(mlp(device=device))
    again.register_load_state_dict_pre_hook(halve)
    again.register_load_state_dict_pre_hook(slow)
    again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == 0.125
    found = again.state_dict()["state"]
    for index, held in saved["state"].items():
        for key, value in held.items():
            assert torch.equal(found[index][key], value / 2 if key.endswith("exp_avg") else value), key


@pytest.mark.parametrize("replaces", [False, True], ids=["in place", "by other tensors"])
def test_what_a_post_hook_changes_is_what_is_stepped_with(device, replaces):
    def calm(optimizer: torch.optim.Optimizer) -> None:
        for held in optimizer.state.values():
            for key, value in held.items():
                if "exp_avg" in key and replaces:
                    held[key] = torch.ones_like(value)
                elif "exp_avg" in key:
                    value.fill_(1.0)

    ends = []
    for hooked in (False, True):
        model = mlp(device=device)
        optimizer = gems(model)
        train(model, optimizer, 2)
        if hooked:
            optimizer.register_load_state_dict_post_hook(calm)
        else:
            saved = copy.deepcopy(optimizer.state_dict())
            for held in saved["state"].values():
                held.update({key: torch.ones_like(value) for key, value in held.items() if "exp_avg" in key})
        optimizer.load_state_dict(optimizer.state_dict() if hooked else saved)
        train(model, optimizer, 3, start=2)
        ends.append(weights_of(model))
    assert same(*ends)


def test_a_refusing_hook_leaves_everything(device):
    model = mlp(device=device)
    optimizer = gems(model)
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(lambda o, state: {**state, "state": {}})
    with pytest.raises(ValueError, match="lacks the state of 0, parameter 0"):
        optimizer.load_state_dict(saved)
    assert same(tensors_in(saved["state"]), tensors_in(optimizer.state_dict()["state"]))


# --- older checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.NAdam])
def test_any_option_that_a_checkpoint_lacks_is_as_here(base):
    def make(model: nn.Module) -> GemsOptimizer:
        return gems(model, base=base(model.parameters(), lr=1e-2))

    model = mlp()
    optimizer = make(model)
    expected = copy.deepcopy([{**group, "params": None} for group in optimizer.param_groups])
    options = optimizer.param_groups[0].keys() - {"params"}
    for option in options:
        saved = optimizer.state_dict()
        del saved["param_groups"][0][option]
        optimizer.load_state_dict(saved)
        assert [{**group, "params": None} for group in optimizer.param_groups] == expected, option
    whole, again = resumed(make, lambda saved: [saved["param_groups"][0].pop(option) for option in options])
    assert same(whole, again)


def test_options_that_nobody_knows_stay_as_in_torch():
    model = mlp()
    optimizer = gems(model)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["unheard_of"] = 3
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["unheard_of"] == 3
    train(model, optimizer, 1)


class Counting(torch.optim.SGD):
    """Counts in its group, from its first step on."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"] / group["k"])


def test_options_that_the_first_step_creates_go_on():
    whole, again = resumed(lambda model: gems(model, base=Counting(model.parameters(), lr=0.1)))
    assert same(whole, again)


@pytest.mark.parametrize("base", [adamw, partial(torch.optim.NAdam, lr=1e-2), partial(torch.optim.Adagrad, lr=1e-2)])
@pytest.mark.parametrize("kind", [float, int], ids=str)
def test_numbers_become_tensors(base, kind):
    def edit(saved: Saved) -> None:
        for held in saved["state"].values():
            for key, value in held.items():
                if value.ndim == 0 and float(value).is_integer():
                    held[key] = kind(value)

    whole, again = resumed(lambda model: gems(model, base=base(model.parameters())), edit)
    assert same(whole, again)


def test_lists_for_tuples_and_other_names_are_no_difference():
    """As JSON leaves them."""

    def edit(saved: Saved) -> None:
        for group in saved["param_groups"]:
            group.update({key: list(value) for key, value in group.items() if isinstance(value, tuple)})

    whole, again = resumed(gems, edit)
    assert same(whole, again)


def test_an_adam_goes_on_as_the_bare_class_would(device):
    """AdamW decouples its decay whatever a checkpoint says."""
    model = mlp(device=device)
    saved = gems(model, base=torch.optim.Adam(model.parameters(), weight_decay=0.1)).state_dict()
    optimizer = gems(model, base=torch.optim.AdamW(model.parameters()))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


# --- layers without protection, and other dtypes ---------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("refresh", ["svd", "sketch"])
def test_a_layer_of_which_nothing_is_protected(side, refresh):
    def make(model: nn.Module) -> GemsOptimizer:
        null_space = NullSpace(side=side, threshold=1e9)
        for layer, width in (("0", 12 if side == "input" else 16), ("2", 16 if side == "input" else 8)):
            null_space.update(layer, torch.randn(50, width))
        with pytest.warns(UserWarning, match="protects no direction"):
            return gems(model, null_space=null_space, side=side, refresh=refresh)

    whole, again = resumed(make)
    assert same(whole, again)


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("there", DTYPES, ids=str)
@pytest.mark.parametrize("here", DTYPES, ids=str)
@pytest.mark.parametrize("base", [adamw, partial(torch.optim.SGD, lr=1e-2, momentum=0.9, dampening=0.1)])
@pytest.mark.filterwarnings("ignore:the weights are torch.bfloat16")
def test_another_dtype_is_cast_as_torch_casts(device, there, here, base):
    def make(dtype: torch.dtype) -> tuple[nn.Module, GemsOptimizer]:
        model = mlp(dtype=dtype, device=device)
        return model, gems(model, base=base(model.parameters()), null_space=null_space_of(mlp(device=device)))

    first, optimizer = make(there)
    train(first, optimizer, 4)
    second, again = make(here)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(optimizer.state_dict())
    for held in again.state.values():
        inside = torch.promote_types(here, torch.float32) if "basis" in held else here
        for key, value in held.items():
            if value.is_floating_point() and value.ndim:
                assert value.dtype == inside, key
    train(first, optimizer, 3, start=4)
    train(second, again, 3, start=4)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0.1, atol=0.05)


# --- surgeries and gates with state ----------------------------------------------------------------------------------


class Averaging:
    """A gate, or a surgery, that remembers."""

    def __init__(self) -> None:
        self.mean = torch.zeros(())
        self.calls = 0

    def __call__(self, seen: GateInputs | Tensor) -> Tensor:
        norms = seen.diagonal().sqrt() if isinstance(seen, Tensor) else seen.gradient_norms
        self.mean = 0.5 * self.mean + 0.5 * norms.mean()
        self.calls += 1
        weights = norms + self.mean * self.calls
        return weights / weights.sum(-1, keepdim=True)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.clone(), "nested": {"calls": self.calls}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean, self.calls = state["mean"].clone(), state["nested"]["calls"]


class Network(nn.Module):
    """A gate that is a module, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, inputs: GateInputs) -> Tensor:
        self.count += 1
        return uniform_gate(inputs) * (1 + self.count) / (2 + self.count)


class Holder:
    """Has something with state, and no state of its own."""

    def __init__(self, generator: torch.Generator) -> None:
        self.parts = [generator]

    def weigh(self, gramian: Tensor) -> Tensor:
        return pcgrad(gramian, generator=self.parts[0])


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def closing(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    return lambda gramian: pcgrad(gramian, generator=generator)


STATEFUL: dict[str, Callable[[], dict[str, Any]]] = {
    "gradvac by name": lambda: {"surgery": "gradvac"},
    "GradVac": lambda: {"surgery": GradVac(beta=0.2)},
    "GradVac that draws": lambda: {"surgery": GradVac(beta=0.2, generator=drawn())},
    "partial": lambda: {"surgery": partial(pcgrad, generator=drawn())},
    "partial of a partial": lambda: {"surgery": partial(partial(pcgrad), generator=drawn())},
    "closure": lambda: {"surgery": closing(drawn())},
    "bound method": lambda: {"surgery": Holder(drawn()).weigh},
    "an object's own": lambda: {"surgery": Averaging()},
    "gate": lambda: {"gate": Averaging()},
    "gate that is a module": lambda: {"gate": Network()},
    "both": lambda: {"gate": Averaging(), "surgery": partial(pcgrad, generator=drawn())},
}
THREE = ("a", "b", "c")


def stateful(kind: str) -> Callable[[nn.Module], GemsOptimizer]:
    return lambda model: gems(model, tasks=THREE, **STATEFUL[kind]())


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("after", [0, 4])
def test_a_surgery_or_gate_goes_on_where_it_stopped(kind, after):
    whole, again = resumed(stateful(kind), after=after)
    assert same(whole, again)


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_checkpoint_without_that_state_loads_and_says_so(kind):
    def edit(saved: Saved) -> None:
        for held in saved["state"].values():
            for key in [key for key in held if key.startswith(("surgery", "gate")) and key != "gate_memory"]:
                del held[key]

    with pytest.warns(UserWarning, match="no state of (surgery|gate)="):
        whole, again = resumed(stateful(kind), edit)
    assert not same(whole, again)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_has_it_too(tmp_path, kind, flat):
    """Read into an optimizer that has not stepped."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = mlp()
    optimizer = stateful(kind)(model)
    train(model, optimizer, 4)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(tmp_path), no_dist=True)
    train(model, optimizer, 4, start=4)
    fresh = mlp(seed=3)
    again = stateful(kind)(fresh)
    weights, state = get_state_dict(fresh, again, options=options)
    read = {"model": weights, "optimizer": state}
    dcp.load(read, checkpoint_id=str(tmp_path), no_dist=True)
    set_state_dict(fresh, again, model_state_dict=read["model"], optim_state_dict=read["optimizer"], options=options)
    train(fresh, again, 4, start=4)
    assert same(weights_of(model), weights_of(fresh))


def test_copies_have_a_state_of_their_own():
    model = mlp()
    optimizer = stateful("both")(model)
    train(model, optimizer, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    before = tensors_in(optimizer.state_dict()["state"])
    train(twin_model, twin, 2, start=2)
    assert same(before, tensors_in(optimizer.state_dict()["state"]))
    train(model, optimizer, 2, start=2)
    assert same(weights_of(model), weights_of(twin_model))
    assert same(tensors_in(optimizer.state_dict()["state"]), tensors_in(twin.state_dict()["state"]))


def test_the_model_that_a_gate_looks_at_is_not_the_gates_state():
    model = mlp()

    class Looking:
        def __init__(self) -> None:
            self.model, self.others = model, [torch.optim.SGD(model.parameters(), lr=0.1)]

        def __call__(self, inputs: GateInputs) -> Tensor:
            return uniform_gate(inputs)

    keys = {key for held in gems(model, gate=Looking()).state_dict()["state"].values() for key in held}
    assert not [key for key in keys if key.startswith("gate.")]


@pytest.mark.parametrize("other", [partial(cagrad, c=0.3), GradVac(generator=drawn())], ids=["none", "another"])
def test_another_surgery_is_said_or_refused(other):
    model = mlp()
    saved = gems(model, surgery=GradVac()).state_dict()
    optimizer = gems(model, surgery=other)
    if isinstance(other, GradVac):
        with pytest.raises(ValueError, match=r"surgery has the state \['surgery.targets'\] there and .*generator"):
            optimizer.load_state_dict(saved)
    else:
        with pytest.warns(UserWarning, match="surgery= here has none"):
            optimizer.load_state_dict(saved)


def test_a_gate_that_refuses_takes_the_surgery_back():
    class Stubborn(Averaging):
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            if state["nested"]["calls"] > 1:
                raise KeyError("not mine")
            super().load_state_dict(state)

    models = [mlp(), mlp()]
    first, second = (gems(model, surgery=GradVac(), gate=Stubborn()) for model in models)
    train(models[0], first, 3)
    train(models[1], second, 1)
    before = copy.deepcopy(second.state_dict()["state"])
    with pytest.raises(ValueError, match=r"state of gate does not fit.*not mine"):
        second.load_state_dict(first.state_dict())
    assert same(tensors_in(before), tensors_in(second.state_dict()["state"]))
    assert loss_of(models[1], 0, 0).isfinite()


@pytest.mark.parametrize("number", [1e30, -1e30])
def test_trained_gates_survive_any_finite_memory(device, number):
    model = mlp(device=device)
    optimizer = gems(model, gate="hypergradient")
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    for held in saved["state"].values():
        if "gate_memory" in held:
            held["gate_memory"] = torch.full_like(held["gate_memory"], number)
    optimizer.load_state_dict(saved)
    train(model, optimizer, 3, start=2)
    assert all(bool(value.isfinite().all()) for value in weights_of(model))


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.Adagrad])
def test_a_checkpoint_of_another_optimizer_is_refused_as_one(device, base):
    model = mlp((12, 16, 8), device=device)
    plain = base(model.parameters())
    model(torch.randn(4, 12, device=device)).square().mean().backward()
    plain.step()
    optimizer = gems(model, base=base(model.parameters()))
    with pytest.raises(ValueError, match="it is a checkpoint of another optimizer, whose state is"):
        optimizer.load_state_dict(plain.state_dict())
