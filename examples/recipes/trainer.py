"""Hugging Face Trainer: batches whose rows belong to several tasks, on any number of processes.

    .venv/bin/python examples/recipes/trainer.py --out weights.pt
    .venv/bin/accelerate launch --num_processes 2 examples/recipes/trainer.py --out weights.pt

It writes checkpoints after four and after eight steps; with ``--resume`` it goes on from the first one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from problem import TASKS, Sentences, build_model, save_weights
from transformers import Trainer, TrainingArguments

from gradsub.integrations import GemsReportCallback, GemsTrainerMixin


class GemsTrainer(GemsTrainerMixin, Trainer):
    """A Trainer whose rows have a column ``task``."""


def main() -> None:
    """Train for eight steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()

    checkpoints = arguments.out.parent / "trainer"
    trainer = GemsTrainer(
        model=build_model(),
        args=TrainingArguments(
            output_dir=str(checkpoints),
            optim="adamw_torch",
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            max_grad_norm=1.0,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            accelerator_config={"split_batches": True},  # 8 rows on all processes together, whatever their number
            max_steps=8,
            save_steps=4,
            logging_steps=2,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Sentences(128, (0, 1)),
        gems={"tasks": TASKS, "rank": 8, "lr_scale": "adamw", "update_proj_gap": 3, "capture": "fused"},
        callbacks=[GemsReportCallback()],
    )
    trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-4") if arguments.resume else None)
    if trainer.is_world_process_zero():
        save_weights(trainer.accelerator.unwrap_model(trainer.model), arguments.out)


if __name__ == "__main__":
    main()
