"""A Trainer's checkpoint, its loss scale and its low precision."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from examples.recipes.problem import build_model
from gradsub.integrations import GemsReportCallback
from tests.integrations.trainers import GEMS, Ragged, Remembering, arguments, distance


def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "optim": "adamw_torch",
        "learning_rate": 3e-3,
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 4,  # between two refreshes
    }
    whole = Remembering(build_model(), arguments(tmp_path, **options), train_dataset=Ragged(), gems=GEMS)
    whole.train()
    again = Remembering(build_model(), arguments(tmp_path, **options), train_dataset=Ragged(), gems=GEMS)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(again.steps) == 3
    assert distance(whole.model, again.model) == 0
    first, second = (trainer.gems.state_dict()["state"] for trainer in (whole, again))
    assert first.keys() == second.keys()
    for key, state in first.items():
        assert state.keys() == second[key].keys()
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[key][name])), name


class Scaled(Remembering):
    """With accelerate's loss scale for float16, which it has on GPUs only, and the computation left in float32."""

    scale = 1.0
    overflow_at = -1

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=1000)

    def _wrap_model(self, model: Any, *rest: Any, **options: Any) -> Any:
        found = super()._wrap_model(model, *rest, **options)
        self.accelerator.native_amp = False  # for autocast
        return found

    def create_scheduler(self, *rest: Any, **options: Any) -> Any:
        self.accelerator.native_amp = True
        return super().create_scheduler(*rest, **options)

    def compute_loss(self, *rest: Any, **options: Any) -> Any:
        loss = super().compute_loss(*rest, **options)
        return loss * math.inf if len(self.steps) == self.overflow_at else loss


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_a_loss_scale_changes_nothing(clip: float, tmp_path: Path) -> None:
    """Neither clipped norms nor the losses that the gate is told."""
    models = []
    for scale in (1.0, 2.0**10):
        kind = type("WithScale", (Scaled,), {"scale": scale})
        options = arguments(tmp_path, max_grad_norm=clip, gradient_accumulation_steps=2)
        trainer = kind(build_model(), options, train_dataset=Ragged(), gems={**GEMS, "nonfinite": "ignore"})
        trainer.train()
        models.append(trainer.model)
    assert distance(models[0], models[1]) < 1e-6
    assert distance(models[0], build_model()) > 1e-2


def test_an_overflow_is_a_step_left_out(tmp_path: Path) -> None:
    trainers = []
    for overflow_at in (-1, 4):
        kind = type("Overflowing", (Scaled,), {"overflow_at": overflow_at})
        options = arguments(tmp_path, max_grad_norm=0.3, logging_nan_inf_filter=False, max_steps=4 - (overflow_at < 0))
        options.lr_scheduler_type = "constant"
        trainer = kind(build_model(), options, train_dataset=Ragged(), gems=GEMS, task_losses=False)
        trainer.train()
        trainers.append(trainer)
    assert distance(trainers[0].model, trainers[1].model) == 0


def test_bfloat16(tmp_path: Path) -> None:
    models = []
    for bf16 in (False, True):
        options = arguments(tmp_path, bf16=bf16, max_grad_norm=0.5, gradient_accumulation_steps=2)
        trainer = Remembering(build_model(), options, train_dataset=Ragged(), gems=GEMS)
        trainer.train()
        models.append(trainer.model)
    moved = distance(models[0], build_model())
    assert 0 < distance(models[0], models[1]) < 0.3 * moved


def test_a_report_is_logged_as_flat_scalars(tmp_path: Path) -> None:
    options = arguments(tmp_path, logging_steps=2, per_device_train_batch_size=16)
    trainer = Remembering(
        build_model(), options, train_dataset=Ragged(), gems=GEMS, callbacks=[GemsReportCallback(prefix="g/")]
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if any(key.startswith("g/") for key in entry)]
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        assert {"g/gate/search", "g/gate/rec", "g/cosine/search|rec", "g/loss/search", "g/loss/rec"} <= entry.keys()
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in entry.values())
        assert entry["g/gate/search"] + entry["g/gate/rec"] == pytest.approx(1.0)
    lost = GemsReportCallback()
    with pytest.raises(ValueError, match="GemsReportCallback has no Trainer"):
        lost.on_log(None, None, None, logs={"loss": 1.0})


