"""Files of directions alone, files of before, and what is read of them when."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gradsub import GemsOptimizer, NullSpace


def collected(**options: object) -> NullSpace:
    torch.manual_seed(0)
    null_space = NullSpace(**({"energy": 0.9} | options))
    null_space.update("most", torch.randn(200, 8))
    null_space.update("few", torch.randn(200, 8) * torch.tensor([9.0, 5.0, *[0.1] * 6]))
    return null_space


def projector(null_space: NullSpace, name: str) -> Tensor:
    K = null_space.basis(name, torch.float64)
    return K @ K.mT


@pytest.mark.parametrize("budget", [None, 400])
@pytest.mark.filterwarnings("ignore:layer_memory_budget")
def test_a_file_of_directions_protects_the_same(tmp_path, budget, monkeypatch):
    null_space = collected(layer_memory_budget=budget)
    null_space.save(tmp_path / "null.safetensors", statistics=False)
    expected = {name: projector(null_space, name) for name in null_space}
    monkeypatch.setattr(torch.linalg, "eigh", lambda *_: pytest.fail("there is nothing left to decompose"))
    loaded = NullSpace.load(tmp_path / "null.safetensors")
    assert repr(loaded) == repr(null_space)
    for each in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        for name in null_space:
            torch.testing.assert_close(projector(each, name), expected[name], atol=1e-6, rtol=0)
            assert float((each.complement(name).mT @ each.basis(name)).norm()) < 1e-6
            assert each.protected_fraction(name) == null_space.protected_fraction(name)
            assert each.version(name) == null_space.version(name)
            torch.testing.assert_close(each.eigenvalues(name), null_space.eigenvalues(name), rtol=1e-5, atol=1e-5)
            assert each.extended(name, each.basis(name)).shape == each.basis(name).shape
    monkeypatch.undo()
    held_out = collected()
    assert loaded.residual_energy(held_out) == pytest.approx(null_space.residual_energy(held_out), abs=1e-6)
    assert "directions" in loaded.table()
    loaded.save(tmp_path / "again.safetensors")
    assert projector(NullSpace.load(tmp_path / "again.safetensors"), "most").shape == (8, 8)


def test_what_is_kept_is_the_smaller_form_once_for_each_input(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(40, 4) for _ in range(3))

        def forward(self, x):
            return self.query(x) + self.key(x) + self.value(x)

    null_space = NullSpace(energy=0.97).collect(Attention(), [torch.randn(500, 40)])
    null_space.save(tmp_path / "null.safetensors", statistics=False)
    with safe_open(tmp_path / "null.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if not key.startswith("fitted on: ")]  # noqa: SIM118
        tensors = {key: file.get_tensor(key) for key in keys}
    free = 40 - null_space.basis("key").shape[1]
    assert free < 20
    assert [tuple(tensor.shape) for tensor in tensors.values()] == [(1 + free, 40)]
    loaded = NullSpace.load(tmp_path / "null.safetensors")
    assert loaded.basis("query") is not None
    K = loaded.basis("query")
    assert loaded.basis("value") is K


def test_an_optimizer_does_not_care_where_the_directions_are_from(tmp_path, device):
    torch.manual_seed(0)
    model = nn.Linear(8, 6, bias=False).to(device)
    x = torch.randn(50, 8, device=device) * torch.tensor([5.0] * 6 + [0.01] * 2, device=device)
    null_space = NullSpace(energy=0.999).collect(nn.Sequential(model), [x])
    null_space.save(tmp_path / "null.safetensors", statistics=False)
    loaded = NullSpace.load(tmp_path / "null.safetensors", device=device)
    wrapped = nn.Sequential(model)
    optimizer = GemsOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=0.1), tasks=("a",), rank=1, model=wrapped, null_space=loaded
    )
    before = model.weight.detach().clone()
    with optimizer.task("a"):
        wrapped(torch.randn(10, 8, device=device)).square().sum().backward()
    optimizer.step()
    change = model.weight.detach() - before
    assert float(change.norm()) > 0
    assert float((change @ null_space.basis("0")).norm()) < 1e-6 * float(change.norm())


def test_nothing_can_be_added_to_directions(tmp_path):
    null_space = collected()
    null_space.save(tmp_path / "null.safetensors", statistics=False)
    loaded = NullSpace.load(tmp_path / "null.safetensors")
    before = loaded.basis("few").clone()
    for add in (
        lambda: loaded.update("few", torch.randn(3, 8)),
        lambda: loaded.merge(loaded),
        lambda: null_space.merge(loaded),
    ):
        with pytest.raises(ValueError, match=r"directions"):
            add()
    assert torch.equal(loaded.basis("few"), before)
    assert loaded.version("few") == 1
    with pytest.raises(ValueError, match="held_out holds directions alone"):
        null_space.residual_energy(loaded)
    loaded.update("new", torch.randn(3, 5))
    assert loaded.basis("new").shape[0] == 5


def of_before(path: Path, totals: dict[str, Tensor], counts: dict[str, int], layers: dict[str, str]) -> None:
    """A file as versions before this one wrote it: the sums of products and their numbers, and nothing else."""
    settings = {"side": "input", "energy": 0.9, "threshold": None, "max_rank": None, "layer_memory_budget": None}
    header = {
        "settings": settings,
        "statistics": {key: {"kind": "exact", "count": count} for key, count in counts.items()},
        "layers": layers,
        "versions": dict.fromkeys(layers, 1),
    }
    save_file(totals, path, {"format": "gradsub.NullSpace"} | {key: json.dumps(each) for key, each in header.items()})


@pytest.mark.parametrize("width", [6, 300])
def test_files_of_before_load_and_go_on(tmp_path, width):
    torch.manual_seed(0)
    x, more = torch.randn(2 * width, width) * torch.linspace(3, 0.1, width), torch.randn(30, width)
    path = tmp_path / "old.safetensors"
    of_before(path, {"query": x.double().mT @ x.double()}, {"query": len(x)}, {"query": "query", "key": "query"})
    loaded, fresh = NullSpace.load(path), NullSpace(energy=0.9)
    content = path.read_bytes()
    fresh.update("query", x.double())
    for _ in range(2):
        assert loaded.basis("query").shape == fresh.basis("query").shape
        torch.testing.assert_close(projector(loaded, "query"), projector(fresh, "query"), atol=1e-6, rtol=0)
        loaded.update("query", more)
        fresh.update("query", more.double())
    assert loaded.basis("key").shape[0] == width
    assert path.read_bytes() == content  # the mapped file is not written to


@pytest.mark.parametrize("options", [{"energy": 0.97}, {"energy": 1.0}], ids=str)
def test_a_wide_round_trip_gives_the_same_bits(tmp_path, options):
    null_space = NullSpace(**options)
    null_space.update("layer", torch.randn(500, 300))
    null_space.save(tmp_path / "null.safetensors")
    loaded = NullSpace.load(tmp_path / "null.safetensors")
    for each in (null_space, loaded):
        each.update("layer", torch.ones(5, 300))
    assert torch.equal(loaded.basis("layer"), null_space.basis("layer"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda held: held * 1.01, "orthonormal"),
        (lambda held: torch.cat([held[:1], held[1:2], held[1:2]]), "orthonormal"),
        (lambda held: held[:-1], "columns"),
        (lambda held: torch.full_like(held, float("nan")), "NaN"),
        (lambda held: torch.zeros_like(held), "orthonormal"),
    ],
    ids=["longer", "twice", "missing", "NaN", "zero"],
)
def test_directions_that_cannot_be_are_refused_by_name(tmp_path, change, match):
    path = tmp_path / "null.safetensors"
    collected().save(path, statistics=False)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert tensors["few"].shape[0] == 3
    save_file(tensors | {"few": change(tensors["few"]).contiguous()}, path, metadata)
    with pytest.raises(ValueError, match=rf"null.safetensors.*{match}" if match == "NaN" else rf"'few'.*{match}"):
        NullSpace.load(path)


@pytest.mark.parametrize(
    "numbers", [{"protected": -1}, {"protected": 9}, {"energy": -1.0}, {"share": 2.0}, {"energy": "x"}]
)
def test_numbers_of_directions_that_cannot_be_are_refused(tmp_path, numbers):
    path = tmp_path / "null.safetensors"
    collected().save(path, statistics=False)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    states = json.loads(metadata["statistics"])
    states["few"] |= numbers
    save_file(tensors, path, metadata | {"statistics": json.dumps(states)})
    with pytest.raises(ValueError, match=r"'few'"):
        NullSpace.load(path)


@pytest.mark.parametrize("energy", [0.5, 0.97])
def test_columns_that_are_a_little_off_are_refused_too(tmp_path, energy):
    """A column that is longer by 1e-4 would leak as much of every update."""
    path = tmp_path / "null.safetensors"
    null_space = NullSpace(energy=energy)
    null_space.update("layer", torch.randn(2000, 300) * torch.arange(1, 301) ** -0.2)
    null_space.save(path, statistics=False)
    NullSpace.load(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensor = file.metadata(), file.get_tensor("layer").clone()
    for factor in (1 + 1e-4, 1 - 1e-4):
        off = tensor.clone()
        off[7] *= factor
        save_file({"layer": off}, path, metadata)
        with pytest.raises(ValueError, match=r"'layer'.*orthonormal"):
            NullSpace.load(path)


def test_numbers_of_numpy_and_large_features_survive_a_file(tmp_path):
    null_space = NullSpace(energy=np.float32(0.9))
    null_space.update("layer", 1e21 * torch.randn(400, 260, generator=torch.Generator().manual_seed(0)))
    null_space.save(tmp_path / "null.safetensors", statistics=False)
    loaded = NullSpace.load(tmp_path / "null.safetensors")
    assert loaded.criterion.energy == null_space.criterion.energy
    torch.testing.assert_close(loaded.complement("layer"), null_space.complement("layer"))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.97])
def test_directions_alone_extend_a_basis_to_no_less_than_the_energy(energy, tmp_path):
    """Also where their complement is stored, which does not tell which eigenvalue is whose."""
    torch.manual_seed(0)
    rotations = [torch.linalg.qr(torch.randn(24, 24)).Q for _ in range(2)]
    features = [torch.randn(3000, 24) * torch.logspace(0, -1.2, 24) @ Q for Q in rotations]
    first, second = (NullSpace(energy=energy) for _ in range(2))
    first.update("layer", features[0])
    second.update("layer", features[1])
    second.save(tmp_path / "second.safetensors", statistics=False)
    alone = NullSpace.load(tmp_path / "second.safetensors")
    kept = first.basis("layer")[:, :4].contiguous()
    total = features[1].square().sum()
    for null_space in (second, alone):
        found = null_space.extended("layer", kept)
        torch.testing.assert_close(found.mT @ found, torch.eye(found.shape[1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(found @ (found.mT @ kept), kept, rtol=0, atol=1e-5)
        assert float((features[1] @ found).square().sum() / total) > energy - 1e-3


def test_directions_alone_add_none_to_a_basis_that_holds_their_energy(tmp_path):
    torch.manual_seed(0)
    spread = torch.logspace(0, -1.2, 24)
    null_space, wider = NullSpace(energy=0.9), NullSpace(energy=0.97)
    for each in (null_space, wider):
        each.update("layer", torch.randn(3000, 24) * spread)
    null_space.save(tmp_path / "null.safetensors", statistics=False)
    kept = wider.basis("layer")
    for each in (null_space, NullSpace.load(tmp_path / "null.safetensors")):
        assert each.extended("layer", kept).shape == kept.shape
