from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from examples.unified_sr.config import differences, resolve, to_yaml
from examples.unified_sr.methods import METHODS

DEMO = Path(__file__).parents[2] / "examples" / "unified_sr" / "configs"


@pytest.mark.parametrize("method", METHODS)
def test_defaults_survive_the_round_trip_through_yaml(method: str, tmp_path: Path) -> None:
    settings = resolve(flags={"method": method})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(settings), encoding="utf-8")
    assert resolve(file=file) == settings
    assert differences(yaml.safe_load(file.read_text(encoding="utf-8")), settings) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_method_names_itself_and_documents_every_setting(method: str) -> None:
    owner = METHODS[method].settings
    assert owner.method == method
    assert all(item.metadata["doc"] for item in fields(owner))


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(
        "steps: 1\nlr: 1.0e-2\nbatch_size: 3\nmethods:\n  gems: {lr: 2.0e-2, rank: 7}\n  adamw: {lr: 5.0e-1}\n",
        encoding="utf-8",
    )
    settings = resolve(file=file, pairs=["steps=2", "batch_size=4"], flags={"steps": 5, "method": "gems"})
    assert (settings.steps, settings.lr, settings.batch_size, settings.rank) == (5, 0.02, 4, 7)  # type: ignore[attr-defined]
    assert resolve(file=file, flags={"method": "adamw"}).lr == 0.5
    assert resolve(file=file, flags={"method": "lora"}).lr == 0.01


@pytest.mark.parametrize(("text", "value"), [("6e-4", 6e-4), ("1", 1.0), ("1.0e-3", 1e-3)])
def test_numbers_in_every_spelling(text: str, value: float) -> None:
    settings = resolve(pairs=[f"lr={text}"])
    assert settings.lr == value
    assert isinstance(settings.lr, float)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("stepz=3", "no setting 'stepz'.*did you mean steps"),
        ("zzzz=3", "no setting 'zzzz'.*the known ones are data, model"),
        ("alpha=3", "'gems' has no setting 'alpha', only lora has it"),
        ("steps=2.5", "steps must be a whole number, got 2.5"),
        ("steps=true", "steps must be a whole number, got True"),
        ("steps=-1", "steps must be at least 0, got -1"),
        ("lr=fast", "lr must be a number, got 'fast'"),
        ("lr=0", "lr must be more than 0, got 0"),
        ("lr=.nan", "lr must be a number, got nan"),
        ("warmup=1.5", "warmup must be at most 1, got 1.5"),
        ("side=left", "side must be one of 'input', 'output', got 'left'"),
        ("protect=1", "protect must be true or false, got 1"),
        ("energy=2", "energy must be at most 1, got 2"),
        ("data=3", "data must be text, got 3"),
        ("steps", "--set takes key=value, got 'steps'"),
        ("steps=[", "steps: the value '\\[' is not YAML"),
        ("method=gem", "no method 'gem'; did you mean 'gems'"),
    ],
)
def test_what_is_wrong_is_named(pair: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(pairs=[pair])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "must be a mapping"),
        ("a: [\n", "is not YAML"),
        ("stepz: 1\n", "stepz"),
        ("methods: [gems]\n", "must hold one mapping"),
        ("methods: {gemz: {}}\n", "no method 'gemz'"),
        ("methods: {lora: {rnk: 3}}\n", "'rnk'.*did you mean rank.*section methods.lora"),
        ("methods: {lora: {seed: 3}}\n", "'seed' cannot be set in the section"),
    ],
)
def test_a_bad_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        resolve(file=file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml.*pass the path"):
        resolve(file=tmp_path / "none.yaml")


@pytest.mark.parametrize("file", sorted(DEMO.glob("*.yaml")), ids=lambda file: file.name)
def test_committed_configurations_are_valid(file: Path) -> None:
    for method in METHODS:
        resolve(file=file, flags={"method": method})


def test_differences_name_changed_and_absent_settings() -> None:
    settings = resolve(pairs=["steps=7"])
    old = {**yaml.safe_load(to_yaml(settings)), "steps": 3, "gone": 1}
    del old["seed"]
    assert differences(old, settings) == ["steps: 3 -> 7", "seed: '(absent)' -> 0", "gone: 1 -> '(absent)'"]


def test_an_old_run_lacks_no_setting_that_is_off() -> None:
    settings = resolve(flags={"method": "gems"})
    old = yaml.safe_load(to_yaml(settings))
    del old["others_lr"], old["normalize"], old["protect_others"]
    assert differences(old, settings) == []
    trained = resolve(flags={"method": "gems"}, pairs=["train_others=true", "others_lr=1.0e-4"])
    assert differences({**old, "train_others": True}, trained) == ["others_lr: None -> 0.0001"]