class Once(TrainerCallback):
    """Does something in the middle of the first step, once."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act: Callable[[], None] | None = act

    def on_substep_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        act, self.act = self.act, None
        if act is not None:
            act()


def half_a_step(tmp_path: Path, callback: TrainerCallback | None) -> Remembering:
    options = arguments(
        tmp_path, gradient_accumulation_steps=2, max_steps=1, train_sampling_strategy="sequential", learning_rate=0.1
    )
    callbacks = None if callback is None else [callback]
    return Remembering(build_model(), options, train_dataset=Ragged(), gems=GEMS, callbacks=callbacks)


def test_what_an_interrupted_step_has_captured_is_of_no_later_training(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    trainer, undisturbed = half_a_step(tmp_path, Once(interrupt)), half_a_step(tmp_path, None)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    undisturbed.train()
    assert distance(trainer.model, undisturbed.model) == 0


def test_a_checkpoint_in_the_middle_of_a_step_is_that_of_the_last_one(tmp_path: Path) -> None:
    saved: list[dict[str, Any]] = []

    def save() -> None:
        trainer._save_checkpoint(trainer.model, trial=None)
        path = next(tmp_path.glob("checkpoint-*/optimizer.pt"))
        saved.append(torch.load(path, weights_only=True))

    trainer, undisturbed = half_a_step(tmp_path, Once(save)), half_a_step(tmp_path, None)
    trainer.train()
    undisturbed.train()
    assert distance(trainer.model, undisturbed.model) == 0
    assert {float(state["step"]) for state in saved[0]["state"].values() if "basis" in state} == {0.0}


def test_a_step_that_the_loss_scale_has_left_out_can_be_saved(tmp_path: Path) -> None:
    kind = type("Overflowing", (Scaled,), {"scale": 2.0**10, "overflow_at": 2})
    models = []
    for saving in ({"save_strategy": "steps", "save_steps": 1}, {}):
        options = arguments(tmp_path, max_steps=4, logging_nan_inf_filter=False, **saving)
        trainer = kind(build_model(), options, train_dataset=Ragged(), gems=GEMS)
        trainer.train()
        models.append(trainer.model)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4
    assert distance(*models) == 0


def test_a_trained_model_can_be_copied_and_saved_without_its_trainer(tmp_path: Path) -> None:
    trainer = Remembering(build_model(), arguments(tmp_path), train_dataset=Ragged(), gems=GEMS)
    trainer.lock = threading.Lock()  # of a data set, or a logger
    trainer.train()
    twin = copy.deepcopy(trainer.model)
    assert distance(trainer.model, twin) == 0
    torch.save(trainer.model, tmp_path / "model.pt")
    rows = {"input_ids": torch.arange(6)[None]}
    torch.testing.assert_close(twin(**rows).logits, trainer.model(**rows).logits)


def test_a_callback_logs_to_the_trainer_that_trains(tmp_path: Path) -> None:
    callback = GemsReportCallback()
    trainers = [
        Remembering(
            build_model(), arguments(tmp_path, max_steps=1), train_dataset=Ragged(), gems=GEMS, callbacks=[callback]
        )
        for _ in range(2)
    ]
    for trainer in trainers:
        trainer.train()
    found = [sum("gems/gate/search" in entry for entry in t.state.log_history) for t in trainers]
    assert found == [1, 1]


def test_arguments_stay_the_users(tmp_path: Path) -> None:
    options = arguments(tmp_path)
    assert options.average_tokens_across_devices
    first, second = (Remembering(build_model(), options, train_dataset=Ragged(), gems=GEMS) for _ in range(2))
    first.train()
    second.train()
    assert options.average_tokens_across_devices
    assert distance(first.model, second.model) == 0
    assert not first._equal_ranks
    assert not second._equal_ranks
