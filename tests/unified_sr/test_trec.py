"""What the files hold is what was measured: ``ir_measures`` on them gives the values of ``metrics``."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import ir_measures
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from unified_sr.trec_files import MEASURES, evaluate_files, read_qrels, read_run

from examples.unified_sr.metrics import CUTOFFS, mean_metrics, query_metrics, target_ranks, top_items
from examples.unified_sr.trec import DEPTH, write_qrels, write_run

NAMES = st.text(min_size=1, max_size=6)
RANKINGS = st.dictionaries(NAMES, st.lists(NAMES, min_size=1, max_size=30, unique=True), min_size=1, max_size=5)
IN_TMP_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


@IN_TMP_PATH
@example(rankings={"100%41 b": ["%20", " ", "\u2028"]})
@given(rankings=RANKINGS)
def test_run_round_trip_with_any_names(tmp_path: Path, rankings: dict[str, list[str]]) -> None:
    write_run(tmp_path / "run", rankings, tag="gems paper")
    assert read_run(tmp_path / "run") == rankings
    lines = (tmp_path / "run").read_text(encoding="utf-8").splitlines()
    assert len(lines) == sum(map(len, rankings.values()))
    assert all(len(line.split()) == 6 for line in lines)


@IN_TMP_PATH
@given(relevant=RANKINGS)
def test_qrels_round_trip_with_any_names(tmp_path: Path, relevant: dict[str, list[str]]) -> None:
    write_qrels(tmp_path / "qrels", relevant)
    assert read_qrels(tmp_path / "qrels") == relevant


def test_scores_fall_strictly_and_plain_names_stay_readable(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"rec-7": [str(item) for item in range(200)]}, tag="gems")
    lines = [line.split() for line in (tmp_path / "run").read_text().splitlines()]
    assert len(lines) == DEPTH
    assert lines[0] == ["rec-7", "Q0", "0", "1", str(DEPTH), "gems"]
    scores = [float(line[4]) for line in lines]
    assert all(high > low for high, low in itertools.pairwise(scores))


@st.composite
def evaluations(draw: st.DrawFn) -> tuple[torch.Tensor, list[list[int]]]:
    """Scores with ties for a catalogue larger than the written depth, and one to thirty targets a query."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    queries, items = draw(st.integers(1, 6)), draw(st.sampled_from([5, 30, 250]))
    scores = torch.randint(0, draw(st.sampled_from([2, 30, 10_000])), (queries, items), generator=generator).float()
    sizes = [draw(st.integers(1, min(30, items))) for _ in range(queries)]
    targets = [torch.randperm(items, generator=generator)[:size].tolist() for size in sizes]
    for row, target in enumerate(targets):  # a model that is right more often than chance
        scores[row, target] += draw(st.sampled_from([0, 1, 10_000]))
    return scores, targets


@IN_TMP_PATH
@given(problem=evaluations())
def test_metrics_equal_ir_measures(tmp_path: Path, problem: tuple[torch.Tensor, list[list[int]]]) -> None:
    scores, targets = problem
    _write(tmp_path, scores, targets)
    ours = [query_metrics(ranks) for ranks in target_ranks(scores, targets)]
    theirs = evaluate_files(tmp_path / "run", tmp_path / "qrels")
    assert theirs == pytest.approx(mean_metrics(ours), abs=1e-9)
    _assert_per_query(tmp_path, ours)


def test_metrics_equal_ir_measures_on_many_clicks_a_query(tmp_path: Path) -> None:
    """Judgements shaped like a note platform's: one to forty clicks a query, heavy-tailed, half of them missed."""
    source = random.Random(0)
    sizes = [min(40, int(source.paretovariate(0.8))) for _ in range(60)]
    assert max(sizes) > max(CUTOFFS), "the ideal of NDCG@20 must be cut in some query"
    _compare_rankings(tmp_path, [source.sample(range(100_000, 200_000), size) for size in sizes], source)


def _compare_rankings(folder: Path, relevant: list[list[int]], source: random.Random) -> None:
    rankings, judged, ours = {}, {}, []
    for number, target in enumerate(relevant):
        retrieved = [item for item in target if source.random() < 0.5]
        ranking = retrieved + source.sample(range(10**9, 2 * 10**9), 60)
        source.shuffle(ranking)
        rankings[f"q{number}"] = [str(item) for item in ranking]
        judged[f"q{number}"] = [str(item) for item in target]
        ours.append(query_metrics([ranking.index(item) + 1 for item in retrieved], len(target)))
    write_run(folder / "run", rankings, tag="test")
    write_qrels(folder / "qrels", judged)
    assert evaluate_files(folder / "run", folder / "qrels") == pytest.approx(mean_metrics(ours), abs=1e-9)
    _assert_per_query(folder, ours)


def _write(folder: Path, scores: torch.Tensor, targets: list[list[int]]) -> None:
    rankings = {f"q{row}": [f"d{item}" for item in best] for row, best in enumerate(top_items(scores, DEPTH))}
    write_run(folder / "run", rankings, tag="test")
    write_qrels(folder / "qrels", {f"q{row}": [f"d{item}" for item in target] for row, target in enumerate(targets)})


def _assert_per_query(folder: Path, ours: list[dict[str, float]]) -> None:
    names = {measure: name for name, measure in MEASURES.items()}
    found = list(
        ir_measures.iter_calc(
            list(names),
            list(ir_measures.read_trec_qrels(str(folder / "qrels"))),
            list(ir_measures.read_trec_run(str(folder / "run"))),
        )
    )
    assert len(found) == len(ours) * len(names)
    for value in found:
        assert value.value == pytest.approx(ours[int(value.query_id[1:])][names[value.measure]], abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: write_run(path / "r", {"q": ["a", "b", "a"]}, tag="t"), "'q' lists the item 'a' twice"),
        (lambda path: write_run(path / "r", {"q": []}, tag="t"), "'q' has no items"),
        (lambda path: write_run(path / "r", {"q": [""]}, tag="t"), "empty"),
        (lambda path: write_run(path / "r", {"q": ["a"]}, tag=""), "empty"),
        (lambda path: write_qrels(path / "r", {"q": []}), "'q' has no items"),
        (lambda path: write_qrels(path / "r", {"q": ["a", "a"]}), "twice"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, call: Callable[[Path], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
