"""Whatever is changed in a checkpoint: it is refused and nothing at all has changed, or it makes no difference."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsub import GemsOptimizer
from gradsub.surgery import GradVac, pcgrad

from .toys import TASKS, gems, mlp, null_space_of, tensors_in, train, weights_of

Saved = dict[str, Any]
Change = Callable[[Saved], None]


@dataclass
class World:
    """A kind of run, and after how many steps it is saved."""

    base: Callable[[Any], torch.optim.Optimizer]
    after: int = 4
    protect: bool = False
    tasks: tuple[str, ...] = TASKS
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    surgery: Callable[[], Any] = lambda: "sum"

    def build(self, device: torch.device) -> tuple[nn.Module, GemsOptimizer]:
        model = mlp((9, 12, 8), dtype=self.dtype, device=device)
        if self.protect:
            self.options["null_space"] = null_space_of(mlp((9, 12, 8), device=device), rank=2)
        options = {"tasks": self.tasks, "surgery": self.surgery(), **self.options}
        return model, gems(model, base=self.base(model.named_parameters()), rank=3, **options)


WORLDS = {
    "everything": World(
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
        protect=True,
        options={"gate": "hypergradient"},
        surgery=lambda: GradVac(beta=0.3),
    ),
    "when all is due": World(lambda p: torch.optim.AdamW(p, lr=1e-2), after=3, protect=True),
    "sketched": World(lambda p: torch.optim.Adam(p, lr=1e-2), protect=True, options={"refresh": "sketch"}),
    "late state": World(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.1)),
    "factored": World(lambda p: torch.optim.Adafactor(p, lr=1e-2)),
    "scalars": World(lambda p: torch.optim.NAdam(p, lr=1e-2)),
    "masters": World(lambda p: torch.optim.AdamW(p, lr=1e-2), dtype=torch.bfloat16, options={"master_weights": True}),
    "generator": World(
        lambda p: torch.optim.SGD(p, lr=1e-2),
        tasks=("a", "b", "c"),
        surgery=lambda: partial(pcgrad, generator=torch.Generator().manual_seed(3)),
    ),
    "shared first": World(
        lambda p: torch.optim.RMSprop(p, lr=1e-2), options={"orthogonalize": "shared_first", "update_proj_gap": 5}
    ),
}


def put(saved: Saved, index: int, key: str, value: Any) -> None:
    saved["state"][index][key] = value


def drop(saved: Saved, index: int, key: str) -> None:
    del saved["state"][index][key]


def filled(number: float) -> Callable[[Tensor], Tensor]:
    return lambda value: value.clone().fill_(number)


def one_entry(number: float) -> Callable[[Tensor], Tensor]:
    def change(value: Tensor) -> Tensor:
        value = value.clone()
        value.view(-1)[-1] = number
        return value

    return change


# Of any tensor in the state. Zeros and other numbers of a moment's own kind are values like any other.
OF_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda value: None,
    "list": lambda value: value.tolist() if value.ndim else [value.item()],
    "str": lambda value: "x",
    "dict": lambda value: {},
    "bool": lambda value: True,
    "another axis": lambda value: value[None],
    "longer": lambda value: torch.cat([value, value]) if value.ndim else value.expand(2),
    "empty": lambda value: value.flatten()[:0],
    "flat": lambda value: value.flatten() if value.ndim != 1 else value[:, None],
    "complex": lambda value: value.to(torch.complex64),
    "booleans": lambda value: value.to(torch.bool),
    "float64": lambda value: value.double(),
    "meta": lambda value: value.to("meta"),
    "sparse": lambda value: value.to_sparse() if value.ndim else value[None].to_sparse(),
}
OF_FLOATS: dict[str, Callable[[Tensor], Any]] = {
    "a NaN": one_entry(math.nan),
    "an Inf": one_entry(math.inf),
    "a -Inf": one_entry(-math.inf),
    "NaN": filled(math.nan),
    "integers": lambda value: (value * 1000).long(),
}
OF_COUNTS: dict[str, Callable[[Tensor], Any]] = {
    "negative": filled(-1),
    "absurd": filled(2**40),
    "very absurd": filled(2**62),
    "a number": lambda value: float(value) if value.numel() == 1 else value.tolist(),
    "a half": lambda value: value.double() + 0.5,
}
OF_BASES: dict[str, Callable[[Tensor], Any]] = {
    "doubled": lambda value: 2 * value,
    "one column doubled": lambda value: torch.cat([2 * value[:, :1], value[:, 1:]], dim=1),
    "all alike": lambda value: value[:, :1].expand_as(value) + value.new_ones(()),
    "random": lambda value: torch.rand_like(value) + 0.5,
    "half precision": lambda value: (value + 1e-2).to(torch.bfloat16),
}


# What a valid checkpoint may lack: the state of a surgery (an older one, with a warning), and the state of a plain
# parameter whose optimizer has none before the first gradient.
WITHOUT = {"surgery.targets", "surgery.generator", "inner.momentum_buffer"}
POSITIVE = {"lr", "eps", "weight_decay", "rank", "task_rank", "update_proj_gap", "scale", "momentum", "alpha"}


def changes_of(saved: Saved) -> Iterator[tuple[str, Change]]:
    """Every single change that is tried, with a name."""
    for index, held in saved["state"].items():
        if "basis" in held or not WITHOUT & held.keys():
            yield f"state[{index}] gone", lambda s, i=index: s["state"].pop(i)
        yield f"state[{index}] None", lambda s, i=index: s["state"].update({i: None})
        yield f"state[{index}] a list", lambda s, i=index: s["state"].update({i: list(s["state"][i].values())})
        yield f"state[{index}] too much", partial(put, index=index, key="more", value=torch.ones(2))
        yield f"state[{index}] too much inner", partial(put, index=index, key="inner.more.x", value=torch.ones(2))
        yield f"state[{index}] number as key", lambda s, i=index: s["state"][i].update({5: torch.ones(2)})
        yield f"state[{index}] under its name", lambda s, i=index: s["state"].update({str(i): s["state"].pop(i)})
        for key, value in held.items():
            where = f"state[{index}][{key!r}]"
            if key not in WITHOUT:
                yield f"{where} gone", partial(drop, index=index, key=key)
            kinds = dict(OF_TENSORS)
            last = key.rsplit(".", 1)[-1]
            if value.is_floating_point():
                kinds |= OF_FLOATS
                if last == "mu_product":
                    del kinds["integers"]  # a product of another number of factors
            if last in ("step", "next_refresh", "sketches"):
                kinds |= OF_COUNTS
                kinds["integers"] = torch.Tensor.long
            if key in ("basis", "protected"):
                kinds |= OF_BASES
            if last in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "row_var", "singular_values", "targets"):
                kinds["negative"] = filled(-2.0)
            for kind, change in kinds.items():
                yield f"{where} {kind}", partial(put, index=index, key=key, value=change(value))
    for position, group in enumerate(saved["param_groups"]):
        for key, value in group.items():

            def option(s: Saved, new: Any, p: int = position, k: str = key) -> None:
                s["param_groups"][p][k] = new

            where = f"param_groups[{position}][{key!r}]"
            yield f"{where} gone", lambda s, p=position, k=key: s["param_groups"][p].pop(k)
            yield f"{where} a dict", partial(option, new={"x": 1})
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                for wrong in (math.nan, math.inf, -math.inf, "x", [1.0], None, *([-1.0] if key in POSITIVE else [])):
                    yield f"{where} {wrong!r}", partial(option, new=wrong)
            if isinstance(value, (list, tuple)):
                for wrong in ((), value[::-1], (*value, value[0]), None, 7, (math.nan,) * len(value), "x"):
                    # In another order, betas are other betas, as any number may be another one; names are but labels.
                    if wrong != value[::-1] or key in ("tasks", "params"):
                        yield f"{where} {wrong!r}", partial(option, new=wrong)
            if isinstance(value, str):
                for wrong in ("neither", None, 5):
                    yield f"{where} {wrong!r}", partial(option, new=wrong)
        yield "an unknown option", lambda s, p=position: s["param_groups"][p].update(unheard_of=3)
    yield "no state", lambda s: s.pop("state")
    yield "no groups", lambda s: s.pop("param_groups")
    yield "groups None", lambda s: s.update(param_groups=None)
    yield "state a list", lambda s: s.update(state=list(s["state"].values()))
    yield "an empty group more", lambda s: s["param_groups"].append({**s["param_groups"][0], "params": []})
    yield "a group fewer", lambda s: s["param_groups"].pop()
    yield "a parameter fewer", lambda s: s["param_groups"][0]["params"].pop()
    yield "a parameter more", lambda s: s["param_groups"][0]["params"].append(99)
    yield "a state more", lambda s: s["state"].update({99: {"step": torch.ones(())}})
    yield "something more", lambda s: s.update(more=1)


def everything_in(model: nn.Module, optimizer: GemsOptimizer) -> tuple[list[Tensor], list[Any]]:
    """All tensors of a run bit for bit, and what else there is."""
    saved = optimizer.state_dict()
    base = [dict(state) for state in optimizer._inner.base.state.values()]
    layers = list(optimizer._blocks.layers.values())
    protected = [layer.protected.directions for layer in layers if layer.protected]
    tensors = tensors_in([weights_of(model), saved["state"], base, protected])
    return tensors, [list(map(list, saved["state"].values())), copy.deepcopy(saved["param_groups"])]


def equal(first: tuple[list[Tensor], list[Any]], second: tuple[list[Tensor], list[Any]]) -> bool:
    return first[1] == second[1] and len(first[0]) == len(second[0]) and all(map(torch.equal, first[0], second[0]))


@pytest.mark.filterwarnings("ignore:the state_dict has no state of surgery")
@pytest.mark.filterwarnings("ignore:the state_dict has a state of surgery")
@pytest.mark.parametrize("name", WORLDS)
def test_a_single_change_is_refused_whole_or_makes_no_difference(device, name):
    world = WORLDS[name]
    model, optimizer = world.build(device)
    train(model, optimizer, world.after)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, 4, start=world.after)
    expected = weights_of(model)

    other, victim = world.build(device)
    train(other, victim, 2, start=50)
    before = everything_in(other, victim)
    wrong, refused, accepted = [], 0, 0
    changes = list(changes_of(saved))
    # All of them for the first world; of the others' alike, one in three.
    for what, change in changes[:: 1 if name == "everything" else 3]:
        groups = [{**group, "params": list(group["params"])} for group in saved["param_groups"]]
        tampered = {"state": {index: dict(held) for index, held in saved["state"].items()}, "param_groups": groups}
        change(tampered)
        try:
            victim.load_state_dict(tampered)
        except ValueError as error:
            refused += 1
            if not equal(before, everything_in(other, victim)):
                wrong.append(f"{what}: half loaded ({error})")
            if "state_dict" not in str(error):
                wrong.append(f"{what}: {error}")
            continue
        except Exception as error:
            wrong.append(f"{what}: {error!r}")
            continue
        accepted += 1
        other.load_state_dict(weights)
        try:
            train(other, victim, 4, start=world.after)
            torch.testing.assert_close(weights_of(other), expected, rtol=1e-6, atol=1e-6)
        except Exception as error:
            wrong.append(f"{what}: accepted, then {str(error)[:120]}")
        other, victim = world.build(device)
        train(other, victim, 2, start=50)
    assert not wrong, "\n".join([f"{len(wrong)} wrong, {refused} refused, {accepted} accepted", *wrong])
    assert refused > 80
    assert accepted > 5
