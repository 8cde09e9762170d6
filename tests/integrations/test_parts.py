"""A step in parts: what each batch is of it, and what the optimizer makes of that."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from gradsub import GemsOptimizer
from gradsub.integrations._accumulation import account
from gradsub.integrations._collator import TaskCollator, count_labels
from gradsub.integrations._hearing import row_losses

ROWS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=6)


@given(batches=st.lists(ROWS, min_size=1, max_size=4), whole=st.booleans(), equal=st.booleans())
def test_the_parts_add_up_to_what_the_trainer_adds_up(
    batches: list[list[tuple[int, int]]], whole: bool, equal: bool
) -> None:
    """L = sum_k share_k L_k with L_k a mean over the task's rows, for any losses of the rows."""
    losses = [[float(3 * i + r + 1) for r, _ in enumerate(rows)] for i, rows in enumerate(batches)]
    counts = [[count for _, count in rows] for rows in batches]
    if any(sum(own) == 0 for own in counts):
        return  # the trainer's own loss is 0 / 0
    everything = sum(map(sum, counts))
    sums = [sum(n * loss for n, loss in zip(*pair, strict=True)) for pair in zip(counts, losses, strict=True)]
    each = zip(sums, counts, strict=True)
    expected = sum(sums) / everything if whole else sum(s / sum(n) for s, n in each) / len(batches)

    found = account([[list(row) for row in rows] for rows in batches], ("a", "b", "c"), "task", whole, equal)
    made = [batch for batch in found if batch is not None]
    assert len(made) == len(batches)
    totals = made[0].totals
    means = dict.fromkeys(totals, 0.0)
    for batch, own in zip(made, losses, strict=True):
        for task, weight, loss in zip(batch.tasks, batch.weights, own, strict=True):
            means[task] += weight * loss / totals[task]
    assert sum(made[0].shares[task] * means[task] for task in totals) == pytest.approx(expected, rel=1e-4)
    # What a process counts among others: its tokens, or the same as any other.
    assert sum(totals.values()) == pytest.approx(everything if whole and not equal else 1.0, rel=1e-4)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10_000),
    parts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=2, max_size=4),
    plain=st.booleans(),
)
def test_mixed_batches_with_shares_are_one_mixed_batch(seed: int, parts: list[list[int]], plain: bool) -> None:
    """Also those with rows of one task, with layers captured by autograd, and with parameters without subspaces."""
    everybody = [task for part in parts for task in part]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(everybody), 24, generator=generator)
    y = torch.randn(len(everybody), 12, generator=generator)
    counted = torch.randint(1, 5, (len(everybody),), generator=generator).float()
    weights = []
    for together in (True, False):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 12, bias=plain))
        optimizer = GemsOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            tasks=("a", "b", "c"),
            rank=4,
            update_proj_gap=2,
            model=model,
            capture="fused",
            gate="uniform",
        )
        for _ in range(3):
            total = {name: float(counted[[t == k for t in everybody]].sum()) for k, name in enumerate("abc")}
            total = {name: count for name, count in total.items() if count}
            shares = {name: count / sum(total.values()) for name, count in total.items()}
            start = 0
            for part in [everybody] if together else parts:
                rows = slice(start, start + len(part))
                start += len(part)
                own = {name: sum(counted[rows][[t == k for t in part]]) for k, name in enumerate("abc") if k in part}
                samples = {name: float(count) for name, count in own.items()}
                with optimizer.mixed(part, samples, shares=None if together else shares):
                    losses = (model(x[rows]) - y[rows]).square().mean(1)
                    ((losses * counted[rows]).sum() / counted.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("when", ["before", "after", "never"])
@pytest.mark.parametrize("parts", [[[0, 0], [0, 1]], [[0, 0], [1, 1], [0]]])
def test_a_loss_counts_once_whenever_it_is_told(parts: list[list[int]], when: str) -> None:
    """A part with rows of one task is told of by its backward pass as well, where nobody says it."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = GemsOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), tasks=("a", "b"), rank=2, model=model, capture="fused"
    )
    everybody = [task for part in parts for task in part]
    shares = {name: everybody.count(task) / len(everybody) for task, name in enumerate("ab")}
    expected = dict.fromkeys("ab", 0.0)
    for part in parts:
        with optimizer.mixed(part, shares=shares) as rows:
            losses = model(torch.randn(len(part), 8)).square().mean(1)
            own = {
                name: losses[[task == index for task in part]].sum().detach() / everybody.count(index)
                for index, name in enumerate("ab")
                if index in part
            }
            if when == "before":
                rows.tell(own)
            (losses.sum() / len(everybody)).backward()
            if when == "after":
                rows.tell(own)
        if when != "never" or len(own) == 1:
            expected = {name: value + float(own.get(name, 0.0)) for name, value in expected.items()}
    optimizer.step()
    found = optimizer.report().losses
    assert found == pytest.approx({name: value for name, value in expected.items() if value}, rel=1e-5)


def test_shares_are_checked() -> None:
    model = nn.Linear(8, 8)
    optimizer = GemsOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), tasks=("a", "b"), rank=2, model=model, capture="fused"
    )
    with pytest.raises(ValueError, match=r"shares names \['a'\], but task_ids has rows of \['a', 'b'\]"):
        optimizer.mixed(["a", "b"], shares={"a": 1.0}).__enter__()
    with pytest.raises(ValueError, match="samples=0 of task 'b' must be a positive number"):
        optimizer.mixed(["a", "b"], shares={"a": 1.0, "b": 0}).__enter__()
    with optimizer.mixed(["a", "b"], shares={"a": 0.5, "b": 0.5}) as rows:
        with pytest.raises(ValueError, match=r"rows.loss\(losses\) of a batch with shares="):
            rows.loss(torch.ones(2))
        with pytest.raises(ValueError, match=r"losses names \['c'\]"):
            rows.tell({"c": torch.ones(())})


@given(st.integers(1, 5), st.integers(2, 9), st.integers(2, 7), st.booleans(), st.integers(0, 10_000))
def test_row_losses_are_cross_entropy(rows: int, length: int, words: int, shifted: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, words, generator=generator, dtype=torch.bfloat16)
    labels = torch.randint(0, words, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = -100
    found = row_losses({"logits": logits}, labels, shifted)
    counts = count_labels({"labels": labels}, shifted)
    assert found is not None
    for row in range(rows):
        pair = (logits[row, :-1], labels[row, 1:]) if shifted else (logits[row], labels[row])
        expected = cross_entropy(pair[0].float(), pair[1], reduction="sum") / max(counts[row], 1)
        torch.testing.assert_close(found[row], expected)
    known = logits.float().log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:, None].clamp_min(0))[..., 0]
    told = row_losses({"log_probs": known * (labels[:, 1:] != -100)}, labels, True)
    assert told is not None
    torch.testing.assert_close(told, row_losses({"logits": logits}, labels, True))


def test_what_a_row_counts() -> None:
    tokens = torch.tensor([[1, 2, -100], [-100, 3, 4]])
    assert count_labels({"labels": tokens}, shifted=True) == [1.0, 2.0]
    assert count_labels({"labels": tokens}, shifted=False) == [2.0, 2.0]
    assert count_labels({"labels": tokens, "shift_labels": tokens}, shifted=True) == [2.0, 2.0]
    assert count_labels({"labels": torch.tensor([3, 1])}, shifted=True) == [1.0, 1.0]
    assert count_labels({"labels": torch.rand(2, 5)}, shifted=False) == [1.0, 1.0]
    assert count_labels({"x": torch.rand(3, 5)}, shifted=False) == [1.0, 1.0, 1.0]


def test_the_collator_hides_the_tasks_and_keeps_them() -> None:
    seen: list[dict[str, object]] = []

    def collate(rows: list[dict[str, object]]) -> dict[str, torch.Tensor]:
        seen.extend(rows)
        return {"labels": torch.ones(len(rows), 3, dtype=torch.int64)}

    rows = [{"x": 1, "task": "b"}, {"x": 2, "task": torch.tensor(0)}]
    batch = TaskCollator(collate, "task", lambda batch: [3.0] * len(batch["labels"]))(rows)
    assert batch["task"] == [["b", 3.0], [0, 3.0]]
    assert all("task" not in row for row in seen)
    assert "task" in rows[0]  # the data set's rows are its own
    travelling = TaskCollator(collate, "task", lambda batch: [3.0] * len(batch["labels"]), ("a", "b"))(rows)
    assert travelling["task"].tolist() == [[1.0, 3.0], [0.0, 3.0]]
    assert "task" not in TaskCollator(collate, "task", None)(rows)
    with pytest.raises(ValueError, match="1 of 2 rows of a batch have no column 'task'"):
        TaskCollator(collate, "task", None)([{"x": 1}, {"x": 2, "task": 0}])


def test_a_task_without_labels_has_a_share_that_can_be_divided_by() -> None:
    rows = [["a", 5.0], ["b", 0.0], ["b", 0.0], ["a", 3.0]]
    (batch,) = account([rows], ("a", "b"), "task", True, False)
    assert batch is not None
    assert batch.shares[0] == pytest.approx(1.0, abs=1e-6)
    assert batch.shares[1] == pytest.approx(0.05)
    assert batch.samples[1] / batch.samples[0] < 1e-6  # it weighs nothing in what the tasks share
