"""The published procedure as it is described: a pass for the mixture, one a task, and full decompositions.

For every weight W (m x n), G_0 is the gradient of the mixed batch and G_1 .. G_K are the tasks' own. A full SVD of each
gives the bases U_0 (m x rank) and U_k (m x rank // 2), every ``update_proj_gap`` steps. In between Adam runs on each
R = U^T G, and

    W <- W + U_0 d_0 + sum_k g_k U_k d_k

with gates g_k = 0.4 * share of the loss + 0.4 * share of the gradient norm + 0.2 * share of the samples. The null
space, which the publication puts in front of it, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import Batch, join
from ..models import mean_loss, trained_weights
from ..problem import Problem
from ._training import Method, Training, tensor_bytes


@dataclass
class Subspace:
    """A basis (m x r) and Adam's moments in it (r x n)."""

    basis: Tensor
    first: Tensor
    second: Tensor


class ThreePasses(Training):
    """K + 1 forward and backward passes a step; the full gradients of all of them are kept until its end."""

    def __init__(self, model: nn.Module, problem: Problem) -> None:
        super().__init__(model)
        self._problem = problem
        self._weights = trained_weights(model)
        self._subspaces: list[list[Subspace]] = [[] for _ in self._weights]
        self._steps = 0

    def step(self, batches: Sequence[Batch]) -> float:
        losses, gradients = [], []
        for batch in [join(batches), *batches]:
            loss = mean_loss(self.model, batch)
            loss.backward()
            losses.append(loss.item())
            gradients.append([weight.grad for weight in self._weights])
            self.model.zero_grad()
        self._update(gradients, _gates(losses[1:], gradients[1:], [batch.rows for batch in batches]))
        return losses[0]

    def state_bytes(self) -> int:
        return tensor_bytes([vars(each) for subspaces in self._subspaces for each in subspaces])

    @torch.no_grad()
    def _update(self, gradients: list[list[Tensor]], gates: list[float]) -> None:
        refresh = self._steps % self._problem.update_proj_gap == 0
        self._steps += 1
        for index, weight in enumerate(self._weights):
            own = [gradient[index] for gradient in gradients]
            if refresh:
                self._subspaces[index] = self._refreshed(own, self._subspaces[index])
            weight.mul_(1 - self._problem.learning_rate * self._problem.weight_decay)
            for gradient, subspace, gate in zip(own, self._subspaces[index], [1.0, *gates], strict=True):
                weight.add_(subspace.basis @ self._adam(subspace, subspace.basis.mT @ gradient), alpha=gate)

    def _refreshed(self, gradients: list[Tensor], old: list[Subspace]) -> list[Subspace]:
        """New bases; the moments stay as they are."""
        refreshed = []
        for position, gradient in enumerate(gradients):
            rank = max(1, self._problem.rank // 2) if position else self._problem.rank
            basis = torch.linalg.svd(gradient, full_matrices=False).U[:, :rank].contiguous()
            if old:
                refreshed.append(Subspace(basis, old[position].first, old[position].second))
            else:
                shape = (basis.shape[1], gradient.shape[1])
                refreshed.append(Subspace(basis, gradient.new_zeros(shape), gradient.new_zeros(shape)))
        return refreshed

    def _adam(self, subspace: Subspace, gradient: Tensor) -> Tensor:
        beta1, beta2, epsilon = 0.9, 0.999, 1e-8
        subspace.first.lerp_(gradient, 1 - beta1)
        subspace.second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (subspace.second / (1 - beta2**self._steps)).sqrt_().add_(epsilon)
        return (subspace.first / scale).mul_(-self._problem.learning_rate / (1 - beta1**self._steps))


def _gates(losses: list[float], gradients: list[list[Tensor]], rows: list[int]) -> list[float]:
    norms = [float(torch.stack([torch.linalg.vector_norm(part) for part in parts]).norm()) for parts in gradients]
    shares = [[value / sum(values) for value in values] for values in (losses, norms, rows)]
    return [0.4 * loss + 0.4 * norm + 0.2 * samples for loss, norm, samples in zip(*shares, strict=True)]


class ThreePass(Method):
    summary = "the published procedure: K + 1 passes, full gradients, full SVDs (written for this comparison)"
    refreshes = "decomposition"

    def build(self, model: nn.Module, problem: Problem) -> Training:
        return ThreePasses(model, problem)
