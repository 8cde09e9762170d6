"""The training benchmark from its command line, on the miniature of `quick.yaml`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

from benchmarks.training.cli import main
from benchmarks.training.config import CONFIGS, load
from benchmarks.training.methods import METHODS

QUICK = CONFIGS / "quick.yaml"
PEERS_WARN = pytest.mark.filterwarnings("ignore::Warning:(peft|transformers|galore_torch|torchjd|pytorch_optimizer)")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("training") / "results"
    assert main(["run", "--config", str(QUICK), "--out", str(out), "--rounds", "1"]) == 0
    return out


def entries(results: Path, part: str) -> list[dict]:
    return [
        {**entry, "case": path.stem} for path in results.glob("*.json") for entry in json.loads(path.read_text())[part]
    ]


@PEERS_WARN
def test_every_method_trains(results: Path) -> None:
    measured = entries(results, "steps")
    available = {name for name, method in METHODS.items() if method.unavailable() is None}
    assert {entry["method"] for entry in measured} == available
    for entry in measured:
        where = f"{entry['method']}, {entry['tasks']} tasks, {entry['case']}"
        assert all(seconds > 0 for seconds in entry["seconds"]), where
        if entry["method"].startswith("floor"):
            assert entry["trained_tensors"] == 0, where
            assert entry["last_loss"] == entry["first_loss"], where
        else:
            assert entry["moved_tensors"] == entry["trained_tensors"] > 0, where
            assert entry["last_loss"] < entry["first_loss"] - 0.01, where
            assert entry["state_bytes"] > 0, where


@PEERS_WARN
def test_all_methods_start_from_the_same_loss(results: Path) -> None:
    """The same weights and rows, however they are split: otherwise the methods would do different work."""
    by_model: dict[str, list[float]] = {}
    for entry in entries(results, "steps"):
        by_model.setdefault(entry["case"].partition("-")[0], []).append(entry["first_loss"])
    assert by_model.keys() == {"t5", "llama"}
    for losses in by_model.values():
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)


@PEERS_WARN
def test_memory_is_at_least_the_state(results: Path) -> None:
    case = json.loads((results / "t5-tokens128-rank8-tasks2.json").read_text())
    states = {entry["method"]: entry["state_bytes"] for entry in case["steps"]}
    assert case["memory"]
    for entry in case["memory"]:
        held = entry["held_bytes"] - entry["parameter_bytes"]
        assert states[entry["method"]] <= held < entry["peak_bytes"] - entry["parameter_bytes"], entry


@PEERS_WARN
def test_report_and_resume(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert len(before) == len(load(QUICK).cases)
    assert main(["run", "--config", str(QUICK), "--out", str(results), "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("finished, its result is kept") == len(before)
    assert {path.name: path.stat().st_mtime_ns for path in results.glob("*.json")} == before
    assert main(["report", str(results)]) == 0
    text = (results / "report.md").read_text()
    assert "step time of gems-generic, 2 tasks, against adamw" in text
    assert {path.name for path in results.glob("*.png")} == {"step-time-by-rank.png", "step-time-by-tasks.png"}
    assert all(f"({path.name})" in text for path in results.glob("*.png"))


@PEERS_WARN
def test_other_settings_do_not_mix(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(QUICK), "--out", str(results), "--rounds", "2"]) == 2
    message = capsys.readouterr().err
    assert "rounds: 1 -> 2" in message
    assert "--out" in message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rounds: 3", "rounds: 0", "rounds=0"),
        ("threads: 1", "treads: 1", "treads"),
        ("methods: all}", "methods: [adam]}", "adam"),
        ("tokens: 128, rank: 4", "tokens: 0, rank: 4", "tokens=0"),
        ("model: llama, tokens: 128, rank: 4", "model: bert, tokens: 128, rank: 4", "bert"),
        ("measure: peak", "measure: top", "top"),
    ],
)
def test_mistakes_in_a_config_are_named(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = QUICK.read_text()
    assert old in text
    config = tmp_path / "wrong.yaml"
    config.write_text(text.replace(old, new))
    assert main(["run", "--config", str(config), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_committed_configs_are_valid() -> None:
    for path in CONFIGS.glob("*.yaml"):
        assert load(path).cases
