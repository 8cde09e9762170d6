"""One pass over general-domain batches, for all layers at once, that leaves the model as it was."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import Tensor, nn

from gradsub import NullSpace

TOKENS, WIDTH = 6, 8


class Model(nn.Module):
    """Takes tokens' features, with an optional second argument and a mask, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.up = nn.Linear(WIDTH, 10)
        self.head = nn.Linear(10, 3)
        self.calls = 0

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor, shift: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        x = x if shift is None else x + shift
        return self.head(torch.tanh(self.up(self.dropout(self.query(x) + self.value(x)))))


def inputs_of(model: Model, x: Tensor) -> dict[str, Tensor]:
    """What arrives at each layer, written out."""
    hidden = model.query(x) + model.value(x)
    return {"query": x, "value": x, "up": hidden}


def outputs_of(model: Model, x: Tensor) -> dict[str, Tensor]:
    hidden = model.query(x) + model.value(x)
    return {"query": model.query(x), "value": model.value(x), "up": model.up(hidden)}


def eigenvalues(features: Tensor) -> Tensor:
    """Of the covariance of the rows, each divided by its norm."""
    rows = features.detach().double().reshape(-1, features.shape[-1]).cpu()
    rows = rows / rows.norm(dim=1, keepdim=True)
    return torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)


def matches(null_space: NullSpace, expected: dict[str, Tensor]) -> None:
    assert set(null_space) == set(expected)
    for name, features in expected.items():
        found = null_space.eigenvalues(name).double().cpu()
        torch.testing.assert_close(found, eigenvalues(features), rtol=1e-6, atol=1e-6)


@pytest.fixture
def model(device: torch.device) -> Model:
    return Model().to(device)


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return torch.randn(5, TOKENS, WIDTH, device=device)


@pytest.mark.parametrize("side", ["input", "output"])
def test_all_layers_in_one_pass_in_evaluation_mode(model, x, side):
    null_space = NullSpace(side=side)
    assert null_space.collect(model, [x[:2], x[2:]]) is null_space
    assert model.calls == 2
    assert model.training  # though dropout was off
    matches(null_space, (inputs_of if side == "input" else outputs_of)(model, x))


def test_a_batch_is_a_tensor_a_tuple_or_a_mapping(model, x, device):
    shift = torch.ones(WIDTH, device=device)
    matches(NullSpace().collect(model, [(x, shift)]), inputs_of(model, x + shift))
    matches(NullSpace().collect(model, [[x, shift]]), inputs_of(model, x + shift))
    matches(NullSpace().collect(model, [{"shift": shift, "x": x}]), inputs_of(model, x + shift))
    matches(NullSpace().collect(model, [collections.UserDict(x=x, shift=shift)]), inputs_of(model, x + shift))
    matches(NullSpace().collect(model, (batch for batch in [x, (x,)])), inputs_of(model, x))
    with pytest.raises(ValueError, match="a batch is a tensor, a tuple or a mapping, found int"):
        NullSpace().collect(model, [3])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_padding_is_excluded(model, x, device, dtype):
    mask = torch.ones(5, TOKENS, device=device, dtype=dtype)
    mask[0, 2:] = 0
    mask[3, :4] = 0
    spoiled = torch.where(mask.bool()[..., None], x, 1e4)
    found = NullSpace().collect(model, [{"x": spoiled, "attention_mask": mask}])
    matches(found, {name: value[mask.bool()] for name, value in inputs_of(model, x).items()})


def test_layers_are_chosen_by_name(model, x):
    assert set(NullSpace().collect(model, [x])) == {"query", "value", "up"}  # not the output head
    assert set(NullSpace().collect(model, [x], target_modules=["up", "head"])) == {"up", "head"}
    assert set(NullSpace().collect(model, [x], target_modules="(query|head)")) == {"query", "head"}
    with pytest.raises(ValueError, match=r"target_modules=\['key'\] matches no linear layer"):
        NullSpace().collect(model, [x], target_modules=["key"])
    with pytest.raises(ValueError, match=r"target_modules='\(' is no regular expression"):
        NullSpace().collect(model, [x], target_modules="(")


def test_collecting_again_adds(model, x):
    twice = NullSpace().collect(model, [x[:2]]).collect(model, [x[2:]])
    matches(twice, inputs_of(model, x))


@pytest.mark.parametrize("fails", [False, True])
def test_modes_hooks_and_gradients_are_as_before(model, x, fails):
    model.dropout.eval()
    model.value.requires_grad_(False)
    modes = [module.training for module in model.modules()]

    def batches():
        yield x
        if fails:
            raise RuntimeError("the loader broke")

    if fails:
        with pytest.raises(RuntimeError, match="the loader broke"):
            NullSpace().collect(model, batches())
    else:
        NullSpace().collect(model, batches())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    assert [p.requires_grad for p in model.value.parameters()] == [False, False]


def test_nothing_to_collect_from_is_an_error(model):
    with pytest.raises(ValueError, match="batches is empty"):
        NullSpace().collect(model, [])


