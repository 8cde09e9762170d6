"""A user's events as one sequence: every training event a target once, no later or held-out one in sight."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import Row, interactions, write_folder

from examples.unified_sr import training
from examples.unified_sr.cli import main
from examples.unified_sr.config import resolve
from examples.unified_sr.data import TASKS, Dataset, Example, Item, Timeline, Turn, load_dataset
from examples.unified_sr.data._events import Event
from examples.unified_sr.data._split import make_split
from examples.unified_sr.feeds import Feed, Pool, Window, training_pools
from examples.unified_sr.losses import passes_of
from examples.unified_sr.methods import Setup, method_named
from examples.unified_sr.model import Collator, Ranker, SequenceBuilder, load_language_model
from examples.unified_sr.parts import prompt_builder
from examples.unified_sr.precision import Precision
from examples.unified_sr.settings import DatasetSettings

IN_TMP_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
FP32 = Precision(torch.device("cpu"), None)
ITEMS = [Item(str(n), title) for n, title in enumerate(("red", "blue", "green", "glass", "wood", "steel", "lamp"))]
TURNS = (
    Turn((0,), (), ()),
    Turn((1,), ("old",), ("search",)),
    Turn((2, 3), (), ("rec",)),
    Turn((4,), ("new", "tall"), ("rec", "search")),
    Turn((5,), ("odd",), ()),
)


def turns_before(dataset: Dataset, example: Example) -> bool:
    """Whether the example's history and queries are those of its user's turns at some place."""
    for timeline in dataset.timelines:
        if timeline.user != example.user:
            continue
        flat = [(item, () if n else turn.queries) for turn in timeline.turns for n, item in enumerate(turn.items)]
        ends = [0, *itertools.accumulate(len(turn.items) for turn in timeline.turns)]
        for turn, end in zip(timeline.turns, ends, strict=False):
            same_target = turn.items == example.target and (not example.query or example.query in turn.queries)
            if same_target and flat[:end] == list(zip(example.history, example.asked, strict=True)):
                return True
    return False


@IN_TMP_PATH
@given(rows=interactions(), searches=st.sampled_from(["half", "every"]))
def test_timelines_hold_each_training_example_at_its_place(tmp_path: Path, rows: list[Row], searches: str) -> None:
    source = write_folder(tmp_path, rows)
    sizes = {"min_user_events": 1, "min_item_events": 1, "max_history": 200}
    dataset = load_dataset(source, searches=searches, **sizes)
    for task in TASKS:
        trained = Counter(
            (timeline.user, turn.items)
            for timeline in dataset.timelines
            for turn in timeline.turns
            if task in turn.tasks
            for _ in range(len(turn.queries) if task == "search" else 1)
        )
        assert trained == Counter((example.user, example.target) for example in dataset.train[task])
        assert all(turns_before(dataset, example) for example in dataset.train[task])


def test_recorded_histories_stand_before_their_own_event() -> None:
    events = [
        Event("u", ("a",), 1, split="train", history=("b", "c")),
        Event("u", ("b",), 2, "bee", split="train", history=("c",)),
        Event("u", ("c",), 3, "sea", split="test", history=("a",)),
    ]
    index = {"a": 0, "b": 1, "c": 2}
    recorded = make_split({"u": events}, index, DatasetSettings(max_history=10), own=True)
    assert recorded.timelines == [
        Timeline("u", (1, 2), (Turn((0,), (), ("rec",)),)),
        Timeline("u", (2,), (Turn((1,), ("bee",), ("search",)),)),
    ]
    own = make_split({"u": events}, index, DatasetSettings(max_history=10, histories="events"), own=True)
    assert own.timelines == [Timeline("u", (), (Turn((0,), (), ()), Turn((1,), ("bee",), ("search",))))]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    length=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_windows_hold_every_turn_once_behind_the_one_before(lengths: list[int], length: int, seed: int) -> None:
    timelines = [
        Timeline(str(user), (), tuple(Turn((100 * user + n,), (), ("rec",)) for n in range(count)))
        for user, count in enumerate(lengths)
    ]
    pool = Pool("sequences", timelines, length)
    generator = np.random.default_rng(seed)
    for _ in range(2):
        windows = pool.epoch(generator)
        assert len(windows) == len(pool)
        assert all(1 <= len(window.turns) <= length for window in windows)
        found = sorted(turn.items[0] for window in windows for turn in window.turns)
        assert found == sorted(turn.items[0] for timeline in timelines for turn in timeline.turns)
        for window in windows:
            first = window.turns[0].items[0]
            assert window.context == (() if first % 100 == 0 else (first - 1,))
            assert [turn.items[0] for turn in window.turns] == list(range(first, first + len(window.turns)))


def feed_of(folder: str) -> tuple[Ranker, SequenceBuilder, Feed]:
    language_model = load_language_model(folder)
    ranker = Ranker(language_model, ITEMS).eval()
    builder = SequenceBuilder(language_model.tokenizer, first_item=ranker.first_item, max_history=20)
    return ranker, builder, Feed({}, Collator(0), builder)


@pytest.mark.parametrize("kind", ["llama", "untied"])
def test_a_place_scores_as_the_prompt_that_ends_there(kind: str, request: pytest.FixtureRequest) -> None:
    ranker, builder, feed = feed_of(request.getfixturevalue(f"{kind}_folder"))
    batch = feed.batch([Window((6,), TURNS), Window((), TURNS[:2])])
    assert batch.samples == {"rec": 2, "search": 4}
    assert batch.targets == ((1,), (2, 3), (4,), (4,), (4,), (1,))
    # Each prediction again as a prompt of its own; of the turn with two questions the first has been asked before.
    history, asked = [6, 0, 1, 2, 3], [(), (), ("old",), (), ()]
    examples = [
        Example("search", "u", (6, 0), "old", (1,), 0.0, "a", ((), ())),
        Example("rec", "u", (6, 0, 1), "", (2, 3), 0.0, "b", ((), (), ("old",))),
        Example("rec", "u", tuple(history), "", (4,), 0.0, "c", tuple(asked)),
        Example("search", "u", tuple(history), "new", (4,), 0.0, "d", tuple(asked)),
        Example("search", "u", (0,), "old", (1,), 0.0, "e", ((),)),
    ]
    with torch.no_grad():
        together = ranker(batch)
        alone = torch.cat([ranker(Collator(0)([builder(row)], [row.target])) for row in examples])
    assert together.shape == (6, len(ITEMS))
    torch.testing.assert_close(together[[0, 1, 2, 3, 5]], alone, rtol=1e-4, atol=1e-5)


def test_a_later_turn_changes_no_earlier_score(llama_folder: str) -> None:
    ranker, _, feed = feed_of(llama_folder)
    other = (*TURNS[:3], Turn((6,), ("else",), ("rec", "search")))
    with torch.no_grad():
        one, two = (ranker(feed.batch([Window((6,), turns)])) for turns in (TURNS, other))
    torch.testing.assert_close(one[:3], two[:3], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one[3], two[3], atol=1e-3)


@pytest.mark.parametrize("method", ["adamw", "gems", "pcgrad"])
def test_a_shared_forward_pass_takes_the_step_of_separate_ones(method: str, llama_folder: str) -> None:
    weights = []
    for apart in (False, True):
        torch.manual_seed(0)
        language_model = load_language_model(llama_folder)
        ranker = Ranker(language_model, ITEMS).train()
        own = ["method.rank=4", "method.update_proj_gap=2", "method.protect=false"] if method == "gems" else []
        settings_of_run = resolve(pairs=["training.lr=1.0e-2", *own], flags={"method.name": method})
        build = method_named(method).build
        assert build is not None
        updater = build(Setup(ranker, settings_of_run, ("rec", "search"), lambda: iter(()), print))
        for group in updater.optimizer.param_groups:
            group["eps"] = 1e-2  # Adam's division would make rounding errors steps
        builder = SequenceBuilder(language_model.tokenizer, first_item=ranker.first_item)
        feed = Feed({}, Collator(0), builder)
        rows = [Window((6,), TURNS), Window((), TURNS[:3])]
        batches = [feed.batch(rows)]
        if apart:
            only = [
                [Window(row.context, tuple(_only(turn, task) for turn in row.turns)) for row in rows] for task in TASKS
            ]
            batches = [feed.batch(each) for each in only]
        for _ in range(2):
            updater.update(passes_of(ranker, batches, FP32))
        weights.append([weight.detach().clone() for weight in ranker.parameters()])
    assert max(float((one - two).abs().max()) for one, two in zip(*weights, strict=True)) < 2e-5


def _only(turn: Turn, task: str) -> Turn:
    return Turn(turn.items, turn.queries, tuple(each for each in turn.tasks if each == task))


def test_each_target_may_have_the_weight_of_an_event(llama_folder: str, data_folder: str) -> None:
    language_model = load_language_model(llama_folder)
    first = Ranker(language_model, ITEMS).first_item
    shared, each = (SequenceBuilder(language_model.tokenizer, first_item=first, each=each) for each in (False, True))
    assert shared.sequence((6,), TURNS)[0] == each.sequence((6,), TURNS)[0]
    expected = [
        (place.position, place.task, (item,)) for place in shared.sequence((6,), TURNS)[1] for item in place.target
    ]
    found = [(place.position, place.task, place.target) for place in each.sequence((6,), TURNS)[1]]
    assert (
        found == expected != [(place.position, place.task, place.target) for place in shared.sequence((6,), TURNS)[1]]
    )
    for targets, builder in (("share", shared), ("each", each)):
        chosen = resolve(pairs=["model.format=sequence", f"training.targets={targets}"])
        made = prompt_builder(chosen, language_model, first)
        assert isinstance(made, SequenceBuilder)
        assert made.sequence((), TURNS)[1] == builder.sequence((), TURNS)[1]


def test_a_row_longer_than_the_model_is_refused(llama_folder: str) -> None:
    ranker, _, feed = feed_of(llama_folder)
    batch = feed.batch([Window((6,), TURNS)])
    width = batch.input_ids.shape[1]
    ranker.lm.config.max_position_embeddings = width
    ranker(batch)
    ranker.lm.config.max_position_embeddings = width - 1
    with pytest.raises(
        ValueError, match=rf"{width} tokens is longer than the {width - 1} positions .* model.max_history"
    ):
        ranker(batch)


def test_one_task_sees_the_targets_of_joint_training_in_their_order(llama_folder: str) -> None:
    kinds = [(), ("rec",), ("search",)]
    turns = [Turn((n % 7,), ("odd",) if n % 3 == 2 else (), kinds[n % 3]) for n in range(9)]
    lines = [turns[:3], [turns[0], turns[2]], turns, [turns[2]], turns[1:2], [turns[0], turns[1]]]
    timelines = [Timeline(str(n), (), tuple(line)) for n, line in enumerate(lines)]
    dataset: Any = SimpleNamespace(timelines=timelines)
    _, _, feed = feed_of(llama_folder)
    chosen = resolve(pairs=["model.format=sequence", "model.max_history=2"])
    streams = {
        tasks: training_pools(dataset, chosen, tasks)["sequences"].batches(3, seed=1)
        for tasks in (TASKS, ("rec",), ("search",))
    }
    alone = Counter[str]()
    for _ in range(12):
        found = {tasks: feed.batch(next(stream)) for tasks, stream in streams.items()}
        for task in TASKS:
            both, one = found[TASKS], found[task,]
            assert [target for target, own in zip(both.targets, both.tasks, strict=True) if own == task] == list(
                one.targets
            )
            assert set(one.tasks) <= {task}
            # What has nothing to predict is not read.
            assert set(one.rows.tolist()) == set(range(len(one.input_ids))) or not one.tasks
            alone[task] += len(one.input_ids) < len(both.input_ids)
    assert all(alone[task] for task in TASKS)


@pytest.mark.parametrize("method", ["adamw", "gems"])
def test_a_step_without_a_target_changes_nothing(method: str, llama_folder: str) -> None:
    language_model = load_language_model(llama_folder)
    ranker = Ranker(language_model, ITEMS).train()
    own = ["method.rank=4", "method.protect=false"] if method == "gems" else []
    build = method_named(method).build
    assert build is not None
    chosen = resolve(pairs=["training.grad_clip=1.0", *own], flags={"method.name": method})
    updater = build(Setup(ranker, chosen, ("rec", "search"), lambda: iter(()), print))
    before = [weight.detach().clone() for weight in ranker.parameters()]
    feed = Feed({}, Collator(0), SequenceBuilder(language_model.tokenizer, first_item=ranker.first_item))
    passes = passes_of(ranker, [feed.batch([Window((6,), TURNS[:1])])], FP32)
    assert updater.update(passes, measure=True) == {}
    updater.diagnostics()
    assert all(torch.equal(weight, old) for weight, old in zip(ranker.parameters(), before, strict=True))


def test_a_task_that_is_not_trained_has_no_target(data_folder: str) -> None:
    chosen = resolve(pairs=["model.format=sequence"], flags={"method.name": "adamw-rec", "data.source": data_folder})
    dataset = load_dataset(data_folder)
    pool = training_pools(dataset, chosen, ["rec"])["sequences"]
    turns = [turn for timeline in pool.units for turn in timeline.turns]
    assert {task for turn in turns for task in turn.tasks} == {"rec"}
    assert any(turn.queries for turn in turns)


@pytest.mark.parametrize("targets", ["share", "each"])
@pytest.mark.parametrize("form", ["prompt", "sequence"])
def test_titles_are_searched_for_besides_the_events(form: str, targets: str) -> None:
    items = (Item("1", "lamp"), Item("2", "green glass"), Item("3", "3"), Item("4", "lamp"))
    event = Example("search", "u", (0,), "odd", (1,), 0.0, "a", ((),))
    line = Timeline("u", (), (Turn((0,), (), ()), Turn((1,), ("odd",), ("search",))))
    dataset: Any = SimpleNamespace(items=items, timelines=[line], train={"rec": [], "search": [event]})
    plain = resolve(pairs=[f"model.format={form}", f"training.targets={targets}"])
    twice = resolve(pairs=[f"model.format={form}", f"training.targets={targets}", "training.title_searches=2"])
    before, after = (training_pools(dataset, chosen, TASKS) for chosen in (plain, twice))
    name = "search" if form == "prompt" else "sequences"
    # Whatever else is trained on stays as it is; the item whose title is its id has none.
    assert {key: list(pool.units) for key, pool in after.items() if key != name} == {
        key: list(pool.units) for key, pool in before.items() if key != name
    }
    assert list(after[name].units)[: len(before[name])] == list(before[name].units)
    added = list(after[name].units)[len(before[name]) :]
    found = Counter(
        (each.query, each.target, each.history)
        if form == "prompt"
        else (*each.turns[0].queries, each.turns[0].items, ())
        for each in added
    )
    answers = [(0, 3)] if targets == "share" else [(0,), (3,)]
    assert found == {
        (title, answer, ()): 2 for title, answer in [("green glass", (1,)), *(("lamp", a) for a in answers)]
    }
    with pytest.raises(ValueError, match=r"title_searches=2 .* \(trained are rec\); set it to 0"):
        training_pools(dataset, twice, ("rec",))
    dataset.items = items[2:3]
    with pytest.raises(ValueError, match=r"items with titles \(0 have one here\)"):
        training_pools(dataset, twice, TASKS)


@pytest.mark.parametrize("method", ["adamw", "gems"])
def test_a_run_on_sequences_learns_and_goes_on_where_it_stopped(
    method: str, data_folder: str, llama_folder: str, tmp_path: Path
) -> None:
    sizes = [
        "training.steps=12",
        "training.batch_size=6",
        "training.accumulation=2",
        "evaluation.perplexity_tokens=200",
        "evaluation.perplexity_window=64",
    ]
    own = ["method.rank=6", "method.update_proj_gap=3", "method.null_space_tokens=600"] if method == "gems" else []
    options = [
        "run",
        "--method",
        method,
        "--data",
        data_folder,
        "--model",
        llama_folder,
        "--set",
        "model.format=sequence",
    ]
    options += [
        "--set",
        *sizes,
        *own,
        "training.lr=1.0e-2",
        "training.item_lr=3.0e-2",
        "training.checkpoint_every=3",
        "model.max_history=4",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*options, "--out", str(whole)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "passes_of", _until(5))
        with pytest.raises(RuntimeError):
            main([*options, "--out", str(cut)])
    assert main([*options, "--out", str(cut)]) == 0
    assert (whole / "metrics.json").read_text() == (cut / "metrics.json").read_text()
    losses = [json.loads(line)["loss"] for line in (whole / "steps.jsonl").read_text().splitlines()]
    assert sum(losses[-1].values()) < 0.9 * sum(losses[0].values())


def _until(steps: int) -> Callable[..., Any]:
    count = itertools.count()

    def passes(*arguments: Any) -> Any:
        if next(count) == steps:
            raise RuntimeError
        return passes_of(*arguments)

    return passes


def test_an_encoder_decoder_is_refused(
    data_folder: str, t5_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "run",
        "--method",
        "adamw",
        "--data",
        data_folder,
        "--model",
        t5_folder,
        "--set",
        "model.format=sequence",
    ]
    assert main([*options, "--out", str(tmp_path / "run")]) != 0
    assert "model.format='sequence'" in capsys.readouterr().err
