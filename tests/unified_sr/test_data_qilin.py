"""Qilin: requests of the published layout become events with all clicks as targets; broken files are named."""

from __future__ import annotations

import csv
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from examples.unified_sr.checking import build_settings
from examples.unified_sr.data import TASKS, Dataset, Example, format_statistics, load_dataset
from examples.unified_sr.data import _parquet as parquet
from examples.unified_sr.settings import DatasetSettings, flatten

README = Path(parquet.__file__).parent / "README.md"
ANY = {"min_user_events": 1, "min_item_events": 1}
NOTE = {
    "note_idx": pa.int64(),
    "note_title": pa.string(),
    "note_content": pa.string(),
    "note_type": pa.int64(),
    "taxonomy1_id": pa.string(),
    "imp_num": pa.float64(),
    "image_path": pa.list_(pa.string()),
}
# The files hold whole numbers partly as floats.
DETAIL = {
    "click": pa.float64(),
    "collect": pa.float64(),
    "comment": pa.float64(),
    "like": pa.float64(),
    "note_idx": pa.int64(),
    "page_time": pa.float64(),
    "position": pa.float64(),
    "share": pa.float64(),
}
REQUEST = {"user_idx": pa.int64(), "session_idx": pa.int64(), "recent_clicked_note_idxs": pa.list_(pa.int64())}
SEARCH, REC = "search_result_details_with_idx", "rec_result_details_with_idx"
Row = dict[str, Any]


def schema_of(folder: str) -> pa.Schema:
    if folder == "notes":
        return pa.schema(NOTE)
    search = folder.startswith("search")
    details = pa.struct(DETAIL | {"search_timestamp" if search else "request_timestamp": pa.float64()})
    fields = REQUEST | {"query": pa.string(), SEARCH if search else REC: pa.list_(details)}
    fields |= {"search_idx": pa.int64(), "query_from_type": pa.int64()} if search else {"request_idx": pa.int64()}
    if folder.endswith("_test"):
        fields |= {"bm25_results": pa.list_(pa.list_(pa.float64()))}
    return pa.schema(fields)


def write(root: Path, folder: str, rows: list[Row], *, parts: int = 1, drop: str = "") -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    size = math.ceil(len(rows) / parts)
    for part in range(parts):
        table = pa.Table.from_pylist(rows[part * size : (part + 1) * size], schema=schema_of(folder))
        if drop:
            table = table.drop_columns([drop])
        pq.write_table(table, root / folder / f"train-{part:05}-of-{parts:05}.parquet")


def page(time: float, clicked: list[int], others: list[int], search: bool) -> list[Row]:
    """A page of results on which every second note is a clicked one, later entries a second later each."""
    notes = [note for pair in zip(clicked, others, strict=False) for note in pair]
    notes += [note for note in (*clicked, *others) if note not in notes]
    return [
        {
            **dict.fromkeys(("collect", "comment", "like", "share"), 0.0),
            "note_idx": note,
            "click": float(note in clicked),
            "position": place + 1.0,
            "page_time": 3.5 if note in clicked else math.nan,
            "search_timestamp" if search else "request_timestamp": time + place,
        }
        for place, note in reversed(list(enumerate(notes)))
    ]


def request(user: int, time: float, clicked: list[int], others: list[int], recent: list[int], query: Any = None) -> Row:
    details = page(time, clicked, others, query is not None)
    return {
        "user_idx": user,
        "session_idx": 0,
        "query": query,
        "recent_clicked_note_idxs": recent,
        SEARCH if query is not None else REC: details,
    }


def small(root: Path) -> str:
    """Two users, four requests each, of every folder one."""
    notes = [{"note_idx": n, "note_title": f"标题 {n}", "note_content": f"内容 {n}"} for n in range(60)]
    notes[1].update(note_title=None)
    notes[2].update(note_title=" ", note_content="")
    write(root, "notes", notes, parts=3)
    write(root, "user_feat", [])
    users = (0, 1)
    write(
        root, "search_train", [request(u, 100 + u, [1 + u, 3 + u], [5, 6], [20, 21], f" 火锅\t店{u} ") for u in users]
    )
    write(root, "recommendation_train", [request(u, 200, [7, 8 + u], [9], [1, 30, 31]) for u in users])
    write(root, "search_test", [request(u, 300, [10, 11, 12], [13], [7, 40], "旅行") for u in users])
    write(root, "recommendation_test", [request(u, 400, [14, 15], [], [10, 50]) for u in users])
    return str(root)


@pytest.fixture(params=[4096, 1])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(parquet, "BATCH_ROWS", request.param)
    return small(tmp_path / "qilin")


def names(dataset: Dataset, indices: Any) -> list[int]:
    return [int(dataset.items[index].id) for index in indices]


def only(examples: tuple[Example, ...], user: str) -> Example:
    (example,) = (example for example in examples if example.user == user)
    return example


