"""No example looks into the future, whatever the events; filters reach their fixed point; bad files are refused."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import example as explicit
from hypothesis import strategies as st

from examples.unified_sr.data import MOVIELENS, TASKS, Dataset, Example, format_statistics, load_dataset
from examples.unified_sr.data._queries import movie_query, natural_title, searched

IN_TMP_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
Row = tuple[str, str, int, str]  # user, item, timestamp, query

INTER = "user_id:token\titem_id:token\ttimestamp:float\tquery:token_seq"


def write_folder(folder: Path, rows: list[Row], items: list[str] | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    body = [INTER, *(f"{user}\t{item}\t{stamp}\t{query}" for user, item, stamp, query in rows)]
    (folder / "any.inter").write_text("\n".join(body) + "\n", encoding="utf-8")
    known = sorted({row[1] for row in rows}) if items is None else items
    catalogue = ["item_id:token\ttitle:token_seq", *(f"{item}\tTitle of {item}" for item in known)]
    (folder / "stem.item").write_text("\n".join(catalogue) + "\n", encoding="utf-8")
    return str(folder)


def every_example(dataset: Dataset) -> list[Example]:
    parts = (dataset.train, dataset.valid, dataset.test)
    return [example for part in parts for task in TASKS for example in part[task]]


def timelines(rows: list[Row]) -> dict[str, list[Row]]:
    """Each user's events in order of time, written independently of the code under test."""
    ordered = sorted(enumerate(rows), key=lambda pair: (pair[1][2], pair[0]))
    found: dict[str, list[Row]] = {}
    for _, row in ordered:
        own = found.setdefault(row[0], [])
        if not any(row[1] == earlier[1] for earlier in own):
            own.append(row)
    return found


@st.composite
def interactions(draw: st.DrawFn) -> list[Row]:
    """Shuffled events of both tasks with tied timestamps and repeated items; user "u0" always has a test example."""
    size = draw(st.integers(1, 80))
    rows = [
        (
            f"u{draw(st.integers(0, 4))}",
            f"i{draw(st.integers(0, 14))}",
            draw(st.integers(0, 20)),
            draw(st.sampled_from(["", "red shoe", "blue"])),
        )
        for _ in range(size)
    ]
    rows += [("u0", f"i{number}", draw(st.integers(0, 20)), "") for number in range(20, 24)]
    return list(draw(st.permutations(rows)))


@IN_TMP_PATH
@given(rows=interactions(), max_history=st.integers(1, 30))
def test_no_example_knows_its_future(tmp_path: Path, rows: list[Row], max_history: int) -> None:
    source = write_folder(tmp_path, rows)
    dataset = load_dataset(source, min_user_events=1, min_item_events=1, max_history=max_history)
    ids = [item.id for item in dataset.items]
    lines = timelines(rows)
    examples = every_example(dataset)
    assert len({example.qid for example in examples}) == len(examples)
    held_out: dict[str, list[int]] = {}
    for example in examples:
        own = lines[example.user]
        (target,) = example.target
        places = [
            place
            for place, row in enumerate(own)
            if (row[1], row[2], row[3]) == (ids[target], example.timestamp, example.query)
            and [ids[item] for item in example.history]
            == [earlier[1] for earlier in own[max(0, place - max_history) : place]]
        ]
        assert places, "the history is not the user's latest events before this one"
        assert (example.task == "search") == bool(example.query)
        assert example.history or example.task == "search"
        seen = dataset.seen(example)
        assert target not in seen
        assert any({row[1] for row in own[:place]} - {ids[target]} == {ids[item] for item in seen} for place in places)
        if example in dataset.test[example.task] or example in dataset.valid[example.task]:
            held_out.setdefault(example.user, []).append(places[0])
    for example in (example for task in TASKS for example in dataset.train[task]):
        first = min(held_out.get(example.user, [len(rows)]))
        future = {row[1] for row in lines[example.user][first:]}
        assert not future & {ids[item] for item in (*example.history, *example.target)}


