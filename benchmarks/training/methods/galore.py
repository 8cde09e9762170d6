"""galore-torch's GaLoreAdamW."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ..models import trained_weights
from ..problem import Problem
from ._training import Accumulating, Method, Training


class GaLore(Method):
    summary = "galore-torch's GaLoreAdamW, one batch a task, accumulated"
    refreshes = "decomposition"
    packages: ClassVar = {"galore_torch": "gradsub[benchmarks]"}

    def build(self, model: nn.Module, problem: Problem) -> Training:
        from galore_torch import GaLoreAdamW

        group = {
            "params": trained_weights(model),
            "rank": problem.rank,
            "update_proj_gap": problem.update_proj_gap,
            "scale": 1.0,
            "proj_type": "std",
        }
        optimizer = GaLoreAdamW(
            [group], lr=problem.learning_rate, weight_decay=problem.weight_decay, no_deprecation_warning=True
        )
        return Accumulating(model, optimizer)