def test_a_request_is_an_example_with_its_clicks_its_query_and_its_recorded_history(folder: str) -> None:
    dataset = load_dataset(folder, min_user_events=1, min_item_events=0)
    search, rec = only(dataset.train["search"], "1"), only(dataset.train["rec"], "1")
    # The pages are written in reverse: the targets keep the file's order, and the time is that of the first entry.
    assert names(dataset, search.target) == [4, 2]
    assert (search.query, search.timestamp) == ("火锅 店1", 101)
    assert names(dataset, search.history) == [20, 21]
    assert (sorted(names(dataset, rec.target)), rec.query, rec.timestamp) == ([7, 9], "", 200)
    assert names(dataset, rec.history) == [1, 30, 31]
    test = only(dataset.test["search"], "0")
    assert test.qid == "search-0"
    assert sorted(names(dataset, test.target)) == [10, 11, 12]
    assert set(names(dataset, dataset.seen(test))) == {1, 3, 7, 8, 20, 21, 30, 31, 40}
    assert {item.title for item in dataset.items if item.id in ("0", "1", "2", "7")} == {"内容 1", "2", "标题 7"}
    assert not any(dataset.valid.values())
    table = format_statistics(dataset)
    assert "0 requests without a click, 0 searches without a query" in table


@pytest.mark.parametrize(
    ("histories", "expected"),
    [("recorded", [7, 40]), ("recorded-newest-first", [40, 7]), ("events", [1, 3, 7, 8])],
)
def test_the_history_is_chosen(tmp_path: Path, histories: str, expected: list[int]) -> None:
    dataset = load_dataset(small(tmp_path), min_user_events=1, min_item_events=0, histories=histories)
    found = names(dataset, only(dataset.test["search"], "0").history)
    assert (found if histories != "events" else sorted(found)) == expected
    last = load_dataset(small(tmp_path), min_user_events=1, min_item_events=0, histories=histories, max_history=1)
    assert names(last, only(last.test["search"], "0").history) == found[-1:]


def test_the_catalogue_is_what_the_minima_leave(folder: str) -> None:
    clicked = {1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 14, 15}
    assert {int(item.id) for item in load_dataset(folder, **ANY).items} == clicked
    everything = load_dataset(folder, item_counts="impressions", **ANY)
    assert {int(item.id) for item in everything.items} == clicked | {5, 6, 9, 13, 20, 21, 30, 31, 40, 50}
    # Of each user's test search: clicked by both are 10, 11 and 12; of the rest of that page 13 is shown twice.
    twice = load_dataset(folder, min_user_events=1, min_item_events=2, item_counts="impressions")
    assert {13, 40, 50} <= {int(item.id) for item in twice.items}
    assert {13, 40, 50}.isdisjoint(
        int(item.id) for item in load_dataset(folder, min_user_events=1, min_item_events=2).items
    )


def test_a_click_that_the_history_holds_is_a_repeat(tmp_path: Path) -> None:
    small(tmp_path)
    write(
        tmp_path,
        "search_test",
        [request(0, 300, [40, 3, 12], [13], [40], "旅行"), request(1, 300, [10], [], [], "旅行")],
    )
    dataset = load_dataset(str(tmp_path), **ANY)
    assert names(dataset, only(dataset.test["search"], "0").target) == [12], (
        "3 was clicked before, 40 is in the history"
    )
    assert dataset.statistics()["removed"]["repeated_events"] == 2


def test_what_is_tested_on_is_in_no_recorded_training_history(tmp_path: Path) -> None:
    small(tmp_path)
    late = [request(u, 900, [16, 17], [], [14, 30, 10]) for u in (0, 1)]
    write(tmp_path, "recommendation_train", late)
    dataset = load_dataset(str(tmp_path), min_user_events=1, min_item_events=0)
    assert names(dataset, only(dataset.train["rec"], "0").history) == [30]


def test_requests_that_teach_nothing_are_counted(tmp_path: Path) -> None:
    small(tmp_path)
    rows = [request(0, 1, [], [5], [], "茶"), request(0, 2, [5], [], [], " "), request(0, 3, [6], [], [], "茶")]
    rows[1]["query"] = None
    write(tmp_path, "search_train", rows)
    dataset = load_dataset(str(tmp_path), **ANY)
    removed = dataset.statistics()["removed"]
    assert (removed["requests_without_a_click"], removed["searches_without_a_query"]) == (1, 1)
    assert [names(dataset, example.target) for example in dataset.train["search"]] == [[6]]


def test_the_order_is_that_of_the_files(folder: str) -> None:
    first, second = load_dataset(folder, **ANY), load_dataset(folder, **ANY)
    assert first == second
    assert [int(item.id) for item in first.items] == sorted(int(item.id) for item in first.items)


@pytest.mark.parametrize(
    ("where", "column"),
    [("notes", "note_title"), ("search_train", "recent_clicked_note_idxs"), ("search_test", "query")],
)
def test_a_missing_column_is_named(tmp_path: Path, where: str, column: str) -> None:
    small(tmp_path)
    rows = [{"note_idx": 1}] if where == "notes" else [request(0, 1, [5], [], [], "x")]
    write(tmp_path, where, rows, drop=column)
    with pytest.raises(ValueError, match=rf"{where}.*\.parquet lacks the column\(s\) {column}; it has \w+"):
        load_dataset(str(tmp_path))


