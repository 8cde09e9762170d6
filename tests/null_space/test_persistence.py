"""Saving, loading, and going on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file

from gradsub import NullSpace


def collected(**options: object) -> NullSpace:
    null_space = NullSpace(**options)
    null_space.update("block.0.query", torch.randn(30, 6))
    null_space.update("block.0.value", torch.randn(20, 4))
    return null_space


def equal(first: NullSpace, second: NullSpace) -> bool:
    return list(first) == list(second) and all(
        torch.equal(first.basis(name), second.basis(name))
        and torch.equal(first.eigenvalues(name), second.eigenvalues(name))
        for name in first
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"side": "output", "threshold": 0.9},
        {"energy": 0.5, "max_rank": 2},
        {"max_rank": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("as_text", [True, False])
def test_a_round_trip_changes_nothing_and_collecting_goes_on(tmp_path, options, as_text):
    null_space = collected(**options)
    path = tmp_path / "null.safetensors"
    null_space.save(str(path) if as_text else path)
    loaded = NullSpace.load(str(path) if as_text else path)
    assert repr(loaded) == repr(null_space)
    assert loaded.side == null_space.side
    assert equal(loaded, null_space)
    more = torch.randn(50, 6) * 5
    for each in (loaded, null_space):
        each.update("block.0.query", more)
        each.update("block.1.query", more)
    assert equal(loaded, null_space)
    assert len(loaded) == 3


def test_loading_onto_a_device(tmp_path, device):
    path = tmp_path / "null.safetensors"
    collected().save(path)
    loaded = NullSpace.load(path, device=device)
    assert loaded.basis("block.0.query").device.type == device.type
    loaded.update("block.0.query", torch.randn(3, 6, device=device))


def test_an_empty_one_can_be_saved_too(tmp_path):
    path = tmp_path / "null.safetensors"
    NullSpace(energy=0.5).save(path)
    assert repr(NullSpace.load(path)) == "NullSpace(side='input', energy=0.5, layers=0)"


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"weights.safetensors' is no file of NullSpace.save"):
        NullSpace.load(path)
    with pytest.raises(FileNotFoundError):
        NullSpace.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copy", "pickle"]
)
def test_copies_are_independent(way):
    null_space = collected()
    twin = way(null_space)
    assert equal(null_space, twin)
    before = null_space.eigenvalues("block.0.query").clone()
    twin.update("block.0.query", torch.randn(9, 6))
    assert torch.equal(before, null_space.eigenvalues("block.0.query"))
    assert not equal(null_space, twin)