@IN_TMP_PATH
@given(rows=interactions())
def test_last_events_are_held_out_and_every_event_is_accounted_for(tmp_path: Path, rows: list[Row]) -> None:
    dataset = load_dataset(write_folder(tmp_path, rows), min_user_events=1, min_item_events=1)
    index = {item.id: number for number, item in enumerate(dataset.items)}
    for task in TASKS:
        for part, place in ((dataset.test, -1), (dataset.valid, -2)):
            expected = {}
            for user, own in timelines(rows).items():
                of_task = [row for row in own if bool(row[3]) == (task == "search")]
                if len(of_task) >= 3 and own[0] != of_task[place]:
                    expected[user] = (index[of_task[place][1]],)
            assert {example.user: example.target for example in part[task]} == expected
    removed = dataset.statistics()["removed"]
    assert removed["events_by_k_core"] == 0
    assert len(rows) == len(every_example(dataset)) + sum(
        removed[name] for name in ("repeated_events", "events_after_a_held_out_one", "recommendations_without_history")
    )


@IN_TMP_PATH
@explicit(rows=[], minima=(2, 2), chain=4)
@given(rows=interactions(), minima=st.tuples(st.integers(1, 5), st.integers(0, 5)), chain=st.integers(0, 6))
def test_k_core_is_the_largest_fixed_point(
    tmp_path: Path, rows: list[Row], minima: tuple[int, int], chain: int
) -> None:
    # With both minima at 2 this chain unravels from its end, one user or item a round.
    rows = rows + [(f"c{link}", f"x{link + side}", link, "") for link in range(chain) for side in (0, 1)]
    rows = rows + [(f"w{user}", f"k{item}", item, "") for user in range(5) for item in range(5)]  # a core that stays
    dataset = load_dataset(write_folder(tmp_path, rows), min_user_events=minima[0], min_item_events=minima[1])
    users = {user: len(events) for user, events in dataset.events.items()}
    items = Counter(item for events in dataset.events.values() for item in events)
    assert min(users.values()) >= minima[0]
    assert all(items[index] >= minima[1] for index in range(len(dataset.items)))
    # Peeling one user or item at a time, in any order, ends in the same, largest set.
    left = {(row[0], row[1]) for own in timelines(rows).values() for row in own}
    while True:
        of_user, of_item = Counter(user for user, _ in left), Counter(item for _, item in left)
        weak = [pair for pair in left if of_user[pair[0]] < minima[0] or of_item[pair[1]] < minima[1]]
        if not weak:
            break
        left.discard(weak[0])
    kept = {(user, dataset.items[item].id) for user, events in dataset.events.items() for item in events}
    assert kept == left


def _rows(users: int = 6, length: int = 10) -> list[Row]:
    return [
        (f"u{user}", f"i{(user + step) % 12}", step, "a query" if (user + step) % 2 else "")
        for user in range(users)
        for step in range(length)
    ]


def test_ties_follow_the_file_and_not_the_names(tmp_path: Path) -> None:
    order = ["z", "b", "y", "a"]
    source = write_folder(tmp_path, [("u", item, 7, "") for item in order])
    dataset = load_dataset(source, min_user_events=1, min_item_events=1)
    assert [dataset.items[item].id for item in dataset.events["u"]] == order
    (test,) = dataset.test["rec"]
    assert dataset.items[test.target[0]].id == "a"
    assert test.qid == "rec-u"


def test_user_names_cannot_make_two_qids_equal(tmp_path: Path) -> None:
    rows = [
        (user, f"i{step}", step, "q" if step % 2 else "")
        for step in range(10)
        for user in ("a", "valid-a", "rec-a", "train-1-rec-a", "1-rec-a", "search-a")
    ]
    examples = every_example(load_dataset(write_folder(tmp_path, rows)))
    assert len({example.qid for example in examples}) == len(examples)


def test_statistics_count_what_is_there(tmp_path: Path) -> None:
    dataset = load_dataset(write_folder(tmp_path, _rows()), min_item_events=2)
    statistics = json.loads(json.dumps(dataset.statistics()))
    assert statistics["events"] == sum(map(len, dataset.events.values()))
    assert statistics["density"] == pytest.approx(statistics["events"] / statistics["users"] / statistics["items"])
    for task in TASKS:
        own = statistics["per_task"][task]
        assert [own["train"], own["valid"], own["test"]] == [
            len(part[task]) for part in (dataset.train, dataset.valid, dataset.test)
        ]
        lengths = [len(example.history) for example in every_example(dataset) if example.task == task]
        assert own["history_max"] == max(lengths)
        assert own["history_mean"] == pytest.approx(math.fsum(lengths) / len(lengths))
    table = format_statistics(dataset)
    assert f"{statistics['users']} users, {statistics['items']} items" in table
    assert "search" in table.splitlines()[1]


