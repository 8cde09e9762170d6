"""An interrupted run goes on to the results of an uninterrupted one; a checkpoint is whole or the one before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.unified_sr.checkpoint import Checkpoint

STEPS = 9


def command(model: str, data: str, out: Path, method: str) -> list[str]:
    own = ["method.update_proj_gap=4", "method.null_space_tokens=256", "method.rank=4"] if method == "gems" else []
    return [
        *(sys.executable, "-W", "ignore", "-m", "examples.unified_sr", "run"),
        *("--data", data, "--model", model, "--method", method, "--steps", str(STEPS), "--seed", "1"),
        *(
            "--out",
            str(out),
            "--set",
            "training.batch_size=4",
            "evaluation.perplexity_tokens=256",
            "evaluation.perplexity_window=64",
        ),
        *("model.inference_tokens=512", "data.min_user_events=3", "training.checkpoint_every=2", *own),
    ]


def run(line: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def kill_in_training(line: list[str], out: Path, after: int) -> None:
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    log = out / "steps.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and len(log.read_text().splitlines()) >= after:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("method", ["gems", "adamw"])
def test_a_killed_run_reaches_the_same_metrics(
    method: str, llama_folder: str, data_folder: str, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(command(llama_folder, data_folder, whole, method))
    line = command(llama_folder, data_folder, killed, method)
    kill_in_training(line, killed, after=3)
    assert not (killed / "metrics.json").exists(), "it was killed too late to show anything"
    assert "unfinished: it goes on from the last checkpoint" in run(line)
    assert (killed / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    losses = [
        [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]
        for folder in (whole, killed)
    ]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]
    assert not list(killed.glob("checkpoint*")), "a finished run needs none"


def parts() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    model = nn.Linear(200, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, schedule = parts()
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt")
    checkpoint.save(2, model, optimizer, schedule, {})
    before = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    (tmp_path / "checkpoint.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"after step 4 could not be written .* the earlier one is unchanged"):
        checkpoint.save(4, model, optimizer, schedule, {})
    assert checkpoint.restore(model, optimizer, schedule)[0] == 2
    assert torch.equal(model.weight, before)


def test_what_was_half_written_does_not_count(tmp_path: Path) -> None:
    model, optimizer, schedule = parts()
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt")
    assert checkpoint.restore(model, optimizer, schedule) == (0, {})
    checkpoint.save(2, model, optimizer, schedule, {"seconds": 1.0})
    (tmp_path / "checkpoint.partial").write_bytes((tmp_path / "checkpoint.pt").read_bytes()[:100])
    assert checkpoint.restore(model, optimizer, schedule) == (2, {"seconds": 1.0})
    checkpoint.save(4, model, optimizer, schedule, {})
    assert checkpoint.restore(model, optimizer, schedule) == (4, {})


def test_other_weights_are_refused(tmp_path: Path) -> None:
    model, optimizer, schedule = parts()
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt")
    checkpoint.save(2, model, optimizer, schedule, {})
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"is of other weights \(\['bias'\]"):
        checkpoint.restore(model, optimizer, schedule)
