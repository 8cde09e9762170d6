"""TRL's SFTTrainer with the mixin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from examples.recipes.problem import build_model
from tests.integrations.trainers import GEMS, STEPS, Remembering, by_hand, distance

# TRL's configuration sets an option of transformers that newer versions call otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

TEXTS = [("red shoes for men", "search"), ("one two", "rec"), ("blue lamp", "search"), ("two three one four", "rec")]


class SFT(Remembering, SFTTrainer):
    """`Remembering` comes first, so it is the mixin that SFTTrainer stands behind."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for text, _ in TEXTS for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<end>", "<unknown>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>")


def train(folder: Path, gems: dict[str, Any], **options: Any) -> SFT:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "max_length": 12,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    rows = Dataset.from_list([{"text": text, "task": task} for text, task in TEXTS] * 12)
    rows = rows if len(gems["tasks"]) > 1 else rows.remove_columns("task")
    options = SFTConfig(**{**defaults, **options})
    trainer = SFT(model=build_model(), args=options, train_dataset=rows, processing_class=tokenizer(), gems=gems)
    trainer.train()
    return trainer


def test_texts_of_two_tasks(tmp_path: Path) -> None:
    """The gate's losses come from the log-probabilities, since TRL makes no logits."""
    trainer = train(tmp_path, GEMS)
    for step in trainer.steps:
        longest = max(batch["input_ids"].shape[1] for batch in step)
        for batch in step:
            for name, padding in (("input_ids", 0), ("labels", -100)):
                missing = longest - batch[name].shape[1]
                batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=padding)
    assert distance(trainer.model, by_hand(trainer.steps, True)) < 1e-5
    assert distance(trainer.model, build_model()) > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, r"the rows have no column 'task'.*as TRL's packing=True does"),
        ({"padding_free": True, "max_length": None}, r"a batch was made of 3 rows with a task each, but has 1 rows"),
    ],
)
def test_joined_rows_of_several_tasks_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, GEMS, **options)


def test_joined_rows_of_one_task_are_right(tmp_path: Path) -> None:
    """Padding changes nothing, so neither does leaving it out."""
    one = {**GEMS, "tasks": ("all",)}
    padded, joined = (train(tmp_path, one, padding_free=free, max_length=None) for free in (False, True))
    assert distance(padded.model, joined.model) < 1e-5
    assert distance(padded.model, build_model()) > 1e-2