def test_a_folder_without_queries_and_genres_has_only_recommendations(tmp_path: Path) -> None:
    source = write_folder(tmp_path, [(user, item, stamp, "") for user, item, stamp, _ in _rows()])
    for text in ((tmp_path / "any.inter").read_text(), None):
        dataset = load_dataset(source, min_item_events=1)
        assert dataset.tasks == ("rec",)
        assert dataset.test["rec"]
        assert dataset.train["search"] == dataset.valid["search"] == dataset.test["search"] == ()
        assert "search: no events" in format_statistics(dataset)
        if text:  # once more without the column
            lines = [line.rpartition("\t")[0] for line in text.splitlines()]
            (tmp_path / "any.inter").write_text("\n".join(lines))


def _movie_folder(folder: Path) -> str:
    rows = [(f"u{user}", f"i{(3 * user + step) % 30}", step) for user in range(20) for step in range(20)]
    (folder / "m.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + "".join(f"{user}\t{item}\t3\t{stamp}\n" for user, item, stamp in rows)
    )
    (folder / "m.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        + "".join(f"i{item}\tStory {item}, The\t{1970 + item}\tDrama War Drama\n" for item in range(29))
        + "i29\t\tunknown\tunknown\n"
    )
    return str(folder)


def test_movies_get_queries_of_genres_and_decade(tmp_path: Path) -> None:
    dataset = load_dataset(_movie_folder(tmp_path), min_item_events=1)
    assert dataset.tasks == TASKS
    titles = {item.id: item.title for item in dataset.items}
    assert titles["i3"] == "The Story 3"
    assert titles["i29"] == "i29", "an item without a title falls back to its id"
    of_user: dict[str, set[str]] = {}
    for example in every_example(dataset):
        item = dataset.items[example.target[0]].id
        of_user.setdefault(example.user, set()).add(example.task)
        if example.task == "search":
            assert example.query == f"drama war {1970 + int(item[1:]) // 10 * 10}s"
            assert item != "i29", "nobody can search for a movie without a query"
    assert all(tasks == set(TASKS) for tasks in of_user.values())
    searches = dataset.statistics()["per_task"]["search"]["events"]
    assert 0.35 < searches / dataset.statistics()["events"] < 0.65


def test_a_hash_decides_which_events_are_searches(tmp_path: Path) -> None:
    source = _movie_folder(tmp_path)
    assert load_dataset(source) == load_dataset(source)
    half = sum(searched(f"u{user}", f"i{item}") for user in range(100) for item in range(100)) / 10_000
    assert abs(half - 0.5) < 0.025


