from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from unified_sr.trec_files import evaluate_files

from examples.unified_sr.cli import main
from examples.unified_sr.config import read_config, resolve, to_yaml
from examples.unified_sr.methods import METHODS
from examples.unified_sr.metrics import CUTOFFS
from examples.unified_sr.run_folder import RunFolder, State

NAMES = {f"{metric}@{k}" for metric in ("hit", "ndcg", "mrr", "map") for k in CUTOFFS}
SMALL = [
    "training.batch_size=4",
    "evaluation.perplexity_tokens=256",
    "evaluation.perplexity_window=64",
    "model.inference_tokens=512",
    "data.min_user_events=3",
]
GEMS = ["method.update_proj_gap=2", "method.null_space_tokens=256"]


def arguments(method: str, model: str, data: str, out: Path, *more: str) -> list[str]:
    own = GEMS if method == "gems-paper" else [*GEMS, "method.rank=4"] if method.startswith("gems") else []
    line = ["run", "--data", data, "--model", model, "--method", method, "--steps", "3", "--seed", "1"]
    return [*line, "--out", str(out), "--set", *SMALL, *own, *more]


@pytest.mark.parametrize(
    ("method", "model"),
    [(name, "llama") for name, method in METHODS.items() if method.fit is None]
    + [(name, "t5") for name in ("gems", "gems-paper", "adamw", "lora", "galore", "zero-shot")],
)
@pytest.mark.filterwarnings("ignore:.*rank.*:UserWarning", "ignore:.*protects all.*:UserWarning")
def test_every_method_runs_from_the_command_line(
    method: str,
    model: str,
    data_folder: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    line = arguments(method, request.getfixturevalue(f"{model}_folder"), data_folder, out)
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert "NDCG@10" in printed
    assert str(out / "report.md") in printed
    check_files(out, method)
    finished = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(line) == 0
    assert "finished: its results are reused" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == finished


def check_files(out: Path, method: str) -> None:
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics) == {"zero_shot", "final"}
    for part in metrics.values():
        assert set(part) == {"rec", "search", "general"}
        assert set(part["general"]) == {"perplexity"}
    for task in ("rec", "search"):
        assert set(metrics["final"][task]) == NAMES
        assert metrics["final"][task] == pytest.approx(
            evaluate_files(out / f"run.{task}.trec", out / f"qrels.{task}.trec"), abs=1e-6
        )
        queries = [json.loads(line) for line in (out / f"queries.{task}.jsonl").read_text().splitlines()]
        assert metrics["final"][task]["ndcg@10"] == pytest.approx(sum(q["ndcg@10"] for q in queries) / len(queries))
    environment = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    assert environment["seed"] == 1
    assert {"packages", "git", "cores", "python"} <= set(environment)
    config = read_config(out / "config.yaml")
    assert (config["method.name"], config["training.steps"], config["training.batch_size"]) == (method, 3, 4)
    steps = (out / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "sampled" in report
    plots = {path.name for path in out.glob("*.png")}
    assert all(f"({name})" in report for name in plots)
    if method == "zero-shot":
        assert steps == []
        assert metrics["final"] == metrics["zero_shot"]
        return
    assert len(steps) == 3
    assert metrics["final"] != metrics["zero_shot"]
    assert {"loss.png", "metrics.png"} <= plots
    found = json.loads(steps[-1]).get("diagnostics")
    if method in ("adamw-rec", "adamw-search"):
        assert found is None
        assert set(json.loads(steps[-1])["loss"]) == {method.removeprefix("adamw-")}
        return
    assert "cosine.png" in plots
    assert found["cosine"].keys() == found["cosines"].keys() == {"rec|search"}
    if method.startswith("gems") and method != "gems-no-task":
        assert "gates.png" in plots
        assert set(found["angles"]) == {"shared|rec", "shared|search", "rec|search"}


BASELINES = {"popularity": {"rec", "search"}, "ease": {"rec"}, "bm25": {"search"}, "sasrec": {"rec"}}


@pytest.mark.parametrize("method", BASELINES)
def test_a_baseline_needs_no_language_model(method: str, data_folder: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = arguments(method, "no model of this name", data_folder, out)
    assert main(line) == 0
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["zero_shot"] == {}
    assert set(metrics["final"]) == BASELINES[method]
    for task, values in metrics["final"].items():
        assert set(values) == NAMES
        assert values == pytest.approx(evaluate_files(out / f"run.{task}.trec", out / f"qrels.{task}.trec"), abs=1e-6)
        assert (out / f"queries.{task}.jsonl").is_file()
    assert set(json.loads((out / "metrics.sampled.json").read_text())["final"]) == BASELINES[method]
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "erplexity" not in report
    assert "zero-shot" not in report
    finished = (out / "metrics.json").read_bytes()
    (out / "report.md").unlink()
    assert main(line) == 0
    assert (out / "metrics.json").read_bytes() == finished


def test_a_baseline_without_its_task_is_refused(
    data_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = tmp_path / "recs"
    shop.mkdir()
    for file in Path(data_folder).iterdir():
        lines = [line.rsplit("\t", 1)[0] if file.suffix == ".inter" else line for line in file.read_text().splitlines()]
        (shop / file.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(arguments("bm25", "none", str(shop), tmp_path / "out")) == 2
    assert "no test example of what 'bm25' serves" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_methods_start_from_the_same_numbers(llama_folder: str, data_folder: str, tmp_path: Path) -> None:
    found = []
    for method in ("zero-shot", "adamw"):
        assert main(arguments(method, llama_folder, data_folder, tmp_path / method)) == 0
        found.append(json.loads((tmp_path / method / "metrics.json").read_text(encoding="utf-8"))["zero_shot"])
    assert found[0] == found[1]


def test_another_runs_folder_is_left_alone(
    llama_folder: str, data_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments("zero-shot", llama_folder, data_folder, out)) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(arguments("zero-shot", llama_folder, data_folder, out, "model.max_history=3")) == 2
    message = capsys.readouterr().err
    assert "holds another run's results" in message
    assert "max_history: 10 -> 3" in message
    assert "--out" in message
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_interrupted_run_goes_on(
    llama_folder: str, data_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    line = arguments("zero-shot", llama_folder, data_folder, out)
    assert main(line) == 0
    report = (out / "report.md").read_bytes()
    (out / "report.md").unlink()
    written = (out / "config.yaml").stat().st_mtime_ns
    assert main(line) == 0
    assert "unfinished: it goes on" in capsys.readouterr().out
    assert (out / "report.md").read_text(encoding="utf-8").splitlines()[0] == report.decode().splitlines()[0]
    assert (out / "config.yaml").stat().st_mtime_ns == written
    assert not list(out.glob("*.partial"))


def test_a_run_that_was_killed_as_it_wrote_its_settings_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "config.partial").write_text("method:\n  na", encoding="utf-8")
    folder, settings = RunFolder(tmp_path), resolve()
    assert folder.check(settings) is State.NEW
    folder.start(settings, {})
    assert folder.check(settings) is State.UNFINISHED
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == to_yaml(settings)


def test_a_full_disk_leaves_no_report_that_marks_a_run_as_finished(
    llama_folder: str, data_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(path: Path, text: str, **options: Any) -> int:
        if path.name.startswith("report"):
            path.write_bytes(text.encode()[:40])
            raise OSError("no space left on the device")
        return write_text(path, text, **options)

    write_text, out = Path.write_text, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut_off)
        assert main(arguments("zero-shot", llama_folder, data_folder, out)) == 2
    assert not RunFolder(out).finished


def test_errors_are_one_line_and_write_nothing(
    llama_folder: str, data_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    cases = [
        (arguments("adamw", llama_folder, data_folder, out, "lrr=1"), "did you mean training.lr"),
        (arguments("adamw", llama_folder, str(tmp_path / "none"), out), "is no folder"),
        (arguments("adamw", str(tmp_path / "mine"), data_folder, out), "config.json"),
        (arguments("zero-shot", llama_folder, data_folder, tmp_path / "mine"), "is not empty and holds no run"),
        (arguments("zero-shot", llama_folder, data_folder, tmp_path / "file"), "is a file"),
        ([*arguments("adamw", llama_folder, data_folder, out), "--config", "none.yaml"], "none.yaml"),
        ([*arguments("adamw", llama_folder, data_folder, out), "--general-text", "none.txt"], "none.txt"),
    ]
    for line, message in cases:
        assert main(line) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    assert not out.exists()


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("update_proj_gap", "item_lr", "alpha", "zero-shot", "--general-text"))