def test_a_column_of_another_type_is_named(tmp_path: Path) -> None:
    small(tmp_path)
    path = next((tmp_path / "search_train").iterdir())
    table = pq.read_table(path)
    place = table.column_names.index(SEARCH)
    pq.write_table(table.set_column(place, SEARCH, pa.array(["[]"] * len(table))), path)
    with pytest.raises(ValueError, match=rf"lacks the column\(s\) {SEARCH}\[\]\.note_idx, {SEARCH}\[\]\.click"):
        load_dataset(str(tmp_path))


def test_unknown_notes_bad_values_and_missing_parts_are_named(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "notes" / "train-00000-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match=r"notes lacks 15 of the 21 notes.*note_idx 1; is one of its parts missing"):
        load_dataset(str(tmp_path))
    small(tmp_path)
    rows = [request(0, 1, [5], [], [], "x"), request(0, 1, [5], [], [], "x")]
    rows[1][SEARCH][0]["search_timestamp"] = None
    write(tmp_path, "search_test", rows)
    with pytest.raises(ValueError, match=r"search_test.*row 2: search_timestamp is None"):
        load_dataset(str(tmp_path))
    next((tmp_path / "search_test").iterdir()).write_bytes(b"PAR1 version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"search_test.*is no complete Parquet file"):
        load_dataset(str(tmp_path))
    for path in (tmp_path / "notes").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no notes/\*\.parquet"):
        load_dataset(str(tmp_path))


def test_repeated_notes_are_refused(tmp_path: Path) -> None:
    small(tmp_path)
    write(tmp_path, "notes", [{"note_idx": n % 60} for n in range(61)])
    write(tmp_path, "search_train", [request(0, 1, [0], [], [], "x")])
    with pytest.raises(ValueError, match="repeats the note_idx 0"):
        load_dataset(str(tmp_path))


def test_a_missing_pyarrow_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'gradsub\[examples\]'"):
        load_dataset(source)


def crowd(root: Path) -> str:
    """Forty users with four to eight requests of each kind over sixty notes."""
    draw = random.Random(0)
    write(root, "notes", [{"note_idx": n, "note_title": f"n{n}"} for n in range(800)])
    rows: dict[str, list[Row]] = {
        f"{task}_{part}": [] for task in ("search", "recommendation") for part in ("train", "test")
    }
    for user in range(40):
        for step in range(draw.randrange(8, 16)):
            query = f"q{step}" if step % 2 else None
            notes = [*draw.sample(range(60), 8), 100 + 16 * user + step]
            part = "test" if step > 7 else "train"
            clicked = notes[: draw.randrange(1, 4)] + notes[8:]
            others = notes[3:6]
            if step == 0 and user < 3:  # clicked once and displayed twice
                (others if user else clicked).append(60)
            row = request(user, step * 100 + user, clicked, others, notes[6:8], query)
            rows[f"{'search' if query else 'recommendation'}_{part}"].append(row)
    for name, requests in rows.items():
        write(root, name, requests)
    return str(root)


def test_the_published_preprocessing_is_a_set_of_settings(tmp_path: Path) -> None:
    block = re.search(r"is approached by these settings:\n\n((?:    .*\n)+)", README.read_text(encoding="utf-8"))
    assert block is not None
    source = crowd(tmp_path)
    settings = build_settings("gems", {**flatten(yaml.safe_load(block[1])), "data.source": source})
    dataset = load_dataset(**dict(DatasetSettings.of(settings)))
    assert {int(item.id) for item in dataset.items} == set(range(61)), "the other notes occur once"
    for task in TASKS:
        own = Counter(example.user for part in (dataset.train, dataset.valid, dataset.test) for example in part[task])
        assert set(own) == set(dataset.events)
        assert all(len(example.target) == 1 for example in dataset.train[task])
        assert any(len(example.target) > 1 for example in dataset.test[task])
        assert len(dataset.test[task]) == len(dataset.valid[task]) == len(dataset.events)
        for example in dataset.test[task]:
            assert example.timestamp == max(
                other.timestamp
                for part in (dataset.train, dataset.valid, dataset.test)
                for other in part[task]
                if other.user == example.user
            )
    clicks = load_dataset(**{**dict(DatasetSettings.of(settings)), "item_counts": "events"})
    assert {int(item.id) for item in clicks.items} == set(range(60)), "note 60 was clicked once"


def test_the_published_judgements_have_this_form(tmp_path: Path) -> None:
    """The qrels in the data set's repository number the test requests by row; the targets here are the same."""
    small(tmp_path)
    rows = [request(0, 300, [10, 11, 12], [13], [], "a"), request(1, 310, [14], [15], [], "b")]
    write(tmp_path, "search_test", rows)
    qrels = [(number, row["note_idx"]) for number, each in enumerate(rows) for row in each[SEARCH] if row["click"]]
    with (tmp_path / "search.test.qrels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("qid", "pid"), *qrels])
    dataset = load_dataset(str(tmp_path), **ANY)
    judged = {
        (int(example.user), note) for example in dataset.test["search"] for note in names(dataset, example.target)
    }
    assert judged == set(qrels)
