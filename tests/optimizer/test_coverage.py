"""Every layer that the null space knows keeps its answers, or is named with the reason why it may not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from gradsub import GemsOptimizer, NullSpace

RANK = 6  # protected directions


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


class Standardised(nn.Linear):
    """A parameter as its weight, but another matrix in its product."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)
        return nn.functional.linear(x, weight, self.bias)


class Adapted(nn.Linear):
    """Adapter weights of its own beside the weight, as loralib has them."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.down = nn.Parameter(torch.randn(3, self.in_features) / 4)
        self.up = nn.Parameter(torch.zeros(self.out_features, 3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.mT @ self.up.mT


class Casting(nn.Linear):
    """A forward pass of its own that is a linear layer's."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class Computed(nn.Linear):
    """The weight is a product of two others."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        del self.weight
        self.left = nn.Parameter(torch.randn(self.out_features, 5) / 2)
        self.right = nn.Parameter(torch.randn(5, self.in_features) / 2)

    @property
    def weight(self) -> Tensor:
        return self.left @ self.right


class Attribute(nn.Linear):
    """The weight comes from parameters that no module has."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        source = (self.weight.detach() / 2).requires_grad_()
        del self.weight
        self.source = [source]
        self.register_buffer("place", torch.zeros(1))

    @property
    def weight(self) -> Tensor:
        return self.source[0].to(self.place.device) * 2


class Beside(nn.Module):
    """A frozen layer and an adapter beside it, made by hand."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.inside = nn.ModuleList([layer.requires_grad_(False)])
        down, up = torch.randn(3, layer.in_features) / 4, torch.zeros(layer.out_features, 3)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside[0](x) + x @ self.down.mT @ self.up.mT


def of(kind: type[nn.Linear]) -> Callable[[nn.Linear], nn.Module]:
    return lambda layer: kind(layer.in_features, layer.out_features, bias=layer.bias is not None)


def old_style(name: str) -> Callable[[nn.Linear], nn.Module]:
    def wrap(layer: nn.Linear) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated
            return getattr(nn.utils, name)(layer)

    return wrap


def accelerated(layer: nn.Linear) -> nn.Module:
    from accelerate.hooks import ModelHook, add_hook_to_module

    return add_hook_to_module(layer, ModelHook())


def identical(layer: nn.Linear) -> nn.Module:
    return layer


PROTECTED = {"plain": identical, "casting": of(Casting), "accelerated": accelerated}
LOOSE = {
    "weight_norm": (parametrizations.weight_norm, "its weight is computed from parametrizations.weight.original0 and"),
    "spectral_norm": (parametrizations.spectral_norm, "its weight is computed from parametrizations.weight.original"),
    "orthogonal": (parametrizations.orthogonal, "its weight is computed from parametrizations.weight"),
    "parametrized": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()) and layer,
        "its weight is computed from parametrizations.weight.original",
    ),
    "old weight_norm": (old_style("weight_norm"), "its weight is computed from weight_g and weight_v"),
    "old spectral_norm": (old_style("spectral_norm"), "its weight is computed from weight_orig"),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "its weight is computed from weight_orig"),
    "masked": (lambda layer: prune.identity(layer, "weight"), "its weight is computed from weight_orig"),
    "computed": (of(Computed), "its weight is computed from left and right"),
    "attribute": (of(Attribute), "its weight is computed from parameters elsewhere"),
    "standardised": (of(Standardised), "the forward pass of Standardised computes with something else"),
    "adapted": (of(Adapted), "what it computes depends on down and up"),
    "beside": (Beside, "the module around it answers for it, with down and up"),
}


def model_of(wrap: Callable[[nn.Linear], nn.Module], device: torch.device, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    first = wrap(nn.Linear(16, 12, bias=bias))
    last = nn.Linear(12, 8)
    last.bias.requires_grad_(bias)  # nothing holds it
    return nn.Sequential(first, nn.Tanh(), last).to(device)


def general_inputs(device: torch.device) -> Tensor:
    return (torch.randn(64, 4) @ torch.randn(4, 16)).to(device)


def build(
    model: nn.Module, null_space: NullSpace | None, trained: Iterable[Any] | None = None, **options: Any
) -> tuple[GemsOptimizer, list[str]]:
    """The optimizer, and what was said while it was built."""
    base = torch.optim.AdamW(list(model.parameters() if trained is None else trained), lr=1e-2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        options = {"tasks": ("a",), "rank": 4, "model": model, "capture": "generic", **options}
        if not options.pop("named", True):
            del options["model"]
        optimizer = GemsOptimizer(base, null_space=null_space, **options)
    return optimizer, [str(warning.message) for warning in said]


def train(model: nn.Module, optimizer: GemsOptimizer, device: torch.device) -> None:
    for _ in range(8):
        with optimizer.task("a"):
            model(torch.randn(32, 16, device=device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def moved(model: nn.Module, layer: nn.Module, optimizer: GemsOptimizer, device: torch.device, x: Tensor) -> float:
    """By how much the layer's answers to ``x`` are others after training."""
    with torch.no_grad():
        before = layer.eval()(x)
    layer.train()
    train(model, optimizer, device)
    with torch.no_grad():
        return float((layer.eval()(x) - before).norm() / before.norm())


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("kind", PROTECTED)
def test_what_is_a_linear_layer_keeps_its_answers_without_a_word(device, kind, with_model):
    model, x = model_of(PROTECTED[kind], device), general_inputs(device)
    null_space = NullSpace(max_rank=RANK).collect(model, [x])
    optimizer, said = build(model, null_space, list(model.named_parameters()), named=with_model)
    assert said == []
    assert moved(model, model[0], optimizer, device, x) < 1e-5


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", LOOSE)
def test_a_layer_that_moves_by_anything_else_is_named(device, kind, side):
    wrap, reason = LOOSE[kind]
    model, x = model_of(wrap, device), general_inputs(device)
    null_space = NullSpace(max_rank=RANK, side=side).collect(model, [x])
    name = "0.inside.0" if kind == "beside" else "0"
    trained = [*model.parameters(), *getattr(model[0], "source", [])]
    optimizer, said = build(model, null_space, trained, side=side)
    told = [message for message in said if message.startswith("null_space knows layers that nothing holds in it")]
    assert len(told) == 1
    assert f"{name}: {reason}" in told[0]
    assert "2: " not in told[0]
    if side == "input":
        assert moved(model, model[0], optimizer, device, x) > 1e-3  # as said
    assert optimizer.state[model[2].weight]["step"] > 0 or side == "output"


