"""What `make demo` does: several methods, one table; finished runs are reused, interrupted ones go on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from examples.unified_sr import busy
from examples.unified_sr.busy import busy_notice, cores
from examples.unified_sr.cli import main
from examples.unified_sr.config import beside, read_config, read_yaml
from examples.unified_sr.demo_rates import RATES, trials
from examples.unified_sr.time_left import TimeNotice
from examples.unified_sr.training import History

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples/unified_sr/configs/demo.yaml"


def small_demo(folder: Path, model: str, data: str) -> Path:
    """The demo's configuration with everything small, and nothing else changed."""
    content = read_yaml(DEMO)
    small = {
        "data": {"source": data, "min_user_events": 3},
        "model": {"name": model, "inference_tokens": 512},
        "training": {"steps": 3, "batch_size": 4, "checkpoint_every": 1},
        "evaluation": {"users": 6, "perplexity_tokens": 256, "perplexity_window": 64},
    }
    for section, values in small.items():
        content[section].update(values)
    content["methods"]["gems"]["method"].update({"rank": 4, "update_proj_gap": 2, "null_space_tokens": 256})
    file = folder / "demo.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def test_the_demo_compares_with_adamw(
    llama_folder: str, data_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["run", "--config", str(small_demo(tmp_path, llama_folder, data_folder)), "--out", str(tmp_path / "out")]
    assert main(line) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in printed.splitlines() if row.startswith("| ")]
    assert rows[0] == ["", "zero-shot", "adamw", "gems"]
    assert [row[0] for row in rows[1:]] == [
        *("rec Hit@10", "rec NDCG@10", "search Hit@10", "search NDCG@10", "general perplexity", "its change")
    ]
    found = {
        method: json.loads((tmp_path / "out" / folder / "metrics.json").read_text(encoding="utf-8"))
        for method, folder in {"gems": ".", "adamw": "adamw"}.items()
    }
    assert found["gems"]["zero_shot"] == found["adamw"]["zero_shot"], "measured once"
    assert printed.count("zero-shot: as measured in") == 1
    for column, metrics in {
        1: found["gems"]["zero_shot"],
        2: found["adamw"]["final"],
        3: found["gems"]["final"],
    }.items():
        assert rows[2][column] == f"{metrics['rec']['ndcg@10']:.4f}"
        assert rows[5][column] == f"{metrics['general']['perplexity']:.2f}"
    assert f"adamw: lr {beside(DEMO)['adamw'][0].training.lr:g}, " in printed
    assert "gems: lr 0.002" in printed
    table = printed[printed.index("|    ") : printed.index("\n\nreport:")]
    assert (tmp_path / "out/beside.md").read_text(encoding="utf-8") == table + "\n"
    assert "3 steps of 4 sequences, seed 0" in (tmp_path / "out/report.md").read_text(encoding="utf-8")
    batches = [
        json.loads((tmp_path / "out" / name / "steps.jsonl").read_text().splitlines()[0])["loss"]
        for name in (".", "adamw")
    ]
    assert batches[0] == pytest.approx(batches[1], rel=1e-5), "the first batch, before anything was trained"

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != "beside.md"}
    assert main(line) == 0
    again = capsys.readouterr().out
    assert table in again
    assert again.count("finished: its results are reused") == 2
    assert {path: path.stat().st_mtime_ns for path in before if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


def test_an_interrupted_demo_goes_on(
    llama_folder: str,
    data_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = small_demo(tmp_path, llama_folder, data_folder)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["run", "--config", str(file), "--out", str(whole)]) == 0
    seen: list[int] = []

    def interrupt(notice: TimeNotice, history: History) -> None:
        seen.append(len(history.records))
        if len(seen) == 5:  # of three steps of gems and three of adamw
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TimeNotice, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(["run", "--config", str(file), "--out", str(broken)])
    capsys.readouterr()
    assert main(["run", "--config", str(file), "--out", str(broken)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("finished: its results are reused") == 1
    assert printed.count("unfinished: it goes on") == 1
    assert (broken / "beside.md").read_bytes() == (whole / "beside.md").read_bytes()


def test_what_is_beside_takes_part_in_flags_but_keeps_its_own_rate() -> None:
    found = beside(
        DEMO, pairs=["training.lr=0.5", "method.rank=4", "training.batch_size=7"], flags={"training.steps": 9}
    )
    settings, text = found["adamw"]
    own = read_yaml(DEMO)["methods"]["adamw"]["training"]["lr"]
    assert (settings.method.name, settings.training.lr, settings.training.batch_size, settings.training.steps) == (
        "adamw",
        own,
        7,
        9,
    )
    assert "validation" in text
    assert beside(DEMO, flags={"method.name": "lora"}) == {}
    assert beside(None) == {}


def test_the_demos_rate_is_what_the_named_trials_chose() -> None:
    settings, text = beside(DEMO)["adamw"]
    named = re.search(r"\((results/\S+\.json)\)", text)
    assert named is not None
    chosen = json.loads((ROOT / "examples/unified_sr" / named[1]).read_text(encoding="utf-8"))
    assert settings.training.lr == chosen["lr"]
    ndcg = chosen["validation_ndcg@10"]
    assert {float(rate) for rate in ndcg} == set(RATES)
    assert settings.training.lr == float(max(ndcg, key=lambda rate: sum(ndcg[rate].values())))


def test_a_rate_is_chosen_on_the_validation_split(llama_folder: str, data_folder: str, tmp_path: Path) -> None:
    file = small_demo(tmp_path, llama_folder, data_folder)
    found = trials(file, tmp_path / "trials", (1.0, 1e-6), ("training.item_lr=1e-6",))
    ndcg = {rate: sum(values.values()) for rate, values in found["validation_ndcg@10"].items()}
    assert set(ndcg) == set(found["perplexity"]) == {"1", "1e-06"}
    assert found["lr"] == (1.0 if ndcg["1"] > ndcg["1e-06"] else 1e-6)
    config = read_config(tmp_path / "trials/lr-1e-06/config.yaml")
    assert (config["evaluation.split"], config["method.name"], config["training.lr"], config["training.steps"]) == (
        "valid",
        "adamw",
        1e-6,
        3,
    )


@pytest.mark.parametrize(("wanted", "message"), [(["adamw"], "a sentence"), ({"adamww": "x"}, "did you mean 'adamw'")])
def test_a_wrong_method_beside_is_named(tmp_path: Path, wanted: object, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"beside": wanted}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        beside(file)


def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "cores", lambda: 2)
    for load, own, said in ((1.9, 0.0, False), (9.6, 0.0, True), (3.5, 2.0, False), (4.5, 2.0, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0), raising=False)
        notice = busy_notice(own)
        assert (notice is not None) == said
        assert notice is None or f"{load:.1f} processes or threads want to run on 2 cores" in notice
    monkeypatch.delattr(os, "getloadavg")
    assert busy_notice() is None
    assert 1 <= cores() <= (os.cpu_count() or 1)


def test_the_time_left_is_said_again_when_the_pace_changes() -> None:
    said: list[str] = []
    notice = TimeNotice(40, 60.0, said.append, ["adamw"])
    history = History()
    for seconds in [9.0, 5.0, 4.0, *[4.2] * 10, *[20.0] * 10]:
        history.records.append({"seconds": seconds})
        notice(history)
    assert len(said) == 2
    assert said[0] == (
        "time: about 2 min for 37 further steps of 4.00 s, then about 60 s of evaluation, then about 4 min for "
        "adamw, an estimate"
    )
    assert said[1].startswith("time, as the pace has changed: about 8 min for 24 further steps of 20.00 s")


@pytest.mark.parametrize(("given", "found"), [(None, "passive"), ("active", "active")])
def test_threads_wait_for_each_other_without_spinning(given: str | None, found: str) -> None:
    """The variable is read when OpenMP is loaded, so it must be there before torch is."""
    code = (
        "import builtins, os, sys\n"
        "real = builtins.__import__\n"
        "def spy(name, *rest, **more):\n"
        "    if name == 'torch':\n"
        "        print(os.environ.get('OMP_WAIT_POLICY'), flush=True)\n"
        "        os._exit(0)\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = spy\n"
        "import examples.unified_sr.__main__\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    output = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert output.stdout.split() == [found], output.stderr
