"""Arguments of another kind than the documented one are refused at once and by their names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradsub import GemsOptimizer, NullSpace, freeze_unprotected

X = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))


def layer() -> nn.Linear:
    return nn.Linear(8, 6)


def null_space() -> NullSpace:
    return NullSpace(energy=0.5).collect(nn.Sequential(layer()), [X])


def optimizer() -> GemsOptimizer:
    model = layer()
    return GemsOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), tasks=("a",), rank=2, model=model, capture="fused"
    )


def in_task(**given):
    with optimizer().task("a", **given):
        pass


def in_mixed(task_ids=("a",), **given):
    with optimizer().mixed(task_ids, **given):
        pass


def test_what_has_places_can_be_run_through():
    """As a data set of torch's can, which is no iterable by its class."""
    places = torch.utils.data.Subset([X, X, X], [0, 1])
    assert NullSpace().collect(layer(), places).tokens("") == 18


CALLS = {
    "NullSpace energy": lambda wrong: NullSpace(energy=wrong),
    "NullSpace threshold": lambda wrong: NullSpace(threshold=wrong),
    "NullSpace max_rank": lambda wrong: NullSpace(max_rank=wrong),
    "collect model": lambda wrong: NullSpace().collect(wrong, [X]),
    "collect batches": lambda wrong: NullSpace().collect(layer(), wrong),
    "collect normalize": lambda wrong: NullSpace().collect(layer(), [X], normalize=wrong),
    "collect target_modules": lambda wrong: NullSpace().collect(layer(), [X], target_modules=wrong),
    "collect layers_at_once": lambda wrong: NullSpace().collect(layer(), [X], layers_at_once=wrong),
    "collect_gradients model": lambda wrong: null_space().collect_gradients(wrong, [X]),
    "collect_gradients batches": lambda wrong: null_space().collect_gradients(layer(), wrong),
    "collect_gradients loss": lambda wrong: null_space().collect_gradients(layer(), [X], wrong),
    "update name": lambda wrong: NullSpace().update(wrong, X),
    "update features": lambda wrong: NullSpace().update("0", wrong),
    "merge other": lambda wrong: null_space().merge(wrong),
    "residual_energy held_out": lambda wrong: null_space().residual_energy(wrong),
    "freeze_unprotected model": lambda wrong: freeze_unprotected(wrong, null_space()),
    "freeze_unprotected null_space": lambda wrong: freeze_unprotected(layer(), wrong),
    "task samples": lambda wrong: in_task(samples=wrong),
    "task loss": lambda wrong: in_task(loss=wrong),
    "mixed task_ids": lambda wrong: in_mixed(wrong),
    "mixed other_rows": lambda wrong: in_mixed(other_rows=wrong),
    "backward losses": lambda wrong: optimizer().backward(wrong),
    "clip_grad_norm_ max_norm": lambda wrong: optimizer().clip_grad_norm_(wrong),
    "unscale_ scale": lambda wrong: optimizer().unscale_(wrong),
}


@pytest.mark.parametrize("wrong", [object(), -1, "text"], ids=["object", "number", "text"])
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_such_thing_is_refused_by_its_name(call, wrong):
    if call == "update name" and isinstance(wrong, str):
        pytest.skip("a name")
    with pytest.raises((TypeError, ValueError), match=rf"\b{call.split()[1]}\b"):
        CALLS[call](wrong)
