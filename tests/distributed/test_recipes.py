"""The recipes run as their docstrings say, train the same on one process and on two, and go on where they stopped."""

from __future__ import annotations

import ast
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.recipes.problem import build_model

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = ROOT / "examples" / "recipes"
pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true:UserWarning",  # the recipes run on a GPU as well
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",  # TRL's, of an option of transformers
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning's, of torch
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


def commands(recipe: str) -> list[list[str]]:
    """The command lines in the recipe's docstring."""
    text = ast.get_docstring(ast.parse((RECIPES / f"{recipe}.py").read_text(encoding="utf-8"))) or ""
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("    ")]
    return [[Path(program).name, *rest] for program, *rest in lines]


def run(command: list[str], folder: Path, *more: str) -> Path:
    """Run a docstring's command on CPUs; one that starts no other process runs in this one."""
    out = folder / "weights.pt"
    command = [str(out) if word == "weights.pt" else word for word in command] + list(more)
    folder.mkdir(exist_ok=True)
    if command[0] == "python" and "--processes" not in command:
        argv, path = sys.argv, list(sys.path)
        try:
            sys.argv, sys.path[0:0] = command[1:], [str(RECIPES)]  # as python does
            runpy.run_path(str(ROOT / command[1]), run_name="__main__")
        finally:
            sys.argv, sys.path[:] = argv, path
        return out
    start = {
        "python": [sys.executable],
        "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
    }[command[0]]
    rest = command[1:]
    if rest[0] == "launch":  # what accelerate cannot find out of a machine without GPUs
        rest[1:1] = ["--cpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        rest[1:1] = ["--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*start, *rest], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "travel for nothing" not in done.stderr
    return out


def same(first: Path, second: Path, tolerance: float = 2e-5) -> bool:
    one, other = (torch.load(path, weights_only=True) for path in (first, second))
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], rtol=0, atol=tolerance) for k in one)


@pytest.mark.parametrize("recipe", ["accelerate_loop", "trainer", "lightning_module"])
def test_two_processes_train_what_one_does(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = commands(recipe)
    first, second = (run(command, tmp_path / name) for name, command in (("one", one), ("two", two)))
    assert same(first, second)
    start = build_model().state_dict()
    trained = torch.load(second, weights_only=True)
    moved = [name for name, w in trained.items() if float((w - start[name]).abs().max()) > 1e-3]
    assert {"model.layers.0.mlp.down_proj.weight", "model.norm.weight"} <= set(moved)
    # From a checkpoint on, bit for bit.
    state = ["--state", str(tmp_path / "state")]
    if recipe == "accelerate_loop":
        run(one, tmp_path / "again", *state)
    again = run(one, tmp_path / "one", *(state if recipe == "accelerate_loop" else ["--resume"]))
    assert same(again, run(one, tmp_path / "whole"), tolerance=0.0)


def test_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (command,) = commands("sft")
    trained = torch.load(run(command, tmp_path / "sft"), weights_only=True)
    assert f"wrote {tmp_path / 'sft' / 'weights.pt'}\n" in capsys.readouterr().out
    assert float((trained["lm_head.weight"] - build_model().state_dict()["lm_head.weight"]).abs().max()) > 1e-3
