"""Amazon reviews: the files of three years, queries out of category paths, and the published judgements of them."""

from __future__ import annotations

import doctest
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from examples.unified_sr.data import TASKS, Dataset, Example, _queries, format_statistics, load_dataset
from examples.unified_sr.data._queries import category_query

ANY = {"min_user_events": 1, "min_item_events": 1}
PARTS = ("train", "valid", "test")
Row = dict[str, Any]

PATHS = {
    "A0": [["Cell Phones & Accessories", "Cases & Covers", "Basic Cases"], ["Electronics", "Phone Cases for Travel"]],
    "A1": [["Cell Phones & Accessories", "Batteries"]],
    "A2": [["Electronics"]],
    "A3": [],
}
QUERIES = {
    "A0": ["cell phones accessories covers basic cases", "electronics phone cases travel"],
    "A1": ["cell phones accessories batteries"],
}


def reviews_2014(users: int = 6) -> list[Row]:
    """Every user reviews eight products, a day apart."""
    return [
        {
            "reviewerID": f"U{user}",
            "asin": f"A{(user + step) % 8}",
            "reviewerName": 'J. "Mac" Donald',
            "helpful": [2, 3],
            "reviewText": "It's great.\u2028Really.",
            "overall": 5.0,
            "summary": "Great",
            "unixReviewTime": 1252800000 + 86400 * step,
            "reviewTime": "09 13, 2009",
        }
        for user in range(users)
        for step in range(8)
    ]


def metadata_2014(items: int = 8) -> list[Row]:
    return [
        {
            "asin": f"A{number}",
            "title": f"Girls' &quot;Ballet&quot;  Tutu {number}",
            "price": 3.17,
            "related": {"also_bought": ["B00JHONN1S"]},
            "categories": PATHS.get(f"A{number}", [["Electronics", f"Lamps {number}"]]),
        }
        for number in range(items)
    ]


