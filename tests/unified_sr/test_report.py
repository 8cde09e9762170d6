from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from examples.unified_sr.config import resolve, to_yaml
from examples.unified_sr.report import comparison_table, result_table
from examples.unified_sr.report._plots import draw_plots
from examples.unified_sr.run_folder import CONFIG, METRICS, RunFolder, State

VALUES = {"hit@10": 0.1, "ndcg@10": 0.05, "mrr@10": 0.04}


def finished(path: Path, method: str = "gems", records: list[dict[str, Any]] | None = None) -> RunFolder:
    path.mkdir()
    folder = RunFolder(path)
    folder.file(CONFIG).write_text(to_yaml(resolve(flags={"method.name": method})), encoding="utf-8")
    half = {"rec": VALUES, "search": VALUES, "general": {"perplexity": 40.0}}
    after = {"rec": {**VALUES, "ndcg@10": 0.25}, "search": VALUES, "general": {"perplexity": 41.0}}
    folder.write_json(METRICS, {"zero_shot": half, "final": after})
    protected = {f"layers.{block}.{kind}": 0.1 * block for block in range(3) for kind in ("q", "v")}
    folder.write_json("run.json", {"protected": {**protected, "odd": 0.5}})
    lines = "".join(json.dumps(record) + "\n" for record in records or [])
    folder.file("steps.jsonl").write_text(lines, encoding="utf-8")
    return folder


def record(step: int, cosine: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"step": step, "loss": {"rec": 7.0 / step, "search": 6.0}}
    if cosine is not None:
        gates = {"rec": 0.6, "search": 0.4}
        found["diagnostics"] = {"cosines": {"rec|search": cosine}, "gates": gates, "energy": {}}
    return found


def test_the_table_shows_before_after_and_change(tmp_path: Path) -> None:
    table = result_table(finished(tmp_path / "run")).splitlines()
    assert [len(line) for line in table] == [len(table[0])] * 7
    assert table[3].split() == ["|", "rec", "NDCG@10", "|", "0.0500", "|", "0.2500", "|", "+0.2000", "|"]
    assert table[-1].split("|")[-2].strip() == "+2.5 %"


def test_zero_shot_has_one_column(tmp_path: Path) -> None:
    assert result_table(finished(tmp_path / "run", "zero-shot")).splitlines()[0].count("|") == 3


def served(path: Path, method: str, tasks: tuple[str, ...], ndcg: float) -> RunFolder:
    """A run of a method without a language model."""
    path.mkdir()
    folder = RunFolder(path)
    folder.file(CONFIG).write_text(to_yaml(resolve(flags={"method.name": method})), encoding="utf-8")
    folder.write_json(METRICS, {"zero_shot": {}, "final": {task: {**VALUES, "ndcg@10": ndcg} for task in tasks}})
    return folder


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_runs_side_by_side_in_any_order_show_their_own_numbers(tmp_path: Path, order: tuple[int, ...]) -> None:
    folders = [
        served(tmp_path / "popularity", "popularity", ("rec", "search"), 0.75),
        served(tmp_path / "sasrec", "sasrec", ("rec",), 0.5),
        finished(tmp_path / "gems"),
    ]
    own = {
        "popularity": {"rec NDCG@10": "0.7500", "search NDCG@10": "0.7500", "general perplexity": "–"},
        "sasrec": {"rec NDCG@10": "0.5000", "search NDCG@10": "–", "general perplexity": "–", "its change": "–"},
        "gems": {"rec NDCG@10": "0.2500", "search NDCG@10": "0.0500", "general perplexity": "41.00"},
        "zero-shot": {"rec NDCG@10": "0.0500", "search NDCG@10": "0.0500", "general perplexity": "40.00"},
    }
    table = cells(comparison_table([folders[place] for place in order]))
    names = ["popularity", "sasrec", "gems"]
    assert list(table) == ["zero-shot", *(names[place] for place in order)]
    assert all(wanted.items() <= table[name].items() for name, wanted in own.items())
    without = cells(comparison_table([folders[place] for place in order if place < 2]))
    assert "zero-shot" not in without
    assert not any("general perplexity" in column for column in without.values())


def cells(table: str) -> dict[str, dict[str, str]]:
    """Column -> row -> cell."""
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {name: {row[0]: row[place] for row in rows} for place, name in enumerate(head) if place}


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_plots_of_any_length(tmp_path: Path, steps: int) -> None:
    records = [record(step, 0.1 if step % 2 else None) for step in range(1, steps + 1)]
    folder = finished(tmp_path / "run", records=records)
    drawn = draw_plots(folder)
    assert list(drawn) == ["loss.png", "metrics.png", "cosine.png", "gates.png", "protected.png"]
    assert all(folder.file(name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def test_without_diagnostics_there_are_no_plots_of_them(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run", records=[record(1, None)])
    assert list(draw_plots(folder)) == ["loss.png", "metrics.png", "protected.png"]
    assert draw_plots(finished(tmp_path / "other")) == {}


def test_a_folder_tells_what_it_holds(tmp_path: Path) -> None:
    settings = resolve()
    folder = RunFolder(tmp_path / "run")
    assert folder.check(settings) is State.NEW
    folder.start(settings, {})
    assert folder.check(settings) is State.UNFINISHED
    folder.write_json(METRICS, {})
    folder.file("report.md").write_text("", encoding="utf-8")
    assert folder.check(settings) is State.FINISHED
    with pytest.raises(FileExistsError, match="steps: 100 -> 7"):
        folder.check(resolve(pairs=["training.steps=7"]))
