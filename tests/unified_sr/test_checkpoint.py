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

from examples.unified_sr import run as run_module
from examples.unified_sr.checking import build_settings
from examples.unified_sr.checkpoint import Checkpoint
from examples.unified_sr.early_stopping import EarlyStopping
from examples.unified_sr.training import History

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


def test_a_checkpoint_of_an_earlier_revision_still_loads(tmp_path: Path) -> None:
    model, optimizer, schedule = parts()
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt")
    checkpoint.save(2, model, optimizer, schedule, {})
    content = torch.load(checkpoint.path, weights_only=True)
    content.pop("random_cuda", None)
    torch.save(content, checkpoint.path)
    drawn = torch.rand(3)
    assert checkpoint.restore(model, optimizer, schedule) == (2, {})
    assert torch.equal(torch.rand(3), drawn)
    assert History.of({"seconds": 3.0}).elapsed == 3.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_numbers_on_the_gpu_go_on(tmp_path: Path) -> None:
    model, optimizer, schedule = parts()
    torch.rand(1, device="cuda")
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt")
    checkpoint.save(2, model, optimizer, schedule, {})
    drawn = torch.rand(3, device="cuda")
    checkpoint.restore(model, optimizer, schedule)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)


def test_the_best_weights_are_those_of_the_best_epoch_or_none(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)

    def epoch(stopping: EarlyStopping, values: list[float], weight: float) -> None:
        nn.init.constant_(model.weight, weight)
        stopping.over(values, model)

    path = tmp_path / "best.pt"
    killed = EarlyStopping(path, 5, lambda: 0.0)
    epoch(killed, [0.3], 1.0)
    epoch(killed, [0.3, 0.29], 2.0)
    resumed = EarlyStopping(path, 5, lambda: 0.0)
    epoch(resumed, [0.3, 0.28], 3.0)
    resumed.restore_best(model)
    assert model.weight.item() == 1.0
    epoch(killed, [0.3, 0.29, 0.31], 4.0)  # and is killed before its next checkpoint
    same = EarlyStopping(path, 5, lambda: 0.0)
    epoch(same, [0.3, 0.29], 2.0)
    epoch(same, [0.3, 0.29, 0.31], 4.0)
    epoch(same, [0.3, 0.29, 0.31, 0.1], 5.0)
    same.restore_best(model)
    assert model.weight.item() == 4.0
    other = EarlyStopping(path, 5, lambda: 0.0)
    epoch(other, [0.3, 0.29, 0.299], 5.0)
    with pytest.raises(
        ValueError, match=r"the weights of epoch 3 with the value 0.31, but the best one is epoch 1 with"
    ):
        other.restore_best(model)


def test_a_folder_at_which_another_process_is_is_refused_until_that_dies(
    llama_folder: str, data_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "PATIENCE", 0.1)
    out = tmp_path / "run"
    held = "import sys, time; from pathlib import Path; from examples.unified_sr.alone import alone\n"
    held += "with alone(Path(sys.argv[1]), 'it', print): print('held', flush=True); time.sleep(120)"
    line = [sys.executable, "-W", "ignore", "-c", held, str(tmp_path / ".run.lock")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        own = build_settings("popularity", {"data.source": data_folder, "data.min_user_events": 3})
        with pytest.raises(BlockingIOError, match=r"the run in .*run: another process is at it .* or end it"):
            run_module.run(own, out, lambda line: None)
        assert not out.exists()
        other.kill()
    assert run_module.run(own, out, lambda line: None).finished