def write(folder: Path, reviews: list[Row], metadata: list[Row], year: int = 2014) -> str:
    """The files as each year publishes them: names, field names, and in 2014 Python literals for metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    if year == 2018:
        metadata = [{**row, "category": (row["categories"] or [[]])[0], "main_cat": "x"} for row in metadata]
        for row in metadata:
            del row["categories"]
    if year == 2023:
        renamed = {"reviewerID": "user_id", "asin": "parent_asin", "unixReviewTime": "timestamp", "overall": "rating"}
        reviews = [{**{renamed.get(key, key): value for key, value in row.items()}, "asin": "V1"} for row in reviews]
        reviews = [{**row, "timestamp": 1000 * row["timestamp"]} for row in reviews]
        metadata = [
            {**row, "categories": (row["categories"] or [[]])[0], "parent_asin": row["asin"]} for row in metadata
        ]
    dumped = [repr(row) if year == 2014 else json.dumps(row) for row in metadata]
    names = {
        2014: ("reviews_Phones_5.json.gz", "meta_Phones.json.gz"),
        2018: ("Phones_5.json.gz", "meta_Phones.json.gz"),
        2023: ("Phones.jsonl.gz", "meta_Phones.jsonl.gz"),
    }[year]
    for name, lines in zip(names, ([json.dumps(row) for row in reviews], dumped), strict=True):
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
    return str(folder)


def every_example(dataset: Dataset) -> list[Example]:
    return [
        example for part in (dataset.train, dataset.valid, dataset.test) for task in TASKS for example in part[task]
    ]


def name_of(dataset: Dataset, example: Example) -> str:
    (target,) = example.target
    return dataset.items[target].id


@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_the_files_of_each_year_hold_the_same(tmp_path: Path, year: int) -> None:
    plain = load_dataset(write(tmp_path / "2014" / "phones", reviews_2014(), metadata_2014()), **ANY)
    source = write(tmp_path / str(year) / "phones", reviews_2014(), metadata_2014(), year)
    for searches in ("half", "every"):
        dataset = load_dataset(source, searches=searches, **ANY)
        assert dataset.events == plain.events
        assert dataset.items == plain.items
        # One path is all that the later years have.
        kept = QUERIES if year == 2014 else {name: queries[:1] for name, queries in QUERIES.items()}
        for name in ("A0", "A1", "A2", "A3"):
            asked = {example.query for example in every_example(dataset) if name_of(dataset, example) == name}
            asked.discard("")
            expected = set(kept.get(name, []))
            assert asked == expected if searches == "every" else asked <= expected
    assert plain.items[0].title == 'Girls\' "Ballet" Tutu 0'
    assert [item.id for item in plain.items] == [f"A{number}" for number in range(8)]
    for path in (tmp_path / str(year) / "phones").iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert load_dataset(source, searches="every", **ANY) == dataset


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (["Camera, Photo", "Digital Camera Lenses"], "photo digital camera lenses"),
        (["Clothing, Shoes & Jewelry", "Men", "Men's T-Shirts"], "clothing shoes jewelry men men's t-shirts"),
        (["Books", "Books", "books"], "books"),
        (["Toys", "and the"], "toys"),
        (["A", "of"], ""),
        (["Toys"], ""),
        ([], ""),
        (["Électronique", "3D-Drucker"], "électronique 3d-drucker"),
    ],
)
def test_a_category_path_makes_a_query(path: list[str], query: str) -> None:
    assert category_query(path) == query


def test_the_examples_in_the_docstring_run() -> None:
    assert doctest.testmod(_queries) == doctest.TestResults(failed=0, attempted=5)


def test_half_of_the_purchases_are_searches_and_each_is_one_event(tmp_path: Path) -> None:
    metadata = metadata_2014(60)
    reviews = [
        {"reviewerID": f"U{user}", "asin": f"A{(7 * user + step) % 60}", "unixReviewTime": step}
        for user in range(40)
        for step in range(20)
    ]
    source = write(tmp_path, reviews, metadata)
    dataset = load_dataset(source, **ANY)
    per_task = dataset.statistics()["per_task"]
    assert per_task["rec"]["events"] + per_task["search"]["events"] == len(reviews)
    assert 0.4 < per_task["search"]["events"] / len(reviews) < 0.6
    drawn = Counter(example.query for example in every_example(dataset) if name_of(dataset, example) == "A0")
    assert set(drawn) == {"", *QUERIES["A0"]}, "both queries of the product are drawn"
    assert load_dataset(source, **ANY) == dataset


def test_every_purchase_is_a_recommendation_and_a_search_for_each_query(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, reviews_2014(), metadata_2014()), searches="every", **ANY)
    assert dataset.statistics()["events"] == 48, "derived searches are no further events of a user"
    assert all(len(events) == 8 for events in dataset.events.values())
    with pytest.raises(ValueError, match="0 of 48 events remain with min_user_events=9"):
        load_dataset(str(tmp_path), searches="every", min_user_events=9, min_item_events=1)
    bought = {user: [dataset.items[item].id for item in events] for user, events in dataset.events.items()}
    of_purchase: dict[tuple[str, str], set[str]] = {}
    parts = {"train": dataset.train, "valid": dataset.valid, "test": dataset.test}
    for part, tasks in parts.items():
        for task in TASKS:
            for example in tasks[task]:
                name = name_of(dataset, example)
                place = bought[example.user].index(name)
                assert [dataset.items[item].id for item in example.history] == bought[example.user][:place]
                assert {dataset.items[item].id for item in dataset.seen(example)} == set(bought[example.user][:place])
                of_purchase.setdefault((example.user, name), set()).add(part)
    assert all(len(found) == 1 for found in of_purchase.values()), "all questions about a purchase are in one part"
    for user, names in bought.items():
        able = {task: [name for name in names if task == "rec" or name not in ("A2", "A3")] for task in TASKS}
        last = {able[task][-1] for task in TASKS}
        second = {[name for name in able[task] if name not in last][-1] for task in TASKS}
        for task in TASKS:
            for part, wanted in (("test", last), ("valid", second)):
                held_out = {name_of(dataset, example) for example in parts[part][task] if example.user == user}
                assert held_out == wanted.intersection(able[task])


def test_several_questions_about_one_purchase_are_one_event_of_a_task(tmp_path: Path) -> None:
    source = write(tmp_path, reviews_2014(), metadata_2014())
    searched = load_dataset(source, searches="every", min_task_events=6, **ANY)
    assert len(searched.events) == 6, "two of each user's eight products have no query"
    with pytest.raises(ValueError, match=r"0 of 48 events remain .* min_task_events=7"):
        load_dataset(source, searches="every", min_task_events=7, **ANY)


def test_what_one_part_asks_about_no_other_does(tmp_path: Path) -> None:
    """The last purchase of each user has no query, so the last search is about the one before it."""
    metadata = [
        {**row, "categories": [] if row["asin"] == "A7" else [["a", f"b{row['asin']}"]]} for row in metadata_2014()
    ]
    reviews = [row for row in reviews_2014() if row["reviewerID"] == "U0"]
    dataset = load_dataset(write(tmp_path, reviews, metadata), searches="every", **ANY)
    found = {part: {name_of(dataset, e) for task in TASKS for e in getattr(dataset, part)[task]} for part in PARTS}
    assert (found["test"], found["valid"]) == ({"A7", "A6"}, {"A5"})
    assert not found["train"] & (found["test"] | found["valid"])
    qids = [example.qid for example in every_example(dataset)]
    assert len(set(qids)) == len(qids)


def test_reviews_without_metadata_and_second_lines_are_counted(tmp_path: Path) -> None:
    metadata = [row for row in metadata_2014() if row["asin"] != "A5"]
    again = {**metadata[0], "title": "Another title"}
    other = {**metadata[0], "asin": "NOBODY"}
    reviews = [*reviews_2014(), reviews_2014()[0]]
    dataset = load_dataset(write(tmp_path, reviews, [*metadata, again, other]), **ANY)
    removed = dataset.statistics()["removed"]
    assert (removed["reviews_without_metadata"], removed["repeated_metadata"]) == (6, 1)
    assert removed["repeated_events"] == 1
    assert dataset.items[0].title == 'Girls\' "Ballet" Tutu 0'
    assert {item.id for item in dataset.items} == {f"A{number}" for number in range(8)} - {"A5"}
    assert "6 reviews without metadata" in format_statistics(dataset)


@pytest.mark.parametrize(
    ("kind", "line", "messages"),
    [
        ("reviews", '{"reviewerID": "U1", "asin": "A1"', ["reviews_Phones_5.json.gz, line 3", "no JSON"]),
        ("reviews", '__import__("os").getcwd()', ["line 3", "no JSON"]),
        ("reviews", '{"asin": "A1", "unixReviewTime": 1}', ["line 3", "'reviewerID' is missing"]),
        ("reviews", '{"reviewerID": "U1", "unixReviewTime": 1}', ["line 3", "'asin' is missing"]),
        ("reviews", '{"reviewerID": "U1", "asin": "A1"}', ["line 3", "'unixReviewTime' is missing"]),
        ("meta", "{'asin': 'A1', 'title': 'x', 'categories': [['x'}", ["meta_Phones.json.gz, line 3", "no JSON"]),
        ("meta", "{'asin': 'A7', 'categories': 'Toys'}", ["meta_Phones.json.gz, line 3", "'categories' is 'Toys'"]),
        ("meta", "{'asin': 'A7', 'categories': [['Toys', 3]]}", ["line 3", "list of names"]),
        ("meta", "{'asin': 'A7', 'title': ['x']}", ["line 3", "'title' is ['x']"]),
        ("meta", "{'title': 'x'}", ["line 3", "'asin' is missing"]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, kind: str, line: str, messages: list[str]) -> None:
    source = write(tmp_path, reviews_2014(), metadata_2014())
    (path,) = (path for path in tmp_path.iterdir() if path.name.startswith(kind))
    lines = gzip.decompress(path.read_bytes()).decode().splitlines(keepends=True)
    path.write_bytes(gzip.compress("".join([*lines[:2], line + "\n", *lines[2:]]).encode()))
    with pytest.raises(ValueError, match="Phones") as failure:
        load_dataset(source)
    for message in messages:
        assert message in str(failure.value)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    strangers = [{**row, "asin": f"B{row['asin']}"} for row in metadata_2014()]
    source = write(tmp_path, reviews_2014(), strangers)
    with pytest.raises(ValueError, match=r"describes none of the products in .*same category"):
        load_dataset(source)
    (tmp_path / "more.json").write_text("")
    with pytest.raises(ValueError, match=r"holds more\.json, reviews_Phones_5\.json\.gz where one review file"):
        load_dataset(source)
    (tmp_path / "more.json").unlink()
    (tmp_path / "reviews_Phones_5.json.gz").unlink()
    with pytest.raises(FileNotFoundError, match="holds no review file"):
        load_dataset(source)


def publish(folder: Path, *, train: list[int], queries: list[str], qrels: dict[str, list[str]]) -> None:
    """The four files of Ai et al. (SIGIR 2017)."""
    files = {"query_text.txt.gz": queries, "train_review_id.txt.gz": [f"line_{number}" for number in train]}
    files |= {f"{part}.qrels.gz": lines for part, lines in qrels.items()}
    for name, lines in files.items():
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)


def judged(folder: Path) -> str:
    """User 0 trains on all reviews but those of A4, A5 and A6; the queries are not those of the categories."""
    source = write(folder, reviews_2014(2), metadata_2014())
    qrels = {
        "train": ["U0_0 0 A0 1", "U0_1 0 A0 1", "U0_1 0 A1 1", "U0_0 0 A2 0", "U1_0 0 A3 1"],
        "test": ["U0_2 0 A4 1", "U0_2 0 A6 1", "U0_3 0 A5 1", "U0_2 0 A5 1"],
    }
    publish(
        folder,
        train=[number for number in range(16) if number not in (4, 5, 6)],
        queries=["phone case", "travel case", "lamp", "desk lamp"],
        qrels=qrels,
    )
    return source


def test_published_queries_and_their_split(tmp_path: Path) -> None:
    dataset = load_dataset(judged(tmp_path), **ANY)
    ids = [item.id for item in dataset.items]
    train = [(example.user, example.query, name_of(dataset, example)) for example in dataset.train["search"]]
    assert train == [
        ("U0", "phone case", "A0"),
        ("U0", "travel case", "A0"),
        ("U0", "travel case", "A1"),
        ("U1", "phone case", "A3"),
    ]
    test = {example.query: example for example in dataset.test["search"]}
    assert [ids[item] for item in test["lamp"].target] == ["A4", "A5", "A6"], "one question with several answers"
    assert [ids[item] for item in test["desk lamp"].target] == ["A5"]
    assert [ids[item] for item in test["lamp"].history] == ["A0", "A1", "A2", "A3"]
    assert [ids[item] for item in test["desk lamp"].history] == ["A0", "A1", "A2", "A3", "A4"]
    assert [name_of(dataset, example) for example in dataset.test["rec"]] == ["A4", "A5", "A6"]
    assert not any(dataset.valid.values())
    (last,) = (
        example for example in dataset.train["rec"] if example.user == "U0" and name_of(dataset, example) == "A7"
    )
    assert [ids[item] for item in last.history] == ["A0", "A1", "A2", "A3"], (
        "what is tested on is in no training history"
    )
    queries = {example.query for example in every_example(load_dataset(judged(tmp_path), split="leave-one-out", **ANY))}
    assert queries == {"", "phone case", "travel case", "lamp", "desk lamp"}


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("test.qrels", "U0_2 0 A4", r"test\.qrels\.gz, line 2: 'U0_2 0 A4' is no judgement of the form"),
        ("test.qrels", "U02 0 A4 1", "line 2: 'U02 0 A4 1' is no judgement"),
        ("test.qrels", "U0_x 0 A4 1", "line 2: 'U0_x 0 A4 1' is no judgement"),
        ("test.qrels", "U0_2 0 A4 5", "line 2: 'U0_2 0 A4 5' is no judgement"),
        ("test.qrels", "U0_4 0 A4 1", r"line 2: query_text\.txt has no query 4 \(4 lines, from 0\)"),
        (
            "train.qrels",
            "U0_2 0 GHOST 1",
            r"train\.qrels judges the item 'GHOST' for user 'U0', who has no such review",
        ),
        ("train.qrels", "U0_2 0 A4 1", "judges the item 'A4' for user 'U0', who has no such review in that part"),
        ("train_review_id.txt", "17", "line 2: '17' is no review of the form line_NUMBER"),
        ("train_review_id.txt", "line_16", r"train_review_id\.txt names line 16 of 16; the reviews are not the file"),
    ],
)
def test_bad_judgements_are_named(tmp_path: Path, name: str, line: str, message: str) -> None:
    source = judged(tmp_path)
    path = tmp_path / f"{name}.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines(keepends=True)
    path.write_bytes(gzip.compress("".join([*lines[:1], line + "\n", *lines[1:]]).encode()))
    with pytest.raises(ValueError, match=message):
        load_dataset(source, **ANY)


def test_all_published_files_are_needed(tmp_path: Path) -> None:
    source = judged(tmp_path)
    (tmp_path / "train_review_id.txt.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"but no train_review_id\.txt \(or \.gz\); the published judgements"):
        load_dataset(source)
