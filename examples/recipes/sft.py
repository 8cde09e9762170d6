"""TRL's SFTTrainer: texts of several tasks, one forward pass a batch.

    .venv/bin/python examples/recipes/sft.py --out weights.pt

``packing`` and ``padding_free`` stay off: they join rows of several tasks into one sequence.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from problem import TASKS, build_model, save_weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from gradsub.integrations import GemsTrainerMixin

TEXTS = {
    "search": ["red shoes for running : item three", "quiet blue lamp : item five", "warm red lamp : item seven"],
    "rec": ["item three , item five : item seven", "item seven , item three : item five"],
}


class GemsSFTTrainer(GemsTrainerMixin, SFTTrainer):
    """An SFTTrainer whose texts have a column ``task``."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = sorted({word for texts in TEXTS.values() for text in texts for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<end>", "<unknown>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )


def main() -> None:
    """Train for eight steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    rows = [{"text": text, "task": task} for task in TASKS for text in TEXTS[task]] * 8
    trainer = GemsSFTTrainer(
        model=build_model(),
        args=SFTConfig(
            output_dir=str(arguments.out.parent / "sft"),
            learning_rate=1e-3,
            max_length=12,
            per_device_train_batch_size=4,
            max_steps=8,
            save_strategy="no",
            logging_steps=2,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=build_tokenizer(),
        gems={"tasks": TASKS, "rank": 8, "lr_scale": "adamw", "update_proj_gap": 3, "capture": "fused"},
    )
    trainer.train()
    if trainer.is_world_process_zero():
        save_weights(trainer.accelerator.unwrap_model(trainer.model), arguments.out)


if __name__ == "__main__":
    main()
