"""A request to stop: a checkpoint after the step or in the middle of a validation, and the same results afterwards."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import FP32, ITEMS, ROWS

from examples.unified_sr.checkpoint import Checkpoint
from examples.unified_sr.config import resolve
from examples.unified_sr.early_stopping import EarlyStopping
from examples.unified_sr.feeds import Feed, Pool, plan_training
from examples.unified_sr.interruption import INTERRUPTION, Interrupted
from examples.unified_sr.methods._mixed import MixedLossUpdater
from examples.unified_sr.model import Collator, PromptBuilder, Ranker, load_language_model
from examples.unified_sr.training import History, train

VALIDATIONS = (0.1, 0.3, 0.2, 0.25, 0.4)


@pytest.fixture(autouse=True)
def _nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(INTERRUPTION, "wanted", False)


def ask() -> None:
    INTERRUPTION._receive(signal.SIGTERM, None)


class Attempt:
    """One start of the same training, with a request at a moment of choice."""

    def __init__(self, folder: str, out: Path, *, at_step: int = 0, at_validation: int = 0) -> None:
        INTERRUPTION.wanted = False
        torch.manual_seed(0)
        language_model = load_language_model(folder)
        self.ranker = Ranker(language_model, ITEMS)
        pairs = [
            "training.batch_size=2",
            "training.epochs=5",
            "training.early_stop=2",
            "training.checkpoint_every=100",
            "training.lr=1e-3",
        ]
        weights = [weight for weight in self.ranker.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW([{"params": weights, "name": "all", "lr": 1e-3}])
        prompts = PromptBuilder(
            language_model.tokenizer, first_item=self.ranker.first_item, encoder_decoder=language_model.encoder_decoder
        )
        self.checkpoint = Checkpoint(out / "checkpoint.pt")
        self.log = out / "steps.jsonl"
        self.asked: list[int] = []
        self._history: History | None = None

        def validate() -> float:
            number = sum("validation" in record for record in self._seen)
            if number + 1 == at_validation:
                ask()
            return VALIDATIONS[number]

        def watch(history: History) -> None:
            self._seen = history.records
            if len(history.records) == at_step:
                ask()

        self._seen: list[dict[str, Any]] = []
        feed = Feed({task: Pool(task, rows) for task, rows in ROWS.items()}, Collator(0), prompts)
        settings = resolve(pairs=pairs, flags={"method.name": "adamw"})
        self.train: Callable[[], History] = lambda: train(
            self.ranker,
            MixedLossUpdater(optimizer),
            feed,
            FP32,
            settings,
            plan_training(settings, feed.pools),
            self.log,
            self.checkpoint,
            stopping=EarlyStopping(out / "best.pt", 2, validate),
            watch=watch,
        )


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.mark.parametrize("moment", [{"at_step": 4}, {"at_step": 6}, {"at_validation": 2}, {"at_step": 12}])
def test_training_goes_on_as_if_nothing_had_been(llama_folder: str, tmp_path: Path, moment: dict[str, int]) -> None:
    whole, stopped, resumed = (tmp_path / name for name in ("whole", "parts", "parts"))
    whole.mkdir()
    stopped.mkdir()
    expected = Attempt(llama_folder, whole)
    history = expected.train()
    assert history.validation == [0.1, 0.3, 0.2, 0.25], "two epochs without a better one"
    first = Attempt(llama_folder, stopped, **moment)
    with pytest.raises(Interrupted):
        first.train()
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    assert state["step"] == moment.get("at_step", 6), "after the step that was going on"
    second = Attempt(llama_folder, resumed)
    second._seen = state["history"]["records"]
    found = second.train()
    assert without_seconds(found.records) == without_seconds(history.records)
    assert (resumed / "steps.jsonl").read_text().count("validation") == 4
    assert found.elapsed > found.seconds == pytest.approx(sum(each["seconds"] for each in found.records), abs=1e-2)
    assert found.elapsed > state["history"]["elapsed"] > 0
    for one, other in zip(second.ranker.parameters(), expected.ranker.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_comes_after_the_training_can_be_interrupted_too(llama_folder: str, tmp_path: Path) -> None:
    first = Attempt(llama_folder, tmp_path)
    first.train()
    first.checkpoint.renew()
    second = Attempt(llama_folder, tmp_path, at_step=-1)
    second._seen = torch.load(first.checkpoint.path, weights_only=True)["history"]["records"]
    taken = len(second._seen)
    assert len(second.train().records) == taken, "no further step: training was over"
    for one, other in zip(first.ranker.parameters(), second.ranker.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_request_waits_where_it_is_deferred_and_only_there() -> None:
    with pytest.raises(Interrupted):
        ask()
    with pytest.raises(Interrupted), INTERRUPTION.deferred():
        pytest.fail("it was there before")
    reached: list[str] = []

    def asked_for(then: Callable[[], object]) -> None:
        INTERRUPTION.wanted = False
        with INTERRUPTION.deferred():
            ask()
            then()

    def inside() -> None:
        with INTERRUPTION.deferred(wait=False):
            reached.append("too far")

    with pytest.raises(Interrupted):
        asked_for(lambda: reached.append("the end"))
    assert reached == ["the end"]
    with pytest.raises(Interrupted):
        asked_for(inside)
    assert reached == ["the end"]
