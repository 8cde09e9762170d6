"""AdamW and LoRA, which do not know the tasks apart, on one batch a task or on one joint batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from ..data import Batch, join
from ..models import trained_layers, trained_weights
from ..problem import Problem
from ._training import Accumulating, Method, Training, adamw


class OneBatch(Accumulating):
    """All rows in one batch: what one would do if the tasks need not be told apart."""

    def step(self, batches: Sequence[Batch]) -> float:
        return super().step([join(batches)])


class LoraMixin(Training):
    """Counts the adapters as state: the other methods have none."""

    def state_bytes(self) -> int:
        return super().state_bytes() + sum(parameter.nbytes for parameter in self.trained())


class Lora(LoraMixin, Accumulating):
    pass


class LoraOneBatch(LoraMixin, OneBatch):
    pass


class AdamWMethod(Method):
    def __init__(self, one_batch: bool = False) -> None:
        self._training = OneBatch if one_batch else Accumulating
        self.summary = f"torch.optim.AdamW, {'all rows in one batch' if one_batch else 'one batch a task, accumulated'}"

    def build(self, model: nn.Module, problem: Problem) -> Training:
        return self._training(model, adamw(trained_weights(model), problem))


class LoraMethod(Method):
    packages: ClassVar = {"peft": "gradsub[benchmarks]"}

    def __init__(self, one_batch: bool = False) -> None:
        self._training = LoraOneBatch if one_batch else Lora
        self.summary = (
            f"peft's LoRA under AdamW, {'all rows in one batch' if one_batch else 'one batch a task, accumulated'}"
        )

    def build(self, model: nn.Module, problem: Problem) -> Training:
        from peft import LoraConfig, get_peft_model

        options: dict[str, Any] = {"r": problem.rank, "lora_alpha": problem.rank, "lora_dropout": 0.0, "bias": "none"}
        # Names instead of "all-linear", so that these are the layers that everyone trains.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's, about its own use of transformers
            adapted = get_peft_model(model, LoraConfig(**options, target_modules=list(trained_layers(model))))
        return self._training(adapted, adamw((p for p in adapted.parameters() if p.requires_grad), problem))