def test_features_that_are_not_finite_name_their_layer(model, x):
    x[1, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="features of 'query' hold NaN or Inf"):
        NullSpace().collect(model, [x])


def test_a_tensor_that_changes_between_two_layers_is_not_taken_for_the_same(device):
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.second = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            self.first(x)
            return self.second(x.mul_(3.0))

    x = torch.randn(20, WIDTH, device=device)
    found = NullSpace().collect(InPlace().to(device), [x.clone()])
    matches(found, {"first": x, "second": x * 3})


@pytest.mark.parametrize("wrap", ["compile", "autocast", "inference mode", "no grad"])
def test_however_the_model_is_run(model, x, device, wrap):
    if wrap == "compile":
        torch._dynamo.reset()
        found = NullSpace().collect(torch.compile(model, backend="eager"), [x])
    elif wrap == "autocast":
        with torch.autocast(device.type, torch.bfloat16):
            found = NullSpace().collect(model, [x])
        assert float((found.eigenvalues("up") - eigenvalues(inputs_of(model, x)["up"]).to(device)).norm()) < 0.1
        return
    else:
        with torch.inference_mode(wrap == "inference mode"), torch.no_grad():
            found = NullSpace().collect(model, [x])
    matches(found, inputs_of(model, x))


def test_layers_of_torchs_own_transformer_are_seen(device):
    """Its fused inference path would go around the hooks."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True).to(device)
    with pytest.warns(UserWarning, match="self_attn.out_proj saw no features"):  # its weight is used without it
        found = NullSpace().collect(layer, [torch.randn(3, TOKENS, WIDTH, device=device)])
    assert set(found) == {"linear1", "linear2"}


def test_low_precision_models_are_accumulated_in_full(device):
    model = nn.Sequential(nn.Linear(WIDTH, 3)).to(device, torch.bfloat16)
    batches = [torch.randn(50, WIDTH, device=device).bfloat16() for _ in range(40)]
    matches(NullSpace().collect(model, batches), {"0": torch.cat(batches)})


class Flattening(nn.Module):
    """Brings tokens into one long list before its layer, or calls the layer by keyword."""

    def __init__(self, keyword: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.keyword = keyword

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(input=x) if self.keyword else self.layer(x.flatten(0, 1))


def test_a_layer_called_by_keyword(x, device):
    mask = torch.ones(5, TOKENS, device=device)
    matches(NullSpace().collect(Flattening(True).to(device), [{"x": x, "attention_mask": mask}]), {"layer": x})


def test_padding_is_excluded_from_flattened_tokens(x, device):
    mask = torch.ones(5, TOKENS, device=device)
    mask[0, 2:] = 0
    found = NullSpace().collect(Flattening(False).to(device), [{"x": x, "attention_mask": mask}])
    matches(found, {"layer": x[mask.bool()]})


def test_normalized_features_count_every_token_alike(model, x, device):
    """A token a thousand times as large takes all of the energy, unless it is divided by its norm."""
    x = x.clone()
    x[0, 0] *= 1e4
    raw = NullSpace(energy=0.95).collect(model, [x], normalize=False)
    even = NullSpace(energy=0.95).collect(model, [x[:2], x[2:]])
    for name, features in inputs_of(model, x).items():
        unit = features / features.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(even.eigenvalues(name).double().cpu(), eigenvalues(unit), rtol=1e-5, atol=1e-6)
        assert raw.basis(name).shape[1] == 1
        K = even.basis(name).to(device)
        kept = (unit.detach() @ K).square().sum(-1).mean()
        assert float(kept) >= 0.95 - 1e-6


@pytest.mark.parametrize("size", [1e-38, 1e-25, 5.0, 1e30])
def test_normalizing_knows_any_size_and_leaves_a_token_of_zeros_alone(model, device, size):
    x = torch.zeros(2, TOKENS, WIDTH, device=device)
    x[0, 0, 3] = size
    null_space = NullSpace(energy=1.0).collect(model, [x], target_modules=["query"])
    assert null_space.basis("query").abs().argmax() == 3
    assert float(null_space.eigenvalues("query")[0]) == pytest.approx(1 / (2 * TOKENS))


@pytest.mark.parametrize("broken", ["a stream that ends", "NaN"])
def test_what_failed_half_way_can_be_collected_again(broken):
    model = Model()
    batches = [torch.randn(2, TOKENS, WIDTH) for _ in range(3)]
    before = NullSpace().collect(model, batches[:1], ["query"])

    def failing():
        yield batches[0]
        if broken == "NaN":
            yield batches[1] * torch.nan
        raise OSError("the stream ended")

    with pytest.raises((OSError, ValueError), match="ended" if broken != "NaN" else "NaN"):
        before.collect(model, failing())
    assert list(before) == ["query"]
    before.collect(model, batches, ["value", "up"])
    assert before.tokens("up") == sum(batch.shape[:-1].numel() for batch in batches)


def test_a_folder_is_no_file_to_write(tmp_path):
    model, ran = Model(), []
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        NullSpace().collect(model, (ran.append(1) or torch.randn(2, WIDTH) for _ in range(1)), out=tmp_path)
    assert not ran
