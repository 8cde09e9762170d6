"""A null space of other weights, or of too few tokens, is said with the numbers; what trained since is neither."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gradsub import GemsOptimizer, NullSpace
from gradsub.null_space._fitted_on import FittedOn

from .toys import gems, mlp, null_space_of, protected_inputs, train


def told(model: nn.Module, null_space: NullSpace, **options: object) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gems(model, null_space=null_space, **options)
    return [str(warning.message) for warning in said]


# --- other weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("way", ["collected", "saved", "directions alone", "merged"])
def test_weights_of_another_model_are_told_with_the_distance(tmp_path, device, side, way):
    model, other = mlp((20, 24, 18), device=device), mlp((20, 24, 18), seed=1, device=device)
    null_space = null_space_of(model, side)
    if way in ("saved", "directions alone"):
        null_space.save(tmp_path / "null.safetensors", statistics=way == "saved")
        null_space = NullSpace.load(tmp_path / "null.safetensors")
    if way == "merged":
        null_space = NullSpace(side=side, max_rank=3).merge(null_space)
    assert told(model, null_space, side=side) == []
    said = told(other, null_space, side=side)
    assert len(said) == 1
    assert said[0].startswith("null_space was collected on other weights than the model has")
    listed = said[0].partition(", of ")[2].partition("%. ")[0]
    shares = [float(part.rpartition(" by ")[2]) for part in listed.split("%, ")]
    assert len(shares) == 2
    assert all(80 < share < 200 for share in shares), said


def test_one_layer_that_differs_is_named_alone(device):
    model = mlp((20, 24, 18), device=device)
    null_space = null_space_of(model)
    model[2].weight.data *= 1.35
    (said,) = told(model, null_space)
    assert ", of 2 by 26%. " in said  # of the larger one


def test_what_was_said_is_not_said_again_when_a_group_is_added(device):
    model = mlp((20, 24, 18), bias=False, device=device)
    null_space = null_space_of(model)
    for layer in (model[0], model[2]):
        layer.weight.data *= 1.35
    model[2].weight.requires_grad_(False)
    base = torch.optim.SGD([model[0].weight], lr=0.1)
    with pytest.warns(UserWarning, match=r", of 0 by 26%\. "):
        optimizer = GemsOptimizer(base, rank=2, model=model, null_space=null_space)
    model[2].weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r", of 2 by 26%\. "):
        optimizer.add_param_group({"params": [model[2].weight]})


@pytest.mark.parametrize("side", ["input", "output"])
def test_what_trained_since_in_the_null_space_is_the_same_as_far_as_it_matters(device, side):
    """As a resumed run finds it, whose weights are no longer what they were collected on."""
    model = mlp((20, 24, 18), device=device)
    null_space, start = null_space_of(model, side), copy.deepcopy(model)
    train(model, gems(model, null_space=null_space, side=side), 30)
    moved = [(a - b).norm() / b.norm() for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert max(moved) > 0.2
    assert told(model, null_space, side=side) == []
    unprotected = copy.deepcopy(start)
    train(unprotected, gems(unprotected, side=side), 30)
    assert "other weights" in told(unprotected, null_space, side=side)[0]


def test_rounding_to_bfloat16_and_a_part_of_the_layers_are_no_other_weights(device):
    model = mlp((20, 24, 18), device=device)
    null_space = null_space_of(model)
    assert told(copy.deepcopy(model).bfloat16(), null_space, master_weights=True) == []
    null_space.update("2", torch.randn(20, 24))  # by hand, of which nothing is known
    assert told(model, null_space) == []


def test_a_head_that_started_at_zero(device):
    model = mlp((20, 24, 18), device=device)
    nn.init.zeros_(model[2].weight)
    null_space = null_space_of(model)
    assert told(model, null_space) == []
    train(model, gems(model, null_space=null_space), 20)
    assert told(model, null_space) == []


def test_transposed_weights_are_read_as_such():
    from transformers.pytorch_utils import Conv1D

    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(nn.Sequential(Conv1D(24, 20), nn.Tanh(), Conv1D(18, 24)))
    null_space = NullSpace(max_rank=3).collect(models[0], [protected_inputs(mlp((20, 24))[0].weight)])
    assert told(models[0], null_space) == []
    assert "other weights" in told(models[1], null_space)[0]


@given(
    rows=st.integers(1, 40),
    columns=st.integers(2, 40),
    protected=st.integers(1, 39),
    side=st.sampled_from(["input", "output"]),
    complement=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_distance_is_that_of_the_protected_part(rows, columns, protected, side, complement, seed):
    """On average over random signs ||S D K|| is ||D K||; it is zero for what lies in the null space."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    layer = nn.Linear(columns, rows, bias=False)
    axis = 1 if side == "input" else 0
    dimension = layer.weight.shape[axis]
    protected = min(protected, dimension)
    Q = torch.linalg.qr(noise(dimension, dimension)).Q
    K, F = Q[:, :protected], Q[:, protected:]
    fitted = FittedOn()
    fitted.note({"layer": layer}, side)

    def distance(weight: Tensor) -> float:
        found = fitted.distance("layer", weight, axis, F if complement else K, complement)
        assert found is not None
        return found

    W = layer.weight.detach()
    change = noise(rows, columns) * 3
    inside = change @ F @ F.mT if axis else F @ F.mT @ change
    assert distance(W + inside) < 1e-3
    assert distance(W) == 0
    assert distance(-W) == pytest.approx(2, rel=1e-3)
    assert 0 <= distance(W + change) <= 2.001


