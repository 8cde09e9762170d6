"""TorchJD: the Jacobian of the tasks' losses, aggregated by PCGrad or UPGrad, under AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..data import Batch, join
from ..models import mean_loss, task_losses, trained_weights
from ..problem import Problem
from ._training import Method, Training, adamw


class JacobianDescent(Training):
    """``autojac.backward`` and ``jac_to_grad``.

    Args:
        model: the model.
        optimizer: steps with the aggregated gradient.
        aggregator: of `torchjd.aggregation`.
        tuned: False: its options as they are by default, a forward pass a task. True: the fastest options found here:
            one forward pass, one row of the Jacobian at a time, no concatenated Jacobian.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, aggregator: Any, tuned: bool) -> None:
        super().__init__(model, optimizer)
        self._weights = trained_weights(model)
        self._aggregator = aggregator
        self._tuned = tuned

    def step(self, batches: Sequence[Batch]) -> float:
        from torchjd.autojac import backward, jac_to_grad

        if self._tuned:
            losses = task_losses(self.model, join(batches), len(batches))
            backward(losses, inputs=self._weights, parallel_chunk_size=1)
            jac_to_grad(self._weights, self._aggregator, optimize_gramian_computation=True)
        else:
            losses = [mean_loss(self.model, batch) for batch in batches]
            with warnings.catch_warnings():
                # torch.vmap announces the operators for which it loops over the tasks; that is timed as it is.
                warnings.filterwarnings("ignore", message=".*batching rule.*")
                backward(losses, inputs=self._weights)
            jac_to_grad(self._weights, self._aggregator)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(loss.item() for loss in losses) / len(losses)


class TorchJD(Method):
    """Args: the aggregator's name in `torchjd.aggregation`; whether to use the options found fastest."""

    def __init__(self, aggregator: str, tuned: bool = False) -> None:
        self._aggregator = aggregator
        self._tuned = tuned
        options = "options as found fastest" if tuned else "default options"
        self.summary = f"torchjd's {aggregator} under AdamW, {options}"
        self.packages = {"torchjd": "gradsub[benchmarks]"}
        if aggregator == "UPGrad":
            needed = "torchjd[quadprog-projector]"
            self.packages |= {"qpsolvers": needed, "quadprog": needed}

    def build(self, model: nn.Module, problem: Problem) -> Training:
        from torchjd import aggregation

        aggregator = getattr(aggregation, self._aggregator)()
        return JacobianDescent(model, adamw(trained_weights(model), problem), aggregator, self._tuned)
