"""The intact model is measured once for all runs that evaluate alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.unified_sr.checking import build_settings, changed
from examples.unified_sr.parts import Parts
from examples.unified_sr.run import run
from examples.unified_sr.run_folder import DONE
from examples.unified_sr.settings import Settings, flatten
from examples.unified_sr.zero_shot import Measured, ZeroShot, evaluates_alike

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
    assert ZeroShot.read(taken.path).metrics == ZeroShot.read(made.path).metrics, "and can be taken over in turn"


def test_what_is_not_trained_is_measured(settings: Settings, measured: Path, tmp_path: Path) -> None:
    untrained = run(changed(settings, {"training.steps": 0}), tmp_path / "run", quiet, zero_shot=measured)
    assert untrained.file("run.rec.trec").is_file()
    assert "zero-shot evaluation" in untrained.read_json("run.json")["seconds"]


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        (
            {"training.lr": 0.5, "seed": 9, "training.steps": 7, "training.batch_size": 2, "training.leak_tokens": 0},
            True,
        ),
        ({"evaluation.split": "valid"}, False),
        ({"evaluation.users": 3}, False),
        ({"data.source": "elsewhere"}, False),
        ({"model.name": "another"}, False),
        ({"model.max_history": 3}, False),
        ({"model.autocast": "bfloat16"}, False),
        ({"evaluation.multiple_choice_questions": 1}, False),
    ],
)
def test_only_settings_of_training_may_differ(
    changes: dict[str, object], alike: bool, settings: Settings, measured: Path
) -> None:
    assert evaluates_alike(measured, changed(settings, changes)) is alike
    gems = build_settings("gems", {**flatten(settings.model_dump()), **changes})
    assert evaluates_alike(measured, gems) is alike


def test_what_is_unfinished_or_has_no_model_is_not_taken(settings: Settings, measured: Path, tmp_path: Path) -> None:
    assert not evaluates_alike(tmp_path, settings)
    copy = shutil.copytree(measured, tmp_path / "copy")
    metrics = json.loads((copy / "metrics.json").read_text(encoding="utf-8"))
    (copy / "metrics.json").write_text(json.dumps({**metrics, "zero_shot": {}}), encoding="utf-8")
    assert not evaluates_alike(copy, settings)
    (copy / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert evaluates_alike(copy, settings)
    (copy / DONE).unlink()
    assert not evaluates_alike(copy, settings)
