from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from examples.unified_sr import config as config_module
from examples.unified_sr import settings as settings_module
from examples.unified_sr.checking import BEFORE, build_settings, changed, completed
from examples.unified_sr.config import beside, differences, read_config, resolve, to_yaml
from examples.unified_sr.methods import METHODS
from examples.unified_sr.settings import flatten, known_settings

DEMO = Path(__file__).parents[2] / "examples" / "unified_sr" / "configs"


@pytest.mark.parametrize("method", METHODS)
def test_defaults_survive_the_round_trip_through_yaml(method: str, tmp_path: Path) -> None:
    settings = resolve(flags={"method.name": method})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(settings), encoding="utf-8")
    assert resolve(file=file) == settings
    assert differences(read_config(file), settings) == []
    assert differences(yaml.safe_load(file.read_text(encoding="utf-8")), settings) == [], "in sections as well"


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_documented_and_every_default_is_one(method: str) -> None:
    known = known_settings(METHODS[method].settings)
    assert all(field.description for field in known.values())
    settings = flatten(build_settings(method, {}).model_dump())
    assert settings.keys() == known.keys()
    assert settings["method.name"] == method
    assert METHODS[method].defaults.items() <= settings.items()
    own = {*METHODS[method].defaults, *METHODS[METHODS[method].variant_of or method].defaults, "method.name"}
    assert all(settings[key] == field.default for key, field in known.items() if key not in own)


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(
        "training: {steps: 1, lr: 1.0e-2}\ntraining.batch_size: 3\n"
        "methods:\n  gems: {training.lr: 2.0e-2, method: {rank: 7}}\n  adamw: {training: {lr: 5.0e-1}}\n",
        encoding="utf-8",
    )
    settings = resolve(
        file=file,
        pairs=["training.steps=2", "training.batch_size=4"],
        flags={"training.steps": 5, "method.name": "gems"},
    )
    training = settings.training
    assert (training.steps, training.lr, training.batch_size, settings.method.rank) == (5, 0.02, 4, 7)
    assert resolve(file=file, flags={"method.name": "adamw"}).training.lr == 0.5
    assert resolve(file=file, flags={"method.name": "lora"}).training.lr == 0.01


