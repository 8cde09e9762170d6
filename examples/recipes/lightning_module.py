"""Lightning: manual optimization of two tasks, on any number of processes.

    .venv/bin/python examples/recipes/lightning_module.py --out weights.pt
    .venv/bin/python examples/recipes/lightning_module.py --out weights.pt --processes 2

It writes a checkpoint after each epoch of four steps; with ``--resume`` it goes on from the first one.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from problem import TASKS, Sentences, build_model, save_weights
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, DistributedSampler

from gradsub import GemsOptimizer


class TwoTasks(lightning.LightningModule):
    """A language model whose batches are dictionaries from a task's name to its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = build_model()

    def configure_optimizers(self) -> Any:
        """The optimizer, and a schedule that steers it."""
        optimizer = GemsOptimizer(
            AdamW(self.model.parameters(), lr=1e-3),
            tasks=TASKS,
            rank=8,
            lr_scale="adamw",
            update_proj_gap=3,
            model=self.model,
            capture="fused",
        )
        return [optimizer], [LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=8)]

    def train_dataloader(self) -> dict[str, DataLoader[dict[str, Tensor]]]:
        """For each task, batches of eight rows on all processes together."""
        size, rank = self.trainer.world_size, self.trainer.global_rank
        loaders = {}
        for index, name in enumerate(TASKS):
            rows = Sentences(32, (index,))
            loaders[name] = DataLoader(rows, 8 // size, sampler=DistributedSampler(rows, size, rank, shuffle=False))
        return loaders

    def training_step(self, batches: dict[str, dict[str, Tensor]], index: int) -> None:
        """A forward and a backward pass for each task, and one step."""
        optimizer: Any = self.optimizers()
        gems: GemsOptimizer = optimizer.optimizer
        wrapper = self.trainer.strategy.model
        # The optimizer sums over the processes what it captured; the wrapper's own gradients would travel for nothing.
        quiet = wrapper.no_sync() if isinstance(wrapper, DistributedDataParallel) else contextlib.nullcontext()
        with quiet:
            for name, batch in batches.items():
                batch.pop("task")
                with gems.task(name, samples=len(batch["input_ids"])):
                    loss = self.model(**batch).loss
                    self.manual_backward(loss)
                self.log(f"loss/{name}", loss)
        gems.clip_grad_norm_(1.0)  # Lightning's gradient_clip_val is for automatic optimization
        optimizer.step()  # Lightning's wrapper counts the step
        gems.zero_grad()
        schedule: Any = self.lr_schedulers()
        schedule.step()


def main() -> None:
    """Train for two epochs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()

    folder = arguments.out.parent / "lightning"
    module = TwoTasks()
    trainer = lightning.Trainer(
        accelerator="auto" if arguments.processes == 1 else "cpu",
        devices=arguments.processes,
        strategy="auto" if arguments.processes == 1 else "ddp",
        max_epochs=2,
        use_distributed_sampler=False,  # the module's own, in order
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=str(folder / "epoch=0.ckpt") if arguments.resume else None)
    if trainer.is_global_zero:
        save_weights(module.model, arguments.out)


if __name__ == "__main__":
    main()
