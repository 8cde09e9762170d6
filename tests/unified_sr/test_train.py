from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from examples.unified_sr.checkpoint import Checkpoint
from examples.unified_sr.config import resolve
from examples.unified_sr.data import Dataset, Example, Item, load_dataset
from examples.unified_sr.feeds import Feed, Pool, plan_training
from examples.unified_sr.general_text import load_general_text
from examples.unified_sr.methods import Updater
from examples.unified_sr.methods._mixed import MixedLossUpdater
from examples.unified_sr.model import Collator, PromptBuilder, Ranker, load_language_model
from examples.unified_sr.parts import Parts
from examples.unified_sr.precision import Precision, choose_precision
from examples.unified_sr.settings import DatasetSettings, ModelSettings
from examples.unified_sr.training import History, train, warmup_cosine

ITEMS = [Item(str(n), title) for n, title in enumerate(("red", "blue", "green", "glass", "wood"))]
ROWS = {
    "rec": [Example("rec", "u", (n,), "", ((n + 1) % 5,), 0.0, f"r{n}") for n in range(5)],
    "search": [Example("search", "u", (), ITEMS[n].title, (n,), 0.0, f"s{n}") for n in range(5)],
}
FP32 = Precision(torch.device("cpu"), None)


def trained(folder: str, log: Path, *pairs: str, precision: Precision = FP32) -> tuple[Ranker, History]:
    language_model = load_language_model(folder)
    ranker = Ranker(language_model, ITEMS)
    settings = resolve(
        pairs=["training.batch_size=5", "training.report_every=2", *pairs], flags={"method.name": "adamw"}
    )
    weights = [weight for weight in ranker.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW([{"params": weights, "name": "all", "lr": settings.training.lr}])
    updater: Updater = MixedLossUpdater(optimizer)
    prompts = PromptBuilder(
        language_model.tokenizer, first_item=ranker.first_item, encoder_decoder=language_model.encoder_decoder
    )
    feed = Feed({task: Pool(task, rows) for task, rows in ROWS.items()}, Collator(0), prompts)
    plan = plan_training(settings, feed.pools)
    return ranker, train(ranker, updater, feed, precision, settings, plan, log, Checkpoint(log.with_suffix(".pt")))


def test_training_learns_both_tasks(model_folder: str, tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    ranker, history = trained(model_folder, log, "training.steps=40", "training.lr=1.0e-2")
    first, last = history.records[0]["loss"], history.records[-1]["loss"]
    assert all(last[task] < 0.5 * first[task] for task in ROWS)
    assert not ranker.training
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in records] == list(range(1, 41))
    assert set(records[0]) == {"step", "loss", "lr", "seconds", "diagnostics"}
    assert set(records[2]) == {"step", "loss", "lr", "seconds"}
    assert history.examples == 400
    assert history.throughput["examples_per_second"] > 0


def test_the_same_seed_gives_the_same_run(llama_folder: str, tmp_path: Path) -> None:
    # Two of five examples in a batch: with all of them, another order would change the loss by rounding at most.
    runs = [
        trained(llama_folder, tmp_path / "a", "training.steps=3", "training.batch_size=2", f"seed={seed}")[1].records
        for seed in (1, 1, 2)
    ]
    curves = [[record["loss"] for record in records] for records in runs]
    assert curves[0] == curves[1]
    assert curves[0][0]["rec"] != pytest.approx(curves[2][0]["rec"], rel=1e-4)


def test_bfloat16_trains_too(llama_folder: str, tmp_path: Path) -> None:
    precision = Precision(torch.device("cpu"), torch.bfloat16)
    _, history = trained(llama_folder, tmp_path / "log", "training.steps=2", precision=precision)
    _, exact = trained(llama_folder, tmp_path / "log", "training.steps=2")
    assert history.records[0]["loss"]["rec"] == pytest.approx(exact.records[0]["loss"]["rec"], rel=0.02)


def test_a_loss_that_is_nan_names_its_task(llama_folder: str, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"loss of the task 'rec' is (nan|inf).*Lower training.lr"):
        trained(llama_folder, tmp_path / "log", "training.steps=20", "training.lr=1.0e+30", "training.warmup=0")


def test_batches_cover_each_epoch_and_depend_on_seed_and_task_alone() -> None:
    def taken(seed: int, task: str) -> list[str]:
        stream = Pool(task, ROWS["rec"]).batches(2, seed)
        return [row.qid for batch in itertools.islice(stream, 5) for row in batch]

    found = taken(0, "rec")
    assert sorted(found[:5]) == sorted(found[5:]) == sorted(row.qid for row in ROWS["rec"])
    assert found == taken(0, "rec")
    assert len({tuple(taken(seed, task)) for seed in (0, 1) for task in ("rec", "search")}) > 1
    with pytest.raises(ValueError, match="'rec' has no training example"):
        next(Pool("rec", []).batches(2, 0))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (10, 0.0), (100, 0.05), (7, 0.5)])
