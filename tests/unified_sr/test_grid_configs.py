"""The configurations that come along run as they are on miniatures of the architectures that they are meant for."""

from __future__ import annotations

import json
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


def test_the_short_grid_is_a_part_of_the_whole_comparison(tmp_path: Path) -> None:
    whole, short = (
        read_grid(CONFIGS / "grids" / f"{name}.yaml", data=[f"amazon-industrial={tmp_path}"])
        for name in ("main", "short")
    )
    assert whole.data.keys() == short.data.keys()
    entries = {entry.name: entry for entry in whole.entries}
    lengths = ("update_proj_gap", "max_history", "batch_size", "accumulation", "steps", "epochs", "early_stop")
    sizes = ("eval_users", "eval_tokens", "perplexity_tokens", "multiple_choice_questions", "checkpoint_every")
    jobs = {(job.data, job.entry.name): job for job in list_jobs(whole) if job.rate is None and job.seed == 0}
    for job in list_jobs(short):
        if job.rate is None and job.seed == 0:
            assert job.entry.method == entries[job.entry.name].method
            same = vars(jobs[job.data, job.entry.name].settings(1e-3))
            found = vars(job.settings(1e-3))
            assert {key for key in same if same[key] != found[key]} <= {*lengths, *sizes}
