"""Adapters of peft under a null space: they keep the answers to protected inputs, or it is refused or said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsub import GemsOptimizer, NullSpace, freeze_unprotected


def adapted(device: torch.device, rank: int, **options: Any) -> tuple[Any, NullSpace, Tensor]:
    """A model of which layer 0 has an adapter, a null space of inputs that span four directions, and these."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Tanh(), nn.Linear(20, 8, bias=False)).to(device)
    x = (torch.randn(64, 4) @ torch.randn(4, 20)).to(device)
    side = options.pop("side", "input")
    peft_model = get_peft_model(model, LoraConfig(target_modules=["0"], r=rank, **options)).to(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*original_module saw no features")  # peft's copy of a module to save
        return peft_model, NullSpace(side=side, max_rank=4).collect(peft_model, [x]), x


def wrapped(model: nn.Module, null_space: NullSpace) -> tuple[GemsOptimizer, list[str]]:
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = GemsOptimizer(
            base, tasks=("a",), rank=2, model=model, null_space=null_space, side=null_space.side, capture="generic"
        )
    return optimizer, [str(warning.message) for warning in said if "rank=" not in str(warning.message)]


def moved(model: Any, optimizer: GemsOptimizer, x: Tensor, side: str = "input") -> tuple[float, float]:
    """By how much layer 0 answers the general inputs, and others, otherwise after training."""
    layer = model.base_model.model[0]
    other = torch.randn(64, 20, device=x.device)
    with torch.no_grad():
        before = [layer(x), layer(other)]
    for _ in range(10):
        with optimizer.task("a"):
            model(torch.randn(32, 20, device=x.device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        first, second = ((layer(y) - old).norm() / old.norm() for y, old in zip((x, other), before, strict=True))
    return float(first), float(second)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["2"]}], ids=["lora", "dora", "saved"])
def test_adapters_whose_rank_general_text_uses_up_are_refused(device, options):
    """B may move along no A x, so the update of the layer would be exactly zero."""
    model, null_space, _ = adapted(device, 4, **options)
    weights = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"all directions of .*\.lora_B\.default, so the adapters of .*0 would never"):
        wrapped(model, null_space)
    assert all(map(torch.equal, weights, model.parameters()))


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["2"]}], ids=["lora", "saved"])
@pytest.mark.parametrize("trained_before", [False, True])
def test_adapters_with_room_learn_and_keep_the_answers(device, options, trained_before):
    model, null_space, x = adapted(device, 9, **options)
    if trained_before:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        null_space = NullSpace(max_rank=4).collect(model, [x], ".*(lora_.*default|base_layer|to_save.default|2)")
    optimizer, said = wrapped(model, null_space)
    assert said == []
    general, other = moved(model, optimizer, x)
    assert general < 1e-5
    assert other > 1e-2


def test_dora_divides_by_a_norm_that_moves_and_is_named(device):
    """Its magnitudes move freely; and with them frozen, so does the norm of the sum, which scales every answer."""
    model, null_space, x = adapted(device, 9, use_dora=True)
    _, said = wrapped(model, null_space)
    assert any("base_layer: the module around it answers for it, with lora_magnitude" in message for message in said)
    assert any("null_space has nothing for" in message and "magnitude" in message for message in said)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.requires_grad_(False)
    weights = [parameter.clone() for parameter in model.parameters()]
    optimizer, said = wrapped(model, null_space)
    assert len(said) == 1
    assert "answers with more than what is held in it" in said[0]
    assert all(map(torch.equal, weights, model.parameters()))  # it was tried out
    assert moved(model, optimizer, x)[0] > 1e-4


def test_dora_is_frozen_as_a_whole(device):
    model, null_space, x = adapted(device, 9, use_dora=True)
    model.base_model.model[2].weight.requires_grad_(True)  # so that something is left to train
    names = freeze_unprotected(model, null_space)
    assert {name.rpartition(".0.")[2].partition(".")[0] for name in names} == {
        "lora_A",
        "lora_B",
        "lora_magnitude_vector",
    }
    optimizer, said = wrapped(model, null_space)
    assert said == []
    assert moved(model, optimizer, x)[0] == 0


def test_a_null_space_of_before_the_adapters_is_refused(device):
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Tanh(), nn.Linear(20, 8, bias=False)).to(device)
    null_space = NullSpace(energy=0.5).collect(model, [torch.randn(64, 20, device=device)])
    peft_model = get_peft_model(model, LoraConfig(target_modules=["0"], r=4)).to(device)
    with pytest.raises(ValueError, match=r"null_space knows the layers \['0', '2'\] \.\.\. but none"):
        wrapped(peft_model, null_space)


@pytest.mark.parametrize("trained_before", [False, True])
def test_adapters_on_the_side_of_outputs_are_named_where_a_moves_protected_outputs(device, trained_before):
    """K^T B A x moves with A unless K^T B is zero, as it is before the first step."""
    model, _, x = adapted(device, 9)
    if trained_before:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data += torch.randn_like(parameter)
    null_space = NullSpace(side="output", max_rank=2).collect(model, [x])
    _, said = wrapped(model, null_space)
    assert any("answers with more than what is held in it" in message for message in said) == trained_before


@pytest.mark.parametrize("refresh", ["svd", "sketch"])
def test_dora_in_a_mixed_batch_equals_a_pass_a_task(device, refresh):
    """It runs its adapter on an identity matrix as well, for a norm that it detaches: those are rows of nobody."""
    from peft import LoraConfig, get_peft_model

    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 12)).to(device, torch.float64)
        models.append(get_peft_model(model, LoraConfig(target_modules=["0", "2"], r=8, use_dora=True)).double())
        base = torch.optim.SGD(models[-1].parameters(), lr=0.1)
        options = {"tasks": ("a", "b"), "rank": 4, "update_proj_gap": 2, "refresh": refresh, "capture": "fused"}
        optimizers.append(GemsOptimizer(base, model=models[-1], **options))
    before = [parameter.detach().clone() for parameter in models[0].parameters()]
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(2, 3, 24, generator=generator, dtype=torch.float64).to(device)
        with optimizers[0].mixed(["a"] * 3 + ["b"] * 3) as rows:
            rows.loss(models[0](batch.flatten(0, 1)).square().mean(1)).backward()
        for task, x in zip("ab", batch, strict=True):
            with optimizers[1].task(task, samples=3):
                models[1](x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pairs = list(zip(models[0].parameters(), models[1].parameters(), strict=True))
    for mine, wanted in pairs:
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-9)
    moved = [not torch.equal(old, new) for old, new in zip(before, models[0].parameters(), strict=True)]
    assert any(moved)
