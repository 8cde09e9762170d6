"""The floor: forward and backward passes that reach every layer's input, and no weight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..data import Batch, join
from ..models import mean_loss
from ..problem import Problem
from ._training import Method, Training


class FloorTraining(Training):
    """Gradients flow through the whole network, no weight gets one, nothing is updated."""

    def __init__(self, model: nn.Module, one_batch: bool) -> None:
        super().__init__(model)
        self._one_batch = one_batch
        model.requires_grad_(False)
        # Without it nothing would require a gradient and there would be no backward pass at all. An encoder and a
        # decoder have an embedding each, of which get_input_embeddings() names neither.
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings == model.config.vocab_size:
                module.register_forward_hook(_require_gradient)

    def step(self, batches: Sequence[Batch]) -> float:
        batches = [join(batches)] if self._one_batch else batches
        total = 0.0
        for batch in batches:
            loss = mean_loss(self.model, batch) / len(batches)
            loss.backward()
            total += loss.item()
        return total


class Floor(Method):
    def __init__(self, one_batch: bool = False) -> None:
        self._one_batch = one_batch
        rows = "all rows in one batch" if one_batch else "one batch a task"
        self.summary = f"no training: forward and input gradients alone, {rows}"

    def build(self, model: nn.Module, problem: Problem) -> Training:
        return FloorTraining(model, self._one_batch)


def _require_gradient(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
    output.requires_grad_(True)
