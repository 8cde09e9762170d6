"""The configurations that come along run as they are on miniatures of the architectures that they are meant for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from examples.unified_sr.cli import main
from examples.unified_sr.config import read_yaml
from examples.unified_sr.grid import list_jobs, read_grid
from examples.unified_sr.methods import METHODS

CONFIGS = Path(__file__).resolve().parent.parent.parent / "examples" / "unified_sr" / "configs"


@pytest.mark.parametrize(
    ("name", "model", "own"),
    [
        ("paper-t5-base", "t5", {"batch_size": 128, "accumulation": 4, "compat": "gems"}),
        ("decoder-1b", "llama", {"gradient_checkpointing": True, "accumulation": 4, "autocast": "bfloat16"}),
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
    assert main([*line, "--set", "epochs=null", "early_stop=null", "min_user_events=3"]) == 0
    assert "memory: about" in capsys.readouterr().out
    used = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    written = read_yaml(CONFIGS / f"{name}.yaml")
    settings = {**written, **written["methods"][written["method"]]}
    changed = {"methods", "model", "steps", "epochs", "early_stop"}
    assert {key: used[key] for key in settings if key not in changed} == {
        key: value for key, value in settings.items() if key not in changed
    }
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


def test_the_longer_runs_differ_from_the_comparison_in_their_steps_alone(tmp_path: Path) -> None:
    whole = read_grid(CONFIGS / "grids" / "main.yaml", data=[f"amazon-industrial={tmp_path}"])
    same = {(job.entry.name, job.seed): job for job in list_jobs(whole, ["movielens/*"]) if job.rate is None}
    jobs = list_jobs(read_grid(CONFIGS / "grids" / "longer.yaml"))
    assert jobs
    for job in jobs:
        settings, short = job.settings(), same[job.entry.name, job.seed]
        assert settings == replace(short.settings(settings.lr), steps=120)
