"""Norm weights and biases that the null space knows: stepped by the base optimizer, and kept off what is protected."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn

from gradsub import GemsOptimizer, NullSpace

from .toys import gems, leak, noise, protected_inputs, same, tensors_in, train

WIDTHS = (12, 16, 8)
VECTORS = {"1": "1.weight", "1.bias": "1.bias", "2.bias": "2.bias"}


def model_of(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Sequential:
    """A network with biases and a norm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTHS[0], WIDTHS[1]), nn.LayerNorm(WIDTHS[1]), nn.Linear(WIDTHS[1], WIDTHS[2])]
        return nn.Sequential(*layers).to(device, dtype)


def null_space_of(model: nn.Module, rank: int = 4) -> NullSpace:
    """Protects directions of the layers' inputs and of the vectors but for the first bias."""
    general = protected_inputs(model[0].weight)
    null_space = NullSpace(max_rank=rank).collect(model, [general])
    gradients = NullSpace(max_rank=rank).collect_gradients(model, [general], lambda model, x: model(x).tanh().sum())
    for name in VECTORS:
        null_space.update(name, gradients.basis(name).mT * torch.arange(rank, 0, -1.0)[:, None])
    return null_space


def moved(model: nn.Module, before: dict[str, Tensor], null_space: NullSpace) -> dict[str, float]:
    """||K^T dv|| / ||dv|| of every vector, all of which have moved."""
    found = {}
    for name, parameter in VECTORS.items():
        change = (model.get_parameter(parameter).detach() - before[parameter])[None]
        assert float(change.norm()) > 0.01
        found[name] = leak(change, null_space.basis(name, torch.float64), "input")
    return found


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


BASES = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=3e-2, momentum=0.9, weight_decay=0.1),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=1e-3),
}


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_protected_directions_of_vectors_rest(device, base, dtype):
    model = model_of(dtype, device)
    null_space, before = null_space_of(model), state_of(model)
    train(model, gems(model, base=BASES[base](model.parameters()), null_space=null_space, free=True), 30)
    found = moved(model, before, null_space)
    assert all(part < (2e-5 if dtype == torch.float32 else 1e-12) for part in found.values()), found
    assert float((model[0].bias - before["0.bias"]).detach().norm()) > 0.01  # nothing is known of this one


def test_otherwise_they_move(device):
    model = model_of(device=device)
    null_space, before = null_space_of(model), state_of(model)
    layers = NullSpace(max_rank=4).collect(model, [protected_inputs(model[0].weight)])
    train(model, gems(model, base=BASES["adamw"](model.parameters()), null_space=layers, free=True), 30)
    assert all(part > 0.1 for part in moved(model, before, null_space).values())


def test_a_step_is_the_plain_one_projected(device):
    ends = []
    null_space = null_space_of(model_of(device=device))
    for protects in (False, True):
        model = model_of(torch.float64, device)
        known = null_space if protects else NullSpace(max_rank=4).collect(model, [protected_inputs(model[0].weight)])
        before = state_of(model)
        train(model, gems(model, base=BASES["adamw"](model.parameters()), null_space=known, free=True), 1)
        ends.append({name: value - before[name] for name, value in state_of(model).items()})
    plain, projected = ends
    for name, parameter in VECTORS.items():
        K = null_space.basis(name, torch.float64).to(device)
        expected = plain[parameter] - K @ (K.mT @ plain[parameter])
        torch.testing.assert_close(projected[parameter], expected, rtol=1e-6, atol=1e-9)


def test_what_the_null_space_learns_is_kept_from_the_next_step_on(device):
    model = model_of(device=device)
    null_space = null_space_of(model, rank=3)
    optimizer = gems(model, null_space=null_space)
    start = state_of(model)
    train(model, optimizer, 2)
    old = null_space.basis("1.bias").to(device)
    null_space.criterion = type(null_space.criterion)(max_rank=5)
    null_space.update("1.bias", 9 * noise(2, 16, key=(3,), like=model[1].bias))
    told = state_of(model)
    train(model, optimizer, 6, start=2)
    K = optimizer.state[model[1].bias]["protected"]
    assert K.shape == (16, 5)
    torch.testing.assert_close(K[:, :3], old)
    assert leak((model[1].bias.detach() - told["1.bias"])[None], K, "input") < 1e-5
    assert leak((model[1].bias.detach() - start["1.bias"])[None], old, "input") < 1e-5
    assert leak((told["1.bias"] - start["1.bias"])[None], K[:, 3:], "input") > 1e-2


