"""A grid really runs: it chooses rates, skips what is done, survives failures and goes on after it was killed."""

from __future__ import annotations

import filecmp
import json
import multiprocessing
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_files import GOOD, write_run

from examples.unified_sr.cli import main
from examples.unified_sr.config import read_config, resolve
from examples.unified_sr.grid import read_grid, run_grid
from examples.unified_sr.grid._forecast import Forecast
from examples.unified_sr.parts import Parts
from examples.unified_sr.run import run
from examples.unified_sr.tables import gather

SMALL = {
    "training": {"batch_size": 4, "leak_tokens": 0, "steps": 3},
    "evaluation": {"perplexity_tokens": 64, "perplexity_window": 64},
    "data": {"min_user_events": 3},
}
METHODS: list[Any] = ["bm25", "adamw"]


def command(folder: Path, model: str, data: str, *more: str, **changes: Any) -> list[str]:
    content = {
        "data": {"shop": None},
        "seeds": [0, 1],
        "settings": {**SMALL, "model.name": model},
        "select": {"rates": [1e-4, 1e-2, 1e30], "settings": {"training.warmup": 0.0}},
        "methods": METHODS,
        **changes,
    }
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return ["grid", "--config", str(file), "--data", f"shop={data}", "--out", str(folder / "out"), *more]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(llama_folder: str, data_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    assert main(command(folder, llama_folder, data_folder)) == 0
    return folder / "out" / "shop"


def test_every_run_has_its_folder(finished: Path) -> None:
    folders = sorted(str(path.parent.relative_to(finished)) for path in finished.rglob("report.md"))
    names = ["adamw/lr-0.0001", "adamw/lr-0.01", "adamw/seed-0", "adamw/seed-1", "bm25/seed-0", "bm25/seed-1"]
    assert folders == names
    assert "training" in (finished / "adamw" / "seed-0.log").read_text(encoding="utf-8")


def test_its_runs_can_be_packed_but_what_diverged(finished: Path) -> None:
    said: list[str] = []
    runs, steps, queries = gather([finished], say=said.append)
    assert said == [f"left out, since it failed or is not finished: {finished / 'adamw' / 'lr-1e+30'}"]
    names = {name.rsplit("/", 1)[0].partition("/")[2] for name in runs["run"]}
    assert names == {
        *(f"adamw/{name}" for name in ("lr-0.0001", "lr-0.01", "seed-0", "seed-1")),
        "bm25/seed-0",
        "bm25/seed-1",
    }
    trained = runs[runs["method"] == "adamw"].set_index("run")
    assert set(steps["run"]) == set(trained.index)
    assert set(trained["trained_tasks"]) == {"rec,search"}
    metrics = read(finished / "adamw" / "seed-1" / "metrics.json")["final"]
    (one,) = trained[(trained["seed"] == 1) & (trained["split"] == "test")].to_dict("records")
    assert one["perplexity"] == metrics["general"]["perplexity"]
    assert json.loads(one["selection"])["lr"] == one["lr"]
    values = queries[queries["run"].str.contains("adamw/seed-1") & (queries["task"] == "search")]["ndcg@10"]
    assert values.mean() == pytest.approx(metrics["search"]["ndcg@10"], rel=1e-5)
    assert one["search_ndcg@10"] == metrics["search"]["ndcg@10"]


def test_the_intact_model_is_measured_once_for_each_split(finished: Path) -> None:
    logs = {path.stem: path.read_text(encoding="utf-8") for path in (finished / "adamw").glob("*.log")}
    taken = {name: re.findall(r"zero-shot: as measured before, .*/(\S+)", log) for name, log in logs.items()}
    assert taken["lr-0.0001"] == taken["seed-0"] == [], "the first of each"
    assert taken["lr-0.01"] != taken["seed-1"]
    kept = sorted(path.name for path in (finished.parent / "intact-model").glob("*.json"))
    assert sorted([*taken["lr-0.01"], *taken["seed-1"]]) == kept
    found = [read(finished / "adamw" / f"seed-{seed}" / "metrics.json") for seed in (0, 1)]
    assert found[0]["zero_shot"] == found[1]["zero_shot"]
    assert found[0]["final"] != found[1]["final"]


def test_the_rate_is_the_best_one_on_the_validation_split(finished: Path) -> None:
    selection = read(finished / "adamw" / "selection.json")
    values = {}
    for trial in selection["trials"]:
        folder = finished / "adamw" / f"lr-{trial['lr']:g}"
        config = read_config(folder / "config.yaml")
        assert (config["evaluation.split"], config["training.lr"], config["seed"]) == ("valid", trial["lr"], 0)
        if trial["value"] is None:
            assert "the loss of the task" in (folder / "diverged.txt").read_text(encoding="utf-8")
            continue
        final = read(folder / "metrics.json")["final"]
        assert trial["value"] == pytest.approx((final["rec"]["ndcg@10"] + final["search"]["ndcg@10"]) / 2)
        values[trial["lr"]] = trial["value"]
    assert list(values) == [1e-4, 1e-2], "the third rate diverges"
    assert selection["lr"] == max(values, key=lambda rate: values[rate])
    assert selection["budget"] == {"trials": 3, "steps": 3, "epochs": None, "seed": 0, "examples per task": "all"}
    assert "validation split" in selection["criterion"]
    for seed in (0, 1):
        config = read_config(finished / "adamw" / f"seed-{seed}" / "config.yaml")
        assert (config["training.lr"], config["seed"], config["evaluation.split"]) == (selection["lr"], seed, "test")


def test_entries_that_differ_in_their_choice_share_their_trials(
    finished: Path, llama_folder: str, data_folder: str, tmp_path: Path
) -> None:
    shutil.copytree(finished.parent, tmp_path / "out")
    kept = {"name": "kept", "method": "adamw", "seeds": [0], "select": {"max_perplexity_increase": 0.0}}
    assert main(command(tmp_path, llama_folder, data_folder, methods=[*METHODS, kept])) == 0
    shop = tmp_path / "out" / "shop"
    for name in ("lr-0.0001", "lr-0.01", "lr-1e+30"):  # the last one diverged
        assert "of which this is a copy" in (shop / "kept" / f"{name}.log").read_text(encoding="utf-8")
        files = [file.name for file in (shop / "adamw" / name).iterdir()]
        assert filecmp.cmpfiles(shop / "adamw" / name, shop / "kept" / name, files, shallow=False)[0] == files
    choices = [read(shop / name / "selection.json") for name in ("adamw", "kept")]
    assert choices[0]["trials"] == choices[1]["trials"]
    assert [choice["max_perplexity_increase"] for choice in choices] == [None, 0.0]
    assert (shop / "kept" / "seed-0" / "report.md").is_file()


def test_what_is_finished_is_not_touched(
    finished: Path, llama_folder: str, data_folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != "selection.json"}
    assert main(command(finished.parent.parent, llama_folder, data_folder)) == 0
    out = capfd.readouterr().out
    assert "7 runs in" in out
    assert "7 finished" in out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != "selection.json"} == before