@pytest.mark.parametrize(
    ("catalogued", "natural"),
    [
        ("Toy Story", "Toy Story"),
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Horseman on the Roof, The (Hussard sur le toit, Le)", "The Horseman on the Roof (Le Hussard sur le toit)"),
        ("Avventura, L'", "L'Avventura"),
        ("Paris, Texas", "Paris, Texas"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Theory of Everything, The Sequel", "Theory of Everything, The Sequel"),
    ],
)
def test_natural_titles(catalogued: str, natural: str) -> None:
    assert natural_title(catalogued) == natural


@pytest.mark.parametrize(
    ("genres", "year", "query"),
    [
        ("Animation Children's Comedy", "1995", "animation children's comedy 1990s"),
        ("Film-Noir Film-Noir", "1948", "film-noir 1940s"),
        ("Drama", "V", "drama"),
        ("unknown", "unkonwn", ""),
        ("Action|Sci-Fi", "2001", "action sci-fi 2000s"),
    ],
)
def test_movie_queries(genres: str, year: str, query: str) -> None:
    assert movie_query(genres, year) == query


def test_equal_titles_are_told_apart_by_the_year(tmp_path: Path) -> None:
    source = _movie_folder(tmp_path)
    path = tmp_path / "m.item"
    path.write_text(path.read_text().replace("Story 7, The", "Story 8, The"))
    titles = {item.id: item.title for item in load_dataset(source, min_item_events=1).items}
    assert (titles["i7"], titles["i8"], titles["i9"]) == ("The Story 8 (1977)", "The Story 8 (1978)", "The Story 9")


def _edit(path: Path, old: str, new: str, count: int = 1) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


@pytest.mark.parametrize(
    ("name", "old", "new", "messages"),
    [
        ("any.inter", "timestamp:float", "when:float", ["timestamp:float", "any.inter", "when:float"]),
        ("any.inter", "timestamp:float", "timestamp:token", ["timestamp:float", "timestamp:token"]),
        (
            "any.inter",
            "user_id:token\titem_id:token",
            "u:token\ti:token",
            ["user_id:token, item_id:token", "u:token, i:token"],
        ),
        ("any.inter", "query:token_seq", "query:float", ["query:token_seq", "query:float"]),
        ("stem.item", "item_id:token", "id:token", ["item_id:token", "stem.item", "id:token"]),
        ("stem.item", "title:token_seq", "label:token_seq", ["title", "stem.item", "label:token_seq"]),
        ("stem.item", "title:token_seq", "title", ["stem.item, line 1", "name:type"]),
        ("stem.item", "title:token_seq", "item_id:token", ["stem.item, line 1"]),
        ("any.inter", "u0\ti0\t0\t", "u0\ti0\tnoon\t", ["any.inter, line 2", "noon"]),
        ("any.inter", "u0\ti0\t0\t", "u0\ti0\tnan\t", ["any.inter, line 2", "nan"]),
        ("any.inter", "u0\ti0\t0\t", "u0\ti0\t0", ["any.inter, line 2", "3 tab-separated fields"]),
        ("any.inter", "u0\ti0\t0\t", "\ti0\t0\t", ["any.inter, line 2", "user_id"]),
        ("any.inter", "u0\ti0\t0\t", "u0\tghost\t0\t", ["'u0'", "'ghost'", "any.inter", "stem.item", "remove"]),
        ("stem.item", "i1\tTitle of i1\n", "i0\tTitle again\n", ["stem.item, line 3", "'i0' occurs twice"]),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, old: str, new: str, messages: list[str]) -> None:
    source = write_folder(tmp_path, _rows())
    load_dataset(source, min_item_events=1)
    _edit(tmp_path / name, old, new)
    with pytest.raises(ValueError, match=r"any\.inter|stem\.item") as failure:
        load_dataset(source, min_item_events=1)
    for message in messages:
        assert message in str(failure.value)


def test_missing_and_surplus_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*movielens-100k"):
        load_dataset(str(tmp_path / "nowhere"))
    source = write_folder(tmp_path / "data", _rows())
    (tmp_path / "data" / "second.item").write_text("")
    with pytest.raises(ValueError, match=r"holds second\.item, stem\.item where one \*\.item file is needed"):
        load_dataset(source)
    (tmp_path / "data" / "second.item").unlink()
    (tmp_path / "data" / "any.inter").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*\.inter file"):
        load_dataset(source)
    (tmp_path / "data" / "any.inter").write_bytes("user_id:token\té".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        load_dataset(source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_user_events": 0}, r"(?s)min_user_events.*greater than or equal to 1.*input_value=0"),
        ({"min_item_events": -1}, r"(?s)min_item_events.*greater than or equal to 0"),
        ({"max_history": 0}, r"(?s)max_history.*greater than or equal to 1"),
        ({"histories": "none"}, r"(?s)histories.*'recorded'.*'none'"),
        ({"min_user_events": 99}, "0 of 60 events remain with min_user_events=99"),
    ],
)
def test_unusable_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(write_folder(tmp_path, _rows()), **arguments)


def test_windows_line_ends_byte_order_mark_and_separators_in_titles(tmp_path: Path) -> None:
    source = write_folder(tmp_path, _rows())
    plain = load_dataset(source, min_item_events=1)
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_dataset(source, min_item_events=1) == plain
    path = tmp_path / "stem.item"
    path.write_text(
        path.read_text(encoding="utf-8").replace("Title of i1\n", "Title\u2028of\x85i1\n"), encoding="utf-8"
    )
    assert len(load_dataset(source, min_item_events=1).items) == len(plain.items)


def test_seen_refuses_a_foreign_example(tmp_path: Path) -> None:
    dataset = load_dataset(write_folder(tmp_path, _rows()), min_item_events=1)
    foreign = Example("rec", "nobody", (), "", (0,), 0.0, "rec-nobody")
    with pytest.raises(ValueError, match="rec-nobody"):
        dataset.seen(foreign)


def test_a_missing_recbole_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps recbole==1\.2\.1"):
        load_dataset(MOVIELENS)
