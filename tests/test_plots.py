"""Pictures of a training, by what stands in them."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

from gradsub.plots import COLOURS, History, bars, cosines, energies, gates, lines, losses, protected, save
from tests.optimizer.toys import TASKS, gems, loss_of, mlp, null_space_of

pytest.importorskip("matplotlib")


def trained(steps: int, **options: Any) -> tuple[History, Any]:
    model = mlp((12, 10, 9))
    optimizer, history = gems(model, null_space=null_space_of(model), **options), History()
    for step in range(steps):
        for task, name in enumerate(TASKS):
            with optimizer.task(name):
                loss_of(model, step, task).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.add(optimizer.report(angles=False))
    return history, optimizer


def drawn(figure: Any, label: str) -> tuple[list[float], list[float]]:
    (line,) = (line for line in figure.axes[0].get_lines() if line.get_label() == label and len(line.get_xdata()))
    return list(line.get_xdata()), list(line.get_ydata())


def test_lines_show_the_numbers_of_the_reports():
    history, optimizer = trained(4)
    assert [step for step, _ in history] == [1, 2, 3, 4]
    last = optimizer.report().scalars()
    for draw, kind, name in (
        (gates, "gate", "rec"),
        (energies, "energy", "shared"),
        (cosines, "cosine", "search|rec"),
    ):
        steps, values = drawn(draw(history), name.replace("|", " and "))
        assert steps == [1, 2, 3, 4]
        assert values == history.series(f"{kind}/{name}")[1]
        assert values[-1] == last[f"{kind}/{name}"]


@pytest.mark.parametrize("steps", [1, 19, 40])
def test_losses_of_many_steps_have_a_mean(steps):
    history = History()
    for step in range(1, steps + 1):
        history.add({"loss/a": float(step), "loss/b": 2.0 * step}, step)
    found = [line for line in losses(history).axes[0].get_lines() if len(line.get_xdata())]
    assert len(found) == (4 if steps == 40 else 2)
    assert list(found[0].get_ydata()) == [float(step) for step in range(1, steps + 1)]
    if steps == 40:
        assert list(found[1].get_ydata()[:6]) == [1.0, 1.5, 2.0, 2.5, 3.5, 4.5]


def test_what_is_protected_is_a_map_of_blocks_and_kinds():
    shares = {f"layers.{block}.{kind}": 0.1 * block for block in range(3) for kind in ("q", "v")} | {"odd": 0.5}
    axes = protected(shares).axes[0]
    grid = axes.get_images()[0].get_array()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "v", "odd"]
    assert grid[:2].tolist() == [pytest.approx([0.0, 0.1, 0.2])] * 2
    assert grid[2, 0] == 0.5
    assert grid.mask[2, 1:].all() if hasattr(grid, "mask") else all(map(math.isnan, grid[2, 1:]))
    ends_in_digits = protected({"fc1.proj": 0.5, "fc2.proj": 0.2, "0.proj": 0.1}).axes[0]
    assert [label.get_text() for label in ends_in_digits.get_yticklabels()] == ["fc1.proj", "fc2.proj", "proj"]
    _, optimizer = trained(1)
    for source in (optimizer.summary(), optimizer.report()):
        values = protected(source).axes[0].get_images()[0].get_array()
        assert sorted(values.ravel().tolist()) == sorted(
            layer.protected_fraction for layer in optimizer.summary().layers
        )


def test_bars_stand_side_by_side():
    figure = bars(
        {
            "rec": {"before": {"hit": 0.1, "ndcg": 0.0}, "after": {"hit": 0.3, "ndcg": 0.2}},
            "search": {"x": {"hit": 0.0}},
        }
    )
    left, right = figure.axes
    assert [bar.get_height() for container in left.containers for bar in container] == [0.1, 0.0, 0.3, 0.2]
    assert [bar.get_height() for container in right.containers for bar in container] == [0.0]


def test_all_that_there_is_to_see_is_saved(tmp_path):
    history, optimizer = trained(2)
    found = save(history, tmp_path / "new", optimizer.summary())
    assert list(found) == ["loss.png", "cosine.png", "gates.png", "energy.png", "protected.png"]
    assert all((tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG") for name in found)
    losses_alone = History()
    losses_alone.add({"loss/a": 1.0}, 3)
    assert list(save(losses_alone, tmp_path)) == ["loss.png"]
    assert save(History(), tmp_path) == {}


def test_a_history_is_written_and_read(tmp_path):
    history, _ = trained(3)
    history.write(tmp_path / "steps.jsonl")
    assert list(History.read(tmp_path / "steps.jsonl")) == list(history)
    assert len(history) == 3
    assert history.names("loss") == list(TASKS)
    assert history.series("loss/nobody") == ([], [])


def test_what_is_not_finite_is_left_out():
    history = History()
    history.add({"loss/a": math.nan, "loss/b": 1.0}, 1)
    history.add({"loss/a": 2.0, "loss/b": math.inf}, 2)
    assert history.series("loss/a") == ([2], [2.0])
    assert history.series("loss/b") == ([1], [1.0])
    with pytest.raises(ValueError, match="step=None for scalars"):
        history.add({"loss/a": 1.0})


def test_more_names_than_colours():
    history = History()
    history.add({f"gate/{task}": 0.1 for task in range(2 * len(COLOURS))}, 1)
    assert len(lines(history, "gate", ylabel="gate").axes[0].get_lines()) == 2 * len(COLOURS)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"gradsub.plots needs matplotlib: pip install 'gradsub\[plots\]'"):
        gates(History())


def test_a_step_may_have_another_number_than_its_report():
    history, optimizer = trained(1)
    history.add(optimizer.report(angles=False), step=9)
    assert [step for step, _ in history] == [1, 9]
