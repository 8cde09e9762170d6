"""Norm weights and biases: their gradients by position, in one pass, from a loss on general-domain data."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from gradsub import NullSpace

WIDTH = 6


class Scale(nn.Module):
    """Gemma's norm: the features are scaled by 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Block(nn.Module):
    """Norms of three kinds and two biases, after which nothing is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LayerNorm(WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.second = nn.RMSNorm(WIDTH)
        self.third = Scale()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.relu(self.middle(self.first(x)), inplace=True)
        return torch.tanh(self.third(x + self.second(x)))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def by_position(model: nn.Module, x: Tensor, name: str) -> Tensor:
    """The slow twin: no module of ``Block`` mixes positions, so each one's gradient is that of its loss alone."""
    parameter = model.get_parameter(name)
    rows = x.reshape(-1, WIDTH)
    return torch.stack([torch.autograd.grad(loss(model, row[None]), parameter)[0] for row in rows])


@pytest.fixture
def model(device: torch.device) -> Block:
    torch.manual_seed(0)
    return Block().to(device).double()


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return torch.randn(4, 5, WIDTH, device=device, dtype=torch.float64)


NAMES = {
    "first": "first.weight",
    "first.bias": "first.bias",
    "middle.bias": "middle.bias",
    "second": "second.weight",
    "third": "third.weight",
}


def test_features_are_the_gradients_of_each_position(model, x):
    null_space = NullSpace(energy=1.0)
    assert null_space.collect_gradients(model, [x[:1], x[1:]], loss) is null_space
    assert set(null_space) == set(NAMES)  # a matrix is no vector
    for name, parameter in NAMES.items():
        rows = by_position(model, x, parameter).cpu()
        expected = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)
        torch.testing.assert_close(null_space.eigenvalues(name).double().cpu(), expected, rtol=1e-8, atol=1e-10)


def test_the_model_is_left_as_it_was(model, x):
    model.train()
    model.first.weight.requires_grad_(False)  # is collected all the same
    null_space = NullSpace().collect_gradients(model, [x], loss)
    assert "first" in null_space
    assert model.training
    assert all(module.training for module in model.modules())
    assert not model.first.weight.requires_grad
    assert model.middle.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", list(NAMES))
def test_no_step_in_the_null_space_changes_the_loss_to_first_order(model, x, name):
    x = x[0, :2]  # fewer positions than a vector has entries: all of them can be protected
    null_space = NullSpace(energy=1.0).collect_gradients(model, [x], loss)
    weight = model.get_parameter(NAMES[name])
    gradient = torch.autograd.grad(loss(model, x), weight)[0]
    K = null_space.basis(name, torch.float64).to(x)
    assert 0 < K.shape[1] <= 2
    torch.testing.assert_close(K @ (K.mT @ gradient), gradient)
    with torch.no_grad():
        before = loss(model, x)
        step = torch.randn(WIDTH, dtype=torch.float64).to(x)
        changes = []
        for direction in (step - K @ (K.mT @ step), step):
            weight.add_(1e-6 * direction)
            changes.append(float(loss(model, x) - before) / 1e-6)
            weight.sub_(1e-6 * direction)
    assert abs(changes[0]) < 1e-4 < 1e-2 < abs(changes[1])


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
@pytest.mark.parametrize("rows", [3, 1000])
def test_bfloat16(device, autocast, rows):
    """Sums over positions are rounded there, by much more than rows; nothing is left out for that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).to(device)
    x = torch.randn(rows, 8, device=device)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return model(x).float().square().sum()

    exact = NullSpace().collect_gradients(model, [x], lambda model, x: model(x).square().sum())
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rounded = NullSpace().collect_gradients(model, [x], loss)
    assert set(rounded) == set(exact) == {"0.bias", "1", "1.bias", "2.bias"}
    for name in exact:
        torch.testing.assert_close(rounded.eigenvalues(name), exact.eigenvalues(name), rtol=0.1, atol=0.05 * rows)


def test_a_module_used_twice_has_the_rows_of_both_uses(device):
    torch.manual_seed(0)
    norm = nn.LayerNorm(WIDTH).to(device).double()
    model = nn.Sequential(norm, nn.Tanh(), norm)
    x = torch.randn(7, WIDTH, device=device, dtype=torch.float64)
    null_space = NullSpace(energy=1.0).collect_gradients(model, [x], lambda model, x: model(x)[:, 0].sum())
    tokens = {line.split()[0]: int(line.split()[-1]) for line in null_space.table().splitlines()[1:-1]}
    assert tokens == {"0": 14, "0.bias": 14}


def test_vectors_that_cannot_be_told_apart_by_position_are_left_out_and_named(x):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.mixing = Mixing()
            self.unused = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.mixing(self.norm(x)) + self.norm.bias

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.roll(1) * self.weight[0]

    model = Odd().to(x)
    null_space = NullSpace()
    said = r"mixing: its module mixes its entries; norm\.bias: it is used outside of its module\. .* freeze them"
    with pytest.warns(UserWarning, match=said) as seen:
        null_space.collect_gradients(model, [x], loss)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert set(null_space) == {"norm"}


class Channels(nn.Module):
    """Features on the second axis, before and after ones on the last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.convolution = nn.Conv1d(5, 3, 1)
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(self.norm(x))
        return self.attention(x, x, x)[0]


