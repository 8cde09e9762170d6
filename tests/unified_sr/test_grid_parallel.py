"""Runs side by side, stopped in time: they share what each needs, and go on to the results of an uninterrupted grid."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.unified_sr.cli import main
from examples.unified_sr.config import read_config, resolve
from examples.unified_sr.grid import Trial
from examples.unified_sr.grid._forecast import Forecast
from examples.unified_sr.grid._process import Running
from examples.unified_sr.grid._select import next_rate
from examples.unified_sr.interruption import UNFINISHED
from examples.unified_sr.run import run
from examples.unified_sr.run_folder import RunFolder
from examples.unified_sr.sealed import SEALED, holds

SMALL = {
    "training.batch_size": 4,
    "evaluation.perplexity_tokens": 64,
    "evaluation.perplexity_window": 64,
    "data.min_user_events": 3,
    "training.leak_tokens": 0,
}
GEMS = {"method.rank": 4, "method.null_space_tokens": 256}
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals end a process at once elsewhere")


def command(folder: Path, model: str, data: str, *more: str, **content: Any) -> list[str]:
    settings = {**SMALL, "model.name": model, **content.pop("settings", {})}
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({"data": {"shop": data}, "settings": settings, **content}), encoding="utf-8")
    return ["grid", "--config", str(file), "--out", str(folder / "out"), *more]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0


@pytest.fixture(scope="module")
def shop(llama_folder: str, data_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    methods = [
        {"name": "gems", "settings": {"training.lr": 1e-3, **GEMS}},
        {"name": "again", "method": "gems", "settings": {"training.lr": 2e-3, **GEMS}, "seeds": [0]},
        "adamw",
    ]
    select = {"rates": [1e-3], "trials": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSUB_CACHE", str(folder / "before"))
        forkserver.set_forkserver_preload(["examples.unified_sr.grid", "transformers.modeling_utils"])
        forkserver.ensure_running()  # with this environment, if none is running yet
        patch.setenv("GRADSUB_CACHE", str(folder / "cache"))
        patch.delenv("OMP_NUM_THREADS", raising=False)
        line = command(folder, llama_folder, data_folder, "--jobs", "3", methods=methods, select=select, seeds=[0, 1])
        line += ["--set", "training.steps=3", "--deadline", "1000"]  # which has no time for a probe
        assert main(line) == 0
    return folder / "out" / "shop"


def test_side_by_side_the_null_space_is_fitted_once_and_the_intact_model_measured_once(shop: Path) -> None:
    assert len(list((shop.parents[1] / "cache").rglob("*.safetensors"))) == 1, "the place that the grid was told"
    logs = {path: path.read_text(encoding="utf-8") for path in shop.rglob("*.log")}
    assert sum("null space: 256 tokens" in log for log in logs.values()) == 1
    assert sum("null space: as fitted before" in log for log in logs.values()) == 2
    measured = [json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in shop.rglob("run.json")]
    assert sum("zero-shot evaluation" in seconds for seconds in measured) <= 2, (
        "of the validation and of the test split"
    )
    assert len(list((shop.parent / "intact-model").glob("*.json"))) == 2


def test_the_cores_are_shared(shop: Path) -> None:
    found = {read(path)["threads"] for path in shop.rglob("environment.json")}
    assert found == {max(1, len(os.sched_getaffinity(0)) // 3)}


def test_as_many_rates_are_tried_as_the_budget_says(shop: Path) -> None:
    selection = read(shop / "adamw" / "selection.json")
    trials = [Trial(row["lr"], row["value"], row["perplexity_increase"]) for row in selection["trials"]]
    assert trials[0].rate == 1e-3
    assert [trial.rate for trial in trials[1:]] == [next_rate(trials[:count]) for count in (1, 2)]
    assert selection["budget"]["trials"] == 3
    assert selection["rule"].startswith("the rates 0.001, then 2 more")
    assert selection["at_edge"] == (selection["lr"] in (min(t.rate for t in trials), max(t.rate for t in trials)))


def test_the_run_with_the_seed_of_the_trials_is_its_trial(shop: Path, tmp_path: Path) -> None:
    own = shop / "adamw" / "seed-0"
    assert "the same training as" in own.with_name("seed-0.log").read_text(encoding="utf-8")
    assert "training:" in own.with_name("seed-1.log").read_text(encoding="utf-8"), "no trial has this seed"
    settings = resolve(file=own / "config.yaml")
    assert (settings.evaluation.split, settings.seed) == ("test", 0)
    again = run(settings, tmp_path / "run", lambda line: None)
    for name in ("metrics.json", "metrics.sampled.json", "queries.rec.jsonl", "run.search.trec"):
        assert again.file(name).read_bytes() == (own / name).read_bytes()
    summaries = [read(folder / "run.json") for folder in (own, again.path)]
    assert summaries[0].keys() == summaries[1].keys()
    assert {*summaries[0]["seconds"]} | {"zero-shot evaluation"} == {*summaries[1]["seconds"]}


def test_what_a_trial_scores_on_the_test_split_stays_closed(shop: Path) -> None:
    rate = read(shop / "adamw" / "selection.json")["lr"]
    for trial in (shop / "adamw").glob("lr-*/"):
        assert (trial / SEALED).is_file()
        assert read_config(trial / "config.yaml")["evaluation.split"] == "valid"
    splits = {path.parent.name: read_config(path)["evaluation.split"] for path in shop.glob("adamw/*/config.yaml")}
    tested = [name for name, split in splits.items() if split == "test"]
    assert sorted(tested) == ["seed-0", "seed-1"], "other rates are nowhere to be seen"
    settings = resolve(file=shop / "adamw" / "seed-0" / "config.yaml")
    matching = [path.name for path in shop.glob("adamw/lr-*/") if holds(RunFolder(path), settings)]
    assert matching == [f"lr-{rate:g}"]


def test_finished_runs_are_not_run_again_and_further_trials_are_known(
    shop: Path, llama_folder: str, data_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "grid",
        "--config",
        str(shop.parent.parent / "grid.yaml"),
        "--out",
        str(shop.parent),
        "--set",
        "training.steps=3",
    ]
    assert main([*line, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "8 runs in" in out
    assert "8 finished" in out


def when(ready: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    def wait() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if ready():
                act()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


EARLY: dict[str, Any] = {"training": {"epochs": 1, "early_stop": 1, "checkpoint_every": 1000, "lr": 1e-3}}


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A shell that starts the tests in the background has SIGINT ignored in them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_what_is_stopped_goes_on_to_the_same_results(
    llama_folder: str, data_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content: dict[str, Any] = {"methods": [{"name": "adamw", "settings": EARLY}]}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert main(command(whole, llama_folder, data_folder, **content)) == 0
    steps = lines(whole / "out/shop/adamw/seed-0/steps.jsonl")
    folder = parts / "out/shop/adamw/seed-0"
    line = command(parts, llama_folder, data_folder, **content)
    when(lambda: lines(folder / "steps.jsonl") >= 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main(line) == 130
    taken = lines(folder / "steps.jsonl")
    assert 3 <= taken < steps
    assert f"left: shop/adamw/seed-0: stopped after step {taken}" in capfd.readouterr().err
    assert (folder / "checkpoint.pt").is_file()
    assert main([*line, "--deadline", "0.05"]) == UNFINISHED
    assert "the same command goes on from the last checkpoints" in capfd.readouterr().err
    assert main(line) == 0
    log = folder.with_name("seed-0.log").read_text(encoding="utf-8")
    assert log.count("stopped as asked") >= 1
    assert re.search(rf"training: .*{taken}/", log), "it goes on where it was stopped"
    assert not list(folder.glob("*.pt"))
    for name in ("metrics.json", "metrics.sampled.json", "queries.rec.jsonl", "queries.search.jsonl"):
        assert (folder / name).read_bytes() == (whole / "out/shop/adamw/seed-0" / name).read_bytes()
    records = [
        [
            {key: value for key, value in json.loads(row).items() if key != "seconds"}
            for row in path.read_text().splitlines()
        ]
        for path in (folder / "steps.jsonl", whole / "out/shop/adamw/seed-0/steps.jsonl")
    ]
    assert records[0] == records[1]


def test_what_does_not_stop_is_ended_and_its_checkpoint_remains(
    llama_folder: str, data_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def freeze(running: Running) -> None:
        stop(running)
        os.kill(running._process.pid, signal.SIGSTOP)

    def stop(running: Running) -> None:
        running._told = True

    monkeypatch.setattr(Running, "stop", freeze)
    long = [
        {"name": "adamw", "settings": {"training.steps": 100_000, "training.checkpoint_every": 2, "training.lr": 1e-3}}
    ]
    line = command(tmp_path, llama_folder, data_folder, "--grace", "0.1", methods=long)
    checkpoint = tmp_path / "out/shop/adamw/seed-0/checkpoint.pt"
    when(checkpoint.is_file, lambda: os.kill(os.getpid(), signal.SIGTERM))
    began = time.monotonic()
    assert main(line) == 130
    assert time.monotonic() - began < 60
    assert checkpoint.is_file()


def test_nothing_is_begun_that_cannot_reach_a_checkpoint(
    llama_folder: str,
    data_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Forecast, "to_checkpoint", lambda self, job: 1e6 if job.trained else 0.0)
    methods = [{"name": "adamw", "settings": {"training.lr": 1e-3, "training.steps": 2}}, "bm25"]
    line = command(tmp_path, llama_folder, data_folder, "--jobs", "2", "--deadline", "100", methods=methods)
    assert main(line) == UNFINISHED
    out, err = capfd.readouterr()
    assert "left: shop/adamw/seed-0: not begun" in err
    assert "1 runs finished, 0 failed, 1 left" in out
    assert not (tmp_path / "out/shop/adamw").exists()
    assert main([*line[:-1], "0"]) == 2
    assert "deadline must be a number of seconds above 0" in capfd.readouterr().err
