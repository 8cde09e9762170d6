"""Whether each row of features counts the same: the default, and that one layer never mixes both."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsub import NullSpace

WIDTH = 6


def rows(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator) * torch.logspace(-2, 2, count)[:, None]


def covariance(null_space: NullSpace, name: str = "") -> Tensor:
    statistics = null_space._statistics(name)
    return statistics.tensor / statistics.count


@given(
    count=st.integers(2, 9),
    zeros=st.integers(0, 3),
    criterion=st.sampled_from([{"energy": 0.9}, {"max_rank": 2}, {"threshold": 0.1}]),
    normalize=st.sampled_from([None, True, False]),
    seed=st.integers(0, 99),
)
def test_all_rows_count_alike_unless_a_threshold_decides(count, zeros, criterion, normalize, seed):
    x = torch.cat([rows(count, seed), torch.zeros(zeros, WIDTH)])
    found = NullSpace(**criterion).collect(nn.Linear(WIDTH, 3), [x[:1], x[1:]], normalize=normalize)
    even = "threshold" not in criterion if normalize is None else normalize
    expected = torch.nn.functional.normalize(x, dim=1) if even else x
    expected = (expected.mT @ expected / len(x)).to(covariance(found))
    torch.testing.assert_close(covariance(found), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    # What the rows span is protected either way.
    whole = NullSpace(energy=1.0).collect(nn.Linear(WIDTH, 3), [x], normalize=normalize)
    K = whole.basis("", torch.float64)
    left = x.double() - x.double() @ K @ K.mT
    assert float((left.norm(dim=1) - 1e-4 * x.double().norm(dim=1)).max()) <= 0


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("through_file", [True, False])
def test_later_features_follow_the_first_ones(tmp_path, first, through_file):
    model, x = nn.Linear(WIDTH, 3), rows(9, 0)
    expected = NullSpace().collect(model, [x], normalize=first)
    for add in ("collect", "update", "merge"):
        null_space = NullSpace().collect(model, [x[:4]], normalize=first)
        if through_file:
            null_space.save(tmp_path / "null_space.safetensors")
            null_space = NullSpace.load(tmp_path / "null_space.safetensors")
        if add == "collect":
            null_space.collect(model, [x[4:]])
        elif add == "update":
            null_space.update("", x[4:])
        else:
            null_space.merge(NullSpace().collect(model, [x[4:]], normalize=first))
        torch.testing.assert_close(covariance(null_space), covariance(expected))
        with pytest.raises(ValueError, match=f"normalize={not first}, but .* came with normalize={first}"):
            null_space.collect(model, [x], normalize=not first)
        with pytest.raises(ValueError, match="another choice of normalize"):
            null_space.merge(NullSpace().collect(model, [x], normalize=not first))
        torch.testing.assert_close(covariance(null_space), covariance(expected))  # nothing was added


def test_features_that_were_given_count_as_they_are():
    null_space, x = NullSpace(), rows(5, 1)
    null_space.update("", x[:3])
    null_space.collect(nn.Linear(WIDTH, 3), [x[3:]])
    torch.testing.assert_close(covariance(null_space), (x.mT @ x / 5).double())
    with pytest.raises(ValueError, match="normalize=True, but"):
        null_space.collect(nn.Linear(WIDTH, 3), [x], normalize=True)


def test_layers_that_differ_are_collected_apart():
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)), rows(5, 2)
    null_space = NullSpace().collect(model, [x], target_modules=["0"])
    null_space.collect(model, [x], target_modules=["1"], normalize=False)
    with pytest.raises(ValueError, match="only 0 were collected with normalize=True"):
        null_space.collect(model, [x])
    null_space.collect(model, [x], target_modules=["1"])
    assert null_space.version("1") == 2


def test_a_file_of_an_older_version_has_to_be_told(tmp_path):
    import safetensors.torch

    model, x, path = nn.Linear(WIDTH, 3), rows(5, 3), tmp_path / "null_space.safetensors"
    NullSpace().collect(model, [x], normalize=False).save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        header, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert json.loads(header.pop("normalized")) == {"": False}
    safetensors.torch.save_file(tensors, path, header)
    old = NullSpace.load(path)
    with pytest.raises(ValueError, match=r"normalize=None, and the file of an older version .* pass normalize=False"):
        old.collect(model, [x])
    old.collect(model, [x], normalize=False)
    old.collect(model, [x])
    torch.testing.assert_close(covariance(old), (x.mT @ x / 5).double())
    # Nor is it guessed from what it is merged with.
    known, older = NullSpace().collect(model, [x]), NullSpace.load(path)
    for one, other in ((known, older), (older, known)):
        with pytest.raises(ValueError, match=r"does not tell how .* were collected"):
            one.merge(other)
        assert one.tokens("") == 5
    assert older.merge(NullSpace.load(path)).tokens("") == 10


@pytest.mark.parametrize("earlier", [False, True])
def test_features_that_were_refused_leave_no_choice_behind(earlier):
    model, x = nn.Linear(WIDTH, 3), rows(5, 4)
    null_space = NullSpace()
    if earlier:
        null_space.update("other", x)
    with pytest.raises(ValueError, match="NaN"):
        null_space.update("", torch.full_like(x, torch.nan))
    null_space.merge(NullSpace().collect(model, [x], normalize=True))
    null_space.collect(model, [x])
    unit = torch.nn.functional.normalize(x, dim=1)
    torch.testing.assert_close(covariance(null_space), (unit.mT @ unit / 5).double(), rtol=0, atol=1e-6)
