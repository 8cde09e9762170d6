"""A Trainer on two processes takes the steps that it takes on one."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.distributed.launch import launch

# Ragged rows: the processes have different numbers of labels, and of rows of a task.
SETTINGS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "accumulated and clipped": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3},
    "a stream": {},
}


def train(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """By setting, the trained weights and whether losses were averaged by the Trainer."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    from examples.recipes.problem import build_model
    from tests.integrations.trainers import GEMS, Ragged, Remembering, Stream, arguments

    found: dict[str, Any] = {}
    for name, options in SETTINGS.items():
        warnings.simplefilter("error")  # "travel for nothing" among others
        model = build_model()
        split = {"split_batches": True}  # of the same rows on any number of processes
        settings = arguments(folder, ddp_backend="gloo", accelerator_config=split, **options)
        rows = Stream() if name == "a stream" else Ragged()
        trainer = Remembering(model, settings, train_dataset=rows, gems=GEMS)
        trainer.train()
        assert trainer.accelerator.num_processes == ranks
        found[name] = {key: value.detach() for key, value in model.state_dict().items()}
        found[f"{name}, rows"] = [[len(batch["task"].tasks) for batch in step] for step in trainer.steps]
    return found


def test_two_processes_are_one(tmp_path: Path) -> None:
    (one,) = launch(train, 1, tmp_path / "one", 1, tmp_path)
    first, second = launch(train, 2, tmp_path / "two", 2, tmp_path)
    for name in SETTINGS:
        assert {rows for step in first[f"{name}, rows"] for rows in step} == {2}
        assert {rows for step in one[f"{name}, rows"] for rows in step} == {4}
        for key, weight in one[name].items():
            torch.testing.assert_close(first[name][key], weight, rtol=0, atol=1e-6)
            assert torch.equal(first[name][key], second[name][key]), key
