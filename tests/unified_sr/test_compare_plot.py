"""The picture of the trade: which methods it shows, and that every label can be read."""

from __future__ import annotations

import doctest
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from run_files import FAIR, GOOD, write_run

from examples.unified_sr.compare import _labels, _plot, chosen_methods, group_runs, place_labels, trade
from examples.unified_sr.compare._labels import Box
from examples.unified_sr.compare._plot import draw
from examples.unified_sr.tables import gather

BOUNDS = (0.0, 0.0, 640.0, 240.0)


def overlap(one: Box, other: Box) -> bool:
    return min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(one[1], other[1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(10, 630), st.floats(10, 230)), min_size=1, max_size=8))
def test_eight_labels_never_cover_each_other_and_stay_inside(points: list[tuple[float, float]]) -> None:
    boxes = place_labels(points, [(70.0, 11.0)] * len(points), BOUNDS)
    for number, box in enumerate(boxes):
        assert box[0] >= 0
        assert box[1] >= 0
        assert box[2] <= 640
        assert box[3] <= 240
        assert not any(overlap(box, other) for other in boxes[:number])


def test_eight_labels_at_one_point_find_room() -> None:
    boxes = place_labels([(300.0 + number, 120.0) for number in range(8)], [(120.0, 11.0)] * 8, BOUNDS)
    assert not any(overlap(box, other) for number, box in enumerate(boxes) for other in boxes[:number])


def test_labels_keep_off_what_is_taken() -> None:
    (free,) = place_labels([(100.0, 100.0)], [(50.0, 10.0)], BOUNDS)
    (moved,) = place_labels([(100.0, 100.0)], [(50.0, 10.0)], BOUNDS, [free])
    assert free[0] > 100
    assert not overlap(free, moved)
    assert doctest.testmod(_labels).failed == 0


def table(**rows: tuple[str, float | None, float, float, float]) -> pd.DataFrame:
    """Label -> method, change of perplexity, score, rec, search; trained where there is a change."""
    columns = ["method", "change", "score", "rec", "search"]
    found = pd.DataFrame.from_dict(rows, orient="index", columns=columns).astype({"change": float})
    found.index = found.index.str.replace("_", "-")
    return found.assign(label=found.index, trained_parameters=found["change"].notna() * 10)


def test_the_rule_chooses_what_matters() -> None:
    found = table(
        gems=("gems", 1.0, 0.5, 0.5, 0.5),
        gems_kept_best=("gems", 1.5, 0.6, 0.5, 0.7),
        gems_far=("gems-no-task", 30.0, 0.8, 0.8, 0.8),
        gems_worse=("gems-paper", 50.0, 0.7, 0.7, 0.7),
        **{name: (name, 90.0, 0.9 - 0.1 * rank, 0.5, 0.5) for rank, name in enumerate(("a", "b", "c", "d", "e"))},
        a_again=("a", 10.0, 0.1, 0.5, 0.5),
        ease=("ease", None, 0.2, 0.9, float("nan")),
        popularity=("popularity", None, 0.2, 0.3, 0.3),
    )
    assert chosen_methods(found) == ["gems-far", "gems-kept-best", "a", "b", "c", "d", "ease", "popularity"]
    assert chosen_methods(found, ["b", "gems", "none"]) == ["gems", "b"]
    with pytest.raises(ValueError, match="a plot shows at most 8 methods, got gems, gems-kept-best"):
        chosen_methods(found, list(found.index))
    found.loc["gems-far", "change"] = 1.9
    assert chosen_methods(found)[:2] == ["gems-far", "a"], "one that is both stands once"


def crowded(folder: Path, most: float) -> pd.DataFrame:
    """Eight methods whose points nearly coincide in pairs, up to a large change of perplexity."""
    for number, method in enumerate(("gems", "gems-paper", "adamw", "pcgrad", "cagrad", "lora", "galore")):
        after = 40 * (1 + most * (number // 2) / 300)
        ranks = {"rec": GOOD[number:] + FAIR[:number], "search": FAIR}
        for seed in (0, 1):
            values = (40.0, after * (1 + 0.01 * seed))
            write_run(folder / method / f"seed-{seed}", method, seed, ranks=ranks, perplexity=values)
    write_run(folder / "popularity" / "seed-0", "popularity", ranks={"rec": FAIR, "search": FAIR}, perplexity=None)
    runs, _, _ = gather([folder])
    return trade(group_runs(runs, "ndcg@10"), "ndcg@10")


@pytest.mark.parametrize("most", [1.0, 90_000.0])
def test_in_a_drawn_picture_no_label_is_covered_or_cut_off(
    tmp_path: Path, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = crowded(tmp_path / "runs", most)
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: figures.append(figure))
    assert draw(found, list(found.index), "ndcg@10", "a title", tmp_path / "a.png")
    (figure,) = figures
    assert figure.get_size_inches()[0] == 7
    panels = figure.axes
    assert [axes.get_ylabel() for axes in panels] == ["rec NDCG@10", "search NDCG@10"]
    for axes in panels:
        assert axes.get_xscale() == ("symlog" if most > 10 else "linear")
        panel = axes.get_window_extent()
        boxes = [text.get_window_extent() for text in axes.texts]
        assert {text.get_text() for text in axes.texts} == set(found.index)
        for number, box in enumerate(boxes):
            assert panel.x0 <= box.x0
            assert box.x1 <= panel.x1
            assert panel.y0 <= box.y0
            assert box.y1 <= panel.y1
            assert not any(box.overlaps(other) for other in boxes[:number])
        assert not axes.get_legend()


def test_a_picture_is_a_file_and_without_a_language_model_there_is_none(tmp_path: Path) -> None:
    found = crowded(tmp_path / "runs", 1.0)
    file = tmp_path / "a.png"
    assert draw(found, ["gems", "popularity"], "ndcg@10", "a title", file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert not draw(found, ["popularity"], "ndcg@10", "a title", file)
    assert not file.exists(), "an earlier picture would pass for this one's"
    assert _plot.MOST == 8
