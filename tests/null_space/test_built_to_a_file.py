"""`collect(out=)`: directions go to a file as they are found, and the null space lives there."""

from __future__ import annotations

import copy
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsub import NullSpace
from gradsub.null_space import _files
from gradsub.null_space._scratch import Scratch


class Blocks(nn.Module):
    """Layers that share inputs, of which one is never called."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.out = (nn.ModuleList(nn.Linear(12, 12) for _ in range(depth)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for query, key, out in zip(self.query, self.key, self.out, strict=True):
            x = x + out(torch.tanh(query(x)) * key(x))
        return x


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(25, 12, generator=generator) * torch.arange(1, 13) ** -1.0 for _ in range(2)]


def projectors(null_space: NullSpace) -> dict[str, Tensor]:
    found = {}
    for name in null_space:
        K, free = null_space.basis(name, torch.float64), null_space.complement(name, torch.float64)
        found[name] = K @ K.mT
        torch.testing.assert_close(found[name] + free @ free.mT, torch.eye(len(K), dtype=torch.float64))
    return found


@given(
    at_once=st.sampled_from([None, 1, 2, 5, 100]),
    options=st.sampled_from([{"energy": 0.5}, {"energy": 0.99}, {"energy": 1.0}, {"max_rank": 7}]),
    side=st.sampled_from(["input", "output"]),
)
@settings(max_examples=12, deadline=None)
def test_the_file_protects_what_is_protected_without_one(tmp_path_factory, at_once, options, side):
    path = tmp_path_factory.mktemp("made") / "null.safetensors"
    expected = NullSpace(side, **options).collect(Blocks(), batches())
    built = NullSpace(side, **options).collect(Blocks(), batches(), layers_at_once=at_once, out=path)
    assert list(path.parent.iterdir()) == [path]
    for each in (built, NullSpace.load(path), copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert sorted(each) == sorted(expected)
        assert repr(each) == repr(expected)
        torch.testing.assert_close(projectors(each), projectors(expected), atol=1e-9, rtol=0)
        for name in expected:
            assert each.protected_fraction(name) == expected.protected_fraction(name)
            assert each.version(name) == expected.version(name)


def test_directions_and_statistics_leave_the_memory_layer_by_layer(tmp_path, monkeypatch):
    null_space, seen = NullSpace(energy=0.9), []
    put = Scratch.put

    def counting(scratch: Scratch, tensor: Tensor) -> Tensor:
        kinds = [each.kind for each in null_space._shared.distinct().values()]
        seen.append((kinds.count("exact"), kinds.count("directions")))
        return put(scratch, tensor)

    monkeypatch.setattr(Scratch, "put", counting)
    null_space.collect(Blocks(3), batches(), layers_at_once=1, out=tmp_path / "null.safetensors")
    # One layer's statistics at any time; what was found before is on disk, and nothing is written twice.
    assert seen == [(1, count) for count in range(9)]


def test_nothing_is_copied_into_memory(tmp_path):
    """Its numbers are a view of one tensor for each input, which the file backs: a pickle holds each once."""
    null_space = NullSpace(energy=0.9).collect(Blocks(), batches(), out=tmp_path / "null.safetensors")
    size = (tmp_path / "null.safetensors").stat().st_size
    for name in null_space:
        statistics = null_space._statistics(name)
        assert statistics.protection.held.untyped_storage().data_ptr() == statistics.stored.untyped_storage().data_ptr()
    assert len(pickle.dumps(null_space)) < 3 * size


def test_what_was_there_stays_and_more_can_come(tmp_path):
    null_space = NullSpace(energy=0.9)
    null_space.update("other", torch.eye(5)[:2])
    null_space.collect(Blocks(), batches(), "query.*", layers_at_once=1, out=tmp_path / "null.safetensors")
    null_space.update("other", torch.eye(5)[2:3])
    assert null_space.basis("other").shape == (5, 3)
    assert NullSpace.load(tmp_path / "null.safetensors").basis("other").shape == (5, 2)
    null_space.collect(Blocks(), batches(), "key.*", layers_at_once=1, out=tmp_path / "null.safetensors")
    assert len(NullSpace.load(tmp_path / "null.safetensors")) == 5
    torch.testing.assert_close(projectors(NullSpace.load(tmp_path / "null.safetensors")), projectors(null_space))


@contextmanager
def full_disk(left: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: writing raises, as it does where there is no room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("left", [0, 100, 900, 3000])
@pytest.mark.parametrize("way", ["save", "directions", "collect"])
def test_a_full_disk_leaves_the_earlier_file(tmp_path, left, way):
    path = tmp_path / "null.safetensors"
    NullSpace(energy=0.5).collect(Blocks(), batches(), out=path)
    content = path.read_bytes()
    null_space = NullSpace(energy=0.9)

    def write() -> None:
        if way == "collect":
            null_space.collect(Blocks(), batches(), layers_at_once=2, out=path)
        else:
            null_space.collect(Blocks(), batches()).save(path, statistics=way == "save")

    with full_disk(left), pytest.raises(OSError, match="make room there") as raised:
        write()
    assert "null.safetensors" in str(raised.value)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("why", ["no folder", "no safetensors"])
def test_a_file_that_cannot_be_written_is_said_before_anything_runs(tmp_path, monkeypatch, why):
    def missing(*names: str) -> None:
        raise ImportError(names)

    if why == "no safetensors":
        monkeypatch.setattr(_files, "optional", missing)
    batches = ["no batch that the model takes"]
    path = tmp_path / ("missing/null.safetensors" if why == "no folder" else "null.safetensors")
    with pytest.raises(OSError if why == "no folder" else ImportError):
        NullSpace().collect(Blocks(), batches, out=path)
    assert list(tmp_path.iterdir()) == []


def test_what_interrupts_the_building_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "null.safetensors"
    NullSpace().collect(Blocks(), batches(), out=path)
    content = path.read_bytes()

    class Unused(nn.Identity):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

    class Failing(list[Tensor]):
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            if self.passes == 3:
                raise KeyboardInterrupt
            return super().__iter__()

    with pytest.raises(KeyboardInterrupt):
        NullSpace().collect(Blocks(), Failing(batches()), layers_at_once=1, out=path)
    with pytest.raises(ValueError, match="saw any features"):
        NullSpace().collect(Unused(), batches(), out=path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_seen_before_the_first_pass(tmp_path: Path):
    class Never(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            pytest.fail("no batch should be run")

    with pytest.raises(FileNotFoundError, match="missing"):
        NullSpace().collect(Blocks(), Never(batches()), out=tmp_path / "missing" / "null.safetensors")
