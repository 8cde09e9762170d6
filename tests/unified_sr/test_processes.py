"""A run that torchrun starts on two processes ends with the metrics of a run on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.unified_sr.evaluation import TaskResult
from examples.unified_sr.processes import Processes, current

ROOT = Path(__file__).resolve().parent.parent.parent


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node")
ACCELERATE = (
    *("accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no"),
    *("--dynamo_backend", "no", "--main_process_port", "0", "--num_processes"),
)


def start(command_line: tuple[str, ...], processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", *command_line, str(processes)]
    command = [sys.executable, *launcher, "-m", "examples.unified_sr", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("method", "launcher", "format"),
    [("gems", TORCHRUN, "prompt"), ("adamw", ACCELERATE, "sequence")],  # the halves of a step's targets differ in size
    ids=["gems", "adamw"],
)
def test_two_processes_measure_what_one_does(
    method: str, launcher: tuple[str, ...], format: str, data_folder: str, llama_folder: str, tmp_path: Path
) -> None:
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        sizes = [
            "training.steps=6",
            "training.batch_size=8",
            f"model.format={format}",
            "evaluation.perplexity_tokens=200",
            "evaluation.perplexity_window=64",
        ]
        options = ["--method", method, "--data", data_folder, "--model", llama_folder, "--out", str(out)]
        own = ["method.rank=6", "method.update_proj_gap=3", "method.null_space_tokens=600"] if method == "gems" else []
        done = start(
            launcher,
            processes,
            "run",
            *options,
            "--set",
            *sizes,
            *own,
            "model.autocast=none",
            "training.checkpoint_every=2",
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = {
            name: json.loads((out / name).read_text()) for name in ("metrics.json", "metrics.sampled.json")
        }
        steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
        found[processes]["losses"] = [step["loss"] for step in steps]
        assert not (out / "checkpoint.pt").exists()
    assert len(found[1]["losses"]) == 6
    for one, two in zip(_numbers(found[1]), _numbers(found[2]), strict=True):
        assert two == pytest.approx(one, rel=2e-3, abs=2e-3)


def _numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in _numbers(value[key])]
    if isinstance(value, list):
        return [number for each in value for number in _numbers(each)]
    return [float(value)]  # type: ignore[arg-type]


def test_a_grid_is_refused_under_a_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from examples.unified_sr.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["grid", "--config", "none.yaml"]) == 2
    assert "each run by torchrun" in capsys.readouterr().err


def test_parts_of_a_batch() -> None:
    assert current() == Processes(0, 1)
    rows = list(range(6))
    assert [Processes(index, 3).part(rows) for index in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="a multiple of 4 of at least 8"):
        Processes(0, 4).check_batch(6, 2)


def test_results_are_joined_in_order() -> None:
    parts = [TaskResult({q: [q]}, {q: [q]}, {q: {"mrr": 1.0}}, {q: {"mrr": 0.5}}, {q: 2.0}) for q in ("b", "a")]
    assert list(TaskResult.joined(parts, ["a", "b"]).rankings) == ["a", "b"]
