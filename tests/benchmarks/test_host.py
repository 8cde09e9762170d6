"""What `benchmarks.host` counts, on a miniature: never a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks.host import __main__ as command
from benchmarks.host.measure import workload
from benchmarks.host.report import check_targets, measured, render
from benchmarks.host.rows import METHODS, all_rows
from benchmarks.host.watch import count
from benchmarks.two_tasks import Contender

# Few tokens leave every layer room of another size.
pytestmark = pytest.mark.filterwarnings("ignore:null_space was collected on few tokens:UserWarning")

CONFIG = json.loads((command.HERE / "config.json").read_text(encoding="utf-8"))
SHALLOW, DEEP = 2, 4
LAYERS_MORE = 7 * (DEEP - SHALLOW)
PEERS_WARN = pytest.mark.filterwarnings("ignore::Warning:(peft|transformers)")


def miniature(depth: int) -> dict:
    return {**CONFIG, "model": {**CONFIG["model"], "num_hidden_layers": depth}, "warm_up": 1, "rounds": 2}


def operations_of_step(method: str, depth: int, steps: int) -> int:
    """Of `step()` in step number ``steps``."""
    contender = Contender(METHODS[method], workload(miniature(depth)))
    for _ in range(steps - 1):
        contender.whole_step()
    contender.passes()
    return count(contender.step).names.total()


@pytest.mark.parametrize("method", ["adamw", "gems", "gems-clipped", "gems-mixed"])
def test_a_step_asks_for_as_many_operations_whatever_the_number_of_layers(method: str) -> None:
    """Layers of one shape step together, also where the tasks' losses and gates are looked at."""
    assert operations_of_step(method, DEEP, 3) == operations_of_step(method, SHALLOW, 3)


def test_nor_does_a_null_space_add_operations_a_layer() -> None:
    assert operations_of_step("gems-null", DEEP, 3) == operations_of_step("gems-null", SHALLOW, 3)


@pytest.mark.parametrize("steps", [3, 4], ids=["odd step", "even step"])
@pytest.mark.parametrize(
    "method",
    ["gems-svd", "gems-sketch", "gems-null-svd", "gems-null-sketch"],
)
def test_a_refreshed_layer_costs_few_operations(method: str, steps: int) -> None:
    most = next(target["at_most"] for target in CONFIG["targets"] if target["measure"] == "refresh")
    more = operations_of_step(method, DEEP, steps) - operations_of_step(method, SHALLOW, steps)
    assert more <= most * LAYERS_MORE


@PEERS_WARN
def test_the_command_measures_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(miniature(1)))
    out = tmp_path / "results"
    assert command.main(["--config", str(config), "--out", str(out), "--note", "a miniature"]) == 0
    result = json.loads((out / "host.json").read_text(encoding="utf-8"))
    assert_complete(result, rounds=2, layers=7)
    assert "a miniature" in capsys.readouterr().out
    for row in all_rows():
        if row.refreshes:  # more work than the ordinary step, or nothing was refreshed
            assert measured(result, row.name, "refresh") > 0, row.name
    worst = result["worst"]["gems-svd"]
    assert worst["names, step"]
    assert any(place.startswith("gradsub/subspace/") for place, *_ in worst["places, step"])


def test_the_committed_result_is_complete() -> None:
    results = command.HERE / "results"
    result = json.loads((results / "host.json").read_text(encoding="utf-8"))
    assert result["config"] == CONFIG, "the config has changed: run python -m benchmarks.host again"
    assert_complete(result, CONFIG["rounds"], layers=7 * CONFIG["model"]["num_hidden_layers"])
    assert (results / "host.md").read_text(encoding="utf-8") == render(result)


def assert_complete(result: dict, rounds: int, layers: int) -> None:
    assert result["layers"] == layers
    assert list(result["rows"]) == [row.name for row in all_rows()]
    for name, row in result["rows"].items():
        for part in ("passes", "step"):
            assert row[part]["operations"] > 0, name
            assert len(row[part]["seconds"]) == rounds, name
    for name in ("cpu", "revision", "threads"):
        assert result["environment"][name]
    assert result["environment"]["packages"]["torch"]
    assert result["worst"].keys() == {row.name for row in all_rows() if row.method.startswith("gems")}
    judged = {(row, measure) for row, measure, *_ in check_targets(result)}
    assert judged == {(row, target["measure"]) for target in result["config"]["targets"] for row in target["rows"]}
