"""The recipes for accelerate and the Trainer train the same model on one process and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.recipes.problem import build_model

ROOT = Path(__file__).resolve().parent.parent.parent


def run(recipe: str, processes: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "-m", f"examples.recipes.{recipe}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def same(first: Path, second: Path) -> bool:
    one, other = (torch.load(path, weights_only=True) for path in (first, second))
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], rtol=0, atol=2e-5) for k in one)


@pytest.mark.parametrize("recipe", ["accelerate_loop", "trainer"])
def test_two_processes_train_what_one_does(recipe: str, tmp_path: Path) -> None:
    for processes in (1, 2):
        errors = run(recipe, processes, "--out", str(tmp_path / f"{processes}.pt"))
        assert "travel for nothing" not in errors
    assert same(tmp_path / "1.pt", tmp_path / "2.pt")
    start = build_model().state_dict()
    moved = [name for name, w in torch.load(tmp_path / "2.pt").items() if float((w - start[name]).abs().max()) > 1e-3]
    assert {"model.layers.0.mlp.down_proj.weight", "model.norm.weight"} <= set(moved)


def test_accelerates_checkpoint_goes_on_where_it_stopped(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for name in ("first.pt", "again.pt"):
        run("accelerate_loop", 1, "--out", str(tmp_path / name), "--state", str(state))
    assert same(tmp_path / "first.pt", tmp_path / "again.pt")
