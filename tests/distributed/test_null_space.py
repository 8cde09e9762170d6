"""A null space that several ranks collect together is the one that a single process collects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gradsub import NullSpace
from tests.distributed.launch import launch

BUDGET = 6 * 40 * 8  # bytes for which the wide layer is sketched and the narrow one is not


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 40, generator=generator, dtype=torch.float64) for _ in range(count)]


def _content(null_space: NullSpace) -> dict[str, Tensor]:
    return {name: null_space.basis(name, torch.float64) for name in null_space} | {
        f"{name}.bound": torch.tensor(null_space.error_bound(name)) for name in null_space
    }


def _collect(rank: int, budget: int | None, counts: list[int], shard: bool) -> dict[str, Tensor]:
    null_space = NullSpace(energy=0.9, layer_memory_budget=budget)
    for count in counts:
        batches = _batches(count)
        null_space.collect(_model(), batches if shard else batches[rank::3], shard=shard)
    return _content(null_space)


@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize("counts", [[7], [1], [2, 6]])
def test_exact_statistics_are_those_of_one_process(counts: list[int], shard: bool, tmp_path: Path) -> None:
    found = launch(_collect, 3, tmp_path, None, counts, shard)
    alone = NullSpace(energy=0.9)
    for count in counts:
        alone.collect(_model(), _batches(count))
    for name, value in _content(alone).items():
        assert all(torch.equal(each[name], found[0][name]) for each in found)
        if value.ndim == 2:
            assert torch.allclose(found[0][name] @ found[0][name].mT, value @ value.mT, atol=1e-9)


def test_sketches_are_the_same_on_every_rank_and_within_their_bound(tmp_path: Path) -> None:
    found = launch(_collect, 3, tmp_path, BUDGET, [9], True)
    assert all(torch.equal(each[name], found[0][name]) for each in found for name in each)
    rows = torch.nn.functional.normalize(torch.cat(_batches(9)), dim=1)
    exact = rows.mT @ rows / len(rows)
    K = found[0]["0"]
    assert 0 < K.shape[1] <= 6
    top = torch.linalg.eigvalsh(exact).flip(0)[: K.shape[1]]
    held = torch.linalg.eigvalsh(K.mT @ exact @ K).flip(0)
    assert bool((top - held <= 2 * found[0]["0.bound"] + 1e-9).all())


def _to_a_file(rank: int, folder: Path) -> tuple[dict[str, Tensor], str]:
    path = folder / "null.safetensors"
    built = NullSpace(energy=0.9).collect(_model(), _batches(5), layers_at_once=1, out=path)
    found = _content(built)
    assert all(torch.equal(value, found[name]) for name, value in _content(NullSpace.load(path)).items())
    elsewhere = folder / ("missing" if rank == 1 else ".") / "other.safetensors"
    with pytest.raises((OSError, RuntimeError)) as raised:
        NullSpace(energy=0.9).collect(_model(), _batches(5), out=elsewhere)
    return found, str(raised.value)


def test_all_ranks_build_to_a_file_or_none_does(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    found = launch(_to_a_file, 2, tmp_path, tmp_path / "made")
    alone = NullSpace(energy=0.9).collect(_model(), _batches(5))
    for name in alone:
        K = alone.basis(name, torch.float64)
        assert all(torch.allclose(each[name] @ each[name].mT, K @ K.mT, atol=1e-9) for each, _ in found)
    assert "rank 1 could not write its part" in found[0][1]
    assert "missing" in found[1][1]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["null.safetensors"]


def _squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def _collect_gradients(rank: int) -> dict[str, Tensor]:
    return _content(NullSpace(energy=0.9).collect_gradients(_model(), _batches(5), _squares))


def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    found = launch(_collect_gradients, 3, tmp_path)
    alone = _collect_gradients(0)
    assert set(alone) == {"0.bias", "2.bias", "0.bias.bound", "2.bias.bound"}
    for name in ("0.bias", "2.bias"):
        assert all(torch.equal(each[name], found[0][name]) for each in found)
        assert torch.allclose(found[0][name] @ found[0][name].mT, alone[name] @ alone[name].mT, atol=1e-9)


def _from_sharded(rank: int) -> str:
    model = fully_shard(_model(), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match=r"0\.bias is sharded: collect gradients before fully_shard"):
        NullSpace().collect_gradients(model, _batches(1), _squares)
    return "refused"


def test_gradients_of_sharded_vectors_are_refused(tmp_path: Path) -> None:
    assert launch(_from_sharded, 2, tmp_path) == ["refused", "refused"]


def _different(rank: int) -> str:
    with pytest.raises(ValueError, match="shard=False"):
        NullSpace().collect(_model(), [batch + rank for batch in _batches(2)])
    return "refused"


def test_different_batches_are_refused(tmp_path: Path) -> None:
    assert launch(_different, 2, tmp_path) == ["refused", "refused"]
