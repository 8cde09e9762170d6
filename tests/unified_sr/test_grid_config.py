"""A grid's file, the order of its runs, and the rule by which a learning rate is chosen."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import BAD, FAIR, GOOD, write_run

from examples.unified_sr.grid import Trial, _jobs, _select, choose, read_grid, run_grid
from examples.unified_sr.grid._config import Selection
from examples.unified_sr.grid._jobs import list_jobs, matching
from examples.unified_sr.grid._select import choose_rate, next_rate

FILE = """
data: {films: movielens-100k, shop: null}
seeds: [3, 1]
settings:
  training: {steps: 7}
  methods: {gems: {method: {rank: 4, energy: 0.9}}, lora: {training.lr: 1e-3}}
select: {rates: [1e-2, 1.0e-4], seed: 5, settings: {training.steps: 2}}
methods:
  - zero-shot
  - name: small
    method: gems
    settings: {method.rank: 2}
    seeds: [1]
  - gems-no-null
  - lora
  - not-there-yet
"""


def written(folder: Path, text: str = FILE) -> Path:
    path = folder / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_order_is_that_of_the_file_one_seed_after_the_other(tmp_path: Path) -> None:
    text = FILE.replace("  - not-there-yet\n", "")
    names = [job.name for job in list_jobs(read_grid(written(tmp_path, text), data=["shop=here"]))]
    trials = ["lr-0.0001", "lr-0.01"]
    first = [
        *("films/zero-shot/seed-3", *(f"films/small/{rate}" for rate in trials), "films/small/seed-1"),
        *(*(f"films/gems-no-null/{rate}" for rate in trials), "films/gems-no-null/seed-3", "films/lora/seed-3"),
    ]
    second = ["films/zero-shot/seed-1", "films/gems-no-null/seed-1", "films/lora/seed-1"]
    everywhere = [
        name.replace("films", data) for part in (first, second) for data in ("films", "shop") for name in part
    ]
    assert names == everywhere


def test_settings_come_from_all_places_in_order(tmp_path: Path) -> None:
    grid = read_grid(written(tmp_path), pairs=["training.batch_size=3"])
    jobs = {job.name: job for job in list_jobs(grid, ["films/small/*", "gems-no-null", "films/lora/*"])}
    trial = jobs["films/small/lr-0.01"].settings()
    assert (trial.training.steps, trial.seed, trial.training.lr, trial.evaluation.split, trial.training.batch_size) == (
        2,
        5,
        0.01,
        "valid",
        3,
    )
    main = jobs["films/small/seed-1"].settings(0.01)
    assert (main.training.steps, main.seed, main.training.lr, main.evaluation.split) == (7, 1, 0.01, "test")
    assert (main.method.rank, main.method.energy) == (2, 0.9)
    variant = jobs["films/gems-no-null/seed-3"].settings()
    assert (variant.method.rank, variant.method.protect) == (4, False)
    assert jobs["films/lora/seed-3"].settings().training.lr == 1e-3, "a rate that is fixed is not searched for"
    assert not jobs["films/lora/seed-3"].selects


def test_a_method_may_be_chosen_by_a_rule_of_its_own(tmp_path: Path) -> None:
    own = "{max_perplexity_increase: 0.05, rates: [1e-3], settings: {training.steps: 4}}"
    kept = f"  - {{name: kept, method: gems, select: {own}}}"
    grid = read_grid(written(tmp_path, FILE.replace("  - not-there-yet", kept)))
    select = {entry.name: entry.select for entry in grid.entries}
    kept = Selection(rates=(1e-3,), seed=5, max_perplexity_increase=0.05, settings={"training.steps": 4})
    assert select["kept"] == kept, "the rest is the grid's"
    assert select["small"] == Selection(rates=(1e-4, 1e-2), seed=5, settings={"training.steps": 2})
    (trial, run) = list_jobs(grid, ["films/kept/seed-3"])
    assert (trial.name, trial.settings().training.steps, trial.seed) == ("films/kept/lr-0.001", 4, 5)
    assert run.settings(1e-3).training.steps == 7


def test_settings_of_a_data_set_hold_for_its_runs_alone(tmp_path: Path) -> None:
    data = "data: {films: movielens-100k, shop: {settings: {data.min_item_events: 2, training.steps: 9}}}"
    path = written(tmp_path, FILE.replace("data: {films: movielens-100k, shop: null}", data))
    wanted = ["shop/small/*", "films/small/*"]
    jobs = {job.name: job for job in list_jobs(read_grid(path, data=["shop=here"]), wanted)}
    shop, films = (jobs[f"{name}/small/seed-1"].settings(0.01) for name in ("shop", "films"))
    assert (shop.data.source, shop.data.min_item_events, shop.training.steps) == ("here", 2, 9), (
        "they win over the settings of all runs"
    )
    assert (films.data.source, films.data.min_item_events, films.training.steps) == ("movielens-100k", 5, 7)
    assert jobs["shop/small/lr-0.01"].settings().training.steps == 2, "those of the trials win over them"
    given_source = FILE.replace("shop: null", "shop: {source: there, settings: {}}")
    (job,) = list_jobs(read_grid(written(tmp_path, given_source)), ["shop/zero-shot/seed-1"])
    assert job.settings().data.source == "there"


def test_what_defines_a_method_holds_over_what_all_share_but_not_over_its_own(tmp_path: Path) -> None:
    text = """
