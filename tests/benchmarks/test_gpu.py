"""`benchmarks.gpu` on its miniature, and what its report derives from numbers known in advance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.measure import Record, _Running
from benchmarks.gpu.methods import RandomNullSpace, methods
from benchmarks.gpu.methods import workload as workload_of
from benchmarks.gpu.report import gap_ratio, measured, render_all, time_ratio
from benchmarks.two_tasks import Contender
from gradsub import GemsOptimizer

PEERS_WARN = pytest.mark.filterwarnings("ignore::Warning:(peft|transformers|torch)")
CONFIGS = [command.HERE / name for name in ("config.json", "smoke.json")]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def record(method: str, **values: Any) -> dict[str, Any]:
    return {**vars(Record("model", 0, method)), **values}


@PEERS_WARN
def test_the_miniature_runs_every_method_and_appends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    earlier = read(command.HERE / "results" / "runs.json")
    (tmp_path / "runs.json").write_text(json.dumps(earlier))
    assert command.main(["--smoke", "--out", str(tmp_path), "--note", "a miniature"]) == 0
    runs = read(tmp_path / "runs.json")["runs"]
    assert runs[:-1] == earlier["runs"]
    config, found = runs[-1]["config"], runs[-1]["records"]
    assert [each["method"] for each in found] == [name for group in config["groups"] for name in group]
    for each in found:
        assert each.keys() == record("any").keys()
        assert each["note"] == ""
        rounds = config["gap"] if "refresh" in " ".join(config["groups"][each["group"]]) else config["rounds"]
        for name in ("ms", "step_ms", "host_ms", "host_step_ms"):
            assert len(each[name]) == rounds
        assert len(each["first_ms"]) == config["warm_up"]
        assert (each["graphs"] is not None) == each["method"].endswith("+compile")
        if each["graphs"] is not None:
            assert each["graphs"] >= 1
    assert "a miniature" in capsys.readouterr().out
    assert (tmp_path / "runs.md").read_text(encoding="utf-8") == render_all(runs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "--smoke" in capsys.readouterr().err


@PEERS_WARN
def test_a_method_that_fails_leaves_the_others_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**read(command.HERE / "smoke.json"), "groups": [["adamw", "gems", "gems-null"]], "rounds": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def refuse(self: GemsOptimizer, *arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("no room\nfor more")

    monkeypatch.setattr(GemsOptimizer, "step", refuse)
    assert command.main(["--smoke", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path)]) == 0
    adamw, *others = read(tmp_path / "runs.json")["runs"][0]["records"]
    assert len(adamw["ms"]) == 1
    assert [(each["ms"], each["note"]) for each in others] == [([], "OutOfMemoryError: no room")] * 2


def test_groups_that_do_not_fit_into_the_time_are_named(tmp_path: Path) -> None:
    config = {**read(command.HERE / "smoke.json"), "seconds": -1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert command.main(["--smoke", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path)]) == 0
    assert all("not begun" in each["note"] for each in read(tmp_path / "runs.json")["runs"][0]["records"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_targets_speak_of_methods_that_take_turns(path: Path) -> None:
    config = read(path)
    known = methods(config["gap"])
    assert {name for group in config["groups"] for name in group} == known.keys()
    for target in config["targets"]:
        assert target["model"] in config["models"]
        assert any({target["method"], target["against"]} <= set(group) for group in config["groups"]), target


def test_committed_runs_are_complete_and_begin_with_the_baseline() -> None:
    results = command.HERE / "results"
    runs = read(results / "runs.json")["runs"]
    assert runs[0]["environment"]["revision"] == "aec2065"
    baseline = {(each["model"], each["method"]): each for each in runs[0]["records"]}
    assert baseline["1b", "gems"]["ms"] == [346]
    assert baseline["135m", "adamw"]["peak_gib"] == 7.3
    for run in runs:
        assert run["environment"]["accelerator"]
        assert all(each.keys() == record("any").keys() for each in run["records"])
    assert (results / "runs.md").read_text(encoding="utf-8") == render_all(runs)


def test_ratios_are_formed_within_a_round() -> None:
    """The machine was ten times slower in the second round: no difference between the methods."""
    assert time_ratio(record("gems", ms=[1.0, 10.0, 1.0]), record("adamw", ms=[2.0, 20.0, 2.0])) == 0.5


def test_a_gap_is_compared_with_as_many_ordinary_steps() -> None:
    ordinary = record("gems", ms=[1.0, 1.0, 1.0, 1.0])
    refreshing = record("gems-refresh", ms=[1.0, 3.0, 1.0, 1.0], gap=4)
    assert gap_ratio(refreshing, ordinary) == 1.5
    assert gap_ratio(refreshing, ordinary, 200) == 1.01
    assert gap_ratio({**refreshing, "ms": [1.0, 3.0]}, ordinary) is None


def test_only_methods_that_took_turns_are_compared() -> None:
    target = {"model": "model", "method": "gems", "against": "adamw", "measure": "peak", "at_most": 1.0}
    own, other = record("gems", ms=[1.0], peak_gib=1.0), record("adamw", ms=[1.0], peak_gib=2.0)
    assert measured({"records": [own, other]}, target) == 0.5
    assert measured({"records": [own, {**other, "group": 1}]}, target) is None
    assert measured({"records": [own, {**other, "ms": []}]}, target) is None


def test_random_null_spaces_are_orthonormal_and_repeat() -> None:
    null_space = RandomNullSpace({"a": 40, "b": 60}, 0.5, "cpu")
    for name, width in (("a", 40), ("b", 60)):
        K = null_space.basis(name)
        assert abs(K.shape[1] / width - 0.5) <= 0.07
        torch.testing.assert_close(K.mT @ K, torch.eye(K.shape[1]))
        assert torch.equal(K, null_space.basis(name))


class FakeDevice:
    """Counts bytes as `torch.cuda` does; its clock advances by 5 ms at every event."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = self.peak = self.clock = 0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.time = 0

            def record(self) -> None:
                device.clock += 5
                self.time = device.clock

            def elapsed_time(self, other: Event) -> float:
                return float(other.time - self.time)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(self, "peak", self.held))

    def take(self, bytes_: int) -> None:
        self.held += bytes_
        self.peak = max(self.peak, self.held)


def test_the_peak_is_a_methods_own_whatever_else_lies_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    device.take(7 * 2**30)  # of others

    def build(self: Contender, *arguments: Any) -> None:
        device.take(2 * 2**30)

    def passes(self: Contender) -> None:
        device.take(4 * 2**30)  # gradients and activations
        device.take(-4 * 2**30)

    steps = iter(range(2))

    def step(self: Contender) -> None:
        if next(steps) == 0:
            device.take(1 * 2**30)  # moments

    for function in (passes, step):
        monkeypatch.setattr(Contender, function.__name__, function)
    monkeypatch.setattr(Contender, "__init__", build)
    config = read(command.HERE / "smoke.json")
    running = _Running(Record("tiny", 0, "gems"), methods(16)["gems"], workload_of(config, "tiny", "cuda"))
    running.build()
    running.warm_up()
    device.take(-3 * 2**30)  # of the others again
    running.round()
    running.finish()
    assert running.record.peak_gib == 2 + 1 + 4
    assert (running.record.first_ms, running.record.ms, running.record.step_ms) == ([10], [10], [5])
    assert len(running.record.host_ms) == 1
