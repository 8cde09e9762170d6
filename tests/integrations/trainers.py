"""What the tests of trainers share: ragged rows, a Trainer that remembers its batches, the same steps by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from examples.recipes.problem import TASKS, Sentences, build_model
from gradsub import GemsOptimizer
from gradsub.integrations import GemsTrainerMixin

GEMS = {"tasks": TASKS, "rank": 8, "update_proj_gap": 3, "capture": "fused"}
STEPS = 4


class Ragged(Dataset[dict[str, Any]]):
    """Rows with different numbers of labels, tasks in unequal shares and by name."""

    def __init__(self, count: int = 96, key: str = "task") -> None:
        self.rows, self.key = Sentences(count, (0, 1)), key

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = dict(self.rows[index])
        labels = row["labels"].clone()
        labels[: index % 7] = -100
        del row["task"]
        return {**row, "labels": labels, self.key: TASKS[1 if index % 4 == 3 else 0]}


class Stream(IterableDataset[dict[str, Any]]):
    """The same rows without indices, which one process reads for all."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = Ragged()
        return (rows[index] for index in range(len(rows)))


class Remembering(GemsTrainerMixin, Trainer):
    """Keeps the batches of each step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.steps: list[list[dict[str, Any]]] = []
        super().__init__(*arguments, **options)

    def get_batch_samples(self, *arguments: Any, **options: Any) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(*arguments, **options)
        self.steps.append([dict(batch) for batch in batches])
        return batches, items


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 0.5,
        "optim": "sgd",  # Adam would blow a rounding up to the size of a step
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **options})


def by_hand(
    steps: list[list[dict[str, Any]]],
    tokens: bool,
    clip: float = 0.0,
    separate: bool = True,
    adam: bool = False,
    **gems: Any,
) -> nn.Module:
    """The steps of a plain loop.

    Args:
        steps: of each step its batches, whose tasks `GemsTrainerMixin` has counted.
        tokens: a token counts the same in all batches of a step; otherwise every batch counts the same.
        clip: the bound on the norms, or 0.
        separate: a forward and a backward pass for each task; otherwise one for the whole step, in one mixed batch.
        adam: the base optimizer.
        gems: other arguments of the optimizer.
    """
    model = build_model()
    base = AdamW(model.parameters(), lr=0.003, weight_decay=0.0) if adam else SGD(model.parameters(), lr=0.5)
    optimizer = GemsOptimizer(base, model=model, **{**GEMS, **gems})
    names = optimizer.tasks
    schedule = LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for batches in steps:
        inputs = torch.cat([batch["input_ids"] for batch in batches])
        labels = torch.cat([batch["labels"] for batch in batches])
        tasks = torch.tensor([task for batch in batches for task in batch["task"].tasks])
        counts = (labels[:, 1:] != -100).sum(1).double()
        if not tokens:
            sizes = torch.tensor([len(batch["input_ids"]) for batch in batches])
            own = torch.stack([part.sum() for part in counts.split(sizes.tolist())])
            counts = counts / own.repeat_interleave(sizes) / len(batches)
        present = tasks.unique().tolist()
        samples = {names[task]: float(counts[tasks == task].sum()) for task in present}

        def means(rows: Tensor, inputs: Tensor = inputs, labels: Tensor = labels, counts: Tensor = counts) -> Tensor:
            logits = model(input_ids=inputs[rows]).logits[:, :-1]
            losses = cross_entropy(logits.mT, labels[rows, 1:], reduction="none").sum(1)
            found: Tensor = losses * (counts / (labels[:, 1:] != -100).sum(1))[rows]
            return found

        if separate:
            for task in present:
                rows = (tasks == task).nonzero()[:, 0]
                with optimizer.task(names[task], samples[names[task]]):
                    (means(rows).sum() / samples[names[task]]).backward()
        else:
            total = sum(samples.values())
            with optimizer.mixed(tasks, samples, shares={k: n / total for k, n in samples.items()}) as mixed:
                losses = means(torch.arange(len(tasks)))
                mixed.tell({names[task]: losses[tasks == task].sum() / samples[names[task]] for task in present})
                (losses.sum() / sum(samples.values())).backward()
        if clip:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def distance(first: nn.Module, second: nn.Module) -> float:
    """The largest difference between two models' weights."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((one.detach() - other.detach()).abs().max()) for one, other in pairs)