@pytest.mark.parametrize("kind", [kind for kind in LOOSE if kind != "standardised"])
def test_names_alone_tell_it_too(device, kind):
    """Without a model, by the names of the base optimizer's parameters."""
    model, x = model_of(LOOSE[kind][0], device), general_inputs(device)
    null_space = NullSpace(max_rank=RANK).collect(model, [x])
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    _, said = build(model, null_space, trained, named=False)
    known = "0.inside.0" if kind == "beside" else "0"
    assert sum(f" {known}: " in message for message in said) == 1, said


@pytest.mark.parametrize("kind", LOOSE)
def test_what_is_frozen_does_not_move(device, kind):
    wrap, _ = LOOSE[kind]
    model, x = model_of(wrap, device), general_inputs(device)
    model[0].requires_grad_(False)
    for source in getattr(model[0], "source", []):
        source.requires_grad_(False)
    null_space = NullSpace(max_rank=RANK).collect(model, [x])
    optimizer, said = build(model, null_space, [p for p in model.parameters() if p.requires_grad])
    assert said == []
    assert moved(model, model[0], optimizer, device, x) < 1e-5 or kind.endswith("spectral_norm")


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, prune.identity], ids=["parametrized", "pruned"])
def test_what_a_bias_is_computed_from_is_no_weight(device, wrap):
    model, x = model_of(lambda layer: wrap(layer, "bias") and layer, device, bias=True), general_inputs(device)
    null_space = NullSpace(max_rank=RANK).collect(model, [x])
    _, said = build(model, null_space)
    assert len(said) == 1
    assert "weight" not in said[0].partition(", 2.bias, ")[0]
    assert said[0].startswith("null_space has nothing for 0.parametrizations.bias.original") or "0.bias_orig" in said[0]


def test_a_weight_that_is_computed_from_a_held_one_is_not_held(device):
    """Two layers share what is the weight of one, and the source of the other's."""
    model, x = model_of(identical, device), general_inputs(device)
    model[2] = parametrize.register_parametrization(nn.Linear(16, 12, bias=False), "weight", Scaled()).to(device)
    model[2].parametrizations.weight.original = model[0].weight
    null_space = NullSpace(max_rank=RANK)
    null_space.update("0", x)
    null_space.update("2", torch.randn(50, 16))
    _, said = build(model, null_space)
    assert sum("2: its weight is computed from parametrizations.weight.original" in message for message in said) == 1


