"""The configurations that come along run as they are on miniatures of the architectures that they are meant for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.unified_sr.cli import main
from examples.unified_sr.config import read_config, read_yaml
from examples.unified_sr.grid import read_grid
from examples.unified_sr.grid._jobs import list_jobs
from examples.unified_sr.methods import METHODS
from examples.unified_sr.settings import flatten

CONFIGS = Path(__file__).resolve().parent.parent.parent / "examples" / "unified_sr" / "configs"


@pytest.mark.parametrize(
    ("name", "model", "own"),
    [
        ("paper-t5-base", "t5", {"training.batch_size": 128, "training.accumulation": 4, "evaluation.compat": "gems"}),
        (
            "decoder-1b",
            "llama",
            {"training.gradient_checkpointing": True, "training.accumulation": 4, "model.autocast": "bfloat16"},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*rank.*:UserWarning", "ignore:.*protects all.*:UserWarning")
def test_two_steps_of_a_miniature(
    name: str,
    model: str,
    own: dict[str, object],
    data_folder: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    lines = (f"The sentence with the number {number} says something new." for number in range(200))
    text.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "run"
    line = ["run", "--config", str(CONFIGS / f"{name}.yaml"), "--model", request.getfixturevalue(f"{model}_folder")]
    line += ["--data", data_folder, "--general-text", str(text), "--steps", "2", "--out", str(out)]
    assert main([*line, "--set", "training.epochs=null", "training.early_stop=null", "data.min_user_events=3"]) == 0
    assert "memory: training takes about" in capsys.readouterr().out
    used = read_config(out / "config.yaml")
    written = read_yaml(CONFIGS / f"{name}.yaml")
    settings = {**flatten(written), **flatten(written["methods"][written["method"]["name"]])}
    other = ("methods.", "model.name", "training.steps", "training.epochs", "training.early_stop")
    settings = {key: value for key, value in settings.items() if not key.startswith(other)}
    assert settings.items() <= used.items()
    assert own.items() <= used.items()
    summary = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2
    assert summary["peak_memory"]["resident"] > 0


def test_the_whole_comparison_has_every_method(tmp_path: Path) -> None:
    grid = read_grid(CONFIGS / "grids" / "main.yaml", data=[f"amazon-industrial={tmp_path}"])
    assert {entry.method for entry in grid.entries} == set(METHODS)
    jobs = list_jobs(grid)
    assert len({job.name for job in jobs}) == len(jobs)
    rated = {job.entry.method for job in jobs if job.rate is not None}
    assert rated == {name for name, method in METHODS.items() if method.build is not None}
    for job in jobs:
        job.settings()
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs), "one seed of everything after the other"


def test_the_short_grid_is_a_part_of_the_whole_comparison(tmp_path: Path) -> None:
    whole, short = (
        read_grid(CONFIGS / "grids" / f"{name}.yaml", data=[f"amazon-industrial={tmp_path}"])
        for name in ("main", "short")
    )
    assert whole.data.keys() == short.data.keys()
    entries = {entry.name: entry for entry in whole.entries}
    training = ("item_lr", "batch_size", "accumulation", "steps", "epochs", "early_stop", "checkpoint_every")
    lengths = {"method.update_proj_gap", "model.max_history", *(f"training.{name}" for name in training)}
    evaluation = ("users", "perplexity_tokens", "multiple_choice_questions")
    sizes = {"model.inference_tokens", *(f"evaluation.{name}" for name in evaluation)}
    jobs = {(job.data, job.entry.name): job for job in list_jobs(whole) if job.rate is None and job.seed == 0}
    for job in list_jobs(short):
        if job.rate is None and job.seed == 0:
            assert job.entry.method == entries[job.entry.name].method
            same = flatten(jobs[job.data, job.entry.name].settings(1e-3).model_dump())
            found = flatten(job.settings(1e-3).model_dump())
            assert {key for key in same if same[key] != found[key]} <= lengths | sizes