def test_a_log_gets_a_line_only_where_something_has_changed(
    llama_folder: str, data_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = [{"name": "adamw", "rates": [], "settings": {"training.lr": 1e-4, "training.steps": 20}}]
    assert main(command(tmp_path, llama_folder, data_folder, methods=one, seeds=[0])) == 0
    shown = re.findall(r"adamw/seed-0 step [^\]\r]*", capfd.readouterr().err)
    assert len(set(shown)) > 1
    assert max(shown.count(text) for text in shown) <= 3, "again as the bar moves on, and as it closes"


def test_other_settings_are_an_error_before_anything_runs(
    finished: Path, llama_folder: str, data_folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(finished.rglob("*"))
    line = command(finished.parent.parent, llama_folder, data_folder, "--set", "model.max_history=3")
    assert main(line) == 2
    assert "max_history: 10 -> 3" in capfd.readouterr().err
    assert sorted(finished.rglob("*")) == before


def test_a_dry_run_says_what_is_left_and_how_long_it_takes(
    finished: Path, llama_folder: str, data_folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    more = {
        "methods": [*METHODS, {"name": "slow", "method": "adamw", "rates": [], "settings": {"training.steps": 5000}}]
    }
    line = command(finished.parent.parent, llama_folder, data_folder, "--dry-run", **more)
    assert main(line) == 0
    out = capfd.readouterr().out
    assert "shop/slow/seed-1: nothing" in out
    assert "shop/adamw/seed-0: a finished run with the same settings" in out
    amount, unit = re.findall(r"time for the 2 runs left: about ([\d.]+) (s|min|h), an estimate", out)[0]
    estimate = float(amount) * {"s": 1, "min": 60, "h": 3600}[unit]
    # What the finished runs took, whatever that was on this machine, is what 10,000 more of their steps will take.
    taken = [
        json.loads(file.read_text(encoding="utf-8"))["throughput"] for file in finished.glob("adamw/seed-*/run.json")
    ]
    steps = [throughput["seconds_per_step"] for throughput in taken]
    assert 0.3 * 10_000 * min(steps) < estimate < 3 * 10_000 * max(steps) + 60
    assert not (finished / "slow").exists()


def test_what_did_not_train_tells_nothing_about_training(
    llama_folder: str, data_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slow = [{"name": "slow", "method": "adamw", "rates": [], "settings": {"training.steps": 5000}}]
    assert main(command(tmp_path, llama_folder, data_folder, methods=["bm25", "zero-shot"], seeds=[0])) == 0
    capfd.readouterr()
    line = command(tmp_path, llama_folder, data_folder, "--dry-run", methods=["bm25", "zero-shot", *slow], seeds=[0])
    assert main(line) == 0
    out = capfd.readouterr().out
    assert "2 finished" in out
    assert "time for the 1 runs left: unknown until one of the kind has finished" in out


def test_a_grid_that_begins_without_training_measures_some_steps_first(
    llama_folder: str,
    data_folder: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    methods = ["zero-shot", {"name": "adamw", "rates": [], "settings": {"training.lr": 1e-4}}]
    assert main(command(tmp_path, llama_folder, data_folder, methods=methods[:1])) == 0
    capfd.readouterr()
    assert main(command(tmp_path, llama_folder, data_folder, methods=methods)) == 0
    out, err = capfd.readouterr()
    assert "a few steps of shop/adamw tell how long a step takes" in out
    assert re.search(r"time for the 2 runs left: about .*, an estimate", out)
    assert re.search(r"adamw/seed-0 step \d+, (about|overdue)", err)
    shutil.rmtree(tmp_path / "out" / "shop" / "adamw")
    monkeypatch.setattr(Forecast, "seconds", lambda self, job: 1e-3)
    assert main(command(tmp_path, llama_folder, data_folder, methods=methods)) == 0
    err = capfd.readouterr().err
    assert re.search(r"adamw/seed-0 step \d+, overdue", err)
    assert "about 0 s left" not in err


def test_a_method_that_trains_a_network_of_its_own_is_estimated_by_its_own_runs(
    data_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two rough minutes stand until one has finished; a run of a closed form, or of another method, tells nothing."""
    methods = ["bm25", {"name": "sasrec", "settings": {"method.max_epochs": 1}}]

    def estimate(seeds: list[int], *more: str) -> str:
        assert main(command(tmp_path, "none", data_folder, *more, methods=methods, seeds=seeds)) == 0
        return re.findall(r"time for the .*", capfd.readouterr().out)[0]

    assert estimate([0], "--dry-run") == "time for the 2 runs left: about 2 min, an estimate"
    assert estimate([0, 1], "--dry-run", "--only", "bm25") == "time for the 2 runs left: about 0 s, an estimate"
    estimate([0])
    seconds = sum(read(tmp_path / "out" / "shop" / "sasrec" / "seed-0" / "run.json")["seconds"].values())
    found = estimate([0, 1, 2], "--dry-run", "--only", "sasrec")
    assert found == f"time for the 2 runs left: about {2 * seconds:.0f} s, an estimate"


def test_a_failure_stops_only_what_depends_on_it(
    llama_folder: str, data_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = {"name": "broken", "method": "adamw", "settings": {"evaluation.general_text": "none.txt"}, "rates": [1e-3]}
    line = command(tmp_path, llama_folder, data_folder, methods=[broken, "bm25"], seeds=[0])
    assert main(line) == 1
    out, err = capfd.readouterr()
    assert "1 runs finished, 2 failed" in out
    assert "failed: shop/broken/lr-0.001: FileNotFoundError" in err
    assert "none.txt" in err
    assert "its learning rate cannot be chosen, because shop/broken/lr-0.001 did not finish" in err
    assert (tmp_path / "out" / "shop" / "bm25" / "seed-0" / "report.md").is_file()


def test_what_cannot_be_planned_is_a_failure_of_its_own(
    llama_folder: str, data_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With what the first run took, the others are estimated: early_stop counts epochs, and there is no such folder."""
    fixed = {"method": "adamw", "rates": [], "settings": {"training.steps": 1}}
    wrong = {**fixed, "name": "wrong", "settings": {"training.steps": 1, "training.early_stop": 2}}
    more, methods = ("--data", f"gone={tmp_path / 'none'}"), [{**fixed, "name": "a"}, wrong, "bm25"]
    line = command(tmp_path, llama_folder, data_folder, *more, methods=methods, seeds=[0])
    for _ in range(2):  # the second time the estimate comes before all runs
        assert main(line) == 1
        out, err = capfd.readouterr()
        assert "2 runs finished, 4 failed" in out
        assert "failed: shop/wrong/seed-0: ValueError: training.early_stop=2 counts epochs" in err
        assert re.search(r"failed: gone/a/seed-0: \w+: .*none", err)
    assert "time for the 4 runs left: about 0 s, an estimate" in out


def test_a_run_that_diverges_is_not_tried_again(
    llama_folder: str, data_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wild = {"name": "wild", "method": "adamw", "settings": {"training.lr": 1e30, "training.warmup": 0.0}}
    line = command(tmp_path, llama_folder, data_folder, methods=[wild], seeds=[0])
    log = tmp_path / "out" / "shop" / "wild" / "seed-0.log"
    for _ in range(2):
        assert main(line) == 1
        assert "Lower training.lr and training.item_lr" in capfd.readouterr().err
        size = log.stat().st_size
    assert log.stat().st_size == size


@pytest.mark.parametrize(
    "settings", [{"training.steps": 1}, {"training.epochs": 1, "training.early_stop": 1, "training.batch_size": 400}]
)
def test_a_last_step_that_diverges_is_one_that_does(
    settings: dict[str, Any], llama_folder: str, data_folder: str, tmp_path: Path
) -> None:
    """No later loss tells of it; the scores do."""
    wild = {"name": "wild", "method": "adamw", "settings": {"training.lr": 1e30, "training.warmup": 0.0, **settings}}
    assert main(command(tmp_path, llama_folder, data_folder, methods=[wild], seeds=[0])) == 1
    said = (tmp_path / "out/shop/wild/seed-0/diverged.txt").read_text(encoding="utf-8")
    assert said.startswith("the scores after training are NaN or infinite")
    assert "ower training.lr and training.item_lr" in said


def test_an_intact_model_without_scores_did_not_diverge(
    llama_folder: str, data_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_number(*arguments: Any) -> Any:
        raise FloatingPointError

    monkeypatch.setattr(Parts, "measure", no_number)
    flags = {"method.name": "zero-shot", "model.name": llama_folder, "data.source": data_folder}
    with pytest.raises(ValueError, match="the scores of the intact model are NaN or infinite"):
        run(resolve(pairs=["data.min_user_events=3"], flags=flags), tmp_path / "run", lambda line: None)


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs a fork server")
def test_a_killed_grid_goes_on(llama_folder: str, data_folder: str, tmp_path: Path) -> None:
    own = {"name": "adamw", "rates": [], "settings": {"training.steps": 60, "training.checkpoint_every": 1}}
    line = command(tmp_path, llama_folder, data_folder, methods=[own], seeds=[0])
    process = multiprocessing.get_context("forkserver").Process(target=main, args=(line,))
    process.start()
    folder = tmp_path / "out" / "shop" / "adamw" / "seed-0"
    steps = folder / "steps.jsonl"
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if steps.is_file() and len(steps.read_text().splitlines()) >= 5:
            break
        time.sleep(0.005)
    process.kill()
    process.join()
    time.sleep(0.5)  # the run notices that its grid is gone
    taken = len(steps.read_text().splitlines())
    time.sleep(0.5)
    assert len(steps.read_text().splitlines()) == taken < 60, "the run went on without its grid"
    assert main(line) == 0
    seconds = [json.loads(row)["seconds"] for row in steps.read_text().splitlines()]
    assert len(seconds) == 60
    assert "unfinished: it goes on" in folder.with_name("seed-0.log").read_text(encoding="utf-8")
    assert not list(folder.glob("checkpoint*"))


def test_a_copy_that_is_cut_off_is_made_again(
    data_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, pairs = tmp_path / "grid.yaml", (f"data.source={data_folder}",)
    methods = "methods: [{name: a, method: gems}, {name: b, method: gems}]"
    file.write_text(f"data: {{shop: {data_folder}}}\n{methods}\n", encoding="utf-8")
    grid, out = read_grid(file), tmp_path / "out"
    source = write_run(out / "shop/a/seed-0", "gems", ranks={"rec": GOOD, "search": GOOD}, pairs=pairs)
    copytree = shutil.copytree

    def full(place: Path, target: Path) -> None:
        copytree(place, target, ignore=shutil.ignore_patterns("queries*"))
        raise OSError("no space left on the device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        outcome = run_grid(grid, out, say=lambda line: None)
    assert outcome.done == ["shop/a/seed-0"]
    assert "no space left" in outcome.failed["shop/b/seed-0"]
    assert sorted(path.parent.name for path in out.rglob("metrics.json")) == ["seed-0", "seed-0.partial"]
    assert len(gather([out], say=lambda line: None).runs) == 1
    begun = out / "shop/b/seed-0"
    begun.mkdir()
    shutil.copy(source / "config.yaml", begun)
    (begun / "checkpoint.pt").touch()
    assert run_grid(grid, out, say=lambda line: None).done == ["shop/a/seed-0", "shop/b/seed-0"]
    assert filecmp.dircmp(source, begun).left_list == filecmp.dircmp(source, begun).right_list
    assert not list(out.rglob("*.partial"))