def test_frozen_now_and_trained_later(device):
    """A group that is added later is looked at as well, and what was said is not said again."""
    model, x = model_of(parametrizations.weight_norm, device), general_inputs(device)
    model[0].requires_grad_(False)
    null_space = NullSpace(max_rank=RANK).collect(model, [x])
    optimizer, said = build(model, null_space, model[2].parameters())
    assert said == []
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"nothing holds in it. 0: its weight is computed from") as caught:
        optimizer.add_param_group({"params": list(model[0].parameters())})
    assert len(caught) == 1


def test_a_layer_that_the_base_optimizer_lacks_is_named(device):
    model, x = model_of(identical, device), general_inputs(device)
    null_space = NullSpace(max_rank=RANK).collect(model, [x])
    _, said = build(model, null_space, model[2].parameters())
    assert len(said) == 1
    assert "0: it is not among the base optimizer's parameters, but requires a gradient" in said[0]
    _, said = build(model, null_space, model[2].parameters(), target_modules=["2"])
    assert said == []  # not targeted, and nothing that moves it is here
    _, said = build(model, None, model[2].parameters())
    assert [message[:37] for message in said] == ["0 of target_modules require gradients"]


def test_names_that_the_model_does_not_have(device):
    model = model_of(identical, device)
    null_space = NullSpace(max_rank=RANK).collect(model, [general_inputs(device)])
    null_space.update("elsewhere", torch.randn(5, 4))
    _, said = build(model, null_space)
    assert len(said) == 1
    assert "elsewhere: the model has no layer and no vector of that name" in said[0]
    _, said = build(model, null_space, list(model.named_parameters()), named=False)
    assert len(said) == 1
    assert "elsewhere: none of the base optimizer's parameters goes by that name" in said[0]


def test_all_layers_in_the_plain_step_are_named(device):
    model, x = model_of(identical, device), general_inputs(device)
    null_space = NullSpace(max_rank=RANK).collect(model, [x])
    _, said = build(model, null_space, [{"params": list(model.parameters()), "subspace": False}])
    assert [message[:44] for message in said] == ["0.weight, 2.weight is protected by null_spac"]


@pytest.mark.parametrize("known", ["first", "second"])
@pytest.mark.parametrize("targets", ["all-linear", "first", "second"])
@pytest.mark.parametrize("share", ["module", "weight"])
def test_a_weight_is_protected_under_each_of_its_names(device, known, targets, share):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Linear(16, 16, bias=False)
            if share == "weight":
                self.second = nn.Linear(16, 16, bias=False)
                self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    model, x = Twice().to(device), general_inputs(device)
    null_space = NullSpace(max_rank=RANK)
    null_space.update(known, x)
    optimizer, said = build(model, null_space, target_modules=targets)
    elsewhere = [message for message in said if message.startswith("null_space has nothing for first.weight")]
    assert len(elsewhere) == (share == "weight")  # the other module's inputs are not known
    assert all("shares its weight" in message for message in said if message not in elsewhere)
    assert moved(model, model.first, optimizer, device, x) < 1e-5


# --- adapters of peft -------------------------------------------------------------------------------------------------


def adapted(device: torch.device, **options: Any) -> tuple[Any, NullSpace, Tensor]:
    """A model with adapters in layer 0, and a null space that was collected before."""
    from peft import LoraConfig, get_peft_model

    model, x = model_of(identical, device), general_inputs(device)
    null_space = NullSpace(max_rank=RANK).collect(model, [x])
    peft_model = get_peft_model(model, LoraConfig(target_modules=["0"], r=3, **options)).to(device)
    return peft_model, null_space, x


def test_a_null_space_of_before_the_adapters_knows_a_layer_that_now_moves(device):
    peft_model, null_space, _ = adapted(device)
    model = peft_model.base_model.model
    model[2].requires_grad_(True)
    _, said = build(model, null_space, [p for p in model.parameters() if p.requires_grad])
    told = [message for message in said if message.startswith("null_space knows layers that nothing holds")]
    assert len(told) == 1
    assert " 0: what it computes depends on lora_A.default.weight and lora_B.default.weight" in told[0]


