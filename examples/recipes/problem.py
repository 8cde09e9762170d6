"""A language model of 50,000 weights and two tasks made of random sentences: small enough to train anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

TASKS = ("search", "rec")
LENGTH = 12


def build_model() -> LlamaForCausalLM:
    """The same random weights in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


class Sentences(Dataset[dict[str, Tensor]]):
    """Rows of one task, or of both in turns.

    Args:
        count: number of rows.
        tasks: indices of the tasks, which take turns.
    """

    def __init__(self, count: int, tasks: tuple[int, ...]) -> None:
        self.count, self.tasks = count, tasks

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        task = self.tasks[index % len(self.tasks)]
        generator = torch.Generator().manual_seed(1000 * task + index)
        tokens = torch.randint(32 * task, 32 * task + 32, (LENGTH,), generator=generator)
        return {"input_ids": tokens, "labels": tokens, "task": torch.tensor(task)}


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the trained weights, and say where."""
    weights: dict[str, Any] = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    torch.save(weights, path)
    print(f"wrote {path}")