def test_a_later_number_of_steps_wins_over_earlier_epochs(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("training: {epochs: 3, steps: 9}\nmethods: {lora: {training: {steps: 4}}}\n", encoding="utf-8")
    found = [
        resolve(file=file, **options).training
        for options in (
            {},
            {"flags": {"training.steps": 5}},
            {"pairs": ["training.steps=6"]},
            {"flags": {"method.name": "lora"}},
            {"pairs": ["training.steps=6", "training.epochs=2"]},
        )
    ]
    assert [(training.steps, training.epochs) for training in found] == [
        (9, 3),
        (5, None),
        (6, None),
        (4, None),
        (6, 2),
    ]
    assert doctest.testmod(config_module).attempted
    assert doctest.testmod(config_module).failed == 0


@pytest.mark.parametrize("variant", [name for name, method in METHODS.items() if method.defining])
def test_what_defines_a_method_holds_over_the_configuration_of_another(variant: str, tmp_path: Path) -> None:
    method = METHODS[variant]
    alike = [name for name, other in METHODS.items() if other.settings is method.settings and name != variant]
    for original in alike:
        file = tmp_path / f"{original}.yaml"
        file.write_text(to_yaml(resolve(flags={"method.name": original, "training.steps": 7})), encoding="utf-8")
        chosen = resolve(file=file, flags={"method.name": variant})
        assert method.defining.items() <= flatten(chosen.model_dump()).items()
        assert chosen.training.steps == 7, "all else is the file's"
        for key in method.defining:
            value = flatten(resolve(file=file).model_dump())[key]
            pairs = [f"{key}={json.dumps(value)}"]
            explicit = resolve(file=file, pairs=pairs, flags={"method.name": variant})
            assert flatten(explicit.model_dump())[key] == value
    own = tmp_path / "own.yaml"
    for key in method.defining:
        other = changed(resolve(flags={"method.name": variant}), {key: flatten(resolve().model_dump()).get(key)})
        own.write_text(to_yaml(other), encoding="utf-8")
        assert resolve(file=own) == resolve(file=own, flags={"method.name": variant}) == other


def test_what_defines_a_method_holds_beside_another_and_its_section_over_it(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    text = "method: {name: gems, protect: true, gate: uniform}\nbeside: {gems-no-null: a, gems-no-task: b}\n"
    section = "methods: {gems-no-task: {method: {task_subspaces: true}}}\n"
    file.write_text(text + section, encoding="utf-8")
    found = {name: settings for name, (settings, _) in beside(file, pairs=["method.protect=true"]).items()}
    assert found["gems-no-null"].method.protect is False
    assert found["gems-no-null"].method.gate == "uniform"
    assert found["gems-no-task"].method.task_subspaces is True


@pytest.mark.parametrize(("text", "value"), [("6e-4", 6e-4), ("1", 1.0), ("1.0e-3", 1e-3)])
def test_numbers_in_every_spelling(text: str, value: float) -> None:
    training = resolve(pairs=[f"training.lr={text}"]).training
    assert training.lr == value
    assert isinstance(training.lr, float)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("training.stepz=3", "no setting 'training.stepz'.*did you mean training.steps"),
        ("steps=3", "no setting 'steps' of the method 'gems'; did you mean training.steps?"),
        ("evaluation.lr=3", r"no setting 'evaluation.lr'.*did you mean training.lr\?"),
        ("eval_users=3", r"no setting 'eval_users'.*did you mean evaluation.users"),
        ("train_tasks=rec", r"no setting 'train_tasks'.*did you mean training.tasks"),
        ("zzzz=3", "no setting 'zzzz'.*the known ones are seed, data.source"),
        ("data=shop", "'data' is a section of settings such as data.source, got 'shop'"),
        (
            "method.alpha=3",
            "'gems' has no setting 'method.alpha', only lora has it; in a YAML file put it under methods",
        ),
        ("training.steps=2.5", "training.steps must be a valid integer, got 2.5 .optimizer steps"),
        ("training.steps=true", "training.steps must be a valid integer, got True"),
        ("training.steps='3'", "training.steps must be a valid integer, got '3'"),
        ("training.steps=-1", "training.steps must be greater than or equal to 0, got -1"),
        ("training.epochs=0", "training.epochs must be greater than or equal to 1 or null, got 0"),
        ("training.lr=fast", "training.lr must be a valid number, got 'fast'"),
        ("training.lr=0", "training.lr must be greater than 0, got 0"),
        ("training.lr=.nan", "training.lr must be a finite number, got nan"),
        ("training.lr=true", "training.lr must be a valid number, got True"),
        ("training.warmup=1.5", "training.warmup must be less than or equal to 1, got 1.5"),
        ("training.grad_clip=x", "training.grad_clip must be a valid number or null, got 'x'"),
        ("method.side=left", "method.side must be 'input' or 'output', got 'left'"),
        ("method.lr_scale=sgd", "method.lr_scale must be 'adamw' or null, got 'sgd'"),
        ("method.protect=1", "method.protect must be a valid boolean, got 1"),
        ("method.energy=2", "method.energy must be less than or equal to 1 or null, got 2"),
        ("data.source=3", "data.source must be a valid string, got 3"),
        ("seed=-1", "the setting seed must be greater than or equal to 0, got -1"),
        ("training.steps", "--set takes key=value, got 'training.steps'"),
        ("training.steps=[", r"training.steps: the value '\[' is not YAML"),
        ("method.name=gem", "no method 'gem'; did you mean 'gems'"),
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
        ("training: {stepz: 1}\n", "training.stepz"),
        ("steps: 1\n", "no setting 'steps'.*did you mean training.steps"),
        ("model: t5\n", "'model' is a section of settings such as model.name, got 't5'"),
        ("methods: [gems]\n", "must hold one mapping"),
        ("methods: {gemz: {}}\n", "no method 'gemz'"),
        ("methods: {lora: {method: {rnk: 3}}}\n", "'method.rnk'.*did you mean method.rank.*section methods.lora"),
        ("methods: {lora: {seed: 3}}\n", "'seed' cannot be set in the section"),
        (
            "methods: {lora: {training: {lr: -1}}}\n",
            "training.lr must be greater than 0, got -1.*section methods.lora",
        ),
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
        resolve(file=file, flags={"method.name": method})


def test_differences_name_changed_and_absent_settings() -> None:
    settings = resolve(pairs=["training.steps=7"])
    old = {**flatten(settings.model_dump()), "training.steps": 3, "training.gone": 1}
    assert differences(old, settings) == [
        "training.steps: 3 -> 7",
        "training.gone: 1 -> '(absent)'",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_that_a_run_lacks_was_its_default(method: str) -> None:
    settings = resolve(flags={"method.name": method})
    whole = flatten(settings.model_dump())
    for key in whole.keys() - {"method.name", *BEFORE}:
        old = {other: value for other, value in whole.items() if other != key}
        assert completed(old) == whole
        assert differences(old, settings) == []
    assert completed({"method.name": "of-another-revision"}) == {"method.name": "of-another-revision"}


def test_what_an_old_run_lacks_is_told_where_it_was_not_the_default() -> None:
    settings = resolve(flags={"method.name": "gems"})
    old = flatten(settings.model_dump())
    del old["method.others_lr"], old["method.normalize"], old["method.protect_others"]
    assert differences(old, changed(settings, {"method.normalize": False})) == []
    assert differences(old, settings) == ["method.normalize: False -> None"], "the default has changed since"
    old["method.normalize"] = None
    own = {"method.train_others": True, "method.others_lr": 1e-4}
    assert differences({**old, "method.train_others": True}, changed(settings, own)) == [
        "method.others_lr: None -> 0.0001"
    ]


def test_the_settings_of_a_run_before_they_had_sections_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: {source: here}\nlr: 0.1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.yaml: there is no setting 'lr'.*did you mean training.lr\?"):
        read_config(file)
    file.write_text("method: gems\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.yaml: 'method' is a section of settings such as method.name"):
        read_config(file)
    file.write_text("seed: 3\ntraining: {gone: 1}\n", encoding="utf-8")
    assert read_config(file) == {"seed": 3, "training.gone": 1}


def test_an_empty_section_is_none_and_settings_do_not_change(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("training:\nmodel: {}\nmethods: {lora: {method: }}\n", encoding="utf-8")
    settings: Any = resolve(file=file)
    assert settings == resolve()
    with pytest.raises(ValidationError, match="frozen"):
        settings.training.lr = 1.0
    other = changed(settings, {"training": {"lr": 0.5}})
    assert (other.training.lr, settings.training.lr) == (0.5, 6e-4)
    assert changed(other, {"training.lr": 6e-4}) == settings
    with pytest.raises(ValueError, match=r"training\.lr must be greater than 0"):
        changed(settings, {"training.lr": 0})
    assert doctest.testmod(settings_module).attempted
    assert doctest.testmod(settings_module).failed == 0
