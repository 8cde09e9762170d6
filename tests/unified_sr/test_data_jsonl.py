"""JSON lines of one's own: any events become examples that never look into the future, and bad lines are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unified_sr.trec_files import evaluate_files, read_qrels

from examples.unified_sr.config import resolve
from examples.unified_sr.data import TASKS, Dataset, Example, format_statistics, load_dataset
from examples.unified_sr.run import run

IN_TMP_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
ANY = {"min_user_events": 1, "min_item_events": 1}
PARTS = ("train", "valid", "test")
Row = dict[str, Any]


def write(folder: Path, events: list[Row], items: list[Row] | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({item for row in events for item in answers(row)})
    catalogue = [{"id": name, "title": f"Title of {name}"} for name in names] if items is None else items
    for name, rows in (("items", catalogue), ("events", events)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(folder)


def answers(row: Row) -> list[str]:
    return [str(item) for item in row.get("items", [row.get("item")])]


def examples_of(dataset: Dataset, part: str) -> list[Example]:
    return [example for task in TASKS for example in getattr(dataset, part)[task]]


def names_of(dataset: Dataset, indices: Any) -> list[str]:
    return [dataset.items[index].id for index in indices]


@st.composite
def event_rows(draw: st.DrawFn, *, split: bool) -> list[Row]:
    """Shuffled events with one or several items, tied times and repeats, whose time a set of answers makes unique."""
    rows = []
    for number in range(draw(st.integers(4, 40))):
        items = draw(st.lists(st.sampled_from([f"i{n}" for n in range(12)]), min_size=1, max_size=3, unique=True))
        # The last item tells the events apart, so that a test can find the event of an example.
        row: Row = {
            "user": f"u{draw(st.integers(0, 3))}",
            "items": [*items, f"own{number}"],
            "timestamp": draw(st.integers(0, 8)),
        }
        if draw(st.booleans()):
            row["query"] = draw(st.sampled_from(["red", "blue"]))
        if split:
            row["split"] = draw(st.sampled_from(PARTS))
        rows.append(row)
    for step in range(4):
        row = {"user": "u9", "items": [f"x{step}", f"y{step}"], "timestamp": step}
        rows.append({**row, "split": PARTS[max(0, step - 1)]} if split else row)
    return list(draw(st.permutations(rows)))


@IN_TMP_PATH
@given(rows=st.booleans().flatmap(lambda split: event_rows(split=split)), max_history=st.integers(1, 9))
def test_no_example_knows_its_future_nor_a_later_part(tmp_path: Path, rows: list[Row], max_history: int) -> None:
    dataset = load_dataset(write(tmp_path, rows), max_history=max_history, **ANY)
    own_split = "split" in rows[0]
    ordered = [row for _, row in sorted(enumerate(rows), key=lambda pair: (pair[1]["timestamp"], pair[0]))]
    found = 0
    for part in PARTS:
        for example in examples_of(dataset, part):
            found += 1
            target = names_of(dataset, example.target)
            (place,) = [
                n for n, row in enumerate(ordered) if target[-1] in row["items"] and row["user"] == example.user
            ]
            event, before = ordered[place], [row for row in ordered[:place] if row["user"] == example.user]
            met = list(dict.fromkeys(item for row in before for item in row["items"]))
            assert target == [item for item in event["items"] if item not in met], "repeats are no targets"
            assert (example.query, example.timestamp) == (event.get("query", ""), event["timestamp"])
            assert set(names_of(dataset, dataset.seen(example))) == set(met)
            later = [row for row in before if own_split and PARTS.index(row["split"]) > PARTS.index(part)]
            hidden = {item for row in later for item in first_met(row, before)}
            assert names_of(dataset, example.history) == [item for item in met if item not in hidden][-max_history:]
            if own_split:
                assert event["split"] == part
    removed = dataset.statistics()["removed"]
    gone = removed["events_after_a_held_out_one"] + removed["recommendations_without_history"]
    assert found + gone == len(rows), "every event has an item of its own, so none is lost as a repeat"
    assert not (own_split and removed["events_after_a_held_out_one"])


def first_met(row: Row, before: list[Row]) -> list[str]:
    earlier = {item for other in before[: before.index(row)] for item in other["items"]}
    return [item for item in row["items"] if item not in earlier]


@IN_TMP_PATH
@given(rows=event_rows(split=False))
def test_each_target_makes_a_training_example(tmp_path: Path, rows: list[Row]) -> None:
    source = write(tmp_path, rows)
    share, each = (load_dataset(source, train_targets=rule, **ANY) for rule in ("share", "each"))
    assert (share.test, share.valid, share.items) == (each.test, each.valid, each.items)
    for task in TASKS:
        assert [
            (example.user, example.history, example.query, (target,))
            for example in share.train[task]
            for target in example.target
        ] == [(example.user, example.history, example.query, example.target) for example in each.train[task]]
    qids = [example.qid for part in PARTS for example in examples_of(each, part)]
    assert len(set(qids)) == len(qids)


def rows_of(count: int = 8, users: int = 3) -> list[Row]:
    return [
        {"user": f"u{user}", "items": [f"i{step}", f"j{user}{step}"], "timestamp": step, "query": "red" * (step % 2)}
        for user in range(users)
        for step in range(count)
    ]


def test_ids_may_be_numbers_and_files_compressed(tmp_path: Path) -> None:
    rows: list[Row] = [{"user": 7, "item": n, "timestamp": -n / 2, "query": None} for n in range(5)]
    source = write(tmp_path, rows, [{"id": n, "title": " red\n chair ", "colour": "red"} for n in range(5)])
    plain = load_dataset(source, **ANY)
    assert [item.id for item in plain.items] == ["0", "1", "2", "3", "4"]
    assert plain.items[0].title == "red chair"
    assert names_of(plain, plain.events["7"]) == ["4", "3", "2", "1", "0"]
    for path in list(tmp_path.iterdir()):
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
        path.unlink()
    assert load_dataset(source, **ANY) == plain


def test_order_and_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    source = write(tmp_path, rows_of())
    dataset = load_dataset(source, **ANY)
    assert dataset == load_dataset(source, **ANY)
    assert dataset.statistics()["events"] == 48
    assert dataset.statistics()["per_task"]["rec"]["targets_mean"] == 2
    assert "targets mean" in format_statistics(dataset)


def test_an_items_minimum_counts_its_answers_and_an_event_goes_with_its_last_item(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, rows_of()), min_user_events=1, min_item_events=3)
    assert {item.id for item in dataset.items} == {f"i{step}" for step in range(8)}
    assert all(len(example.target) == 1 for part in PARTS for example in examples_of(dataset, part))
    assert dataset.statistics()["removed"]["events_by_k_core"] == 24
    rows = rows_of(users=4)
    rows[0]["items"] = ["only0"]
    dataset = load_dataset(write(tmp_path, rows), min_user_events=8, min_item_events=3)
    assert set(dataset.events) == {"u1", "u2", "u3"}, "u0's first event has lost its only item, and eight were needed"


def test_the_minimum_of_each_task(tmp_path: Path) -> None:
    rows = [row for row in rows_of() if row["user"] != "u1" or not row["query"] or row["timestamp"] < 5]
    assert set(load_dataset(write(tmp_path, rows), min_task_events=2, **ANY).events) == {"u0", "u1", "u2"}
    assert set(load_dataset(write(tmp_path, rows), min_task_events=3, **ANY).events) == {"u0", "u2"}


def test_leave_one_out_ignores_the_split(tmp_path: Path) -> None:
    split = [{**row, "split": "test" if row["timestamp"] == 2 else "train"} for row in rows_of()]
    plain = load_dataset(write(tmp_path / "a" / "shop", rows_of()), **ANY)
    assert load_dataset(write(tmp_path / "b" / "shop", split), split="leave-one-out", **ANY) == plain
    own = load_dataset(write(tmp_path / "b" / "shop", split), **ANY)
    assert {example.timestamp for example in examples_of(own, "test")} == {2}
    assert [example.qid for example in own.test["rec"]] == ["rec-u0", "rec-u1", "rec-u2"]
    assert not examples_of(own, "valid")
    for example in examples_of(own, "train"):
        assert "i2" not in names_of(own, example.history + example.target)


@pytest.mark.parametrize(
    ("file", "line", "messages"),
    [
        ("events", '{"user": "u0", "item": "i0"', ["events.jsonl, line 4", "no JSON", '{"user": "u0"']),
        ("events", '["u0", "i0", 3]', ["events.jsonl, line 4", "no JSON object"]),
        ("events", '{"item": "i0", "timestamp": 1}', ["events.jsonl, line 4", "'user' is missing"]),
        ("events", '{"user": "", "item": "i0", "timestamp": 1}', ["line 4", "'user' is ''"]),
        ("events", '{"user": "u0", "item": "i0"}', ["line 4", "'timestamp' is missing"]),
        ("events", '{"user": "u0", "item": "i0", "timestamp": "noon"}', ["line 4", "'timestamp' is 'noon'"]),
        ("events", '{"user": "u0", "item": "i0", "timestamp": NaN}', ["line 4", "finite"]),
        ("events", f'{{"user": "u0", "item": "i0", "timestamp": {"9" * 400}}}', ["line 4", "finite"]),
        ("events", '{"user": "u0", "timestamp": 1}', ["line 4", "either 'item' or 'items'"]),
        ("events", '{"user": "u0", "item": "i0", "items": ["i1"], "timestamp": 1}', ["line 4", "not both"]),
        ("events", '{"user": "u0", "items": [], "timestamp": 1}', ["line 4", "one or more"]),
        ("events", '{"user": "u0", "items": ["i0", "i0"], "timestamp": 1}', ["line 4", "each item once"]),
        ("events", '{"user": "u0", "items": ["i0", null], "timestamp": 1}', ["line 4", "'items' is None"]),
        ("events", '{"user": "u0", "item": "i0", "timestamp": 1, "querry": "x"}', ["line 4", "'querry'", "query"]),
        ("events", '{"user": "u0", "item": "i0", "timestamp": 1, "query": 3}', ["line 4", "'query' is 3"]),
        ("events", '{"user": "u0", "item": "i0", "timestamp": 1, "split": "dev"}', ["line 4", "'dev'", "valid"]),
        ("events", '{"user": "u0", "item": "i0", "timestamp": 1, "split": "test"}', ["24 of 25", "'split'"]),
        ("events", '{"user": "u0", "item": "ghost", "timestamp": 1}', ["'ghost'", "'u0'", "items.jsonl lacks"]),
        ("items", '{"id": "i0", "title": "again"}', ["items.jsonl, line 4", "'i0' occurs twice"]),
        ("items", '{"name": "i0"}', ["items.jsonl, line 4", "'id' is missing"]),
        ("items", '{"id": "new", "title": 3}', ["items.jsonl, line 4", "'title' is 3"]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, file: str, line: str, messages: list[str]) -> None:
    source = write(tmp_path, rows_of())
    path = tmp_path / f"{file}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[3:]]), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{file}\.jsonl") as failure:
        load_dataset(source, **ANY)
    for message in messages:
        assert message in str(failure.value)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    source = write(tmp_path, rows_of())
    events = tmp_path / "events.jsonl"
    whole = events.read_bytes()
    events.write_bytes(whole[:200] + b"\xff" + whole[200:])
    with pytest.raises(ValueError, match=r"events\.jsonl, line 3: not UTF-8"):
        load_dataset(source)
    (tmp_path / "events.jsonl.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(ValueError, match=r"events\.jsonl, events\.jsonl\.gz where one"):
        load_dataset(source)
    events.unlink()
    with pytest.raises(ValueError, match=r"events\.jsonl\.gz is damaged or cut off"):
        load_dataset(source)
    (tmp_path / "events.jsonl.gz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"events\.jsonl\.gz is damaged or cut off after line 0"):
        load_dataset(source)
    (tmp_path / "events.jsonl.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"no events\.jsonl"):
        load_dataset(source)


def test_a_folder_of_no_or_two_formats_is_described(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds nothing.*RecBole.*items\.jsonl.*Qilin.*Amazon"):
        load_dataset(str(tmp_path))
    (tmp_path / "pictures").mkdir()
    for number in range(13):
        (tmp_path / f"table{number:02}.csv").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds pictures/, table00\.csv, .*table10\.csv and 2 more"):
        load_dataset(str(tmp_path))
    write(tmp_path, rows_of())
    (tmp_path / "shop.inter").write_text("")
    with pytest.raises(ValueError, match=r"several formats \(RecBole atomic files, JSON lines.*folder of its own"):
        load_dataset(str(tmp_path))


def test_a_run_trains_on_and_judges_several_targets(tmp_path: Path, llama_folder: str) -> None:
    data = write(tmp_path / "data", rows_of())
    pairs = [
        "data.min_user_events=1",
        "data.min_item_events=1",
        "training.batch_size=4",
        "training.steps=2",
        "evaluation.negatives=3",
    ]
    pairs += ["evaluation.perplexity_tokens=64", "evaluation.perplexity_window=32"]
    chosen = resolve(pairs=pairs, flags={"data.source": data, "model.name": llama_folder, "method.name": "adamw"})
    folder = run(chosen, tmp_path / "out", lambda line: None)
    for task in TASKS:
        judged = read_qrels(folder.file(f"qrels.{task}.trec"))
        assert sorted(judged) == [f"{task}-u{user}" for user in range(3)]
        assert all(len(items) == 2 for items in judged.values())
        theirs = evaluate_files(folder.file(f"run.{task}.trec"), folder.file(f"qrels.{task}.trec"))
        ours = folder.read_json("metrics.json")["final"][task]
        assert theirs == pytest.approx({name: ours[name] for name in theirs})