data: {films: {source: movielens-100k, settings: {method.task_subspaces: true}}}
settings: {method: {protect: true}}
methods: [gems-no-null, gems-no-task, {name: kept, method: gems-no-null, settings: {method.protect: true}}]
"""
    grid = read_grid(written(tmp_path, text))
    found: dict[str, Any] = {job.entry.name: job.settings().method for job in list_jobs(grid)}
    assert found["gems-no-null"].protect is False
    assert found["gems-no-task"].task_subspaces is False
    assert found["kept"].protect is True
    (job,) = list_jobs(read_grid(tmp_path / "grid.yaml", pairs=["method.protect=true"]), ["gems-no-null"])
    assert found["gems-no-null"] != job.settings().method, "nor over the command line"


def test_a_later_number_of_steps_wins_over_earlier_epochs(tmp_path: Path) -> None:
    text = """
data: {films: movielens-100k}
settings: {training.epochs: 3}
select: {rates: [1e-4], settings: {training.steps: 2}}
methods: [adamw]
"""
    trial, run = list_jobs(read_grid(written(tmp_path, text)))
    assert (trial.settings().training.epochs, trial.settings().training.steps) == (None, 2)
    assert run.settings(1e-4).training.epochs == 3
    for job in list_jobs(read_grid(tmp_path / "grid.yaml", pairs=["training.steps=7"])):
        training = job.settings(1e-4 if job.rate is None else None).training
        assert (training.epochs, training.steps) == (None, 7)


def test_the_rate_of_a_single_task_is_chosen_by_that_task(tmp_path: Path) -> None:
    text = (
        "data: {films: movielens-100k}\nselect: {rates: [1.0e-4, 2.0e-4]}\nmethods: [adamw, adamw-rec, adamw-search]\n"
    )
    jobs = {job.entry.name: job for job in list_jobs(read_grid(written(tmp_path, text)))}
    for name in jobs:
        for rate, ranks in ((1e-4, {"rec": BAD, "search": GOOD}), (2e-4, {"rec": FAIR, "search": BAD})):
            pairs = ("evaluation.split=valid", f"training.lr={rate}")
            write_run(tmp_path / "out/films" / name / f"lr-{rate:g}", name, ranks=ranks, pairs=pairs)
    chosen = {name: choose_rate(job, tmp_path / "out").trial.rate for name, job in jobs.items()}
    assert chosen == {"adamw": 1e-4, "adamw-rec": 2e-4, "adamw-search": 1e-4}


def test_a_rate_is_chosen_by_the_trained_tasks_that_can_be_validated(tmp_path: Path) -> None:
    text = "data: {films: movielens-100k}\nselect: {rates: [1.0e-4, 2.0e-4]}\nmethods: [adamw]\n"
    job = list_jobs(read_grid(written(tmp_path, text)))[0]
    for rate, ranks in ((1e-4, {"rec": BAD}), (2e-4, {"rec": FAIR})):  # no search is held out for validation
        pairs = ("evaluation.split=valid", f"training.lr={rate}")
        write_run(tmp_path / "out/films/adamw" / f"lr-{rate:g}", "adamw", ranks=ranks, pairs=pairs)
    assert choose_rate(job, tmp_path / "out").trial.rate == 2e-4


def test_names_are_looked_up_only_where_they_are_used(tmp_path: Path) -> None:
    grid = read_grid(written(tmp_path))
    assert [job.name for job in list_jobs(grid, ["films/small/seed-1"])][-1] == "films/small/seed-1"
    with pytest.raises(ValueError, match="there is no method 'not-there-yet'"):
        list_jobs(grid)
    with pytest.raises(ValueError, match=r"--only nothing matches none of the runs films/zero-shot/seed-3"):
        list_jobs(grid, ["nothing"])
    with pytest.raises(ValueError, match=r"--only none seed-9 matches none of the runs"):
        list_jobs(grid, ["films/small/*", "none", "films/small/lr-0.01", "seed-9"])
    (job,) = list_jobs(grid, ["shop/zero-shot/seed-1"])
    with pytest.raises(ValueError, match="the data 'shop' has no source; pass --data shop=DIR"):
        job.settings()
    assert [job.name for job in list_jobs(grid, ["films/small/lr-0.01"])] == ["films/small/lr-0.01"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("gmes: {method.rank: 2}", r"there is no method 'gmes'; .*\(settings\.methods\.gmes of the grid\)"),
        ("galore: {method.rnak: 2}", r"no setting 'method\.rnak'.* did you mean method\.rank.*methods\.galore"),
    ],
)
def test_a_section_of_a_method_is_checked_though_no_run_takes_it(section: str, message: str, tmp_path: Path) -> None:
    text = f"data: {{films: movielens-100k}}\nsettings: {{methods: {{{section}}}}}\nmethods: [adamw]\n"
    grid = read_grid(written(tmp_path, text))
    with pytest.raises(ValueError, match=message):
        list_jobs(grid)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [3, 1]", "seeds: 3", "seeds of .* must be a valid list, got 3"),
        ("seeds: [3, 1]", "seeds: [3, true]", "seeds.1 of .* must be a valid integer, got True"),
        ("seeds: [3, 1]", "seeds: [3, -1]", "seeds.1 of .* must be greater than or equal to 0, got -1"),
        ("seeds: [3, 1]", "seeds: []", r"seeds of .* must have at least 1 item .* got \[\]"),
        ("seeds: [3, 1]", "seeds: [3, 3]", r"hold \[3\] more than once"),
        ("seeds: [3, 1]", "sedes: [3, 1]", "no key 'sedes'; did you mean 'seeds'?"),
        ("rates: [1e-2, 1.0e-4]", "rates: [0]", "select.rates.0 of .* must be greater than 0, got 0"),
        ("rates: [1e-2, 1.0e-4]", "rates: fast", "select.rates of .* must be a valid list, got 'fast'"),
        ("seed: 5", "trials: many", "select.trials of .* must be a valid integer, got 'many'"),
        ("seed: 5", "trials: 1", "it must be at least the number of rates, 2, got 1"),
        ("seed: 5", "metric: speed", "select.metric of .* must be one of hit@5.*, got 'speed'"),
        ("seed: 5", "max_perplexity_increase: -1", "increase of .* must be greater than or equal to 0, got -1"),
        ("  training: {steps: 7}", "  seed: 7", "cannot set 'seed': the grid gives it to each run"),
        ("{method.rank: 2}", "[rank]", "methods.small.settings of .* must be a mapping"),
        ("- lora", "- gems-no-null", r"hold \['gems-no-null'\] more than once"),
        ("- lora", "- {name: a/b, method: lora}", "needs a name that is text without '/'"),
        ("- lora", "- {name: .., method: lora}", r"needs a name that is none of \., \.\., intact-model, .* got '\.\.'"),
        ("shop: null", "intact-model: null", "needs a name that is none of .* got 'intact-model'"),
        ("shop: null", ".: null", r"needs a name that is none of .* got '\.'"),
        ("- lora", "- {name: lora, rate: [1]}", "no key 'rate'; did you mean 'rates'?"),
        ("data: {films: movielens-100k, shop: null}", "data: [films]", "data of .* must be a mapping"),
        (
            "- lora",
            "- {name: lora, select: {rate: 1}}",
            "methods.lora.select of .* has no key 'rate'; did you",
        ),
        ("- lora", "- {name: lora, select: {metric: x}}", "methods.lora.select.metric of .* must be one of hit@5"),
        ("shop: null", "shop: 3", "data.shop of .* must be a mapping, got 3"),
        ("shop: null", "shop: {sauce: here}", "data.shop of .* has no key 'sauce'; did you mean 'source'?"),
        ("shop: null", "shop: {source: 3}", "data.shop.source of .* must be a valid string, got 3"),
        ("shop: null", "shop: {settings: {seed: 1}}", "cannot set 'seed': the grid gives it to each run"),
        ("data: {films: movielens-100k, shop: null}", "", "must name at least one data set"),
        ("methods:\n", "methods: {}\nother:\n", "no key 'other'"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in FILE
    with pytest.raises(ValueError, match=message):
        read_grid(written(tmp_path, FILE.replace(old, new, 1)))


def test_other_errors(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="--data takes NAME=SOURCE"):
        read_grid(path, data=["shop"])
    for name in (".", "..", "intact-model"):
        with pytest.raises(ValueError, match="--data takes NAME=SOURCE"):
            read_grid(path, data=[f"{name}=here"])
    text = "data: {films: movielens-100k}\nmethods: [bm25]\n"
    for grace in (math.nan, -1.0):
        with pytest.raises(ValueError, match="grace must be a number of seconds of at least 0, got"):
            run_grid(read_grid(written(tmp_path / "other", text)), tmp_path / "out", grace=grace)
    with pytest.raises(ValueError, match=r"--set of the grid .* cannot set 'data\.source'"):
        read_grid(path, pairs=["data.source=x"])
    with pytest.raises(ValueError, match=r"methods of .* must be a list of names and mappings, got None"):
        read_grid(written(tmp_path, "data: {a: b}\n"))
    with pytest.raises(FileNotFoundError, match="is no file"):
        read_grid(tmp_path / "none.yaml")
    assert doctest.testmod(_jobs).failed == doctest.testmod(_select).failed == 0
    assert matching("a/b/seed-0", []) is True


VALUES = st.one_of(st.none(), st.floats(0, 1))


@given(st.lists(st.tuples(VALUES, st.floats(-0.5, 2)), min_size=1, max_size=6), st.one_of(st.none(), st.floats(0, 1)))
def test_the_best_rate_within_the_limit_is_chosen(found: list[tuple[float | None, float]], limit: float | None) -> None:
    trials = [
        Trial(10.0**-number, value, None if value is None else increase)
        for number, (value, increase) in enumerate(found)
    ]
    finished = [trial for trial in trials if trial.value is not None]
    if not finished:
        with pytest.raises(ValueError, match="no trial came to a result"):
            choose(trials, limit)
        return
    choice = choose(trials, limit)
    allowed = [trial for trial in finished if limit is None or trial.perplexity_increase <= limit]  # type: ignore[operator]
    assert choice.within_limit == bool(allowed)
    if allowed:
        best = max(trial.value for trial in allowed)  # type: ignore[type-var]
        assert choice.trial.rate == min(trial.rate for trial in allowed if trial.value == best)
    else:
        assert choice.trial.perplexity_increase == min(trial.perplexity_increase for trial in finished)  # type: ignore[type-var]
    edges = {trials[0].rate, trials[-1].rate}
    assert choice.at_edge == (len(trials) > 1 and choice.trial.rate in edges)


def searched(value: Callable[[float], float | None], rates: list[float], trials: int) -> list[Trial]:
    found = [Trial(rate, value(rate), 0.0) for rate in rates]
    while len(found) < trials:
        rate = next_rate(found)
        found.append(Trial(rate, value(rate), None if value(rate) is None else 0.0))
    return found


@given(st.floats(-6, 6), st.floats(-2, 8), st.integers(1, 3), st.integers(1, 9))
def test_the_search_ends_around_the_best_rate(peak: float, wall: float, first: int, further: int) -> None:
    """One peak on a scale of octaves around 1e-3, and a wall behind which training diverges."""

    def value(rate: float) -> float | None:
        octave = math.log2(rate / 1e-3)
        return None if octave > wall else -abs(octave - peak)

    rates = [1e-3 * 2**number for number in range(first)]
    found = searched(value, rates, first + further)
    assert len({trial.rate for trial in found}) == len(found), "no rate twice"
    for count in range(first, len(found)):
        before, rate = found[:count], found[count].rate
        tried = sorted(trial.rate for trial in before)
        if all(trial.value is None for trial in before):
            assert rate == pytest.approx(tried[0] / 2, rel=1e-3)
            continue
        best = choose(before).trial.rate
        position = tried.index(best)
        if best == tried[-1]:
            assert rate == pytest.approx(2 * best, rel=1e-3)
        elif best == tried[0]:
            assert rate == pytest.approx(best / 2, rel=1e-3)
        else:
            assert tried[position - 1] < rate < tried[position + 1]
            sides = {
                neighbour: abs(math.log(neighbour / best)) for neighbour in (tried[position - 1], tried[position + 1])
            }
            chosen = min(sides, key=lambda neighbour: abs(math.log(rate / math.sqrt(neighbour * best))))
            assert sides[chosen] >= max(sides.values()) - 0.01, "the wider gap"
    if further == 9 and min(peak, wall) > -6:
        choice = choose(found)
        assert not choice.at_edge or wall < peak


def test_ties_at_the_search() -> None:
    level = [Trial(1e-4, 0.2, 0.0), Trial(2e-4, 0.2, 0.0)]
    assert next_rate(level) == 5e-5, "of equals the smaller rate is the best one, and it is at the edge"
    inside = [Trial(1e-4, 0.1, 0.0), Trial(2e-4, 0.2, 0.0), Trial(4e-4, 0.1, 0.0)]
    assert next_rate(inside) == 1.414e-4, "neighbours as good as each other: towards the smaller rate"
    assert next_rate([*inside, Trial(1.414e-4, 0.1, 0.0)]) == 2.828e-4, "then the gap that is wider now"
    broken = [Trial(1e-4, 0.1, 0.0), Trial(2e-4, 0.2, 0.0), Trial(4e-4)]
    assert next_rate(broken) == 1.414e-4, "not towards where training diverged"
    harmful = [Trial(1e-4, 0.1, 0.0), Trial(2e-4, 0.2, 0.5)]
    assert next_rate(harmful, 0.05) == 5e-5, "the better one is beyond the limit of perplexity"