@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_null_space_that_knows_the_base_layer_alone_names_it(device, dora, trained_before):
    peft_model, _, x = adapted(device, use_dora=dora)
    for parameter in peft_model.parameters():
        if parameter.requires_grad and trained_before:
            parameter.data += 0.3 * torch.rand_like(parameter)
    null_space = NullSpace(max_rank=RANK).collect(peft_model, [x], target_modules=["base_layer"])
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer, said = build(peft_model, null_space, trained, target_modules="all-linear")
    name = "base_model.model.0"
    assert any(
        f"{name}.base_layer: the module around it" in message and "lora_B.default" in message for message in said
    ), said
    assert moved(peft_model, peft_model.base_model.model[0], optimizer, device, x) > 1e-4


@pytest.mark.parametrize("trained_before", [False, True])
def test_adapters_that_scale_are_seen_too(device, trained_before):
    from peft import IA3Config, get_peft_model

    model, x = model_of(identical, device), general_inputs(device)
    peft_model = get_peft_model(model, IA3Config(target_modules=["0"], feedforward_modules=[])).to(device)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    for parameter in trained if trained_before else []:
        parameter.data += torch.rand_like(parameter)
    null_space = NullSpace(max_rank=RANK).collect(peft_model, [x])
    _, said = build(peft_model, null_space, trained)
    assert any("0.base_layer: the module around it answers for it, with ia3_l.default" in message for message in said)


@pytest.mark.parametrize("around", [nn.Tanh(), nn.LayerNorm(12), nn.GELU()], ids=str)
def test_a_block_of_the_model_stands_for_none_of_its_layers(device, around):
    block = nn.Sequential(nn.Linear(16, 12), around, nn.Linear(12, 12), nn.LayerNorm(12))
    model, x = nn.Sequential(block, nn.Linear(12, 8)).to(device), general_inputs(device)
    block[0].requires_grad_(False)
    null_space = NullSpace(max_rank=2).collect(model, [x], target_modules=["0.0"])
    _, said = build(model, null_space, [p for p in model.parameters() if p.requires_grad], target_modules=["0.0"])
    assert len(said) == 2  # nothing is decomposed, and the rest is not protected
    assert said[0].startswith("none of the layers that target_modules names")
    assert said[1].startswith("null_space has nothing for ")


def test_adapters_that_are_protected_keep_the_answers_without_a_word(device):
    peft_model, _, x = adapted(device)
    x = x[:1].expand(30, -1) + 0.0  # one direction, so that adapters of rank 3 have two left
    null_space = NullSpace(max_rank=1).collect(peft_model, [x], target_modules=".*(base_layer|lora_.*default)")
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer, said = build(peft_model, null_space, trained, rank=2, target_modules=".*(base_layer|lora_.*default)")
    assert said == []
    assert moved(peft_model, peft_model.base_model.model[0], optimizer, device, x) < 1e-5


# --- matrices that no linear layer has --------------------------------------------------------------------------------


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(vocab_size=60, num_attention_heads=2, num_key_value_heads=2, **sizes))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4, "head_dim": 8}
    return GptOssForCausalLM(GptOssConfig(vocab_size=60, num_attention_heads=2, num_key_value_heads=2, **sizes))


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_fused_experts_are_left_out_with_their_names_and_share(device, make):
    model = make().to(device)
    experts = [p for name, p in model.named_parameters() if p.ndim > 1 and ".mlp." in name]
    share = sum(p.numel() for p in experts) / sum(p.numel() for p in model.parameters())
    options = {"rank": 4, "target_modules": "all-linear"}
    _, said = build(model, None, **options)
    assert len(said) == 1
    assert f"({share:.0%} of the trained weights) are matrices outside of linear layers" in said[0]
    assert "mlp.experts.gate_up_proj" in said[0]
    _, said = build(model, None, **{**options, "target_modules": ["q_proj", "v_proj"]})
    assert said == []  # nobody asked for them
    _, said = build(model, None, **{**options, "target_modules": ".*(q_proj|experts)"})
    assert len(said) == 1
    assert "mlp.experts.gate_up_proj" in said[0]
    rest = [p for p in model.parameters() if all(p is not e for e in experts)]
    _, said = build(model, None, [{"params": rest}, {"params": experts, "subspace": False}], **options)
    assert said == []
    for expert in experts:
        expert.requires_grad_(False)
    _, said = build(model, None, **options)
    assert said == []