@pytest.mark.parametrize("again", [True, False], ids=["null-space", "checkpoint-alone"])
def test_a_resumed_run_goes_on_bit_for_bit(device, again):
    """Also where the null space itself is gone: what is protected is in the checkpoint."""
    whole = model_of(device=device)
    null_space = null_space_of(whole)
    before = state_of(whole)
    optimizer = gems(whole, null_space=null_space, free=True)
    train(whole, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(whole, optimizer, 4, start=3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = model_of(device=device)
    model.load_state_dict(saved["model"])
    resumed = gems(model, null_space=null_space_of(model_of(device=device)) if again else None, free=True)
    resumed.load_state_dict(saved["optimizer"])
    train(model, resumed, 4, start=3)
    assert same(state_of(whole).values(), state_of(model).values())
    assert same(tensors_in(optimizer.state_dict()["state"]), tensors_in(resumed.state_dict()["state"]))
    assert all(part < 2e-5 for part in moved(model, before, null_space).values())


def test_a_checkpoint_without_protection_takes_up_that_of_the_null_space(device):
    model = model_of(device=device)
    null_space = null_space_of(model)
    plain = gems(model)
    train(model, plain, 2)
    with pytest.warns(UserWarning, match="collected on other weights"):  # the layers have moved, which is said
        optimizer = gems(model, null_space=null_space, free=True)
    optimizer.load_state_dict(plain.state_dict())
    before = state_of(model)
    train(model, optimizer, 20, start=2)
    assert all(part < 2e-5 for part in moved(model, before, null_space).values())


def test_copies_protect_as_well(device):
    model = model_of(device=device)
    null_space = null_space_of(model)
    twin, optimizer = copy.deepcopy((model, gems(model, null_space=null_space)))
    before = state_of(twin)
    train(twin, optimizer, 20)
    assert all(part < 2e-5 for part in moved(twin, before, null_space).values())
    assert same(state_of(model).values(), before.values())


def test_bfloat16_vectors_are_projected_before_they_are_rounded(device):
    """The step of 0.25 is far above their rounding, which is all that moves the protected directions."""
    model = model_of(torch.bfloat16, device)
    null_space, before = null_space_of(model_of(device=device)), state_of(model)
    base = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that bfloat16 rounds
        train(model, gems(model, base=base, null_space=null_space), 3)
    assert all(part < 0.05 for part in moved(model, before, null_space).values())


def test_a_vector_without_any_freedom_rests_and_that_is_said(device):
    model = model_of(device=device)
    null_space = NullSpace(energy=1.0)
    null_space.update("1", torch.eye(16))
    for layer, width in (("0", 12), ("2", 16)):
        null_space.update(layer, torch.eye(width)[:1])
    with pytest.warns(UserWarning, match=r"protects all 16 directions of 1\.weight: it cannot learn"):
        optimizer = gems(model, null_space=null_space, free=True)
    before = state_of(model)
    train(model, optimizer, 5)
    torch.testing.assert_close(model[1].weight.detach(), before["1.weight"], rtol=0, atol=1e-6)
    assert float((model[1].bias - before["1.bias"]).detach().norm()) > 0.01


def test_a_criterion_that_asks_for_no_direction_is_said(device):
    model = model_of(device=device)
    null_space = NullSpace(threshold=1.0)
    for layer, width in (("0", 12), ("2", 16), ("1", 16)):
        null_space.update(layer, (0.1 if layer == "1" else 9.0) * torch.eye(width)[:1])
    with pytest.warns(UserWarning, match=r"protects no direction of 1\.weight: its criterion asks for none"):
        gems(model, null_space=null_space)


def test_a_base_optimizer_that_fails_halfway_moves_nothing_protected(device):
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise RuntimeError("after the step")

    model = model_of(device=device)
    null_space, before = null_space_of(model), state_of(model)
    optimizer = gems(model, base=Failing(model.parameters(), lr=0.5), null_space=null_space)
    with pytest.raises(RuntimeError, match="after the step"):
        train(model, optimizer, 1)
    assert all(part < 2e-5 for part in moved(model, before, null_space).values())


def test_what_cannot_be_protected_is_said(device):
    model = nn.Sequential(nn.Embedding(5, 12), *model_of()).to(device)
    null_space = NullSpace(energy=1.0)
    null_space.update("0", torch.eye(12)[:2])
    null_space.update("1", torch.eye(12)[:2])
    null_space.update("3", torch.eye(16)[:2])
    plain, free = (
        "0\\.weight is protected by null_space but takes the plain inner",
        "null_space has nothing for 1\\.bias, ",
    )
    with pytest.warns(UserWarning, match=plain), pytest.warns(UserWarning, match=free):
        GemsOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, null_space=null_space, rank=4)
    wrong = NullSpace(energy=1.0)
    wrong.update("2.bias", torch.eye(5))
    with pytest.raises(ValueError, match=r"directions of length 5 for '2\.bias', but the weight \(16,\) has 16"):
        gems(model, null_space=wrong, free=True)