def test_features_elsewhere_than_on_the_last_axis_are_left_out(x):
    said = (
        r"attention\.in_proj_bias: its module returns no single tensor; attention\.out_proj\.bias: it is used outside"
        r".* convolution\.bias: its module's features are not on the last axis\."
    )
    null_space = NullSpace()
    with pytest.warns(UserWarning, match=said):
        null_space.collect_gradients(Channels().to(x), [x], loss)
    assert set(null_space) == {"norm", "norm.bias"}


def test_what_a_module_does_not_use_is_not_collected(x):
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))
            self.spare = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    assert set(NullSpace().collect_gradients(nn.Sequential(Spare()).to(x), [x], loss)) == {"0"}


def test_under_activation_checkpointing(model, x):
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)

    found = NullSpace().collect_gradients(Recomputed(), [x], loss)
    expected = NullSpace().collect_gradients(model, [x], loss)
    for name in NAMES:
        torch.testing.assert_close(found.eigenvalues(f"body.{name}"), expected.eigenvalues(name))


def test_nothing_is_taken_in_from_batches_that_fail_in_the_end(model, x):
    null_space = NullSpace().collect_gradients(model, [x], loss)
    before = null_space.table()
    with pytest.raises(ValueError, match="hold NaN or Inf"):
        null_space.collect_gradients(model, [x, x * float("nan")], loss)
    assert null_space.table() == before
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())

    class Sometimes(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (self.second.weight if len(x) == 1 else 0)

    fresh = NullSpace()
    with pytest.warns(UserWarning, match="second: it is used outside of its module"):
        fresh.collect_gradients(Sometimes().to(x), [x, x[:1]], loss)
    assert set(fresh) == set(NAMES) - {"second"}


def test_what_is_wrong_is_named(model, x):
    with pytest.raises(ValueError, match=r"loss=None takes the model's own output\.loss, but Block returned none"):
        NullSpace().collect_gradients(model, [x])
    with pytest.raises(ValueError, match=r"loss must return a scalar tensor, found \(4, 5, 6\)"):
        NullSpace().collect_gradients(model, [x], lambda model, x: model(x))
    with pytest.raises(ValueError, match=r"loss must return a scalar tensor, found float"):
        NullSpace().collect_gradients(model, [x], lambda model, x: 1.0)
    with pytest.raises(ValueError, match=r"without a graph: .* or was computed under no_grad, detached"):
        NullSpace().collect_gradients(model, [x], lambda model, x: loss(model, x).detach())
    with pytest.raises(ValueError, match="batches is empty"):
        NullSpace().collect_gradients(model, [], loss)
    with pytest.raises(ValueError, match="no norm weights and no biases"):
        NullSpace().collect_gradients(nn.Linear(WIDTH, 2, bias=False).to(x), [x], loss)
    with pytest.raises(ValueError, match="hold NaN or Inf"):
        NullSpace().collect_gradients(model, [x * float("nan")], loss)


def test_the_models_own_loss(tiny_llama):
    model, ids = tiny_llama
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = NullSpace().collect_gradients(model, [{"input_ids": ids, "labels": ids}])
    given = NullSpace().collect_gradients(
        model,
        [ids],
        lambda model, ids: nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
    )
    assert set(own) == {name.removesuffix(".weight") for name, p in model.named_parameters() if p.ndim == 1}
    for name in own:
        torch.testing.assert_close(own.eigenvalues(name), given.eigenvalues(name), rtol=1e-5, atol=1e-12)


@pytest.fixture
def tiny_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=30,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config), torch.randint(0, 30, (2, 9))