def test_the_distance_is_about_that_of_the_weights(device):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).to(device)
    K = torch.linalg.qr(torch.randn(64, 20)).Q
    fitted = FittedOn()
    fitted.note({"layer": layer}, "input")
    for share in (0.02, 0.3, 1.0):
        change = torch.randn(64, 64, device=device)
        change *= share * (layer.weight.detach() @ K.to(device)).norm() / (change @ K.to(device)).norm()
        with torch.no_grad():
            found = fitted.distance("layer", layer.weight + change, 1, K, False)
        assert found == pytest.approx(share / max(1, (1 + share**2) ** 0.5), rel=0.4)


def test_files_of_earlier_versions_have_nothing_to_compare_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "null.safetensors"
    null_space_of(mlp((20, 24, 18))).save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    mine = [key for key in tensors if key.startswith("fitted on: ")]
    assert len(mine) == 2
    save_file({key: value for key, value in tensors.items() if key not in mine}, path, metadata)
    assert told(mlp((20, 24, 18), seed=1), NullSpace.load(path)) == []
    for damaged in (torch.full((4, 20), float("nan")), torch.zeros(80), torch.zeros(4, 20, dtype=torch.float16)):
        save_file({**tensors, mine[0]: damaged}, path, metadata)
        with pytest.raises(ValueError, match=r"has no finite float32 matrix of the weight of '0'"):
            NullSpace.load(path)


# --- few tokens -------------------------------------------------------------------------------------------------------


def spread(rows: int, width: int, power: float, seed: int) -> Tensor:
    """Features with the spectrum 1 / i^power."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * torch.arange(1, width + 1) ** (-power / 2)


@pytest.mark.parametrize(("tokens", "few"), [(100, True), (4000, False)])
def test_few_tokens_for_what_is_protected_are_told_with_the_numbers(device, tokens, few):
    model = mlp((64, 60), bias=False, device=device)
    null_space = NullSpace(energy=0.95).collect(model, [spread(tokens, 64, 1.0, 0).to(device)])
    said = told(model, null_space)
    assert len(said) == few
    if few:
        count = null_space.basis("0").shape[1]
        assert f"0 ({count} of 64 directions from 100 tokens, of which it leaves " in said[0]


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("tokens", [64, 128, 256])
def test_what_is_said_of_fresh_tokens_is_a_low_estimate(power, tokens):
    model = mlp((64, 60), bias=False)
    null_space = NullSpace(energy=0.95).collect(model, [spread(tokens, 64, power, 1)])
    held_out = NullSpace().collect(model, [spread(4000, 64, power, 2)])
    fresh = null_space.residual_energy(held_out)["0"]
    said = told(model, null_space)
    assert len(said) == (tokens < 5 * null_space.basis("0").shape[1])
    if said:
        expected = float(said[0].partition("at least ")[2].partition("%")[0]) / 100
        assert 0.35 * fresh < expected < 1.2 * fresh


def test_features_that_span_no_more_than_what_is_protected_need_no_more_tokens(device):
    model = mlp((64, 60), bias=False, device=device)
    low = (torch.randn(30, 10) @ torch.randn(10, 64)).to(device)
    assert told(model, NullSpace(energy=1.0).collect(model, [low])) == []
    every = torch.randn(10, 64, device=device)
    (said,) = told(model, NullSpace(energy=1.0).collect(model, [every]))
    assert "0 (10 of 64 directions from 10 tokens, of which it leaves 0.0% unprotected, and of fresh ones" in said


def test_directions_given_by_hand_are_what_they_are(device):
    model = mlp((64, 60), bias=False, device=device)
    null_space = NullSpace(energy=1.0)
    null_space.update("0", torch.eye(64)[:10])
    assert told(model, null_space) == []
    base = torch.optim.AdamW(model.parameters())
    GemsOptimizer(base, tasks=("a",), rank=4, model=model, null_space=null_space)
