"""Runs as Parquet files: nothing is lost, packing twice is packing once, and what is wrong with a file is said."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from run_files import FAIR, GOOD, write_grid, write_run

from examples.unified_sr.cli import main
from examples.unified_sr.config import read_config
from examples.unified_sr.run_folder import CONFIG, DONE, METRICS, RunFolder
from examples.unified_sr.tables import describe, difference, evaluated_differently, gather, pack, read_tables
from examples.unified_sr.tables._files import Tables, merged, write_tables
from examples.unified_sr.tables._schema import COLUMNS, column_of

FILES = tuple(f"{table}.parquet" for table in COLUMNS)
SCHEMA = Path(__file__).resolve().parents[2] / "examples/unified_sr/results/SCHEMA.md"


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_packing_twice_in_another_order_and_in_parts_is_packing_once(tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "runs")
    pack([grid], tmp_path / "once")
    once = contents(tmp_path / "once")
    pack([grid], tmp_path / "once")
    assert contents(tmp_path / "once") == once
    for method in ("lora", "gems", "bm25", "half_protected", "adamw", "gems"):
        pack([grid / method], tmp_path / "parts")
    assert contents(tmp_path / "parts") == once
    pack([tmp_path / "parts"], tmp_path / "copied")
    assert contents(tmp_path / "copied") == once
    assert not list((tmp_path / "once").glob("*.part"))


def test_a_run_takes_the_place_of_an_earlier_one_and_others_stay(tmp_path: Path) -> None:
    for number, ranks in enumerate((FAIR, GOOD)):
        write_run(tmp_path / str(number) / "gems" / "seed-0", "gems", ranks={"rec": ranks, "search": ranks})
    write_run(tmp_path / "other" / "adamw" / "seed-0", "adamw", ranks={"rec": FAIR})
    said: list[str] = []
    out = tmp_path / "out"
    for folder in ("0", "other", "1"):
        pack([tmp_path / folder], out, say=said.append)
    assert [line.split(";")[0] for line in said] == [
        *["1 runs packed, 0 of them in the place of an earlier one"] * 2,
        "1 runs packed, 1 of them in the place of an earlier one",
    ]
    alone = tmp_path / "alone"
    pack([tmp_path / "1", tmp_path / "other"], alone)
    assert contents(out) == contents(alone)


def test_every_number_of_a_run_is_in_the_files(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "gems" / "seed-3",
        "gems",
        3,
        ranks={"rec": GOOD, "search": FAIR},
        general={"multiple_choice": 0.25},
        summary={"leak": {"a": 0.1, "b": None, "c": 0.3}},
        pairs=("evaluation.general_text=/home/somebody/wikitext2/valid.txt",),
    )
    (folder.parent / "selection.json").write_text('{"lr": 6.0e-4,\n "at_edge": false}', encoding="utf-8")
    pack([tmp_path], tmp_path / "out")
    runs, steps, queries = read_tables(tmp_path / "out")
    (row,) = runs.to_dict("records")
    metrics = RunFolder(folder).read_json(METRICS)
    for part, suffix in (("zero_shot", "_before"), ("final", "")):
        for task, values in metrics[part].items():
            head = "" if task == "general" else f"{task}_"
            assert {name: row[f"{head}{name}{suffix}"] for name in values} == values
    assert (row["label"], row["seed"], row["lr"], row["split"], row["steps"]) == ("gems", 3, 6e-4, "test", 2)
    assert (row["trained_tasks"], row["seconds"], row["leak"]) == ("rec,search", 6.0, pytest.approx(0.2))
    assert json.loads(row["selection"]) == {"lr": 6e-4, "at_edge": False}
    settings = read_config(folder / CONFIG)
    assert json.loads(row["settings"]) == {**settings, "evaluation.general_text": "wikitext2/valid.txt"}
    assert not any(
        b"somebody" in data or b"a-name-of-a-machine" in data for data in contents(tmp_path / "out").values()
    )
    assert list(steps["loss_rec"]) == [8.0, 4.0]
    assert list(steps["lr_matrices"]) == [pytest.approx(1e-3), pytest.approx(5e-4)]
    assert list(steps["cosines_rec|search"]) == [pytest.approx(0.1), pytest.approx(0.2)]
    for task in ("rec", "search"):
        lines = (folder / f"queries.{task}.jsonl").read_text(encoding="utf-8").splitlines()
        wanted = {line.pop("qid"): line for line in map(json.loads, lines)}
        found = queries[queries["task"] == task].drop(columns=["run", "task"]).set_index("query").to_dict("index")
        assert found == {query: pytest.approx(values, rel=1e-6) for query, values in wanted.items()}


def test_trials_have_steps_but_no_queries(tmp_path: Path) -> None:
    tables = gather([write_grid(tmp_path)])
    trials = {name for name in tables.names if "/lr-" in name}
    assert len(trials) == 2
    assert trials <= set(tables.steps["run"])
    assert not trials & set(tables.queries["run"])


def test_runs_beside_packed_ones_are_read_as_well(tmp_path: Path) -> None:
    grid = write_grid(tmp_path / "runs")
    pack([grid], grid)
    before = read_tables(grid)
    assert sorted(gather([grid]).names) == sorted(before.names)
    write_run(grid / "late" / "seed-7", "gems", 7, ranks={"rec": GOOD})
    found = gather([grid])
    assert set(found.names) > set(before.names)
    assert len(found.runs) == len(before.runs) + 1


def test_what_is_not_finished_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "a", "gems", ranks={"rec": GOOD})
    (write_run(tmp_path / "runs" / "b", "gems", 1, ranks={"rec": GOOD}) / DONE).unlink()
    assert main(["pack", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert f"left out, since it failed or is not finished: {tmp_path / 'runs' / 'b'}" in capsys.readouterr().out
    assert len(read_tables(tmp_path / "out").runs) == 1


def test_what_is_left_of_a_copy_is_no_run(tmp_path: Path) -> None:
    write_run(tmp_path / "gems" / "seed-0", "gems", ranks={"rec": GOOD})
    write_run(tmp_path / "gems" / "seed-1.partial", "gems", 1, ranks={"rec": GOOD})
    said: list[str] = []
    assert len(gather([tmp_path], say=said.append).runs) == 1
    assert said == [f"left out, since it failed or is not finished: {tmp_path / 'gems' / 'seed-1.partial'}"]


def test_a_run_without_the_values_of_its_queries_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "gems", ranks={"rec": GOOD, "search": FAIR})
    (folder / "queries.search.jsonl").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"queries.search.jsonl' is not there, though the run has ranked search"
    ):
        pack([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_folders_with_one_run_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, "gems", ranks={"rec": GOOD})
    with pytest.raises(ValueError, match=r"a and .*b have the same settings and seed; leave one out"):
        gather([tmp_path])
    pack([tmp_path / "a"], tmp_path / "out")
    with pytest.raises(ValueError, match="is given twice, with the same settings and seed; leave one out"):
        gather([tmp_path / "out", tmp_path / "b"])


def test_equal_trials_of_two_entries_are_two_runs(tmp_path: Path) -> None:
    for name in ("gems", "gems-unlimited"):
        write_run(tmp_path / name / "seed-0", "gems", ranks={"rec": GOOD})
    assert len(gather([tmp_path]).runs) == 2


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    pack([write_run(tmp_path / "run", "gems", ranks={"rec": GOOD})], tmp_path / "out")
    file = tmp_path / "out" / name
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PAR1" + whole[4:-8]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}' cannot be read, so it is incomplete or no Parquet file"):
            gather([tmp_path / "out"])
        with pytest.raises(ValueError, match=f"{name}' cannot be read"):
            pack([tmp_path / "run"], tmp_path / "out")
        assert file.read_bytes() == damaged, "nothing is written over what could not be read"
    if name != "runs.parquet":  # without that one the folder is no longer one of packed runs
        file.unlink()
        with pytest.raises(FileNotFoundError, match=f"{name}' is not there"):
            gather([tmp_path / "out"])


def test_files_of_two_writings_are_refused(tmp_path: Path) -> None:
    for method in ("gems", "adamw"):
        pack([write_run(tmp_path / method, method, ranks={"rec": GOOD})], tmp_path / f"{method}-out")
    (tmp_path / "gems-out" / "runs.parquet").write_bytes((tmp_path / "adamw-out" / "runs.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"steps.parquet has .*/gems/.*, which runs.parquet lacks"):
        read_tables(tmp_path / "gems-out")


def test_a_parquet_file_of_something_else_is_refused(tmp_path: Path) -> None:
    pack([write_run(tmp_path / "run", "gems", ranks={"rec": GOOD})], tmp_path / "out")
    file = tmp_path / "out" / "steps.parquet"
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["run"]), file)
    with pytest.raises(ValueError, match=r"steps.parquet' is no table of runs: it has no column 'run'"):
        read_tables(tmp_path / "out")
    pq.write_table(table.append_column("color", table["step"]), file)
    with pytest.raises(ValueError, match="has no column 'color'; describe it"):
        read_tables(tmp_path / "out")


def test_an_interrupted_writing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    pack([write_run(tmp_path / "run", "gems", ranks={"rec": GOOD})], out)
    before = contents(out)
    written = 0

    def write(table: object, file: Path, **options: object) -> None:
        nonlocal written
        Path(file).write_bytes(b"half")
        written += 1
        if written == 2:
            raise OSError("no space left on the device")

    monkeypatch.setattr(pq, "write_table", write)
    with pytest.raises(OSError, match="no space left"):
        pack([write_run(tmp_path / "other", "adamw", ranks={"rec": GOOD})], out)
    assert contents(out) == before
    assert sorted(file.name for file in out.iterdir()) == sorted(FILES)


def test_the_schema_is_written_down_and_holds(tmp_path: Path) -> None:
    message = "run python -c \"from examples.unified_sr.tables import describe; print(describe(), end='')\""
    assert SCHEMA.read_text(encoding="utf-8") == describe(), message
    folders = [tmp_path / "out", SCHEMA.parent]
    pack([write_grid(tmp_path / "runs")], folders[0])
    for folder in folders:
        for table in COLUMNS:
            file = folder / f"{table}.parquet"
            if folder is folders[0] or file.is_file():
                schema = pq.read_schema(file)
                assert schema.types == [column_of(table, name).type for name in schema.names]
                assert schema.metadata is None or b"pandas" not in schema.metadata
    with pytest.raises(ValueError, match="the table 'steps' has no column 'loss_buy'"):
        column_of("steps", "loss_buy")


def test_what_two_settings_differ_in() -> None:
    texts = [json.dumps({"seed": 0, "a": 1, "b": 2}), json.dumps({"seed": 1, "a": 1, "b": 3}), json.dumps({"a": 1})]
    assert difference(texts) == {"b": [2, 3, None]}
    assert difference(texts[1:], absent=True) == {"b": [3, None]}
    assert evaluated_differently({"x": '{"evaluation.users": 3}', "y": '{"evaluation.users": 4}'}) == (
        "evaluation.users=3 in x, evaluation.users=4 in y"
    )
    assert evaluated_differently({"x": '{"training.lr": 3}', "y": '{"training.lr": 4}'}) is None


def as_of_an_earlier_revision(tables: Tables, key: str) -> Tables:
    """The tables as packed by a revision that did not know a setting: other settings, so other names."""

    texts = []
    for text in tables.runs["settings"]:
        settings = json.loads(text)
        del settings[key]
        texts.append(json.dumps(settings))
    old = tables._replace(runs=tables.runs.assign(settings=texts))
    return Tables(*(frame.assign(run=frame["run"] + "-old") for frame in old))


def test_files_of_an_earlier_revision_have_the_settings_and_names_of_today(tmp_path: Path) -> None:
    tables = gather([write_grid(tmp_path / "runs")])
    old = as_of_an_earlier_revision(tables, "model.format")
    write_tables(tables, tmp_path / "new")
    write_tables(old, tmp_path / "old")
    assert contents(tmp_path / "old") != contents(tmp_path / "new")
    write_tables(read_tables(tmp_path / "old"), tmp_path / "read")
    assert contents(tmp_path / "read") == contents(tmp_path / "new")
    write_tables(merged([tables, old]), tmp_path / "both")
    with pytest.raises(ValueError, match=r"have the same settings and seed, but for settings that one of them lacks"):
        read_tables(tmp_path / "both")


def test_tables_without_a_run_can_be_merged_with_others(tmp_path: Path) -> None:
    tables = gather([write_run(tmp_path / "run", "gems", ranks={"rec": GOOD})])
    nothing = tables.without(tables.names)
    assert len(nothing.runs) == len(nothing.steps) == len(nothing.queries) == 0
    write_tables(merged([nothing, tables]), tmp_path / "one")
    write_tables(tables, tmp_path / "other")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert isinstance(read_tables(tmp_path / "one"), Tables)
