"""A Trainer with the mixin takes the steps of a plain loop over one large batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.recipes.problem import build_model
from tests.integrations.trainers import GEMS, Ragged, Remembering, arguments, by_hand, distance


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "batches"])
@pytest.mark.parametrize("parts", [1, 3])
def test_accumulated_batches_are_one_large_batch(parts: int, tokens: bool, tmp_path: Path) -> None:
    """Also where a batch has rows of one task only, and the tasks' shares differ between batches."""
    options = arguments(tmp_path, gradient_accumulation_steps=parts, per_device_train_batch_size=3)
    trainer = Remembering(build_model(), options, train_dataset=Ragged(), gems=GEMS)
    trainer.model_accepts_loss_kwargs = tokens
    trainer.train()
    if parts > 1:
        present = [[frozenset(batch["task"].tasks) for batch in step] for step in trainer.steps]
        assert any(len(set(kinds)) > 1 for kinds in present)
    expected = by_hand(trainer.steps, tokens)
    assert distance(trainer.model, expected) < 1e-6
    assert distance(trainer.model, build_model()) > 2e-2


@pytest.mark.parametrize("parts", [1, 2])
def test_max_grad_norm_clips_what_was_captured(parts: int, tmp_path: Path) -> None:
    options = arguments(tmp_path, gradient_accumulation_steps=parts, max_grad_norm=0.3)
    trainer = Remembering(build_model(), options, train_dataset=Ragged(), gems=GEMS)
    trainer.train()
    assert distance(trainer.model, by_hand(trainer.steps, True, 0.3, separate=False)) < 1e-6
    assert distance(trainer.model, by_hand(trainer.steps, True, separate=False)) > 1e-3
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == 4
    assert min(norms) > 0.3  # those before clipping


def test_max_grad_norm_clips_gradients_of_no_task(tmp_path: Path) -> None:
    """With SGD nothing moves by more than the rate times the bound."""
    moved = {}
    for bound in (0.0, 0.05):
        options = arguments(tmp_path, max_grad_norm=bound, optim="sgd", learning_rate=0.1, max_steps=1, warmup_steps=0)
        trainer = Remembering(build_model(), options, train_dataset=Ragged(), gems={"tasks": (), "rank": 8})
        trainer.train()
        pairs = zip(trainer.model.parameters(), build_model().parameters(), strict=True)
        moved[bound] = sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5
    assert 0 < moved[0.05] <= 0.1 * 0.05 * (1 + 1e-5) < moved[0.0]


def test_the_gate_knows_the_tasks_losses(tmp_path: Path) -> None:
    """The heuristic gate weighs them: without them it is another one."""
    trainers = []
    for told in (True, False):
        model = build_model()
        options = arguments(tmp_path, gradient_accumulation_steps=2)
        trainer = Remembering(model, options, train_dataset=Ragged(), gems=GEMS, task_losses=told)
        trainer.train()
        trainers.append(trainer)
    expected = by_hand(trainers[0].steps, True)
    told, untold = (distance(trainer.model, expected) for trainer in trainers)
    assert told < 1e-6
    assert untold > 2e-5
