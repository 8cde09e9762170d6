"""A file that is damaged, foreign or impossible is refused at the load, and saving never damages one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gradsub import NullSpace

KINDS = {"exact": None, "sketch": 8 * 4 * 6}  # bytes; the sketch of "query" has 8 rows of 6 float32 features
LAYER = "block.0.query"


def collected(kind: str) -> NullSpace:
    null_space = NullSpace(max_rank=2, layer_memory_budget=KINDS[kind])
    null_space.update(LAYER, torch.randn(30, 6))
    null_space.update("block.0.value", torch.randn(20, 6))
    return null_space


def tampered(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Rewrite a file after ``change`` was let loose on its tensors and its header's tables."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = {key: value if key == "format" else json.loads(value) for key, value in file.metadata().items()}
    change(tensors, header)
    save_file(tensors, path, {key: value if key == "format" else json.dumps(value) for key, value in header.items()})


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError, match=r"null\.safetensors'") as raised:
        NullSpace.load(path)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def entry(value: float, place: tuple[int, int] = (1, 2)) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


@pytest.mark.parametrize("kind", [*KINDS, "directions"])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 200, 0.5, 0.99, -1])
def test_a_truncated_or_empty_file(tmp_path, kind, kept):
    path = tmp_path / "null.safetensors"
    if kind == "directions":
        collected("exact").save(path, statistics=False)
    else:
        collected(kind).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(path)


@pytest.mark.parametrize("content", [b"{}", b"PK\x03\x04" + bytes(100), bytes(64), b"\xff" * 64])
def test_another_kind_of_file(tmp_path, content):
    path = tmp_path / "null.safetensors"
    path.write_bytes(content)
    refused(path)


def test_a_checkpoint_of_torch_and_the_weights_of_a_model(tmp_path):
    path = tmp_path / "null.safetensors"
    torch.save({LAYER: torch.eye(6)}, path)
    refused(path)
    for metadata in (None, {"format": "pt"}):
        save_file({LAYER: torch.eye(6)}, path, metadata)
        refused(path, "no file of NullSpace.save")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        entry(float("nan")),
        entry(float("inf")),
        entry(-float("inf"), (0, 0)),
        lambda tensor: tensor.to(torch.float16),
        lambda tensor: tensor.to(torch.bfloat16),
        lambda tensor: tensor.to(torch.int64),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor[0],
        lambda tensor: tensor[None],
        lambda tensor: tensor[:, :0],
    ],
    ids=["nan", "inf", "-inf", "float16", "bfloat16", "int64", "complex64", "vector", "three axes", "no features"],
)
def test_statistics_that_are_no_finite_matrix(tmp_path, kind, change):
    path = tmp_path / "null.safetensors"
    collected(kind).save(path)
    tampered(path, lambda tensors, header: tensors.update({LAYER: change(tensors[LAYER]).contiguous()}))
    refused(path, LAYER)


@pytest.mark.parametrize(
    "change",
    [
        lambda total: -total,
        lambda total: total - total.trace() * torch.eye(6, dtype=total.dtype),
        lambda total: total - 1.01 * torch.linalg.eigvalsh(total)[0] * torch.eye(6, dtype=total.dtype),
        entry(-1.0, (3, 3)),
        entry(1e3),
        lambda total: total.triu(),
        lambda total: total[:5],
    ],
    ids=["negated", "shifted far", "shifted just", "diagonal", "asymmetric", "triangle", "oblong"],
)
def test_a_covariance_that_no_features_have(tmp_path, change):
    path = tmp_path / "null.safetensors"
    collected("exact").save(path)
    tampered(path, lambda tensors, header: tensors.update({LAYER: change(tensors[LAYER]).contiguous()}))
    refused(path, LAYER)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: header.pop("settings"),
        lambda tensors, header: header.pop("statistics"),
        lambda tensors, header: header.pop("layers"),
        lambda tensors, header: header.pop("versions"),
        lambda tensors, header: header.update(settings=[1]),
        lambda tensors, header: header["settings"].pop("side"),
        lambda tensors, header: header["settings"].update(side="both"),
        lambda tensors, header: header["settings"].update(energy=float("nan")),
        lambda tensors, header: header["settings"].update(threshold="high"),
        lambda tensors, header: header["settings"].update(more=1),
        lambda tensors, header: header["statistics"].pop(LAYER),
        lambda tensors, header: header["statistics"].update({LAYER: 3}),
        lambda tensors, header: header["statistics"][LAYER].update(kind="other"),
        lambda tensors, header: header["statistics"][LAYER].pop("count"),
        lambda tensors, header: header["statistics"][LAYER].update(count=-1),
        lambda tensors, header: header["statistics"][LAYER].update(count=0),
        lambda tensors, header: header["statistics"][LAYER].update(count=2.5),
        lambda tensors, header: header["statistics"][LAYER].update(count=float("nan")),
        lambda tensors, header: header["layers"].update({LAYER: "nowhere"}),
        lambda tensors, header: header["layers"].update({LAYER: [1]}),
        lambda tensors, header: header["layers"].clear(),
        lambda tensors, header: header["versions"].pop(LAYER),
        lambda tensors, header: header["versions"].update({LAYER: "two"}),
        lambda tensors, header: header["normalized"].update({LAYER: 1}),
        lambda tensors, header: header["normalized"].update(nowhere=True),
        lambda tensors, header: tensors.update(more=torch.eye(3)),
        lambda tensors, header: tensors.pop(LAYER),
    ],
)
def test_a_header_that_does_not_fit(tmp_path, kind, change):
    path = tmp_path / "null.safetensors"
    collected(kind).save(path)
    tampered(path, change)
    refused(path)


@pytest.mark.parametrize(
    "numbers",
    [
        {"capacity": 2},
        {"capacity": 0},
        {"capacity": "8"},
        {"energy": float("nan")},
        {"energy": -1.0},
        {"energy": 1e-9},
        {"energy": None},
        {"loss": float("inf")},
        {"loss": -1e-3},
        {"loss": True},
    ],
    ids=str,
)
def test_a_sketch_with_numbers_that_cannot_be(tmp_path, numbers):
    path = tmp_path / "null.safetensors"
    collected("sketch").save(path)
    tampered(path, lambda tensors, header: header["statistics"][LAYER].update(numbers))
    refused(path, LAYER)


@given(
    dimension=st.integers(1, 12),
    rows=st.integers(1, 20),
    scale=st.sampled_from([0.0, 1e-30, 1e-8, 1.0, 1e15]),
    rank=st.integers(1, 12),
    kind=st.sampled_from(["exact", "sketch"]),
)
def test_whatever_features_leave_is_loaded(tmp_path, dimension, rows, scale, rank, kind):
    """Of low rank, tiny, huge or zero: rounding is no damage."""
    budget = None if kind == "exact" else 3 * 4 * dimension
    null_space = NullSpace(max_rank=1, layer_memory_budget=budget)
    for _ in range(3):
        null_space.update("layer", scale * torch.randn(rows, rank) @ torch.randn(rank, dimension))
    null_space.save(tmp_path / "null.safetensors")
    loaded = NullSpace.load(tmp_path / "null.safetensors")
    assert torch.equal(loaded.eigenvalues("layer"), null_space.eigenvalues("layer"))


@pytest.mark.parametrize("fails", ["before", "halfway", "at the end"])
def test_a_save_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "null.safetensors"
    collected("exact").save(path)
    content = path.read_bytes()

    def failing(tensors: dict[str, Tensor], name: str, metadata: dict[str, str]) -> None:
        if fails != "before":
            save_file(tensors, name, metadata)
        if fails == "halfway":
            Path(name).write_bytes(Path(name).read_bytes()[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", failing)
    with pytest.raises(OSError, match="no space left"):
        collected("exact").save(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_file_stays_one(tmp_path):
    (tmp_path / "folder").mkdir()
    path, link = tmp_path / "folder" / "null.safetensors", tmp_path / "link"
    link.symlink_to(path)
    collected("exact").save(link)
    assert link.is_symlink()
    assert len(NullSpace.load(path)) == 2