def test_the_schedule_rises_and_falls(steps: int, warmup: float) -> None:
    rates = [warmup_cosine(step, steps, warmup) for step in range(steps)]
    assert max(rates) == pytest.approx(1)
    assert all(0 < rate <= 1 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_precision_is_what_was_asked_for() -> None:
    assert choose_precision(ModelSettings(autocast="none", device="cpu")) == FP32
    assert choose_precision(ModelSettings(autocast="bfloat16", device="cpu")).autocast is torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no GPU"):
            choose_precision(ModelSettings(device="cuda"))


def assembled(model: str, data: str, *pairs: str, method: str = "adamw") -> tuple[Dataset, Parts]:
    minima = ["data.min_user_events=1", "data.min_item_events=1"]
    flags = {"method.name": method, "data.source": data, "model.name": model}
    settings = resolve(pairs=[*minima, "evaluation.perplexity_tokens=64", *pairs], flags=flags)
    dataset = load_dataset(**dict(DatasetSettings.of(settings)))
    return dataset, Parts.assemble(settings, dataset, load_language_model(model), load_general_text(None), FP32)


def with_validation_of_recommendations_alone(folder: Path) -> str:
    rows = []
    for user in range(3):
        for time in range(10):
            part = "train" if time < 6 else "valid" if time == 7 else "test"
            query = {"query": "red"} if time % 2 == 0 and part != "valid" else {}
            rows.append({"user": user, "item": (time + user) % 12, "timestamp": time, "split": part, **query})
    (folder / "items.jsonl").write_text("".join(json.dumps({"id": n, "title": f"red {n}"}) + "\n" for n in range(12)))
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_what_is_trained_does_not_depend_on_what_is_evaluated(llama_folder: str, tmp_path: Path) -> None:
    data = with_validation_of_recommendations_alone(tmp_path)
    dataset, trial = assembled(llama_folder, data, "evaluation.split=valid")
    _, own = assembled(llama_folder, data)
    assert trial.trained == own.trained == ("rec", "search")
    assert set(trial.feed(dataset).pools) == {"rec", "search"}
    assert trial.tasks == ("rec",)
    assert trial.on_test(dataset).tasks == own.tasks == ("rec", "search")
    assert trial.on_test(dataset).evaluated == own.evaluated
    _, single = assembled(llama_folder, data, "training.epochs=2", "training.early_stop=1", method="adamw-search")
    with pytest.raises(ValueError, match=r"early_stop needs validation examples, but \['search'\] have none"):
        single.early_stopping(tmp_path / "best.pt")
    with pytest.raises(ValueError, match="'search', but the validation examples are of rec alone"):
        assembled(llama_folder, data, "evaluation.split=valid", method="adamw-search")


def test_a_single_task_is_stopped_by_its_own_validation_after_the_epochs_of_joint_training(
    llama_folder: str, data_folder: str
) -> None:
    epochs = ("training.epochs=3", "training.early_stop=1", "training.batch_size=4")
    dataset, joint = assembled(llama_folder, data_folder, *epochs)
    assert set(joint.valid) == {"rec", "search"}
    sizes = {len(examples) for examples in dataset.train.values()}
    for task in ("rec", "search"):
        _, single = assembled(llama_folder, data_folder, *epochs, method=f"adamw-{task}")
        assert set(single.feed(dataset).pools) == set(single.valid) == {task}
        assert single.evaluated == joint.evaluated
        assert single.plan(dataset) == joint.plan(dataset)
        assert single.plan(dataset).per_epoch == -(-max(sizes) // 4)
