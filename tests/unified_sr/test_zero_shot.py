"""The intact model is measured once for all runs that evaluate alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples.unified_sr.checking import build_settings, changed
from examples.unified_sr.data import load_dataset
from examples.unified_sr.general_text import load_general_text
from examples.unified_sr.model import load_language_model
from examples.unified_sr.parts import Parts
from examples.unified_sr.precision import choose_precision
from examples.unified_sr.run import run
from examples.unified_sr.run_folder import DONE
from examples.unified_sr.settings import DatasetSettings, Settings, flatten
from examples.unified_sr.zero_shot import Measured, Shared, ZeroShot

QUESTION = {
    "instruction": "Please choose. question: What is wet? Answer1: water Answer2: sand Answer format: answer1/answer2",
    "answer": "answer1",
}


@pytest.fixture(scope="module")
def settings(llama_folder: str, data_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    questions = tmp_path_factory.mktemp("questions") / "all.json"
    questions.write_text(json.dumps([QUESTION, QUESTION]), encoding="utf-8")
    common = {
        "training.batch_size": 4,
        "evaluation.perplexity_tokens": 64,
        "evaluation.perplexity_window": 64,
        "data.min_user_events": 3,
        "training.steps": 2,
    }
    data = {"model.name": llama_folder, "data.source": data_folder, "evaluation.multiple_choice": str(questions)}
    return build_settings("adamw", {**common, **data})


def quiet(line: str) -> None:
    del line


@pytest.fixture(scope="module")
def measured(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(settings, tmp_path_factory.mktemp("first") / "run", quiet).path


def test_a_taken_measurement_gives_the_same_files(
    settings: Settings, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = changed(settings, {"training.lr": 1e-3, "seed": 3})
    made = run(other, tmp_path / "made", quiet)
    evaluations: list[str] = []
    measure: Callable[[Parts, str], Measured] = Parts.measure

    def spy(parts: Parts, name: str) -> Measured:
        evaluations.append(name)
        return measure(parts, name)

    monkeypatch.setattr(Parts, "measure", spy)
    said: list[str] = []
    taken = run(other, tmp_path / "taken", said.append, zero_shot=measured)
    assert evaluations == ["adamw"], "only what training left is measured"
    assert f"zero-shot: as measured in {measured}" in said
    for name in ("metrics.json", "metrics.sampled.json"):
        assert taken.read_json(name) == made.read_json(name)
    summaries = [folder.read_json("run.json") for folder in (taken, made)]
    assert summaries[0]["multiple_choice"] == summaries[1]["multiple_choice"] != {}
    assert "zero-shot evaluation" not in summaries[0]["seconds"]
    found = [ZeroShot.taken(folder.path, folder.read_json("run.json")["intact"]) for folder in (taken, made)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].metrics == found[1].metrics, "and can be taken over in turn"


def test_what_is_not_trained_is_measured(settings: Settings, measured: Path, tmp_path: Path) -> None:
    untrained = run(changed(settings, {"training.steps": 0}), tmp_path / "run", quiet, zero_shot=measured)
    assert untrained.file("run.rec.trec").is_file()
    assert "zero-shot evaluation" in untrained.read_json("run.json")["seconds"]


def intact(settings: Settings) -> str:
    """What a run with these settings would measure of the intact model."""
    model, text = load_language_model(settings.model.name), load_general_text(settings.evaluation.general_text)
    dataset = load_dataset(**dict(DatasetSettings.of(settings)))
    return Parts.assemble(settings, dataset, model, text, choose_precision(settings.model)).intact


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        (
            {"training.lr": 0.5, "seed": 9, "training.steps": 7, "training.batch_size": 2, "training.leak_tokens": 0},
            True,
        ),
        ({"evaluation.split": "valid"}, False),
        ({"evaluation.users": 3}, False),
        ({"model.max_history": 3}, False),
        ({"model.autocast": "bfloat16"}, False),
        ({"evaluation.multiple_choice_questions": 1}, False),
    ],
)
def test_only_settings_of_training_may_differ(
    changes: dict[str, object], alike: bool, settings: Settings, measured: Path
) -> None:
    for method in ("adamw", "gems"):
        own = build_settings(method, {**flatten(settings.model_dump()), **changes})
        assert (ZeroShot.taken(measured, intact(own)) is not None) is alike


@pytest.fixture
def copied(settings: Settings, tmp_path: Path) -> Settings:
    """The same settings with a model, data, text and questions of their own, which may be exchanged."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Number {n} is followed by number {n + 1}, as ever." for n in range(99)), "utf-8")
    questions = Path(shutil.copy(str(settings.evaluation.multiple_choice), tmp_path))
    folders = {
        key: shutil.copytree(place, tmp_path / key)
        for key, place in (("model.name", settings.model.name), ("data.source", settings.data.source))
    }
    files = {"evaluation.general_text": text, "evaluation.multiple_choice": questions, **folders}
    return changed(settings, {key: str(path) for key, path in files.items()})


def exchange(settings: Settings, what: str) -> None:
    """Put something else in the place of a file."""
    if what == "weights":
        model = load_language_model(settings.model.name).model
        with torch.no_grad():
            model.model.norm.weight += 0.5
        model.save_pretrained(settings.model.name)
        return
    folder = Path(settings.data.source)
    file, old, new = {
        "configuration": (Path(settings.model.name, "config.json"), '"silu"', '"relu"'),
        "text": (Path(str(settings.evaluation.general_text)), "followed", "preceded"),
        "questions": (Path(str(settings.evaluation.multiple_choice)), "sand", "fire"),
        "titles": (folder / "shop.item", "chair", "bench"),
        "events": (folder / "shop.inter", "\t11\tred", "\t11\tblue"),
    }[what]
    content = file.read_text(encoding="utf-8")
    assert old in content
    file.write_text(content.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("what", ["weights", "configuration", "text", "questions", "titles", "events"])
def test_what_is_exchanged_under_its_name_is_measured_anew(what: str, copied: Settings) -> None:
    before = intact(copied)
    assert intact(copied) == before
    exchange(copied, what)
    assert intact(copied) != before


def test_a_grid_or_a_folder_never_hands_on_what_another_text_gave(copied: Settings, tmp_path: Path) -> None:
    shared = Shared(tmp_path / "intact")
    still = changed(copied, {"training.lr": 1e-12, "training.item_lr": 1e-12, "training.steps": 1})
    first = run(still, tmp_path / "first", quiet, measured=shared)
    exchange(still, "text")
    for out, options in (("second", {"measured": shared}), ("third", {"zero_shot": first.path})):
        metrics = run(still, tmp_path / out, quiet, **options).read_json("metrics.json")
        perplexities = [metrics[part]["general"]["perplexity"] for part in ("zero_shot", "final")]
        assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-6)


def test_what_is_unfinished_or_has_no_model_is_not_taken(settings: Settings, measured: Path, tmp_path: Path) -> None:
    name = intact(settings)
    assert ZeroShot.taken(tmp_path, name) is None
    copy = shutil.copytree(measured, tmp_path / "copy")
    assert ZeroShot.taken(copy, name) is not None
    summary = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    del summary["intact"]
    (copy / "run.json").write_text(json.dumps(summary), encoding="utf-8")
    assert ZeroShot.taken(copy, name) is None, "as an earlier revision, or a method without a model, leaves it"
    shutil.copy(measured / "run.json", copy)
    (copy / DONE).unlink()
    assert ZeroShot.taken(copy, name) is None
