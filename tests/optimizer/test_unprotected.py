"""What a null space does not hold is named with its share and the line that freezes it; then nothing is lost."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gradsub import GemsOptimizer, NullSpace, freeze_unprotected

from .toys import mlp, noise

VOCABULARY = 64
NEW = range(60, 64)


def llama(tie: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tie, **sizes, **heads))


def general_text(device: torch.device) -> Tensor:
    """Three sentences of eight old tokens: no layer has more than 24 different inputs."""
    return torch.randint(0, 60, (3, 8), generator=torch.Generator().manual_seed(1)).to(device)


def spanned(model: nn.Module, text: Tensor) -> NullSpace:
    """Protects all directions that the text uses; read eight times, so that there are tokens enough for them."""
    return NullSpace(energy=1.0).collect(model, [text] * 8)


def wrapped(model: nn.Module, null_space: NullSpace, /, **options: Any) -> tuple[GemsOptimizer, list[str]]:
    base = options.pop("base", None) or torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        options = {"tasks": ("a",), "rank": 4, "model": model, **options}
        optimizer = GemsOptimizer(base, null_space=null_space, **options)
    return optimizer, [str(warning.message) for warning in said]


def train(model: nn.Module, optimizer: GemsOptimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        ids = torch.randint(30, VOCABULARY, (4, 10), generator=generator).to(model.device)
        with optimizer.task("a"):
            model(input_ids=ids, labels=ids.flip(0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def answers(model: nn.Module, text: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=text).logits


# --- the property -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tie", "steps"), [(False, 100), (True, 30)], ids=["untied", "tied"])
def test_a_language_model_answers_as_before_once_all_else_is_frozen(device, tie, steps):
    """Trained on other sentences, of which the general ones notice nothing; without the call they do."""
    changes, losses = {}, {}
    for frozen in (True, False):
        model = llama(tie).to(device)
        text = general_text(device)
        null_space, before = spanned(model, text), answers(model, text)
        names = freeze_unprotected(model, null_space) if frozen else []
        optimizer, said = wrapped(model, null_space)
        assert len(said) == (not frozen), said
        assert frozen or "null_space has nothing for model.embed_tokens.weight, " in said[0]
        assert not frozen or {"model.embed_tokens.weight", "model.norm.weight"} <= set(names)
        train(model, optimizer, steps)
        changes[frozen] = float((answers(model, text) - before).norm() / before.norm())
        with torch.no_grad():
            losses[frozen] = float(model(input_ids=text, labels=text).loss) - float(
                nn.functional.cross_entropy(before[:, :-1].flatten(0, 1), text[:, 1:].flatten())
            )
    assert changes[True] < 1e-3
    assert changes[False] > 0.3
    assert abs(losses[True]) < 1e-3
    assert losses[False] > 0.2


BASES = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.5),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
}


@pytest.mark.parametrize("base", BASES)
def test_rows_of_old_tokens_rest_bit_for_bit_while_new_ones_train(device, base):
    model, text = llama().to(device), general_text(device)
    null_space, before = spanned(model, text), answers(model, text)
    names = freeze_unprotected(model, null_space, new_tokens=NEW)
    assert "model.embed_tokens.weight" not in names
    embedding = model.model.embed_tokens.weight
    start = embedding.detach().clone()
    optimizer, said = wrapped(model, null_space, base=BASES[base](model.parameters()))
    assert said == []
    train(model, optimizer, 3)
    model, optimizer = copy.deepcopy((model, optimizer))  # copies hold them as well
    train(model, optimizer, 3)
    moved = (model.model.embed_tokens.weight.detach() != start).any(1).nonzero().flatten().tolist()
    assert moved == list(NEW)
    assert float((answers(model, text) - before).norm() / before.norm()) < 1e-3


def test_rows_that_are_named_after_the_optimizer_was_built_rest_as_well(device):
    model, text = llama().to(device), general_text(device)
    null_space = spanned(model, text)
    optimizer, said = wrapped(model, null_space)
    assert any("freeze_unprotected" in message for message in said)
    embedding = model.model.embed_tokens.weight
    for new in (NEW, range(62, 64)):  # the last word counts
        freeze_unprotected(model, null_space, new_tokens=new)
        start = embedding.detach().clone()
        train(model, optimizer, 1)
        assert (embedding.detach() != start).any(1).nonzero().flatten().tolist() == list(new)


def test_rows_train_that_are_named_after_the_embedding_was_frozen(device):
    model, text = llama().to(device), general_text(device)
    null_space = spanned(model, text)
    assert "model.embed_tokens.weight" in freeze_unprotected(model, null_space)
    assert freeze_unprotected(model, null_space, new_tokens=NEW) == []
    start = model.model.embed_tokens.weight.detach().clone()
    optimizer, said = wrapped(model, null_space)
    assert said == []
    train(model, optimizer, 1)
    assert (model.model.embed_tokens.weight.detach() != start).any(1).nonzero().flatten().tolist() == list(NEW)


def test_what_a_null_space_is_merged_into_remembers_the_rows_as_well(device):
    model, text = llama().to(device), general_text(device)
    null_space = spanned(model, text)
    freeze_unprotected(model, null_space, new_tokens=NEW)
    start = model.model.embed_tokens.weight.detach().clone()
    optimizer, _ = wrapped(model, NullSpace(energy=1.0).merge(null_space))
    train(model, optimizer, 1)
    assert (model.model.embed_tokens.weight.detach() != start).any(1).nonzero().flatten().tolist() == list(NEW)


def test_rows_rest_without_a_model_too(device):
    model, text = llama().to(device), general_text(device)
    null_space = spanned(model, text)
    freeze_unprotected(model, null_space, new_tokens=NEW)
    start = model.model.embed_tokens.weight.detach().clone()
    base = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    optimizer, said = wrapped(model, null_space, base=base, model=None)
    assert said == []
    train(model, optimizer, 3)
    assert (model.model.embed_tokens.weight.detach() != start).any(1).nonzero().flatten().tolist() == list(NEW)


# --- what is frozen ---------------------------------------------------------------------------------------------------


def trains(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_the_null_space_holds_stays_trainable(device):
    """Weights that it knows and vectors whose gradients it knows; what is frozen already is not named again."""
    model = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 5)).to(device)
    general = noise(40, 12, like=model[0].weight)
    null_space = NullSpace(energy=0.5).collect(model, [general], ["0", "2"])
    null_space.collect_gradients(model[:3], [general], lambda model, x: model(x).square().sum())
    model[3].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    assert freeze_unprotected(model, null_space) == ["3.weight"]
    assert trains(model) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}
    assert model[3].weight.grad is None
    assert wrapped(model, null_space)[1] == []


def test_layers_that_are_captured_and_not_targeted_are_frozen(device):
    model = mlp((12, 16, 8), device=device)
    null_space = NullSpace(max_rank=3).collect(model, [noise(40, 12, like=model[0].weight)])
    assert freeze_unprotected(copy.deepcopy(model), null_space) == ["0.bias", "2.bias"]
    assert freeze_unprotected(model, null_space, ["0"]) == ["0.bias", "2.weight", "2.bias"]
    optimizer, said = wrapped(model, null_space, target_modules=["0"])
    assert said == []
    model[2].weight.requires_grad_(True)
    model(noise(5, 12, like=model[0].weight)).sum().backward()
    with pytest.warns(UserWarning, match=r"2\.weight is protected by null_space but takes the plain inner step"):
        optimizer.step()


def test_decomposed_layers_that_it_does_not_know_are_frozen(device):
    model = mlp((12, 16, 8), bias=False, device=device)
    null_space = NullSpace(max_rank=3).collect(model, [noise(40, 12, like=model[0].weight)], ["0"])
    _, said = wrapped(model, null_space)
    assert len(said) == 1
    assert said[0].startswith("null_space has nothing for 2.weight, 40.0% of the trained weights")
    assert freeze_unprotected(model, null_space) == ["2.weight"]
    assert wrapped(model, null_space)[1] == []


def test_a_head_that_lends_its_weight_to_the_embedding_is_frozen_even_if_it_is_known(device):
    model, text = llama(tie=True).to(device), general_text(device)
    targets = ".*(proj|lm_head)"
    null_space = NullSpace(energy=0.5).collect(model, [text] * 8, targets)
    _, said = wrapped(model, null_space, target_modules=targets)
    assert any("null_space has nothing for model.embed_tokens.weight" in message for message in said)
    assert "model.embed_tokens.weight" in freeze_unprotected(model, null_space, targets)
    assert wrapped(model, null_space, target_modules=targets)[1] == []
    with pytest.raises(ValueError, match=r"the weight of 'model\.embed_tokens' is also that of lm_head"):
        freeze_unprotected(model, null_space, targets, new_tokens=NEW)


def test_parametrized_layers_are_frozen(device):
    model = mlp((12, 16, 8), bias=False, device=device)
    null_space = NullSpace(max_rank=3).collect(model, [noise(40, 12, like=model[0].weight)])
    parametrizations.weight_norm(model[2])
    names = [f"2.parametrizations.weight.original{n}" for n in (0, 1)]
    assert freeze_unprotected(model, null_space) == names
    assert wrapped(model, null_space)[1] == []


class Ternary(nn.Linear):
    """Its weight trains, and its forward pass computes with another one."""

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.linear(features, self.weight + (self.weight.sign() - self.weight).detach())


def test_layers_that_compute_with_something_else_than_their_weight_are_frozen(device):
    model = mlp((12, 16, 8), bias=False, device=device)
    null_space = NullSpace(max_rank=3).collect(model, [noise(40, 12, like=model[0].weight)])
    ternary = Ternary(16, 8, bias=False, device=device)
    ternary.weight = model[2].weight
    model[2] = ternary
    assert freeze_unprotected(model, null_space) == ["2.weight"]
    assert wrapped(model, null_space)[1] == []


def test_without_a_null_space_it_says_how_to_get_one():
    model = mlp()
    with pytest.raises(TypeError, match=r"found NoneType: collect one with NullSpace\(\.\.\.\)\.collect"):
        freeze_unprotected(model, None)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_checkpoint_in_which_more_was_frozen_says_what_to_freeze():
    saved, model = (nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8)) for _ in range(2))
    saved[0].requires_grad_(False)
    there, here = (GemsOptimizer(torch.optim.AdamW(m.parameters()), rank=2, model=m) for m in (saved, model))
    with there.task("search"):
        saved(torch.arange(9)).square().mean().backward()
    there.step()
    with pytest.raises(ValueError, match=r"of 0\.weight lacks .* and was frozen there .*freeze_unprotected"):
        here.load_state_dict(there.state_dict())


def test_nothing_is_frozen_if_nothing_is_held(device):
    model = mlp(device=device)
    other = NullSpace(max_rank=2)
    other.update("elsewhere", torch.eye(4))
    with pytest.raises(ValueError, match=r"null_space knows elsewhere, but none of the layers .* \(0, 2\)"):
        freeze_unprotected(model, other)
    null_space = NullSpace(max_rank=3).collect(model, [noise(40, 12, like=model[0].weight)])
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_(False)
    before = trains(model)
    with pytest.raises(ValueError, match="null_space holds no weight of the model that trains"):
        freeze_unprotected(model, null_space)
    assert trains(model) == before


@pytest.mark.parametrize(
    ("new_tokens", "message"),
    [
        ([7], r"ids from 0 to 6 of 'tokens', found 7"),
        ([], "found : resize"),
        ({"layer": [1]}, "'layer', which is no embedding"),
        ([1], r"does not say which of its embeddings \(tokens, places\)"),
    ],
)
def test_new_tokens_that_cannot_be(new_tokens, message):
    model = nn.ModuleDict({"tokens": nn.Embedding(7, 4), "layer": nn.Linear(4, 4)})
    if "places" in message:
        model["places"] = nn.Embedding(3, 4)
    null_space = NullSpace()
    null_space.update("layer", torch.eye(4)[:1])
    with pytest.raises(ValueError, match=message):
        freeze_unprotected(model, null_space, new_tokens=new_tokens)
    assert trains(model) == {name for name, _ in model.named_parameters()}
    if "places" in message:
        assert "places.weight" in freeze_unprotected(model, null_space, new_tokens={"tokens": new_tokens})


def test_an_embedding_that_was_resized_since_is_refused(device):
    model = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 12)).to(device)
    null_space = NullSpace(max_rank=2).collect(model, [torch.arange(8, device=device)])
    freeze_unprotected(model, null_space, new_tokens=[8])
    model[0] = nn.Embedding(10, 12).to(device)
    with pytest.raises(ValueError, match=r"new_tokens of 9 rows for 0\.weight, which has 10"):
        wrapped(model, null_space)


# --- when it is said --------------------------------------------------------------------------------------------------


def test_what_is_meant_and_what_is_frozen_is_not_named_and_unfreezing_is(device):
    model = mlp((12, 16, 8), device=device)
    null_space = NullSpace(max_rank=3).collect(model, [noise(40, 12, like=model[0].weight)])
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    meant = torch.optim.SGD([{"params": weights}, {"params": biases, "subspace": False}], lr=0.1)
    assert wrapped(model, null_space, base=meant)[1] == []
    for bias in biases:
        bias.requires_grad_(False)
    optimizer, said = wrapped(model, null_space)
    assert said == []
    model[2].bias.requires_grad_(True)

    def step() -> None:
        with optimizer.task("a"):
            model(noise(5, 12, like=weights[0])).square().mean().backward()
        optimizer.step()

    with pytest.warns(UserWarning, match=r"null_space has nothing for 2\.bias, 2\.4% of the trained") as caught:
        step()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    step()  # once is enough


def test_a_group_that_is_added_is_looked_at(device):
    model = mlp((12, 16, 8), bias=False, device=device)
    null_space = NullSpace(max_rank=3).collect(model, [noise(40, 12, like=model[0].weight)])
    optimizer, said = wrapped(model, null_space)
    assert said == []
    with pytest.warns(UserWarning, match=r"null_space has nothing for param_groups\[1\]\[0\], ") as caught:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(5, device=device))]})
    assert len(caught) == 1


def test_the_line_that_freezes_can_be_pasted(device):
    model = mlp((12, 16, 8), device=device)
    null_space = NullSpace(max_rank=3).collect(model, [noise(40, 12, like=model[0].weight)], ["0"])
    _, said = wrapped(model, null_space, target_modules=["0"])
    (line,) = [line.strip() for line in said[0].splitlines() if "freeze_unprotected" in line]
    import gradsub

    exec(line, {"gradsub": gradsub, "model": model, "null_space": null_space})
    assert trains(model) == {"0.weight"}
    assert wrapped(model, null_space, target_modules=["0"])[1] == []
