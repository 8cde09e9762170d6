"""A null space is fitted once for each model, text and criterion; a file that is damaged is made again."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting_process import fit
from method_worlds import built, losses

from examples.unified_sr.null_space_cache import fingerprint
from gradsub import NullSpace


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADSUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "null_spaces"


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    collect = NullSpace.collect

    def counted(self: NullSpace, *arguments: Any, **options: Any) -> NullSpace:
        calls.append(1)
        return collect(self, *arguments, **options)

    monkeypatch.setattr(NullSpace, "collect", counted)
    return calls


def trained(folder: str, *pairs: str, method: str = "gems", tokens: int = 256) -> list[torch.Tensor]:
    torch.manual_seed(0)
    ranker, updater = built(folder, method, *pairs, tokens=tokens)
    for _ in range(3):
        updater.update([*losses(ranker).values()])
    return [parameter.detach().clone() for parameter in ranker.parameters()]


def test_a_grid_fits_it_once_and_trains_alike(llama_folder: str, cache: Path, fitted: list[int]) -> None:
    first = trained(llama_folder)
    assert len(fitted) == 1
    assert len(list(cache.iterdir())) == 1
    second = trained(llama_folder)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    trained(llama_folder, "training.lr=1e-3", "method.rank=2")
    trained(llama_folder, method="gems-uniform")
    assert len(fitted) == 1


@pytest.mark.parametrize(
    "pairs",
    [
        ("method.energy=0.9",),
        ("method.normalize=true",),
        ("method.side=output",),
        ("method.train_others=true", "method.protect_others=true"),
    ],
)
def test_another_criterion_is_another_null_space(
    llama_folder: str, cache: Path, fitted: list[int], pairs: tuple[str, ...]
) -> None:
    built(llama_folder, "gems")
    built(llama_folder, "gems", *pairs)
    assert len(fitted) == 2
    built(llama_folder, "gems", *pairs)
    assert len(fitted) == 2


def test_another_model_and_another_text_are_another_null_space(
    llama_folder: str, untied_folder: str, cache: Path, fitted: list[int]
) -> None:
    built(llama_folder, "gems")
    built(untied_folder, "gems")
    built(llama_folder, "gems", tokens=128)
    assert len(fitted) == 3

    def change(ranker: Any) -> None:
        with torch.no_grad():
            ranker.embedding.base.weight[0, 0] += 1e-3

    built(llama_folder, "gems", before=change)
    assert len(fitted) == 4


@pytest.mark.parametrize("content", [b"", b"no file of safetensors at all"])
def test_a_file_that_cannot_be_used_is_made_again(
    llama_folder: str, cache: Path, fitted: list[int], content: bytes
) -> None:
    built(llama_folder, "gems")
    (file,) = cache.iterdir()
    file.write_bytes(content)
    built(llama_folder, "gems")
    assert len(fitted) == 2
    built(llama_folder, "gems")
    assert len(fitted) == 2


def test_without_a_cache_or_where_it_cannot_be_written(
    llama_folder: str, tmp_path: Path, fitted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in ("", str(tmp_path / "file")):
        monkeypatch.setenv("GRADSUB_CACHE", place)
        built(llama_folder, "gems")
    assert len(fitted) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_configuration_counts_and_the_catalogue_does_not(
    llama_folder: str, cache: Path, fitted: list[int], tmp_path: Path
) -> None:
    """The same weights compute something else with another activation, and other items change no word."""
    built(llama_folder, "gems")
    shutil.copytree(llama_folder, tmp_path / "copy")
    built(str(tmp_path / "copy"), "gems")
    assert len(fitted) == 1, "wherever the model lies"
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "hidden_act": "relu"}), "utf-8")
    built(str(tmp_path / "copy"), "gems")
    assert len(fitted) == 2

    def rename(ranker: Any) -> None:
        with torch.no_grad():
            for rows in ranker.item_parameters():
                rows += 1.0

    built(llama_folder, "gems", before=rename)
    assert len(fitted) == 2
    others = ("method.train_others=true", "method.protect_others=true")
    bases = []
    for change in (rename, lambda ranker: None):
        for path in cache.iterdir():
            path.unlink()
        built(llama_folder, "gems", *others, before=change)
        bases.append(NullSpace.load(next(cache.iterdir())))
    assert all(torch.equal(bases[0].basis(name), bases[1].basis(name)) for name in bases[0]), "so it may be left out"


def test_the_name_depends_on_every_weight_token_and_setting() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    tokens = [{"input_ids": torch.arange(4)[None]}]
    names = {fingerprint(model, tokens, {"energy": 0.9})}
    assert names == {fingerprint(model, list(tokens), {"energy": 0.9})}
    names.add(fingerprint(model, tokens, {"energy": 0.91}))
    names.add(fingerprint(model, [{"input_ids": torch.arange(4)[None] + 1}], {"energy": 0.9}))
    names.add(fingerprint(model.float(), tokens, {"energy": 0.9}))
    assert len(names) == 4
    model.register_buffer("scale", torch.ones(1))
    names.add(fingerprint(model, tokens, {"energy": 0.9}))
    assert len(names) == 5
    assert fingerprint(model, tokens, {}, without=[model.weight]) != fingerprint(model, tokens, {})


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs a fork server")
def test_of_several_processes_one_fits_even_if_one_has_died_over_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["examples.unified_sr.grid"])

    def started(count: int, *, dying: bool) -> list[Any]:
        arguments = (str(tmp_path / "cache"), str(tmp_path), dying)
        processes = [context.Process(target=fit, args=arguments) for _ in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return processes

    started(1, dying=True)
    assert len(list(tmp_path.glob("*.fit"))) == 1
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert [process.exitcode for process in started(4, dying=False)] == [0] * 4, "the lock is free"
    assert len(list(tmp_path.glob("*.fit"))) == 2
    said = [path.read_text(encoding="utf-8") for path in tmp_path.glob("*.said")]
    assert sum("as fitted before" in text for text in said) == 3
    bases = [torch.load(path) for path in tmp_path.glob("*.pt")]
    assert len(bases) == 4
    assert all(torch.equal(basis, bases[0]) for basis in bases)
