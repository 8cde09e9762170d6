"""Micro-batches, gradient checkpointing, epochs and early stopping change what a step costs, not what it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.unified_sr.cli import main
from examples.unified_sr.config import resolve
from examples.unified_sr.data import Example, Item
from examples.unified_sr.early_stopping import EarlyStopping
from examples.unified_sr.feeds import Feed, cut, plan_training
from examples.unified_sr.losses import passes_of
from examples.unified_sr.methods import Setup, method_named
from examples.unified_sr.methods._mixed import MixedLossUpdater
from examples.unified_sr.model import Batch, Collator, PromptBuilder, Ranker, load_language_model
from examples.unified_sr.precision import Precision

ITEMS = [Item(str(n), title) for n, title in enumerate(("red", "blue", "green", "glass", "wood", "steel", "lamp"))]
ROWS = {
    "rec": [Example("rec", "u", tuple(range(n + 1)), "", ((n + 2) % 7,), 0.0, f"r{n}") for n in range(5)],
    "search": [Example("search", "u", (), "old " * n + ITEMS[n].title, (n,), 0.0, f"s{n}") for n in range(5)],
}
FP32 = Precision(torch.device("cpu"), None)
SMALL = [
    "training.batch_size=4",
    "evaluation.perplexity_tokens=256",
    "evaluation.perplexity_window=64",
    "training.leak_tokens=0",
    "data.min_user_events=3",
]


@pytest.fixture(params=["llama", "t5"])
def small_folder(request: pytest.FixtureRequest) -> str:
    folder: str = request.getfixturevalue(f"{request.param}_folder")
    return folder


def micro_batches(rows: list[Example], count: int, prompts: PromptBuilder) -> list[Batch]:
    feed = Feed({}, Collator(0), prompts)
    return [feed.batch(part) for part in cut(rows, count)]


def after_steps(
    folder: str, method: str, parts: int, *, checkpointing: bool = False, precision: Precision = FP32, steps: int = 3
) -> tuple[Ranker, list[dict[str, float]]]:
    torch.manual_seed(0)
    language_model = load_language_model(folder)
    ranker = Ranker(language_model, ITEMS)
    if checkpointing:
        ranker.recompute_activations()
    own = ["method.rank=4", "method.update_proj_gap=2", "method.protect=false"] if method == "gems" else []
    settings: Any = resolve(pairs=["training.lr=5.0e-2", "training.batch_size=5", *own], flags={"method.name": method})
    build = method_named(method).build
    assert build is not None
    updater = build(Setup(ranker, settings, ("rec", "search"), lambda: iter(()), print))
    prompts = PromptBuilder(
        language_model.tokenizer, first_item=ranker.first_item, encoder_decoder=language_model.encoder_decoder
    )
    for group in updater.optimizer.param_groups:
        # Adam divides by the gradient's size: with its default, a weight without influence (in T5's decoder, which
        # reads one token, queries and keys) would walk on rounding errors, which are not the same in parts.
        group["eps"] = 1e-2
    ranker.train()
    losses = []
    for _ in range(steps):
        batches = [part for rows in ROWS.values() for part in micro_batches(rows, parts, prompts)]
        losses.append(updater.update(passes_of(ranker, batches, precision)))
    return ranker, losses


def distance(ranker: Ranker, other: Ranker) -> float:
    """The largest difference of any weight."""
    pairs = zip(ranker.parameters(), other.parameters(), strict=True)
    return max(float((weight - twin).detach().abs().max()) for weight, twin in pairs)


@pytest.mark.parametrize("method", ["adamw", "gems"])
@pytest.mark.parametrize("parts", [2, 5])
def test_micro_batches_take_the_step_of_the_whole_batch(method: str, parts: int, small_folder: str) -> None:
    # T5's decoder reads one constant token, so gradients there have rank 1 and the further directions of a basis are
    # rounding errors: from the second step on, even another order of the rows in a batch changes the weights.
    steps = 1 if "t5" in small_folder and method == "gems" else 3
    whole, losses = after_steps(small_folder, method, 1, steps=steps)
    cut, same_losses = after_steps(small_folder, method, parts, steps=steps)
    assert distance(whole, Ranker(load_language_model(small_folder), ITEMS)) > 1e-2
    assert distance(whole, cut) < 2e-5
    for step, twin in zip(losses, same_losses, strict=True):
        assert step == pytest.approx(twin, rel=1e-5)


@pytest.mark.parametrize("parts", [2, 3])
def test_the_gradient_of_micro_batches_is_that_of_the_batch(parts: int, small_folder: str) -> None:
    found = []
    for count in (1, parts):
        language_model = load_language_model(small_folder)
        ranker = Ranker(language_model, ITEMS).train()
        prompts = PromptBuilder(
            language_model.tokenizer, first_item=ranker.first_item, encoder_decoder=language_model.encoder_decoder
        )
        for each in passes_of(ranker, micro_batches(ROWS["search"], count, prompts), FP32):
            (each.compute()["search"] * each.samples["search"] / 5).backward()
        found.append([weight.grad for weight in ranker.parameters() if weight.grad is not None])
    for gradient, twin in zip(*found, strict=True):
        torch.testing.assert_close(gradient, twin, rtol=1e-4, atol=1e-6)


def test_one_micro_batch_at_a_time_is_in_memory(llama_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    language_model = load_language_model(llama_folder)
    ranker = Ranker(language_model, ITEMS).train()
    prompts = PromptBuilder(language_model.tokenizer, first_item=ranker.first_item, encoder_decoder=False)
    parts = micro_batches(ROWS["rec"], 3, prompts)
    updater = MixedLossUpdater(torch.optim.SGD([{"params": ranker.item_parameters(), "name": "items"}], lr=0.1))
    plain = ranker.hidden

    def watched(batch: Any) -> torch.Tensor:
        number = next(index for index, part in enumerate(parts) if part is batch)
        events.append(f"forward {number}")
        hidden = plain(batch)
        hidden.register_hook(lambda gradient: events.append(f"backward {number}"))
        return hidden

    monkeypatch.setattr(ranker, "hidden", watched)
    updater.update(passes_of(ranker, parts, FP32))
    assert events == [f"{what} {number}" for number in range(3) for what in ("forward", "backward")]


def test_parts_cover_the_batch_and_differ_by_one_at_most(llama_folder: str) -> None:
    prompts = PromptBuilder(load_language_model(llama_folder).tokenizer, first_item=260, encoder_decoder=False)
    parts = micro_batches(ROWS["rec"], 3, prompts)
    assert [len(part.targets) for part in parts] == [1, 2, 2]
    assert [target for part in parts for target in part.targets] == [row.target for row in ROWS["rec"]]
    with pytest.raises(ValueError, match="accumulation=6 for 5 rows"):
        micro_batches(ROWS["rec"], 6, prompts)


@pytest.mark.parametrize("method", ["adamw", "gems"])
@pytest.mark.parametrize("parts", [1, 2])
def test_gradient_checkpointing_changes_nothing(method: str, parts: int, small_folder: str) -> None:
    steps = 1 if "t5" in small_folder and method == "gems" else 3
    kept, losses = after_steps(small_folder, method, parts, steps=steps)
    again, same_losses = after_steps(small_folder, method, parts, checkpointing=True, steps=steps)
    assert distance(kept, again) < 2e-5
    assert losses[-1] == pytest.approx(same_losses[-1], rel=1e-5)


def test_they_work_under_autocast(llama_folder: str) -> None:
    precision = Precision(torch.device("cpu"), torch.bfloat16)
    exact = after_steps(llama_folder, "gems", 1, steps=1)[1][0]
    _, losses = after_steps(llama_folder, "gems", 2, checkpointing=True, precision=precision, steps=2)
    assert losses[0] == pytest.approx(exact, rel=0.02)


def test_the_plan_counts_epochs_of_the_largest_task() -> None:
    rows = {"rec": ROWS["rec"], "search": ROWS["search"][:2]}
    plan = plan_training(resolve(pairs=["training.epochs=3", "training.batch_size=2"]), rows)
    assert (plan.steps, plan.per_epoch) == (9, 3)
    assert plan_training(resolve(pairs=["training.steps=7", "training.batch_size=2"]), rows).steps == 7
    with pytest.raises(ValueError, match=r"training\.early_stop=2 counts epochs"):
        plan_training(resolve(pairs=["training.early_stop=2"]), rows)
    with pytest.raises(ValueError, match=r"training\.accumulation=4 .* training\.batch_size=2"):
        plan_training(resolve(pairs=["training.accumulation=4", "training.batch_size=2"]), rows)


def run(model: str, data: str, out: Path, *pairs: str) -> dict[str, Any]:
    line = ["run", "--data", data, "--model", model, "--method", "adamw", "--out", str(out), "--set", *SMALL, *pairs]
    assert main(line) == 0
    summary: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return summary


def test_training_stops_early_and_keeps_the_best_weights(llama_folder: str, data_folder: str, tmp_path: Path) -> None:
    # At this rate the model gets worse after some epochs at the latest.
    summary = run(
        llama_folder,
        data_folder,
        tmp_path / "run",
        *(
            "training.epochs=30",
            "training.early_stop=2",
            "training.lr=0.3",
            "training.warmup=0",
            "training.batch_size=32",
        ),
    )
    values = summary["validation"]
    best = values.index(max(values))
    assert len(values) == best + 3 < 30
    per_epoch = summary["steps"] // len(values)
    assert summary["steps"] == per_epoch * len(values)
    assert not list((tmp_path / "run").glob("*.pt"))
    # What is left is the best epoch: evaluated on the validation split, it has the value that was measured then.
    on_valid = tmp_path / "valid"
    run(
        llama_folder,
        data_folder,
        on_valid,
        *(
            "training.epochs=30",
            "training.early_stop=2",
            "training.lr=0.3",
            "training.warmup=0",
            "training.batch_size=32",
        ),
        "evaluation.split=valid",
    )
    final = json.loads((on_valid / "metrics.json").read_text(encoding="utf-8"))["final"]
    assert (final["rec"]["ndcg@10"] + final["search"]["ndcg@10"]) / 2 == pytest.approx(max(values))


def test_an_interrupted_early_stopping_goes_on(
    llama_folder: str, data_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = ("training.epochs=6", "training.early_stop=4", "training.checkpoint_every=2", "training.batch_size=32")
    whole = run(llama_folder, data_folder, tmp_path / "whole", *pairs)
    plain = EarlyStopping.over

    def interrupted(self: EarlyStopping, values: list[float], model: Any) -> bool:
        if len(values) == 4:
            raise KeyboardInterrupt
        return plain(self, values, model)

    monkeypatch.setattr(EarlyStopping, "over", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(llama_folder, data_folder, tmp_path / "cut", *pairs)
    monkeypatch.undo()
    cut = run(llama_folder, data_folder, tmp_path / "cut", *pairs)
    assert cut["validation"] == whole["validation"]
    assert (tmp_path / "cut" / "metrics.json").read_text() == (tmp_path / "whole" / "metrics.json").read_text()


def test_validation_is_another_split_than_test(llama_folder: str, data_folder: str, tmp_path: Path) -> None:
    qids = {}
    for split in ("test", "valid"):
        out = tmp_path / split
        run(llama_folder, data_folder, out, "training.steps=0", f"evaluation.split={split}", "evaluation.compat=gems")
        qids[split] = {json.loads(line)["qid"] for line in (out / "queries.rec.jsonl").read_text().splitlines()}
        final = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["final"]
        assert final["rec"]["gems_ndcg@10"] == pytest.approx(final["rec"]["ndcg@10"]), "one relevant item a query"
        assert f"{'validation' if split == 'valid' else 'test'} examples of rec" in (out / "report.md").read_text()
    assert all(qid.startswith("rec-") for qid in qids["test"])
    assert all(qid.startswith("valid-rec-") for qid in qids["valid"])
