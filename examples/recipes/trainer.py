"""Hugging Face Trainer: batches whose rows belong to several tasks, on any number of processes.

    accelerate launch --num_processes 2 examples/recipes/trainer.py --out weights.pt

A callback cannot do it: none of its events sees the batch, and the rows' tasks are in the batch. So one method of the
Trainer is overridden.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR
from transformers import Trainer, TrainingArguments

from examples.recipes.problem import TASKS, Sentences, build_model, save_weights
from gradsub import GemsOptimizer


class GemsTrainer(Trainer):
    """A Trainer whose optimizer is told which rows of a batch belong to which task.

    Args:
        gems: the optimizer, which is also the first of ``optimizers``.
    """

    def __init__(self, *arguments: Any, gems: GemsOptimizer, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gems = gems

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any) -> Tensor:
        """One forward and backward pass of a batch with a column ``task``."""
        tasks = inputs.pop("task")
        # The Trainer wraps the model after the optimizer was built. What is captured is summed by the optimizer.
        quiet = model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
        with quiet, self.gems.mixed(tasks.tolist()):
            loss: Tensor = super().training_step(model, inputs, *arguments)
        return loss


def main() -> None:
    """Train for eight steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    model = build_model()
    optimizer = GemsOptimizer(
        AdamW(model.parameters(), lr=3e-3), tasks=TASKS, rank=8, update_proj_gap=3, model=model, capture="fused"
    )
    trainer = GemsTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.out.parent / "trainer"),
            per_device_train_batch_size=16,
            accelerator_config={"split_batches": True},  # 16 rows on all processes together
            max_steps=8,
            max_grad_norm=0.0,  # it would clip p.grad, where captured gradients are not; see clip_grad_norm_
            remove_unused_columns=False,  # the column "task" is no argument of the model
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Sentences(128, (0, 1)),
        optimizers=(optimizer, LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=8)),
        gems=optimizer,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        save_weights(trainer.accelerator.unwrap_model(trainer.model), arguments.out)


if __name__ == "__main__":
    main()
