"""pytorch-optimizer's PCGrad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from ..data import Batch
from ..models import mean_loss, trained_weights
from ..problem import Problem
from ._training import Method, Training, adamw


class ProjectingConflicts(Training):
    """``pc_backward`` on a list of losses, a forward pass a task."""

    def step(self, batches: Sequence[Batch]) -> float:
        losses = [mean_loss(self.model, batch) for batch in batches]
        self.optimizer.pc_backward(losses)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(loss.item() for loss in losses) / len(losses)


class PytorchOptimizerPCGrad(Method):
    summary = "pytorch-optimizer's PCGrad around AdamW"
    packages: ClassVar = {"pytorch_optimizer": "gradsub[benchmarks]"}

    def build(self, model: nn.Module, problem: Problem) -> Training:
        from pytorch_optimizer import PCGrad

        return ProjectingConflicts(model, PCGrad(adamw(trained_weights(model), problem)))