def test_experts_beside_a_null_space_are_unprotected(device):
    model = mixtral().to(device)
    null_space = NullSpace(energy=0.9).collect(model, [torch.randint(0, 60, (2, 9), device=device)])
    _, said = build(model, null_space)
    assert any(
        "mlp.experts.gate_up_proj" in message and "not protected by any null space" in message for message in said
    )


@pytest.mark.parametrize(
    "make", [lambda: nn.GRU(6, 6), lambda: nn.MultiheadAttention(8, 2), lambda: nn.Conv2d(3, 4, 3)]
)
def test_other_modules_with_matrices_are_named(make):
    model = nn.ModuleDict({"layer": nn.Linear(6, 6), "other": make()})
    _, said = build(model, None, rank=3)
    assert len(said) == 1
    assert "other." in said[0]


def test_a_parametrized_target_without_a_null_space_is_named(device):
    model = model_of(parametrizations.weight_norm, device)
    _, said = build(model, None)
    assert len(said) == 1
    assert said[0].startswith("the weights of 0 are computed from other parameters")


# --- the wrong model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_null_space", [True, False])
@pytest.mark.parametrize("how", ["built again", "copied", "built again and bigger"])
def test_another_copy_of_the_model_is_refused(device, how, with_null_space):
    model = model_of(identical, device)
    other = model_of(identical, device) if how.startswith("built") else copy.deepcopy(model)
    trained = list(model.parameters())
    if how == "built again and bigger":
        other.append(nn.Linear(8, 8).to(device))
    null_space = NullSpace(max_rank=RANK).collect(model, [general_inputs(device)]) if with_null_space else None
    base = torch.optim.AdamW(trained, lr=1e-2)
    with pytest.raises(ValueError, match=r"model= has 0 of the base optimizer's 3 .*another copy of the model"):
        GemsOptimizer(base, tasks=("a",), rank=4, model=other, null_space=null_space)
    assert not base.state  # not taken over


def test_a_copy_of_some_layers_is_said(device):
    model = model_of(identical, device)
    other = copy.deepcopy(model)
    other[2] = model[2]
    _, said = build(other, None, model.parameters())
    assert sorted(message[:40] for message in said) == [
        "0 of target_modules require gradients, b",
        "param_groups[0][0] (67% of the trained w",
    ]


def test_a_copy_that_shares_what_is_no_layer_is_refused(device):
    class Tied(nn.Module):
        def __init__(self, embedding: nn.Embedding) -> None:
            super().__init__()
            self.embedding, self.layer = embedding, nn.Linear(8, 8)

    embedding = nn.Embedding(20, 8)
    model, other = Tied(embedding), Tied(embedding)
    base = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="model= has 1 of the base optimizer's 3 parameters and no layer to decompose"):
        GemsOptimizer(base, tasks=("a",), rank=4, model=other)


def test_a_part_as_the_model_says_which_matrices_are_elsewhere(device):
    model = model_of(identical, device)
    with_head = [*model[0].parameters(), *model[2].parameters()]
    _, said = build(model[0], None, with_head)
    assert len(said) == 1
    assert said[0].startswith("param_groups[0][1] (33% of the trained weights) are matrices of the base optimizer")
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "subspace": False}]
    _, said = build(model[0], None, groups)
    assert said == []


@pytest.mark.parametrize("wrap", ["compiled", "part compiled", "checkpointed", "replicated"])
def test_wrappers_are_no_other_copy(device, wrap):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, x = model_of(identical, device), general_inputs(device)
    null_space = NullSpace(max_rank=RANK).collect(model, [x])
    outer: nn.Module = model
    if wrap == "compiled":
        outer = torch.compile(model, backend="eager")
    elif wrap == "replicated":
        outer = nn.DataParallel(model)
    else:
        model[0] = torch.compile(model[0], backend="eager") if wrap == "part compiled" else checkpoint_wrapper(model[0])
    optimizer, said = build(outer, null_space)
    assert said == []
    assert moved(outer, model[0], optimizer, device, x) < 1e-5


def test_looking_draws_no_random_numbers_and_leaves_modes_alone(device):
    model = nn.Sequential(Beside(nn.Linear(16, 16)), nn.Dropout(0.5), Standardised(16, 16)).to(device)
    model[1].eval()
    null_space = NullSpace(max_rank=RANK).collect(model, [general_inputs(device)])
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    _, said = build(model, null_space, [p for p in model.parameters() if p.requires_grad])
    assert any("answers for it, with down" in message for message in said)
    assert any("Standardised computes with something else" in message for message in said)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
