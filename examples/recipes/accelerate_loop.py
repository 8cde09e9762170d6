"""accelerate: a training loop of one's own on any number of processes.

    .venv/bin/python examples/recipes/accelerate_loop.py --out weights.pt
    .venv/bin/accelerate launch --num_processes 2 examples/recipes/accelerate_loop.py --out weights.pt

With ``--state folder`` it writes accelerate's checkpoint after four steps, or goes on from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from problem import TASKS, Sentences, build_model, save_weights
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from gradsub import GemsOptimizer


def main() -> None:
    """Train for eight steps; with ``--state``, write accelerate's checkpoint after four, or go on from it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path)
    arguments = parser.parse_args()

    # The batches below are those of all processes together, whatever their number.
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    # The model first: then the optimizer sees the wrapper, and the wrapper sends no gradients inside of a task.
    model = accelerator.prepare(build_model())
    optimizer = GemsOptimizer(
        AdamW(model.parameters(), lr=1e-3),
        tasks=TASKS,
        rank=8,
        lr_scale="adamw",
        update_proj_gap=3,
        model=model,
        capture="fused",
    )
    schedule = LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=8)
    loaders = [accelerator.prepare(DataLoader(Sentences(64, (task,)), batch_size=8)) for task in range(len(TASKS))]
    accelerator.register_for_checkpointing(optimizer, schedule)
    done = 0
    if arguments.state is not None and arguments.state.exists():
        accelerator.load_state(str(arguments.state))
        done = schedule.last_epoch

    for step, batches in enumerate(zip(*loaders, strict=True)):
        if step < done:
            continue
        for task, batch in zip(TASKS, batches, strict=True):
            batch.pop("task")
            with optimizer.task(task, samples=len(batch["input_ids"])):
                accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step == 3 and arguments.state is not None and not arguments.state.exists():
            accelerator.save_state(str(arguments.state))

    if accelerator.is_main_process:
        save_weights(accelerator.unwrap_model(model), arguments.out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
